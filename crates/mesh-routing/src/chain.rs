//! Filter chains and their matching.

use std::hash::{BuildHasher, Hash, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::filter_chain_match::ConnectionSourceType;
use envoy_types::pb::envoy::extensions::filters::network::ext_authz::v3::ExtAuthz;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use envoy_types::pb::envoy::extensions::filters::network::local_ratelimit::v3::LocalRateLimit;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy as PbTcpProxy;
use prost::Message;

use crate::error::{CompileError, Result, Within, every_field, flag, nonzero_duration};
use crate::filter::ext_authz::ConnectionExtAuthz;
use crate::filter::local_rate_limit::ConnectionLimit;
use crate::filter::rbac::ConnectionRbac;
use crate::hcm::HttpManager;
use crate::tcp::TcpProxy;
use crate::tls::{self, ServerTls};

/// Limit for a handshake where none is configured (Envoy waits for ever).
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);

/// A filter chain.
#[derive(Debug)]
pub struct FilterChain {
    /// Its name.
    pub name: Arc<str>,
    /// What was agreed on when it took a connection: which ones it takes, how they are protected, who may connect, and what the codec
    /// was told. The chain of a later snapshot with the same value is the same door; within this process only.
    pub door: u64,
    /// The same of all that it says, metadata apart.
    pub whole: u64,
    /// How the bytes are protected; `None` for plain text.
    pub tls: Option<Arc<ServerTls>>,
    /// Limit for the handshake.
    pub handshake_timeout: Duration,
    /// Limits for new connections, in order.
    pub limits: Vec<Arc<ConnectionLimit>>,
    /// Who may connect, in order.
    pub guards: Vec<Guard>,
    /// What it does with a connection.
    pub filter: NetworkFilter,
}

/// A filter that decides who may connect.
#[derive(Debug)]
pub enum Guard {
    /// By rules.
    Rbac(Arc<ConnectionRbac>),
    /// By asking a service.
    ExtAuthz(Arc<ConnectionExtAuthz>),
}

/// The terminal network filter.
#[derive(Debug, Clone)]
pub enum NetworkFilter {
    /// HTTP.
    Http(Arc<HttpManager>),
    /// Bytes.
    Tcp(Arc<TcpProxy>),
}

/// What is known of a connection when its chain is chosen.
#[derive(Debug, Clone, Default)]
pub struct ConnectionView<'a> {
    /// Original destination.
    pub destination: Option<SocketAddr>,
    /// Peer.
    pub source: Option<SocketAddr>,
    /// SNI, lower case.
    pub server_name: Option<&'a str>,
    /// `tls` where a ClientHello was seen, else `raw_buffer`.
    pub transport: &'a str,
    /// ALPN names of the ClientHello, or `http/1.0`, `http/1.1`, `h2c` as sniffed.
    pub applications: &'a [&'a str],
}

/// A chain with its conditions.
#[derive(Debug)]
pub(crate) struct Candidate {
    conditions: Conditions,
    pub(crate) chain: Arc<FilterChain>,
}

#[derive(Debug, Default)]
struct Conditions {
    port: Option<u16>,
    destinations: Vec<Cidr>,
    server_names: Vec<String>,
    transport: String,
    applications: Vec<String>,
    direct_sources: Vec<Cidr>,
    source_type: Option<SourceType>,
    sources: Vec<Cidr>,
    source_ports: Vec<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SourceType {
    Local,
    External,
}

/// An address range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    base: IpAddr,
    len: u8,
}

impl Cidr {
    pub(crate) fn compile(m: &CidrRange) -> Result<Self> {
        let base: IpAddr = m.address_prefix.parse().map_err(|_| {
            CompileError::new(
                "address_prefix",
                format!("{:?} is not an IP address", m.address_prefix),
            )
        })?;
        let bits = if base.is_ipv4() { 32 } else { 128 };
        match m.prefix_len.map_or(0, |len| len.value) {
            len if len <= bits => Ok(Self {
                base,
                len: len as u8,
            }),
            len => Err(CompileError::new(
                "prefix_len",
                format!("{len} is longer than the address"),
            )),
        }
    }

