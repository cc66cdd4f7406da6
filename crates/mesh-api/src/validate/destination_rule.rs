//! Rules for DestinationRule; parts of it are used by Sidecar too.

use std::collections::HashSet;

use crate::Duration;
use crate::networking::DestinationRule;
use crate::networking::destination_rule::{
    ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, ConsistentHashLb, Failover,
    H2UpgradePolicy, LoadBalancerSettings, LocalityLbSetting, OutlierDetection, TrafficPolicy,
};

use super::{Check, Validate, names};

impl Validate for DestinationRule {
    fn validate(&self, check: &mut Check) {
        check.at("host", |check| {
            if let Err(message) = names::wildcard_host(&self.host) {
                check.error(message);
            }
        });
        names::export_to(&self.export_to, false, check);
        if let Some(selector) = &self.workload_selector {
            check.part("workloadSelector", selector);
            let local = self.export_to.is_empty() || self.export_to == ["."];
            check.require(local, "exportTo", "a rule with a workloadSelector holds in its own namespace only; write [\".\"] or leave it out");
        }
        check.part("trafficPolicy", &self.traffic_policy);
        let mut seen = HashSet::new();
        check.each("subsets", &self.subsets, |check, subset| {
            check.require(
                names::is_dns_label(&subset.name),
                "name",
                &format!(
                    "{:?} is not a name: lower-case letters, digits and '-'",
                    subset.name
                ),
            );
            check.require(
                seen.insert(subset.name.clone()),
                "name",
                &format!("subset {:?} is there twice", subset.name),
            );
            names::labels("labels", &subset.labels, check);
            check.part("trafficPolicy", &subset.traffic_policy);
        });
    }
}

impl Validate for TrafficPolicy {
    fn validate(&self, check: &mut Check) {
        if *self == Self::default() {
            check.error("empty; say what is to be done, or leave it out");
        }
        parts(
            self.load_balancer.as_ref(),
            self.connection_pool.as_ref(),
            self.outlier_detection.as_ref(),
            self.tls.as_ref(),
            check,
        );
        check.require(
            self.port_level_settings.len() <= 4096,
            "portLevelSettings",
            "more than 4096 ports",
        );
        check.each(
            "portLevelSettings",
            &self.port_level_settings,
            |check, settings| {
                let number = settings.port.as_ref().map_or(0, |port| port.number);
                names::port(number, "port.number", check);
                let empty = settings.load_balancer.is_none()
                    && settings.connection_pool.is_none()
                    && settings.outlier_detection.is_none()
                    && settings.tls.is_none();
                if empty {
                    check.error("only a port; say what is to be done with it");
                }
                parts(
                    settings.load_balancer.as_ref(),
                    settings.connection_pool.as_ref(),
                    settings.outlier_detection.as_ref(),
                    settings.tls.as_ref(),
                    check,
                );
            },
        );
        if let Some(tunnel) = &self.tunnel {
            check.require(
                self.proxy_protocol.is_none(),
                "proxyProtocol",
                "a tunnel and a PROXY protocol header exclude each other",
            );
            check.require(
                matches!(tunnel.protocol.as_str(), "" | "CONNECT" | "POST"),
                "tunnel.protocol",
                "CONNECT or POST",
            );
            names::port(tunnel.target_port, "tunnel.targetPort", check);
            check.require(
                names::is_fqdn(&tunnel.target_host)
                    || tunnel.target_host.parse::<std::net::IpAddr>().is_ok(),
                "tunnel.targetHost",
                "a host name or address is needed",
            );
        }
        if let Some(budget) = &self.retry_budget {
            percentage(budget.percent, "retryBudget.percent", check);
        }
        let failover = self
            .load_balancer
            .as_ref()
            .and_then(|lb| lb.locality_lb_setting.as_ref())
            .is_some_and(|setting| !setting.failover.is_empty());
        if failover && self.outlier_detection.is_none() {
            check.warn_at(
                "outlierDetection",
                "failover needs outlier detection to find out that a locality has failed",
            );
        }
    }
}

