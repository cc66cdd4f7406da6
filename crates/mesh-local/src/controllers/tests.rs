//! The loops against the real API server, in this process, with a stand-in for the node agent.

mod workloads;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Event, Namespace, Node, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::{NamespaceResourceScope, Resource as K8sResource};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, PropagationPolicy};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use mesh_apiserver::node::NoNode;
use mesh_apiserver::{ApiServer, Auth, Identity, Options};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// A cluster without processes; everything ends with it.
struct Cluster {
    client: Client,
    shutdown: CancellationToken,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Cluster {
    async fn start() -> Self {
        let (store, _) = mesh_store::Store::open(None).unwrap();
        let tokens = Arc::new(
            mesh_identity::token::TokenKeys::generate("https://kubernetes.default.svc").unwrap(),
        );
        let auth = Auth {
            admin_tokens: Vec::new(),
            tokens,
        };
        let server = ApiServer::open(Options::new(store, auth, Arc::new(NoNode))).unwrap();
        let client = Client::new(server.router_as(Identity::admin()), "default");
        let shutdown = CancellationToken::new();
        let cluster = Self {
            client: client.clone(),
            shutdown: shutdown.clone(),
        };
        tokio::spawn(super::run(client.clone(), shutdown.clone()));
        tokio::spawn(async move {
            tokio::select! { () = shutdown.cancelled() => {}, () = agent(client) => {} }
        });
        cluster
            .create::<Node>(
                json!({ "metadata": { "name": "mesh-node", "labels": { "disk": "ssd" } } }),
            )
            .await;
        cluster
    }

    fn all<K: Resource<DynamicType = ()>>(&self) -> Api<K> {
        Api::all(self.client.clone())
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), "default")
    }

    async fn create<K>(&self, object: Value) -> K
    where
        K: Resource<DynamicType = ()>
            + K8sResource
            + Clone
            + DeserializeOwned
            + serde::Serialize
            + std::fmt::Debug,
    {
        let mut object = object;
        object["apiVersion"] = json!(<K as K8sResource>::API_VERSION);
        object["kind"] = json!(<K as K8sResource>::KIND);
        let namespace = object["metadata"]["namespace"].as_str().map(str::to_owned);
        let resource: kube::core::DynamicObject = serde_json::from_value(object).unwrap();
        let plural = kube::core::ApiResource::erase::<K>(&());
        let api: Api<kube::core::DynamicObject> = match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), &namespace, &plural),
            None => Api::all_with(self.client.clone(), &plural),
        };
        let created = api.create(&PostParams::default(), &resource).await.unwrap();
        serde_json::from_value(serde_json::to_value(created).unwrap()).unwrap()
    }

    async fn deploy(&self, name: &str, replicas: i32, extra: Value) {
        let mut spec = json!({
            "replicas": replicas,
            "selector": { "matchLabels": { "app": name } },
            "template": { "metadata": { "labels": { "app": name } },
                          "spec": { "containers": [{ "name": "c", "image": "one", "ports": [{ "name": "http", "containerPort": 80 }] }] } },
        });
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        let deployment =
            json!({ "metadata": { "name": name, "namespace": "default" }, "spec": spec });
        self.create::<Deployment>(deployment).await;
    }

    async fn patch<K>(&self, name: &str, patch: Value)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        self.api::<K>()
            .patch(name, &PatchParams::default(), &Patch::Strategic(patch))
            .await
            .unwrap();
    }

    async fn set_image(&self, name: &str, image: &str) {
        let containers = json!([{ "name": "c", "image": image }]);
        self.patch::<Deployment>(
            name,
            json!({ "spec": { "template": { "spec": { "containers": containers } } } }),
        )
        .await;
    }

    async fn pods(&self, app: &str) -> Vec<Pod> {
        let params = ListParams::default().labels(&format!("app={app}"));
        self.api::<Pod>().list(&params).await.unwrap().items
    }

    async fn sets(&self, app: &str) -> Vec<ReplicaSet> {
        let params = ListParams::default().labels(&format!("app={app}"));
        self.api::<ReplicaSet>().list(&params).await.unwrap().items
    }

    /// Waits until the rollout is complete with so many pods of this image.
    async fn rolled_out(&self, name: &str, replicas: i32, image: &str) {
        eventually(
            &format!("{name} has {replicas} pods of {image}"),
            async || {
                let deployment = self.api::<Deployment>().get(name).await.unwrap();
                let status = deployment.status.clone().unwrap_or_default();
                let pods = self.pods(name).await;
                status.observed_generation == deployment.metadata.generation
                    && status.available_replicas.unwrap_or(0) == replicas
                    && status.updated_replicas.unwrap_or(0) == replicas
                    && status.replicas.unwrap_or(0) == replicas
                    && pods.len() == usize::try_from(replicas).unwrap()
                    && pods.iter().all(|pod| {
                        pod.spec.as_ref().unwrap().containers[0].image.as_deref() == Some(image)
                    })
            },
        )
        .await;
    }

    async fn has_event(&self, reason: &str, text: &str) {
        eventually(&format!("an event {reason} with {text:?}"), async || {
            let events = self
                .all::<Event>()
                .list(&ListParams::default())
                .await
                .unwrap();
            events.iter().any(|event| {
                event.reason.as_deref() == Some(reason)
                    && event.message.as_deref().unwrap_or_default().contains(text)
            })
        })
        .await;
    }
}

