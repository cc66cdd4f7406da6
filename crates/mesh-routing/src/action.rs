//! What a matched route does: forward, redirect, answer.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::redirect_action::{
    PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier,
};
use envoy_types::pb::envoy::config::route::v3::route_action::{
    ClusterNotFoundResponseCode, ClusterSpecifier, HostRewriteSpecifier,
};
use envoy_types::pb::envoy::config::route::v3::weighted_cluster::cluster_weight;
use envoy_types::pb::envoy::r#type::matcher::v3::RegexMatchAndSubstitute;
use http::{HeaderName, HeaderValue, StatusCode};
use regex::Regex;

use crate::error::{
    CompileError, Result, Within, duration, every_field, nonzero_duration, timeout,
};
use crate::headers::HeaderOps;
use crate::matcher::{anywhere_regex, whole_regex};
use crate::route::RequestView;

/// Envoy's route timeout where the field is absent (`RouteAction.timeout`).
const DEFAULT_ROUTE_TIMEOUT: Duration = Duration::from_secs(15);
/// Envoy's base interval of retries.
const DEFAULT_RETRY_BASE: Duration = Duration::from_millis(25);

/// The action of a route.
#[derive(Debug)]
pub enum Action {
    /// Send the request to a cluster.
    Forward(Box<Forward>),
    /// Answer with a redirect.
    Redirect(Box<Redirect>),
    /// Answer with a fixed response.
    Direct(Direct),
}

/// A fixed response.
#[derive(Debug, Clone)]
pub struct Direct {
    /// The status.
    pub status: StatusCode,
    /// The body, possibly empty.
    pub body: Bytes,
}

/// Sending to a cluster.
#[derive(Debug)]
pub struct Forward {
    clusters: Vec<WeightedCluster>,
    total_weight: u64,
    cluster_header: Option<HeaderName>,
    rewrite: Option<Rewrite>,
    /// Replaces the authority.
    pub host_rewrite: Option<HostRewrite>,
    /// Adds the authority before the rewrite as `x-forwarded-host`.
    pub append_forwarded_host: bool,
    /// From the end of the request to the end of the response; `None` is unlimited.
    pub timeout: Option<Duration>,
    /// Longest silence on the stream; `None` leaves it to the connection manager's default.
    pub idle_timeout: Option<Duration>,
    /// Retries, if any.
    pub retry: Option<RetryPolicy>,
    /// Status where the cluster does not exist.
    pub cluster_not_found: StatusCode,
}

/// One entry of the split.
#[derive(Debug)]
pub struct WeightedCluster {
    /// Cluster name.
    pub name: Arc<str>,
    weight: u64,
    /// Mutations of the entry itself; made before those of the route.
    pub request_ops: HeaderOps,
    /// The same for the response.
    pub response_ops: HeaderOps,
    host_rewrite: Option<HeaderValue>,
}

/// How the authority is replaced.
#[derive(Debug, Clone)]
pub enum HostRewrite {
    /// By this text.
    Literal(HeaderValue),
    /// By the endpoint's host name, where it has one.
    Endpoint,
    /// By the value of a request header, where present.
    Header(HeaderName),
}

/// The cluster that a request goes to.
#[derive(Debug)]
pub enum ClusterTarget<'a> {
    /// An entry of the table.
    Entry(&'a WeightedCluster),
    /// Named by a request header.
    Named(Arc<str>),
    /// The header that names the cluster is missing.
    Missing,
}

