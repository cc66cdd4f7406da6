//! Route tables: which virtual host a request belongs to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3::{Route, VirtualHost};
use mesh_model::{MESH_GATEWAY, Mesh, Node, Protocol, Service, VirtualService, hostname};

use crate::gateway::Server;
use crate::names;
use crate::resources::{ROUTE, Resource};
use crate::route::{self, Client};

/// Port on which sidecars route hosts that no service has.
const PORT_OF_OTHER_HOSTS: u16 = 80;

/// The table of a wildcard HTTP port: every visible service that has this port, then hosts that only rules know, then the rest.
pub(crate) fn outbound_port(rules: &Rules<'_>, name: &str, port: u16) -> Resource {
    let Rules { mesh, node, .. } = *rules;
    let mut table = Table::default();
    for service in mesh.visible_services(&node.namespace) {
        if let Some(target) = http_target(mesh, service, port) {
            table.push(service_host(rules, service, target, port));
        }
    }
    if port == PORT_OF_OTHER_HOSTS {
        for (host, rule) in rules.without_service() {
            let routes = route::of_virtual_service(rule, &rules.client(port));
            table.push((!routes.is_empty()).then(|| {
                route::virtual_host(format!("{host}:{port}"), vec![host.to_owned()], routes)
            }));
        }
    }
    table.push(Some(route::catch_all(mesh)));
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
    if let Some(mut host) = service_host(rules, service, service, port) {
        host.domains = vec!["*".to_owned()];
        table.push(Some(host));
    } else {
        table.push(Some(route::catch_all(rules.mesh)));
    }
    table.into_resource(name)
}

/// The table of a gateway port: hosts of all servers, each with the routes of all rules that are bound to the server's gateway, oldest first.
pub(crate) fn gateway_port(
    mesh: &Mesh,
    node: &Node,
    name: &str,
    servers: &[Server<'_>],
) -> Resource {
    let labels = mesh.labels_of(node);
    let mut hosts: BTreeMap<String, (u16, Vec<Route>)> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for (gateway, server) in servers {
        let reference = gateway.reference();
        let client = Client {
            mesh,
            gateway: &reference,
            namespace: &node.namespace,
            labels,
            port: server.port,
        };
        for rule in mesh.gateway_virtual_services(&reference, &node.namespace) {
            for host in shared_hosts(&server.hosts, rule) {
                // Two servers may have a host in common; its rules count once.
                if seen.insert((host.clone(), rule.key.clone())) {
                    let entry = hosts
                        .entry(host)
                        .or_insert_with(|| (server.port, Vec::new()));
                    entry.1.extend(route::of_virtual_service(rule, &client));
                }
            }
        }
    }
    let mut table = Table::default();
    for (host, (port, routes)) in hosts
        .into_iter()
        .filter(|(_, (_, routes))| !routes.is_empty())
    {
        table.push(Some(route::virtual_host(
            format!("{host}:{port}"),
            vec![host],
            routes,
        )));
    }
    if table.hosts.is_empty() {
        let port = servers.first().map_or(0, |(_, server)| server.port);
        table.push(Some(route::virtual_host(
            format!("blackhole:{port}"),
            vec!["*".to_owned()],
            Vec::new(),
        )));
    }
    table.into_resource(name)
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

/// The service behind `service` if it has an HTTP port of this number.
fn http_target<'a>(
    mesh: &'a Mesh,
    service: &'a Arc<Service>,
    port: u16,
) -> Option<&'a Arc<Service>> {
    let target = mesh.resolve_alias(service)?;
    let protocol = target.port(port)?.protocol;
    (protocol.is_http() || protocol == Protocol::Auto).then_some(target)
}

/// The virtual host of a service: its rules, or the way straight to it. `None` if there are rules and none of them is for this client.
fn service_host(
    rules: &Rules<'_>,
    service: &Service,
    target: &Service,
    port: u16,
) -> Option<VirtualHost> {
    let routes = match rules.for_host(&service.host) {
        Some(rule) => route::of_virtual_service(rule, &rules.client(port)),
        None => vec![route::default_route(names::outbound_cluster(
            port,
            "",
            &target.host,
        ))],
    };
    (!routes.is_empty()).then(|| {
        route::virtual_host(
            format!("{}:{port}", service.host),
            domains(service, rules.node),
            routes,
        )
    })
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
    /// The oldest rule of each host.
    by_host: BTreeMap<&'a str, &'a VirtualService>,
    /// Wildcard hosts, longest first.
    wildcards: Vec<&'a str>,
}

impl<'a> Rules<'a> {
    pub(crate) fn new(mesh: &'a Mesh, node: &'a Node) -> Self {
        let mut by_host = BTreeMap::new();
        for rule in mesh
            .sidecar_virtual_services(&node.namespace)
            .filter(|rule| !rule.http.is_empty())
        {
            for host in &rule.hosts {
                by_host.entry(host.as_str()).or_insert(rule.as_ref());
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
            by_host,
            wildcards,
        }
    }

    fn client(&self, port: u16) -> Client<'a> {
        let Self { mesh, node, .. } = *self;
        Client {
            mesh,
            gateway: MESH_GATEWAY,
            namespace: &node.namespace,
            labels: mesh.labels_of(node),
            port,
        }
    }

    /// The rule for a host: of its exact name, else of the longest wildcard.
    fn for_host(&self, host: &str) -> Option<&'a VirtualService> {
        let covering = || {
            self.wildcards
                .iter()
                .copied()
                .find(|wildcard| hostname::covers(wildcard, host))
        };
        self.by_host
            .get(host)
            .or_else(|| self.by_host.get(covering()?))
            .copied()
    }

    /// Hosts that no visible service has.
    fn without_service(&self) -> impl Iterator<Item = (&'a str, &'a VirtualService)> {
        let visible = |host: &str| {
            self.mesh
                .service(host)
                .is_some_and(|service| service.visibility.includes(&self.node.namespace))
        };
        self.by_host
            .iter()
            .filter(move |(host, _)| !visible(host))
            .map(|(host, rule)| (*host, *rule))
    }
}

/// A route table in the making. Envoy refuses a table in which two virtual hosts share a domain: the first one keeps it.
#[derive(Default)]
struct Table {
    hosts: Vec<VirtualHost>,
    domains: BTreeSet<String>,
}

impl Table {
    fn push(&mut self, host: Option<VirtualHost>) {
        let Some(mut host) = host else {
            return;
        };
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
