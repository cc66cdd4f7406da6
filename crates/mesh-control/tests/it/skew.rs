//! Proxies and installations of other versions.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value as Wire};
use mesh_xds::types::{CLUSTER, LISTENER, ROUTE};
use mesh_xds::{ClientConfig, Node};
use serde_json::{Map, Value, json};

use crate::api::Api;
use crate::control::{debug, eventually, start};
use crate::discovery::{self, ID, Running};
use crate::world;

fn wire(value: &Value) -> Wire {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(*value),
        Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap()),
        Value::String(value) => Kind::StringValue(value.clone()),
        Value::Array(values) => Kind::ListValue(ListValue {
            values: values.iter().map(wire).collect(),
        }),
        Value::Object(fields) => Kind::StructValue(fields_of(fields)),
    };
    Wire { kind: Some(kind) }
}

fn fields_of(fields: &Map<String, Value>) -> Struct {
    Struct {
        fields: fields
            .iter()
            .map(|(key, value)| (key.clone(), wire(value)))
            .collect(),
    }
}

/// A proxy with metadata of its own, which also asks for `more` types.
fn connect(address: SocketAddr, pod: &str, metadata: &Value, more: &[&str]) -> Running {
    let node = Node {
        id: format!("sidecar~10.244.7.10~{pod}.default~default.svc.cluster.local"),
        metadata: metadata.as_object().map(fields_of),
        ..Default::default()
    };
    let mut config = ClientConfig::new(vec![address.to_string()], node);
    config
        .types
        .extend(more.iter().map(|name| (*name).to_owned()));
    discovery::run_with(config, None)
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_all_versions_are_served_and_told_apart() {
    let api = Api::new();
    world::bookinfo(&api);
    let plane = start(&api).await;
    // Metadata, and the version that is shown for it.
    let cases = [
        ("nothing", Value::Null, ""),
        ("istio", json!({"ISTIO_VERSION": "1.27.3"}), "1.27.3"),
        // A version does what the one before it did with everything that it does not know.
        (
            "older",
            json!({"MESH_VERSION": "0.0.9", "NAMESPACE": "default"}),
            "0.0.9",
        ),
        (
            "newer",
            json!({
                "MESH_VERSION": "9.9.9-rc.1+build", "ISTIO_VERSION": "1.99.0",
                "FUTURE": {"deep": [{"list": [null, true, 1.5, "x"]}]}, "TRUST": {"another": "form"},
                "LABELS": ["a", "list"], "INSTANCE_IPS": 7, "POD_PORTS": {"http": 9080}, "CLUSTER_ID": ["x"],
                "DNS_CAPTURE": 1, "INTERCEPTION_MODE": {"mode": "TPROXY"}, "HTTP10": null,
            }),
            "9.9.9-rc.1+build",
        ),
        ("odd", json!({"MESH_VERSION": 10}), ""),
    ];
    let mut proxies = Vec::new();
    for (pod, metadata, _) in &cases {
        let address = plane.addresses.grpc.unwrap();
        let mut proxy = connect(address, pod, metadata, &[]);
        let view = proxy.complete().await;
        let reviews = "outbound|9080||reviews.default.svc.cluster.local";
        assert!(view.held[CLUSTER].contains_key(reviews), "{pod}");
        assert!(view.held[LISTENER].contains_key("virtualInbound"), "{pod}");
        proxies.push(proxy);
    }
    let rows = eventually("the acknowledgements", async || {
        let rows = debug(&plane, "/debug/syncz").await;
        let rows = rows.as_array()?.clone();
        let synced = |row: &Value| {
            ["cluster", "listener", "route", "endpoint"]
                .iter()
                .all(|name| row[format!("{name}_status")] == "SYNCED")
        };
        (rows.len() == cases.len() && rows.iter().all(synced)).then_some(rows)
    })
    .await;
    let shown: BTreeMap<_, _> = rows
        .iter()
        .map(|row| {
            (
                row["proxy"].as_str().unwrap(),
                row["istio_version"].as_str().unwrap(),
            )
        })
        .collect();
    for (pod, _, version) in &cases {
        assert_eq!(
            shown[format!("{pod}.default").as_str()],
            *version,
            "{shown:?}"
        );
    }
    drop(proxies);
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_of_the_future_is_asked_for_in_vain_and_nothing_else_suffers() {
    let api = Api::new();
    world::bookinfo(&api);
    let plane = start(&api).await;
    let future = "type.googleapis.com/envoy.config.future.v9.Future";
    let address = plane.addresses.grpc.unwrap();
    let mut proxy = connect(
        address,
        "newer",
        &json!({"MESH_VERSION": "9.9.9"}),
        &[future],
    );
    let view = proxy
        .until("the types that there are", |view| {
            view.held.contains_key(CLUSTER) && view.held.contains_key(LISTENER)
        })
        .await;
    assert!(view.held.get(future).is_none_or(BTreeMap::is_empty));
    // The stream lives on: a change arrives.
    world::service(&api, "later");
    proxy
        .until("the new service", |view| view.mentions(CLUSTER, "later"))
        .await;
    let ads = debug(&plane, "/debug/adsz").await;
    assert_eq!(ads["totalClients"], 1, "{ads}");
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_a_newer_installation_lose_only_what_is_new() {
    let api = Api::new();
    world::bookinfo(&api);
    let mesh = "outboundTrafficPolicy: {mode: REGISTRY_ONLY, future: 1}\nfuture: {a: [b]}\n";
    api.apply(
        "configmaps",
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh, "future": "x"}}),
    );
    let plane = start(&api).await;
    let mut proxy = discovery::connect(plane.addresses.grpc.unwrap(), ID);
    let view = proxy.complete().await;
    // Defaults would let everything out.
    assert!(view.mentions(LISTENER, "BlackHoleCluster"));
    assert!(!view.mentions(LISTENER, "\"PassthroughCluster\""));
    plane.stop().await;
}

/// What holds is not opened by a field that is spelt wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_typing_error_in_the_settings_changes_nothing() {
    let api = Api::new();
    world::bookinfo(&api);
    let set = |mesh: &str| {
        api.apply(
            "configmaps",
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh}}),
        );
    };
    set("outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n");
    let plane = start(&api).await;
    let mut proxy = discovery::connect(plane.addresses.grpc.unwrap(), ID);
    let view = proxy.complete().await;
    assert!(view.mentions(LISTENER, "BlackHoleCluster"));
    set("outboundTrafficPolicy: {mod: REGISTRY_ONLY}\n");
    // Something after it that does take effect.
    api.apply("virtualservices", world::virtual_service("jason"));
    let view = proxy
        .until("the route", |view| view.mentions(ROUTE, "jason"))
        .await;
    assert!(view.mentions(LISTENER, "BlackHoleCluster"));
    assert!(!view.mentions(LISTENER, "\"PassthroughCluster\""));
    plane.stop().await;
}
