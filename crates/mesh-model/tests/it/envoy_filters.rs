//! Patches are read, or reported.

use mesh_model::{Mesh, Node};
use serde_json::{Value, json};

use super::mesh;

fn filter(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec: {spec}\n---\n"
    )
}

fn node(kind: &str, namespace: &str, metadata: Value) -> Node {
    let id = format!("{kind}~10.244.0.9~pod.{namespace}~{namespace}.svc.cluster.local");
    Node::from_xds_id(&id, &metadata).unwrap()
}

fn order(mesh: &Mesh, node: &Node) -> Vec<String> {
    mesh.envoy_filters_of(node)
        .iter()
        .map(|filter| filter.key.name.clone())
        .collect()
}

#[test]
fn by_priority_then_root_namespace_then_own() {
    let mesh = mesh(
        &[
            filter("late", "istio-system", "{ priority: 10 }"),
            filter("root", "istio-system", "{}"),
            filter("own", "default", "{}"),
            filter("early", "default", "{ priority: -5 }"),
            filter("stranger", "other", "{}"),
            filter(
                "selected",
                "default",
                "{ workloadSelector: { labels: { app: web } } }",
            ),
        ]
        .concat(),
    );
    let web = node("sidecar", "default", json!({ "LABELS": { "app": "web" } }));
    assert_eq!(
        order(&mesh, &web),
        ["early", "root", "own", "selected", "late"]
    );
    let other = node("sidecar", "default", json!({}));
    assert_eq!(order(&mesh, &other), ["early", "root", "own", "late"]);
}

#[test]
fn a_target_is_a_gateway_by_name() {
    let targets = "{ targetRefs: [{ group: gateway.networking.k8s.io, kind: Gateway, name: gw }, { kind: Service, name: a }] }";
    let mesh = mesh(&filter("f", "default", targets));
    let labels = json!({ "LABELS": { "gateway.networking.k8s.io/gateway-name": "gw" } });
    assert_eq!(
        order(&mesh, &node("router", "default", labels.clone())),
        ["f"]
    );
    assert!(order(&mesh, &node("router", "default", json!({}))).is_empty());
    assert!(order(&mesh, &node("sidecar", "default", labels)).is_empty());
    let fields: Vec<_> = mesh
        .problems()
        .iter()
        .map(|problem| &problem.field)
        .collect();
    assert_eq!(fields, ["spec.targetRefs[1]"]);
}

#[test]
fn bad_patches_are_named_and_the_others_stay() {
    let spec = r#"
  configPatches:
  - applyTo: CLUSTER
    patch: { operation: MERGE, value: { connect_timeout: 3s } }
  - applyTo: CLUSTER
    patch: { operation: MERGE, value: { conect_timeout: 3s } }
  - applyTo: HTTP_FILTER
    patch: { operation: ADD, value: { name: f, typed_config: { "@type": type.googleapis.com/foo.Bar } } }
  - applyTo: CLUSTER
    match: { proxy: { proxyVersion: "^1\\.(" } }
    patch: { operation: REMOVE }
  - applyTo: ROUTE_CONFIGURATION
    patch: { operation: ADD, value: {} }
  - applyTo: BOOTSTRAP
    patch: { operation: MERGE, value: {} }
  - applyTo: CLUSTER
    match: { proxy: { proxyVersion: "^1\\.30" , metadata: { ROLE: edge } } }
    patch: { operation: REMOVE }
  - applyTo: LISTENER
    match: { listener: { portName: http } }
    patch: { operation: REMOVE }
  - applyTo: HTTP_FILTER
    patch: { operation: ADD, filterClass: AUTHZ, value: { name: f } }
"#;
    let mesh = mesh(&filter("f", "default", spec));
    let fields: Vec<_> = mesh
        .problems()
        .iter()
        .map(|problem| problem.field.as_str())
        .collect();
    assert_eq!(
        fields,
        [
            "spec.configPatches[1].patch.value.conect_timeout",
            "spec.configPatches[2].patch.value.typed_config.@type",
            "spec.configPatches[3].match.proxy.proxyVersion",
            "spec.configPatches[4].patch.operation",
            "spec.configPatches[5].applyTo",
            "spec.configPatches[7].match.listener.portName",
            "spec.configPatches[8].patch.filterClass",
        ]
    );
    assert_eq!(
        mesh.problems()[0].message,
        "envoy.config.cluster.v3.Cluster has no field \"conect_timeout\" (did you mean \"connect_timeout\"?); the patch has no effect, the object's others have"
    );
    assert!(mesh.problems()[1].message.contains("foo.Bar"));
    let sidecar = node("sidecar", "default", json!({ "ISTIO_VERSION": "1.30.1" }));
    let filter = mesh.envoy_filters_of(&sidecar)[0];
    assert_eq!(filter.patches.len(), 3);
    assert!(filter.patches[0].is_for(&sidecar));
    assert!(!filter.patches[1].is_for(&sidecar), "no such metadata");
    let edge = json!({ "ISTIO_VERSION": "1.30.1", "ROLE": "edge" });
    assert!(filter.patches[1].is_for(&node("sidecar", "default", edge)));
    let older = json!({ "ISTIO_VERSION": "1.29.0", "ROLE": "edge" });
    assert!(!filter.patches[1].is_for(&node("sidecar", "default", older)));
}
