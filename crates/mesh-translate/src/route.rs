//! HTTP rules: from a VirtualService to Envoy's routes, and the routes of services without one.

mod action;
mod faults;
mod headers;
mod matching;
mod retry;

use std::collections::BTreeMap;
use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3::route::Action;
use envoy_types::pb::envoy::config::route::v3::route_action::ClusterSpecifier;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::config::route::v3::{
    DirectResponseAction, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost,
};
use mesh_api::networking::virtual_service::{
    Destination, HttpMatchRequest, HttpRoute, L4MatchAttributes, TlsMatchAttributes,
};
use mesh_model::{Mesh, Node, VirtualService};

use crate::pb::{boolean, duration, uint32};
use crate::{cluster, metadata, names};

/// Longest body of a fixed response, in bytes, as Istio sets it.
const DIRECT_RESPONSE_LIMIT: u32 = 1 << 20;
/// Answer to requests for unknown hosts where the mesh allows only known ones.
const BLOCKED_STATUS: u32 = 502;

/// For whom rules are translated.
#[derive(Clone, Copy)]
pub(crate) struct Client<'a> {
    pub(crate) mesh: &'a Mesh,
    /// The proxy.
    pub(crate) node: &'a Node,
    /// The gateway (`namespace/name`), or [`MESH_GATEWAY`] for a sidecar.
    pub(crate) gateway: &'a str,
    /// Labels of the proxy's pod.
    pub(crate) labels: &'a BTreeMap<String, String>,
    /// Port that the client addressed, which conditions on ports and destinations without a port mean.
    pub(crate) port: u16,
}

impl<'a> Client<'a> {
    /// The cluster of a destination.
    pub(crate) fn cluster(&self, destination: &Destination) -> String {
        let (host, port) = self.target(destination);
        names::outbound_cluster(port, &destination.subset, host)
    }

    /// Host and port of a destination: of the service behind an alias; the port that the client addressed where the rule names none and the
    /// service has several.
    pub(crate) fn target<'b>(&self, destination: &'b Destination) -> (&'b str, u16)
    where
        'a: 'b,
    {
        let service = self.mesh.service(&destination.host);
        let host = match service.and_then(|service| self.mesh.resolve_alias(service)) {
            Some(service) => service.host.as_str(),
            None => &destination.host,
        };
        let port = destination
            .port
            .as_ref()
            .and_then(|port| u16::try_from(port.number).ok())
            .filter(|port| *port != 0);
        (host, port.unwrap_or(self.port))
    }

    /// True if a condition on TCP connections can hold for this client.
    pub(crate) fn admits_tcp(&self, item: &L4MatchAttributes) -> bool {
        self.is_at(&item.gateways, item.port)
            && self.is_source(&item.source_labels, &item.source_namespace)
    }

    /// The same for TLS.
    pub(crate) fn admits_tls(&self, item: &TlsMatchAttributes) -> bool {
        self.is_at(&item.gateways, item.port)
            && self.is_source(&item.source_labels, &item.source_namespace)
    }

    /// True if one of the gateways, and the port, are this client's; none of them, or port 0, is any.
    pub(crate) fn is_at(&self, gateways: &[String], port: u32) -> bool {
        (gateways.is_empty() || gateways.iter().any(|gateway| gateway == self.gateway))
            && (port == 0 || port == u32::from(self.port))
    }

    fn is_source(&self, labels: &BTreeMap<String, String>, namespace: &str) -> bool {
        let labelled = labels
            .iter()
            .all(|(key, value)| self.labels.get(key) == Some(value));
        labelled && (namespace.is_empty() || namespace == self.node.namespace)
    }
}

/// A route table with the settings that all tables have.
pub(crate) fn configuration(name: String, virtual_hosts: Vec<VirtualHost>) -> RouteConfiguration {
    RouteConfiguration {
        name,
        virtual_hosts,
        // A route to a cluster that does not exist answers 503, the others go on.
        validate_clusters: boolean(false),
        max_direct_response_body_size_bytes: uint32(DIRECT_RESPONSE_LIMIT),
        ignore_port_in_host_matching: true,
        ..RouteConfiguration::default()
    }
}

/// A virtual host with the settings that all have.
pub(crate) fn virtual_host(name: String, domains: Vec<String>, routes: Vec<Route>) -> VirtualHost {
    VirtualHost {
        name,
        domains,
        routes,
        include_request_attempt_count: true,
        ..VirtualHost::default()
    }
}

