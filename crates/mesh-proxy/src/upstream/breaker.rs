//! Circuit breakers: what is under way to a cluster, counted for the whole process where it has a limit.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use mesh_routing::cluster::{Breakers, RetryLimit};

use crate::upstream::common::Common;
use crate::upstream::window::Window;

/// What has limits.
#[derive(Debug, Default)]
pub struct Gauges {
    /// Connections.
    pub connections: AtomicU32,
    /// Requests that wait for a connection.
    pub pending: AtomicU32,
    /// Requests under way.
    pub requests: AtomicU32,
    /// Retries under way.
    pub retries: AtomicU32,
    /// Requests that began lately; there once a budget asks for them.
    recent: OnceLock<Box<Window>>,
}

/// One of the gauges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gauge {
    /// Connections.
    Connections,
    /// Waiting requests.
    Pending,
    /// Requests.
    Requests,
    /// Retries.
    Retries,
}

impl Gauges {
    fn of(&self, gauge: Gauge) -> &AtomicU32 {
        match gauge {
            Gauge::Connections => &self.connections,
            Gauge::Pending => &self.pending,
            Gauge::Requests => &self.requests,
            Gauge::Retries => &self.retries,
        }
    }

    /// What is under way.
    pub fn value(&self, gauge: Gauge) -> u32 {
        self.of(gauge).load(Ordering::Relaxed)
    }

    /// A request begins.
    pub fn note_request(&self, limits: &Breakers) {
        if let RetryLimit::Budget {
            interval: Some(interval),
            ..
        } = limits.retries
        {
            self.recent
                .get_or_init(Box::default)
                .note(interval, Instant::now());
        }
    }

    /// The limit of retries, which may depend on what is under way, or began lately.
    pub fn retry_limit(&self, limits: &Breakers) -> u32 {
        match limits.retries {
            RetryLimit::Count(count) => count,
            RetryLimit::Budget {
                percent,
                least,
                interval,
            } => {
                let running = match (interval, self.recent.get()) {
                    (Some(interval), Some(recent)) => recent.count(interval, Instant::now()),
                    (Some(_), None) => 0,
                    (None, _) => self.value(Gauge::Requests) + self.value(Gauge::Pending),
                };
                ((f64::from(running) * percent / 100.0) as u32).max(least)
            }
        }
    }
}

/// Must requests be counted for the whole process? Where nothing looks at the number, workers need not share it.
pub fn counts_requests(limits: &Breakers) -> bool {
    limits.requests < Breakers::UNLIMITED || matches!(limits.retries, RetryLimit::Budget { .. })
}

/// Something under way; over when dropped.
#[derive(Debug)]
pub struct Held {
    common: Arc<Common>,
    gauge: Gauge,
}

impl Held {
    /// One more, unless that were above the limit. Where two workers come at once both may get in, as in Envoy.
    pub fn within(common: &Arc<Common>, gauge: Gauge, limit: u32) -> Option<Self> {
        (common.gauges.value(gauge) < limit).then(|| Self::beyond(common, gauge))
    }

    /// One more in any case.
    pub fn beyond(common: &Arc<Common>, gauge: Gauge) -> Self {
        common.gauges.of(gauge).fetch_add(1, Ordering::Relaxed);
        Self {
            common: common.clone(),
            gauge,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.common
            .gauges
            .of(self.gauge)
            .fetch_sub(1, Ordering::Relaxed);
    }
}
