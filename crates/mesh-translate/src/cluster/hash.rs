//! The key of consistent hashing, which routes and TCP proxies compute.

use envoy_types::pb::envoy::config::route::v3::route_action::HashPolicy;
use envoy_types::pb::envoy::config::route::v3::route_action::hash_policy::{
    ConnectionProperties, Cookie, CookieAttribute, Header, PolicySpecifier, QueryParameter,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::r#type::v3 as common;
use mesh_api::networking::destination_rule::{ConsistentHashLb, HttpCookie};
use mesh_model::{Mesh, Node};

use super::Policy;
use crate::pb::duration;

/// The hash policies of a route to a destination, as its DestinationRule says; none unless it asks for consistent hashing.
pub(crate) fn for_routes(
    mesh: &Mesh,
    node: &Node,
    host: &str,
    subset: &str,
    port: u16,
) -> Vec<HashPolicy> {
    let rule = mesh.destination_rule_for(host, node).map(AsRef::as_ref);
    Policy::new(mesh, rule, subset, port)
        .consistent_hash()
        .and_then(specifier)
        .map(|specifier| HashPolicy {
            policy_specifier: Some(specifier),
            ..HashPolicy::default()
        })
        .into_iter()
        .collect()
}

/// Sets what a DestinationRule says of TCP connections to a destination: hashing by source address, silence, longest life.
pub(crate) fn set_tcp_policy(
    proxy: &mut TcpProxy,
    mesh: &Mesh,
    node: &Node,
    host: &str,
    subset: &str,
    port: u16,
) {
    let rule = mesh.destination_rule_for(host, node).map(AsRef::as_ref);
    let policy = Policy::new(mesh, rule, subset, port);
    if policy
        .consistent_hash()
        .is_some_and(|hash| hash.use_source_ip)
    {
        let source = common::hash_policy::SourceIp {};
        proxy.hash_policy = vec![common::HashPolicy {
            policy_specifier: Some(common::hash_policy::PolicySpecifier::SourceIp(source)),
        }];
    }
    if let Some(tcp) = policy.tcp() {
        proxy.idle_timeout = tcp.idle_timeout.and_then(|limit| duration(limit.0));
        proxy.max_downstream_connection_duration = tcp
            .max_connection_duration
            .and_then(|limit| duration(limit.0));
    }
}

fn specifier(hash: &ConsistentHashLb) -> Option<PolicySpecifier> {
    if let Some(name) = &hash.http_header_name {
        return Some(PolicySpecifier::Header(Header {
            header_name: name.clone(),
            ..Header::default()
        }));
    }
    if let Some(given) = &hash.http_cookie {
        return Some(PolicySpecifier::Cookie(cookie(given)));
    }
    if let Some(name) = &hash.http_query_parameter_name {
        return Some(PolicySpecifier::QueryParameter(QueryParameter {
            name: name.clone(),
        }));
    }
    hash.use_source_ip
        .then_some(PolicySpecifier::ConnectionProperties(
            ConnectionProperties { source_ip: true },
        ))
}

fn cookie(given: &HttpCookie) -> Cookie {
    Cookie {
        name: given.name.clone(),
        // Without a TTL a missing cookie is not made; a TTL of 0 makes a session cookie.
        ttl: given.ttl.and_then(|ttl| duration(ttl.0)),
        path: given.path.clone(),
        attributes: given
            .attributes
            .iter()
            .map(|attribute| CookieAttribute {
                name: attribute.name.clone(),
                value: attribute.value.clone(),
            })
            .collect(),
    }
}
