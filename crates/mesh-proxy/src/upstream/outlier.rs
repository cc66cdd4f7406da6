//! Outlier detection (Envoy: "Outlier detection"): who fails too often is taken out for a while.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use mesh_routing::cluster::{OutlierDetection, Trigger};

use crate::upstream::common::{Common, EndpointState, locked};
use crate::upstream::counters::Counter;

/// What a try came to, seen from outlier detection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// An answer of this status.
    Status(u16),
    /// A connection was made.
    Connected,
    /// A connection was made, and that is all that will be known (TCP).
    ConnectedFinal,
    /// Connecting failed, or the connection broke.
    Failed,
    /// It took too long.
    TimedOut,
}

/// What is known of one endpoint.
#[derive(Debug)]
pub(crate) struct Monitor {
    consecutive: [AtomicU32; 3],
    rates: [Rate; 2],
    ejected: AtomicBool,
    record: Mutex<Record>,
}

impl Default for Monitor {
    fn default() -> Self {
        Self {
            consecutive: Default::default(),
            rates: Default::default(),
            ejected: AtomicBool::new(false),
            record: Mutex::default(),
        }
    }
}

/// Requests since the last look.
#[derive(Debug)]
struct Rate {
    total: AtomicU64,
    success: AtomicU64,
    /// Success rate at the last look in 1/1000 percent; `u64::MAX` unknown.
    shown: AtomicU64,
}

impl Default for Rate {
    fn default() -> Self {
        Self {
            total: AtomicU64::new(0),
            success: AtomicU64::new(0),
            shown: AtomicU64::new(u64::MAX),
        }
    }
}

#[derive(Debug, Default)]
struct Record {
    since: Option<Instant>,
    jitter: Duration,
    /// Times that it was taken out, less the looks at which it was in.
    times: u32,
}

/// Failures in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    Server,
    Gateway,
    Local,
}

/// Whose fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    External,
    Local,
}

impl Monitor {
    pub(crate) fn is_ejected(&self) -> bool {
        self.ejected.load(Ordering::Acquire)
    }

    /// Success rates in percent, external and local origin, as of the last look; `None` where not enough was seen.
    pub(crate) fn success_rates(&self) -> [Option<f64>; 2] {
        [0, 1].map(|i| {
            let shown = self.rates.get(i)?.shown.load(Ordering::Relaxed);
            (shown != u64::MAX).then_some(shown as f64 / 1000.0)
        })
    }

    fn row(&self, row: Row) -> &AtomicU32 {
        let [server, gateway, local] = &self.consecutive;
        match row {
            Row::Server => server,
            Row::Gateway => gateway,
            Row::Local => local,
        }
    }

    fn rate(&self, origin: Origin) -> &Rate {
        let [external, local] = &self.rates;
        match origin {
            Origin::External => external,
            Origin::Local => local,
        }
    }

    fn reset(&self, row: Row) {
        let count = self.row(row);
        // Mostly it is zero: reading lets all workers share the line.
        if count.load(Ordering::Relaxed) != 0 {
            count.store(0, Ordering::Relaxed);
        }
    }

    /// One more in a row; true if that is the number that has consequences.
    fn reached(&self, row: Row, trigger: Trigger) -> bool {
        self.row(row).fetch_add(1, Ordering::Relaxed) + 1 == trigger.count
    }

    fn rated(&self, origin: Origin, success: bool, config: &OutlierDetection) {
        if config.wants_rates() {
            let rate = self.rate(origin);
            rate.total.fetch_add(1, Ordering::Relaxed);
            rate.success
                .fetch_add(u64::from(success), Ordering::Relaxed);
        }
    }
}

/// Takes note of what a try came to.
pub(crate) fn observe(
    common: &Common,
    endpoint: &EndpointState,
    config: &OutlierDetection,
    outcome: Outcome,
) {
    match (outcome, config.split_local_origin) {
        (Outcome::Status(code), _) => external(common, endpoint, config, code),
        (Outcome::Connected | Outcome::ConnectedFinal, true) => {
            endpoint.monitor.rated(Origin::Local, true, config);
            endpoint.monitor.reset(Row::Local);
        }
        (Outcome::Failed | Outcome::TimedOut, true) => {
            endpoint.monitor.rated(Origin::Local, false, config);
            let trigger = config.consecutive_local_origin_failure;
            if endpoint.monitor.reached(Row::Local, trigger) {
                in_a_row(common, endpoint, config, Row::Local);
            }
        }
        (Outcome::Connected, false) => {}
        (Outcome::ConnectedFinal, false) => external(common, endpoint, config, 200),
        (Outcome::Failed, false) => external(common, endpoint, config, 503),
        (Outcome::TimedOut, false) => external(common, endpoint, config, 504),
    }
}

