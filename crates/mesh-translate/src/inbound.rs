//! Sidecar, traffic to the application: the listener on port 15006 and its clusters.
//!
//! Plain text in this version: the chains are those of Istio's PERMISSIVE mode without the ones that end mutual TLS, which come before them
//! once workloads have certificates.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::listener::v3::listener_filter_chain_match_predicate::{
    MatchSet, Rule,
};
use envoy_types::pb::envoy::config::listener::v3::{
    FilterChain, FilterChainMatch, ListenerFilterChainMatchPredicate,
};
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use mesh_model::{Mesh, Node, Protocol, Service};

use crate::listener::{self, Http, Place, Routes, http_chain, named, tcp_chain};
use crate::resources::{LISTENER, Resource, Resources};
use crate::{cluster, names, pb, route};

/// Name of the listener that captured incoming connections reach.
const VIRTUAL_INBOUND: &str = "virtualInbound";

/// A port of the application; of several services that lead to it the oldest decides the protocol.
struct Port<'a> {
    protocol: Protocol,
    services: Vec<&'a Service>,
}

pub(crate) fn add(mesh: &Mesh, node: &Node, resources: &mut Resources) {
    let mut ports: BTreeMap<u16, Port<'_>> = BTreeMap::new();
    for (target, service, port) in mesh.served_by(node) {
        let entry = ports.entry(target).or_insert_with(|| Port {
            protocol: port.protocol,
            services: Vec::new(),
        });
        if !entry
            .services
            .iter()
            .any(|known| known.host == service.host)
        {
            entry.services.push(service);
        }
    }
    for (target, port) in &ports {
        resources.clusters.extend([cluster::inbound(
            mesh,
            node,
            *target,
            port.protocol,
            &port.services,
        )]);
    }
    let listener = virtual_inbound(mesh, node, &ports);
    resources
        .listeners
        .insert(VIRTUAL_INBOUND.to_owned(), listener);
}

fn virtual_inbound(mesh: &Mesh, node: &Node, ports: &BTreeMap<u16, Port<'_>>) -> Resource {
    let own_port = mesh.config().proxy_inbound_listen_port;
    let mut listener = listener::listener(
        VIRTUAL_INBOUND.to_owned(),
        listener::any_address(node),
        own_port,
        Place::Inbound,
    );
    // A connection to the port itself was not captured; passing it on would loop.
    let black_hole = tcp_chain(
        Some(to_port(FilterChainMatch::default(), own_port)),
        names::BLACK_HOLE,
    );
    listener
        .filter_chains
        .push(named(black_hole, "virtualInbound-blackhole"));
    listener.filter_chains.extend(unknown_port(node));
    for (target, port) in ports {
        listener
            .filter_chains
            .extend(known_port(node, *target, port.protocol));
    }
    listener::restore_destination(&mut listener);
    let declared: Vec<u16> = ports
        .iter()
        .filter(|(_, port)| port.protocol != Protocol::Auto)
        .map(|(target, _)| *target)
        .collect();
    listener::inspect(&mut listener, mesh, any_of_ports(&declared).as_ref());
    Resource::new(LISTENER, &listener)
}

/// Ports without a service, by what the first bytes say.
fn unknown_port(node: &Node) -> [FilterChain; 3] {
    let http = routes(
        names::INBOUND_PASSTHROUGH,
        "inbound|http|0",
        names::INBOUND_PASSTHROUGH,
        true,
    );
    let settings = Http::of(node);
    let http = http_chain(
        &settings,
        Some(settings.plain()),
        stat_prefix(node, 0),
        Routes::Inline(http),
        Place::Inbound,
    );
    let [plain, tls] = NOT_HTTP.map(|transport| {
        let chain = tcp_chain(Some(of_transport(transport)), names::INBOUND_PASSTHROUGH);
        named(chain, VIRTUAL_INBOUND)
    });
    [named(http, "virtualInbound-catchall-http"), plain, tls]
}

/// What connections are that are not found to be HTTP. Both are named: Envoy looks at no chain without a transport protocol once there is one for
/// plain text, which plain HTTP has, and would close other plain connections.
const NOT_HTTP: [&str; 2] = ["raw_buffer", "tls"];

fn of_transport(name: &str) -> FilterChainMatch {
    FilterChainMatch {
        transport_protocol: name.to_owned(),
        ..FilterChainMatch::default()
    }
}

/// A port that services lead to, by what they declare or, where they don't, by what the first bytes say.
fn known_port(node: &Node, target: u16, protocol: Protocol) -> Vec<FilterChain> {
    let cluster = names::inbound_cluster(target);
    let name = listener::name(listener::any_address(node), target);
    let settings = Http::of(node);
    let http = |matched| {
        // The application may answer a repeated gRPC call twice, so those are left to the caller.
        let retries = !matches!(protocol, Protocol::Grpc | Protocol::GrpcWeb);
        let routes = routes(
            &cluster,
            &format!("inbound|http|{target}"),
            &cluster,
            retries,
        );
        named(
            http_chain(
                &settings,
                Some(to_port(matched, target)),
                stat_prefix(node, target),
                Routes::Inline(routes),
                Place::Inbound,
            ),
            name.clone(),
        )
    };
    let tcp = |matched| {
        named(
            tcp_chain(Some(to_port(matched, target)), &cluster),
            name.clone(),
        )
    };
    match protocol {
        Protocol::Auto => {
            let [plain, tls] = NOT_HTTP.map(|transport| tcp(of_transport(transport)));
            vec![http(settings.plain()), plain, tls]
        }
        _ if protocol.is_http() => vec![http(FilterChainMatch::default())],
        _ => vec![tcp(FilterChainMatch::default())],
    }
}

fn routes(name: &str, virtual_host: &str, cluster: &str, retries: bool) -> RouteConfiguration {
    route::configuration(
        name.to_owned(),
        vec![route::inbound_host(virtual_host, cluster, retries)],
    )
}

fn stat_prefix(node: &Node, port: u16) -> String {
    format!(
        "inbound_{}",
        listener::name(listener::any_address(node), port)
    )
}

fn to_port(mut matched: FilterChainMatch, port: u16) -> FilterChainMatch {
    matched.destination_port = pb::uint32(port);
    matched
}

/// Ports with a declared protocol: nothing to find out, and where the server speaks first, waiting for the client would never end.
fn any_of_ports(ports: &[u16]) -> Option<ListenerFilterChainMatchPredicate> {
    let range = |port: &u16| ListenerFilterChainMatchPredicate {
        rule: Some(Rule::DestinationPortRange(Int32Range {
            start: i32::from(*port),
            end: i32::from(*port) + 1,
        })),
    };
    match ports {
        [] => None,
        [only] => Some(range(only)),
        // Envoy wants at least two rules in a set.
        several => {
            let rules = several.iter().map(range).collect();
            Some(ListenerFilterChainMatchPredicate {
                rule: Some(Rule::OrMatch(MatchSet { rules })),
            })
        }
    }
}
