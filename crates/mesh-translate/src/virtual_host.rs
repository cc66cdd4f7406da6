//! Route tables: which virtual host a request belongs to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3::virtual_host::TlsRequirementType;
use envoy_types::pb::envoy::config::route::v3::{Route, VirtualHost};
use mesh_model::{
    GatewayServer, MESH_GATEWAY, Mesh, Node, Protocol, ServerMode, Service, VirtualService,
    hostname,
};

use crate::gateway::{self, Server};
use crate::resources::{ROUTE, Resource};
use crate::route::{self, Client};

/// Port on which sidecars route hosts that no service has.
const PORT_OF_OTHER_HOSTS: u16 = 80;

/// The table of a wildcard HTTP port: every visible service that has this port, then hosts that only rules know, then the rest.
pub(crate) fn outbound_port(rules: &Rules<'_>, name: &str, port: u16) -> Resource {
    let Rules { mesh, node, .. } = *rules;
    let mut table = Table::default();
    let mut known = Vec::new();
    for service in mesh.visible_services(&node.namespace) {
        if let Some(target) = http_target(mesh, service, port) {
            table.push(service_host(rules, service, target, port));
            known.push(service.host.as_str());
        }
    }
    if port == PORT_OF_OTHER_HOSTS {
        let client = rules.client(port);
        for (host, of_host) in rules.without_service(&known) {
            if let Some(routes) = first_applied(of_host, &client) {
                let name = format!("{host}:{port}");
                table.push(route::virtual_host(name, vec![host.to_owned()], routes));
            }
        }
    }
    table.push(route::catch_all(mesh));
    table.into_resource(name)
}

/// The table of a single service port whose protocol is found out.
pub(crate) fn outbound_service(
    rules: &Rules<'_>,
    name: &str,
    service: &Service,
    port: u16,
) -> Resource {
    let mut table = Table::default();
    // Whatever the Host header says: the connection went to this service's address.
    table.push(VirtualHost {
        domains: vec!["*".to_owned()],
        ..service_host(rules, service, service, port)
    });
    table.into_resource(name)
}

/// The table of a gateway port: hosts of all servers, each with the routes of all rules that are bound to the server's gateway, oldest first, those
/// that take every request behind all others. Hosts with the same rules are one virtual host, named after the first (as Istio collapses them): the
/// rules of many hosts would else be sent once for each.
pub(crate) fn gateway_port(
    mesh: &Mesh,
    node: &Node,
    name: &str,
    servers: &[Server<'_>],
) -> Resource {
    let mut hosts: BTreeMap<String, GatewayHost> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut lists = Vec::new();
    for (gateway, server) in servers {
        let reference = gateway.reference();
        let client = gateway::client(mesh, node, &reference, server);
        let redirect = matches!(
            server.mode,
            ServerMode::Http {
                https_redirect: true
            }
        );
        for rule in gateway::bound(mesh, node, &reference) {
            let mut shared = shared_hosts(&server.hosts, rule);
            // Two servers may have a host in common; its rules count once.
            shared.retain(|host| seen.insert((host.clone(), rule.key.clone())));
            if shared.is_empty() {
                continue;
            }
            lists.push(route::of_virtual_service(rule, &client));
            for host in shared {
                let entry = hosts.entry(host).or_insert_with(|| GatewayHost::of(server));
                entry.lists.push(lists.len() - 1);
                entry.redirect |= redirect;
            }
        }
        // What is redirected needs no rule.
        if redirect {
            for (_, host) in &server.hosts {
                let entry = hosts.entry(host.clone());
                entry.or_insert_with(|| GatewayHost::of(server)).redirect = true;
            }
        }
    }
    let mut table = Table::default();
    for (host, domains) in collapsed(hosts, &lists) {
        table.push(host.into_virtual_host(domains, &lists));
    }
    if table.hosts.is_empty() {
        let port = servers.first().map_or(0, |(_, server)| server.port);
        table.push(route::virtual_host(
            format!("blackhole:{port}"),
            vec!["*".to_owned()],
            Vec::new(),
        ));
    }
    table.into_resource(name)
}

/// Hosts with what is the same for all of them, in the order of the first; those without any effect are left out.
fn collapsed(
    hosts: BTreeMap<String, GatewayHost>,
    lists: &[Vec<Route>],
) -> Vec<(GatewayHost, Vec<String>)> {
    let mut groups: Vec<(GatewayHost, Vec<String>)> = Vec::new();
    let mut known = BTreeMap::new();
    for (name, mut host) in hosts {
        host.lists.retain(|list| !lists[*list].is_empty());
        if host.lists.is_empty() && !host.redirect {
            continue;
        }
        let at = *known.entry(host.clone()).or_insert(groups.len());
        match groups.get_mut(at) {
            Some((_, domains)) => domains.push(name),
            None => groups.push((host, vec![name])),
        }
    }
    groups
}

/// What a host of a gateway has.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct GatewayHost {
    port: u16,
    /// Its lists of routes, in order, by index.
    lists: Vec<usize>,
    /// Every plain request is redirected to https.
    redirect: bool,
}