fn external(common: &Common, endpoint: &EndpointState, config: &OutlierDetection, code: u16) {
    let monitor = &endpoint.monitor;
    let failed = (500..600).contains(&code);
    monitor.rated(Origin::External, !failed, config);
    if !failed {
        monitor.reset(Row::Server);
        monitor.reset(Row::Gateway);
        return;
    }
    match code {
        502..=504 if monitor.reached(Row::Gateway, config.consecutive_gateway_failure) => {
            in_a_row(common, endpoint, config, Row::Gateway);
        }
        502..=504 => {}
        _ => monitor.reset(Row::Gateway),
    }
    if monitor.reached(Row::Server, config.consecutive_5xx) {
        in_a_row(common, endpoint, config, Row::Server);
    }
}

fn in_a_row(common: &Common, endpoint: &EndpointState, config: &OutlierDetection, row: Row) {
    let _one_at_a_time = locked(&common.detecting);
    if endpoint.monitor.is_ejected() {
        return;
    }
    let (trigger, counters) = match row {
        Row::Server => (
            config.consecutive_5xx,
            [Counter::Detected5xx, Counter::Enforced5xx],
        ),
        Row::Gateway => (
            config.consecutive_gateway_failure,
            [Counter::DetectedGateway, Counter::EnforcedGateway],
        ),
        Row::Local => (
            config.consecutive_local_origin_failure,
            [Counter::DetectedLocal, Counter::EnforcedLocal],
        ),
    };
    eject(common, endpoint, config, trigger.enforcing, counters);
    // So that another bout is seen although no success came between.
    endpoint.monitor.reset(row);
}

fn eject(
    common: &Common,
    endpoint: &EndpointState,
    config: &OutlierDetection,
    enforcing: u32,
    [detected, enforced]: [Counter; 2],
) {
    common.own.inc_shared(detected);
    let members = common.members();
    let out = members.iter().filter(|m| m.monitor.is_ejected()).count();
    let percent = (out + 1) as f64 * 100.0 / members.len().max(1) as f64;
    let allowed = percent <= f64::from(config.max_percent) || (config.always_one && out == 0);
    if !allowed {
        common.own.inc_shared(Counter::EjectionsOverflow);
        return;
    }
    if rand::random_range(0..100) >= enforcing {
        return;
    }
    common.own.inc_shared(enforced);
    common.own.inc_shared(Counter::EjectionsEnforced);
    let mut record = locked(&endpoint.monitor.record);
    record.since = Some(Instant::now());
    record.jitter = config.jitter.mul_f64(rand::random::<f64>());
    if config.base_ejection * record.times <= config.max_ejection {
        record.times += 1;
    }
    drop(record);
    endpoint.monitor.ejected.store(true, Ordering::Release);
    tracing::info!(endpoint = %endpoint.address, reason = ?detected, "outlier: taken out");
    common.changed();
}

/// Looks at the cluster once in every interval for as long as it is in use and wants that.
pub(crate) async fn watch(common: Weak<Common>) {
    loop {
        let interval = match common.upgrade() {
            None => return,
            Some(common) => match common.outlier() {
                Some(config) => config.interval,
                None => {
                    restore_all(&common);
                    common.watched.store(false, Ordering::Release);
                    return;
                }
            },
        };
        tokio::time::sleep(interval).await;
        if let Some(common) = common.upgrade()
            && let Some(config) = common.outlier()
        {
            look(&common, &config, Instant::now());
        }
    }
}

/// Detection was configured away: everybody is in again.
fn restore_all(common: &Common) {
    for endpoint in common.members() {
        if endpoint.monitor.is_ejected() {
            restore(common, &endpoint);
        }
    }
}

