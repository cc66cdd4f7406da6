//! Clusters: how to connect to a group of endpoints.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::common_lb_config::LocalityConfigSpecifier;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbConfig};
use envoy_types::pb::envoy::config::core::v3::{BindConfig, Http2ProtocolOptions};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as http_options;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::UpstreamProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
use prost::Message;

use crate::endpoint::EndpointSet;
use crate::error::{CompileError, Result, Within, every_field, nonzero_duration, timeout};
use crate::lb::LbPolicy;
use crate::metadata;

/// Envoy's connect timeout where none is given.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Envoy's idle timeout of upstream connections.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Envoy's healthy panic threshold, in percent.
const DEFAULT_PANIC: u32 = 50;
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

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
    /// Where endpoints come from.
    pub discovery: Discovery,
    /// How one of them is picked.
    pub policy: LbPolicy,
    /// HTTP version toward the endpoints.
    pub protocol: UpstreamProtocol,
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
    /// Below this share of healthy endpoints health is ignored, in percent.
    pub panic_percent: u32,
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
}

/// HTTP version toward the endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// The version of the request.
    AsDownstream,
}

/// HTTP/2 settings; `None` leaves the default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Http2Limits {
    /// Concurrent streams.
    pub max_concurrent_streams: Option<u32>,
    /// Window of a stream, in bytes.
    pub stream_window: Option<u32>,
    /// Window of a connection, in bytes.
    pub connection_window: Option<u32>,
}

impl Http2Limits {
    pub(crate) fn compile(m: &Http2ProtocolOptions) -> Result<Self> {
        every_field!(m, Http2ProtocolOptions,
            used { max_concurrent_streams, initial_stream_window_size, initial_connection_window_size }
            // Budgets against floods and codec internals: the library's own limits hold. connection_keepalive: dead peers are found by TCP
            // keep-alive.
            irrelevant {
                hpack_table_size, max_outbound_frames, max_outbound_control_frames, max_consecutive_inbound_frames_with_empty_payload,
                max_inbound_priority_frames_per_stream, max_inbound_window_update_frames_per_data_frame_sent,
                stream_error_on_invalid_http_messaging, override_stream_error_on_invalid_http_message, connection_keepalive,
                use_oghttp2_codec, max_metadata_size, enable_huffman_encoding, max_header_field_size_kb, disallow_obs_text,
                stream_reset_burst, stream_reset_rate,
            }
            refused { allow_connect, allow_metadata, custom_settings_parameters });
        Ok(Self {
            max_concurrent_streams: m.max_concurrent_streams.map(|v| v.value),
            stream_window: m.initial_stream_window_size.map(|v| v.value),
            connection_window: m.initial_connection_window_size.map(|v| v.value),
        })
    }
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
        let common = compile_common_lb(m.common_lb_config.as_ref()).within("common_lb_config")?;
        let mut config = Self {
            name: m.name.as_str().into(),
            discovery: Discovery::OriginalDestination(None),
            policy: compile_policy(m)?,
            protocol: UpstreamProtocol::Http1,
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
            panic_percent: common,
            service: compile_service(m),
        };
        config.discovery = compile_discovery(m, config.panic_percent)?;
        if let Some(options) = &m.http2_protocol_options {
            config.protocol = UpstreamProtocol::Http2;
            config.http2 = Http2Limits::compile(options).within("http2_protocol_options")?;
        }
        for (key, any) in &m.typed_extension_protocol_options {
            config
                .apply_options(key, any)
                .within(format_args!("typed_extension_protocol_options[{key}]"))?;
        }
        Ok(config)
    }

    fn apply_options(
        &mut self,
        key: &str,
        any: &envoy_types::pb::google::protobuf::Any,
    ) -> Result<()> {
        if !any.type_url.ends_with(HTTP_OPTIONS) {
            return Err(CompileError::unsupported(key));
        }
        let m = http_options::HttpProtocolOptions::decode(any.value.as_slice())
            .map_err(|error| CompileError::new("value", error.to_string()))?;
        every_field!(&m, http_options::HttpProtocolOptions,
            used { common_http_protocol_options, upstream_protocol_options, http_filters }
            // upstream_http_protocol_options: names for TLS, which is refused as a transport socket.
            irrelevant { upstream_http_protocol_options }
            refused { header_validation_config, outlier_detection, request_mirror_policies, hash_policy, retry_policy });
        if m.http_filters
            .iter()
            .any(|f| f.name != "envoy.filters.http.upstream_codec")
        {
            return Err(CompileError::unsupported("http_filters"));
        }
        if let Some(common) = &m.common_http_protocol_options {
            self.idle_timeout = timeout(
                "idle_timeout",
                common.idle_timeout.as_ref(),
                DEFAULT_IDLE_TIMEOUT,
            )?;
            self.max_requests_per_connection = common
                .max_requests_per_connection
                .map(|v| v.value)
                .filter(|v| *v > 0)
                .or(self.max_requests_per_connection);
        }
        match &m.upstream_protocol_options {
            Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => {
                match &explicit.protocol_config {
                    Some(ProtocolConfig::Http2ProtocolOptions(options)) => {
                        self.protocol = UpstreamProtocol::Http2;
                        self.http2 = Http2Limits::compile(options)?;
                    }
                    Some(ProtocolConfig::Http3ProtocolOptions(_)) => {
                        return Err(CompileError::unsupported("http3_protocol_options"));
                    }
                    Some(ProtocolConfig::HttpProtocolOptions(_)) | None => {
                        self.protocol = UpstreamProtocol::Http1
                    }
                }
            }
            Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(options)) => {
                self.protocol = UpstreamProtocol::AsDownstream;
                if let Some(options) = &options.http2_protocol_options {
                    self.http2 = Http2Limits::compile(options)?;
                }
            }
            Some(UpstreamProtocolOptions::AutoConfig(_)) => {
                return Err(CompileError::unsupported("auto_config"));
            }
            None => {}
        }
        Ok(())
    }

    /// Does the cluster lead to other workloads (and not to the application beside the proxy)?
    pub fn is_outbound(&self) -> bool {
        !self.name.starts_with("inbound|") && &*self.name != "InboundPassthroughCluster"
    }
}