impl Forward {
    pub(crate) fn compile(m: &pb::RouteAction) -> Result<Self> {
        every_field!(m, pb::RouteAction,
        used {
            cluster_not_found_response_code, prefix_rewrite, regex_rewrite, append_x_forwarded_host, timeout, idle_timeout,
            retry_policy, cluster_specifier, host_rewrite_specifier, upgrade_configs,
        }
        // priority: there are no per-priority circuit breakers. grpc timeouts: caller and server keep the deadline themselves.
        // flush_timeout, early_data_policy: concern codecs that are not here. include_vh_rate_limits, max_internal_redirects:
        // nothing without the fields they modify, which are refused.
        irrelevant {
            priority, max_grpc_timeout, grpc_timeout_offset, flush_timeout, early_data_policy, include_vh_rate_limits,
            max_internal_redirects,
        }
        refused {
            metadata_match, path_rewrite_policy, path_rewrite, retry_policy_typed_config, request_mirror_policies, rate_limits,
            hash_policy, cors, internal_redirect_policy, internal_redirect_action, hedge_policy, max_stream_duration,
        });
        for upgrade in &m.upgrade_configs {
            refuse_connect(&upgrade.upgrade_type).within("upgrade_configs")?;
        }
        let (clusters, cluster_header) = compile_clusters(m.cluster_specifier.as_ref())?;
        let total_weight = clusters.iter().map(|c| c.weight).sum();
        if total_weight == 0 && cluster_header.is_none() {
            return Err(CompileError::new(
                "weighted_clusters",
                "the sum of the weights must be above zero",
            ));
        }
        Ok(Self {
            total_weight,
            clusters,
            cluster_header,
            rewrite: Rewrite::compile(&m.prefix_rewrite, m.regex_rewrite.as_ref())?,
            host_rewrite: compile_host_rewrite(m.host_rewrite_specifier.as_ref())?,
            append_forwarded_host: m.append_x_forwarded_host,
            timeout: timeout("timeout", m.timeout.as_ref(), DEFAULT_ROUTE_TIMEOUT)?,
            idle_timeout: nonzero_duration("idle_timeout", m.idle_timeout.as_ref())?,
            retry: m
                .retry_policy
                .as_ref()
                .map(RetryPolicy::compile)
                .transpose()
                .within("retry_policy")?
                .flatten(),
            cluster_not_found: match ClusterNotFoundResponseCode::try_from(
                m.cluster_not_found_response_code,
            ) {
                Ok(ClusterNotFoundResponseCode::NotFound) => StatusCode::NOT_FOUND,
                Ok(ClusterNotFoundResponseCode::InternalServerError) => {
                    StatusCode::INTERNAL_SERVER_ERROR
                }
                _ => StatusCode::SERVICE_UNAVAILABLE,
            },
        })
    }

    /// Picks the entry of the split for a request.
    pub fn target(&self, request: &RequestView<'_>) -> ClusterTarget<'_> {
        if let Some(header) = &self.cluster_header {
            return match request.headers.get(header).and_then(|v| v.to_str().ok()) {
                Some(name) => ClusterTarget::Named(name.into()),
                None => ClusterTarget::Missing,
            };
        }
        if let [only] = self.clusters.as_slice() {
            return ClusterTarget::Entry(only);
        }
        let mut point = request.random % self.total_weight.max(1);
        for cluster in &self.clusters {
            if point < cluster.weight {
                return ClusterTarget::Entry(cluster);
            }
            point -= cluster.weight;
        }
        ClusterTarget::Missing
    }

    /// The path and query to send, where the route rewrites it. `matched` is the length of the part of the path that the route matched.
    pub fn rewritten_path(&self, path_and_query: &str, matched: usize) -> Option<String> {
        self.rewrite
            .as_ref()
            .map(|rewrite| rewrite.apply(path_and_query, matched))
    }

    /// The authority for the entry, where it is rewritten to a fixed text.
    pub fn host_literal<'a>(&'a self, target: &'a ClusterTarget<'_>) -> Option<&'a HeaderValue> {
        if let ClusterTarget::Entry(WeightedCluster {
            host_rewrite: Some(host),
            ..
        }) = target
        {
            return Some(host);
        }
        match &self.host_rewrite {
            Some(HostRewrite::Literal(host)) => Some(host),
            _ => None,
        }
    }

    /// The clusters that the route may use.
    pub fn cluster_names(&self) -> impl Iterator<Item = &str> {
        self.clusters.iter().map(|c| &*c.name)
    }
}

