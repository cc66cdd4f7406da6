//! Endpoints of a cluster.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::address::Address as PbAddress;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, HealthStatus, SocketAddress};
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;

use crate::cluster::transport::{self, Traits};
use crate::error::{CompileError, Result, Within, every_field};
use crate::metadata;

/// Highest priority that Envoy accepts.
const MOST_PRIORITY: u32 = 128;

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where to connect.
    pub address: SocketAddr,
    /// Its host name, where it has one.
    pub hostname: Arc<str>,
    key: Option<Box<str>>,
    /// Relative weight, at least 1.
    pub weight: u32,
    /// Its health as the control plane sees it.
    pub health: Health,
    /// Who runs there.
    pub workload: Workload,
    /// What selects its transport socket.
    pub traits: Traits,
    /// `region/zone/subzone`, empty where unknown.
    pub locality: Arc<str>,
    /// Its locality in [`EndpointSet::localities`].
    pub locality_index: u32,
    /// 0 is preferred.
    pub priority: u32,
}

impl Endpoint {
    /// What consistent hashing hashes.
    pub(crate) fn hash_key(&self, by_name: bool) -> std::borrow::Cow<'_, str> {
        match &self.key {
            Some(key) => (&**key).into(),
            None if by_name && !self.hostname.is_empty() => (&*self.hostname).into(),
            None => self.address.to_string().into(),
        }
    }
}

/// Health of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Takes traffic.
    Healthy,
    /// Takes traffic when no healthy one is left.
    Degraded,
    /// Takes none.
    Unhealthy,
}

/// The workload behind an endpoint, from Istio's endpoint metadata `istio.workload` =
/// `name;namespace;canonical name;canonical revision;cluster`. Fields that are not known are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Workload {
    /// Workload (deployment) name.
    pub name: Box<str>,
    /// Its namespace.
    pub namespace: Box<str>,
    /// Canonical service.
    pub canonical_name: Box<str>,
    /// Canonical revision.
    pub canonical_revision: Box<str>,
    /// Kubernetes cluster.
    pub cluster: Box<str>,
}

impl Workload {
    fn parse(text: &str) -> Self {
        let mut parts = text.split(';');
        let mut next = || Box::<str>::from(parts.next().unwrap_or(""));
        Self {
            name: next(),
            namespace: next(),
            canonical_name: next(),
            canonical_revision: next(),
            cluster: next(),
        }
    }
}

/// A group of endpoints in one place and of one priority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locality {
    /// `region/zone/subzone`, empty where unknown.
    pub name: Arc<str>,
    /// 0 is preferred.
    pub priority: u32,
    /// Its share, where localities have weights; 0 takes nothing then.
    pub weight: u32,
}

/// All endpoints of a cluster.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct EndpointSet {
    endpoints: Vec<Endpoint>,
    localities: Vec<Locality>,
    overprovisioning: u32,
}

impl EndpointSet {
    /// Compiles the message.
    pub fn compile(m: &pb::ClusterLoadAssignment) -> Result<Self> {
        let draft = Draft::compile(m)?;
        let endpoint = |(target, endpoint): (Target, Endpoint)| match target {
            Target::Address(address) => Ok(Endpoint {
                address,
                ..endpoint
            }),
            Target::Name(name, _) => Err(CompileError::new(
                "address",
                format!("{name:?} is not an IP address (names need a DNS cluster)"),
            )),
        };
        let endpoints = draft.endpoints.into_iter().map(endpoint);
        Ok(Self::of(
            endpoints.collect::<Result<_>>()?,
            draft.localities,
            draft.overprovisioning,
        ))
    }

    /// Of several endpoints with one address the first one counts, as in Envoy.
    fn of(mut endpoints: Vec<Endpoint>, localities: Vec<Locality>, overprovisioning: u32) -> Self {
        let mut seen = HashSet::with_capacity(endpoints.len());
        endpoints.retain(|endpoint| seen.insert(endpoint.address));
        Self {
            endpoints,
            localities,
            overprovisioning,
        }
    }

    /// All endpoints, also unhealthy ones.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The localities that endpoints point to.
    pub fn localities(&self) -> &[Locality] {
        &self.localities
    }

    /// How far a priority may lose endpoints before load spills to the next, in percent of what is needed.
    pub(crate) fn overprovisioning(&self) -> u32 {
        self.overprovisioning
    }
}

