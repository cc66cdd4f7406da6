//! HTTP rules: from a VirtualService to Envoy's routes, and the routes of services without one.

mod action;
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
use mesh_api::networking::virtual_service::{HttpMatchRequest, HttpRoute};
use mesh_model::{MESH_GATEWAY, Mesh, VirtualService};

use crate::pb::{boolean, duration, uint32};
use crate::{metadata, names};

/// Longest body of a fixed response, in bytes, as Istio sets it.
const DIRECT_RESPONSE_LIMIT: u32 = 1 << 20;
/// Answer to requests for unknown hosts where the mesh allows only known ones.
const BLOCKED_STATUS: u32 = 502;

/// For whom rules are translated.
#[derive(Clone, Copy)]
pub(crate) struct Client<'a> {
    pub(crate) mesh: &'a Mesh,
    /// The gateway (`namespace/name`), or [`MESH_GATEWAY`] for a sidecar.
    pub(crate) gateway: &'a str,
    /// Namespace of the proxy.
    pub(crate) namespace: &'a str,
    /// Labels of the proxy's pod.
    pub(crate) labels: &'a BTreeMap<String, String>,
    /// Port that the client addressed, which conditions on ports and destinations without a port mean.
    pub(crate) port: u16,
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
pub(crate) fn default_route(cluster: String) -> Route {
    let action = RouteAction {
        retry_policy: Some(retry::default_policy()),
        ..to_cluster(cluster)
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
            routes.push(route(rule, http, Some(condition), client));
            // What comes after a route that takes everything is never reached.
            if matching::is_catch_all(condition) {
                return routes;
            }
        }
    }
    routes
}

/// Conditions on the client, decided here: where gateways are named only they count, else labels and namespace of the proxy; the port always.
fn applies(condition: &HttpMatchRequest, client: &Client<'_>) -> bool {
    let place = if condition.gateways.is_empty() {
        let sidecar_only = client.gateway == MESH_GATEWAY;
        let labels = condition
            .source_labels
            .iter()
            .all(|(key, value)| client.labels.get(key) == Some(value));
        let namespace =
            condition.source_namespace.is_empty() || condition.source_namespace == client.namespace;
        (!sidecar_only
            && condition.source_labels.is_empty()
            && condition.source_namespace.is_empty())
            || (labels && namespace)
    } else {
        condition
            .gateways
            .iter()
            .any(|gateway| gateway == client.gateway)
    };
    place && (condition.port == 0 || condition.port == u32::from(client.port))
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
        ..Route::default()
    };
    headers::on_route(&mut route, http);
    route.action = Some(action::of(http, condition, client));
    route
}

/// The rule's name, with the condition's after a dot where both have one.
fn name(http: &HttpRoute, condition: Option<&HttpMatchRequest>) -> String {
    match condition.map_or("", |condition| condition.name.as_str()) {
        "" => http.name.clone(),
        name if http.name.is_empty() => name.to_owned(),
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
