//! Rules for EnvoyFilter. Whether a patch's value fits its type is asked where Envoy's types are known.

use crate::networking::EnvoyFilter;
use crate::networking::envoy_filter::{
    ApplyTo, EnvoyConfigObjectMatch, EnvoyConfigObjectPatch, ListenerMatch, PatchContext,
    PatchOperation,
};

use super::{Check, Validate, names};

/// Names that filters had in Envoy's second API, and their names today: a condition on an old one never holds.
const OLD_NAMES: &[(&str, &str)] = &[
    ("envoy.buffer", "envoy.filters.http.buffer"),
    (
        "envoy.client_ssl_auth",
        "envoy.filters.network.client_ssl_auth",
    ),
    ("envoy.cors", "envoy.filters.http.cors"),
    ("envoy.echo", "envoy.filters.network.echo"),
    ("envoy.ext_authz", "envoy.filters.http.ext_authz"),
    ("envoy.fault", "envoy.filters.http.fault"),
    (
        "envoy.grpc_http1_bridge",
        "envoy.filters.http.grpc_http1_bridge",
    ),
    (
        "envoy.grpc_json_transcoder",
        "envoy.filters.http.grpc_json_transcoder",
    ),
    ("envoy.grpc_web", "envoy.filters.http.grpc_web"),
    ("envoy.gzip", "envoy.filters.http.gzip"),
    ("envoy.health_check", "envoy.filters.http.health_check"),
    (
        "envoy.http_connection_manager",
        "envoy.filters.network.http_connection_manager",
    ),
    ("envoy.http_dynamo_filter", "envoy.filters.http.dynamo"),
    ("envoy.ip_tagging", "envoy.filters.http.ip_tagging"),
    (
        "envoy.listener.original_dst",
        "envoy.filters.listener.original_dst",
    ),
    (
        "envoy.listener.original_src",
        "envoy.filters.listener.original_src",
    ),
    (
        "envoy.listener.proxy_protocol",
        "envoy.filters.listener.proxy_protocol",
    ),
    (
        "envoy.listener.tls_inspector",
        "envoy.filters.listener.tls_inspector",
    ),
    ("envoy.lua", "envoy.filters.http.lua"),
    ("envoy.mongo_proxy", "envoy.filters.network.mongo_proxy"),
    ("envoy.rate_limit", "envoy.filters.http.ratelimit"),
    ("envoy.ratelimit", "envoy.filters.network.ratelimit"),
    ("envoy.redis_proxy", "envoy.filters.network.redis_proxy"),
    ("envoy.router", "envoy.filters.http.router"),
    ("envoy.squash", "envoy.filters.http.squash"),
    ("envoy.tcp_proxy", "envoy.filters.network.tcp_proxy"),
];
/// The only filter that has filters inside.
const MANAGER: &str = "envoy.filters.network.http_connection_manager";

impl Validate for EnvoyFilter {
    fn validate(&self, check: &mut Check) {
        check.warn("EnvoyFilter reaches into generated configuration, which changes between versions; check it after each upgrade");
        if self.workload_selector.is_some() && !self.target_refs.is_empty() {
            check.error("workloadSelector and targetRefs exclude each other");
        }
        check.part("workloadSelector", &self.workload_selector);
        check.require(
            self.target_refs.len() <= 16,
            "targetRefs",
            "more than 16 targets",
        );
        check.parts("targetRefs", &self.target_refs);
        check.each("configPatches", &self.config_patches, config_patch);
    }
}

fn config_patch(check: &mut Check, patch: &EnvoyConfigObjectPatch) {
    let matcher = patch.matcher.as_ref();
    let waypoint = matcher.is_some_and(|matcher| matcher.context == PatchContext::Waypoint);
    check.require(
        patch.apply_to != ApplyTo::Invalid || waypoint,
        "applyTo",
        "what is to be patched has to be given, such as HTTP_FILTER or CLUSTER",
    );
    if let Some(matcher) = matcher {
        check.at("match", |check| condition(patch.apply_to, matcher, check));
    }
    let Some(what) = &patch.patch else {
        return check.error_at("patch", "a patch has to be given");
    };
    check.at("patch", |check| {
        check.require(
            what.operation != PatchOperation::Invalid,
            "operation",
            "an operation has to be given, such as MERGE or INSERT_BEFORE",
        );
        let valueless =
            what.value.is_null() && what.operation != PatchOperation::Remove && !waypoint;
        check.require(!valueless, "value", "a value has to be given");
        if !what.value.is_null() && !what.value.is_object() {
            check.error_at("value", "a value is an object: fields of what is patched");
        }
        if let Some(name) = what.value.get("name").and_then(serde_json::Value::as_str) {
            check.at("value.name", |check| old_name(name, check));
        }
    });
}

