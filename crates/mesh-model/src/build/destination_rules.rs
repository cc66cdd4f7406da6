//! DestinationRules, merged per namespace and host.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::networking::destination_rule::DestinationRule as Spec;
use mesh_api::{AnyObject, Object};

use super::created;
use crate::problem::Reporter;
use crate::rules::{DestinationRule, Subset};
use crate::{Mesh, ObjectKey, Objects, Problem, Severity, Visibility, hostname};

mod policy;

/// By namespace, then by host. Rules of one host that don't merge stand beside each other, oldest first.
type Rules = BTreeMap<String, BTreeMap<String, Vec<Arc<DestinationRule>>>>;

pub(crate) fn build(objects: &Objects, mesh: &Mesh, problems: &mut Vec<Problem>) -> Rules {
    let mut sorted: Vec<(&ObjectKey, &Object<Spec>)> = Vec::new();
    for (key, object) in &objects.istio {
        if let AnyObject::DestinationRule(object) = object.as_ref() {
            sorted.push((key, object));
        }
    }
    sorted.sort_by_key(|(key, object)| (created(&object.meta), *key));
    let mut merged: BTreeMap<String, BTreeMap<String, Vec<DestinationRule>>> = BTreeMap::new();
    for (key, object) in sorted {
        let mut report = Reporter::new(key, problems);
        let rule = rule(key, &object.spec, mesh, &mut report);
        let of_namespace = merged.entry(key.namespace.clone()).or_default();
        let of_host = of_namespace.entry(rule.host.clone()).or_default();
        if add_to(of_host, &rule, &mut report) {
            of_host.push(rule);
        }
    }
    let share = |rules: BTreeMap<String, Vec<DestinationRule>>| {
        rules
            .into_iter()
            .map(|(host, rules)| (host, rules.into_iter().map(Arc::new).collect()))
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
        let policy = subset.traffic_policy.as_ref();
        let policy =
            policy.map(|policy| policy::applied(policy, &format!("{field}.trafficPolicy"), report));
        let labels = subset.labels.clone();
        subsets.insert(subset.name.clone(), Subset { labels, policy });
    }
    let policy = spec.traffic_policy.as_ref();
    let selector = spec.workload_selector.as_ref();
    DestinationRule {
        keys: vec![key.clone()],
        host: hostname::absolute(&spec.host, &key.namespace, &mesh.domain),
        visibility: Visibility::parse(
            exported,
            &mesh.config.default_destination_rule_export_to,
            &key.namespace,
        ),
        selector: selector.map(|selector| selector.match_labels.clone()),
        policy: policy.map(|policy| policy::applied(policy, "spec.trafficPolicy", report)),
        subsets,
    }
}

/// Merges a rule into the older ones of its host, by Istio's conditions: the new one is seen by the same namespaces or more, and selectors, where
/// both have one, are equal. True if the rule has to stand beside them too.
fn add_to(
    older: &mut [DestinationRule],
    rule: &DestinationRule,
    report: &mut Reporter<'_>,
) -> bool {
    let mut separate = true;
    for first in older {
        let other_clients =
            first.selector.is_some() && rule.selector.is_some() && first.selector != rule.selector;
        if other_clients || !rule.visibility.covers(&first.visibility) {
            continue;
        }
        merge(first, rule, report);
        // Where one is for some clients only, these get what both say, and the others what is for everyone.
        if rule.visibility == first.visibility && rule.selector == first.selector {
            separate = false;
        }
    }
    separate
}

/// Istio's rule: subsets add up (the first of a name counts), the first trafficPolicy wins.
fn merge(first: &mut DestinationRule, second: &DestinationRule, report: &mut Reporter<'_>) {
    // What a rule for some clients only adds or leaves out is no contradiction.
    let same_clients = first.selector == second.selector;
    for (name, subset) in &second.subsets {
        if !first.subsets.contains_key(name) {
            first.subsets.insert(name.clone(), subset.clone());
        } else if same_clients {
            let message = format!(
                "subset {name:?} exists already in {}, which is older; that one counts",
                first.keys[0]
            );
            report.report(Severity::Error, Some("IST0106"), "spec.subsets", message);
        }
    }
    if first.policy.is_none() {
        first.policy.clone_from(&second.policy);
    } else if second.policy.is_some() && same_clients {
        let message = format!(
            "{} is for the same host and older; its trafficPolicy counts, this one has no effect",
            first.keys[0]
        );
        report.report(Severity::Warning, None, "spec.trafficPolicy", message);
    }
    first.keys.extend(second.keys.iter().cloned());
}
