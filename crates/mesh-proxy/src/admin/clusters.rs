//! `/clusters` in Envoy's text form and as `envoy.admin.v3.Clusters`.

use std::fmt::Write as _;
use std::sync::Arc;

use mesh_routing::cluster::{Cluster, Discovery, RetryLimit};
use mesh_routing::endpoint::{Endpoint, Health};
use serde_json::{Value, json};

use super::dump::socket;
use crate::shared::Shared;
use crate::upstream::common::EndpointState;
use crate::upstream::counters::HostCounter;

/// An endpoint with what is known of it.
struct Row<'a> {
    address: std::net::SocketAddr,
    endpoint: Option<&'a Endpoint>,
    state: Option<Arc<EndpointState>>,
}

impl Row<'_> {
    fn count(&self, counter: HostCounter) -> u64 {
        self.state.as_ref().map_or(0, |state| state.total(counter))
    }

    fn is_ejected(&self) -> bool {
        self.state
            .as_ref()
            .is_some_and(|state| state.monitor.is_ejected())
    }

    fn health(&self) -> Health {
        self.endpoint.map_or(Health::Healthy, |e| e.health)
    }

    /// Envoy's names, `healthy` for none.
    fn flags(&self) -> String {
        let mut flags = String::new();
        if self.is_ejected() {
            flags.push_str("/failed_outlier_check");
        }
        match self.health() {
            Health::Healthy => {}
            Health::Degraded => flags.push_str("/degraded_eds_health"),
            Health::Unhealthy => flags.push_str("/failed_eds_health"),
        }
        match flags.is_empty() {
            true => "healthy".to_owned(),
            false => flags,
        }
    }

    /// Region, zone, sub-zone.
    fn locality(&self) -> [&str; 3] {
        let mut parts = self.endpoint.map_or("", |e| &e.locality).splitn(3, '/');
        [(); 3].map(|()| parts.next().unwrap_or(""))
    }

    /// External and local origin, in percent; -1 where not enough was seen.
    fn success_rates(&self) -> [f64; 2] {
        let rates = self
            .state
            .as_ref()
            .map(|state| state.monitor.success_rates());
        rates.unwrap_or_default().map(|rate| rate.unwrap_or(-1.0))
    }
}

