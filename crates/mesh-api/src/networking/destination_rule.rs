//! DestinationRule: how traffic to a host is treated once routing has chosen it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{Duration, LabelSelector};

/// Policies for traffic to a host, and its subsets.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["host"]))]
pub struct DestinationRule {
    /// Name of the service; short names belong to this namespace, wildcards are allowed.
    pub host: String,
    /// Policy for all traffic to the host.
    pub traffic_policy: Option<TrafficPolicy>,
    /// Named parts of the service's endpoints.
    pub subsets: Vec<Subset>,
    /// Namespaces that see this object: `.` its own, `*` all (default), or names.
    pub export_to: Vec<String>,
    /// Client workloads to which the rule applies; none is all.
    pub workload_selector: Option<LabelSelector>,
}

/// A named part of a service's endpoints.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["name"]))]
pub struct Subset {
    /// Name, used in routes.
    pub name: String,
    /// Labels that an endpoint's workload must have.
    pub labels: BTreeMap<String, String>,
    /// Policy that overrides the host's, part by part.
    pub traffic_policy: Option<TrafficPolicy>,
}

/// How connections and requests are treated.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TrafficPolicy {
    /// How an endpoint is chosen.
    pub load_balancer: Option<LoadBalancerSettings>,
    /// Limits and timeouts of connections.
    pub connection_pool: Option<ConnectionPoolSettings>,
    /// When a failing endpoint is set aside.
    pub outlier_detection: Option<OutlierDetection>,
    /// TLS toward the endpoint.
    pub tls: Option<ClientTlsSettings>,
    /// Policies for single ports; they replace, not merge.
    pub port_level_settings: Vec<PortTrafficPolicy>,
    /// Send TCP through an HTTP CONNECT or POST tunnel.
    pub tunnel: Option<TunnelSettings>,
    /// Send a PROXY protocol header.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Limit of concurrent retries.
    pub retry_budget: Option<RetryBudget>,
}

/// Policy for one port.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PortTrafficPolicy {
    /// The port.
    pub port: Option<PortSelector>,
    /// How an endpoint is chosen.
    pub load_balancer: Option<LoadBalancerSettings>,
    /// Limits and timeouts of connections.
    pub connection_pool: Option<ConnectionPoolSettings>,
    /// When a failing endpoint is set aside.
    pub outlier_detection: Option<OutlierDetection>,
    /// TLS toward the endpoint.
    pub tls: Option<ClientTlsSettings>,
}

/// Chooses a port.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PortSelector {
    /// Port number of the service.
    pub number: u32,
}

/// How an endpoint is chosen; simple, consistentHash and backendUtilization exclude each other.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LoadBalancerSettings {
    /// A standard algorithm.
    pub simple: Option<SimpleLb>,
    /// Same key, same endpoint.
    pub consistent_hash: Option<ConsistentHashLb>,
    /// Weights by the load that endpoints report.
    pub backend_utilization: Option<BackendUtilizationLb>,
    /// How localities are preferred.
    pub locality_lb_setting: Option<LocalityLbSetting>,
    /// Zone-aware balancing.
    pub zone_aware_lb_setting: Option<ZoneAwareLbSetting>,
    /// Older form of warmup.duration.
    pub warmup_duration_secs: Option<Duration>,
    /// Slow start of new endpoints.
    pub warmup: Option<Warmup>,
}

/// Standard algorithms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum SimpleLb {
    /// As LEAST_REQUEST.
    #[default]
    Unspecified,
    /// Older name of LEAST_REQUEST.
    LeastConn,
    /// An endpoint at random.
    Random,
    /// The address that the client asked for.
    Passthrough,
    /// In turn.
    RoundRobin,
    /// The less busy of two at random.
    LeastRequest,
}

/// Same key, same endpoint; one key, and at most one ring.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ConsistentHashLb {
    /// Key: value of this header.
    pub http_header_name: Option<String>,
    /// Key: value of this cookie.
    pub http_cookie: Option<HttpCookie>,
    /// Key: address of the client.
    pub use_source_ip: bool,
    /// Key: value of this query parameter.
    pub http_query_parameter_name: Option<String>,
    /// Ring hash.
    pub ring_hash: Option<RingHash>,
    /// Maglev.
    pub maglev: Option<Maglev>,
    /// Older form of ringHash.minimumRingSize.
    pub minimum_ring_size: u64,
}

