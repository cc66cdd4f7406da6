use mesh_model::{Health, Node, ObjectKey, Protocol};
use serde_json::json;

use super::{item, mesh, objects};

const WEB: &str = r#"
apiVersion: v1
kind: Service
metadata: { name: web, namespace: shop }
spec:
  clusterIP: 10.96.0.5
  selector: { app: web }
  ports: [{ name: http, port: 80, targetPort: web }, { name: dns, port: 53, protocol: UDP }]
---
apiVersion: v1
kind: Pod
metadata:
  name: web-7f-x
  namespace: shop
  labels: { app: web, version: v2, pod-template-hash: 7f }
  ownerReferences: [{ apiVersion: apps/v1, kind: ReplicaSet, name: web-7f, uid: u, controller: true }]
spec:
  nodeName: n1
  serviceAccountName: shopkeeper
  containers: [{ name: c, image: i, ports: [{ name: web, containerPort: 8080 }] }]
status: { phase: Running, podIP: 10.244.0.7 }
---
apiVersion: v1
kind: Node
metadata: { name: n1, labels: { topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z } }
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: { name: web-a, namespace: shop, labels: { kubernetes.io/service-name: web } }
addressType: IPv4
ports: [{ name: http, port: 8080 }]
endpoints:
  - { addresses: [10.244.0.9], conditions: { ready: false } }
  - { addresses: [10.244.0.8], conditions: { ready: false, serving: true, terminating: true } }
  - { addresses: [10.244.0.7], conditions: {}, targetRef: { kind: Pod, namespace: shop, name: web-7f-x } }
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: { name: web-b, namespace: shop, labels: { kubernetes.io/service-name: web } }
addressType: IPv4
ports: [{ name: http, port: 8080 }]
endpoints: [{ addresses: [10.244.0.7], conditions: { ready: false, serving: true, terminating: true } }]
"#;

#[test]
fn endpoints_know_their_pods() {
    let mesh = mesh(WEB);
    let service = mesh.service("web.shop.svc.cluster.local").unwrap();
    assert_eq!(service.ports.len(), 1, "UDP is left to the kernel");
    assert_eq!(service.ports[0].protocol, Protocol::Http);
    let endpoints = service.endpoints(80);
    let states: Vec<_> = endpoints
        .iter()
        .map(|endpoint| (endpoint.address.to_string(), endpoint.port, endpoint.health))
        .collect();
    assert_eq!(
        states,
        [
            ("10.244.0.7".to_owned(), 8080, Health::Ready),
            ("10.244.0.8".to_owned(), 8080, Health::Draining)
        ],
        "the endpoint that two slices hold counts once, the one that takes nothing not at all"
    );
    let workload = endpoints[0].workload.as_ref().unwrap();
    assert_eq!(
        (
            workload.name.as_str(),
            workload.canonical_name(),
            workload.canonical_revision()
        ),
        ("web", "web", "v2")
    );
    assert_eq!(
        (
            workload.service_account.as_str(),
            endpoints[0].locality.as_str()
        ),
        ("shopkeeper", "r/z")
    );
    assert!(endpoints[0].has_labels(&[("version".to_owned(), "v2".to_owned())].into()));
    assert!(!endpoints[1].has_labels(&[("version".to_owned(), "v2".to_owned())].into()));
    assert_eq!(service.service_accounts(), [("shop", "shopkeeper")].into());
}

#[test]
fn a_pod_serves_before_it_has_endpoints() {
    let id = "sidecar~10.244.0.50~web-new.shop~shop.svc.cluster.local";
    // The API has not told of the pod yet: what the proxy says about itself counts.
    let metadata = json!({ "LABELS": { "app": "web" }, "POD_PORTS": [{ "name": "web", "containerPort": 9999 }] });
    let node = Node::from_xds_id(id, &metadata).unwrap();
    let mesh = mesh(WEB);
    let served: Vec<_> = mesh
        .served_by(&node)
        .into_iter()
        .map(|(target, service, port)| (target, service.name.clone(), port.number))
        .collect();
    assert_eq!(served, [(9999, "web".to_owned(), 80)]);
    let stranger = Node::from_xds_id(id, &json!({ "LABELS": { "app": "other" } })).unwrap();
    assert!(mesh.served_by(&stranger).is_empty());
}

#[test]
fn aliases_lead_to_services_and_loops_nowhere() {
    let external = |name: &str, target: &str| {
        format!(
            "\n---\napiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: shop }}\nspec: {{ type: ExternalName, externalName: {target} }}\n"
        )
    };
    let text = [
        WEB,
        &external("a", "b.shop.svc.cluster.local."),
        &external("b", "web.shop.svc.cluster.local"),
        &external("loop", "loop.shop.svc.cluster.local"),
        &external("out", "example.com"),
    ]
    .concat();
    let mesh = mesh(&text);
    let resolve = |name: &str| {
        mesh.resolve_alias(
            mesh.service(&format!("{name}.shop.svc.cluster.local"))
                .unwrap(),
        )
        .map(|service| service.name.clone())
    };
    assert_eq!(resolve("a").as_deref(), Some("web"));
    assert_eq!(resolve("loop"), None);
    assert_eq!(resolve("out"), None);
}

#[test]
fn removing_takes_out_and_repeating_changes_nothing() {
    let mut objects = objects(WEB);
    let count = objects.len();
    for raw in mesh_api::yaml::documents(WEB, "again").unwrap() {
        assert!(!objects.upsert(item(&raw)));
    }
    assert!(objects.remove(&ObjectKey::new("Service", "shop", "web")));
    assert!(!objects.remove(&ObjectKey::new("Service", "shop", "web")));
    assert_eq!(objects.len(), count - 1);
    assert!(
        mesh_model::Mesh::build(&objects)
            .service("web.shop.svc.cluster.local")
            .is_none()
    );
}
