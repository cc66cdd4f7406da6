//! Statistics of filters under Envoy's names. A name is looked up once for each compiled filter; counting is an addition.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A statistic.
pub type Counter = Arc<AtomicU64>;

/// All statistics of filters. They outlive the configuration that asked for them, so that they never go back.
#[derive(Debug, Default)]
pub struct Stats(Mutex<BTreeMap<String, Counter>>);

impl Stats {
    /// The statistic of this name.
    pub fn counter(&self, name: String) -> Counter {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(name).or_default().clone()
    }

    /// All of them with their values.
    pub fn values(&self) -> Vec<(String, u64)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let value = |(name, counter): (&String, &Counter)| (name.clone(), get(counter));
        all.iter().map(value).collect()
    }
}

/// Appends statistics in Prometheus' text format, under the names that Envoy gives them there: those of `/stats` behind `envoy_`, and what
/// access control found as labels (Istio's bootstrap: the tags `authz_enforce_result`, `authz_dry_run_action` and `authz_dry_run_result`).
pub fn expose(values: &[(String, u64)], text: &mut String) {
    let mut families: BTreeMap<String, Vec<(String, u64)>> = BTreeMap::new();
    for (name, value) in values {
        let (name, labels) = with_labels(name);
        families.entry(name).or_default().push((labels, *value));
    }
    for (name, samples) in &families {
        for (labels, value) in samples {
            // Without a type: these names have not the ending that OpenMetrics asks of counters. Writing to a String cannot fail.
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    }
}

/// The name in Prometheus and its labels.
fn with_labels(name: &str) -> (String, String) {
    let mut labels = Vec::new();
    let mut rest = name;
    for result in ["allowed", "denied"] {
        if let Some(before) = name.strip_suffix(&format!(".shadow_{result}")) {
            rest = before;
            labels.push(format!("authz_dry_run_result=\"{result}\""));
        } else if let Some(before) = name.strip_suffix(result)
            && before.ends_with("rbac.")
        {
            rest = before.trim_end_matches('.');
            labels.push(format!("authz_enforce_result=\"{result}\""));
        }
    }
    let mut rest = rest.to_owned();
    for action in ["allow", "deny"] {
        let part = format!(".istio_dry_run_{action}_");
        if let Some(at) = rest.find(&part) {
            rest.replace_range(at..at + part.len(), "");
            labels.insert(0, format!("authz_dry_run_action=\"{action}\""));
        }
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let name = format!("envoy_{}", rest.chars().map(plain).collect::<String>());
    match labels.is_empty() {
        true => (name, String::new()),
        false => (name, format!("{{{}}}", labels.join(","))),
    }
}

/// One more.
pub fn inc(counter: &Counter) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn get(counter: &Counter) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_access_control_found_are_labels() {
        let at = "http.inbound_0.0.0.0_80.rbac";
        let names = [
            "istio_dry_run_deny_.shadow_denied",
            "istio_dry_run_allow_.shadow_allowed",
            "istio_dry_run_allow_.shadow_denied",
            "allowed",
            "shadow_denied",
            "policy.ns[a]-policy[b]-rule[0].allowed",
        ];
        let mut values: Vec<_> = (1..)
            .zip(names)
            .map(|(value, name)| (format!("{at}.{name}"), value))
            .collect();
        values.push(("http.inbound_0.0.0.0_80.jwt_authn.denied".to_owned(), 7));
        let mut text = String::new();
        expose(&values, &mut text);
        let lines: Vec<_> = text.lines().collect();
        let rbac = "envoy_http_inbound_0_0_0_0_80_rbac";
        assert_eq!(
            lines,
            [
                "envoy_http_inbound_0_0_0_0_80_jwt_authn_denied 7".to_owned(),
                format!(
                    "{rbac}{{authz_dry_run_action=\"deny\",authz_dry_run_result=\"denied\"}} 1"
                ),
                format!(
                    "{rbac}{{authz_dry_run_action=\"allow\",authz_dry_run_result=\"allowed\"}} 2"
                ),
                format!(
                    "{rbac}{{authz_dry_run_action=\"allow\",authz_dry_run_result=\"denied\"}} 3"
                ),
                format!("{rbac}{{authz_enforce_result=\"allowed\"}} 4"),
                format!("{rbac}{{authz_dry_run_result=\"denied\"}} 5"),
                format!("{rbac}_policy_ns_a__policy_b__rule_0__allowed 6"),
            ]
        );
    }
}
