//! What counts as the same.

use std::collections::BTreeSet;

use super::Run;
use super::case::Case;
use super::client::Facts;
use super::known::Difference;
use super::proxies::Tally;
use super::upstream::{ID, SCRIPT};

/// Adds what differs between the two runs of a case.
pub(super) fn compare(case: &Case, envoy: &Run, mesh: &Run, into: &mut Vec<Difference>) {
    for ((request, a), (_, b)) in envoy.requests.iter().zip(&mesh.requests) {
        let (a, b) = (normal(a), normal(b));
        let fields: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        let differs = |field: &str| a.get(field) != b.get(field);
        for field in fields {
            // What follows from another difference says nothing of its own.
            let follows = (differs("status") && field.starts_with("response."))
                || (differs("upstream.count")
                    && field.starts_with("upstream.")
                    && field != "upstream.count");
            let of = |facts: &Facts| facts.get(field).cloned();
            let (left, right) = (of(&a), of(&b));
            if !follows && !same(field, left.as_deref(), right.as_deref(), &a) {
                into.push(Difference {
                    case: case.name.clone(),
                    request: request.clone(),
                    field: field.clone(),
                    envoy: left.unwrap_or_else(absent),
                    mesh: right.unwrap_or_else(absent),
                });
            }
        }
    }
    let ends = |tally: &Tally| {
        let parts: Vec<_> = tally
            .iter()
            .map(|(end, count)| format!("{count} x {end}"))
            .collect();
        parts.join(", ")
    };
    // Where shares are compared, so much chance is in the ends as well.
    let chance = case.requests.iter().any(|r| r.full().shares);
    if !chance && envoy.tally != mesh.tally {
        into.push(Difference {
            case: case.name.clone(),
            request: "(how the case's requests ended: status and response flags)".to_owned(),
            field: "flags".to_owned(),
            envoy: ends(&envoy.tally),
            mesh: ends(&mesh.tally),
        });
    }
}

/// How a fact that one of the two lacks is shown.
fn absent() -> String {
    "(none)".to_owned()
}

fn same(field: &str, a: Option<&str>, b: Option<&str>, facts: &Facts) -> bool {
    let number = |text: &str| text.parse::<f64>().unwrap_or_default();
    let (x, y) = (a.map_or(0.0, number), b.map_or(0.0, number));
    if field == "millis" {
        return (x - y).abs() <= 100.0 + x.max(y) * 0.2;
    }
    if field.starts_with("share.") {
        let shares = facts.iter().filter(|(name, _)| name.starts_with("share."));
        let total: f64 = shares.map(|(_, value)| number(value)).sum();
        let p = (x + y) / (2.0 * total.max(1.0));
        // Five standard deviations of the difference of two draws.
        return (x - y).abs() <= 5.0 * (2.0 * total * p * (1.0 - p)).sqrt() + 1.0;
    }
    a == b
}

/// Counts an answer among its likes.
pub(super) fn count_share(shares: &mut Facts, facts: &Facts) {
    let of = |name: &str| facts.get(name).map_or("", String::as_str);
    let outcome = ["status", "error", "answer"].map(of).concat();
    let key = format!("share.{outcome}.{}", of("upstream.0.endpoint"));
    let count = shares
        .get(&key)
        .and_then(|n| n.parse::<u32>().ok())
        .unwrap_or(0)
        + 1;
    shares.insert(key, count.to_string());
}

/// What came in between.
pub(super) fn grown(before: &Tally, after: &Tally) -> Tally {
    after
        .iter()
        .map(|(end, count)| (end.clone(), count - before.get(end).copied().unwrap_or(0)))
        .filter(|(_, count)| *count != 0)
        .collect()
}

/// The facts without what must differ: the harness's own headers, dates, durations, random ids.
fn normal(facts: &Facts) -> Facts {
    let mut normal = Facts::new();
    for (field, value) in facts {
        let name = field.rsplit_once("header.").map_or("", |(_, name)| name);
        if name == ID || name == SCRIPT {
            continue;
        }
        let value = match name {
            "date" => "a date",
            "x-envoy-upstream-service-time" => "milliseconds",
            "x-request-id" if value.len() == 36 => "a random id",
            // What is left of the route's timeout when a request is tried again.
            "x-envoy-expected-rq-timeout-ms" if !field.starts_with("upstream.0.") => "milliseconds",
            _ => value,
        };
        normal.insert(field.clone(), value.to_owned());
    }
    normal
}
