//! Clusters: how to connect to a group of endpoints.

mod breaker;
mod dns;
mod outlier;
mod policy;
mod protocol;
pub(crate) mod transport;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, LbConfig as PbLbConfig,
};
use envoy_types::pb::envoy::config::core::v3::BindConfig;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;

use crate::endpoint::EndpointSet;
use crate::error::{CompileError, Result, Within, every_field, nonzero_duration};
use crate::lb::LbConfig;
use crate::metadata;
use protocol::DEFAULT_IDLE_TIMEOUT;

pub use breaker::{Breakers, RetryLimit};
pub use dns::{Dns, Families};
pub use outlier::{FailurePercentage, OutlierDetection, SuccessRate, Trigger};
pub use protocol::{Http2Limits, Keepalive, UpstreamProtocol};
pub use transport::{NamesFromRequests, ProxyHeader, Traits, Transport, Transports};

/// Envoy's connect timeout where none is given.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A cluster with its endpoints.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Everything but the endpoints.
    pub config: Arc<ClusterConfig>,
    /// The endpoints; empty for [`Discovery::OriginalDestination`] and until the first EDS answer.
    pub endpoints: Arc<EndpointSet>,
}

/// A compiled `Cluster` message.
#[derive(Debug)]
pub struct ClusterConfig {
    /// Its name.
    pub name: Arc<str>,
    /// Its name in statistics.
    pub stat_name: Arc<str>,
    /// Where endpoints come from.
    pub discovery: Discovery,
    /// How one of them is picked.
    pub lb: LbConfig,
    /// HTTP version toward the endpoints.
    pub protocol: UpstreamProtocol,
    /// Tunnels are opened in HTTP/2: where that is the version, and where it may be (Envoy asks what the cluster could speak).
    pub tunnels_in_http2: bool,
    /// Limit for a connection to be made.
    pub connect_timeout: Duration,
    /// Unused connections are closed after this; `None` never.
    pub idle_timeout: Option<Duration>,
    /// A connection is closed after this many requests; `None` never.
    pub max_requests_per_connection: Option<u32>,
    /// Source address of connections.
    pub bind_source: Option<IpAddr>,
    /// Limit of concurrent streams of an HTTP/2 connection that the cluster sets.
    pub http2: Http2Limits,
    /// A connection takes no new requests after this time; `None` never.
    pub max_connection_duration: Option<Duration>,
    /// TCP keep-alive of connections, where it is configured.
    pub keepalive: Option<Keepalive>,
    /// Limits of what is under way.
    pub breakers: Breakers,
    /// When endpoints are taken out.
    pub outlier: Option<OutlierDetection>,
    /// How the bytes are protected.
    pub transports: Transports,
    /// The service behind it, for metrics.
    pub service: Service,
}

/// Where the endpoints of a cluster come from.
#[derive(Debug)]
pub enum Discovery {
    /// From EDS under this name.
    Eds(Arc<str>),
    /// From the message itself.
    Static(Arc<EndpointSet>),
    /// The connection's original destination, where set with this port.
    OriginalDestination(Option<u16>),
    /// From DNS; the set of the cluster stays empty, who looks up keeps the endpoints.
    Dns(Arc<Dns>),
}

/// The service that a cluster stands for (`filter_metadata.istio.services`); empty where unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// FQDN.
    pub host: Box<str>,
    /// Short name.
    pub name: Box<str>,
    /// Namespace.
    pub namespace: Box<str>,
}

