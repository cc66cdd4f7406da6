//! EndpointSlice: the addresses behind each Service, and copies of Endpoints that somebody wrote by hand.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Endpoints, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt as _};
use serde_json::json;

use super::endpoints::{self, HEADLESS};
use super::membership::{self, Member, Port};
use super::pod;
use super::queue::{Key, Queue};
use super::{Context, Doing as _, Error, Outcome};

/// Names the Service of a slice.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Values of [`MANAGED_BY`]: slices made from pods, slices copied from Endpoints.
const FROM_PODS: &str = "endpointslice-controller.k8s.io";
const FROM_ENDPOINTS: &str = "endpointslicemirroring-controller.k8s.io";
/// Set on Endpoints that are not to be copied.
const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Endpoints in one slice at most (the API's limit).
const MAX_ENDPOINTS: usize = 1000;

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("endpointslice");
    endpoints::subscribe(context, &queue);
    let own = queue.clone();
    // Somebody changed or removed a slice of ours: put it right.
    context.slices.subscribe(move |old, new| {
        if let Some(slice) = new.or(old).filter(|slice| is_managed(slice, FROM_PODS)) {
            own.add(Key::new(
                slice.namespace().unwrap_or_default(),
                service_name(slice),
            ));
        }
    });
    queue
}

pub(super) fn mirror_queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("endpointslicemirroring");
    let own = queue.clone();
    context.endpoints.subscribe(move |old, new| {
        if let Some(endpoints) = new.or(old) {
            own.add(Key::of(&**endpoints));
        }
    });
    let own = queue.clone();
    context.services.subscribe(move |old, new| {
        if let Some(service) = new.or(old) {
            own.add(Key::of(&**service));
        }
    });
    queue
}

fn is_managed(slice: &EndpointSlice, manager: &str) -> bool {
    slice
        .labels()
        .get(MANAGED_BY)
        .is_some_and(|found| found == manager)
}

fn service_name(slice: &EndpointSlice) -> &str {
    slice.labels().get(SERVICE_NAME).map_or("", String::as_str)
}

/// Keeps the slices of one Service.
pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let wanted = match context.services.get(&key) {
        Some(service)
            if membership::is_selecting(&service)
                && service.metadata.deletion_timestamp.is_none() =>
        {
            from_pods(&service, &context.pods.in_namespace(&key.namespace))
        }
        _ => Vec::new(),
    };
    converge(&context, &key, FROM_PODS, wanted).await
}

/// Keeps the copies of one Endpoints object that no selector gave.
pub(super) async fn mirror(context: Arc<Context>, key: Key) -> Outcome {
    let wanted = match (context.services.get(&key), context.endpoints.get(&key)) {
        (Some(service), Some(endpoints))
            if !membership::is_selecting(&service)
                && !endpoints.labels().contains_key(SKIP_MIRROR) =>
        {
            from_endpoints(&endpoints)
        }
        _ => Vec::new(),
    };
    converge(&context, &key, FROM_ENDPOINTS, wanted).await
}

/// Makes the slices of the Service `key` that `manager` keeps equal to `wanted`.
async fn converge(
    context: &Context,
    key: &Key,
    manager: &'static str,
    wanted: Vec<EndpointSlice>,
) -> Outcome {
    let mut current: BTreeMap<String, Arc<EndpointSlice>> = context
        .slices
        .in_namespace(&key.namespace)
        .into_iter()
        .filter(|slice| is_managed(slice, manager) && service_name(slice) == key.name)
        .map(|slice| (slice.name_any(), slice))
        .collect();
    let api: Api<EndpointSlice> = Api::namespaced(context.client.clone(), &key.namespace);
    for slice in wanted {
        let name = slice.name_any();
        let written = match current.remove(&name) {
            Some(current) if is_same(&current, &slice) => continue,
            Some(_) => {
                let labels = &slice.metadata.labels;
                let patch = json!({ "metadata": { "labels": labels }, "endpoints": slice.endpoints, "ports": slice.ports });
                api.patch(&name, &PatchParams::default(), &Patch::Merge(patch))
                    .await
            }
            None => api.create(&PostParams::default(), &slice).await,
        };
        context.slices.observe(
            written.doing(|| format!("writing the EndpointSlice {}/{name}", key.namespace))?,
        );
    }
    for (name, slice) in current {
        delete(context, &api, &name, &slice).await?;
    }
    Ok(None)
}

