//! Sidecar, traffic to the application: the listener on port 15006 and its clusters.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::envoy::config::listener::v3::listener_filter_chain_match_predicate::{
    MatchSet, Rule,
};
use envoy_types::pb::envoy::config::listener::v3::{
    FilterChain, FilterChainMatch, ListenerFilterChainMatchPredicate,
};
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use mesh_model::{Mesh, MtlsMode, Node, Protocol, Service};

use chain::{Declared, Kind};

use crate::listener::{self, Http, Place, Routes, http_chain, named, tcp_chain};
use crate::policy::Policies;
use crate::resources::{LISTENER, Resource, Resources};
use crate::{cluster, names, pb, route, tls};

mod chain;

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
    let policies = Policies::of(mesh, node, resources);
    let other: Vec<u16> = ports
        .iter()
        .filter(|(_, port)| Declared::of(port.protocol) != Declared::Http)
        .map(|(number, _)| *number)
        .collect();
    policies.warn_of_connections(&other, resources);
    let sidecar = Sidecar {
        mesh,
        node,
        http: Http::inbound(mesh, node, &policies),
        policies: &policies,
    };
    let listener = sidecar.virtual_inbound(&ports);
    resources
        .listeners
        .insert(VIRTUAL_INBOUND.to_owned(), listener);
}

/// What all inbound chains of a node have in common.
struct Sidecar<'a> {
    mesh: &'a Mesh,
    node: &'a Node,
    http: Http,
    policies: &'a Policies<'a>,
}

/// Where the connections of a chain go.
struct Target {
    /// Destination port; `None` is any that no other chain has.
    port: Option<u16>,
    cluster: String,
    virtual_host: String,
    stat_prefix: String,
    /// What did not reach the application is tried again.
    retries: bool,
}

impl Sidecar<'_> {
    fn virtual_inbound(&self, ports: &BTreeMap<u16, Port<'_>>) -> Resource {
        let own_port = self.mesh.config().proxy_inbound_listen_port;
        let mut listener = listener::listener(
            VIRTUAL_INBOUND.to_owned(),
            listener::any_address(self.node),
            own_port,
            Place::Inbound,
        );
        // A connection to the port itself was not captured; passing it on would loop.
        let black_hole = tcp_chain(
            Some(to_port(FilterChainMatch::default(), own_port)),
            names::BLACK_HOLE,
        );
        let chains = &mut listener.filter_chains;
        chains.push(named(black_hole, "virtualInbound-blackhole"));
        chains.extend(self.unknown_port(None));
        let labels = self.mesh.labels_of(self.node);
        let settings: BTreeSet<u16> = self.mesh.mtls_ports(&self.node.namespace, labels);
        for port in settings.iter().filter(|port| !ports.contains_key(port)) {
            chains.extend(self.unknown_port(Some(*port)));
        }
        for (port, of_port) in ports {
            chains.extend(self.known_port(*port, of_port.protocol));
        }
        listener::restore_destination(&mut listener);
        if self.node.intercepts_transparently() {
            listener::keep_addresses(&mut listener);
        }
        let except = |looks: fn(MtlsMode, Declared) -> bool| {
            let known = ports
                .iter()
                .map(|(port, of_port)| (*port, of_port.protocol));
            let unknown = settings.iter().map(|port| (*port, Protocol::Auto));
            let quiet = known
                .chain(unknown.filter(|(port, _)| !ports.contains_key(port)))
                .filter(|(port, protocol)| !looks(self.mode(Some(*port)), Declared::of(*protocol)));
            any_of_ports(&quiet.map(|(port, _)| port).collect::<Vec<u16>>())
        };
        listener::inspect_tls(
            &mut listener,
            self.mesh,
            except(chain::looks_for_tls).as_ref(),
        );
        listener::inspect_http(
            &mut listener,
            self.mesh,
            except(chain::looks_for_http).as_ref(),
        );
        Resource::new(LISTENER, &listener)
    }

    /// The mode of mutual TLS of a port, or of all that no policy names.
    fn mode(&self, port: Option<u16>) -> MtlsMode {
        let labels = self.mesh.labels_of(self.node);
        self.mesh
            .mtls(&self.node.namespace, labels, port.unwrap_or_default())
    }

    /// Ports without a service, or one of them for which a policy has a mode of its own: by what the first bytes say.
    fn unknown_port(&self, port: Option<u16>) -> Vec<FilterChain> {
        let target = Target {
            port,
            cluster: names::INBOUND_PASSTHROUGH.to_owned(),
            virtual_host: format!("inbound|http|{}", port.unwrap_or_default()),
            stat_prefix: stat_prefix(self.node, port.unwrap_or_default()),
            retries: true,
        };
        let chain = |kind: &Kind| {
            let name = if kind.http {
                "virtualInbound-catchall-http"
            } else {
                VIRTUAL_INBOUND
            };
            named(self.chain(*kind, &target), name)
        };
        chain::kinds(self.mode(port), Declared::Auto)
            .iter()
            .map(chain)
            .collect()
    }

    /// A port that services lead to, by what they declare or, where they don't, by what the first bytes say.
    fn known_port(&self, port: u16, protocol: Protocol) -> Vec<FilterChain> {
        let target = Target {
            port: Some(port),
            cluster: names::inbound_cluster(port),
            virtual_host: format!("inbound|http|{port}"),
            stat_prefix: stat_prefix(self.node, port),
            // The application may answer a repeated gRPC call twice, so those are left to the caller.
            retries: !matches!(protocol, Protocol::Grpc | Protocol::GrpcWeb),
        };
        let name = listener::name(listener::any_address(self.node), port);
        chain::kinds(self.mode(Some(port)), Declared::of(protocol))
            .iter()
            .map(|kind| named(self.chain(*kind, &target), name.clone()))
            .collect()
    }

    fn chain(&self, kind: Kind, target: &Target) -> FilterChain {
        let mut condition = kind.condition(&self.http.plain());
        if let Some(port) = target.port {
            condition = to_port(condition, port);
        }
        let mut chain = if kind.http {
            let routes = routes(
                &target.cluster,
                &target.virtual_host,
                &target.cluster,
                target.retries,
            );
            http_chain(
                &self.http,
                Some(condition),
                target.stat_prefix.clone(),
                Routes::Inline(routes),
                Place::Inbound,
            )
        } else {
            self.policies
                .guard(tcp_chain(Some(condition), &target.cluster))
        };
        if kind.mutual {
            let alpn = if kind.http {
                tls::ALPN_HTTP
            } else {
                tls::ALPN_TCP
            };
            chain.transport_socket = Some(tls::inbound(self.mesh, alpn));
        }
        chain
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
