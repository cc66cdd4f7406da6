//! Conditions of patches.

use envoy_types::pb::envoy::config::listener::v3::{FilterChain, Listener};
use envoy_types::pb::envoy::config::route::v3::route::Action;
use envoy_types::pb::envoy::config::route::v3::{Route, VirtualHost};
use mesh_api::networking::envoy_filter::{
    ApplyTo, ListenerMatch, PatchContext, RouteAction, RouteConfigurationMatch,
};
use mesh_model::EnvoyPatch;

use super::Patcher;

/// The listeners of a sidecar that all captured connections reach; conditions on ports mean their filter chains' ports.
const VIRTUAL: [&str; 2] = ["virtualInbound", "virtualOutbound"];

/// True if a patch is for a place.
pub(super) fn context(patch: &EnvoyPatch, place: PatchContext) -> bool {
    patch.context == PatchContext::Any || patch.context == place
}

/// True if an addition is for a place: one that names none is for outgoing traffic and gateways, so that it is made once.
pub(super) fn adds_to(patch: &EnvoyPatch, place: PatchContext) -> bool {
    match patch.context {
        PatchContext::Any => place != PatchContext::SidecarInbound,
        given => given == place,
    }
}

pub(super) fn listener(patch: &EnvoyPatch, listener: &Listener) -> bool {
    let Some(wanted) = &patch.listener else {
        return true;
    };
    if !is(&wanted.name, &listener.name) {
        return false;
    }
    if patch.apply_to != ApplyTo::Listener && VIRTUAL.contains(&listener.name.as_str()) {
        return true;
    }
    wanted.port_number == 0 || port_of(listener) == Some(wanted.port_number)
}

fn port_of(listener: &Listener) -> Option<u32> {
    use envoy_types::pb::envoy::config::core::v3::address::Address;
    use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
    match listener.address.as_ref()?.address.as_ref()? {
        Address::SocketAddress(address) => match address.port_specifier {
            Some(PortSpecifier::PortValue(port)) => Some(port),
            _ => None,
        },
        _ => None,
    }
}

pub(super) fn chain(patch: &EnvoyPatch, listener: &str, chain: &FilterChain) -> bool {
    let Some(outer) = &patch.listener else {
        return true;
    };
    let none = Default::default();
    let matched = chain.filter_chain_match.as_ref().unwrap_or(&none);
    let port = matched.destination_port.map_or(0, |port| port.value);
    let own_port =
        outer.port_number == 0 || !VIRTUAL.contains(&listener) || outer.port_number == port;
    let Some(wanted) = &outer.filter_chain else {
        return own_port;
    };
    let socket = chain
        .transport_socket
        .as_ref()
        .map_or("", |socket| &socket.name);
    own_port
        && is(&wanted.name, &chain.name)
        && (wanted.sni.is_empty() || matched.server_names.contains(&wanted.sni))
        && is(&wanted.transport_protocol, &matched.transport_protocol)
        && is(&wanted.transport_socket, socket)
        && wanted
            .application_protocols
            .split(',')
            .map(str::trim)
            .filter(|protocol| !protocol.is_empty())
            .all(|protocol| {
                matched
                    .application_protocols
                    .iter()
                    .any(|own| own == protocol)
            })
        && (wanted.destination_port == 0 || wanted.destination_port == port)
}

/// Name of the network filter that a patch wants; empty if any will do.
pub(super) fn network_filter(patch: &EnvoyPatch) -> &str {
    let chain = patch.listener.as_ref().and_then(chain_of);
    chain
        .and_then(|chain| chain.filter.as_ref())
        .map_or("", |filter| &filter.name)
}

/// Name of the HTTP filter that a patch wants; empty if any will do.
pub(super) fn http_filter(patch: &EnvoyPatch) -> &str {
    let chain = patch.listener.as_ref().and_then(chain_of);
    chain
        .and_then(|chain| chain.filter.as_ref())
        .and_then(|filter| filter.sub_filter.as_ref())
        .map_or("", |filter| &filter.name)
}

fn chain_of(
    listener: &ListenerMatch,
) -> Option<&mesh_api::networking::envoy_filter::FilterChainMatch> {
    listener.filter_chain.as_ref()
}