fn restore(common: &Common, endpoint: &EndpointState) {
    let monitor = &endpoint.monitor;
    for row in [Row::Server, Row::Gateway, Row::Local] {
        monitor.reset(row);
    }
    monitor.ejected.store(false, Ordering::Release);
    tracing::info!(endpoint = %endpoint.address, "outlier: back in");
    common.changed();
}

fn look(common: &Common, config: &OutlierDetection, now: Instant) {
    let _one_at_a_time = locked(&common.detecting);
    let members = common.members();
    for endpoint in members.iter().filter(|e| e.monitor.is_ejected()) {
        let record = locked(&endpoint.monitor.record);
        let time = (config.base_ejection * record.times).min(config.max_ejection) + record.jitter;
        let over = record
            .since
            .is_none_or(|since| now.duration_since(since) >= time);
        drop(record);
        if over {
            restore(common, endpoint);
        }
    }
    if config.wants_rates() {
        rates(common, config, &members, Origin::External);
        if config.split_local_origin {
            rates(common, config, &members, Origin::Local);
        }
    }
    for endpoint in members.iter().filter(|e| !e.monitor.is_ejected()) {
        let mut record = locked(&endpoint.monitor.record);
        record.times = record.times.saturating_sub(1);
    }
}

fn rates(
    common: &Common,
    config: &OutlierDetection,
    members: &[Arc<EndpointState>],
    origin: Origin,
) {
    let (success, percentage) = (&config.success_rate, &config.failure_percentage);
    let mut seen: Vec<(&Arc<EndpointState>, f64, u64)> = Vec::new();
    for endpoint in members {
        let rate = endpoint.monitor.rate(origin);
        let total = rate.total.swap(0, Ordering::Relaxed);
        let good = rate.success.swap(0, Ordering::Relaxed);
        rate.shown.store(u64::MAX, Ordering::Relaxed);
        if !endpoint.monitor.is_ejected() && total >= success.volume.min(percentage.volume).max(1) {
            let share = good as f64 * 100.0 / total as f64;
            rate.shown.store((share * 1000.0) as u64, Ordering::Relaxed);
            seen.push((endpoint, share, total));
        }
    }
    let enough = |volume: u64| -> Vec<(&Arc<EndpointState>, f64)> {
        let fits = seen.iter().filter(|(_, _, total)| *total >= volume);
        fits.map(|(endpoint, share, _)| (*endpoint, *share))
            .collect()
    };
    let (rate_enforcing, rate_counters, percent_enforcing, percent_counters) = match origin {
        Origin::External => (
            success.enforcing,
            [Counter::DetectedRate, Counter::EnforcedRate],
            percentage.enforcing,
            [Counter::DetectedPercentage, Counter::EnforcedPercentage],
        ),
        Origin::Local => (
            success.enforcing_local,
            [Counter::DetectedLocalRate, Counter::EnforcedLocalRate],
            percentage.enforcing_local,
            [
                Counter::DetectedLocalPercentage,
                Counter::EnforcedLocalPercentage,
            ],
        ),
    };
    let judged = enough(success.volume);
    if judged.len() >= success.hosts.max(1) {
        let least = least_success(&judged, success.factor);
        for (endpoint, _) in judged.iter().filter(|(_, share)| *share < least) {
            eject(common, endpoint, config, rate_enforcing, rate_counters);
        }
    }
    let judged = enough(percentage.volume);
    if judged.len() >= percentage.hosts.max(1) {
        let threshold = f64::from(percentage.threshold);
        let failing = judged.iter().filter(|(endpoint, share)| {
            100.0 - share >= threshold && !endpoint.monitor.is_ejected()
        });
        for (endpoint, _) in failing {
            eject(
                common,
                endpoint,
                config,
                percent_enforcing,
                percent_counters,
            );
        }
    }
}

/// Mean less a multiple of the standard deviation.
fn least_success(judged: &[(&Arc<EndpointState>, f64)], factor: f64) -> f64 {
    let count = judged.len() as f64;
    let mean = judged.iter().map(|(_, share)| share).sum::<f64>() / count;
    let squares = judged.iter().map(|(_, share)| (share - mean).powi(2));
    mean - factor * (squares.sum::<f64>() / count).sqrt()
}

impl Common {
    /// Endpoints that are out at present.
    pub fn ejections_active(&self) -> usize {
        let members = self.members();
        members.iter().filter(|m| m.monitor.is_ejected()).count()
    }
}
