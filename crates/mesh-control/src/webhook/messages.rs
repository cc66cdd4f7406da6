//! What people are told of objects that are refused: where, what is wrong, and what would be right.

use serde_json::{Value, json};

use super::judge;

fn refusal(kind: &str, spec: Value) -> String {
    let info = mesh_api::KINDS
        .iter()
        .find(|info| info.kind == kind)
        .expect("a kind");
    let object = json!({
        "apiVersion": format!("{}/{}", info.group, info.versions[0].name), "kind": kind,
        "metadata": { "name": "a", "namespace": "b" }, "spec": spec,
    });
    let review = judge(&object).review("1");
    assert_eq!(review["response"]["allowed"], false, "{object}");
    let message = &review["response"]["status"]["message"];
    let message = message.as_str().expect("a message");
    let rest = message.strip_prefix("configuration is invalid: ");
    rest.expect("the usual beginning").to_owned()
}

#[test]
fn refusals_are_readable() {
    let http = |route: Value| json!({ "hosts": ["a"], "http": [route] });
    let to = json!([{ "destination": { "host": "a" } }]);
    let patch = |apply_to: &str, value: Value| json!({ "configPatches": [{ "applyTo": apply_to, "patch": { "operation": "MERGE", "value": value } }] });
    for (kind, spec) in [
        ("VirtualService", http(json!({ "rout": [] }))),
        (
            "VirtualService",
            http(json!({ "route": to, "timeout": "soon" })),
        ),
        (
            "VirtualService",
            http(json!({ "route": to, "timeout": -1 })),
        ),
        (
            "VirtualService",
            http(json!({ "match": [{ "uri": { "exact": "/", "prefix": "/" } }], "route": to })),
        ),
        (
            "VirtualService",
            http(json!({ "match": [{ "uri": "/" }], "route": to })),
        ),
        (
            "VirtualService",
            http(json!({ "match": [{ "uri": { "regex": "(a" } }], "route": to })),
        ),
        (
            "VirtualService",
            http(json!({ "route": { "destination": {} } })),
        ),
        ("VirtualService", json!({ "hosts": "a" })),
        ("VirtualService", json!([])),
        (
            "DestinationRule",
            json!({ "host": "a", "trafficPolicy": { "loadBalancer": { "simple": "ROUND" } } }),
        ),
        (
            "DestinationRule",
            json!({ "host": "a", "trafficPolicy": { "connectionPool": { "tcp": { "maxConnections": "many" } } } }),
        ),
        (
            "DestinationRule",
            json!({ "host": "a", "trafficPolicy": { "portLevelSettings": [{ "port": 80 }] } }),
        ),
        (
            "Gateway",
            json!({ "servers": [{ "port": { "number": 70000, "name": "a", "protocol": "HTTP" }, "hosts": ["*"] }] }),
        ),
        (
            "Gateway",
            json!({ "servers": [{ "port": { "number": "80", "name": "a", "protocol": "HTTP" }, "hosts": ["*"] }] }),
        ),
        (
            "ServiceEntry",
            json!({ "hosts": ["a.b"], "resolution": "DNSS" }),
        ),
        ("Sidecar", json!({ "egress": [{ "hosts": ["a"] }] })),
        ("AuthorizationPolicy", json!({ "action": "REFUSE" })),
        (
            "AuthorizationPolicy",
            json!({ "rules": [{ "to": [{ "operation": { "ports": [80] } }] }] }),
        ),
        (
            "PeerAuthentication",
            json!({ "mtls": { "mode": "strict" } }),
        ),
        (
            "RequestAuthentication",
            json!({ "jwtRules": [{ "issuer": "a", "jwks": "x" }] }),
        ),
        ("Telemetry", json!({ "tracing": {} })),
        (
            "EnvoyFilter",
            patch("CLUSTER", json!({ "conect_timeout": "3s" })),
        ),
        (
            "EnvoyFilter",
            patch(
                "HTTP_FILTER",
                json!({ "name": "f", "typed_config": { "@type": "type.googleapis.com/foo.Bar" } }),
            ),
        ),
        ("EnvoyFilter", patch("CLUSTER", json!("text"))),
        ("EnvoyFilter", patch("CLUSTERS", json!({}))),
    ] {
        let message = refusal(kind, spec);
        let place = message.split(':').next().unwrap_or_default();
        assert!(place.starts_with("spec"), "no place: {message}");
        let garbled = ["\n", "line 0", "column", "Option", "struct ", "variant "];
        let garbled = garbled.iter().find(|word| message.contains(**word));
        assert_eq!(garbled, None, "{kind}: {message}");
        println!("{kind}: {message}");
    }
}

/// Whoever applies it reads so at once, and not only later in the object's status.
#[test]
fn an_object_without_effect_is_taken_with_a_warning() {
    let entry = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": { "name": "a", "namespace": "b" },
        "spec": { "hosts": ["example.com"], "ports": [{ "number": 80, "name": "http" }], "resolution": "DNS" },
    });
    let response = &judge(&entry).review("1")["response"];
    assert_eq!(response["allowed"], true, "{response}");
    let expected = "ServiceEntry is stored but not applied yet by this version of mesh";
    assert_eq!(response["warnings"], json!([expected]));
}