/// The only virtual host of an inbound port. A request that did not reach the application is tried again, where `retries` says so.
pub(crate) fn inbound_host(name: &str, cluster: &str, retries: bool) -> VirtualHost {
    let action = RouteAction {
        retry_policy: retries.then(retry::inbound),
        ..to_cluster(cluster.to_owned())
    };
    let route = Route {
        name: "default".to_owned(),
        r#match: anything(),
        action: Some(Action::Route(action)),
        ..Route::default()
    };
    VirtualHost {
        include_request_attempt_count: false,
        ..virtual_host(name.to_owned(), vec!["*".to_owned()], vec![route])
    }
}

/// The route of a service without rules.
pub(crate) fn default_route(client: &Client<'_>, host: &str) -> Route {
    let hash_policy = cluster::hash_policies(client.mesh, client.node, host, "", client.port);
    let action = RouteAction {
        retry_policy: retry::of(None, client.mesh.config(), !hash_policy.is_empty()),
        hash_policy,
        ..to_cluster(names::outbound_cluster(client.port, "", host))
    };
    Route {
        name: "default".to_owned(),
        r#match: anything(),
        action: Some(Action::Route(action)),
        ..Route::default()
    }
}

/// The virtual host for all hosts that nothing else in a table is for.
pub(crate) fn catch_all(mesh: &Mesh) -> VirtualHost {
    let (name, action) = match names::catch_all_cluster(mesh) {
        names::PASSTHROUGH => (
            "allow_any",
            Action::Route(to_cluster(names::PASSTHROUGH.to_owned())),
        ),
        _ => (
            "block_all",
            Action::DirectResponse(DirectResponseAction {
                status: BLOCKED_STATUS,
                ..DirectResponseAction::default()
            }),
        ),
    };
    let route = Route {
        name: name.to_owned(),
        r#match: anything(),
        action: Some(action),
        ..Route::default()
    };
    virtual_host(name.to_owned(), vec!["*".to_owned()], vec![route])
}

/// The routes of a VirtualService for one client; none if no rule applies to it.
pub(crate) fn of_virtual_service(rule: &VirtualService, client: &Client<'_>) -> Vec<Route> {
    let mut routes = Vec::new();
    for http in &rule.http {
        if http.matches.is_empty() {
            routes.push(route(rule, http, None, client));
            return routes;
        }
        for condition in http
            .matches
            .iter()
            .filter(|condition| applies(condition, client))
        {
            let route = route(rule, http, Some(condition), client);
            // What comes after a route that takes everything is never reached.
            let last = is_catch_all(&route);
            routes.push(route);
            if last {
                return routes;
            }
        }
    }
    routes
}

/// True if a route takes every request, so that nothing after it is ever reached.
pub(crate) fn is_catch_all(route: &Route) -> bool {
    let Some(conditions) = &route.r#match else {
        return false;
    };
    let any_path = match &conditions.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => prefix == "/",
        Some(PathSpecifier::SafeRegex(pattern)) => pattern.regex == ".*",
        _ => false,
    };
    any_path
        && conditions.headers.is_empty()
        && conditions.query_parameters.is_empty()
        && conditions.dynamic_metadata.is_empty()
}

/// Conditions on the client, decided here: where gateways are named only they count, else labels and namespace of the proxy; the port always.
fn applies(condition: &HttpMatchRequest, client: &Client<'_>) -> bool {
    let place = !condition.gateways.is_empty()
        || client.is_source(&condition.source_labels, &condition.source_namespace);
    place && client.is_at(&condition.gateways, condition.port)
}

fn route(
    rule: &VirtualService,
    http: &HttpRoute,
    condition: Option<&HttpMatchRequest>,
    client: &Client<'_>,
) -> Route {
    let mut route = Route {
        name: name(http, condition),
        r#match: condition.map_or_else(anything, |condition| Some(matching::of(condition))),
        metadata: metadata::single("config", metadata::config_path(&rule.key)),
        typed_per_filter_config: faults::per_filter(http),
        stat_prefix: condition.map_or_else(String::new, |condition| condition.stat_prefix.clone()),
        ..Route::default()
    };
    headers::on_route(&mut route, http);
    route.action = Some(action::of(http, condition, client));
    route
}

/// The rule's name, with the condition's after a dot.
fn name(http: &HttpRoute, condition: Option<&HttpMatchRequest>) -> String {
    match condition.map_or("", |condition| condition.name.as_str()) {
        "" => http.name.clone(),
        name => format!("{}.{name}", http.name),
    }
}

fn anything() -> Option<RouteMatch> {
    Some(RouteMatch {
        path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
        ..RouteMatch::default()
    })
}

/// Timeouts are off unless a rule sets them: Envoy's own default would be 15 s.
#[expect(
    deprecated,
    reason = "Istio still sends max_grpc_timeout, and older Envoys know nothing else"
)]
fn to_cluster(name: String) -> RouteAction {
    RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(name)),
        timeout: duration(Duration::ZERO),
        max_grpc_timeout: duration(Duration::ZERO),
        ..RouteAction::default()
    }
}