fn parts(
    lb: Option<&LoadBalancerSettings>,
    pool: Option<&ConnectionPoolSettings>,
    outlier: Option<&OutlierDetection>,
    tls: Option<&ClientTlsSettings>,
    check: &mut Check,
) {
    for (field, part) in [
        ("loadBalancer", lb.map(|part| part as &dyn Part)),
        ("connectionPool", pool.map(|part| part as &dyn Part)),
        ("outlierDetection", outlier.map(|part| part as &dyn Part)),
        ("tls", tls.map(|part| part as &dyn Part)),
    ] {
        if let Some(part) = part {
            check.at(field, |check| part.check(check));
        }
    }
}

/// A part of a traffic policy.
trait Part {
    fn check(&self, check: &mut Check);
}

impl<T: Validate> Part for T {
    fn check(&self, check: &mut Check) {
        self.validate(check);
    }
}

impl Validate for LoadBalancerSettings {
    fn validate(&self, check: &mut Check) {
        let given = [
            self.simple.is_some(),
            self.consistent_hash.is_some(),
            self.backend_utilization.is_some(),
        ];
        if given.iter().filter(|given| **given).count() > 1 {
            check.error("simple, consistentHash and backendUtilization exclude each other");
        }
        check.part("consistentHash", &self.consistent_hash);
        check.part("localityLbSetting", &self.locality_lb_setting);
        if let Some(zone) = &self.zone_aware_lb_setting {
            check.require(
                self.locality_lb_setting.is_none(),
                "zoneAwareLbSetting",
                "localityLbSetting and zoneAwareLbSetting exclude each other",
            );
            check.require(
                zone.min_cluster_size != Some(0),
                "zoneAwareLbSetting.minClusterSize",
                "at least 1",
            );
            check.at("zoneAwareLbSetting", |check| {
                failovers(&zone.failover, check)
            });
        }
        if let Some(warmup) = &self.warmup {
            check.require(
                warmup.duration.is_some(),
                "warmup.duration",
                "a duration is needed",
            );
            duration(warmup.duration, "warmup.duration", check);
            percentage(warmup.minimum_percent, "warmup.minimumPercent", check);
            check.require(
                warmup.aggression.is_none_or(|aggression| aggression >= 1.0),
                "warmup.aggression",
                "at least 1",
            );
        }
        if self.warmup_duration_secs.is_some() {
            check.warn_at("warmupDurationSecs", "old form; write warmup.duration");
        }
    }
}

impl Validate for ConsistentHashLb {
    fn validate(&self, check: &mut Check) {
        let keys = [
            self.http_header_name.is_some(),
            self.http_cookie.is_some(),
            self.use_source_ip,
            self.http_query_parameter_name.is_some(),
        ];
        if keys.iter().filter(|given| **given).count() != 1 {
            check.error("exactly one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName is needed");
        }
        if let Some(cookie) = &self.http_cookie {
            check.require(
                !cookie.name.is_empty(),
                "httpCookie.name",
                "a cookie needs a name",
            );
        }
        if self.minimum_ring_size != 0 {
            check.warn_at(
                "minimumRingSize",
                "old form; write ringHash.minimumRingSize",
            );
        }
        let rings = self.ring_hash.is_some() || self.maglev.is_some();
        check.require(
            self.minimum_ring_size == 0 || !rings,
            "minimumRingSize",
            "the old form and ringHash or maglev exclude each other",
        );
        check.require(
            self.ring_hash.is_none() || self.maglev.is_none(),
            "maglev",
            "ringHash and maglev exclude each other",
        );
        if let Some(maglev) = &self.maglev {
            let size = maglev.table_size;
            check.require(
                size < 5_000_011 && is_prime(size),
                "maglev.tableSize",
                "a prime below 5000011 is needed",
            );
        }
    }
}

fn is_prime(number: u64) -> bool {
    number >= 2
        && (2..)
            .take_while(|divisor| divisor * divisor <= number)
            .all(|divisor| !number.is_multiple_of(divisor))
}