    /// Is the address in it?
    pub fn contains(self, ip: IpAddr) -> bool {
        match (self.base, ip) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                same_bits(u32::from(a).into(), u32::from(b).into(), self.len, 32)
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => same_bits(a.into(), b.into(), self.len, 128),
            _ => false,
        }
    }
}

fn same_bits(a: u128, b: u128, len: u8, width: u8) -> bool {
    len == 0 || (a ^ b) >> (width - len) == 0
}

pub(crate) fn cidrs(field: &str, ranges: &[CidrRange]) -> Result<Vec<Cidr>> {
    ranges
        .iter()
        .map(Cidr::compile)
        .collect::<Result<_>>()
        .within(field)
}

impl Candidate {
    pub(crate) fn compile(m: &pb::FilterChain) -> Result<Self> {
        let conditions = m
            .filter_chain_match
            .as_ref()
            .map(Conditions::compile)
            .transpose();
        Ok(Self {
            conditions: conditions.within("filter_chain_match")?.unwrap_or_default(),
            chain: compile_chain(m)?,
        })
    }

    /// Does the choice depend on the first bytes of the connection?
    pub(crate) fn looks_at_bytes(&self) -> bool {
        let c = &self.conditions;
        !c.server_names.is_empty() || !c.transport.is_empty() || !c.applications.is_empty()
    }

    /// Could the chain take a connection to this destination, whatever its bytes are?
    pub(crate) fn takes_destination(&self, destination: SocketAddr) -> bool {
        let c = &self.conditions;
        c.port.is_none_or(|port| port == destination.port())
            && (c.destinations.is_empty()
                || c.destinations.iter().any(|d| d.contains(destination.ip())))
    }
}

/// The chain itself.
pub(crate) fn compile_chain(m: &pb::FilterChain) -> Result<Arc<FilterChain>> {
    every_field!(m, pb::FilterChain,
        used { filter_chain_match, filters, name, transport_socket, use_proxy_proto, transport_socket_connect_timeout }
        irrelevant { metadata }
        refused {});
    if flag(m.use_proxy_proto.as_ref(), false) {
        return Err(CompileError::unsupported("use_proxy_proto"));
    }
    let mut terminal = None;
    let (mut limits, mut guards) = (Vec::new(), Vec::new());
    let mut door = Door::of(m);
    for (i, filter) in m.filters.iter().enumerate() {
        let at = format!("filters[{i}] {}", filter.name);
        if terminal.is_some() {
            return Err(CompileError::new(at, "stands behind a terminal filter"));
        }
        match compile_filter(filter).within(at)? {
            Compiled::Terminal(filter) => terminal = Some(filter),
            Compiled::Limit(limit) => {
                limits.push(Arc::new(limit));
                door.guards.push(filter.encode_to_vec());
            }
            Compiled::Guard(guard) => {
                guards.push(guard);
                door.guards.push(filter.encode_to_vec());
            }
            Compiled::BuiltIn => {}
        }
    }
    if let Some(NetworkFilter::Http(manager)) = &terminal {
        door.codec = manager.agreed();
    }
    let unlabelled = pb::FilterChain {
        metadata: None,
        ..m.clone()
    };
    Ok(Arc::new(FilterChain {
        name: m.name.as_str().into(),
        door: keyed(&door),
        whole: keyed(&unlabelled.encode_to_vec()),
        tls: tls::downstream(m.transport_socket.as_ref()).within("transport_socket")?,
        handshake_timeout: nonzero_duration(
            "transport_socket_connect_timeout",
            m.transport_socket_connect_timeout.as_ref(),
        )?
        .unwrap_or(HANDSHAKE_TIMEOUT),
        limits,
        guards,
        filter: terminal.ok_or_else(|| {
            CompileError::new(
                "filters",
                "no terminal filter (HTTP connection manager or TCP proxy)",
            )
        })?,
    }))
}

