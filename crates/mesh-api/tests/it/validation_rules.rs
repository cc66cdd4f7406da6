//! The rest of Istio's validation rules, a row for each that has no row in `validation.rs`: a specification, and the field and words of what it
//! has to give. An empty field means no finding of that severity.

mod extensions;
mod security;
mod traffic;

use mesh_api::{Severity, parse, validate};
use serde_json::json;

use crate::validation::table;

const ERROR: Severity = Severity::Error;
const WARNING: Severity = Severity::Warning;

/// A rule with one HTTP route.
fn http(route: &str) -> String {
    format!("{{hosts: [a], http: [{route}]}}")
}

fn long(unit: &str, count: usize) -> String {
    unit.repeat(count)
}

fn rows(kind: &str, severity: Severity, rows: &[(String, &str, &str)]) {
    let rows: Vec<(&str, &str, &str)> = rows
        .iter()
        .map(|(spec, field, words)| (spec.as_str(), *field, *words))
        .collect();
    table(kind, severity, &rows);
}

#[test]
fn names_and_visibility() {
    let hosts = |host: &str| format!("{{hosts: [{host}], http: []}}");
    let label = long("a", 64);
    let name = vec![long("a", 60); 5].join(".");
    rows(
        "VirtualService",
        ERROR,
        &[
            (hosts(&label), "spec.hosts[0]", "at most 63"),
            (hosts(&name), "spec.hosts[0]", "not a host name"),
            (hosts("'*a.b'"), "spec.hosts[0]", "wildcard inside"),
            (hosts("''"), "spec.hosts[0]", "empty"),
            (
                "{hosts: [a], exportTo: [b, b]}".into(),
                "spec.exportTo[1]",
                "twice",
            ),
            (
                "{hosts: [a], exportTo: [A_b]}".into(),
                "spec.exportTo[0]",
                "nor a namespace",
            ),
            (
                "{hosts: [a], exportTo: ['~']}".into(),
                "spec.exportTo[0]",
                "nor a namespace",
            ),
        ],
    );
    let entry = |export: &str| format!("{{hosts: [a.b], exportTo: [{export}]}}");
    rows(
        "ServiceEntry",
        ERROR,
        &[
            (entry("'~'"), "", ""),
            (entry("'~', a"), "spec.exportTo", "alone"),
        ],
    );
    rows(
        "DestinationRule",
        ERROR,
        &[(
            "{host: a, workloadSelector: {matchLabels: {a: 'b*'}}}".into(),
            "spec.workloadSelector.matchLabels",
            "wildcards",
        )],
    );
}

#[test]
fn a_policy_is_tried_out_only_where_it_can_be() {
    let fields = |action: &str, value: &str| -> Vec<String> {
        let raw = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": { "name": "a", "annotations": { "istio.io/dry-run": value } },
            "spec": { "action": action, "rules": [{}] },
        });
        let found = validate(&parse(&raw).expect("parsed"));
        found.into_iter().map(|finding| finding.field).collect()
    };
    let refused = ["metadata.annotations[istio.io/dry-run]".to_owned()];
    assert!(fields("ALLOW", "true").is_empty());
    assert!(fields("DENY", "F").is_empty());
    assert_eq!(fields("DENY", "yes"), refused);
    assert_eq!(fields("AUDIT", "true"), refused);
}

/// What is not even of the right form is told in the words of YAML, with the place.
#[test]
fn wrong_types_are_told_in_plain_words() {
    for (kind, spec, message) in [
        (
            "VirtualService",
            json!({ "hosts": "a" }),
            "spec.hosts: the text \"a\" is given; expected a list",
        ),
        (
            "VirtualService",
            json!({ "http": [{ "timeout": -1 }] }),
            "spec.http[0].timeout: the number -1 is given; expected a text",
        ),
        (
            "VirtualService",
            json!({ "http": [{ "match": [{ "uri": "/" }] }] }),
            "spec.http[0].match[0].uri: the text \"/\" is given; expected an object with fields",
        ),
        (
            "VirtualService",
            json!({ "http": [{ "route": [{ "weight": 1.5 }] }] }),
            "spec.http[0].route[0].weight: the number 1.5 is given; expected a whole number",
        ),
        (
            "Gateway",
            json!({ "servers": [{ "port": { "number": "80" } }] }),
            "spec.servers[0].port.number: the text \"80\" is given; expected a whole number from 0",
        ),
        (
            "Gateway",
            json!({ "servers": [{ "port": { "number": -80 } }] }),
            "spec.servers[0].port.number: the number -80 is given; expected a whole number from 0",
        ),
        (
            "Gateway",
            json!({ "servers": [{ "tls": { "httpsRedirect": "yes" } }] }),
            "spec.servers[0].tls.httpsRedirect: the text \"yes\" is given; expected true or false",
        ),
        (
            "DestinationRule",
            json!({ "trafficPolicy": { "portLevelSettings": [{ "port": 80 }] } }),
            "spec.trafficPolicy.portLevelSettings[0].port: the number 80 is given; expected an object with fields",
        ),
        (
            "PeerAuthentication",
            json!({ "mtls": { "mode": "strict" } }),
            "spec.mtls.mode: unknown value `strict`; expected one of `UNSET`, `DISABLE`, `PERMISSIVE`, `STRICT`",
        ),
        (
            "Telemetry",
            json!({ "tracing": {} }),
            "spec.tracing: an object is given; expected a list",
        ),
    ] {
        let info = mesh_api::KINDS
            .iter()
            .find(|info| info.kind == kind)
            .expect("a kind");
        let raw = json!({
            "apiVersion": format!("{}/{}", info.group, info.versions[0].name), "kind": kind, "metadata": { "name": "a" }, "spec": spec,
        });
        let error = parse(&raw).expect_err("a wrong type");
        assert_eq!(error.to_string(), message);
    }
}
