//! Endpoints of a cluster, arranged for picking.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::address::Address as PbAddress;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, HealthStatus, SocketAddress};
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;

use crate::error::{CompileError, Result, Within, every_field};
use crate::metadata;

/// Schedules longer than this are coarsened.
const LONGEST_SCHEDULE: u64 = 4096;

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where to connect.
    pub address: SocketAddr,
    /// Its host name, where it has one.
    pub hostname: Box<str>,
    /// Relative weight, at least 1.
    pub weight: u32,
    /// Its health as the control plane sees it.
    pub health: Health,
    /// Who runs there.
    pub workload: Workload,
    /// `region/zone/subzone`, empty where unknown.
    pub locality: Arc<str>,
    /// 0 is preferred.
    pub priority: u32,
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

/// All endpoints of a cluster, with what picking needs.
#[derive(Debug, Default)]
pub struct EndpointSet {
    endpoints: Vec<Endpoint>,
    tiers: Vec<Tier>,
}

/// The usable endpoints of one priority.
#[derive(Debug)]
pub(crate) struct Tier {
    /// Upper bound of its share, in percent, cumulative.
    pub(crate) until: u32,
    /// Indexes into the endpoints.
    pub(crate) members: Vec<u32>,
    /// Indexes in the order of weighted round robin; for equal weights the members themselves.
    pub(crate) schedule: Vec<u32>,
}

impl EndpointSet {
    /// Compiles the message. `panic_percent`: below this share of healthy endpoints health is ignored (0 turns that off).
    pub fn compile(m: &pb::ClusterLoadAssignment, panic_percent: u32) -> Result<Self> {
        every_field!(m, pb::ClusterLoadAssignment, used { endpoints, policy }
            irrelevant { cluster_name, named_endpoints } refused {});
        let mut overprovisioning = 140;
        if let Some(policy) = &m.policy {
            every_field!(policy, pb::cluster_load_assignment::Policy, used { overprovisioning_factor }
                // endpoint_stale_after: the stream tells; weighted_priority_health: weights of one priority are alike in health.
                irrelevant { endpoint_stale_after, weighted_priority_health } refused { drop_overloads });
            overprovisioning = policy
                .overprovisioning_factor
                .map_or(140, |f| f.value.max(100));
        }
        let mut endpoints = Vec::new();
        for (i, group) in m.endpoints.iter().enumerate() {
            compile_group(group, &mut endpoints).within(format_args!("endpoints[{i}]"))?;
        }
        let tiers = arrange(&endpoints, panic_percent, overprovisioning);
        Ok(Self { endpoints, tiers })
    }

    /// All endpoints, also unhealthy ones.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    pub(crate) fn tier(&self, random: u64) -> Option<&Tier> {
        let point = (random % 100) as u32;
        self.tiers
            .iter()
            .find(|tier| point < tier.until)
            .or(self.tiers.last())
    }
}

fn compile_group(m: &pb::LocalityLbEndpoints, out: &mut Vec<Endpoint>) -> Result<()> {
    every_field!(m, pb::LocalityLbEndpoints, used { locality, lb_endpoints, priority }
        // load_balancing_weight and proximity count only with locality weighting, which clusters are refused for.
        irrelevant { metadata, load_balancing_weight, proximity } refused { lb_config });
    let locality: Arc<str> = match &m.locality {
        Some(l) => [l.region.as_str(), &l.zone, &l.sub_zone]
            .join("/")
            .trim_end_matches('/')
            .into(),
        None => "".into(),
    };
    for (i, endpoint) in m.lb_endpoints.iter().enumerate() {
        let endpoint = compile_endpoint(endpoint, &locality, m.priority);
        out.push(endpoint.within(format_args!("lb_endpoints[{i}]"))?);
    }
    Ok(())
}

