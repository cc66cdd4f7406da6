//! Gateways: one listener per port, all hosts of a port in one route table.

use std::collections::BTreeMap;

use mesh_model::{Gateway, GatewayServer, Mesh, Node};

use crate::listener::{self, Place, Routes, http_chain};
use crate::resources::{LISTENER, Resource, Resources};
use crate::virtual_host;

/// A server with the Gateway that it belongs to.
pub(crate) type Server<'a> = (&'a Gateway, &'a GatewayServer);

pub(crate) fn add(mesh: &Mesh, node: &Node, resources: &mut Resources) {
    let served = mesh.served_by(node);
    // Gateways name the port of the Service in front of the pod; the pod may listen on another.
    let target_port = |port: u16| {
        served
            .iter()
            .find(|(_, _, of_service)| of_service.number == port)
            .map_or(port, |(target, _, _)| *target)
    };
    let mut by_port: BTreeMap<u16, Vec<Server<'_>>> = BTreeMap::new();
    for gateway in mesh.gateways_of(node) {
        for server in &gateway.servers {
            by_port
                .entry(target_port(server.port))
                .or_default()
                .push((gateway, server));
        }
    }
    for (port, servers) in by_port {
        let any = listener::any_address(node);
        let name = listener::name(any, port);
        let routes = format!("http.{port}");
        let mut listener = listener::listener(name.clone(), any, port, Place::Gateway);
        listener.filter_chains = vec![http_chain(
            None,
            format!("outbound_{name}"),
            Routes::Discovered(routes.clone()),
            Place::Gateway,
        )];
        resources
            .listeners
            .insert(name, Resource::new(LISTENER, &listener));
        resources.routes.insert(
            routes.clone(),
            virtual_host::gateway_port(mesh, node, &routes, &servers),
        );
    }
}