/// Waits until `holds`, at most ten seconds.
async fn eventually(what: &str, holds: impl AsyncFn() -> bool) {
    for _ in 0..1000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within ten seconds: {what}");
}

/// What the node agent does, without processes: bound pods become ready at once, ending ones go at once.
async fn agent(client: Client) {
    let next = AtomicU8::new(2);
    let mut events = watcher(Api::<Pod>::all(client.clone()), watcher::Config::default())
        .applied_objects()
        .boxed();
    while let Some(event) = events.next().await {
        let Ok(pod) = event else { continue };
        let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap());
        if pod
            .spec
            .as_ref()
            .is_none_or(|spec| spec.node_name.is_none())
        {
            continue;
        }
        // Errors: the pod has gone meanwhile.
        if pod.metadata.deletion_timestamp.is_some() {
            let _ = api
                .delete(&pod.name_any(), &DeleteParams::default().grace_period(0))
                .await;
        } else if let Some(phase) = end_of(&pod) {
            if !super::pod::is_finished(&pod) {
                let status = json!({ "status": { "phase": phase } });
                let (name, params) = (pod.name_any(), PatchParams::default());
                let _ = api
                    .patch_status(&name, &params, &Patch::Merge(status))
                    .await;
            }
        } else if !super::pod::is_ready(&pod) {
            let address = Ipv4Addr::new(10, 244, 0, next.fetch_add(1, Ordering::Relaxed));
            let ready = json!([{ "type": "Ready", "status": "True", "lastTransitionTime": super::events::now() }]);
            let status =
                json!({ "status": { "phase": "Running", "podIP": address, "conditions": ready } });
            let _ = api
                .patch_status(
                    &pod.name_any(),
                    &PatchParams::default(),
                    &Patch::Merge(status),
                )
                .await;
        }
    }
}

/// The phase in which the processes of such an image end at once.
fn end_of(pod: &Pod) -> Option<&'static str> {
    match pod.spec.as_ref()?.containers.first()?.image.as_deref()? {
        "succeeds" => Some("Succeeded"),
        "fails" => Some("Failed"),
        _ => None,
    }
}

fn revision(object: &Deployment) -> Option<String> {
    object
        .annotations()
        .get("deployment.kubernetes.io/revision")
        .cloned()
}