/// Upgrades other than WebSocket-like ones need tunnels that this proxy does not open.
pub(crate) fn refuse_connect(upgrade_type: &str) -> Result<()> {
    match upgrade_type.to_ascii_lowercase().as_str() {
        "websocket" => Ok(()),
        other => Err(CompileError::new(
            "upgrade_type",
            format!("{other:?} is not implemented (websocket is)"),
        )),
    }
}

type Clusters = (Vec<WeightedCluster>, Option<HeaderName>);

fn compile_clusters(specifier: Option<&ClusterSpecifier>) -> Result<Clusters> {
    match specifier {
        Some(ClusterSpecifier::Cluster(name)) => Ok((vec![WeightedCluster::whole(name)], None)),
        Some(ClusterSpecifier::ClusterHeader(name)) => {
            let name = name
                .parse()
                .map_err(|_| CompileError::new("cluster_header", "is not a header name"))?;
            Ok((Vec::new(), Some(name)))
        }
        Some(ClusterSpecifier::WeightedClusters(m)) => {
            compile_weighted(m).within("weighted_clusters")
        }
        Some(ClusterSpecifier::ClusterSpecifierPlugin(_)) => {
            Err(CompileError::unsupported("cluster_specifier_plugin"))
        }
        Some(ClusterSpecifier::InlineClusterSpecifierPlugin(_)) => {
            Err(CompileError::unsupported("inline_cluster_specifier_plugin"))
        }
        None => Err(CompileError::new("cluster", "no cluster is given")),
    }
}

fn compile_weighted(m: &pb::WeightedCluster) -> Result<Clusters> {
    every_field!(m, pb::WeightedCluster,
        used { clusters }
        // total_weight is deprecated: the sum counts. runtime_key_prefix: there are no runtime files.
        irrelevant { total_weight, runtime_key_prefix }
        refused { random_value_specifier });
    let mut clusters = Vec::with_capacity(m.clusters.len());
    for (i, entry) in m.clusters.iter().enumerate() {
        clusters.push(WeightedCluster::compile(entry).within(format_args!("clusters[{i}]"))?);
    }
    Ok((clusters, None))
}

impl WeightedCluster {
    fn whole(name: &str) -> Self {
        Self {
            name: name.into(),
            weight: 1,
            request_ops: HeaderOps::default(),
            response_ops: HeaderOps::default(),
            host_rewrite: None,
        }
    }

    fn compile(m: &pb::weighted_cluster::ClusterWeight) -> Result<Self> {
        every_field!(m, pb::weighted_cluster::ClusterWeight,
            used {
                name, weight, request_headers_to_add, request_headers_to_remove, response_headers_to_add,
                response_headers_to_remove, host_rewrite_specifier,
            }
            irrelevant {}
            refused { cluster_header, metadata_match, typed_per_filter_config });
        Ok(Self {
            name: m.name.as_str().into(),
            weight: m.weight.map_or(0, |w| u64::from(w.value)),
            request_ops: HeaderOps::compile(
                &m.request_headers_to_add,
                &m.request_headers_to_remove,
            )
            .within("request")?,
            response_ops: HeaderOps::compile(
                &m.response_headers_to_add,
                &m.response_headers_to_remove,
            )
            .within("response")?,
            host_rewrite: match &m.host_rewrite_specifier {
                Some(cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(host)) => {
                    Some(host_value(host)?)
                }
                None => None,
            },
        })
    }
}

fn host_value(host: &str) -> Result<HeaderValue> {
    HeaderValue::from_str(host)
        .map_err(|_| CompileError::new("host_rewrite_literal", "is not a header value"))
}

