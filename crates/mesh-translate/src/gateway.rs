//! Gateways: one listener per port, all hosts of a port in one route table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use envoy_types::pb::envoy::config::listener::v3::{FilterChain, FilterChainMatch};
use mesh_model::{Gateway, GatewayServer, Mesh, Node, ServerMode, VirtualService};

use crate::listener::{self, Http, Place, Routes, http_chain};
use crate::policy::Policies;
use crate::resources::{LISTENER, Resource, Resources};
use crate::route::Client;
use crate::tcp::{self, Conditions};
use crate::virtual_host;

mod auto_passthrough;
mod tls;

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
    let policies = Policies::of(mesh, node, resources);
    let is_tcp = |mode| {
        matches!(
            mode,
            ServerMode::Tcp | ServerMode::TlsPassthrough | ServerMode::TlsTermination
        )
    };
    let other: Vec<u16> = by_port
        .iter()
        .filter(|(_, servers)| servers.iter().any(|(_, server)| is_tcp(server.mode)))
        .map(|((port, _), _)| *port)
        .collect();
    policies.warn_of_connections(&other, resources);
    let router = Router {
        mesh,
        node,
        http: Http::gateway(mesh, node, &policies),
        policies: &policies,
    };
    for ((port, bind), servers) in by_port {
        router.add_port(port, bind, &servers, resources);
    }
}

/// What all chains of a gateway have in common.
struct Router<'a> {
    mesh: &'a Mesh,
    node: &'a Node,
    http: Http,
    policies: &'a Policies<'a>,
}

impl Router<'_> {
    fn add_port(
        &self,
        port: u16,
        bind: Option<IpAddr>,
        servers: &[Server<'_>],
        resources: &mut Resources,
    ) {
        let Self { mesh, node, .. } = *self;
        let address = bind.unwrap_or_else(|| listener::any_address(node));
        let name = listener::name(address, port);
        let mut listener = listener::listener(name.clone(), address, port, Place::Gateway);
        let mut taken = Conditions::default();
        for server in servers {
            let chains = self.chains(*server, port, &mut taken, resources);
            listener.filter_chains.extend(chains);
        }
        let mode = servers.first().map(|(_, server)| server.mode);
        if let Some(ServerMode::Http { .. }) = mode {
            let routes = match bind {
                None => format!("http.{port}"),
                Some(address) => format!("http.{port}.{address}"),
            };
            let stat_prefix = format!("outbound_{name}");
            listener.filter_chains = vec![self.http_chain(None, stat_prefix, &routes)];
            let table = virtual_host::gateway_port(mesh, node, &routes, servers);
            resources.routes.insert(routes, table);
        }
        if mode.is_some_and(ServerMode::is_tls) {
            listener::inspect_gateway_tls(&mut listener);
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

    /// The chains of a server of its own; plain HTTP shares one with others.
    fn chains(
        &self,
        (gateway, server): Server<'_>,
        port: u16,
        taken: &mut Conditions,
        resources: &mut Resources,
    ) -> Vec<FilterChain> {
        let Self { mesh, node, .. } = *self;
        let reference = gateway.reference();
        let client = client(mesh, node, &reference, server);
        let rules = bound(mesh, node, &reference);
        let guarded = |chains: Vec<FilterChain>| {
            let guard = |chain| self.policies.guard(chain);
            chains.into_iter().map(guard).collect::<Vec<_>>()
        };
        match server.mode {
            ServerMode::Http { .. } => Vec::new(),
            ServerMode::TlsPassthrough => guarded(tcp::gateway_tls(rules, server, &client, taken)),
            ServerMode::Tcp => guarded(
                tcp::gateway_tcp(rules, server, &client)
                    .into_iter()
                    .collect(),
            ),
            ServerMode::AutoPassthrough => auto_passthrough::chains(mesh, node, server, resources),
            ServerMode::TlsTermination => {
                let made = tcp::gateway_tcp(rules, server, &client).into_iter();
                let chains = guarded(made.collect());
                self.end_tls(chains, (gateway, server), taken, resources)
            }
            ServerMode::Https => {
                let routes = format!(
                    "https.{port}.{}.{}.{}",
                    server.name, gateway.key.name, gateway.key.namespace
                );
                let stat_prefix = format!(
                    "outbound_{}",
                    listener::name(listener::any_address(node), port)
                );
                let chain = self.http_chain(None, stat_prefix, &routes);
                let chains = self.end_tls(vec![chain], (gateway, server), taken, resources);
                if !chains.is_empty() {
                    let table =
                        virtual_host::gateway_port(mesh, node, &routes, &[(gateway, server)]);
                    resources.routes.insert(routes, table);
                }
                chains
            }
        }
    }

    fn http_chain(
        &self,
        matched: Option<FilterChainMatch>,
        stat_prefix: String,
        routes: &str,
    ) -> FilterChain {
        http_chain(
            &self.http,
            matched,
            stat_prefix,
            Routes::Discovered(routes.to_owned()),
            Place::Gateway,
        )
    }

    /// The chains for the server names of a server, with TLS ended as it says. A name that another server has first is left out.
    fn end_tls(
        &self,
        chains: Vec<FilterChain>,
        (gateway, server): Server<'_>,
        taken: &mut Conditions,
        resources: &mut Resources,
    ) -> Vec<FilterChain> {
        let (Some(chain), Some(settings)) = (chains.into_iter().next(), &server.tls) else {
            return Vec::new();
        };
        let hosts: Vec<String> = server.hosts.iter().map(|(_, host)| host.clone()).collect();
        let free = taken.take(&hosts, &[]);
        if free.is_empty() && !hosts.is_empty() {
            let message = format!(
                "server {} is left out: another server of port {} has all of its hosts",
                server.name, server.port
            );
            resources.report(&gateway.key, "spec.servers", message);
        }
        let http = server.mode == ServerMode::Https;
        let mut secrets = BTreeSet::new();
        let with_condition = |matched: FilterChainMatch| {
            let chain = FilterChain {
                filter_chain_match: (matched != FilterChainMatch::default()).then_some(matched),
                ..chain.clone()
            };
            tls::end(chain, self.mesh, settings, http, &mut secrets)
        };
        let chains = free.into_iter().map(with_condition).collect();
        resources.need(secrets, std::slice::from_ref(&gateway.key));
        chains
    }
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
