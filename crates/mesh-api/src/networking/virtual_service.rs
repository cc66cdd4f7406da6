//! VirtualService: which requests to a host go where, and what happens to them on the way.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{Duration, StringMatch};

/// How requests for some hosts are routed.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VirtualService {
    /// Hosts, short names (of this namespace) or full names; `*` and `*.x` are wildcards. Empty for a delegate.
    pub hosts: Vec<String>,
    /// Gateways (`[namespace/]name`) that apply these rules; `mesh` means all sidecars, which is also the default.
    pub gateways: Vec<String>,
    /// Rules for HTTP, HTTP/2 and gRPC, first match wins.
    pub http: Vec<HttpRoute>,
    /// Rules for TLS that is passed through, by server name.
    pub tls: Vec<TlsRoute>,
    /// Rules for other TCP.
    pub tcp: Vec<TcpRoute>,
    /// Namespaces that see this object: `.` its own, `*` all (default), or names.
    pub export_to: Vec<String>,
}

/// One HTTP rule: match, then exactly one of route, redirect, directResponse or delegate.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpRoute {
    /// Name, which appears in access logs and route dumps.
    pub name: String,
    /// Conditions, of which one has to hold; none matches everything.
    #[serde(rename = "match")]
    pub matches: Vec<HttpMatchRequest>,
    /// Where the request goes, by weight.
    pub route: Vec<HttpRouteDestination>,
    /// Answer with a redirect.
    pub redirect: Option<HttpRedirect>,
    /// Answer with a fixed response.
    pub direct_response: Option<HttpDirectResponse>,
    /// Another VirtualService that decides.
    pub delegate: Option<Delegate>,
    /// Changes to path and authority before the request is sent on.
    pub rewrite: Option<HttpRewrite>,
    /// Limit for the whole response; off by default.
    pub timeout: Option<Duration>,
    /// When and how often a failed request is tried again.
    pub retries: Option<HttpRetry>,
    /// Faults injected on purpose.
    pub fault: Option<HttpFaultInjection>,
    /// Where a copy of each request is sent; its answer is dropped.
    pub mirror: Option<Destination>,
    /// Share of requests that is mirrored; default 100.
    pub mirror_percentage: Option<Percent>,
    /// Older form of mirrorPercentage, a whole number.
    #[serde(alias = "mirror_percent")]
    pub mirror_percent: Option<u32>,
    /// Several mirrors, each with its own share.
    pub mirrors: Vec<HttpMirrorPolicy>,
    /// Cross-origin rules.
    pub cors_policy: Option<CorsPolicy>,
    /// Changes to headers of requests and responses.
    pub headers: Option<Headers>,
}

/// Conditions on a request, all of which have to hold.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpMatchRequest {
    /// Name, appended to the route's name.
    pub name: String,
    /// Path without query.
    pub uri: Option<StringMatch>,
    /// Scheme.
    pub scheme: Option<StringMatch>,
    /// Method.
    pub method: Option<StringMatch>,
    /// Authority (Host header).
    pub authority: Option<StringMatch>,
    /// Headers by lower-case name; `{}` asks for presence.
    pub headers: BTreeMap<String, StringMatch>,
    /// Headers that must not match.
    pub without_headers: BTreeMap<String, StringMatch>,
    /// Query parameters by name; exact or regex.
    pub query_params: BTreeMap<String, StringMatch>,
    /// Compare `uri` without case; exact and prefix only.
    pub ignore_uri_case: bool,
    /// Port of the service that is addressed; 0 is any.
    pub port: u32,
    /// Labels of the client's workload; ignored where `gateways` decides otherwise.
    pub source_labels: BTreeMap<String, String>,
    /// Namespace of the client's workload.
    pub source_namespace: String,
    /// Replaces the gateways of the VirtualService for this rule.
    pub gateways: Vec<String>,
    /// Prefix for statistics of this route.
    pub stat_prefix: String,
}

/// One weighted destination.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["destination"]))]
pub struct HttpRouteDestination {
    /// Where to.
    pub destination: Destination,
    /// Share relative to the sum of all weights; a single destination needs none.
    pub weight: i32,
    /// Header changes for this destination only.
    pub headers: Option<Headers>,
}