fn compile_host_rewrite(specifier: Option<&HostRewriteSpecifier>) -> Result<Option<HostRewrite>> {
    Ok(match specifier {
        None => None,
        Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => {
            Some(HostRewrite::Literal(host_value(host)?))
        }
        Some(HostRewriteSpecifier::AutoHostRewrite(on)) => {
            on.value.then_some(HostRewrite::Endpoint)
        }
        Some(HostRewriteSpecifier::HostRewriteHeader(name)) => {
            Some(HostRewrite::Header(name.parse().map_err(|_| {
                CompileError::new("host_rewrite_header", "is not a header name")
            })?))
        }
        Some(HostRewriteSpecifier::HostRewritePathRegex(_)) => {
            return Err(CompileError::unsupported("host_rewrite_path_regex"));
        }
        Some(HostRewriteSpecifier::HostRewrite(_)) => {
            return Err(CompileError::unsupported("host_rewrite"));
        }
    })
}

/// A path rewrite; the query stays.
#[derive(Debug)]
enum Rewrite {
    Prefix(String),
    Regex(Regex, String),
}

impl Rewrite {
    fn compile(prefix: &str, regex: Option<&RegexMatchAndSubstitute>) -> Result<Option<Self>> {
        match (prefix, regex) {
            ("", None) => Ok(None),
            ("", Some(regex)) => Self::regex(regex).within("regex_rewrite").map(Some),
            (prefix, None) => Ok(Some(Self::Prefix(prefix.to_owned()))),
            _ => Err(CompileError::new(
                "prefix_rewrite",
                "cannot be combined with regex_rewrite",
            )),
        }
    }

    fn regex(message: &RegexMatchAndSubstitute) -> Result<Self> {
        let pattern = message
            .pattern
            .as_ref()
            .ok_or_else(|| CompileError::new("pattern", "is missing"))?;
        Ok(Self::Regex(
            anywhere_regex(pattern)?,
            substitution(&message.substitution),
        ))
    }

    fn apply(&self, path_and_query: &str, matched: usize) -> String {
        let (path, query) = split_query(path_and_query);
        let mut out = match self {
            Self::Prefix(new) => format!("{new}{}", path.get(matched..).unwrap_or("")),
            Self::Regex(regex, new) => regex.replace_all(path, new.as_str()).into_owned(),
        };
        out.push_str(query);
        if !out.starts_with('/') {
            out.insert(0, '/');
        }
        out
    }
}

/// RE2's `\1` to this crate's `${1}`.
fn substitution(re2: &str) -> String {
    let mut out = String::with_capacity(re2.len() + 8);
    let mut chars = re2.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '\\' { chars.next() } else { None }) {
            ('\\', Some(d)) if d.is_ascii_digit() => out.push_str(&format!("${{{d}}}")),
            ('\\', Some(other)) => out.push(other),
            ('$', _) => out.push_str("$$"),
            (other, _) => out.push(other),
        }
    }
    out
}

/// Path and the rest beginning at `?` (or empty).
pub(crate) fn split_query(path_and_query: &str) -> (&str, &str) {
    path_and_query.split_at(path_and_query.find('?').unwrap_or(path_and_query.len()))
}

/// A redirect answer.
#[derive(Debug)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
    scheme: Option<String>,
    host: Option<String>,
    port: Option<u32>,
    path: Option<RedirectPath>,
    strip_query: bool,
}

#[derive(Debug)]
enum RedirectPath {
    Whole(String),
    Rewrite(Rewrite),
}

