//! What a matched route does: forward, redirect, answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::route_action::{
    ClusterNotFoundResponseCode, ClusterSpecifier,
};
use envoy_types::pb::envoy::config::route::v3::weighted_cluster::cluster_weight;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::error::{CompileError, Result, Within, duration, every_field, timeout};
use crate::filter::{RouteFilters, Scope};
use crate::hash::HashPolicy;
use crate::headers::HeaderOps;
use crate::matcher::whole_regex;
use crate::mirror::Mirror;
use crate::regex::Regex;
use crate::retry::RetryPolicy;
use crate::rewrite::{Rewrite, host_value, split_query};
use crate::route::RequestView;
use crate::template::Template;
use crate::upgrade::Upgrades;

pub use crate::rewrite::{HostRewrite, Redirect};

/// Envoy's route timeout where the field is absent (`RouteAction.timeout`).
const DEFAULT_ROUTE_TIMEOUT: Duration = Duration::from_secs(15);

/// Envoy's buffer of a stream (`per_connection_buffer_limit_bytes`).
const DEFAULT_BUFFER_LIMIT: usize = 1 << 20;

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
    /// Longest silence on the stream (`Some(None)`: unlimited); `None` leaves it to the connection manager.
    pub idle_timeout: Option<Option<Duration>>,
    /// For gRPC requests the `grpc-timeout` header rules instead of the timeout, within this.
    pub grpc_timeout: Option<GrpcLimit>,
    /// Limit for the whole exchange, where the route has its own.
    pub stream_duration: Option<StreamLimit>,
    /// Retries, if any.
    pub retry: Option<RetryPolicy>,
    /// Bytes of a request's body that are remembered for another try.
    pub buffer_limit: usize,
    /// Status where the cluster does not exist.
    pub cluster_not_found: StatusCode,
    /// Upgrades of which the route says more than the connection manager.
    pub upgrades: Upgrades,
    /// What to hash for balancers that send what is alike to the same endpoint.
    pub hash: Option<HashPolicy>,
    /// Clusters that get copies.
    pub mirrors: Arc<[Mirror]>,
}

/// What becomes of a `grpc-timeout` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrpcLimit {
    /// The longest time; `None` takes any.
    max: Option<Duration>,
    /// Taken off, so that the proxy answers before the client gives up.
    offset: Duration,
    /// What remains may be nothing (else an offset that is too large is left out).
    may_vanish: bool,
}

impl GrpcLimit {
    /// The limit for a request with this header; `None` is unlimited, and so is a header of zero.
    pub fn apply(self, wanted: Option<Duration>) -> Option<Duration> {
        let wanted = wanted.filter(|wanted| !wanted.is_zero());
        let wanted = wanted.map(|wanted| match wanted.checked_sub(self.offset) {
            Some(left) if !left.is_zero() || self.may_vanish => left,
            _ if self.may_vanish => Duration::ZERO,
            _ => wanted,
        });
        match (wanted, self.max) {
            (Some(wanted), Some(max)) => Some(wanted.min(max)),
            (wanted, max) => wanted.or(max),
        }
    }
}

/// Limit for a whole exchange (`RouteAction.MaxStreamDuration`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimit {
    /// In general (`Some(None)`: unlimited); `None` leaves it to the connection manager.
    pub max: Option<Option<Duration>>,
    /// For gRPC requests that have a timeout themselves.
    pub grpc: Option<GrpcLimit>,
}

