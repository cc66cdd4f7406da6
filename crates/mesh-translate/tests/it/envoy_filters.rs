//! Patches one by one: what each operation does where, and which conditions hold.

use mesh_model::Mesh;
use mesh_translate::{Resources, translate};
use serde_json::{Value, json};

use crate::case::{Case, by_type, item, to_json};

/// Resources of the Bookinfo sidecar with one EnvoyFilter.
fn patched(patches: &Value) -> Resources {
    let case = Case::named("bookinfo-sidecar");
    let mut objects = case.objects.clone();
    objects.upsert(item(&json!({
        "apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
        "metadata": { "name": "f", "namespace": "default" },
        "spec": { "configPatches": patches },
    })));
    let mesh = Mesh::build(&objects);
    assert!(mesh.problems().is_empty(), "{:?}", mesh.problems());
    translate(&mesh, &case.node)
}

fn resource(resources: &Resources, kind: &str, name: &str) -> Value {
    let found = by_type(resources)
        .into_iter()
        .find(|(of, _)| *of == kind)
        .and_then(|(_, table)| table.get(name));
    found.map_or(Value::Null, to_json)
}

/// Names of the HTTP filters of the outbound listener of port 9080.
fn filters(resources: &Resources) -> Vec<String> {
    let listener = resource(resources, "listeners", "0.0.0.0_9080");
    let manager = &listener["filter_chains"][0]["filters"][0]["typed_config"];
    let filters = manager["http_filters"].as_array().unwrap();
    filters
        .iter()
        .map(|filter| filter["name"].as_str().unwrap().to_owned())
        .collect()
}

fn http_filter(operation: &str, name: &str, sub_filter: &str) -> Value {
    json!({
        "applyTo": "HTTP_FILTER",
        "match": { "context": "SIDECAR_OUTBOUND", "listener": {
            "portNumber": 9080,
            "filterChain": { "filter": { "name": "envoy.filters.network.http_connection_manager", "subFilter": { "name": sub_filter } } },
        } },
        "patch": { "operation": operation, "value": { "name": name, "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
        } } },
    })
}

#[test]
fn http_filters_go_where_the_operation_says() {
    let before = filters(&patched(&json!([])));
    let [alpn, fault, cors, router] = [
        "istio.alpn",
        "envoy.filters.http.fault",
        "envoy.filters.http.cors",
        "envoy.filters.http.router",
    ];
    let all = vec![alpn, fault, cors, router];
    assert_eq!(before, all);
    let with = |index: usize| {
        let mut all = all.clone();
        all.insert(index, "new");
        all
    };
    for (operation, sub_filter, expected) in [
        ("ADD", "", with(3)),
        ("INSERT_FIRST", "", with(0)),
        ("INSERT_BEFORE", "", with(0)),
        ("INSERT_BEFORE", router, with(3)),
        ("INSERT_BEFORE", "absent", all.clone()),
        ("INSERT_AFTER", fault, with(2)),
        ("INSERT_AFTER", "", with(3)),
        ("REPLACE", cors, vec![alpn, fault, "new", router]),
        ("REPLACE", "", all.clone()),
        ("REMOVE", cors, vec![alpn, fault, router]),
        ("REMOVE", "", all.clone()),
    ] {
        let resources = patched(&json!([http_filter(operation, "new", sub_filter)]));
        assert_eq!(filters(&resources), expected, "{operation} {sub_filter}");
    }
}

#[test]
fn only_what_is_patched_changes_and_knows_by_whom() {
    let before = patched(&json!([]));
    let after = patched(&json!([http_filter("INSERT_FIRST", "new", "")]));
    assert_ne!(
        before.listeners["0.0.0.0_9080"],
        after.listeners["0.0.0.0_9080"]
    );
    let same = before
        .listeners
        .iter()
        .filter(|(name, resource)| after.listeners.get(*name) == Some(*resource));
    assert_eq!(same.count(), before.listeners.len() - 1);
    assert_eq!(before.clusters, after.clusters);
    let patched_by: Vec<_> = after
        .patched_by
        .iter()
        .map(|((_, name), objects)| (name.as_str(), objects.len()))
        .collect();
    assert_eq!(patched_by, [("0.0.0.0_9080", 1)]);
}