impl GatewayHost {
    fn of(server: &GatewayServer) -> Self {
        Self {
            port: server.port,
            lists: Vec::new(),
            redirect: false,
        }
    }

    fn into_virtual_host(self, domains: Vec<String>, lists: &[Vec<Route>]) -> VirtualHost {
        let mut routes: Vec<Route> = self
            .lists
            .iter()
            .flat_map(|list| lists[*list].iter().cloned())
            .collect();
        routes.sort_by_key(route::is_catch_all);
        let tls = if self.redirect {
            TlsRequirementType::All
        } else {
            TlsRequirementType::None
        };
        let first = domains.first().map_or("", String::as_str);
        VirtualHost {
            require_tls: tls as i32,
            ..route::virtual_host(format!("{first}:{}", self.port), domains, routes)
        }
    }
}

/// Hosts that a server and a rule have in common.
fn shared_hosts(served: &[(Option<String>, String)], rule: &VirtualService) -> BTreeSet<String> {
    let allowed = served.iter().filter(|(namespace, _)| {
        namespace
            .as_deref()
            .is_none_or(|only| only == rule.key.namespace)
    });
    let pairs = allowed.flat_map(|(_, served)| {
        rule.hosts
            .iter()
            .filter_map(move |host| hostname::intersection(served, host))
    });
    pairs.map(str::to_owned).collect()
}

/// The service behind `service` (itself, if that is outside the mesh) if it has an HTTP port of this number.
fn http_target<'a>(
    mesh: &'a Mesh,
    service: &'a Arc<Service>,
    port: u16,
) -> Option<&'a Arc<Service>> {
    let target = match mesh.resolve_alias(service) {
        Some(target) => target,
        None if mesh.is_outside(service) => service,
        None => return None,
    };
    let protocol = target.port(port)?.protocol;
    (protocol.is_http() || protocol == Protocol::Auto).then_some(target)
}

/// The virtual host of a service: its rules, or the way straight to it where none of them is for this client. An alias has the rules of what it stands
/// for, unless it has its own.
fn service_host(rules: &Rules<'_>, service: &Service, target: &Service, port: u16) -> VirtualHost {
    let client = rules.client(port);
    let own = rules.routes(&service.host, &client);
    let is_alias = service.host != target.host;
    let routes = own
        .or_else(|| {
            is_alias
                .then(|| rules.routes(&target.host, &client))
                .flatten()
        })
        .unwrap_or_else(|| vec![route::default_route(&client, &target.host)]);
    route::virtual_host(
        format!("{}:{port}", service.host),
        domains(service, rules.node),
        routes,
    )
}

/// The routes of the first rule that has any for this client.
fn first_applied(rules: &[&VirtualService], client: &Client<'_>) -> Option<Vec<Route>> {
    rules
        .iter()
        .map(|rule| route::of_virtual_service(rule, client))
        .find(|routes| !routes.is_empty())
}

/// All names by which a client may call a service.
fn domains(service: &Service, node: &Node) -> Vec<String> {
    let Service {
        name,
        namespace,
        host,
        ..
    } = service;
    let mut domains = vec![host.clone(), format!("{host}.")];
    if *namespace == node.namespace {
        domains.push(name.clone());
    }
    domains.push(format!("{name}.{namespace}.svc"));
    domains.push(format!("{name}.{namespace}"));
    if service.headless {
        domains.extend(
            domains
                .clone()
                .into_iter()
                .map(|domain| format!("*.{domain}")),
        );
    }
    domains.extend(service.addresses.iter().map(|address| match address {
        std::net::IpAddr::V4(address) => address.to_string(),
        std::net::IpAddr::V6(address) => format!("[{address}]"),
    }));
    domains
}