/// Endpoints whose addresses come from DNS.
#[derive(Debug)]
pub struct NamedEndpoints(Draft);

impl NamedEndpoints {
    /// Compiles the `load_assignment` of a DNS cluster.
    pub(crate) fn compile(m: &pb::ClusterLoadAssignment) -> Result<Self> {
        Draft::compile(m).map(Self)
    }

    /// The names to look up, without repetition.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for (target, _) in &self.0.endpoints {
            if let Target::Name(name, _) = target
                && !names.contains(&&**name)
            {
                names.push(name);
            }
        }
        names
    }

    /// The endpoints once the names are known: one for each address (`first_only`: for the first address, as LOGICAL_DNS wants it).
    pub fn resolve(
        &self,
        addresses: impl Fn(&str) -> Vec<IpAddr>,
        first_only: bool,
    ) -> EndpointSet {
        let mut endpoints = Vec::new();
        for (target, template) in &self.0.endpoints {
            let found = match target {
                Target::Address(address) => vec![*address],
                Target::Name(name, port) => addresses(name)
                    .into_iter()
                    .take(if first_only { 1 } else { usize::MAX })
                    .map(|ip| SocketAddr::new(ip, *port))
                    .collect(),
            };
            let hostname = match target {
                Target::Name(name, _) if template.hostname.is_empty() => name,
                _ => &template.hostname,
            };
            endpoints.extend(found.into_iter().map(|address| Endpoint {
                address,
                hostname: hostname.clone(),
                ..template.clone()
            }));
        }
        EndpointSet::of(
            endpoints,
            self.0.localities.clone(),
            self.0.overprovisioning,
        )
    }
}

/// Where an endpoint says that it is.
#[derive(Debug)]
enum Target {
    Address(SocketAddr),
    Name(Arc<str>, u16),
}

/// A message on its way to a set; the addresses in the endpoints are filled in later.
#[derive(Debug)]
struct Draft {
    endpoints: Vec<(Target, Endpoint)>,
    localities: Vec<Locality>,
    overprovisioning: u32,
}

impl Draft {
    fn compile(m: &pb::ClusterLoadAssignment) -> Result<Self> {
        every_field!(m, pb::ClusterLoadAssignment, used { endpoints, policy }
            irrelevant { cluster_name, named_endpoints } refused {});
        let mut draft = Self {
            endpoints: Vec::new(),
            localities: Vec::new(),
            overprovisioning: 140,
        };
        if let Some(policy) = &m.policy {
            every_field!(policy, pb::cluster_load_assignment::Policy, used { overprovisioning_factor }
                // endpoint_stale_after: the stream tells.
                irrelevant { endpoint_stale_after } refused { drop_overloads, weighted_priority_health });
            draft.overprovisioning = policy
                .overprovisioning_factor
                .map_or(140, |f| f.value.max(1));
        }
        for (i, group) in m.endpoints.iter().enumerate() {
            draft.group(group).within(format_args!("endpoints[{i}]"))?;
        }
        Ok(draft)
    }

    fn group(&mut self, m: &pb::LocalityLbEndpoints) -> Result<()> {
        every_field!(m, pb::LocalityLbEndpoints, used { locality, lb_endpoints, priority, load_balancing_weight }
            // proximity: Envoy does not use it either.
            irrelevant { metadata, proximity } refused { lb_config });
        if m.priority > MOST_PRIORITY {
            let reason = format!("{} is more than {MOST_PRIORITY}", m.priority);
            return Err(CompileError::new("priority", reason));
        }
        let name: Arc<str> = match &m.locality {
            Some(l) => [l.region.as_str(), &l.zone, &l.sub_zone]
                .join("/")
                .trim_end_matches('/')
                .into(),
            None => "".into(),
        };
        let known = self
            .localities
            .iter()
            .position(|l| l.name == name && l.priority == m.priority);
        let index = known.unwrap_or(self.localities.len());
        if known.is_none() {
            self.localities.push(Locality {
                name: name.clone(),
                priority: m.priority,
                weight: m.load_balancing_weight.map_or(0, |w| w.value),
            });
        }
        for (i, endpoint) in m.lb_endpoints.iter().enumerate() {
            let (target, mut endpoint) =
                compile_endpoint(endpoint).within(format_args!("lb_endpoints[{i}]"))?;
            endpoint.locality = name.clone();
            endpoint.locality_index = index as u32;
            endpoint.priority = m.priority;
            self.endpoints.push((target, endpoint));
        }
        Ok(())
    }
}