/// All clusters by name, with their endpoints.
fn each(shared: &Shared, mut show: impl FnMut(&Cluster, &[Row<'_>])) {
    let snapshot = shared.snapshot();
    let mut clusters: Vec<_> = snapshot.clusters().collect();
    clusters.sort_by(|a, b| a.config.name.cmp(&b.config.name));
    for cluster in clusters {
        let common = shared.upstreams.find(&cluster.config.name);
        if let (Discovery::OriginalDestination(_), Some(common)) =
            (&cluster.config.discovery, &common)
        {
            let mut rows: Vec<_> = common.destinations().into_iter().map(destination).collect();
            rows.sort_by_key(|row| row.address);
            show(cluster, &rows);
            continue;
        }
        let set = common
            .as_ref()
            .map_or_else(|| cluster.endpoints.clone(), |c| c.set(cluster));
        let mut rows = Vec::with_capacity(set.endpoints().len());
        for endpoint in set.endpoints() {
            rows.push(Row {
                address: endpoint.address,
                endpoint: Some(endpoint),
                state: common.as_ref().and_then(|c| c.find(&endpoint.address)),
            });
        }
        show(cluster, &rows);
    }
}

fn destination(state: Arc<EndpointState>) -> Row<'static> {
    Row {
        address: state.address,
        endpoint: None,
        state: Some(state),
    }
}

/// `/clusters`.
pub(super) fn text(shared: &Shared) -> String {
    let mut text = String::new();
    each(shared, |cluster, rows| {
        // Writing to a String cannot fail.
        let _ = cluster_text(&mut text, cluster, rows);
    });
    text
}

fn cluster_text(out: &mut String, cluster: &Cluster, rows: &[Row<'_>]) -> std::fmt::Result {
    let (config, name) = (&cluster.config, &cluster.config.name);
    writeln!(out, "{name}::observability_name::{}", config.stat_name)?;
    if config.outlier.is_some() {
        let rate = |row: &Row<'_>| row.success_rates()[0];
        let known: Vec<f64> = rows.iter().map(rate).filter(|rate| *rate >= 0.0).collect();
        let average = match known.len() {
            0 => -1.0,
            n => known.iter().sum::<f64>() / n as f64,
        };
        writeln!(out, "{name}::outlier::success_rate_average::{average}")?;
    }
    let limits = &config.breakers;
    let retries = match limits.retries {
        RetryLimit::Count(count) => count,
        RetryLimit::Budget { least, .. } => least,
    };
    for (limit, value) in [
        ("max_connections", limits.connections),
        ("max_pending_requests", limits.pending),
        ("max_requests", limits.requests),
        ("max_retries", retries),
    ] {
        writeln!(out, "{name}::default_priority::{limit}::{value}")?;
    }
    writeln!(out, "{name}::added_via_api::true")?;
    for row in rows {
        let at = format!("{name}::{}", row.address);
        for (counter, label) in HostCounter::ALL {
            writeln!(out, "{at}::{label}::{}", row.count(*counter))?;
        }
        let [region, zone, sub_zone] = row.locality();
        let [rate, local] = row.success_rates();
        let hostname = row.endpoint.map_or("", |e| &e.hostname);
        let weight = row.endpoint.map_or(1, |e| e.weight);
        let priority = row.endpoint.map_or(0, |e| e.priority);
        writeln!(
            out,
            "{at}::hostname::{hostname}\n{at}::health_flags::{}\n{at}::weight::{weight}\n{at}::region::{region}\n\
             {at}::zone::{zone}\n{at}::sub_zone::{sub_zone}\n{at}::canary::false\n{at}::priority::{priority}\n\
             {at}::success_rate::{rate}\n{at}::local_origin_success_rate::{local}",
            row.flags(),
        )?;
    }
    Ok(())
}

/// `/clusters?format=json`.
pub(super) fn json(shared: &Shared) -> Value {
    let mut all = Vec::new();
    each(shared, |cluster, rows| {
        let config = &cluster.config;
        all.push(json!({
            "name": &*config.name,
            "observability_name": &*config.stat_name,
            "added_via_api": true,
            "lb_policy": config.lb.policy.name(),
            "circuit_breakers": { "thresholds": [{
                "max_connections": config.breakers.connections,
                "max_pending_requests": config.breakers.pending,
                "max_requests": config.breakers.requests,
                "max_retries": match config.breakers.retries {
                    RetryLimit::Count(count) => count,
                    RetryLimit::Budget { least, .. } => least,
                },
            }] },
            "host_statuses": rows.iter().map(row_json).collect::<Vec<_>>(),
        }));
    });
    json!({ "cluster_statuses": all })
}

fn row_json(row: &Row<'_>) -> Value {
    let gauge = |counter| matches!(counter, HostCounter::CxActive | HostCounter::RqActive);
    let stat = |(counter, name): &(HostCounter, &str)| {
        let kind = if gauge(*counter) { "GAUGE" } else { "COUNTER" };
        // Numbers of 64 bits are texts in JSON made from protobuf.
        json!({ "name": name, "value": row.count(*counter).to_string(), "type": kind })
    };
    let status = match row.health() {
        Health::Healthy => "HEALTHY",
        Health::Degraded => "DEGRADED",
        Health::Unhealthy => "UNHEALTHY",
    };
    let mut health = json!({ "eds_health_status": status });
    if row.is_ejected() {
        health["failed_outlier_check"] = json!(true);
    }
    let [region, zone, sub_zone] = row.locality();
    let mut value = json!({
        "address": socket(row.address),
        "stats": HostCounter::ALL.iter().map(stat).collect::<Vec<_>>(),
        "health_status": health,
        "weight": row.endpoint.map_or(1, |e| e.weight),
        "hostname": row.endpoint.map_or("", |e| &e.hostname),
        "priority": row.endpoint.map_or(0, |e| e.priority),
        "locality": { "region": region, "zone": zone, "sub_zone": sub_zone },
    });
    for (name, rate) in ["success_rate", "local_origin_success_rate"]
        .into_iter()
        .zip(row.success_rates())
        .filter(|(_, rate)| *rate >= 0.0)
    {
        value[name] = json!({ "value": rate });
    }
    value
}
