//! DestinationRules, merged per namespace and host.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::networking::destination_rule::{
    ClientTlsSettings, ConnectionPoolSettings, DestinationRule as Spec, LoadBalancerSettings,
    OutlierDetection, PortTrafficPolicy, SimpleLb, TrafficPolicy,
};
use mesh_api::{AnyObject, Object};

use super::created;
use crate::problem::Reporter;
use crate::rules::{DestinationRule, PortPolicy, Subset};
use crate::{Mesh, ObjectKey, Objects, Problem, Severity, Visibility, hostname};

type Rules = BTreeMap<String, BTreeMap<String, Arc<DestinationRule>>>;

pub(crate) fn build(objects: &Objects, mesh: &Mesh, problems: &mut Vec<Problem>) -> Rules {
    let mut sorted: Vec<(&ObjectKey, &Object<Spec>)> = Vec::new();
    for (key, object) in &objects.istio {
        if let AnyObject::DestinationRule(object) = object.as_ref() {
            sorted.push((key, object));
        }
    }
    sorted.sort_by_key(|(key, object)| (created(&object.meta), *key));
    let mut merged: BTreeMap<String, BTreeMap<String, DestinationRule>> = BTreeMap::new();
    for (key, object) in sorted {
        let mut report = Reporter::new(key, problems);
        if object.spec.workload_selector.is_some() {
            let message = "rules for some clients only are not applied yet by this version of mesh; this rule has no effect";
            report.report(Severity::Warning, None, "spec.workloadSelector", message);
            continue;
        }
        let rule = rule(key, &object.spec, mesh, &mut report);
        let of_namespace = merged.entry(key.namespace.clone()).or_default();
        match of_namespace.get_mut(&rule.host) {
            Some(first) => merge(first, rule, &object.spec, &mut report),
            None => {
                of_namespace.insert(rule.host.clone(), rule);
            }
        }
    }
    let share = |rules: BTreeMap<String, DestinationRule>| {
        rules
            .into_iter()
            .map(|(host, rule)| (host, Arc::new(rule)))
            .collect()
    };
    merged
        .into_iter()
        .map(|(namespace, rules)| (namespace, share(rules)))
        .collect()
}

fn rule(key: &ObjectKey, spec: &Spec, mesh: &Mesh, report: &mut Reporter<'_>) -> DestinationRule {
    let exported = spec.export_to.iter().map(String::as_str);
    let mut subsets = BTreeMap::new();
    for (index, subset) in spec.subsets.iter().enumerate() {
        let field = format!("spec.subsets[{index}]");
        let policy = policy(
            subset.traffic_policy.as_ref(),
            &format!("{field}.trafficPolicy"),
            report,
        );
        if subsets.contains_key(&subset.name) {
            let message = format!(
                "subset {:?} exists already; the first one counts",
                subset.name
            );
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.name"),
                message,
            );
            continue;
        }
        subsets.insert(
            subset.name.clone(),
            Subset {
                labels: subset.labels.clone(),
                policy,
            },
        );
    }
    DestinationRule {
        keys: vec![key.clone()],
        host: hostname::absolute(&spec.host, &key.namespace, &mesh.domain),
        visibility: Visibility::parse(
            exported,
            &mesh.config.default_destination_rule_export_to,
            &key.namespace,
        ),
        policy: policy(spec.traffic_policy.as_ref(), "spec.trafficPolicy", report),
        subsets,
    }
}

/// Istio's rule: subsets add up (the first of a name counts), the first trafficPolicy wins.
fn merge(
    first: &mut DestinationRule,
    second: DestinationRule,
    spec: &Spec,
    report: &mut Reporter<'_>,
) {
    for (name, subset) in second.subsets {
        if first.subsets.contains_key(&name) {
            let message = format!(
                "subset {name:?} exists already in {}, which is older; that one counts",
                first.keys[0]
            );
            report.report(Severity::Error, Some("IST0106"), "spec.subsets", message);
            continue;
        }
        first.subsets.insert(name, subset);
    }
    if first.policy == PortPolicy::default() {
        first.policy = second.policy;
    } else if spec.traffic_policy.is_some() {
        let message = format!(
            "{} is for the same host and older; its trafficPolicy counts, this one has no effect",
            first.keys[0]
        );
        report.report(Severity::Warning, None, "spec.trafficPolicy", message);
    }
    first.keys.extend(second.keys);
}