fn is_same(current: &EndpointSlice, wanted: &EndpointSlice) -> bool {
    current.endpoints.as_deref().unwrap_or_default()
        == wanted.endpoints.as_deref().unwrap_or_default()
        && current.ports.as_deref().unwrap_or_default()
            == wanted.ports.as_deref().unwrap_or_default()
        && current.metadata.labels == wanted.metadata.labels
}

async fn delete(
    context: &Context,
    api: &Api<EndpointSlice>,
    name: &str,
    slice: &EndpointSlice,
) -> Result<(), Error> {
    match api.delete(name, &DeleteParams::default()).await {
        Ok(_) => context.slices.forget(slice),
        Err(error) if super::is_not_found(&error) => {}
        Err(error) => return Err(error).doing(|| format!("deleting the EndpointSlice {name}")),
    }
    Ok(())
}

/// The slices that `service` should have. There is always one, so that a watcher can tell "nobody" from "not known yet".
fn from_pods(service: &Service, pods: &[Arc<Pod>]) -> Vec<EndpointSlice> {
    let mut groups = membership::members(service, pods);
    if groups.is_empty() {
        groups.insert(Vec::new(), Vec::new());
    }
    let mut labels = service.labels().clone();
    labels.insert(SERVICE_NAME.into(), service.name_any());
    labels.insert(MANAGED_BY.into(), FROM_PODS.into());
    if membership::is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    let uid = service.uid().unwrap_or_default();
    let mut slices = Vec::new();
    for (ports, members) in groups {
        let chunks: Vec<_> = if members.is_empty() {
            vec![&[][..]]
        } else {
            members.chunks(MAX_ENDPOINTS).collect()
        };
        for (index, chunk) in chunks.into_iter().enumerate() {
            let suffix = suffix(&format!("{uid} {ports:?} {index}"));
            slices.push(EndpointSlice {
                metadata: ObjectMeta {
                    name: Some(format!("{}-{suffix}", service.name_any())),
                    namespace: service.namespace(),
                    labels: Some(labels.clone()),
                    owner_references: Some(vec![pod::controlled_by(service)]),
                    ..ObjectMeta::default()
                },
                address_type: "IPv4".into(),
                endpoints: Some(chunk.iter().map(endpoint).collect()),
                ports: Some(ports.iter().map(slice_port).collect()),
            });
        }
    }
    slices
}

fn endpoint(member: &Member) -> Endpoint {
    Endpoint {
        addresses: vec![member.address.clone()],
        conditions: Some(EndpointConditions {
            ready: Some(member.ready),
            serving: Some(member.serving),
            terminating: Some(member.terminating),
        }),
        hostname: member.hostname.clone(),
        node_name: member.node.clone(),
        target_ref: Some(member.target.clone()),
        ..Endpoint::default()
    }
}

fn slice_port(port: &Port) -> EndpointPort {
    EndpointPort {
        name: Some(port.name.clone()),
        port: Some(port.port),
        protocol: Some(port.protocol.clone()),
        app_protocol: port.app_protocol.clone(),
    }
}

/// Copies of `endpoints`, one slice for each subset.
fn from_endpoints(endpoints: &Endpoints) -> Vec<EndpointSlice> {
    let mut labels = endpoints.labels().clone();
    labels.insert(SERVICE_NAME.into(), endpoints.name_any());
    labels.insert(MANAGED_BY.into(), FROM_ENDPOINTS.into());
    let owner = OwnerReference {
        api_version: Endpoints::api_version(&()).into_owned(),
        kind: Endpoints::kind(&()).into_owned(),
        name: endpoints.name_any(),
        uid: endpoints.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    };
    let subsets = endpoints.subsets.iter().flatten().enumerate();
    subsets
        .map(|(index, subset)| {
            let addresses = |list: &Option<Vec<_>>, ready: bool| {
                list.clone()
                    .unwrap_or_default()
                    .into_iter()
                    .map(move |address| mirrored(address, ready))
            };
            let all = addresses(&subset.addresses, true)
                .chain(addresses(&subset.not_ready_addresses, false));
            let ports = subset.ports.iter().flatten().map(|port| EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                port: Some(port.port),
                protocol: port.protocol.clone().or_else(|| Some("TCP".into())),
                app_protocol: port.app_protocol.clone(),
            });
            EndpointSlice {
                metadata: ObjectMeta {
                    name: Some(format!(
                        "{}-{}",
                        endpoints.name_any(),
                        suffix(&format!("{} {index}", owner.uid))
                    )),
                    namespace: endpoints.namespace(),
                    labels: Some(labels.clone()),
                    owner_references: Some(vec![owner.clone()]),
                    ..ObjectMeta::default()
                },
                address_type: "IPv4".into(),
                endpoints: Some(all.take(MAX_ENDPOINTS).collect()),
                ports: Some(ports.collect()),
            }
        })
        .collect()
}