impl Redirect {
    pub(crate) fn compile(m: &pb::RedirectAction) -> Result<Self> {
        let text = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        Ok(Self {
            status: match RedirectResponseCode::try_from(m.response_code) {
                Ok(RedirectResponseCode::MovedPermanently) => StatusCode::MOVED_PERMANENTLY,
                Ok(RedirectResponseCode::Found) => StatusCode::FOUND,
                Ok(RedirectResponseCode::SeeOther) => StatusCode::SEE_OTHER,
                Ok(RedirectResponseCode::TemporaryRedirect) => StatusCode::TEMPORARY_REDIRECT,
                Ok(RedirectResponseCode::PermanentRedirect) => StatusCode::PERMANENT_REDIRECT,
                Err(_) => return Err(CompileError::new("response_code", "is unknown")),
            },
            scheme: match &m.scheme_rewrite_specifier {
                Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some("https".to_owned()),
                Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => text(scheme),
                _ => None,
            },
            host: text(&m.host_redirect),
            port: (m.port_redirect != 0).then_some(m.port_redirect),
            path: match &m.path_rewrite_specifier {
                None => None,
                Some(PathRewriteSpecifier::PathRedirect(path)) => {
                    text(path).map(RedirectPath::Whole)
                }
                Some(PathRewriteSpecifier::PrefixRewrite(p)) => {
                    text(p).map(|p| RedirectPath::Rewrite(Rewrite::Prefix(p)))
                }
                Some(PathRewriteSpecifier::RegexRewrite(r)) => Some(RedirectPath::Rewrite(
                    Rewrite::regex(r).within("regex_rewrite")?,
                )),
                Some(PathRewriteSpecifier::PathRewrite(_)) => {
                    return Err(CompileError::unsupported("path_rewrite"));
                }
            },
            strip_query: m.strip_query,
        })
    }

    /// The `location` of the answer. The port of the request is kept only where scheme and port stay, as Envoy does.
    pub fn location(&self, request: &RequestView<'_>, matched: usize) -> String {
        let scheme = self.scheme.as_deref().unwrap_or(request.scheme);
        let (host, request_port) = split_port(request.host);
        let port = match self.port {
            Some(port) => Some(port.to_string()),
            None if self.scheme.is_some() && scheme != request.scheme => None,
            None if self.host.is_some() => None,
            None => request_port.map(str::to_owned),
        };
        let port =
            port.filter(|p| !matches!((scheme, p.as_str()), ("http", "80") | ("https", "443")));
        let port = port.map(|p| format!(":{p}")).unwrap_or_default();
        let host = self.host.as_deref().unwrap_or(host);
        let (old_path, query) = split_query(request.path_and_query);
        let path = match &self.path {
            None => Cow::Borrowed(old_path),
            Some(RedirectPath::Whole(path)) => Cow::Borrowed(path.as_str()),
            Some(RedirectPath::Rewrite(rewrite)) => Cow::Owned(rewrite.apply(old_path, matched)),
        };
        let query = if self.strip_query || path.contains('?') {
            ""
        } else {
            query
        };
        format!("{scheme}://{host}{port}{path}{query}")
    }
}

/// `host:port` apart; brackets of IPv6 stay with the host.
pub(crate) fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            if name.contains(':') && !name.ends_with(']') {
                (host, None)
            } else {
                (name, Some(port))
            }
        }
        _ => (host, None),
    }
}

impl Direct {
    pub(crate) fn compile(m: &pb::DirectResponseAction) -> Result<Self> {
        every_field!(m, pb::DirectResponseAction, used { status, body } irrelevant {} refused { body_format });
        let status = u16::try_from(m.status)
            .ok()
            .and_then(|s| StatusCode::from_u16(s).ok());
        Ok(Self {
            status: status.filter(|s| s.as_u16() >= 200).ok_or_else(|| {
                CompileError::new(
                    "status",
                    format!("{} is not a final status (200 to 599)", m.status),
                )
            })?,
            body: m
                .body
                .as_ref()
                .map(inline_data)
                .transpose()
                .within("body")?
                .unwrap_or_default(),
        })
    }
}