#[tokio::test]
async fn deployments_roll_out_scale_and_roll_back() {
    let cluster = Cluster::start().await;
    cluster.deploy("web", 3, json!({})).await;
    cluster.rolled_out("web", 3, "one").await;
    cluster
        .has_event("ScalingReplicaSet", "Scaled up replica set web-")
        .await;
    cluster.has_event("Scheduled", "to mesh-node").await;

    cluster
        .patch::<Deployment>("web", json!({ "spec": { "replicas": 5 } }))
        .await;
    cluster.rolled_out("web", 5, "one").await;
    cluster
        .patch::<Deployment>("web", json!({ "spec": { "replicas": 1 } }))
        .await;
    cluster.rolled_out("web", 1, "one").await;

    cluster.set_image("web", "two").await;
    cluster.rolled_out("web", 1, "two").await;
    assert_eq!(cluster.sets("web").await.len(), 2);
    let deployment = cluster.api::<Deployment>().get("web").await.unwrap();
    assert_eq!(revision(&deployment).as_deref(), Some("2"));

    cluster.set_image("web", "one").await;
    cluster.rolled_out("web", 1, "one").await;
    assert_eq!(
        cluster.sets("web").await.len(),
        2,
        "the old template's set is used again"
    );
    let deployment = cluster.api::<Deployment>().get("web").await.unwrap();
    assert_eq!(revision(&deployment).as_deref(), Some("3"));
    let conditions = deployment.status.unwrap().conditions.unwrap();
    let reasons: Vec<_> = conditions
        .iter()
        .filter_map(|condition| condition.reason.clone())
        .collect();
    assert_eq!(
        reasons,
        ["MinimumReplicasAvailable", "NewReplicaSetAvailable"]
    );
}

#[tokio::test]
async fn old_templates_beyond_the_history_go() {
    let cluster = Cluster::start().await;
    cluster
        .deploy("web", 1, json!({ "revisionHistoryLimit": 1 }))
        .await;
    for image in ["one", "two", "three", "four"] {
        cluster.set_image("web", image).await;
        cluster.rolled_out("web", 1, image).await;
    }
    eventually("two sets are left", async || {
        cluster.sets("web").await.len() == 2
    })
    .await;
}

#[tokio::test]
async fn recreate_ends_the_old_pods_first() {
    let cluster = Cluster::start().await;
    cluster
        .deploy("web", 2, json!({ "strategy": { "type": "Recreate" } }))
        .await;
    cluster.rolled_out("web", 2, "one").await;
    cluster.set_image("web", "two").await;
    cluster.rolled_out("web", 2, "two").await;
}

#[tokio::test]
async fn paused_deployments_wait() {
    let cluster = Cluster::start().await;
    cluster.deploy("web", 1, json!({})).await;
    cluster.rolled_out("web", 1, "one").await;
    cluster
        .patch::<Deployment>("web", json!({ "spec": { "paused": true } }))
        .await;
    cluster.set_image("web", "two").await;
    eventually("the pause is reported", async || {
        let deployment = cluster.api::<Deployment>().get("web").await.unwrap();
        let status = deployment.status.unwrap();
        status.observed_generation == deployment.metadata.generation
            && status
                .conditions
                .unwrap()
                .iter()
                .any(|condition| condition.reason.as_deref() == Some("DeploymentPaused"))
    })
    .await;
    assert_eq!(cluster.sets("web").await.len(), 1);
    cluster
        .patch::<Deployment>("web", json!({ "spec": { "paused": false } }))
        .await;
    cluster.rolled_out("web", 1, "two").await;
}

#[tokio::test]
async fn lost_pods_are_replaced_and_matching_ones_adopted() {
    let cluster = Cluster::start().await;
    cluster.deploy("web", 2, json!({})).await;
    cluster.rolled_out("web", 2, "one").await;
    let lost = cluster.pods("web").await.remove(0);
    cluster
        .api::<Pod>()
        .delete(&lost.name_any(), &DeleteParams::default())
        .await
        .unwrap();
    eventually("the pod is replaced", async || {
        let pods = cluster.pods("web").await;
        pods.len() == 2 && pods.iter().all(|pod| pod.uid() != lost.uid())
    })
    .await;

    // A pod whose labels change is let go and replaced.
    let freed = cluster.pods("web").await.remove(0);
    cluster
        .patch::<Pod>(
            &freed.name_any(),
            json!({ "metadata": { "labels": { "app": "other" } } }),
        )
        .await;
    eventually("the freed pod has no owner and a successor", async || {
        let pod = cluster.api::<Pod>().get(&freed.name_any()).await.unwrap();
        pod.owner_references().is_empty() && cluster.pods("web").await.len() == 2
    })
    .await;
    // With its labels back it is one too many: adopted, and one of the three goes.
    cluster
        .patch::<Pod>(
            &freed.name_any(),
            json!({ "metadata": { "labels": { "app": "web" } } }),
        )
        .await;
    eventually("two owned pods are left", async || {
        let pods = cluster.pods("web").await;
        pods.len() == 2 && pods.iter().all(|pod| pod.owner_references().len() == 1)
    })
    .await;
}