#[test]
fn configurations_of_one_type_merge_and_others_are_an_error() {
    let merge = |config: Value| {
        json!([{
            "applyTo": "HTTP_FILTER",
            "match": { "context": "SIDECAR_OUTBOUND", "listener": { "portNumber": 9080, "filterChain": { "filter": {
                "name": "envoy.filters.network.http_connection_manager", "subFilter": { "name": "envoy.filters.http.router" } } } } },
            "patch": { "operation": "MERGE", "value": { "name": "envoy.filters.http.router", "typed_config": config } },
        }])
    };
    let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    let resources = patched(&merge(
        json!({ "@type": router, "suppress_envoy_headers": true }),
    ));
    assert!(resources.problems.is_empty());
    let listener = resource(&resources, "listeners", "0.0.0.0_9080").to_string();
    assert!(listener.contains("suppress_envoy_headers"));
    let other = "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors";
    let resources = patched(&merge(json!({ "@type": other })));
    let problem = &resources.problems[0];
    assert_eq!(problem.field, "spec.configPatches[0].patch.value");
    assert!(problem.message.contains("Cors"), "{}", problem.message);
}

#[test]
fn chains_and_listeners_are_added_and_removed() {
    let chain = |operation: &str| {
        json!({
            "applyTo": "FILTER_CHAIN",
            "match": { "context": "SIDECAR_INBOUND", "listener": { "filterChain": { "destinationPort": 9080 } } },
            "patch": { "operation": operation, "value": { "name": "mine", "filters": [{ "name": "envoy.filters.network.tcp_proxy", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "x", "cluster": "PassthroughCluster",
            } }] } },
        })
    };
    let chains = |resources: &Resources| {
        let listener = resource(resources, "listeners", "virtualInbound");
        listener["filter_chains"].as_array().unwrap().len()
    };
    let before = chains(&patched(&json!([])));
    assert_eq!(chains(&patched(&json!([chain("ADD")]))), before + 1);
    // A port has a chain for mutual TLS and one for plain text.
    assert_eq!(chains(&patched(&json!([chain("REMOVE")]))), before - 2);
    let listener = json!([
        { "applyTo": "LISTENER", "patch": { "operation": "ADD", "value": { "name": "mine", "address": { "socket_address": { "address": "127.0.0.1", "port_value": 1 } } } } },
        { "applyTo": "LISTENER", "match": { "listener": { "portNumber": 9080 } }, "patch": { "operation": "REMOVE" } },
    ]);
    let resources = patched(&listener);
    assert!(resources.listeners.contains_key("mine"));
    assert!(!resources.listeners.contains_key("0.0.0.0_9080"));
}

#[test]
fn places_and_ports_are_kept_apart() {
    let remove = |matcher: Value| {
        let patch =
            json!([{ "applyTo": "CLUSTER", "match": matcher, "patch": { "operation": "REMOVE" } }]);
        let resources = patched(&patch);
        let has = |name: &str| resources.clusters.contains_key(name);
        (
            has("inbound|9080||"),
            has("outbound|9080||reviews.default.svc.cluster.local"),
            has("outbound|9080|v1|reviews.default.svc.cluster.local"),
        )
    };
    let reviews = "reviews.default.svc.cluster.local";
    for (matcher, expected) in [
        (json!({ "context": "GATEWAY" }), (true, true, true)),
        (json!({ "context": "SIDECAR_INBOUND" }), (false, true, true)),
        (
            json!({ "context": "SIDECAR_OUTBOUND" }),
            (true, false, false),
        ),
        (
            json!({ "cluster": { "service": reviews } }),
            (true, false, false),
        ),
        (
            json!({ "cluster": { "service": reviews, "subset": "v1" } }),
            (true, true, false),
        ),
        (
            json!({ "cluster": { "service": reviews, "portNumber": 80 } }),
            (true, true, true),
        ),
        // Inbound clusters are known by the services behind them.
        (
            json!({ "context": "SIDECAR_INBOUND", "cluster": { "service": "productpage.default.svc.cluster.local" } }),
            (false, true, true),
        ),
        (
            json!({ "cluster": { "name": "inbound|9080||" } }),
            (false, true, true),
        ),
    ] {
        assert_eq!(remove(matcher.clone()), expected, "{matcher}");
    }
}

#[test]
fn lists_are_appended_to_or_replaced() {
    let merge = |operation: &str| {
        let patch = json!([{
            "applyTo": "CLUSTER",
            "match": { "cluster": { "service": "details.default.svc.cluster.local" } },
            "patch": { "operation": operation, "value": { "circuit_breakers": { "thresholds": [{ "max_connections": 7 }] } } },
        }]);
        let cluster = resource(
            &patched(&patch),
            "clusters",
            "outbound|9080||details.default.svc.cluster.local",
        );
        cluster["circuit_breakers"]["thresholds"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!(merge("MERGE"), 2);
    assert_eq!(merge("MERGE_AND_REPLACE_LIST"), 1);
}