fn policy(policy: Option<&TrafficPolicy>, field: &str, report: &mut Reporter<'_>) -> PortPolicy {
    let Some(policy) = policy else {
        return PortPolicy::default();
    };
    let parts = Parts {
        load_balancer: policy.load_balancer.as_ref(),
        connection_pool: policy.connection_pool.as_ref(),
        outlier_detection: policy.outlier_detection.as_ref(),
        tls: policy.tls.as_ref(),
    };
    let load_balancer = parts.read(field, report);
    for (name, given) in [
        ("tunnel", policy.tunnel.is_some()),
        ("proxyProtocol", policy.proxy_protocol.is_some()),
        ("retryBudget", policy.retry_budget.is_some()),
    ] {
        if given {
            report.not_applied(format!("{field}.{name}"));
        }
    }
    let mut ports = BTreeMap::new();
    for (index, settings) in policy.port_level_settings.iter().enumerate() {
        let field = format!("{field}.portLevelSettings[{index}]");
        let number = settings
            .port
            .as_ref()
            .and_then(|port| u16::try_from(port.number).ok())
            .filter(|number| *number != 0);
        let Some(number) = number else {
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.port"),
                "the settings name no port and have no effect",
            );
            continue;
        };
        ports.insert(number, Parts::of_port(settings).read(&field, report));
    }
    PortPolicy {
        load_balancer,
        ports,
    }
}

/// What policies of hosts and of ports have in common.
struct Parts<'a> {
    load_balancer: Option<&'a LoadBalancerSettings>,
    connection_pool: Option<&'a ConnectionPoolSettings>,
    outlier_detection: Option<&'a OutlierDetection>,
    tls: Option<&'a ClientTlsSettings>,
}

impl<'a> Parts<'a> {
    fn of_port(settings: &'a PortTrafficPolicy) -> Self {
        Self {
            load_balancer: settings.load_balancer.as_ref(),
            connection_pool: settings.connection_pool.as_ref(),
            outlier_detection: settings.outlier_detection.as_ref(),
            tls: settings.tls.as_ref(),
        }
    }

    fn read(&self, field: &str, report: &mut Reporter<'_>) -> Option<SimpleLb> {
        for (name, given) in [
            ("connectionPool", self.connection_pool.is_some()),
            ("outlierDetection", self.outlier_detection.is_some()),
            ("tls", self.tls.is_some()),
        ] {
            if given {
                report.not_applied(format!("{field}.{name}"));
            }
        }
        self.load_balancer
            .and_then(|settings| load_balancer(settings, &format!("{field}.loadBalancer"), report))
    }
}

fn load_balancer(
    settings: &LoadBalancerSettings,
    field: &str,
    report: &mut Reporter<'_>,
) -> Option<SimpleLb> {
    for (name, given) in [
        ("consistentHash", settings.consistent_hash.is_some()),
        ("backendUtilization", settings.backend_utilization.is_some()),
        ("localityLbSetting", settings.locality_lb_setting.is_some()),
        (
            "zoneAwareLbSetting",
            settings.zone_aware_lb_setting.is_some(),
        ),
        ("warmup", settings.warmup.is_some()),
        (
            "warmupDurationSecs",
            settings.warmup_duration_secs.is_some(),
        ),
    ] {
        if given {
            report.not_applied(format!("{field}.{name}"));
        }
    }
    if settings.simple == Some(SimpleLb::Passthrough) {
        report.not_applied(format!("{field}.simple"));
        return None;
    }
    settings.simple
}