/// A cookie as hash key, made by the proxy where it is missing and a TTL is given.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["name"]))]
pub struct HttpCookie {
    /// Name.
    pub name: String,
    /// Path.
    pub path: String,
    /// Life time; zero is a session cookie.
    pub ttl: Option<Duration>,
    /// More attributes.
    pub attributes: Vec<CookieAttribute>,
}

/// An attribute of a cookie.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["name"]))]
pub struct CookieAttribute {
    /// Name.
    pub name: String,
    /// Value.
    pub value: String,
}

/// Settings of ring hash.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RingHash {
    /// Least number of ring entries; default 1024.
    pub minimum_ring_size: u64,
}

/// Settings of Maglev.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Maglev {
    /// Size of the table, a prime; default 65537.
    pub table_size: u64,
}

/// Weights by the load that endpoints report.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BackendUtilizationLb {
    /// After this time without reports a weight is dropped.
    pub weight_expiration_period: Option<Duration>,
    /// Reports are used after this time.
    pub weight_stabilization_period: Option<Duration>,
    /// How often weights are computed.
    pub weight_update_period: Option<Duration>,
    /// Penalty for errors.
    pub error_utilization_penalty_percent: u32,
    /// Metrics used where no utilisation is reported.
    pub metric_names_for_computing_utilization: Vec<String>,
}

/// How localities are preferred; distribute, failover and failoverPriority exclude each other in part.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LocalityLbSetting {
    /// Overrides the mesh's setting.
    pub enabled: Option<bool>,
    /// Shares by locality.
    pub distribute: Vec<Distribute>,
    /// Where a region fails over to.
    pub failover: Vec<Failover>,
    /// Labels that decide priority.
    pub failover_priority: Vec<String>,
}

/// Shares of traffic from one locality.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Distribute {
    /// Locality `region/zone/subzone`, `*` allowed at the end.
    pub from: String,
    /// Share per locality, summing to 100.
    pub to: BTreeMap<String, u32>,
}

/// Where a region fails over to.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Failover {
    /// Region.
    pub from: String,
    /// Region.
    pub to: String,
}

/// Zone-aware balancing.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ZoneAwareLbSetting {
    /// Whether it is on.
    pub enabled: Option<bool>,
    /// Where a region fails over to.
    pub failover: Vec<Failover>,
    /// Labels that decide priority.
    pub failover_priority: Vec<String>,
    /// Least number of endpoints, at least 1.
    pub min_cluster_size: Option<u32>,
}

/// Slow start of new endpoints.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["duration"]))]
pub struct Warmup {
    /// How long the warm-up takes.
    pub duration: Option<Duration>,
    /// Share of traffic at the beginning, 0 to 100; default 10.
    pub minimum_percent: Option<f64>,
    /// Shape of the curve; 1 is linear.
    pub aggression: Option<f64>,
}

/// Limits and timeouts of connections.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ConnectionPoolSettings {
    /// For all connections.
    pub tcp: Option<TcpSettings>,
    /// For HTTP.
    pub http: Option<HttpSettings>,
}

/// Limits and timeouts of TCP connections.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TcpSettings {
    /// Most connections per cluster; 0 is no limit.
    pub max_connections: i32,
    /// Limit for connecting; default 10s.
    pub connect_timeout: Option<Duration>,
    /// Keep-alive probes.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Longest life of a connection.
    pub max_connection_duration: Option<Duration>,
    /// Longest silence; default 1h, zero turns it off.
    pub idle_timeout: Option<Duration>,
}

/// Keep-alive probes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TcpKeepalive {
    /// Probes without answer before the connection is given up.
    pub probes: u32,
    /// Silence before the first probe.
    pub time: Option<Duration>,
    /// Pause between probes.
    pub interval: Option<Duration>,
}

