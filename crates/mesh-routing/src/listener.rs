//! Listeners.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::listener_filter_chain_match_predicate::Rule;
use envoy_types::pb::envoy::extensions::filters::listener::original_src::v3::OriginalSrc;
use prost::Message;

use crate::chain::{self, Candidate, ConnectionView, FilterChain, NetworkFilter, compile_chain};
use crate::endpoint::socket_address;
use crate::error::{CompileError, Result, Within, every_field, flag, timeout};
use crate::hcm::RouteSource;

/// Envoy's limit for listener filters.
const DEFAULT_FILTERS_TIMEOUT: Duration = Duration::from_secs(15);

/// A compiled `Listener`.
#[derive(Debug)]
pub struct Listener {
    /// Its name.
    pub name: Arc<str>,
    /// Its name in statistics: what is configured, else the address with underscores for colons, as Envoy has it.
    pub stat_name: Arc<str>,
    /// Its address.
    pub address: SocketAddr,
    /// Open a socket for it? (Otherwise it only takes what a listener with [`Listener::use_original_dst`] hands over.)
    pub bind: bool,
    /// Hand connections over to the listener of their original destination, where there is one.
    pub use_original_dst: bool,
    /// Connections come redirected: the kernel knows their original destination.
    pub restores_destination: bool,
    /// Take connections to addresses that are not this host's (TPROXY): their local address is their original destination.
    pub transparent: bool,
    /// Connections to endpoints come from the client's address, on sockets with this mark (0 for none).
    pub original_source: Option<u32>,
    /// In which direction traffic flows.
    pub direction: Direction,
    /// Limit for the first bytes to show what they are; `None` waits.
    pub detection_timeout: Option<Duration>,
    /// Go on as plain bytes when the limit is reached (else close).
    pub continue_on_timeout: bool,
    tls_inspector: Option<Option<Predicate>>,
    http_inspector: Option<Option<Predicate>>,
    chains: Vec<Candidate>,
    default_chain: Option<Arc<FilterChain>>,
}

/// In which direction traffic flows, seen from the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the workload beside the proxy.
    Inbound,
    /// Away from it; also through gateways.
    Outbound,
}

impl Listener {
    /// Compiles the message.
    pub fn compile(m: &pb::Listener) -> Result<Self> {
        refuse_others(m)?;
        let address = socket_address(m.address.as_ref()).within("address")?;
        let mut listener = Self {
            name: m.name.as_str().into(),
            stat_name: match m.stat_prefix.as_str() {
                "" => address.to_string().replace(':', "_").into(),
                name => name.into(),
            },
            address,
            bind: flag(m.bind_to_port.as_ref(), true)
                && m.deprecated_v1
                    .as_ref()
                    .is_none_or(|v1| flag(v1.bind_to_port.as_ref(), true)),
            use_original_dst: flag(m.use_original_dst.as_ref(), false),
            restores_destination: flag(m.use_original_dst.as_ref(), false),
            transparent: flag(m.transparent.as_ref(), false),
            original_source: None,
            direction: match TrafficDirection::try_from(m.traffic_direction) {
                Ok(TrafficDirection::Inbound) => Direction::Inbound,
                _ => Direction::Outbound,
            },
            detection_timeout: timeout(
                "listener_filters_timeout",
                m.listener_filters_timeout.as_ref(),
                DEFAULT_FILTERS_TIMEOUT,
            )?,
            continue_on_timeout: m.continue_on_listener_filters_timeout,
            tls_inspector: None,
            http_inspector: None,
            chains: Vec::with_capacity(m.filter_chains.len()),
            default_chain: m
                .default_filter_chain
                .as_ref()
                .map(compile_chain)
                .transpose()
                .within("default_filter_chain")?,
        };
        for (i, filter) in m.listener_filters.iter().enumerate() {
            listener
                .add_filter(filter)
                .within(format_args!("listener_filters[{i}] {}", filter.name))?;
        }
        for (i, chain) in m.filter_chains.iter().enumerate() {
            let at = format!("filter_chains[{i}] {}", chain.name);
            listener.chains.push(Candidate::compile(chain).within(at)?);
        }
        Ok(listener)
    }

    fn add_filter(&mut self, m: &pb::ListenerFilter) -> Result<()> {
        let type_name = match &m.config_type {
            Some(ConfigType::TypedConfig(any)) => any.type_url.rsplit('/').next().unwrap_or(""),
            Some(ConfigType::ConfigDiscovery(_)) => {
                return Err(CompileError::unsupported("config_discovery"));
            }
            None => "",
        };
        let disabled = m
            .filter_disabled
            .as_ref()
            .map(Predicate::compile)
            .transpose()
            .within("filter_disabled")?;
        match (type_name, m.name.as_str()) {
            ("envoy.extensions.filters.listener.original_dst.v3.OriginalDst", _)
            | ("", "envoy.filters.listener.original_dst") => {
                self.restores_destination = true;
            }
            ("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector", _)
            | ("", "envoy.filters.listener.tls_inspector") => {
                self.tls_inspector = Some(disabled);
            }
            ("envoy.extensions.filters.listener.http_inspector.v3.HttpInspector", _)
            | ("", "envoy.filters.listener.http_inspector") => self.http_inspector = Some(disabled),
            ("envoy.extensions.filters.listener.original_src.v3.OriginalSrc", _) => {
                self.original_source = Some(original_source(m)?);
            }
            (type_name, _) => return Err(CompileError::unsupported(type_name)),
        }
        Ok(())
    }

