//! Circuit breakers: limits of what is under way to a cluster at once.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::CircuitBreakers;
use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::thresholds as pb;
use envoy_types::pb::google::protobuf::UInt32Value;

use crate::error::{Result, Within, every_field, nonzero_duration};

/// Limits of one cluster, for requests of default priority (others cannot be routed). Envoy's limits are for the whole process, too.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Breakers {
    /// Connections.
    pub connections: u32,
    /// Requests that wait for a connection.
    pub pending: u32,
    /// Requests under way.
    pub requests: u32,
    /// Retries under way.
    pub retries: RetryLimit,
    /// What is left is shown in the statistics.
    pub track_remaining: bool,
}

/// The limit of retries under way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RetryLimit {
    /// So many.
    Count(u32),
    /// A part of the requests under way.
    Budget {
        /// In percent of the requests under way or waiting.
        percent: f64,
        /// But so many in any case.
        least: u32,
        /// Of the requests that began within this time, whether they are over or not, instead of those under way (`budget_interval`).
        interval: Option<Duration>,
    },
}

impl Default for Breakers {
    /// Envoy's limits where none are configured.
    fn default() -> Self {
        Self {
            connections: 1024,
            pending: 1024,
            requests: 1024,
            retries: RetryLimit::Count(3),
            track_remaining: false,
        }
    }
}

impl Breakers {
    /// So high a limit that no process reaches it, as Istio sends it for "none".
    pub const UNLIMITED: u32 = 1 << 31;

    pub(crate) fn compile(m: &CircuitBreakers) -> Result<Self> {
        every_field!(m, CircuitBreakers, used { thresholds } irrelevant {} refused { per_host_thresholds });
        // priority HIGH: routes of that priority are refused, so its limits are never asked for.
        match m.thresholds.iter().position(|t| t.priority == 0) {
            Some(i) => m.thresholds.get(i).map_or(Ok(Self::default()), |t| {
                compile(t).within(format_args!("thresholds[{i}]"))
            }),
            None => Ok(Self::default()),
        }
    }
}

fn compile(m: &Thresholds) -> Result<Breakers> {
    // max_connection_pools: there is one pool for each endpoint and worker, never more.
    every_field!(m, Thresholds,
        used { priority, max_connections, max_pending_requests, max_requests, max_retries, retry_budget, track_remaining }
        irrelevant { max_connection_pools } refused {});
    let or = |value: Option<UInt32Value>, default| value.map_or(default, |v| v.value);
    let standard = Breakers::default();
    Ok(Breakers {
        connections: or(m.max_connections, standard.connections),
        pending: or(m.max_pending_requests, standard.pending),
        requests: or(m.max_requests, standard.requests),
        retries: match &m.retry_budget {
            Some(budget) => compile_budget(budget).within("retry_budget")?,
            None => RetryLimit::Count(or(m.max_retries, 3)),
        },
        track_remaining: m.track_remaining,
    })
}

fn compile_budget(m: &pb::RetryBudget) -> Result<RetryLimit> {
    every_field!(m, pb::RetryBudget, used { budget_percent, min_retry_concurrency, budget_interval } irrelevant {} refused {});
    Ok(RetryLimit::Budget {
        percent: m
            .budget_percent
            .as_ref()
            .map_or(20.0, |p| p.value)
            .clamp(0.0, 100.0),
        least: m.min_retry_concurrency.map_or(3, |v| v.value),
        interval: nonzero_duration("budget_interval", m.budget_interval.as_ref())?,
    })
}