fn refuse_others(m: &pb::Cluster) -> Result<()> {
    every_field!(m, pb::Cluster,
    used {
        name, connect_timeout, lb_policy, load_assignment, eds_cluster_config, cluster_discovery_type, max_requests_per_connection,
        http2_protocol_options, typed_extension_protocol_options, upstream_bind_config, common_lb_config, metadata, lb_config,
        circuit_breakers, transport_socket,
    }
    // Statistics, DNS (refused as a type), buffer sizes (bodies are streamed), cleaning intervals and hints: no effect on what is sent
    // where. upstream_connection_options: keep-alive is always on. http_protocol_options: casing and 1.0, both unchanged here.
    irrelevant {
        alt_stat_name, stats_matcher, per_connection_buffer_limit_bytes, per_connection_buffer_high_watermark_timeout,
        http_protocol_options, dns_refresh_rate, dns_jitter, dns_failure_refresh_rate, respect_dns_ttl, dns_lookup_family,
        dns_resolvers, use_tcp_for_dns_lookups, dns_resolution_config, typed_dns_resolver_config, wait_for_warm_on_init,
        cleanup_interval, upstream_connection_options, close_connections_on_host_health_failure, ignore_health_on_host_removal,
        lrs_server, lrs_report_endpoint_metrics, track_timeout_budgets, track_cluster_stats, preconnect_policy, queuing_policies,
        upstream_http_protocol_options,
    }
    refused {
        transport_socket_matches, transport_socket_matcher, health_checks, common_http_protocol_options, outlier_detection,
        lb_subset_config, protocol_selection, filters, load_balancing_policy, upstream_config,
        connection_pool_per_downstream_connection,
    });
    if let Some(socket) = &m.transport_socket
        && socket.name != "envoy.transport_sockets.raw_buffer"
    {
        return Err(CompileError::unsupported("transport_socket"));
    }
    refuse_breakers(m.circuit_breakers.as_ref()).within("circuit_breakers")
}

