//! Endpoints (the old kind, one object for each Service), and the endpoints of the API server's own Service.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::membership::{self, Member, Port};
use super::queue::{Key, Queue};
use super::{Context, Doing as _, Error, Outcome};

/// Label of headless Services' endpoints, read by clients that balance themselves.
pub(super) const HEADLESS: &str = "service.kubernetes.io/headless";
/// Says that the Endpoints are this controller's, and so not to be mirrored.
const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const MANAGER: &str = "endpoint-controller";

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("endpoints");
    subscribe(context, &queue);
    queue
}

/// Puts a Service into `queue` when it or one of its pods changes.
pub(super) fn subscribe(context: &Context, queue: &Arc<Queue>) {
    let own = queue.clone();
    context.services.subscribe(move |old, new| {
        if let Some(service) = new.or(old) {
            own.add(Key::of(&**service));
        }
    });
    let (own, services) = (queue.clone(), context.services.clone());
    context.pods.subscribe(move |old, new| {
        if let (Some(old), Some(new)) = (old, new)
            && !membership::member_changed(old, new)
        {
            return;
        }
        let Some(pod) = new.or(old) else { return };
        for service in services.in_namespace(&pod.namespace().unwrap_or_default()) {
            if [old, new]
                .into_iter()
                .flatten()
                .any(|pod| selects(&service, pod))
            {
                own.add(Key::of(&*service));
            }
        }
    });
}

fn selects(service: &Service, pod: &Pod) -> bool {
    membership::is_selecting(service)
        && service
            .spec
            .iter()
            .flat_map(|spec| spec.selector.iter().flatten())
            .all(|(key, value)| pod.labels().get(key) == Some(value))
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let current = context.endpoints.get(&key);
    let Some(service) = context.services.get(&key) else {
        // What was kept for a Service goes with it; Endpoints that somebody made by hand stay.
        if let Some(endpoints) = current.filter(|endpoints| is_managed(endpoints)) {
            delete(&context, &endpoints).await?;
        }
        return Ok(None);
    };
    if !membership::is_selecting(&service) || service.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let wanted = wanted(&service, &context.pods.in_namespace(&key.namespace));
    write(&context, &key, current.as_deref(), &wanted).await?;
    Ok(None)
}

fn is_managed(endpoints: &Endpoints) -> bool {
    endpoints
        .labels()
        .get(MANAGED_BY)
        .is_some_and(|manager| manager == MANAGER)
}