fn mirrored(address: k8s_openapi::api::core::v1::EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            ..EndpointConditions::default()
        }),
        hostname: address.hostname,
        node_name: address.node_name,
        target_ref: address.target_ref,
        ..Endpoint::default()
    }
}

/// Five letters that depend on `seed` alone, so that a second try writes the same slice.
fn suffix(seed: &str) -> String {
    super::deployment::safe_encode(&format!(
        "{:010}",
        super::deployment::fnv32a(seed.as_bytes())
    ))[5..]
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Service {
        serde_json::from_value(json!({
            "metadata": { "name": "web", "namespace": "a", "uid": "u", "labels": { "team": "t" } },
            "spec": { "selector": { "app": "web" }, "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] },
        }))
        .unwrap()
    }

    fn pods(count: usize) -> Vec<Arc<Pod>> {
        let pod = |index: usize| {
            let pod = json!({
                "metadata": { "name": format!("p{index:04}"), "namespace": "a", "labels": { "app": "web" } },
                "spec": { "nodeName": "n", "containers": [] },
                "status": { "podIP": format!("10.244.{}.{}", index / 256, index % 256),
                            "conditions": [{ "type": "Ready", "status": "True" }] },
            });
            Arc::new(serde_json::from_value(pod).unwrap())
        };
        (0..count).map(pod).collect()
    }

    #[test]
    fn a_service_has_one_slice_even_without_pods() {
        let slices = from_pods(&service(), &[]);
        assert_eq!(slices.len(), 1);
        assert_eq!(slices[0].endpoints.as_deref(), Some(&[][..]));
        assert_eq!(slices[0].labels()[SERVICE_NAME], "web");
        assert_eq!(slices[0].labels()["team"], "t");
    }

    #[test]
    fn names_are_stable_and_slices_are_cut_at_the_limit() {
        let slices = from_pods(&service(), &pods(MAX_ENDPOINTS + 1));
        assert_eq!(
            slices
                .iter()
                .map(|slice| slice.endpoints.as_ref().unwrap().len())
                .collect::<Vec<_>>(),
            [1000, 1]
        );
        assert_ne!(slices[0].name_any(), slices[1].name_any());
        assert_eq!(
            from_pods(&service(), &pods(1))[0].name_any(),
            slices[0].name_any()
        );
        let endpoint = &slices[0].endpoints.as_ref().unwrap()[0];
        assert_eq!(endpoint.conditions.as_ref().unwrap().ready, Some(true));
        assert_eq!(
            endpoint.target_ref.as_ref().unwrap().name.as_deref(),
            Some("p0000")
        );
        assert_eq!(slices[0].ports.as_ref().unwrap()[0].port, Some(8080));
    }

    #[test]
    fn endpoints_made_by_hand_are_copied() {
        let endpoints: Endpoints = serde_json::from_value(json!({
            "metadata": { "name": "ext", "namespace": "a", "uid": "e" },
            "subsets": [{ "addresses": [{ "ip": "192.0.2.1" }], "notReadyAddresses": [{ "ip": "192.0.2.2" }],
                          "ports": [{ "port": 443 }] }],
        }))
        .unwrap();
        let slices = from_endpoints(&endpoints);
        let states: Vec<_> = slices[0]
            .endpoints
            .iter()
            .flatten()
            .map(|endpoint| {
                (
                    endpoint.addresses[0].as_str(),
                    endpoint.conditions.as_ref().unwrap().ready,
                )
            })
            .collect();
        assert_eq!(
            states,
            [("192.0.2.1", Some(true)), ("192.0.2.2", Some(false))]
        );
        assert_eq!(slices[0].labels()[SERVICE_NAME], "ext");
    }
}