impl ClusterConfig {
    /// Compiles the message.
    pub fn compile(m: &pb::Cluster) -> Result<Self> {
        refuse_others(m)?;
        let mut config = Self {
            name: m.name.as_str().into(),
            stat_name: match m.alt_stat_name.as_str() {
                "" => m.name.as_str().into(),
                name => name.into(),
            },
            discovery: Discovery::OriginalDestination(None),
            lb: policy::compile(m)?,
            protocol: UpstreamProtocol::Http1,
            tunnels_in_http2: false,
            connect_timeout: nonzero_duration("connect_timeout", m.connect_timeout.as_ref())?
                .unwrap_or(DEFAULT_CONNECT_TIMEOUT),
            idle_timeout: Some(DEFAULT_IDLE_TIMEOUT),
            max_requests_per_connection: m
                .max_requests_per_connection
                .map(|v| v.value)
                .filter(|v| *v > 0),
            bind_source: m
                .upstream_bind_config
                .as_ref()
                .map(bind_source)
                .transpose()
                .within("upstream_bind_config")?
                .flatten(),
            http2: Http2Limits::default(),
            max_connection_duration: None,
            keepalive: compile_keepalive(m).within("upstream_connection_options")?,
            breakers: match &m.circuit_breakers {
                Some(breakers) => Breakers::compile(breakers).within("circuit_breakers")?,
                None => Breakers::default(),
            },
            outlier: m
                .outlier_detection
                .as_ref()
                .map(OutlierDetection::compile)
                .transpose()
                .within("outlier_detection")?,
            transports: Transports::compile(m)?,
            service: compile_service(m),
        };
        config.discovery = compile_discovery(m)?;
        if let Some(options) = &m.http2_protocol_options {
            config.protocol = UpstreamProtocol::Http2;
            config.tunnels_in_http2 = true;
            config.http2 = Http2Limits::compile(options).within("http2_protocol_options")?;
        }
        for (key, any) in &m.typed_extension_protocol_options {
            config
                .apply_options(key, any)
                .within(format_args!("typed_extension_protocol_options[{key}]"))?;
        }
        Ok(config)
    }

    /// Does the cluster lead to other workloads (and not to the application beside the proxy)?
    pub fn is_outbound(&self) -> bool {
        !self.name.starts_with("inbound|") && &*self.name != "InboundPassthroughCluster"
    }
}

fn refuse_others(m: &pb::Cluster) -> Result<()> {
    every_field!(m, pb::Cluster,
    used {
        name, alt_stat_name, connect_timeout, lb_policy, load_assignment, eds_cluster_config, cluster_discovery_type,
        max_requests_per_connection, http2_protocol_options, typed_extension_protocol_options, upstream_bind_config, common_lb_config,
        metadata, lb_config, load_balancing_policy, circuit_breakers, transport_socket, transport_socket_matches, outlier_detection, upstream_connection_options,
        dns_refresh_rate, dns_jitter, dns_failure_refresh_rate, respect_dns_ttl,
        filters, dns_lookup_family, dns_resolvers, use_tcp_for_dns_lookups, dns_resolution_config, typed_dns_resolver_config,
    }
    // Statistics, buffer sizes (bodies are streamed), cleaning intervals and hints: no effect on what is sent where.
    // http_protocol_options: casing and 1.0, both unchanged here. ignore_health_on_host_removal: there is no active health checking.
    irrelevant {
        stats_matcher, per_connection_buffer_limit_bytes, per_connection_buffer_high_watermark_timeout,
        http_protocol_options, wait_for_warm_on_init, cleanup_interval, ignore_health_on_host_removal,
        lrs_server, lrs_report_endpoint_metrics, track_timeout_budgets, track_cluster_stats, preconnect_policy, queuing_policies,
        upstream_http_protocol_options,
    }
    refused {
        transport_socket_matcher, health_checks, common_http_protocol_options,
        lb_subset_config, protocol_selection, close_connections_on_host_health_failure, upstream_config,
        connection_pool_per_downstream_connection,
    });
    // Metadata exchange is only spoken where both sides agree on it by ALPN, which this proxy does not offer.
    let foreign = |filter: &&pb::Filter| {
        let any = filter.typed_config.as_ref();
        let kind = any.map_or("", |any| any.type_url.as_str());
        !kind.ends_with("/envoy.tcp.metadataexchange.config.MetadataExchange")
    };
    if let Some(filter) = m.filters.iter().find(foreign) {
        let at = format!("filters {}", filter.name);
        return Err(CompileError::unsupported(at));
    }
    Ok(())
}

