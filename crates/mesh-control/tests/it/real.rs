//! The control plane against the local cluster's API server: real CRDs, real statuses, real watches.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use mesh_apiserver::{ApiServer, Auth, Identity, node::NoNode};
use mesh_control::{Control, Options};
use mesh_xds::types::ROUTE;
use serde_json::{Value, json};

use crate::discovery::{self, ID};
use crate::world;

fn api(client: &kube::Client, object: &Value) -> Api<DynamicObject> {
    let version = object["apiVersion"].as_str().unwrap();
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let gvk = GroupVersionKind::gvk(group, version, object["kind"].as_str().unwrap());
    let resource = ApiResource::from_gvk(&gvk);
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

async fn create(client: &kube::Client, object: Value) {
    let typed: DynamicObject = serde_json::from_value(object.clone()).unwrap();
    api(client, &object)
        .create(&PostParams::default(), &typed)
        .await
        .unwrap_or_else(|error| panic!("creating {object}: {error}"));
}

/// A client, with all rights, of an API server that lives as long as it does.
fn cluster() -> kube::Client {
    let (store, _) = mesh_store::Store::open(None).unwrap();
    let issuer = "https://kubernetes.default.svc.cluster.local";
    let auth = Auth {
        admin_tokens: Vec::new(),
        tokens: Arc::new(mesh_identity::token::TokenKeys::generate(issuer).unwrap()),
    };
    let server =
        ApiServer::open(mesh_apiserver::Options::new(store, auth, Arc::new(NoNode))).unwrap();
    kube::Client::new(server.router_as(Identity::admin()), "default")
}

fn free_ports(options: &mut Options) {
    for address in [
        &mut options.secure_grpc,
        &mut options.webhook,
        &mut options.monitoring,
        &mut options.http,
    ] {
        *address = SocketAddr::from(([127, 0, 0, 1], 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_takes_effect_and_what_is_wrong_is_in_its_status() {
    let client = cluster();
    for crd in mesh_api::crds() {
        create(&client, crd).await;
    }
    create(
        &client,
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "reviews", "namespace": "default"},
            "spec": {"ports": [{"name": "http", "port": 9080}], "selector": {"app": "reviews"}},
        }),
    )
    .await;
    let mut options = Options::new(client.clone(), "0.1.0");
    options.grpc = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    free_ports(&mut options);
    let control = Control::bind(options).await.unwrap();
    let address = control.addresses().grpc.unwrap();
    let running = tokio::spawn(control.run(std::future::pending()));
    let mut proxy = discovery::connect(address, ID);
    proxy.complete().await;
    create(&client, world::virtual_service("jason")).await;
    proxy
        .until("the route", |view| view.mentions(ROUTE, "jason"))
        .await;

    // A host that does not exist is found out when the mesh is built.
    let rules = api(&client, &world::virtual_service(""));
    let patch = json!({"spec": {"http": [{"name": "mary", "route": [{"destination": {"host": "nowhere"}}]}]}});
    rules
        .patch("reviews", &PatchParams::default(), &Patch::Merge(patch))
        .await
        .unwrap();
    let mut status = Value::Null;
    for _ in 0..200 {
        let object = rules.get("reviews").await.unwrap();
        status = object.data["status"].clone();
        if status["validationMessages"].is_array() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(
        status["validationMessages"][0]["type"]["code"], "IST0101",
        "{status}"
    );
    assert_eq!(status["observedGeneration"], 2, "{status}");
    running.abort();
}

/// Kinds carry rules that an API server judges alone: no control plane runs here.
#[tokio::test(flavor = "multi_thread")]
async fn what_excludes_each_other_is_refused_without_a_webhook() {
    let client = cluster();
    for crd in mesh_api::crds() {
        create(&client, crd).await;
    }
    let labels = json!({"matchLabels": {"app": "a"}});
    let gateway = json!({"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "a"});
    let one = "only one of targetRefs or selector can be set";
    let address = json!({"address": "192.0.2.1"});
    let entry = |more: Value| {
        let mut spec = json!({"hosts": ["example.com"], "ports": [{"number": 80, "name": "http"}]});
        for (field, value) in more.as_object().unwrap() {
            spec[field] = value.clone();
        }
        spec
    };
    let security = "security.istio.io/v1";
    let networking = "networking.istio.io/v1";
    // The kind, what it takes, what it refuses, and why.
    for (version, kind, good, bad, why) in [
        (
            security,
            "AuthorizationPolicy",
            json!({"selector": labels, "targetRefs": []}),
            json!({"selector": labels, "targetRefs": [gateway]}),
            one,
        ),
        (
            security,
            "AuthorizationPolicy",
            json!({"targetRef": gateway}),
            json!({"targetRef": gateway, "targetRefs": [gateway]}),
            one,
        ),
        (
            security,
            "RequestAuthentication",
            json!({"targetRefs": [gateway]}),
            json!({"selector": labels, "targetRef": gateway}),
            one,
        ),
        (
            "telemetry.istio.io/v1",
            "Telemetry",
            json!({}),
            json!({"selector": labels, "targetRef": gateway}),
            one,
        ),
        (
            "extensions.istio.io/v1alpha1",
            "WasmPlugin",
            json!({"url": "https://example.com/a.wasm"}),
            json!({"url": "https://example.com/a.wasm", "selector": labels, "targetRef": gateway}),
            one,
        ),
        (
            security,
            "PeerAuthentication",
            json!({"selector": labels, "portLevelMtls": {"80": {"mode": "DISABLE"}}}),
            json!({"portLevelMtls": {"80": {"mode": "DISABLE"}}}),
            "portLevelMtls requires selector",
        ),
        (
            networking,
            "ServiceEntry",
            entry(json!({"resolution": "STATIC", "endpoints": [address, address]})),
            entry(json!({"resolution": "DNS_ROUND_ROBIN", "endpoints": [address, address]})),
            "DNS_ROUND_ROBIN mode cannot have multiple endpoints",
        ),
        (
            networking,
            "ServiceEntry",
            entry(json!({})),
            entry(json!({"endpoints": [address]})),
            "NONE mode cannot set endpoints",
        ),
        (
            networking,
            "ServiceEntry",
            entry(json!({"resolution": "STATIC", "workloadSelector": {"labels": {"app": "a"}}})),
            entry(
                json!({"resolution": "STATIC", "workloadSelector": {"labels": {"app": "a"}}, "endpoints": [address]}),
            ),
            "only one of WorkloadSelector or Endpoints can be set",
        ),
        (
            networking,
            "WorkloadEntry",
            json!({"network": "other"}),
            json!({"labels": {"app": "a"}}),
            "Address is required",
        ),
        (
            "networking.istio.io/v1alpha3",
            "EnvoyFilter",
            json!({"workloadSelector": {"labels": {"app": "a"}}, "configPatches": []}),
            json!({"workloadSelector": {"labels": {"app": "a"}}, "targetRefs": [gateway], "configPatches": []}),
            "only one of targetRefs or workloadSelector can be set",
        ),
    ] {
        let object = |spec: &Value| json!({"apiVersion": version, "kind": kind, "metadata": {"generateName": "a-", "namespace": "default"}, "spec": spec});
        create(&client, object(&good)).await;
        let bad = object(&bad);
        let typed: DynamicObject = serde_json::from_value(bad.clone()).unwrap();
        let refused = api(&client, &bad)
            .create(&PostParams::default(), &typed)
            .await;
        let error = refused.expect_err(why).to_string();
        assert!(error.contains(why), "{bad}: {error}");
    }
}

/// A control plane of the default revision takes the lead from one of another revision, and gives nothing back to it.
#[tokio::test(flavor = "multi_thread")]
async fn the_default_revision_leads() {
    let client = cluster();
    create(
        &client,
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "istio-system"}}),
    )
    .await;
    let start = async |revision: &str| {
        let mut options = Options::new(client.clone(), "0.1.0").of_revision(revision);
        options.grpc = None;
        free_ports(&mut options);
        Control::bind(options).await.unwrap()
    };
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"namespace": "istio-system"}});
    let leader = async |wanted: &str| {
        let waited = tokio::time::timeout(Duration::from_secs(40), async {
            loop {
                let found = api(&client, &lease).get_opt("istio-status-leader").await;
                let annotations = found.unwrap().and_then(|lease| lease.metadata.annotations);
                let revision = annotations.unwrap_or_default().remove("istio.io/rev");
                if revision.is_some_and(|revision| revision == wanted) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        waited
            .await
            .unwrap_or_else(|_| panic!("{wanted} does not lead"));
    };
    let canary = start("canary").await.run(std::future::pending());
    let canary = tokio::spawn(canary);
    leader("canary").await;
    let default = start("default").await.run(std::future::pending());
    let default = tokio::spawn(default);
    leader("default").await;
    // The tag says who is the default.
    create(
        &client,
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": "istio-revision-tag-default", "labels": {"istio.io/tag": "default", "istio.io/rev": "canary"}},
            "webhooks": [],
        }),
    )
    .await;
    leader("canary").await;
    canary.abort();
    default.abort();
}