/// A service, one of its subsets, one of its ports.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["host"]))]
pub struct Destination {
    /// Name of the service; short names belong to the namespace of the rule.
    pub host: String,
    /// Subset that a DestinationRule for the host defines.
    pub subset: String,
    /// Port, needed only where the service has several.
    pub port: Option<PortSelector>,
}

/// Chooses a port.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PortSelector {
    /// Port number of the service.
    pub number: u32,
}

/// Changes to headers.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Headers {
    /// On the way to the destination.
    pub request: Option<HeaderOperations>,
    /// On the way back.
    pub response: Option<HeaderOperations>,
}

/// What to do with headers; removal comes first.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HeaderOperations {
    /// Overwrites.
    pub set: BTreeMap<String, String>,
    /// Appends.
    pub add: BTreeMap<String, String>,
    /// Takes away.
    pub remove: Vec<String>,
}

/// A redirect.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpRedirect {
    /// Replaces the path, including its query.
    pub uri: String,
    /// Replaces the authority.
    pub authority: String,
    /// `http` or `https`.
    pub scheme: String,
    /// Status; 0 means 301.
    pub redirect_code: u32,
    /// Replaces the matched prefix only.
    pub prefix_rewrite: String,
    /// Port of the new location.
    pub port: Option<u32>,
    /// Where the port of the new location comes from.
    pub derive_port: Option<RedirectPort>,
}

/// Where the port of a redirect comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RedirectPort {
    /// 80 or 443 by scheme.
    #[default]
    FromProtocolDefault,
    /// The port of the request.
    FromRequestPort,
}

/// A fixed response.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["status"]))]
pub struct HttpDirectResponse {
    /// Status code.
    pub status: u32,
    /// Body; none sends an empty one.
    pub body: Option<HttpBody>,
}

/// Body of a fixed response.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum HttpBody {
    /// Text.
    String(String),
    /// Bytes in base64.
    Bytes(String),
}

/// Another VirtualService that holds the rules.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Delegate {
    /// Its name.
    pub name: String,
    /// Its namespace; empty is the namespace of the root.
    pub namespace: String,
}

/// Changes to path and authority.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpRewrite {
    /// Replaces the path, or the matched prefix.
    pub uri: String,
    /// Replaces the authority.
    pub authority: String,
    /// Replaces what a regular expression matches in the path.
    pub uri_regex_rewrite: Option<RegexRewrite>,
}

/// A replacement by regular expression.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RegexRewrite {
    /// RE2 pattern.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Replacement; `\\1` is the first group.
    pub rewrite: String,
}

/// When and how often a failed request is tried again.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpRetry {
    /// Tries after the first; 0 turns retries off.
    pub attempts: i32,
    /// Limit per try, including the first.
    pub per_try_timeout: Option<Duration>,
    /// Least pause between tries; default 25ms.
    pub backoff: Option<Duration>,
    /// Conditions, separated by commas; Envoy's names or status codes.
    pub retry_on: String,
    /// Whether retries may leave the locality.
    pub retry_remote_localities: Option<bool>,
    /// Whether retries avoid endpoints that have failed; default true.
    pub retry_ignore_previous_hosts: Option<bool>,
}

/// Faults injected on purpose: the delay first, then the abort.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpFaultInjection {
    /// Delay before the request is sent on.
    pub delay: Option<FaultDelay>,
    /// Answer with an error instead.
    pub abort: Option<FaultAbort>,
}

/// An injected delay.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FaultDelay {
    /// Older form of percentage, a whole number.
    pub percent: i32,
    /// Share of requests; none means no request.
    pub percentage: Option<Percent>,
    /// How long.
    pub fixed_delay: Option<Duration>,
    /// Never implemented by Istio; refused.
    pub exponential_delay: Option<Duration>,
}

/// An injected error.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FaultAbort {
    /// Share of requests; none means no request.
    pub percentage: Option<Percent>,
    /// Status to answer with.
    pub http_status: Option<i32>,
    /// gRPC status name or number to answer with.
    pub grpc_status: String,
    /// Never implemented by Istio; refused.
    pub http2_error: String,
}