/// What [`FilterChain::door`] is made of.
#[derive(Hash)]
struct Door<'a> {
    name: &'a str,
    conditions: Option<Vec<u8>>,
    protection: Option<Vec<u8>>,
    guards: Vec<Vec<u8>>,
    codec: String,
}

impl<'a> Door<'a> {
    fn of(m: &'a pb::FilterChain) -> Self {
        Self {
            name: &m.name,
            conditions: m.filter_chain_match.as_ref().map(Message::encode_to_vec),
            protection: m.transport_socket.as_ref().map(Message::encode_to_vec),
            guards: Vec::new(),
            codec: String::new(),
        }
    }
}

/// Keyed by chance: who writes a configuration cannot aim at the value of another chain.
fn keyed(value: &impl Hash) -> u64 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    KEY.hash_one(value)
}

enum Compiled {
    Terminal(NetworkFilter),
    Limit(ConnectionLimit),
    Guard(Guard),
    BuiltIn,
}

fn compile_filter(m: &pb::Filter) -> Result<Compiled> {
    let any = match &m.config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        Some(ConfigType::ConfigDiscovery(_)) => {
            return Err(CompileError::unsupported("config_discovery"));
        }
        None => return Err(CompileError::new("typed_config", "is missing")),
    };
    let broken = |error: prost::DecodeError| CompileError::new("typed_config", error.to_string());
    match any.type_url.rsplit('/').next().unwrap_or("") {
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
            let manager = HttpConnectionManager::decode(any.value.as_slice()).map_err(broken)?;
            let manager = Arc::new(HttpManager::compile(&manager)?);
            Ok(Compiled::Terminal(NetworkFilter::Http(manager)))
        }
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => {
            let proxy = PbTcpProxy::decode(any.value.as_slice()).map_err(broken)?;
            let proxy = Arc::new(TcpProxy::compile(&proxy)?);
            Ok(Compiled::Terminal(NetworkFilter::Tcp(proxy)))
        }
        "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit" => {
            let limit = LocalRateLimit::decode(any.value.as_slice()).map_err(broken)?;
            let limit = ConnectionLimit::compile(&limit)?;
            Ok(limit.map_or(Compiled::BuiltIn, Compiled::Limit))
        }
        "envoy.extensions.filters.network.rbac.v3.RBAC" => {
            let rbac = Rbac::decode(any.value.as_slice()).map_err(broken)?;
            let guard = ConnectionRbac::compile(&rbac)?.map(|rbac| Guard::Rbac(Arc::new(rbac)));
            Ok(guard.map_or(Compiled::BuiltIn, Compiled::Guard))
        }
        "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz" => {
            let filter = ExtAuthz::decode(any.value.as_slice()).map_err(broken)?;
            let filter = ConnectionExtAuthz::compile(&filter)?;
            Ok(Compiled::Guard(Guard::ExtAuthz(Arc::new(filter))))
        }
        // Statistics and metadata exchange are built in.
        "stats.PluginConfig" | "envoy.tcp.metadataexchange.config.MetadataExchange" => {
            Ok(Compiled::BuiltIn)
        }
        other => Err(CompileError::unsupported(other)),
    }
}

impl Conditions {
    fn compile(m: &pb::FilterChainMatch) -> Result<Self> {
        every_field!(m, pb::FilterChainMatch,
            used {
                destination_port, prefix_ranges, direct_source_prefix_ranges, source_type, source_prefix_ranges, source_ports,
                server_names, transport_protocol, application_protocols,
            }
            irrelevant {}
            refused { address_suffix, suffix_len });
        let port = |port: u32| {
            u16::try_from(port)
                .map_err(|_| CompileError::new("port", format!("{port} is not a port")))
        };
        Ok(Self {
            port: m.destination_port.map(|p| port(p.value)).transpose()?,
            destinations: cidrs("prefix_ranges", &m.prefix_ranges)?,
            server_names: m
                .server_names
                .iter()
                .map(|name| name.to_ascii_lowercase())
                .collect(),
            transport: m.transport_protocol.clone(),
            applications: m.application_protocols.clone(),
            direct_sources: cidrs(
                "direct_source_prefix_ranges",
                &m.direct_source_prefix_ranges,
            )?,
            source_type: match ConnectionSourceType::try_from(m.source_type) {
                Ok(ConnectionSourceType::Any) => None,
                Ok(ConnectionSourceType::SameIpOrLoopback) => Some(SourceType::Local),
                Ok(ConnectionSourceType::External) => Some(SourceType::External),
                Err(_) => return Err(CompileError::new("source_type", "is unknown")),
            },
            sources: cidrs("source_prefix_ranges", &m.source_prefix_ranges)?,
            source_ports: m
                .source_ports
                .iter()
                .map(|p| port(*p))
                .collect::<Result<_>>()?,
        })
    }
}