/// The rules that a sidecar applies, by host.
pub(crate) struct Rules<'a> {
    pub(crate) mesh: &'a Mesh,
    pub(crate) node: &'a Node,
    labels: &'a BTreeMap<String, String>,
    /// Objects with HTTP rules for each host, oldest first.
    by_host: BTreeMap<&'a str, Vec<&'a VirtualService>>,
    /// Wildcard hosts, longest first.
    wildcards: Vec<&'a str>,
    /// Objects with rules for TLS or TCP, oldest first.
    connections: Vec<&'a VirtualService>,
}

impl<'a> Rules<'a> {
    pub(crate) fn new(mesh: &'a Mesh, node: &'a Node) -> Self {
        let mut by_host: BTreeMap<&str, Vec<&VirtualService>> = BTreeMap::new();
        let mut connections = Vec::new();
        for rule in mesh.sidecar_virtual_services(&node.namespace) {
            if !rule.http.is_empty() {
                for host in &rule.hosts {
                    by_host.entry(host).or_default().push(rule);
                }
            }
            if !rule.tls.is_empty() || !rule.tcp.is_empty() {
                connections.push(rule.as_ref());
            }
        }
        let mut wildcards: Vec<&str> = by_host
            .keys()
            .copied()
            .filter(|host| hostname::is_wildcard(host))
            .collect();
        wildcards.sort_by_key(|host| hostname::specificity(host));
        Self {
            mesh,
            node,
            labels: mesh.labels_of(node),
            by_host,
            wildcards,
            connections,
        }
    }

    pub(crate) fn client(&self, port: u16) -> Client<'a> {
        let Self {
            mesh, node, labels, ..
        } = *self;
        Client {
            mesh,
            node,
            gateway: MESH_GATEWAY,
            labels,
            port,
        }
    }

    /// The routes for a host: of the oldest rule for its exact name that has any for this client; without such rules, of the oldest for the
    /// longest wildcard.
    fn routes(&self, host: &str, client: &Client<'_>) -> Option<Vec<Route>> {
        let covering = || {
            let wildcard = self
                .wildcards
                .iter()
                .find(|wildcard| hostname::covers(wildcard, host))?;
            self.by_host.get(wildcard)?.get(..1)
        };
        let rules = match self.by_host.get(host) {
            Some(exact) => exact,
            None => covering()?,
        };
        first_applied(rules, client)
    }

    /// Rules for TLS and TCP connections to a host, by its name or by wildcards, oldest first.
    pub(crate) fn for_connections<'b>(
        &'b self,
        host: &'b str,
    ) -> impl Iterator<Item = &'a VirtualService> {
        self.connections.iter().copied().filter(move |rule| {
            rule.hosts
                .iter()
                .any(|pattern| hostname::covers(pattern, host))
        })
    }

    /// Hosts that no visible service has, nor, for wildcards, one of the `known` ones.
    fn without_service<'b>(
        &'b self,
        known: &'b [&str],
    ) -> impl Iterator<Item = (&'a str, &'b [&'a VirtualService])> {
        let visible = |host: &str| {
            self.mesh
                .service(host)
                .is_some_and(|service| service.visibility.includes(&self.node.namespace))
                || (hostname::is_wildcard(host)
                    && known.iter().any(|known| hostname::covers(host, known)))
        };
        self.by_host
            .iter()
            .filter(move |(host, _)| !visible(host))
            .map(|(host, rules)| (*host, rules.as_slice()))
    }
}

/// A route table in the making. Envoy refuses a table in which two virtual hosts share a domain: the first one keeps it.
#[derive(Default)]
struct Table {
    hosts: Vec<VirtualHost>,
    domains: BTreeSet<String>,
}

impl Table {
    fn push(&mut self, mut host: VirtualHost) {
        host.domains
            .retain(|domain| self.domains.insert(domain.to_ascii_lowercase()));
        if !host.domains.is_empty() {
            self.hosts.push(host);
        }
    }

    fn into_resource(self, name: &str) -> Resource {
        Resource::new(ROUTE, &route::configuration(name.to_owned(), self.hosts))
    }
}