/// The Endpoints that `service` should have.
fn wanted(service: &Service, pods: &[Arc<Pod>]) -> Endpoints {
    let mut labels: BTreeMap<String, String> = service.labels().clone();
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    if membership::is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    let subsets: Vec<_> = membership::members(service, pods)
        .into_iter()
        .filter_map(|(ports, members)| subset(&ports, &members))
        .collect();
    Endpoints {
        metadata: ObjectMeta {
            name: service.metadata.name.clone(),
            namespace: service.metadata.namespace.clone(),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        subsets: (!subsets.is_empty()).then_some(subsets),
    }
}

fn subset(ports: &[Port], members: &[Member]) -> Option<EndpointSubset> {
    let addresses = |ready: bool| {
        let addresses: Vec<_> = members
            .iter()
            // A pod that ends is in neither list, unless it is published in any state.
            .filter(|member| member.ready == ready && (ready || !member.terminating))
            .map(|member| EndpointAddress {
                ip: member.address.clone(),
                hostname: member.hostname.clone(),
                node_name: member.node.clone(),
                target_ref: Some(member.target.clone()),
            })
            .collect();
        (!addresses.is_empty()).then_some(addresses)
    };
    let (ready, not_ready) = (addresses(true), addresses(false));
    if ready.is_none() && not_ready.is_none() {
        return None;
    }
    let ports: Vec<_> = ports
        .iter()
        .map(|port| EndpointPort {
            name: Some(port.name.clone()).filter(|name| !name.is_empty()),
            port: port.port,
            protocol: Some(port.protocol.clone()),
            app_protocol: port.app_protocol.clone(),
        })
        .collect();
    Some(EndpointSubset {
        addresses: ready,
        not_ready_addresses: not_ready,
        ports: (!ports.is_empty()).then_some(ports),
    })
}

async fn write(
    context: &Context,
    key: &Key,
    current: Option<&Endpoints>,
    wanted: &Endpoints,
) -> Result<(), Error> {
    let api: Api<Endpoints> = Api::namespaced(context.client.clone(), &key.namespace);
    let doing = || format!("writing the Endpoints {key}");
    let written = match current {
        None => api
            .create(&PostParams::default(), wanted)
            .await
            .doing(doing)?,
        Some(current)
            if current.subsets == wanted.subsets
                && current.metadata.labels == wanted.metadata.labels =>
        {
            return Ok(());
        }
        Some(_) => {
            // One writer: a merge patch of both fields needs no resource version.
            let patch = json!({ "metadata": { "labels": wanted.metadata.labels }, "subsets": wanted.subsets });
            api.patch(&key.name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .doing(doing)?
        }
    };
    context.endpoints.observe(written);
    Ok(())
}

async fn delete(context: &Context, endpoints: &Endpoints) -> Result<(), Error> {
    let key = Key::of(endpoints);
    let api: Api<Endpoints> = Api::namespaced(context.client.clone(), &key.namespace);
    match api.delete(&key.name, &DeleteParams::default()).await {
        Ok(_) => context.endpoints.forget(endpoints),
        Err(error) if super::is_not_found(&error) => {}
        Err(error) => return Err(error).doing(|| format!("deleting the Endpoints {key}")),
    }
    Ok(())
}

/// Where pods reach the API server: the node's address and port behind the Service `kubernetes`.
const API_SERVER: (&str, i32) = ("10.244.0.1", 6443);

/// Writes the endpoints of the Service `kubernetes`, which no selector gives. A failure is logged: the address is fixed,
/// and the next start writes it again.
pub(super) async fn publish_api_server(context: &Context) {
    let (address, port) = API_SERVER;
    let meta = |labels: serde_json::Value| json!({ "name": "kubernetes", "namespace": "default", "labels": labels });
    let endpoints = json!({
        "apiVersion": "v1", "kind": "Endpoints",
        "metadata": meta(json!({ "endpointslice.kubernetes.io/skip-mirror": "true" })),
        "subsets": [{ "addresses": [{ "ip": address }], "ports": [{ "name": "https", "port": port, "protocol": "TCP" }] }],
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": meta(json!({ "kubernetes.io/service-name": "kubernetes" })),
        "addressType": "IPv4",
        "endpoints": [{ "addresses": [address], "conditions": { "ready": true } }],
        "ports": [{ "name": "https", "port": port, "protocol": "TCP" }],
    });
    let params = PatchParams::apply("kube-apiserver").force();
    let old: Api<Endpoints> = Api::namespaced(context.client.clone(), "default");
    let new: Api<EndpointSlice> = Api::namespaced(context.client.clone(), "default");
    let results = [
        old.patch("kubernetes", &params, &Patch::Apply(endpoints))
            .await
            .map(drop),
        new.patch("kubernetes", &params, &Patch::Apply(slice))
            .await
            .map(drop),
    ];
    for error in results.into_iter().filter_map(Result::err) {
        tracing::warn!(%error, "writing the endpoints of the Service kubernetes failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_unready_and_ending_pods_are_told_apart() {
        let service: Service = serde_json::from_value(json!({
            "metadata": { "name": "web", "namespace": "a", "labels": { "team": "t" } },
            "spec": { "clusterIP": "None", "selector": { "app": "web" }, "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] },
        }))
        .unwrap();
        let pod = |name: &str, ip: &str, ready: bool, ending: bool| -> Arc<Pod> {
            let pod = json!({
                "metadata": { "name": name, "namespace": "a", "labels": { "app": "web" },
                              "deletionTimestamp": ending.then_some("2026-01-01T00:00:00Z") },
                "spec": { "containers": [] },
                "status": { "podIP": ip, "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }] },
            });
            Arc::new(serde_json::from_value(pod).unwrap())
        };
        let pods = [
            pod("a", "1.1.1.1", true, false),
            pod("b", "1.1.1.2", false, false),
            pod("c", "1.1.1.3", true, true),
        ];

        let endpoints = wanted(&service, &pods);

        assert_eq!(endpoints.labels()["team"], "t");
        assert!(endpoints.labels().contains_key(HEADLESS));
        let subset = &endpoints.subsets.as_ref().unwrap()[0];
        let ips = |list: &Option<Vec<EndpointAddress>>| {
            list.iter()
                .flatten()
                .map(|a| a.ip.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(ips(&subset.addresses), ["1.1.1.1"]);
        assert_eq!(ips(&subset.not_ready_addresses), ["1.1.1.2"]);
        assert_eq!(subset.ports.as_ref().unwrap()[0].port, 8080);
        assert_eq!(wanted(&service, &[]).subsets, None);
    }
}