/// Conditions fit what is patched.
fn condition(apply_to: ApplyTo, matcher: &EnvoyConfigObjectMatch, check: &mut Check) {
    if let Some(proxy) = &matcher.proxy
        && !proxy.proxy_version.is_empty()
    {
        check.at("proxy.proxyVersion", |check| {
            names::regex(&proxy.proxy_version, check)
        });
    }
    let given = [
        ("listener", matcher.listener.is_some()),
        ("routeConfiguration", matcher.route_configuration.is_some()),
        ("cluster", matcher.cluster.is_some()),
        ("waypoint", matcher.waypoint.is_some()),
    ];
    let given: Vec<&str> = given
        .iter()
        .filter(|(_, given)| *given)
        .map(|(name, _)| *name)
        .collect();
    if given.len() > 1 {
        check.error(format!("{} exclude each other", given.join(" and ")));
    }
    let waypoint = matcher.context == PatchContext::Waypoint;
    check.require(
        waypoint || matcher.waypoint.is_none(),
        "waypoint",
        "goes with context WAYPOINT only",
    );
    let fitting = match apply_to {
        _ if waypoint => "waypoint",
        ApplyTo::Listener
        | ApplyTo::FilterChain
        | ApplyTo::NetworkFilter
        | ApplyTo::HttpFilter
        | ApplyTo::ListenerFilter => "listener",
        ApplyTo::RouteConfiguration | ApplyTo::VirtualHost | ApplyTo::HttpRoute => {
            "routeConfiguration"
        }
        ApplyTo::Cluster => "cluster",
        ApplyTo::Invalid | ApplyTo::ExtensionConfig | ApplyTo::Bootstrap => return,
    };
    for name in given.iter().filter(|name| **name != fitting) {
        check.error_at(
            name,
            format!("does not fit applyTo; write conditions on {fitting}, or leave it out"),
        );
    }
    if let Some(listener) = &matcher.listener {
        check.at("listener", |check| {
            listener_condition(apply_to, listener, check)
        });
    }
}

fn listener_condition(apply_to: ApplyTo, listener: &ListenerMatch, check: &mut Check) {
    if !listener.listener_filter.is_empty() {
        check.at("listenerFilter", |check| {
            old_name(&listener.listener_filter, check)
        });
    }
    let filter = listener
        .filter_chain
        .as_ref()
        .and_then(|chain| chain.filter.as_ref());
    let Some(filter) = filter else { return };
    check.at("filterChain.filter", |check| {
        check.require(
            !filter.name.is_empty(),
            "name",
            "empty; write the name of a filter",
        );
        check.at("name", |check| old_name(&filter.name, check));
        let Some(inner) = &filter.sub_filter else {
            return;
        };
        check.at("subFilter", |check| {
            if apply_to != ApplyTo::HttpFilter {
                check.error("a filter inside another can be named with applyTo HTTP_FILTER only");
            } else if !matches!(
                filter.name.as_str(),
                MANAGER | "envoy.http_connection_manager"
            ) {
                check.error(format!(
                    "{:?} has no filters inside; {MANAGER} has",
                    filter.name
                ));
            }
            check.require(
                !inner.name.is_empty(),
                "name",
                "empty; write the name of a filter",
            );
            check.at("name", |check| old_name(&inner.name, check));
        });
    });
}

fn old_name(name: &str, check: &mut Check) {
    if let Some((_, new)) = OLD_NAMES.iter().find(|(old, _)| *old == name) {
        check.warn(format!("{name:?} is an old name; write {new:?}"));
    }
}
