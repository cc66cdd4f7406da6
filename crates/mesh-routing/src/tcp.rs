//! The `tcp_proxy` filter.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;

use crate::error::{CompileError, Result, Within, every_field, nonzero_duration, timeout};
use crate::hash;

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
    hash_by_source: bool,
}

impl TcpProxy {
    pub(crate) fn compile(m: &pb::TcpProxy) -> Result<Self> {
        every_field!(m, pb::TcpProxy,
        used { idle_timeout, max_connect_attempts, cluster_specifier, hash_policy, max_downstream_connection_duration }
        // Statistics and log settings: access logs are refused. on_demand: clusters are not discovered one by one.
        irrelevant {
            stat_prefix, on_demand, access_log_flush_interval, flush_access_log_on_connected, access_log_options, check_drain_close,
            backoff_options, max_early_data_bytes,
        }
        refused {
            max_downstream_connection_duration_jitter_percentage, metadata_match, access_log, tunneling_config, proxy_protocol_tlvs,
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