fn inline_data(m: &DataSource) -> Result<Bytes> {
    match &m.specifier {
        Some(Specifier::InlineBytes(bytes)) => Ok(Bytes::copy_from_slice(bytes)),
        Some(Specifier::InlineString(text)) => Ok(Bytes::copy_from_slice(text.as_bytes())),
        Some(Specifier::Filename(_)) => Err(CompileError::unsupported("filename")),
        Some(Specifier::EnvironmentVariable(_)) => {
            Err(CompileError::unsupported("environment_variable"))
        }
        None => Ok(Bytes::new()),
    }
}

/// When and how often a request is tried again.
#[derive(Debug, Clone, Default)]
pub struct RetryPolicy {
    /// Tries after the first one.
    pub retries: u32,
    /// Limit of each try.
    pub per_try_timeout: Option<Duration>,
    /// Conditions.
    pub on: RetryOn,
    /// Statuses for [`RetryOn::statuses`].
    pub statuses: Vec<u16>,
    /// First back-off; doubled with every try, randomised from zero up.
    pub base_interval: Duration,
    /// Cap of the back-off.
    pub max_interval: Duration,
    /// How often an endpoint that was tried already may be passed over; 0 turns that off.
    pub avoid_previous_hosts: u32,
}

/// Conditions of a retry (`x-envoy-retry-on` and `x-envoy-retry-grpc-on`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RetryOn {
    /// No connection could be made.
    pub connect_failure: bool,
    /// HTTP/2 REFUSED_STREAM.
    pub refused_stream: bool,
    /// The connection ended before response headers.
    pub reset: bool,
    /// It ended before the request was sent.
    pub reset_before_request: bool,
    /// Any 5xx, or no answer at all.
    pub server_error: bool,
    /// 502, 503, 504.
    pub gateway_error: bool,
    /// 409.
    pub retriable_4xx: bool,
    /// The statuses listed in the policy.
    pub statuses: bool,
    /// gRPC statuses, one bit for each code.
    pub grpc: u32,
}

impl RetryPolicy {
    fn compile(m: &pb::RetryPolicy) -> Result<Option<Self>> {
        every_field!(m, pb::RetryPolicy,
        used {
            retry_on, num_retries, per_try_timeout, retry_host_predicate, host_selection_retry_max_attempts,
            retriable_status_codes, retry_back_off,
        }
        // refresh_cluster_on_retry: needs a cluster specifier plugin, which is refused.
        irrelevant { refresh_cluster_on_retry }
        refused {
            per_try_idle_timeout, retry_priority, retry_options_predicates, rate_limited_retry_back_off, retriable_headers,
            retriable_request_headers,
        });
        let mut previous_hosts = false;
        for predicate in &m.retry_host_predicate {
            match predicate.name.as_str() {
                "envoy.retry_host_predicates.previous_hosts" => previous_hosts = true,
                other => {
                    return Err(CompileError::unsupported(format!(
                        "retry_host_predicate {other}"
                    )));
                }
            }
        }
        let mut base = DEFAULT_RETRY_BASE;
        let mut max = None;
        if let Some(back_off) = &m.retry_back_off {
            base =
                nonzero_duration("base_interval", back_off.base_interval.as_ref())?.unwrap_or(base);
            max = duration("max_interval", back_off.max_interval.as_ref())?;
        }
        let on = RetryOn::parse(&m.retry_on)?;
        let attempts = u32::try_from(m.host_selection_retry_max_attempts)
            .unwrap_or(0)
            .max(1);
        if on == RetryOn::default() {
            return Ok(None);
        }
        Ok(Some(Self {
            retries: m.num_retries.map_or(1, |n| n.value),
            per_try_timeout: nonzero_duration("per_try_timeout", m.per_try_timeout.as_ref())?,
            on,
            statuses: m
                .retriable_status_codes
                .iter()
                .filter_map(|c| u16::try_from(*c).ok())
                .collect(),
            base_interval: base,
            max_interval: max.unwrap_or(base * 10),
            avoid_previous_hosts: if previous_hosts { attempts } else { 0 },
        }))
    }
}