fn compile_endpoint(m: &pb::LbEndpoint) -> Result<(Target, Endpoint)> {
    let endpoint = match &m.host_identifier {
        Some(HostIdentifier::Endpoint(endpoint)) => endpoint,
        Some(HostIdentifier::EndpointName(_)) => {
            return Err(CompileError::unsupported("endpoint_name"));
        }
        None => return Err(CompileError::new("endpoint", "is missing")),
    };
    // health_check_config: there is no active health checking. observability_name: for statistics. additional_addresses: other families of
    // the same endpoint; the first address is the one to use.
    let target = target(endpoint.address.as_ref()).within("endpoint.address")?;
    transport::refuse_tlvs(m.metadata.as_ref()).within("metadata")?;
    let workload =
        metadata::istio(m.metadata.as_ref()).and_then(|istio| metadata::text(istio, "workload"));
    let endpoint = Endpoint {
        address: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        hostname: endpoint.hostname.as_str().into(),
        key: hash_key(m),
        weight: m.load_balancing_weight.map_or(1, |w| w.value.max(1)),
        health: match HealthStatus::try_from(m.health_status) {
            Ok(HealthStatus::Unknown | HealthStatus::Healthy) => Health::Healthy,
            Ok(HealthStatus::Degraded) => Health::Degraded,
            // DRAINING, TIMEOUT and what may come take no new requests.
            _ => Health::Unhealthy,
        },
        workload: workload.map(Workload::parse).unwrap_or_default(),
        traits: transport::traits(m.metadata.as_ref()),
        locality: "".into(),
        locality_index: 0,
        priority: 0,
    };
    Ok((target, endpoint))
}

/// `filter_metadata["envoy.lb"].hash_key`, which stands for the address in consistent hashing.
fn hash_key(m: &pb::LbEndpoint) -> Option<Box<str>> {
    let lb = m.metadata.as_ref()?.filter_metadata.get("envoy.lb")?;
    metadata::text(lb, "hash_key").map(Box::from)
}

fn target(m: Option<&Address>) -> Result<Target> {
    if let Some(PbAddress::SocketAddress(socket)) = m.and_then(|m| m.address.as_ref())
        && socket.address.parse::<IpAddr>().is_err()
        && is_host_name(&socket.address)
    {
        let mut with_address = socket.clone();
        with_address.address = "0.0.0.0".to_owned();
        let port = ip_socket(&with_address)?.port();
        return Ok(Target::Name(socket.address.as_str().into(), port));
    }
    socket_address(m).map(Target::Address)
}

fn is_host_name(text: &str) -> bool {
    let fits = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    !text.is_empty() && text.len() <= 253 && text.bytes().all(fits)
}

/// An IP address and port; names and pipes are refused.
pub(crate) fn socket_address(m: Option<&Address>) -> Result<SocketAddr> {
    match m.and_then(|m| m.address.as_ref()) {
        Some(PbAddress::SocketAddress(m)) => ip_socket(m),
        Some(PbAddress::Pipe(_)) => Err(CompileError::unsupported("pipe")),
        Some(PbAddress::EnvoyInternalAddress(_)) => {
            Err(CompileError::unsupported("envoy_internal_address"))
        }
        None => Err(CompileError::new("address", "is missing")),
    }
}

pub(crate) fn ip_socket(m: &SocketAddress) -> Result<SocketAddr> {
    every_field!(m, SocketAddress, used { protocol, address, port_specifier } irrelevant { resolver_name, ipv4_compat }
        refused { network_namespace_filepath });
    if m.protocol != 0 {
        return Err(CompileError::new("protocol", "UDP is not implemented"));
    }
    let ip: IpAddr = m.address.parse().map_err(|_| {
        CompileError::new("address", format!("{:?} is not an IP address", m.address))
    })?;
    let port = match &m.port_specifier {
        Some(PortSpecifier::PortValue(port)) => *port,
        Some(PortSpecifier::NamedPort(_)) => return Err(CompileError::unsupported("named_port")),
        None => 0,
    };
    let port = u16::try_from(port)
        .map_err(|_| CompileError::new("port_value", format!("{port} is not a port")))?;
    Ok(SocketAddr::new(ip, port))
}
