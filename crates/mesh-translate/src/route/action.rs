//! What happens to a request that matches: forward, redirect, answer.

use std::time::Duration;

use base64::Engine as _;
use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::route::v3::redirect_action::{
    PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier,
};
use envoy_types::pb::envoy::config::route::v3::route::Action;
use envoy_types::pb::envoy::config::route::v3::route_action::{
    ClusterSpecifier, HashPolicy, HostRewriteSpecifier,
};
use envoy_types::pb::envoy::config::route::v3::weighted_cluster::{ClusterWeight, cluster_weight};
use envoy_types::pb::envoy::config::route::v3::{
    DirectResponseAction, RedirectAction, RouteAction, WeightedCluster,
};
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatchAndSubstitute, RegexMatcher};
use mesh_api::StringMatch;
use mesh_api::networking::virtual_service::{
    HttpBody, HttpDirectResponse, HttpMatchRequest, HttpRedirect, HttpRewrite, HttpRoute,
    HttpRouteDestination, RedirectPort,
};

use super::{Client, faults, headers, retry};
use crate::cluster;
use crate::pb::{duration, uint32};

pub(super) fn of(
    http: &HttpRoute,
    condition: Option<&HttpMatchRequest>,
    client: &Client<'_>,
) -> Action {
    if let Some(given) = &http.redirect {
        return Action::Redirect(redirect(given, client));
    }
    if let Some(given) = &http.direct_response {
        return Action::DirectResponse(direct_response(given));
    }
    Action::Route(forward(http, condition, client))
}

#[expect(
    deprecated,
    reason = "Istio still sends max_grpc_timeout, and older Envoys know nothing else"
)]
fn forward(
    http: &HttpRoute,
    condition: Option<&HttpMatchRequest>,
    client: &Client<'_>,
) -> RouteAction {
    let limit = duration(http.timeout.map_or(Duration::ZERO, |timeout| timeout.0));
    let hash_policy = hash_policies(&http.route, client);
    // A hash means one endpoint; only of several destinations Istio does not look.
    let hashed = http.route.len() == 1 && !hash_policy.is_empty();
    let mut action = RouteAction {
        cluster_specifier: Some(destinations(&http.route, client)),
        timeout: limit,
        max_grpc_timeout: limit,
        retry_policy: retry::of(http.retries.as_ref(), client.mesh.config(), hashed),
        request_mirror_policies: faults::mirrors(http, client),
        hash_policy,
        ..RouteAction::default()
    };
    if let Some(given) = &http.rewrite {
        rewrite(
            &mut action,
            given,
            condition.and_then(|condition| condition.uri.as_ref()),
        );
    }
    let single = if let [only] = http.route.as_slice() {
        headers::host(only.headers.as_ref())
    } else {
        None
    };
    // rewrite.authority beats header operations, the rule's beat those of its only destination.
    let authority = http
        .rewrite
        .as_ref()
        .map(|rewrite| rewrite.authority.clone())
        .filter(|authority| !authority.is_empty());
    let host = authority
        .or_else(|| headers::host(http.headers.as_ref()))
        .or(single);
    action.host_rewrite_specifier = host.map(HostRewriteSpecifier::HostRewriteLiteral);
    action
}

/// The hash policies of all destinations that get anything, one after the other.
fn hash_policies(routes: &[HttpRouteDestination], client: &Client<'_>) -> Vec<HashPolicy> {
    let used = routes
        .iter()
        .filter(|route| routes.len() == 1 || route.weight > 0);
    let policies = used.flat_map(|route| {
        let (host, port) = client.target(&route.destination);
        cluster::hash_policies(
            client.mesh,
            client.node,
            host,
            &route.destination.subset,
            port,
        )
    });
    policies.collect()
}

/// One destination gets everything, whatever its weight; of several, those of weight 0 get nothing.
fn destinations(routes: &[HttpRouteDestination], client: &Client<'_>) -> ClusterSpecifier {
    if let [only] = routes {
        return ClusterSpecifier::Cluster(client.cluster(&only.destination));
    }
    let clusters = routes
        .iter()
        .filter(|route| route.weight > 0)
        .map(|route| weighted(route, client))
        .collect();
    ClusterSpecifier::WeightedClusters(WeightedCluster {
        clusters,
        ..WeightedCluster::default()
    })
}

