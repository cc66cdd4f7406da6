//! The `tcp_proxy` filter.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::{
    ClusterSpecifier, TunnelingConfig,
};
use http::HeaderMap;
use http::uri::{Authority, PathAndQuery};

use crate::error::{CompileError, Result, Within, every_field, nonzero_duration, timeout};
use crate::format::{Facts, Format};
use crate::hash;
use crate::headers::HeaderOps;

/// Envoy's idle timeout of proxied TCP connections.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// A compiled `TcpProxy`.
#[derive(Debug)]
pub struct TcpProxy {
    clusters: Vec<(Arc<str>, u64)>,
    /// Silence in both directions after which the connection ends; `None` never.
    pub idle_timeout: Option<Duration>,
    /// Connections tried before giving up, at least 1.
    pub max_connect_attempts: u32,
    /// Connections end after this, used or not.
    pub max_duration: Option<Duration>,
    /// Connections go in a tunnel that this opens; `None` for as they are.
    pub tunnel: Option<Tunnel>,
    hash_by_source: bool,
}

/// The request that opens a tunnel for one connection (`tunneling_config`).
#[derive(Debug)]
pub struct Tunnel {
    target: Target,
    /// Path of a POST, whose body the connection becomes; `None` for CONNECT.
    pub post: Option<PathAndQuery>,
    headers: HeaderOps,
}

/// Where a tunnel leads.
#[derive(Debug)]
enum Target {
    Fixed(Authority),
    Made(Format),
}

impl Tunnel {
    fn compile(m: &TunnelingConfig) -> Result<Self> {
        // The answer's headers and trailers, and ids of requests, are for filters and logs that are refused.
        every_field!(m, TunnelingConfig, used { hostname, use_post, headers_to_add, post_path } irrelevant {}
        refused {
            propagate_response_headers, propagate_response_trailers, request_id_extension, request_id_header, request_id_metadata_key,
            formatters,
        });
        let format = Format::compile(&m.hostname).within("hostname")?;
        let target = match format.literal() {
            Some(text) => Target::Fixed(
                text.parse()
                    .map_err(|_| CompileError::new("hostname", "is not HOST or HOST:PORT"))?,
            ),
            None => Target::Made(format),
        };
        let post = match (m.use_post, m.post_path.as_str()) {
            (true, "") => Some(PathAndQuery::from_static("/")),
            (true, path) => Some(
                path.parse()
                    .map_err(|_| CompileError::new("post_path", "is not a path"))?,
            ),
            (false, "") => None,
            (false, _) => {
                let reason = "means nothing without use_post (Envoy refuses it too)";
                return Err(CompileError::new("post_path", reason));
            }
        };
        Ok(Self {
            target,
            post,
            headers: HeaderOps::compile(&m.headers_to_add, &[])?,
        })
    }

    /// Where the tunnel of a connection leads; `None` where what is known of the connection makes no `HOST:PORT`.
    pub fn target(&self, facts: &Facts<'_>) -> Option<Authority> {
        match &self.target {
            Target::Fixed(authority) => Some(authority.clone()),
            Target::Made(format) => {
                let made: Authority = format.render(facts, "-").parse().ok()?;
                // Names may come from clients: RFC 9110 section 9.3.6 has no user information here.
                let is_plain = made.port_u16().is_some() && !made.as_str().contains('@');
                is_plain.then_some(made)
            }
        }
    }

    /// Headers of the request beside what it needs itself.
    pub fn headers(&self, facts: &Facts<'_>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        self.headers.apply_to_request(&mut headers, facts);
        headers
    }
}

impl TcpProxy {
    pub(crate) fn compile(m: &pb::TcpProxy) -> Result<Self> {
        every_field!(m, pb::TcpProxy,
        used { idle_timeout, max_connect_attempts, cluster_specifier, hash_policy, max_downstream_connection_duration, tunneling_config }
        // Statistics and log settings: access logs are refused. on_demand: clusters are not discovered one by one.
        irrelevant {
            stat_prefix, on_demand, access_log_flush_interval, flush_access_log_on_connected, access_log_options, check_drain_close,
            backoff_options, max_early_data_bytes,
        }
        refused {
            max_downstream_connection_duration_jitter_percentage, metadata_match, access_log, proxy_protocol_tlvs,
            proxy_protocol_tlv_merge_policy, upstream_connect_mode, downstream_idle_timeout, upstream_idle_timeout,
        });
        let clusters = match &m.cluster_specifier {
            Some(ClusterSpecifier::Cluster(name)) => vec![(name.as_str().into(), 1)],
            Some(ClusterSpecifier::WeightedClusters(weighted)) => weighted
                .clusters
                .iter()
                .map(|c| (c.name.as_str().into(), u64::from(c.weight)))
                .collect(),
            None => return Err(CompileError::new("cluster", "no cluster is given")),
        };
        if clusters.iter().all(|(_, weight)| *weight == 0) {
            return Err(CompileError::new(
                "weighted_clusters",
                "the sum of the weights must be above zero",
            ));
        }
        Ok(Self {
            clusters,
            idle_timeout: timeout(
                "idle_timeout",
                m.idle_timeout.as_ref(),
                DEFAULT_IDLE_TIMEOUT,
            )?,
            max_connect_attempts: m.max_connect_attempts.map_or(1, |n| n.value.max(1)),
            max_duration: nonzero_duration(
                "max_downstream_connection_duration",
                m.max_downstream_connection_duration.as_ref(),
            )?,
            tunnel: m
                .tunneling_config
                .as_ref()
                .map(Tunnel::compile)
                .transpose()
                .within("tunneling_config")?,
            hash_by_source: hash::compile_tcp(&m.hash_policy).within("hash_policy")?,
        })
    }

    /// The hash of a connection from this address, where the configuration asks for one.
    pub fn hash(&self, source: IpAddr) -> Option<u64> {
        self.hash_by_source.then(|| hash::of_ip(source))
    }

    /// The cluster for a connection.
    pub fn cluster(&self, random: u64) -> &Arc<str> {
        let total: u64 = self.clusters.iter().map(|(_, weight)| weight).sum();
        let mut point = random % total.max(1);
        for (name, weight) in &self.clusters {
            if point < *weight {
                return name;
            }
            point -= weight;
        }
        &self.clusters[0].0
    }
}
