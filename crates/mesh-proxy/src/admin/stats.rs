//! `/stats`: counters by Envoy's names.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use http::StatusCode;
use mesh_routing::cluster::{Breakers, Cluster, RetryLimit};
use mesh_routing::endpoint::Health;
use serde_json::json;

use crate::serve::Answer;
use crate::shared::Shared;
use crate::upstream::breaker::Gauge;
use crate::upstream::common::Common;
use crate::upstream::counters::Counter;

/// `name: value` for each, sorted by name. `filter` is a regular expression, percent-encoded where it has to be; `used_only` leaves zeros out.
pub(super) fn answer(
    shared: &Shared,
    filter: Option<&str>,
    used_only: bool,
    as_json: bool,
) -> Answer {
    let filter = filter.map(decoded);
    let pattern = match filter.as_deref().map(regex::Regex::new).transpose() {
        Ok(pattern) => pattern,
        Err(error) => return Answer::status(StatusCode::BAD_REQUEST, format!("filter: {error}\n")),
    };
    let mut values = process(shared);
    values.extend(shared.listeners.values());
    for cluster in shared.snapshot().clusters() {
        of_cluster(shared, cluster, &mut values);
    }
    values.extend(shared.counters.stats.values());
    values.retain(|(name, value)| {
        pattern.as_ref().is_none_or(|p| p.is_match(name)) && (!used_only || *value != 0)
    });
    values.sort();
    if as_json {
        let stat = |(name, value): &(String, u64)| json!({ "name": name, "value": value });
        return Answer::json(&json!({ "stats": values.iter().map(stat).collect::<Vec<_>>() }));
    }
    let mut text = String::new();
    for (name, value) in &values {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name}: {value}");
    }
    Answer::text(text)
}

/// Percent-decoding (RFC 3986 section 2.1); what is not well-formed stays as it is.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let digits = after.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn process(shared: &Shared) -> Vec<(String, u64)> {
    let totals = &shared.totals;
    let snapshot = shared.snapshot();
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let open = totals.open.load(Ordering::Relaxed) as u64;
    let started = shared.serving.load(Ordering::Acquire) >= shared.options.concurrency;
    let values = [
        (
            "cluster_manager.active_clusters",
            snapshot.clusters().count() as u64,
        ),
        ("http.downstream_rq_total", load(&totals.requests)),
        ("listener_manager.downstream_cx_active", open),
        (
            "listener_manager.downstream_cx_total",
            load(&totals.connections),
        ),
        (
            "listener_manager.total_listeners_active",
            snapshot.listeners().count() as u64,
        ),
        (
            "listener_manager.total_listeners_warming",
            snapshot.warming().len() as u64,
        ),
        ("listener_manager.workers_started", u64::from(started)),
        ("server.concurrency", shared.options.concurrency as u64),
        ("server.live", u64::from(shared.is_ready())),
        ("server.uptime", shared.started.elapsed().as_secs()),
        ("upstream.cx_connect_fail", load(&totals.upstream_failures)),
        ("upstream.cx_total", load(&totals.upstream_connections)),
        ("xds.resources_rejected", load(&totals.rejected)),
        ("xds.snapshots", load(&totals.snapshots)),
    ];
    values.map(|(name, value)| (name.to_owned(), value)).into()
}

fn of_cluster(shared: &Shared, cluster: &Cluster, values: &mut Vec<(String, u64)>) {
    let common = shared.upstreams.find(&cluster.config.name);
    let stat_name = &cluster.config.stat_name;
    let mut put =
        |name: &str, value: u64| values.push((format!("cluster.{stat_name}.{name}"), value));
    for (counter, name) in Counter::ALL {
        put(name, common.as_ref().map_or(0, |c| c.total(*counter)));
    }
    let (mut healthy, mut degraded, mut total) = (0, 0, 0);
    let set = common
        .as_ref()
        .map_or_else(|| cluster.endpoints.clone(), |c| c.set(cluster));
    for endpoint in set.endpoints() {
        total += 1;
        let state = common.as_ref().and_then(|c| c.find(&endpoint.address));
        let ejected = state.is_some_and(|state| state.monitor.is_ejected());
        match endpoint.health {
            Health::Healthy if !ejected => healthy += 1,
            Health::Degraded if !ejected => degraded += 1,
            _ => {}
        }
    }
    put("membership_total", total);
    put("membership_healthy", healthy);
    put("membership_degraded", degraded);
    let active = common.as_ref().map_or(0, |c| c.ejections_active());
    put("outlier_detection.ejections_active", active as u64);
    breakers(&cluster.config.breakers, common.as_deref(), &mut put);
}

fn breakers(limits: &Breakers, common: Option<&Common>, put: &mut impl FnMut(&str, u64)) {
    let value = |gauge| common.map_or(0, |c| c.gauges.value(gauge));
    let requests = match crate::upstream::breaker::counts_requests(limits) {
        true => u64::from(value(Gauge::Requests)),
        false => common.map_or(0, |c| c.total(Counter::RqActive)),
    };
    let retries = match limits.retries {
        RetryLimit::Count(count) => count,
        RetryLimit::Budget { least, .. } => common.map_or(least, |c| c.gauges.retry_limit(limits)),
    };
    let of = |gauge| u64::from(value(gauge));
    let kinds = [
        ("cx", limits.connections, of(Gauge::Connections)),
        ("rq_pending", limits.pending, of(Gauge::Pending)),
        ("rq", limits.requests, requests),
        ("rq_retry", retries, of(Gauge::Retries)),
    ];
    for (name, limit, used) in kinds {
        let open = used >= u64::from(limit);
        put(
            &format!("circuit_breakers.default.{name}_open"),
            open.into(),
        );
        if limits.track_remaining {
            let (name, left) = match name {
                "rq_retry" => ("retries", limit),
                "rq_pending" => ("pending", limit),
                other => (other, limit),
            };
            put(
                &format!("circuit_breakers.default.remaining_{name}"),
                u64::from(left).saturating_sub(used),
            );
        }
    }
}