impl Validate for LocalityLbSetting {
    fn validate(&self, check: &mut Check) {
        check.require(
            self.distribute.is_empty() || self.failover.is_empty(),
            "failover",
            "distribute and failover exclude each other",
        );
        check.each("distribute", &self.distribute, |check, entry| {
            check.at("from", |check| locality(&entry.from, check));
            let names: Vec<&String> = entry.to.keys().collect();
            for (index, name) in names.iter().enumerate() {
                check.at(&format!("to[{name}]"), |check| {
                    locality(name, check);
                    if let Some(other) = names[..index].iter().find(|other| overlap(other, name)) {
                        check.error(format!("overlaps with {other:?}; keep one of them"));
                    }
                });
            }
            let right = entry.to.values().all(|weight| (1..=100).contains(weight))
                && entry
                    .to
                    .values()
                    .map(|weight| u64::from(*weight))
                    .sum::<u64>()
                    == 100;
            check.require(
                right,
                "to",
                "weights are numbers from 1 to 100 that add up to 100",
            );
        });
        for (index, entry) in self.distribute.iter().enumerate() {
            let earlier = self.distribute[..index].iter();
            if let Some(other) = earlier
                .map(|other| &other.from)
                .find(|other| overlap(other, &entry.from))
            {
                check.error_at(
                    &format!("distribute[{index}].from"),
                    format!("overlaps with {other:?}; keep one of them"),
                );
            }
        }
        failovers(&self.failover, check);
    }
}

/// True if one of two localities, which may end in `*` or leave parts out, contains the other.
fn overlap(a: &str, b: &str) -> bool {
    let mut pairs = a.split('/').zip(b.split('/'));
    pairs.all(|(a, b)| a == b || a == "*" || b == "*")
}

fn locality(name: &str, check: &mut Check) {
    let parts: Vec<&str> = name.split('/').collect();
    let star = parts.iter().position(|part| part.contains('*'));
    let right = parts.len() <= 3
        && parts.iter().all(|part| !part.is_empty())
        && star.is_none_or(|at| at + 1 == parts.len() && parts[at] == "*");
    if !right {
        check.error(format!("{name:?} is not region, region/zone or region/zone/subzone, with '*' at most as the last part"));
    }
}

fn failovers(list: &[Failover], check: &mut Check) {
    check.each("failover", list, |check, entry| {
        if entry.from == entry.to {
            check.error(format!("{:?} can't fail over to itself", entry.from));
        }
        for (field, region) in [("from", &entry.from), ("to", &entry.to)] {
            check.require(
                !region.is_empty() && !region.contains(['/', '*']),
                field,
                "a region is needed, without zone and wildcard",
            );
        }
    });
}

impl Validate for ConnectionPoolSettings {
    fn validate(&self, check: &mut Check) {
        if self.tcp.is_none() && self.http.is_none() {
            check.error("tcp or http is needed");
        }
        if let Some(tcp) = &self.tcp {
            check.at("tcp", |check| {
                check.require(
                    tcp.max_connections >= 0,
                    "maxConnections",
                    "can't be negative",
                );
                duration(tcp.connect_timeout, "connectTimeout", check);
                duration(tcp.max_connection_duration, "maxConnectionDuration", check);
                if tcp.idle_timeout.is_some_and(|idle| !idle.is_zero()) {
                    duration(tcp.idle_timeout, "idleTimeout", check);
                }
                if let Some(keepalive) = &tcp.tcp_keepalive {
                    duration(keepalive.time, "tcpKeepalive.time", check);
                    duration(keepalive.interval, "tcpKeepalive.interval", check);
                }
            });
        }
        if let Some(http) = &self.http {
            check.at("http", |check| {
                for (field, value) in [
                    ("http1MaxPendingRequests", http.http1_max_pending_requests),
                    ("http2MaxRequests", http.http2_max_requests),
                    ("maxRequestsPerConnection", http.max_requests_per_connection),
                    ("maxRetries", http.max_retries),
                    ("maxConcurrentStreams", http.max_concurrent_streams),
                ] {
                    check.require(value >= 0, field, "can't be negative");
                }
                duration(http.idle_timeout, "idleTimeout", check);
                let both =
                    http.use_client_protocol && http.h2_upgrade_policy == H2UpgradePolicy::Upgrade;
                check.require(
                    !both,
                    "useClientProtocol",
                    "useClientProtocol and h2UpgradePolicy UPGRADE exclude each other",
                );
                if let Some(keepalive) = &http.http2_keep_alive {
                    check.require(
                        keepalive.interval.is_some(),
                        "http2KeepAlive.interval",
                        "interval and timeout are needed",
                    );
                    check.require(
                        keepalive.timeout.is_some(),
                        "http2KeepAlive.timeout",
                        "interval and timeout are needed",
                    );
                    duration(keepalive.interval, "http2KeepAlive.interval", check);
                    duration(keepalive.timeout, "http2KeepAlive.timeout", check);
                }
            });
        }
    }
}

