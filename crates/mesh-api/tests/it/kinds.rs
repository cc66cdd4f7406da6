//! Parsing: the field's usual objects, and what is refused.

use mesh_api::core::{CoreObject, EndpointSlice, Node, Pod, Secret, Service};
use mesh_api::networking::destination_rule::SimpleLb;
use mesh_api::{AnyObject, Duration, StringMatch, parse, yaml};
use serde_json::json;

fn object(text: &str) -> AnyObject {
    parse(&yaml::documents(text, "test").expect("YAML")[0])
        .unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn error(text: &str) -> String {
    parse(&yaml::documents(text, "test").expect("YAML")[0])
        .expect_err(text)
        .to_string()
}

const REVIEWS: &str = r#"
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {name: reviews, namespace: default, creationTimestamp: "2026-11-21T00:00:00Z", managedFields: [{manager: kubectl}]}
spec:
  hosts: [reviews]
  exportTo: null
  http:
  - match:
    - headers: {end-user: {exact: jason}, x-there: {}}
      uri: {prefix: /api}
    timeout: 1.5s
    route: [{destination: {host: reviews, subset: v2}}]
  - route:
    - {destination: {host: reviews, subset: v1, port: {number: 9080}}, weight: 80}
    - {destination: {host: reviews, subset: v3}, weight: 20}
  - directResponse: {status: 503, body: {string: sorry}}
status: {conditions: []}
"#;

#[test]
fn a_virtual_service() {
    let AnyObject::VirtualService(service) = object(REVIEWS) else {
        panic!("kind")
    };
    assert_eq!(service.meta.name, "reviews");
    assert_eq!(
        service.meta.creation_timestamp.map(|time| time.as_second()),
        Some(1_795_219_200)
    );
    let first = &service.spec.http[0];
    assert_eq!(
        first.matches[0].headers["end-user"],
        StringMatch::Exact("jason".into())
    );
    assert_eq!(first.matches[0].headers["x-there"], StringMatch::Present);
    assert_eq!(first.timeout, Some(Duration::from_millis(1500)));
    assert_eq!(
        service.spec.http[1].route[0]
            .destination
            .port
            .as_ref()
            .map(|port| port.number),
        Some(9080)
    );
    assert_eq!(
        service.spec.http[1]
            .route
            .iter()
            .map(|route| route.weight)
            .sum::<i32>(),
        100
    );
}

#[test]
fn every_kind_is_parsed_and_unknown_fields_are_named() {
    for info in mesh_api::KINDS {
        for version in info.versions {
            let mut raw = json!({ "apiVersion": format!("{}/{}", info.group, version.name), "kind": info.kind, "metadata": { "name": "x" }, "spec": {} });
            let object = parse(&raw).unwrap_or_else(|error| panic!("{}: {error}", info.kind));
            assert_eq!(
                (object.kind(), object.info().plural),
                (info.kind, info.plural)
            );
            raw["spec"]["bogus"] = json!(1);
            let error = parse(&raw).expect_err("unknown field");
            assert_eq!(error.path, "spec.bogus", "{}: {error}", info.kind);
            assert!(error.message.contains("unknown field"), "{error}");
        }
    }
}

#[test]
fn errors_say_where_and_what() {
    let wrong = error(&REVIEWS.replace("weight: 20", "weight: many"));
    assert!(
        wrong.starts_with("spec.http[1].route[1].weight: "),
        "{wrong}"
    );
    assert!(wrong.ends_with("expected a whole number"), "{wrong}");
    let wrong = error(&REVIEWS.replace("{prefix: /api}", "{prefix: /api, exact: /}"));
    assert!(
        wrong.starts_with("spec.http[0].match[0].uri: only one of"),
        "{wrong}"
    );
    let wrong = error(&REVIEWS.replace("1.5s", "'1.5'"));
    assert!(
        wrong.contains("spec.http[0].timeout") && wrong.contains("not a duration"),
        "{wrong}"
    );
    let wrong = error(&REVIEWS.replace("v1alpha3", "v2"));
    assert!(
        wrong.contains("no version \"v2\"; expected networking.istio.io/v1 or"),
        "{wrong}"
    );
    let wrong = error(&REVIEWS.replace("name: reviews, namespace", "namespace"));
    assert!(wrong.starts_with("metadata.name"), "{wrong}");
    assert!(error("{apiVersion: v1, kind: Service}").contains("not an Istio kind"));
    assert!(error(&REVIEWS.replace("status:", "data:")).starts_with("data: unknown field"));
}

#[test]
fn a_destination_rule() {
    let AnyObject::DestinationRule(rule) = object(
        "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: r}, spec: {host: reviews, trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}, \
         outlierDetection: {consecutive5xxErrors: 7}}, subsets: [{name: v1, labels: {version: v1}}]}}",
    ) else {
        panic!("kind")
    };
    let policy = rule.spec.traffic_policy.expect("policy");
    assert_eq!(
        policy.load_balancer.and_then(|lb| lb.simple),
        Some(SimpleLb::RoundRobin)
    );
    assert_eq!(
        policy
            .outlier_detection
            .and_then(|outlier| outlier.consecutive_5xx_errors),
        Some(7)
    );
    assert_eq!(rule.spec.subsets[0].labels["version"], "v1");
}

#[test]
fn core_kinds_are_lenient() {
    let service = Service::from_value(&json!({ "metadata": { "name": "a" }, "spec": { "clusterIP": "None", "ports": [{ "port": 80, "targetPort": "web" }], "sessionAffinity": "None" } })).expect("service");
    assert!(service.is_headless());
    let slice = EndpointSlice::from_value(&json!({ "metadata": { "labels": { "kubernetes.io/service-name": "a" } }, "endpoints": [{ "addresses": ["10.0.0.1"], "conditions": {}, "nodeName": null }], "ports": null })).expect("slice");
    assert_eq!(slice.service_name(), Some("a"));
    assert!(slice.endpoints[0].conditions.is_ready());
    let pod = Pod::from_value(&json!({
        "metadata": { "name": "reviews-v1-5d8-x", "labels": { "pod-template-hash": "5d8" }, "ownerReferences": [{ "kind": "ReplicaSet", "name": "reviews-v1-5d8", "controller": true }] },
        "spec": { "containers": [{ "name": "app", "ports": [{ "name": "web", "containerPort": 9080 }] }] },
        "status": { "podIP": "10.244.0.5", "conditions": [{ "type": "Ready", "status": "True" }] },
    }))
    .expect("pod");
    assert_eq!(
        (
            pod.workload_name(),
            pod.service_account(),
            pod.named_port("web"),
            pod.is_ready()
        ),
        ("reviews-v1", "default", Some(9080), true)
    );
    let node = Node::from_value(&json!({ "metadata": { "labels": { "topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": "z" } } })).expect("node");
    assert_eq!(node.locality(), "r/z");
    let secret = Secret::from_value(&json!({ "data": { "a": "Yg==" } })).expect("secret");
    assert_eq!(secret.bytes("a"), Some(b"b".to_vec()));
    assert!(!format!("{secret:?}").contains("Yg"));
    let error = Service::from_value(&json!({ "spec": { "ports": [{ "port": "http" }] } }))
        .expect_err("port");
    assert_eq!(error.path, "spec.ports[0].port");
}

#[test]
fn nulls_are_absent_except_in_free_form_values() {
    let AnyObject::EnvoyFilter(filter) = object(
        "{apiVersion: networking.istio.io/v1alpha3, kind: EnvoyFilter, metadata: {name: f}, spec: {workloadSelector: null, configPatches: \
         [{applyTo: CLUSTER, match: null, patch: {operation: MERGE, value: {a: null, b: 1}}}]}}",
    ) else {
        panic!("kind")
    };
    let patch = filter.spec.config_patches[0].patch.as_ref().expect("patch");
    assert_eq!(patch.value, json!({ "a": null, "b": 1 }));
}
