//! From intent to xDS.
//!
//! **What**: [`translate`] makes the [`Resources`] (listeners, routes, clusters, endpoints, the table of names) that one node gets, with Istio's names and shapes.
//! **In**: a [`mesh_model::Mesh`] and a [`mesh_model::Node`].
//! **Out**: encoded Envoy messages by name, each with a hash of its content as version; the same input gives the same bytes.
//! **Never**: no IO, no clock, no state between calls; nothing that the mesh does not say.
//! **Start here**: [`translate`], then `outbound.rs`, `inbound.rs` and `gateway.rs`; `route.rs` holds the HTTP rules, `virtual_host.rs` the
//! tables that they stand in, `tcp.rs` the rules for TLS and TCP.

mod cluster;
mod endpoint;
mod envoy_filter;
mod gateway;
mod inbound;
mod listener;
mod metadata;
mod name_table;
mod names;
mod outbound;
mod pb;
mod policy;
mod resources;
mod route;
mod tcp;
mod tls;
mod virtual_host;

pub use resources::{CLUSTER, ENDPOINT, LISTENER, ROUTE, Resource, Resources};

use mesh_model::{Mesh, Node, NodeKind};

/// Makes everything that a node gets. Depends on nothing but its arguments.
pub fn translate(mesh: &Mesh, node: &Node) -> Resources {
    let mut resources = Resources::default();
    resources.clusters.extend(cluster::fixed(mesh, node));
    add_services(mesh, node, &mut resources);
    match node.kind {
        NodeKind::Sidecar => {
            outbound::add(mesh, node, &mut resources);
            inbound::add(mesh, node, &mut resources);
            name_table::add(mesh, node, &mut resources);
        }
        NodeKind::Router => gateway::add(mesh, node, &mut resources),
    }
    envoy_filter::apply(mesh, node, &mut resources);
    resources.notes.sort();
    resources.notes.dedup();
    resources.problems.sort();
    resources.problems.dedup();
    resources
}

/// Clusters and endpoints of all visible services, whole and by subset.
fn add_services(mesh: &Mesh, node: &Node, resources: &mut Resources) {
    for service in mesh
        .visible_services(&node.namespace)
        .filter(|service| service.external_name.is_none() || mesh.is_outside(service))
    {
        let rule = mesh.destination_rule_for(&service.host, node);
        let subsets: Vec<&str> = rule
            .map(|rule| rule.subsets.keys().map(String::as_str).collect())
            .unwrap_or_default();
        for port in &service.ports {
            for subset in std::iter::once("").chain(subsets.iter().copied()) {
                cluster::add_outbound(mesh, node, service, port, subset, resources);
            }
        }
    }
}
