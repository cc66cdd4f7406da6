//! The names by which a sidecar answers its application's DNS queries.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_envoy_json::{NAME_TABLE, NameInfo, NameTable};
use mesh_model::{Health, Mesh, Node, Service};

use crate::resources::{Resource, Resources};

/// The name of the only resource; Istio's has none, and agents don't look at it.
const NAME: &str = "nametable";
/// The registry of services that have short names (Istio's provider id).
const KUBERNETES: &str = "Kubernetes";

/// Adds the table for a node that asks for one (Istio: `pkg/dns/server`).
pub(crate) fn add(mesh: &Mesh, node: &Node, resources: &mut Resources) {
    if !node.captures_dns() {
        return;
    }
    let services = mesh.visible_services(&node.namespace);
    let entries = services.filter_map(|service| Some((service.host.clone(), entry(service)?)));
    let table = NameTable {
        table: entries.collect(),
    };
    resources
        .name_tables
        .insert(NAME.to_owned(), Resource::new(NAME_TABLE, &table));
}

/// `None` for a name that the cluster's own DNS must answer: another name for something outside, a service whose pods are not there yet.
fn entry(service: &Service) -> Option<NameInfo> {
    if service.external_name.is_some() {
        return None;
    }
    let addresses: BTreeSet<IpAddr> = if service.headless {
        let endpoints = service.endpoints.values().flatten();
        let ready = endpoints.filter(|endpoint| endpoint.health == Health::Ready);
        ready.map(|endpoint| endpoint.address).collect()
    } else {
        service.addresses.iter().copied().collect()
    };
    (!addresses.is_empty()).then(|| NameInfo {
        ips: addresses.iter().map(ToString::to_string).collect(),
        registry: KUBERNETES.to_owned(),
        shortname: service.name.clone(),
        namespace: service.namespace.clone(),
    })
}