/// Names of gRPC's status codes, each at the place of its number (google.rpc.Code).
pub(crate) const GRPC_STATUS: &[&str] = &[
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

impl FaultAbort {
    /// The number of the gRPC status to answer with, by name or by number; `None` if there is none of that name.
    pub fn grpc_code(&self) -> Option<u32> {
        let status = self.grpc_status.as_str();
        let index = GRPC_STATUS
            .iter()
            .position(|name| *name == status)
            .or_else(|| status.parse().ok().filter(|code| *code < GRPC_STATUS.len()))?;
        u32::try_from(index).ok()
    }
}

/// A share of requests.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Percent {
    /// 0 to 100, in steps of 0.0001.
    pub value: f64,
}

/// One mirror.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["destination"]))]
pub struct HttpMirrorPolicy {
    /// Where copies are sent.
    pub destination: Destination,
    /// Share of requests; default 100.
    pub percentage: Option<Percent>,
}

/// Cross-origin rules.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CorsPolicy {
    /// Origins that are allowed.
    pub allow_origins: Vec<StringMatch>,
    /// Older form of allowOrigins, exact only.
    pub allow_origin: Vec<String>,
    /// Methods that are allowed.
    pub allow_methods: Vec<String>,
    /// Request headers that are allowed.
    pub allow_headers: Vec<String>,
    /// Response headers that scripts may read.
    pub expose_headers: Vec<String>,
    /// How long a preflight may be cached.
    pub max_age: Option<Duration>,
    /// Whether credentials are allowed.
    pub allow_credentials: Option<bool>,
    /// What happens to preflights of other origins.
    pub unmatched_preflights: UnmatchedPreflights,
}

/// What happens to preflight requests whose origin is not allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum UnmatchedPreflights {
    /// As FORWARD.
    #[default]
    Unspecified,
    /// The application answers.
    Forward,
    /// The proxy answers without CORS headers.
    Ignore,
}

/// One rule for TLS passed through.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["match"]))]
pub struct TlsRoute {
    /// Conditions, of which one has to hold.
    #[serde(rename = "match")]
    pub matches: Vec<TlsMatchAttributes>,
    /// Where the connection goes, by weight.
    pub route: Vec<RouteDestination>,
}

/// Conditions on a TLS connection, all of which have to hold.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["sniHosts"]))]
pub struct TlsMatchAttributes {
    /// Server names; wildcards as in hosts.
    pub sni_hosts: Vec<String>,
    /// Destination addresses, as CIDR.
    pub destination_subnets: Vec<String>,
    /// Port that is addressed; 0 is any.
    pub port: u32,
    /// Labels of the client's workload.
    pub source_labels: BTreeMap<String, String>,
    /// Namespace of the client's workload.
    pub source_namespace: String,
    /// Replaces the gateways of the VirtualService for this rule.
    pub gateways: Vec<String>,
}

/// One rule for TCP.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TcpRoute {
    /// Conditions, of which one has to hold; none matches everything.
    #[serde(rename = "match")]
    pub matches: Vec<L4MatchAttributes>,
    /// Where the connection goes, by weight.
    pub route: Vec<RouteDestination>,
}

/// Conditions on a TCP connection, all of which have to hold.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct L4MatchAttributes {
    /// Destination addresses, as CIDR.
    pub destination_subnets: Vec<String>,
    /// Port that is addressed; 0 is any.
    pub port: u32,
    /// Labels of the client's workload.
    pub source_labels: BTreeMap<String, String>,
    /// Namespace of the client's workload.
    pub source_namespace: String,
    /// Client addresses, as CIDR.
    pub source_subnet: String,
    /// Replaces the gateways of the VirtualService for this rule.
    pub gateways: Vec<String>,
}

/// One weighted destination of a TCP or TLS rule.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["destination"]))]
pub struct RouteDestination {
    /// Where to.
    pub destination: Destination,
    /// Share relative to the sum of all weights.
    pub weight: i32,
}