/// Finds the chain as Envoy does: criterion by criterion in a fixed order (FilterChainMatch's documentation), each time keeping only the
/// chains with the most specific value that holds, without ever going back.
pub(crate) fn find<'a>(
    candidates: &'a [Candidate],
    view: &ConnectionView<'_>,
) -> Option<&'a Arc<FilterChain>> {
    let mut left: Vec<&Candidate> = candidates.iter().collect();
    let destination = view.destination.map(|a| a.ip());
    let source = view.source.map(|a| a.ip());
    keep_best(&mut left, |c| {
        optional(c.port, |port| {
            view.destination.is_some_and(|d| d.port() == port)
        })
    });
    keep_best(&mut left, |c| longest(&c.destinations, destination));
    keep_best(&mut left, |c| {
        server_name(&c.server_names, view.server_name)
    });
    keep_best(&mut left, |c| {
        optional(Some(&c.transport).filter(|t| !t.is_empty()), |t| {
            *t == view.transport
        })
    });
    keep_best(&mut left, |c| match c.applications.as_slice() {
        [] => Some(0),
        names => names
            .iter()
            .any(|n| view.applications.contains(&n.as_str()))
            .then_some(1),
    });
    keep_best(&mut left, |c| longest(&c.direct_sources, source));
    keep_best(&mut left, |c| {
        optional(c.source_type, |wanted| {
            (wanted == SourceType::Local) == is_local(view)
        })
    });
    keep_best(&mut left, |c| longest(&c.sources, source));
    keep_best(&mut left, |c| match c.source_ports.as_slice() {
        [] => Some(0),
        ports => view.source.filter(|s| ports.contains(&s.port())).map(|_| 1),
    });
    left.first().map(|c| &c.chain)
}

/// Keeps the candidates with the highest rank; those without a rank do not match.
fn keep_best(left: &mut Vec<&Candidate>, rank: impl Fn(&Conditions) -> Option<usize>) {
    let best = left.iter().filter_map(|c| rank(&c.conditions)).max();
    left.retain(|c| best.is_some() && rank(&c.conditions) == best);
}

fn optional<T>(wanted: Option<T>, holds: impl FnOnce(T) -> bool) -> Option<usize> {
    match wanted {
        None => Some(0),
        Some(wanted) => holds(wanted).then_some(1),
    }
}

fn longest(ranges: &[Cidr], ip: Option<IpAddr>) -> Option<usize> {
    if ranges.is_empty() {
        return Some(0);
    }
    let ip = ip?;
    ranges
        .iter()
        .filter(|range| range.contains(ip))
        .map(|range| usize::from(range.len) + 1)
        .max()
}

/// Exact names beat wildcards, longer wildcards shorter ones.
fn server_name(names: &[String], sni: Option<&str>) -> Option<usize> {
    if names.is_empty() {
        return Some(0);
    }
    let sni = sni?;
    names
        .iter()
        .filter_map(|name| match name.strip_prefix('*') {
            None => (name == sni).then_some(usize::MAX),
            Some(suffix) => {
                (sni.len() > suffix.len() && sni.ends_with(suffix)).then_some(suffix.len() + 1)
            }
        })
        .max()
}

fn is_local(view: &ConnectionView<'_>) -> bool {
    match (view.source, view.destination) {
        (Some(source), Some(destination)) => {
            source.ip().is_loopback() || source.ip() == destination.ip()
        }
        _ => false,
    }
}
