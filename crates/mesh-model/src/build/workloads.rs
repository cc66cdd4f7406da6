//! Pods as the mesh sees them.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::core::{Container, Pod};

use crate::objects::{Name, Objects};
use crate::service::Workload;

pub(crate) fn build(objects: &Objects) -> BTreeMap<Name, Arc<Workload>> {
    let running = objects
        .pods
        .iter()
        .filter(|(_, pod)| !matches!(pod.status.phase.as_str(), "Succeeded" | "Failed"));
    running
        .map(|(name, pod)| (name.clone(), Arc::new(workload(pod, objects))))
        .collect()
}

fn workload(pod: &Pod, objects: &Objects) -> Workload {
    let node = objects
        .nodes
        .get(&(String::new(), pod.spec.node_name.clone()));
    Workload {
        pod: pod.meta.name.clone(),
        namespace: pod.meta.namespace.clone(),
        name: pod.workload_name().to_owned(),
        labels: pod.meta.labels.clone(),
        service_account: pod.service_account().to_owned(),
        node: pod.spec.node_name.clone(),
        address: if pod.spec.host_network {
            None
        } else {
            pod.status.pod_ip.parse().ok()
        },
        locality: locality(pod, node.map(|node| node.locality()).unwrap_or_default()),
        named_ports: named_ports(pod),
    }
}

/// The label `istio-locality` (parts divided by dots, since labels have no slashes) wins over the node's locality.
fn locality(pod: &Pod, of_node: String) -> String {
    match pod.meta.labels.get("istio-locality") {
        Some(label) if !label.is_empty() => label.replace('.', "/"),
        _ => of_node,
    }
}

/// Ports of containers and native sidecars; of two with one name the first counts.
fn named_ports(pod: &Pod) -> BTreeMap<String, u16> {
    let sidecars = pod
        .spec
        .init_containers
        .iter()
        .filter(|container: &&Container| container.restart_policy == "Always");
    let mut named = BTreeMap::new();
    for port in pod
        .spec
        .containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| &container.ports)
    {
        if !port.name.is_empty() {
            named
                .entry(port.name.clone())
                .or_insert(port.container_port);
        }
    }
    named
}