impl Validate for OutlierDetection {
    fn validate(&self, check: &mut Check) {
        duration(self.interval, "interval", check);
        duration(self.base_ejection_time, "baseEjectionTime", check);
        check.require(
            (0..=100).contains(&self.max_ejection_percent),
            "maxEjectionPercent",
            "a share is a number from 0 to 100",
        );
        check.require(
            (0..=100).contains(&self.min_health_percent),
            "minHealthPercent",
            "a share is a number from 0 to 100",
        );
        let apart = self.split_external_local_origin_errors
            || self.consecutive_local_origin_failures.unwrap_or(0) == 0;
        check.require(
            apart,
            "consecutiveLocalOriginFailures",
            "failures to connect are counted apart only with splitExternalLocalOriginErrors",
        );
        let codes = self
            .outlier_detection_http_error_codes
            .iter()
            .all(|code| (100..=599).contains(code));
        check.require(
            codes,
            "outlierDetectionHttpErrorCodes",
            "a status code is a number from 100 to 599",
        );
        if self.consecutive_errors != 0 {
            check.warn_at(
                "consecutiveErrors",
                "old form; write consecutive5xxErrors or consecutiveGatewayErrors",
            );
        }
    }
}

impl Validate for ClientTlsSettings {
    fn validate(&self, check: &mut Check) {
        let pair = !self.client_certificate.is_empty() && !self.private_key.is_empty();
        match self.mode {
            ClientTlsMode::Mutual if !self.credential_name.is_empty() => {
                let files = !self.client_certificate.is_empty()
                    || !self.private_key.is_empty()
                    || !self.ca_certificates.is_empty();
                check.require(
                    !files,
                    "credentialName",
                    "a secret and files exclude each other",
                );
            }
            ClientTlsMode::Mutual => check.require(
                pair,
                "clientCertificate",
                "MUTUAL needs clientCertificate and privateKey, or credentialName",
            ),
            _ => {}
        }
        if self.credential_name.starts_with("configmap://") {
            check.error_at(
                "credentialName",
                "a ConfigMap can't be used here by this version of mesh; name a Secret (its key ca.crt has the roots)",
            );
        }
        if self.insecure_skip_verify == Some(true) {
            check.require(
                self.ca_certificates.is_empty(),
                "caCertificates",
                "insecureSkipVerify checks nothing, so roots have no meaning",
            );
            check.require(
                self.subject_alt_names.is_empty(),
                "subjectAltNames",
                "insecureSkipVerify checks nothing, so names have no meaning",
            );
        }
    }
}

/// Checks a duration: at least a millisecond, whole milliseconds.
pub(super) fn duration(value: Option<Duration>, field: &str, check: &mut Check) {
    let right =
        value.is_none_or(|value| value.is_whole_millis() && value >= Duration::from_millis(1));
    check.require(
        right,
        field,
        "a duration of at least 1ms, in whole milliseconds, is needed",
    );
}

fn percentage(value: Option<f64>, field: &str, check: &mut Check) {
    check.require(
        value.is_none_or(|value| (0.0..=100.0).contains(&value)),
        field,
        "a share is a number from 0 to 100",
    );
}
