//! `telemetry.istio.io`: Telemetry, what the proxies of some workloads report.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{Duration, LabelSelector, PolicyTargetReference};

/// What the proxies of some workloads report.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Telemetry {
    /// Workloads; none is all of the namespace.
    pub selector: Option<LabelSelector>,
    /// Target instead of workloads, older form.
    pub target_ref: Option<PolicyTargetReference>,
    /// Targets instead of workloads.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Spans.
    pub tracing: Vec<Tracing>,
    /// Metrics.
    pub metrics: Vec<Metrics>,
    /// Access logs.
    pub access_logging: Vec<AccessLogging>,
}

/// Spans.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Tracing {
    /// Direction.
    #[serde(rename = "match")]
    pub matches: Option<TracingSelector>,
    /// Where spans go.
    pub providers: Vec<ProviderRef>,
    /// Share of requests, 0 to 100.
    pub random_sampling_percentage: Option<f64>,
    /// No spans.
    pub disable_span_reporting: Option<bool>,
    /// More tags.
    pub custom_tags: BTreeMap<String, CustomTag>,
    /// Decide by request id.
    pub use_request_id_for_trace_sampling: Option<bool>,
    /// Istio's own tags.
    pub enable_istio_tags: Option<bool>,
    /// Don't touch trace headers.
    pub disable_context_propagation: Option<bool>,
}

/// Direction of traffic.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TracingSelector {
    /// Direction.
    pub mode: WorkloadMode,
}

/// Direction of traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum WorkloadMode {
    /// Both.
    #[default]
    ClientAndServer,
    /// Outgoing.
    Client,
    /// Incoming.
    Server,
}

/// A provider of the mesh configuration.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["name"]))]
pub struct ProviderRef {
    /// Its name.
    pub name: String,
}

/// Where the value of a tag comes from.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum CustomTag {
    /// A constant.
    Literal(LiteralTag),
    /// An environment variable of the proxy.
    Environment(EnvironmentTag),
    /// A request header.
    Header(HeaderTag),
    /// An access log format string.
    Formatter(FormatterTag),
}

/// A constant.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["value"]))]
pub struct LiteralTag {
    /// Value.
    pub value: String,
}

/// An environment variable of the proxy.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["name"]))]
pub struct EnvironmentTag {
    /// Name.
    pub name: String,
    /// Value where it is missing.
    pub default_value: String,
}

/// A request header.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["name"]))]
pub struct HeaderTag {
    /// Name.
    pub name: String,
    /// Value where it is missing.
    pub default_value: String,
}

/// An access log format string.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["value"]))]
pub struct FormatterTag {
    /// Format.
    pub value: String,
}

/// Metrics.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Metrics {
    /// Where metrics go.
    pub providers: Vec<ProviderRef>,
    /// Changes to metrics, in order.
    pub overrides: Vec<MetricsOverrides>,
    /// How often TCP metrics are reported.
    pub reporting_interval: Option<Duration>,
}

/// A change to metrics.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MetricsOverrides {
    /// Which metrics.
    #[serde(rename = "match")]
    pub matches: Option<MetricSelector>,
    /// Not reported.
    pub disabled: Option<bool>,
    /// Changes to labels, by name.
    pub tag_overrides: BTreeMap<String, TagOverride>,
}

/// Which metrics; metric and customMetric exclude each other.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MetricSelector {
    /// One of Istio's.
    pub metric: Option<IstioMetric>,
    /// Another, by name.
    pub custom_metric: Option<String>,
    /// Direction.
    pub mode: WorkloadMode,
}

/// Istio's metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum IstioMetric {
    /// All.
    #[default]
    AllMetrics,
    /// istio_requests_total.
    RequestCount,
    /// istio_request_duration_milliseconds.
    RequestDuration,
    /// istio_request_bytes.
    RequestSize,
    /// istio_response_bytes.
    ResponseSize,
    /// istio_tcp_connections_opened_total.
    TcpOpenedConnections,
    /// istio_tcp_connections_closed_total.
    TcpClosedConnections,
    /// istio_tcp_sent_bytes_total.
    TcpSentBytes,
    /// istio_tcp_received_bytes_total.
    TcpReceivedBytes,
    /// istio_request_messages_total.
    GrpcRequestMessages,
    /// istio_response_messages_total.
    GrpcResponseMessages,
}

/// A change to a label.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TagOverride {
    /// What.
    pub operation: TagOperation,
    /// CEL expression (UPSERT).
    pub value: String,
}

/// What happens to a label.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TagOperation {
    /// Set.
    #[default]
    Upsert,
    /// Taken away.
    Remove,
}

/// Access logs.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AccessLogging {
    /// Direction.
    #[serde(rename = "match")]
    pub matches: Option<LogSelector>,
    /// Where entries go.
    pub providers: Vec<ProviderRef>,
    /// Not written.
    pub disabled: Option<bool>,
    /// Which requests.
    pub filter: Option<LogFilter>,
}

/// Direction of traffic.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LogSelector {
    /// Direction.
    pub mode: WorkloadMode,
}

/// Which requests are logged.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LogFilter {
    /// CEL expression.
    pub expression: String,
}