impl RetryOn {
    fn parse(list: &str) -> Result<Self> {
        let mut on = Self::default();
        for token in list.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            match token {
                "connect-failure" => on.connect_failure = true,
                "refused-stream" => on.refused_stream = true,
                "reset" => on.reset = true,
                "reset-before-request" => on.reset_before_request = true,
                "5xx" => on.server_error = true,
                "gateway-error" => on.gateway_error = true,
                "retriable-4xx" => on.retriable_4xx = true,
                "retriable-status-codes" => on.statuses = true,
                "cancelled" => on.grpc |= 1 << 1,
                "deadline-exceeded" => on.grpc |= 1 << 4,
                "resource-exhausted" => on.grpc |= 1 << 8,
                "internal" => on.grpc |= 1 << 13,
                "unavailable" => on.grpc |= 1 << 14,
                // Without retriable_headers (refused) and without HTTP/3 these two can never apply; Istio lists them.
                "retriable-headers" | "http3-post-connect-failure" | "envoy-ratelimited" => {}
                other => {
                    return Err(CompileError::new(
                        "retry_on",
                        format!("{other:?} is not a condition that is known here"),
                    ));
                }
            }
        }
        Ok(on)
    }
}

impl RetryPolicy {
    /// Does this final status ask for another try?
    pub fn wants_status(&self, status: u16) -> bool {
        let on = self.on;
        (on.server_error && (500..600).contains(&status))
            || (on.gateway_error && (502..=504).contains(&status))
            || (on.retriable_4xx && status == 409)
            || (on.statuses && self.statuses.contains(&status))
    }

    /// Does this gRPC status in a headers-only response ask for another try?
    pub fn wants_grpc_status(&self, code: u32) -> bool {
        code < 32 && self.on.grpc & (1 << code) != 0
    }

    /// Can any response at all be retried under this policy?
    pub fn may_judge_responses(&self, grpc: bool) -> bool {
        let on = self.on;
        on.server_error
            || on.gateway_error
            || on.retriable_4xx
            || (on.statuses && !self.statuses.is_empty())
            || (grpc && on.grpc != 0)
    }

    /// The wait before try number `attempt` (1 = first retry): random up to base × 2^(n-1), capped.
    pub fn back_off(&self, attempt: u32, random: u64) -> Duration {
        let ceiling = self
            .base_interval
            .saturating_mul(1 << attempt.saturating_sub(1).min(16))
            .min(self.max_interval);
        let nanos = u64::try_from(ceiling.as_nanos()).unwrap_or(u64::MAX).max(1);
        Duration::from_nanos(random % nanos)
    }
}

/// Path conditions of a route.
#[derive(Debug, Clone)]
pub(crate) enum PathMatch {
    Prefix(Box<str>),
    Exact(Box<str>),
    Segments(Box<str>),
    Regex(Regex),
}

impl PathMatch {
    pub(crate) fn compile(m: &pb::RouteMatch, ignore_case: bool) -> Result<Self> {
        use pb::route_match::PathSpecifier;
        Ok(match &m.path_specifier {
            Some(PathSpecifier::Prefix(s)) => Self::Prefix(s.as_str().into()),
            Some(PathSpecifier::Path(s)) => Self::Exact(s.as_str().into()),
            Some(PathSpecifier::PathSeparatedPrefix(s)) => Self::Segments(s.as_str().into()),
            Some(PathSpecifier::SafeRegex(r)) => {
                Self::Regex(whole_regex(r, ignore_case).within("safe_regex")?)
            }
            Some(PathSpecifier::ConnectMatcher(_)) => {
                return Err(CompileError::unsupported("connect_matcher"));
            }
            Some(PathSpecifier::PathMatchPolicy(_)) => {
                return Err(CompileError::unsupported("path_match_policy"));
            }
            None => return Err(CompileError::new("path_specifier", "is missing")),
        })
    }
}