fn compile_endpoint(m: &pb::LbEndpoint, locality: &Arc<str>, priority: u32) -> Result<Endpoint> {
    let endpoint = match &m.host_identifier {
        Some(HostIdentifier::Endpoint(endpoint)) => endpoint,
        Some(HostIdentifier::EndpointName(_)) => {
            return Err(CompileError::unsupported("endpoint_name"));
        }
        None => return Err(CompileError::new("endpoint", "is missing")),
    };
    // health_check_config: there is no active health checking. observability_name: for statistics. additional_addresses: other families of
    // the same endpoint; the first address is the one to use.
    let address = socket_address(endpoint.address.as_ref()).within("endpoint.address")?;
    let workload =
        metadata::istio(m.metadata.as_ref()).and_then(|istio| metadata::text(istio, "workload"));
    Ok(Endpoint {
        address,
        hostname: endpoint.hostname.as_str().into(),
        weight: m.load_balancing_weight.map_or(1, |w| w.value.max(1)),
        health: match HealthStatus::try_from(m.health_status) {
            Ok(HealthStatus::Unknown | HealthStatus::Healthy) => Health::Healthy,
            Ok(HealthStatus::Degraded) => Health::Degraded,
            _ => Health::Unhealthy,
        },
        workload: workload.map(Workload::parse).unwrap_or_default(),
        locality: locality.clone(),
        priority,
    })
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
        CompileError::new(
            "address",
            format!(
                "{:?} is not an IP address (names need a DNS cluster, not implemented)",
                m.address
            ),
        )
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

/// Envoy's priority levels: each takes what its health, times the overprovisioning factor, allows; the rest spills to the next. Where all
/// together are below the panic threshold, health is ignored.
fn arrange(endpoints: &[Endpoint], panic_percent: u32, overprovisioning: u32) -> Vec<Tier> {
    let mut priorities: Vec<u32> = endpoints.iter().map(|e| e.priority).collect();
    priorities.sort_unstable();
    priorities.dedup();
    let of = |priority: u32, health: Health| -> Vec<u32> {
        let wanted = |e: &&Endpoint| e.priority == priority && e.health == health;
        (0_u32..)
            .zip(endpoints)
            .filter(|(_, e)| wanted(e))
            .map(|(i, _)| i)
            .collect()
    };
    let (mut tiers, mut left) = (Vec::new(), 100_u32);
    for &priority in &priorities {
        let (mut members, degraded) = (
            of(priority, Health::Healthy),
            of(priority, Health::Degraded),
        );
        let all = endpoints.iter().filter(|e| e.priority == priority).count();
        if members.is_empty() {
            members = degraded;
        }
        let share = percent(members.len(), all, overprovisioning).min(left);
        if !members.is_empty() && share > 0 {
            left -= share;
            tiers.push((share, members));
        }
    }
    let healthy: usize = tiers.iter().map(|(_, members)| members.len()).sum();
    if !endpoints.is_empty() && percent(healthy, endpoints.len(), 100) < panic_percent {
        tiers = vec![(100, (0..endpoints.len() as u32).collect())];
    }
    let total: u32 = tiers.iter().map(|(share, _)| share).sum();
    let mut until = 0;
    let place = |(share, members): (u32, Vec<u32>)| {
        until += (share * 100).div_ceil(total.max(1));
        let schedule = schedule(endpoints, &members);
        Tier {
            until,
            members,
            schedule,
        }
    };
    tiers.into_iter().map(place).collect()
}

fn percent(part: usize, whole: usize, factor: u32) -> u32 {
    if whole == 0 {
        0
    } else {
        (part as u64 * u64::from(factor) / whole as u64).min(100) as u32
    }
}

/// Smooth weighted round robin, worked out ahead: in every turn the endpoint furthest behind its weight.
fn schedule(endpoints: &[Endpoint], members: &[u32]) -> Vec<u32> {
    let weight = |i: u32| u64::from(endpoints[i as usize].weight);
    let mut weights: Vec<u64> = members.iter().map(|&i| weight(i)).collect();
    if weights.windows(2).all(|pair| pair[0] == pair[1]) {
        return members.to_vec();
    }
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    let total: u64 = weights.iter().sum::<u64>() / divisor;
    let coarse = total.div_ceil(LONGEST_SCHEDULE).max(1);
    weights
        .iter_mut()
        .for_each(|w| *w = (*w / divisor / coarse).max(1));
    let total: u64 = weights.iter().sum();
    let mut credit = vec![0_i64; weights.len()];
    let mut order = Vec::with_capacity(total as usize);
    for _ in 0..total {
        let mut best = 0;
        for i in 0..weights.len() {
            credit[i] += weights[i] as i64;
            if credit[i] > credit[best] {
                best = i;
            }
        }
        credit[best] -= total as i64;
        order.push(members[best]);
    }
    order
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
