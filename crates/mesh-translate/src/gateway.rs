//! Gateways: one listener per port, all hosts of a port in one route table.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_model::{Gateway, GatewayServer, Mesh, Node, ServerMode, VirtualService};

use crate::listener::{self, Http, Place, Routes, http_chain};
use crate::resources::{LISTENER, Resource, Resources};
use crate::route::Client;
use crate::tcp::{self, Conditions};
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
    let mut by_port: BTreeMap<(u16, Option<IpAddr>), Vec<Server<'_>>> = BTreeMap::new();
    for gateway in mesh.gateways_of(node) {
        for server in &gateway.servers {
            let port = (target_port(server.port), server.bind);
            let servers = by_port.entry(port).or_default();
            match servers.first() {
                Some((first, with)) if !with.mode.shares_port_with(server.mode) => {
                    resources.notes.push(format!(
                        "server {} of {} is left out: port {} has another protocol by {}, which is first",
                        server.name, gateway.key, port.0, first.key
                    ));
                }
                _ => servers.push((gateway, server)),
            }
        }
    }
    for ((port, bind), servers) in by_port {
        add_port(mesh, node, port, bind, &servers, resources);
    }
}

fn add_port(
    mesh: &Mesh,
    node: &Node,
    port: u16,
    bind: Option<IpAddr>,
    servers: &[Server<'_>],
    resources: &mut Resources,
) {
    let address = bind.unwrap_or_else(|| listener::any_address(node));
    let name = listener::name(address, port);
    let mut listener = listener::listener(name.clone(), address, port, Place::Gateway);
    let mut taken = Conditions::default();
    for (gateway, server) in servers {
        let reference = gateway.reference();
        let client = client(mesh, node, &reference, server);
        let rules = bound(mesh, node, &reference);
        match server.mode {
            ServerMode::Http { .. } => {}
            ServerMode::TlsPassthrough => listener
                .filter_chains
                .extend(tcp::gateway_tls(rules, server, &client, &mut taken)),
            ServerMode::Tcp => listener
                .filter_chains
                .extend(tcp::gateway_tcp(rules, server, &client)),
        }
    }
    match servers.first().map(|(_, server)| server.mode) {
        Some(ServerMode::Http { .. }) => {
            let routes = match bind {
                None => format!("http.{port}"),
                Some(address) => format!("http.{port}.{address}"),
            };
            listener.filter_chains = vec![http_chain(
                &Http::of(node),
                None,
                format!("outbound_{name}"),
                Routes::Discovered(routes.clone()),
                Place::Gateway,
            )];
            let table = virtual_host::gateway_port(mesh, node, &routes, servers);
            resources.routes.insert(routes, table);
        }
        Some(ServerMode::TlsPassthrough) => listener::inspect_gateway_tls(&mut listener),
        Some(ServerMode::Tcp) | None => {}
    }
    // Without a rule there is nowhere to pass connections on to, and they are refused.
    if listener.filter_chains.is_empty() {
        resources.notes.push(format!(
            "nothing listens on port {port}: no VirtualService has rules for its TCP or TLS servers"
        ));
        return;
    }
    let resource = Resource::new(LISTENER, &listener);
    resources.listeners.insert(name, resource);
}

/// Rules that a gateway applies, oldest first.
pub(crate) fn bound<'a>(
    mesh: &'a Mesh,
    node: &'a Node,
    gateway: &'a str,
) -> impl Iterator<Item = &'a VirtualService> {
    mesh.gateway_virtual_services(gateway, &node.namespace)
        .map(AsRef::as_ref)
}

/// For whom the rules of a server are translated.
pub(crate) fn client<'a>(
    mesh: &'a Mesh,
    node: &'a Node,
    gateway: &'a str,
    server: &GatewayServer,
) -> Client<'a> {
    Client {
        mesh,
        node,
        gateway,
        labels: mesh.labels_of(node),
        port: server.port,
    }
}
