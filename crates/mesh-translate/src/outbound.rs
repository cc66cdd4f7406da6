//! Sidecar, traffic of the application: the listener on port 15001 and those it hands connections to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use envoy_types::pb::envoy::config::listener::v3::{FilterChain, FilterChainMatch, Listener};
use mesh_model::{Mesh, Node, Protocol, Service, ServicePort};

use crate::listener::{self, Http, Place, Routes, http_chain, named, tcp_chain};
use crate::resources::{LISTENER, Resource, Resources};
use crate::virtual_host::{self, Rules};
use crate::{names, pb, tcp};

/// Name of the listener that captured outgoing connections reach.
const VIRTUAL_OUTBOUND: &str = "virtualOutbound";
/// The chain for what is not HTTP on a port that is.
const FALLBACK_CHAIN: &str = "PassthroughFilterChain";

pub(crate) fn add(mesh: &Mesh, node: &Node, resources: &mut Resources) {
    resources
        .listeners
        .insert(VIRTUAL_OUTBOUND.to_owned(), virtual_outbound(mesh, node));
    let rules = Rules::new(mesh, node);
    let mut http_ports = BTreeSet::new();
    // By address and port; of two services that claim the same the older wins.
    let mut claimed: BTreeMap<(IpAddr, u16), &Service> = BTreeMap::new();
    let mut services: Vec<&Service> = mesh
        .visible_services(&node.namespace)
        .map(AsRef::as_ref)
        .collect();
    services.sort_by_key(|service| (service.created, &service.host));
    for service in services
        .into_iter()
        .filter(|service| service.external_name.is_none() || mesh.is_outside(service))
    {
        for port in &service.ports {
            // A name outside has no address to listen on: requests are told by their Host, other connections pass through.
            let by_host = service.external_name.is_some() && port.protocol == Protocol::Auto;
            if port.protocol.is_http() || by_host {
                http_ports.insert(port.number);
                continue;
            }
            for address in addresses(service, port, node) {
                if let Some(first) = claimed.get(&(address, port.number)) {
                    let name = listener::name(address, port.number);
                    resources.notes.push(format!(
                        "{} and {} both claim {name}; the first, which is older, has it",
                        first.host, service.host
                    ));
                    continue;
                }
                claimed.insert((address, port.number), service);
                add_address(&rules, service, port, address, resources);
            }
        }
    }
    for port in http_ports {
        add_http_port(&rules, port, resources);
    }
}

/// Addresses that clients connect to: the service's, or for a headless one those of its pods except this one.
fn addresses(service: &Service, port: &ServicePort, node: &Node) -> Vec<IpAddr> {
    if !service.headless {
        return service.addresses.clone();
    }
    let pods: BTreeSet<IpAddr> = service
        .endpoints(port.number)
        .iter()
        .map(|endpoint| endpoint.address)
        .collect();
    pods.into_iter()
        .filter(|address| !node.ips.contains(address))
        .collect()
}

fn virtual_outbound(mesh: &Mesh, node: &Node) -> Resource {
    let own_port = mesh.config().proxy_listen_port;
    let mut listener = listener::listener(
        VIRTUAL_OUTBOUND.to_owned(),
        listener::any_address(node),
        own_port,
        Place::Outbound,
    );
    listener.use_original_dst = pb::boolean(true);
    // A connection to the port itself was not captured; passing it on would loop.
    let to_itself = FilterChainMatch {
        destination_port: pb::uint32(own_port),
        ..FilterChainMatch::default()
    };
    listener.filter_chains = vec![
        named(
            tcp_chain(Some(to_itself), names::BLACK_HOLE),
            "virtualOutbound-blackhole",
        ),
        named(
            tcp_chain(None, names::catch_all_cluster(mesh)),
            "virtualOutbound-catchall-tcp",
        ),
    ];
    Resource::new(LISTENER, &listener)
}

/// One listener for HTTP to any address on a port; what turns out not to be HTTP is passed through.
fn add_http_port(rules: &Rules<'_>, port: u16, resources: &mut Resources) {
    let Rules { mesh, node, .. } = *rules;
    let any = listener::any_address(node);
    let name = listener::name(any, port);
    let mut listener = handed_to(name.clone(), any, port);
    let routes = port.to_string();
    let http = Http::outbound(mesh, node);
    listener.filter_chains = vec![http_chain(
        &http,
        Some(http.plain()),
        format!("outbound_{name}"),
        Routes::Discovered(routes.clone()),
        Place::Outbound,
    )];
    listener.default_filter_chain = Some(named(
        tcp_chain(None, names::catch_all_cluster(mesh)),
        FALLBACK_CHAIN,
    ));
    listener::inspect(&mut listener, mesh, None);
    resources
        .listeners
        .insert(name, Resource::new(LISTENER, &listener));
    resources.routes.insert(
        routes.clone(),
        virtual_host::outbound_port(rules, &routes, port),
    );
}

/// One listener for a service port at one address: TCP, or whatever the first bytes say where no protocol is declared.
fn add_address(
    rules: &Rules<'_>,
    service: &Service,
    port: &ServicePort,
    address: IpAddr,
    resources: &mut Resources,
) {
    let name = listener::name(address, port.number);
    let mut listener = handed_to(name.clone(), address, port.number);
    let mut chains = tcp::outbound(rules, service, port);
    if port.protocol == Protocol::Auto {
        let routes = format!("{}:{}", service.host, port.number);
        let http = Http::outbound(rules.mesh, rules.node);
        let chain = http_chain(
            &http,
            Some(http.plain()),
            format!("outbound_{name}"),
            Routes::Discovered(routes.clone()),
            Place::Outbound,
        );
        listener.default_filter_chain = chains.pop_if(|chain| chain.filter_chain_match.is_none());
        listener.filter_chains = std::iter::once(chain).chain(chains).collect();
        listener::inspect(&mut listener, rules.mesh, None);
        let table = || virtual_host::outbound_service(rules, &routes, service, port.number);
        resources.routes.entry(routes.clone()).or_insert_with(table);
    } else {
        let by_name = |chain: &FilterChain| {
            let matched = chain.filter_chain_match.as_ref();
            matched.is_some_and(|matched| !matched.server_names.is_empty())
        };
        if chains.iter().any(by_name) {
            listener::inspect_tls(&mut listener, rules.mesh, None);
        }
        listener.filter_chains = chains;
    }
    resources
        .listeners
        .insert(name, Resource::new(LISTENER, &listener));
}

/// A listener that opens no socket: port 15001 hands it connections by their original destination.
fn handed_to(name: String, address: IpAddr, port: u16) -> Listener {
    let mut listener = listener::listener(name, address, port, Place::Outbound);
    listener.bind_to_port = pb::boolean(false);
    listener
}