/// Limits and timeouts of HTTP.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpSettings {
    /// Most requests that wait for a connection.
    pub http1_max_pending_requests: i32,
    /// Most active requests.
    pub http2_max_requests: i32,
    /// Requests after which a connection is closed; 0 is no limit.
    pub max_requests_per_connection: i32,
    /// Most retries at a time.
    pub max_retries: i32,
    /// Longest time without an active request; default 1h.
    pub idle_timeout: Option<Duration>,
    /// Whether HTTP/1.1 is sent as HTTP/2.
    pub h2_upgrade_policy: H2UpgradePolicy,
    /// Send with the protocol that the client used.
    pub use_client_protocol: bool,
    /// Most streams per HTTP/2 connection.
    pub max_concurrent_streams: i32,
    /// PING frames.
    pub http2_keep_alive: Option<Http2KeepAlive>,
}

/// Whether HTTP/1.1 is sent as HTTP/2.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum H2UpgradePolicy {
    /// As the mesh says.
    #[default]
    Default,
    /// No.
    DoNotUpgrade,
    /// Yes.
    Upgrade,
}

/// PING frames.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Http2KeepAlive {
    /// Pause between frames.
    pub interval: Option<Duration>,
    /// Longest wait for the answer.
    pub timeout: Option<Duration>,
}

/// When a failing endpoint is set aside.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OutlierDetection {
    /// Older form of consecutiveGatewayErrors.
    pub consecutive_errors: i32,
    /// Count failures to connect apart.
    pub split_external_local_origin_errors: bool,
    /// Failures to connect in a row.
    pub consecutive_local_origin_failures: Option<u32>,
    /// 502, 503 and 504 in a row.
    pub consecutive_gateway_errors: Option<u32>,
    /// 5xx in a row; default 5.
    #[serde(rename = "consecutive5xxErrors")]
    pub consecutive_5xx_errors: Option<u32>,
    /// Pause between looks; default 10s.
    pub interval: Option<Duration>,
    /// First time aside; default 30s.
    pub base_ejection_time: Option<Duration>,
    /// Most endpoints aside; default 10.
    pub max_ejection_percent: i32,
    /// Below this share of healthy endpoints nothing is set aside.
    pub min_health_percent: i32,
    /// Status codes that count as errors, 100 to 599.
    pub outlier_detection_http_error_codes: Vec<u32>,
}

/// TLS toward the endpoint.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClientTlsSettings {
    /// Which kind.
    pub mode: ClientTlsMode,
    /// File of the client's certificate (MUTUAL).
    pub client_certificate: String,
    /// File of the client's key (MUTUAL).
    pub private_key: String,
    /// File of the roots.
    pub ca_certificates: String,
    /// File of the revocation list.
    pub ca_crl: String,
    /// Secret with certificates.
    pub credential_name: String,
    /// Names of which the endpoint's certificate must have one.
    pub subject_alt_names: Vec<String>,
    /// Server name to send.
    pub sni: String,
    /// Accept any certificate.
    pub insecure_skip_verify: Option<bool>,
}

/// Kinds of TLS toward the endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ClientTlsMode {
    /// None.
    #[default]
    Disable,
    /// TLS.
    Simple,
    /// TLS with a client certificate from files or a secret.
    Mutual,
    /// TLS with the mesh's own certificates.
    IstioMutual,
}

/// A tunnel.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["targetHost", "targetPort"]))]
pub struct TunnelSettings {
    /// `CONNECT` (default) or `POST`.
    pub protocol: String,
    /// Host behind the tunnel.
    pub target_host: String,
    /// Port behind the tunnel.
    pub target_port: u32,
}

/// A PROXY protocol header.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProxyProtocol {
    /// Version.
    pub version: ProxyProtocolVersion,
}

/// Versions of the PROXY protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ProxyProtocolVersion {
    /// Text.
    #[default]
    V1,
    /// Binary.
    V2,
}

/// Limit of concurrent retries.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RetryBudget {
    /// Share of active requests, 0 to 100; default 20.
    pub percent: Option<f64>,
    /// Retries that are always allowed; default 3.
    pub min_retry_concurrency: u32,
    /// Time over which requests are counted.
    pub budget_interval: Option<Duration>,
}