fn compile_keepalive(m: &pb::Cluster) -> Result<Option<Keepalive>> {
    let Some(m) = &m.upstream_connection_options else {
        return Ok(None);
    };
    // happy_eyeballs_config: endpoints have one address each.
    every_field!(m, pb::UpstreamConnectionOptions, used { tcp_keepalive } irrelevant { happy_eyeballs_config }
        refused { set_local_interface_name_on_upstream_connections });
    Ok(m.tcp_keepalive.as_ref().map(Keepalive::compile))
}

fn compile_discovery(m: &pb::Cluster) -> Result<Discovery> {
    let kind = match &m.cluster_discovery_type {
        Some(ClusterDiscoveryType::Type(kind)) => DiscoveryType::try_from(*kind),
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            return Err(CompileError::unsupported(format!(
                "cluster_type {}",
                custom.name
            )));
        }
        None => Ok(DiscoveryType::Static),
    };
    match kind {
        Ok(DiscoveryType::Eds) => {
            let service = m
                .eds_cluster_config
                .as_ref()
                .map_or("", |c| c.service_name.as_str());
            Ok(Discovery::Eds(if service.is_empty() {
                m.name.as_str().into()
            } else {
                service.into()
            }))
        }
        Ok(DiscoveryType::Static) => {
            let none = ClusterLoadAssignment::default();
            let assignment = m.load_assignment.as_ref().unwrap_or(&none);
            Ok(Discovery::Static(Arc::new(
                EndpointSet::compile(assignment).within("load_assignment")?,
            )))
        }
        Ok(DiscoveryType::OriginalDst) => match &m.lb_config {
            Some(PbLbConfig::OriginalDstLbConfig(config))
                if config.use_http_header || config.metadata_key.is_some() =>
            {
                Err(CompileError::unsupported("original_dst_lb_config"))
            }
            Some(PbLbConfig::OriginalDstLbConfig(config)) => {
                let port = config
                    .upstream_port_override
                    .map(|p| u16::try_from(p.value))
                    .transpose();
                Ok(Discovery::OriginalDestination(port.map_err(|_| {
                    CompileError::new(
                        "original_dst_lb_config.upstream_port_override",
                        "is not a port",
                    )
                })?))
            }
            _ => Ok(Discovery::OriginalDestination(None)),
        },
        Ok(kind @ (DiscoveryType::StrictDns | DiscoveryType::LogicalDns)) => {
            let logical = kind == DiscoveryType::LogicalDns;
            Ok(Discovery::Dns(Arc::new(Dns::compile(m, logical)?)))
        }
        Err(_) => Err(CompileError::new("type", "is unknown")),
    }
}

fn bind_source(m: &BindConfig) -> Result<Option<IpAddr>> {
    every_field!(m, BindConfig, used { source_address, extra_source_addresses }
        // The other family's address (Istio sends ::6 beside 127.0.0.6) cannot apply to an endpoint of the first one's family.
        irrelevant { freebind, additional_source_addresses, validate_network_namespaces }
        refused { socket_options, local_address_selector });
    m.source_address
        .as_ref()
        .map(|a| {
            crate::endpoint::ip_socket(a)
                .within("source_address")
                .map(|s: SocketAddr| s.ip())
        })
        .transpose()
}

fn compile_service(m: &pb::Cluster) -> Service {
    let istio = metadata::istio(m.metadata.as_ref());
    let first = istio.and_then(|istio| metadata::structs(istio, "services").next());
    let text = |key| Box::<str>::from(first.and_then(|s| metadata::text(s, key)).unwrap_or(""));
    Service {
        host: text("host"),
        name: text("name"),
        namespace: text("namespace"),
    }
}