impl StreamLimit {
    fn compile(m: &pb::route_action::MaxStreamDuration) -> Result<Self> {
        let nonzero = |d: Duration| Some(d).filter(|d| !d.is_zero());
        let offset = duration(
            "grpc_timeout_header_offset",
            m.grpc_timeout_header_offset.as_ref(),
        )?;
        let grpc = duration(
            "grpc_timeout_header_max",
            m.grpc_timeout_header_max.as_ref(),
        )?;
        Ok(Self {
            max: duration("max_stream_duration", m.max_stream_duration.as_ref())?.map(nonzero),
            grpc: grpc.map(|max| GrpcLimit {
                max: nonzero(max),
                offset: offset.unwrap_or_default(),
                may_vanish: true,
            }),
        })
    }
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
    /// What the entry and the route say about filters, where the entry says anything.
    pub filters: Option<Box<RouteFilters>>,
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
    /// `template`: the path condition of the route, where it has variables.
    pub(crate) fn compile(
        m: &pb::RouteAction,
        template: Option<&Template>,
        scope: &Scope,
    ) -> Result<Self> {
        every_field!(m, pb::RouteAction,
        used {
            cluster_not_found_response_code, prefix_rewrite, regex_rewrite, append_x_forwarded_host, timeout, idle_timeout,
            retry_policy, cluster_specifier, host_rewrite_specifier, upgrade_configs, max_grpc_timeout, grpc_timeout_offset,
            max_stream_duration, path_rewrite_policy, hash_policy, request_mirror_policies, rate_limits, include_vh_rate_limits,
            cors,
        }
        // flush_timeout, early_data_policy: concern codecs that are not here. max_internal_redirects: nothing without the field that it
        // modifies, which is refused.
        irrelevant { flush_timeout, early_data_policy, max_internal_redirects }
        refused {
            priority, metadata_match, path_rewrite, retry_policy_typed_config, internal_redirect_policy, internal_redirect_action, hedge_policy,
        });
        let (clusters, cluster_header) = compile_clusters(m.cluster_specifier.as_ref(), scope)?;
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
            rewrite: compile_rewrite(m, template)?,
            host_rewrite: HostRewrite::compile(m.host_rewrite_specifier.as_ref())?,
            append_forwarded_host: m.append_x_forwarded_host,
            timeout: timeout("timeout", m.timeout.as_ref(), DEFAULT_ROUTE_TIMEOUT)?,
            idle_timeout: duration("idle_timeout", m.idle_timeout.as_ref())?
                .map(|idle| Some(idle).filter(|idle| !idle.is_zero())),
            grpc_timeout: duration("max_grpc_timeout", m.max_grpc_timeout.as_ref())?
                .map(|max| {
                    let offset = duration("grpc_timeout_offset", m.grpc_timeout_offset.as_ref())?;
                    Ok(GrpcLimit {
                        max: Some(max).filter(|max| !max.is_zero()),
                        offset: offset.unwrap_or_default(),
                        may_vanish: false,
                    })
                })
                .transpose()?,
            stream_duration: m
                .max_stream_duration
                .as_ref()
                .map(StreamLimit::compile)
                .transpose()
                .within("max_stream_duration")?,
            buffer_limit: DEFAULT_BUFFER_LIMIT,
            upgrades: Upgrades::of_route(&m.upgrade_configs)?,
            retry: m
                .retry_policy
                .as_ref()
                .map(RetryPolicy::compile)
                .transpose()
                .within("retry_policy")?,
            cluster_not_found: match ClusterNotFoundResponseCode::try_from(
                m.cluster_not_found_response_code,
            ) {
                Ok(ClusterNotFoundResponseCode::NotFound) => StatusCode::NOT_FOUND,
                Ok(ClusterNotFoundResponseCode::InternalServerError) => {
                    StatusCode::INTERNAL_SERVER_ERROR
                }
                _ => StatusCode::SERVICE_UNAVAILABLE,
            },
            hash: HashPolicy::compile(&m.hash_policy)?,
            mirrors: scope.mirrors(),
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

    /// Does the route itself, not an entry of its split, replace the authority?
    pub fn replaces_host(&self, target: &ClusterTarget<'_>) -> bool {
        let entry = matches!(target, ClusterTarget::Entry(e) if e.host_rewrite.is_some());
        self.host_rewrite.is_some() && !entry
    }

    /// The authority to send, where it is rewritten to something that does not depend on the endpoint. An entry's own beats the route's.
    pub fn rewritten_host(
        &self,
        target: &ClusterTarget<'_>,
        headers: &HeaderMap,
        path_and_query: &str,
    ) -> Option<HeaderValue> {
        if let ClusterTarget::Entry(WeightedCluster {
            host_rewrite: Some(host),
            ..
        }) = target
        {
            return Some(host.clone());
        }
        match self.host_rewrite.as_ref()? {
            HostRewrite::Literal(host) => Some(host.clone()),
            HostRewrite::Endpoint => None,
            HostRewrite::Header(name) => headers.get(name).cloned(),
            HostRewrite::Path(substitution) => {
                let host = substitution.apply(split_query(path_and_query).0);
                HeaderValue::from_str(&host).ok()
            }
        }
    }

    /// Does an entry of the split say anything about filters?
    pub(crate) fn entries_have_filters(&self) -> bool {
        self.clusters.iter().any(|c| c.filters.is_some())
    }

    /// The clusters that the route may use.
    pub fn cluster_names(&self) -> impl Iterator<Item = &str> {
        self.clusters.iter().map(|c| &*c.name)
    }
}

fn compile_rewrite(m: &pb::RouteAction, template: Option<&Template>) -> Result<Option<Rewrite>> {
    let other = Rewrite::compile(&m.prefix_rewrite, m.regex_rewrite.as_ref())?;
    match (&m.path_rewrite_policy, template, other) {
        (None, _, other) => Ok(other),
        (Some(policy), Some(template), None) => template
            .rewrite(policy)
            .within("path_rewrite_policy")
            .map(|rewrite| Some(Rewrite::Template(rewrite))),
        (Some(_), None, _) => Err(CompileError::new(
            "path_rewrite_policy",
            "needs a path_match_policy in the route's match",
        )),
        (Some(_), _, Some(_)) => Err(CompileError::new(
            "path_rewrite_policy",
            "cannot be combined with another path rewrite",
        )),
    }
}

type Clusters = (Vec<WeightedCluster>, Option<HeaderName>);

fn compile_clusters(specifier: Option<&ClusterSpecifier>, scope: &Scope) -> Result<Clusters> {
    match specifier {
        Some(ClusterSpecifier::Cluster(name)) => Ok((vec![WeightedCluster::whole(name)], None)),
        Some(ClusterSpecifier::ClusterHeader(name)) => {
            let name = name
                .parse()
                .map_err(|_| CompileError::new("cluster_header", "is not a header name"))?;
            Ok((Vec::new(), Some(name)))
        }
        Some(ClusterSpecifier::WeightedClusters(m)) => {
            compile_weighted(m, scope).within("weighted_clusters")
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

fn compile_weighted(m: &pb::WeightedCluster, scope: &Scope) -> Result<Clusters> {
    every_field!(m, pb::WeightedCluster,
        used { clusters }
        // total_weight is deprecated: the sum counts. runtime_key_prefix: there are no runtime files.
        irrelevant { total_weight, runtime_key_prefix }
        refused { random_value_specifier });
    let mut clusters = Vec::with_capacity(m.clusters.len());
    for (i, entry) in m.clusters.iter().enumerate() {
        clusters
            .push(WeightedCluster::compile(entry, scope).within(format_args!("clusters[{i}]"))?);
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
            filters: None,
        }
    }

    fn compile(m: &pb::weighted_cluster::ClusterWeight, scope: &Scope) -> Result<Self> {
        every_field!(m, pb::weighted_cluster::ClusterWeight,
            used {
                name, weight, request_headers_to_add, request_headers_to_remove, response_headers_to_add,
                response_headers_to_remove, host_rewrite_specifier, typed_per_filter_config,
            }
            irrelevant {}
            refused { cluster_header, metadata_match });
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
            filters: match m.typed_per_filter_config.is_empty() {
                true => None,
                false => scope.inner(&m.typed_per_filter_config)?.finish(),
            },
        })
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

/// Path conditions of a route.
#[derive(Debug, Clone)]
pub(crate) enum PathMatch {
    Prefix(Box<str>),
    Exact(Box<str>),
    Segments(Box<str>),
    Regex(Regex),
    Template(Template),
    /// Any CONNECT request, and nothing else.
    Connect,
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
            Some(PathSpecifier::ConnectMatcher(_)) => Self::Connect,
            Some(PathSpecifier::PathMatchPolicy(m)) => {
                Self::Template(Template::compile(m).within("path_match_policy")?)
            }
            None => return Err(CompileError::new("path_specifier", "is missing")),
        })
    }
}