#[tokio::test]
async fn services_get_endpoints_and_slices() {
    let cluster = Cluster::start().await;
    let service = json!({
        "metadata": { "name": "web", "namespace": "default", "labels": { "team": "t" } },
        "spec": { "selector": { "app": "web" }, "ports": [{ "name": "http", "port": 80, "targetPort": "http" }] },
    });
    cluster.create::<Service>(service).await;
    cluster.deploy("web", 2, json!({})).await;
    cluster.rolled_out("web", 2, "one").await;
    let addresses = async || {
        let endpoints = cluster.api::<Endpoints>().get_opt("web").await.unwrap();
        let subsets = endpoints
            .and_then(|endpoints| endpoints.subsets)
            .unwrap_or_default();
        subsets
            .into_iter()
            .flat_map(|subset| subset.addresses.unwrap_or_default())
            .count()
    };
    let slice = async || {
        let params = ListParams::default().labels("kubernetes.io/service-name=web");
        let slices = cluster
            .api::<EndpointSlice>()
            .list(&params)
            .await
            .unwrap()
            .items;
        slices
            .into_iter()
            .flat_map(|slice| slice.endpoints.unwrap_or_default())
            .count()
    };
    eventually("both pods are endpoints", async || {
        addresses().await == 2 && slice().await == 2
    })
    .await;
    cluster
        .patch::<Deployment>("web", json!({ "spec": { "replicas": 0 } }))
        .await;
    eventually("no endpoints are left", async || {
        addresses().await == 0 && slice().await == 0
    })
    .await;
    cluster
        .api::<Service>()
        .delete("web", &DeleteParams::default())
        .await
        .unwrap();
    eventually("they go with the Service", async || {
        let params = ListParams::default().labels("kubernetes.io/service-name=web");
        cluster
            .api::<EndpointSlice>()
            .list(&params)
            .await
            .unwrap()
            .items
            .is_empty()
            && cluster
                .api::<Endpoints>()
                .get_opt("web")
                .await
                .unwrap()
                .is_none()
    })
    .await;
    eventually("the API server's own endpoints are there", async || {
        cluster
            .api::<EndpointSlice>()
            .get_opt("kubernetes")
            .await
            .unwrap()
            .is_some()
    })
    .await;
}

#[tokio::test]
async fn endpoints_written_by_hand_are_mirrored() {
    let cluster = Cluster::start().await;
    let meta = json!({ "name": "outside", "namespace": "default" });
    cluster
        .create::<Service>(json!({ "metadata": meta, "spec": { "ports": [{ "port": 443 }] } }))
        .await;
    let subsets = json!([{ "addresses": [{ "ip": "192.0.2.1" }], "ports": [{ "port": 443 }] }]);
    cluster
        .create::<Endpoints>(json!({ "metadata": meta, "subsets": subsets }))
        .await;
    eventually("a slice has the address", async || {
        let params = ListParams::default().labels("kubernetes.io/service-name=outside");
        let slices = cluster
            .api::<EndpointSlice>()
            .list(&params)
            .await
            .unwrap()
            .items;
        slices
            .iter()
            .flat_map(|slice| slice.endpoints.iter().flatten())
            .any(|e| e.addresses == ["192.0.2.1"])
    })
    .await;
}