pub(super) fn table(
    patcher: &Patcher<'_>,
    patch: &EnvoyPatch,
    place: PatchContext,
    name: &str,
) -> bool {
    let Some(wanted) = &patch.route_configuration else {
        return true;
    };
    if !is(&wanted.name, name) {
        return false;
    }
    if place != PatchContext::Gateway {
        return wanted.port_number == 0 || sidecar_port(name) == Some(wanted.port_number);
    }
    let (port, port_name, gateway) = gateway_table(name);
    is(&wanted.port_name, port_name)
        && is(&wanted.gateway, &gateway)
        && (wanted.port_number == 0 || gateway_port(patcher, wanted, port))
}

/// `9080`, or `inbound|9080||`; a table of one service (`host:port`) has no port by which Istio finds it.
fn sidecar_port(name: &str) -> Option<u32> {
    match name.strip_prefix("inbound|") {
        Some(rest) => rest.split('|').next()?.parse().ok(),
        None => name.parse().ok(),
    }
}

/// Port, name of the server's port and `namespace/name` of the gateway: `http.8080` has only the first, `https.8443.NAME.GATEWAY.NAMESPACE` all.
fn gateway_table(name: &str) -> (u32, &str, String) {
    let parts: Vec<&str> = name.split('.').collect();
    let port = parts.get(1).and_then(|port| port.parse().ok()).unwrap_or(0);
    match parts[..] {
        ["https", _, port_name, gateway, namespace] => {
            (port, port_name, format!("{namespace}/{gateway}"))
        }
        _ => (port, "", String::new()),
    }
}

/// The port of the Service counts where one leads to the gateway's port.
fn gateway_port(patcher: &Patcher<'_>, wanted: &RouteConfigurationMatch, port: u32) -> bool {
    let mut of_service = patcher
        .gateway_ports
        .iter()
        .filter(|(target, _)| u32::from(*target) == port)
        .peekable();
    if of_service.peek().is_none() {
        return wanted.port_number == port;
    }
    of_service.any(|(_, number)| u32::from(*number) == wanted.port_number)
}

pub(super) fn virtual_host(patch: &EnvoyPatch, host: &VirtualHost) -> bool {
    let wanted = patch
        .route_configuration
        .as_ref()
        .and_then(|table| table.vhost.as_ref());
    wanted.is_none_or(|wanted| {
        is(&wanted.name, &host.name)
            && (wanted.domain_name.is_empty() || host.domains.contains(&wanted.domain_name))
    })
}

/// The conditions on a route; `None` if any will do.
pub(super) fn wanted_route(
    patch: &EnvoyPatch,
) -> Option<&mesh_api::networking::envoy_filter::RouteMatch> {
    let table = patch.route_configuration.as_ref()?;
    table.vhost.as_ref()?.route.as_ref()
}

pub(super) fn route(patch: &EnvoyPatch, route: &Route) -> bool {
    let Some(wanted) = wanted_route(patch) else {
        return true;
    };
    let action = match wanted.action {
        RouteAction::Any => true,
        RouteAction::Route => matches!(route.action, Some(Action::Route(_))),
        RouteAction::Redirect => matches!(route.action, Some(Action::Redirect(_))),
        RouteAction::DirectResponse => matches!(route.action, Some(Action::DirectResponse(_))),
    };
    action && is(&wanted.name, &route.name)
}

/// A cluster's name `DIRECTION|PORT|SUBSET|HOST`, with the hosts of the services behind an inbound one.
pub(super) fn cluster(patch: &EnvoyPatch, name: &str, hosts: &[String]) -> bool {
    let Some(wanted) = &patch.cluster else {
        return true;
    };
    if !wanted.name.is_empty() {
        return wanted.name == name;
    }
    let mut parts = name.split('|').skip(1);
    let mut next = || parts.next().unwrap_or_default();
    let (port, subset, host) = (next(), next(), next());
    let service = wanted.service.is_empty()
        || wanted.service == host
        || (host.is_empty() && hosts.contains(&wanted.service));
    service
        && is(&wanted.subset, subset)
        && (wanted.port_number == 0 || port.parse() == Ok(wanted.port_number))
}

/// An empty condition holds always.
fn is(wanted: &str, own: &str) -> bool {
    wanted.is_empty() || wanted == own
}