fn weighted(route: &HttpRouteDestination, client: &Client<'_>) -> ClusterWeight {
    let operations = headers::operations(route.headers.as_ref());
    let host = headers::host(route.headers.as_ref());
    ClusterWeight {
        name: client.cluster(&route.destination),
        weight: uint32(route.weight.unsigned_abs()),
        request_headers_to_add: operations.request_add,
        request_headers_to_remove: operations.request_remove,
        response_headers_to_add: operations.response_add,
        response_headers_to_remove: operations.response_remove,
        host_rewrite_specifier: host.map(cluster_weight::HostRewriteSpecifier::HostRewriteLiteral),
        ..ClusterWeight::default()
    }
}

fn rewrite(action: &mut RouteAction, given: &HttpRewrite, uri: Option<&StringMatch>) {
    if let Some(regex) = &given.uri_regex_rewrite {
        action.regex_rewrite = Some(substitution(&regex.pattern, &regex.rewrite));
    } else if !given.uri.is_empty() {
        match uri {
            // A pattern has no matched prefix: the whole path is replaced.
            Some(StringMatch::Regex(_)) => {
                action.regex_rewrite = Some(substitution("^.*$", &given.uri.replace('\\', r"\\")))
            }
            _ => action.prefix_rewrite.clone_from(&given.uri),
        }
    }
}

fn substitution(pattern: &str, rewrite: &str) -> RegexMatchAndSubstitute {
    RegexMatchAndSubstitute {
        pattern: Some(RegexMatcher {
            regex: pattern.to_owned(),
            ..RegexMatcher::default()
        }),
        substitution: rewrite.to_owned(),
    }
}

fn redirect(given: &HttpRedirect, client: &Client<'_>) -> RedirectAction {
    let code = match given.redirect_code {
        302 => RedirectResponseCode::Found,
        303 => RedirectResponseCode::SeeOther,
        307 => RedirectResponseCode::TemporaryRedirect,
        308 => RedirectResponseCode::PermanentRedirect,
        _ => RedirectResponseCode::MovedPermanently,
    };
    let path = match (given.uri.as_str(), given.prefix_rewrite.as_str()) {
        ("", "") => None,
        (uri, "") => Some(PathRewriteSpecifier::PathRedirect(uri.to_owned())),
        (_, prefix) => Some(PathRewriteSpecifier::PrefixRewrite(prefix.to_owned())),
    };
    let scheme = (!given.scheme.is_empty())
        .then(|| SchemeRewriteSpecifier::SchemeRedirect(given.scheme.clone()));
    RedirectAction {
        host_redirect: given.authority.clone(),
        port_redirect: redirect_port(given, client),
        response_code: code as i32,
        scheme_rewrite_specifier: scheme,
        path_rewrite_specifier: path,
        ..RedirectAction::default()
    }
}

/// 0 leaves the port to Envoy, which then takes the scheme's own; so do the ports that a location need not name.
fn redirect_port(given: &HttpRedirect, client: &Client<'_>) -> u32 {
    let port = match (given.port, given.derive_port) {
        (Some(port), _) => port,
        (None, Some(RedirectPort::FromRequestPort)) => u32::from(client.port),
        (None, Some(RedirectPort::FromProtocolDefault) | None) => 0,
    };
    match (port, given.scheme.as_str()) {
        (80, "" | "http") | (443, "https") => 0,
        _ => port,
    }
}

fn direct_response(given: &HttpDirectResponse) -> DirectResponseAction {
    let specifier = given.body.as_ref().map(|body| match body {
        HttpBody::String(text) => Specifier::InlineString(text.clone()),
        HttpBody::Bytes(base64) => Specifier::InlineBytes(
            base64::engine::general_purpose::STANDARD
                .decode(base64)
                .unwrap_or_default(),
        ),
    });
    let body = specifier.map(|specifier| DataSource {
        specifier: Some(specifier),
        ..DataSource::default()
    });
    DirectResponseAction {
        status: given.status,
        body,
        ..DirectResponseAction::default()
    }
}