    /// Must the first bytes be looked at before the chain is chosen? Not on ports where an inspector is disabled, nor where no chain that
    /// could take the connection asks (so that protocols in which the server speaks first do not stall).
    pub fn needs_bytes(&self, destination: SocketAddr) -> bool {
        self.wants_tls(destination) || self.wants_http(destination)
    }

    fn wants_tls(&self, destination: SocketAddr) -> bool {
        enabled(&self.tls_inspector, destination) && self.chains_ask(destination)
    }

    /// Is the application protocol of plain text to be told from the first bytes?
    pub fn wants_http(&self, destination: SocketAddr) -> bool {
        enabled(&self.http_inspector, destination) && self.chains_ask(destination)
    }

    fn chains_ask(&self, destination: SocketAddr) -> bool {
        self.chains
            .iter()
            .any(|c| c.takes_destination(destination) && c.looks_at_bytes())
    }

    /// The chain that takes a connection.
    pub fn chain(&self, view: &ConnectionView<'_>) -> Option<&Arc<FilterChain>> {
        chain::find(&self.chains, view).or(self.default_chain.as_ref())
    }

    /// The route tables that its chains ask for by name.
    pub fn route_names(&self) -> impl Iterator<Item = &str> {
        self.chains().filter_map(|chain| match &chain.filter {
            NetworkFilter::Http(manager) => match &manager.routes {
                RouteSource::Rds(name) => Some(&**name),
                RouteSource::Inline(_) => None,
            },
            NetworkFilter::Tcp(_) => None,
        })
    }

    /// All chains, the default one last.
    pub fn chains(&self) -> impl Iterator<Item = &Arc<FilterChain>> {
        self.chains
            .iter()
            .map(|c| &c.chain)
            .chain(self.default_chain.as_ref())
    }
}

fn enabled(inspector: &Option<Option<Predicate>>, destination: SocketAddr) -> bool {
    match inspector {
        None => false,
        Some(None) => true,
        Some(Some(disabled)) => !disabled.holds(destination),
    }
}

fn refuse_others(m: &pb::Listener) -> Result<()> {
    every_field!(m, pb::Listener,
    used {
        name, address, stat_prefix, filter_chains, use_original_dst, default_filter_chain, deprecated_v1, listener_filters,
        listener_filters_timeout, continue_on_listener_filters_timeout, traffic_direction, bind_to_port, transparent,
    }
    // Buffers, backlogs and balancing between workers are the proxy's own; keep-alive is always on; overload handling is not here.
    irrelevant {
        stats_matcher, per_connection_buffer_limit_bytes, per_connection_buffer_high_watermark_timeout, metadata,
        drain_type, connection_balance_config, reuse_port, enable_reuse_port, tcp_backlog_size, tcp_fast_open_queue_length,
        max_connections_to_accept_per_socket_event, ignore_global_conn_limit, bypass_overload_manager, tcp_keepalive, enable_mptcp,
        freebind,
    }
    refused {
        additional_addresses, fcds_config, filter_chain_matcher, socket_options, udp_listener_config, api_listener,
        access_log, listener_specifier,
    });
    Ok(())
}

/// The mark of `OriginalSrc`. The client's port is never taken over, in Envoy neither (its `bind_port` does nothing yet).
fn original_source(m: &pb::ListenerFilter) -> Result<u32> {
    let Some(ConfigType::TypedConfig(any)) = &m.config_type else {
        return Ok(0);
    };
    let m = OriginalSrc::decode(any.value.as_slice())
        .map_err(|error| CompileError::new("typed_config", error.to_string()))?;
    every_field!(&m, OriginalSrc, used { mark } irrelevant {} refused { bind_port });
    Ok(m.mark)
}

/// Where a listener filter is switched off.
#[derive(Debug)]
enum Predicate {
    Any(Vec<Predicate>),
    All(Vec<Predicate>),
    Not(Box<Predicate>),
    Always,
    Ports(u16, u16),
}

impl Predicate {
    fn compile(m: &pb::ListenerFilterChainMatchPredicate) -> Result<Self> {
        let all = |rules: &[pb::ListenerFilterChainMatchPredicate]| {
            rules.iter().map(Self::compile).collect::<Result<Vec<_>>>()
        };
        match &m.rule {
            Some(Rule::OrMatch(set)) => Ok(Self::Any(all(&set.rules)?)),
            Some(Rule::AndMatch(set)) => Ok(Self::All(all(&set.rules)?)),
            Some(Rule::NotMatch(rule)) => Ok(Self::Not(Box::new(Self::compile(rule)?))),
            Some(Rule::AnyMatch(_)) => Ok(Self::Always),
            Some(Rule::DestinationPortRange(range)) => {
                let port = |value: i32| {
                    u16::try_from(value).or(if value == 65536 {
                        Ok(u16::MAX)
                    } else {
                        Err(())
                    })
                };
                match (port(range.start), port(range.end)) {
                    // The end is exclusive (Int32Range); 65536 as an end covers the last port.
                    (Ok(start), Ok(_)) => Ok(Self::Ports(
                        start,
                        u16::try_from(range.end - 1).unwrap_or(u16::MAX),
                    )),
                    _ => Err(CompileError::new(
                        "destination_port_range",
                        "is not a range of ports",
                    )),
                }
            }
            None => Err(CompileError::new("rule", "is missing")),
        }
    }

    fn holds(&self, destination: SocketAddr) -> bool {
        match self {
            Self::Any(rules) => rules.iter().any(|r| r.holds(destination)),
            Self::All(rules) => rules.iter().all(|r| r.holds(destination)),
            Self::Not(rule) => !rule.holds(destination),
            Self::Always => true,
            Self::Ports(first, last) => (*first..=*last).contains(&destination.port()),
        }
    }
}
