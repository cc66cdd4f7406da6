//! AUTO_PASSTHROUGH: mutual TLS of the mesh is passed on, unopened, to the cluster that its server name says.

use envoy_types::pb::envoy::config::listener::v3::{FilterChain, FilterChainMatch};
use mesh_model::{GatewayServer, Mesh, Node, hostname};

use crate::listener::tcp_chain;
use crate::resources::Resources;
use crate::tls::texts;
use crate::{cluster, names};

/// What clients of the mesh say that they speak: without one of these, TLS is the application's own, and could be for anyone.
const MESH_ALPN: &[&str] = &[
    "istio",
    "istio-peer-exchange",
    "istio-http/1.0",
    "istio-http/1.1",
    "istio-h2",
];

/// A chain, and a cluster without TLS of its own, for each port and subset of the services that the server is for.
pub(super) fn chains(
    mesh: &Mesh,
    node: &Node,
    server: &GatewayServer,
    resources: &mut Resources,
) -> Vec<FilterChain> {
    let mut chains = Vec::new();
    let inside = mesh
        .visible_services(&node.namespace)
        .filter(|service| service.external_name.is_none());
    for service in inside.filter(|service| {
        let mut hosts = server.hosts.iter();
        hosts.any(|(_, host)| host == "*" || hostname::covers(host, &service.host))
    }) {
        let rule = mesh.destination_rule_for(&service.host, node);
        let subsets = rule.into_iter().flat_map(|rule| rule.subsets.keys());
        let subsets: Vec<&str> = std::iter::once("")
            .chain(subsets.map(String::as_str))
            .collect();
        for port in &service.ports {
            for subset in &subsets {
                let name = names::sni(port.number, subset, &service.host);
                // Two servers may be for the same service.
                if resources.clusters.contains_key(&name) {
                    continue;
                }
                cluster::add_passed_on(mesh, node, service, port, subset, resources);
                let condition = FilterChainMatch {
                    server_names: vec![name.clone()],
                    application_protocols: texts(MESH_ALPN),
                    ..FilterChainMatch::default()
                };
                chains.push(tcp_chain(Some(condition), &name));
            }
        }
    }
    chains
}