/// Limits that no proxy reaches (Istio sends 2^32-1 everywhere) are as good as none; real ones are not implemented.
fn refuse_breakers(m: Option<&pb::CircuitBreakers>) -> Result<()> {
    let thresholds = m.map(|m| m.thresholds.iter()).into_iter().flatten();
    for t in thresholds.filter(|t| t.priority == 0) {
        let limits = [
            t.max_connections,
            t.max_pending_requests,
            t.max_requests,
            t.max_retries,
            t.max_connection_pools,
        ];
        if limits.iter().flatten().any(|limit| limit.value < 1 << 20) || t.retry_budget.is_some() {
            return Err(CompileError::unsupported("thresholds"));
        }
    }
    match m {
        Some(m) if !m.per_host_thresholds.is_empty() => {
            Err(CompileError::unsupported("per_host_thresholds"))
        }
        _ => Ok(()),
    }
}

fn compile_discovery(m: &pb::Cluster, panic_percent: u32) -> Result<Discovery> {
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
                EndpointSet::compile(assignment, panic_percent).within("load_assignment")?,
            )))
        }
        Ok(DiscoveryType::OriginalDst) => match &m.lb_config {
            Some(LbConfig::OriginalDstLbConfig(config))
                if config.use_http_header || config.metadata_key.is_some() =>
            {
                Err(CompileError::unsupported("original_dst_lb_config"))
            }
            Some(LbConfig::OriginalDstLbConfig(config)) => {
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
        Ok(other) => Err(CompileError::new(
            "type",
            format!("{} is not implemented", other.as_str_name()),
        )),
        Err(_) => Err(CompileError::new("type", "is unknown")),
    }
}

fn compile_policy(m: &pb::Cluster) -> Result<LbPolicy> {
    use pb::cluster::LbPolicy as Pb;
    let slow_start = |on: bool| {
        if on {
            Err(CompileError::unsupported("lb_config.slow_start_config"))
        } else {
            Ok(())
        }
    };
    let mut choices = 2;
    match &m.lb_config {
        Some(LbConfig::LeastRequestLbConfig(c)) => {
            slow_start(c.slow_start_config.is_some())?;
            choices = c.choice_count.map_or(2, |n| n.value.max(2));
        }
        Some(LbConfig::RoundRobinLbConfig(c)) => slow_start(c.slow_start_config.is_some())?,
        _ => {}
    }
    match Pb::try_from(m.lb_policy) {
        Ok(Pb::RoundRobin) => Ok(LbPolicy::RoundRobin),
        Ok(Pb::Random) => Ok(LbPolicy::Random),
        Ok(Pb::LeastRequest) => Ok(LbPolicy::LeastRequest(choices)),
        // Of an ORIGINAL_DST cluster, where there is nothing to choose.
        Ok(Pb::ClusterProvided) => Ok(LbPolicy::Random),
        Ok(other) => Err(CompileError::new(
            "lb_policy",
            format!("{} is not implemented", other.as_str_name()),
        )),
        Err(_) => Err(CompileError::new("lb_policy", "is unknown")),
    }
}

/// The panic threshold.
fn compile_common_lb(m: Option<&pb::cluster::CommonLbConfig>) -> Result<u32> {
    let Some(m) = m else { return Ok(DEFAULT_PANIC) };
    every_field!(m, pb::cluster::CommonLbConfig,
        used { healthy_panic_threshold, locality_config_specifier }
        // Updates are merged by the publisher; the rest concerns active health checks and consistent hashing, which are refused.
        irrelevant { update_merge_window, ignore_new_hosts_until_first_hc, close_connections_on_host_set_change, consistent_hashing_lb_config }
        refused { override_host_status });
    if let Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) = &m.locality_config_specifier
    {
        return Err(CompileError::unsupported("locality_weighted_lb_config"));
    }
    Ok(m.healthy_panic_threshold
        .as_ref()
        .map_or(DEFAULT_PANIC, |p| p.value.clamp(0.0, 100.0) as u32))
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