#[tokio::test]
async fn pods_without_a_suitable_node_say_so() {
    let cluster = Cluster::start().await;
    let spec = json!({ "nodeSelector": { "disk": "tape" }, "containers": [{ "name": "c", "image": "i" }] });
    cluster
        .create::<Pod>(
            json!({ "metadata": { "name": "picky", "namespace": "default" }, "spec": spec }),
        )
        .await;
    cluster
        .has_event(
            "FailedScheduling",
            "didn't match Pod's node affinity/selector",
        )
        .await;
    eventually("the condition is set", async || {
        let pod = cluster.api::<Pod>().get("picky").await.unwrap();
        super::pod::condition(&pod, "PodScheduled")
            .is_some_and(|c| c.reason.as_deref() == Some("Unschedulable"))
    })
    .await;
    let patch = Patch::Merge(json!({ "metadata": { "labels": { "disk": "tape" } } }));
    cluster
        .all::<Node>()
        .patch("mesh-node", &PatchParams::default(), &patch)
        .await
        .unwrap();
    eventually("it is bound once the node suits", async || {
        cluster
            .api::<Pod>()
            .get("picky")
            .await
            .unwrap()
            .spec
            .unwrap()
            .node_name
            .is_some()
    })
    .await;
}

#[tokio::test]
async fn owned_objects_go_with_their_owner() {
    let cluster = Cluster::start().await;
    for policy in [PropagationPolicy::Background, PropagationPolicy::Foreground] {
        cluster.deploy("web", 2, json!({})).await;
        cluster.rolled_out("web", 2, "one").await;
        let params = DeleteParams {
            propagation_policy: Some(policy.clone()),
            ..DeleteParams::default()
        };
        cluster
            .api::<Deployment>()
            .delete("web", &params)
            .await
            .unwrap();
        eventually(&format!("nothing is left after {policy:?}"), async || {
            cluster.pods("web").await.is_empty()
                && cluster.sets("web").await.is_empty()
                && cluster
                    .api::<Deployment>()
                    .get_opt("web")
                    .await
                    .unwrap()
                    .is_none()
        })
        .await;
    }
    cluster.deploy("web", 2, json!({})).await;
    cluster.rolled_out("web", 2, "one").await;
    cluster
        .api::<Deployment>()
        .delete("web", &DeleteParams::orphan())
        .await
        .unwrap();
    eventually("the set is orphaned", async || {
        let gone = cluster
            .api::<Deployment>()
            .get_opt("web")
            .await
            .unwrap()
            .is_none();
        let sets = cluster.sets("web").await;
        gone && sets.len() == 1 && sets[0].owner_references().is_empty()
    })
    .await;
    assert_eq!(cluster.pods("web").await.len(), 2);
}

#[tokio::test]
async fn namespaces_are_furnished_and_emptied() {
    let cluster = Cluster::start().await;
    let source = json!({ "metadata": { "name": "kube-root-ca.crt", "namespace": "kube-system" }, "data": { "ca.crt": "PEM" } });
    cluster.create::<ConfigMap>(source).await;
    cluster
        .create::<Namespace>(json!({ "metadata": { "name": "shop" } }))
        .await;
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client.clone(), "shop");
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "shop");
    eventually("account and certificate are there", async || {
        let map = maps.get_opt("kube-root-ca.crt").await.unwrap();
        accounts.get_opt("default").await.unwrap().is_some()
            && map.is_some_and(|map| {
                map.data
                    .unwrap_or_default()
                    .get("ca.crt")
                    .is_some_and(|pem| pem == "PEM")
            })
    })
    .await;
    accounts
        .delete("default", &DeleteParams::default())
        .await
        .unwrap();
    eventually("the account comes back", async || {
        accounts.get_opt("default").await.unwrap().is_some()
    })
    .await;

    cluster
        .create::<ConfigMap>(json!({ "metadata": { "name": "m", "namespace": "shop" } }))
        .await;
    let spec = json!({ "containers": [{ "name": "c", "image": "i" }] });
    cluster
        .create::<Pod>(json!({ "metadata": { "name": "p", "namespace": "shop" }, "spec": spec }))
        .await;
    cluster
        .all::<Namespace>()
        .delete("shop", &DeleteParams::default())
        .await
        .unwrap();
    eventually("the namespace is gone", async || {
        cluster
            .all::<Namespace>()
            .get_opt("shop")
            .await
            .unwrap()
            .is_none()
            && cluster
                .all::<Pod>()
                .list(&ListParams::default())
                .await
                .unwrap()
                .items
                .is_empty()
    })
    .await;
}
