//! CUSTOM policies: what an external authorizer is asked about.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::grpc_service::{EnvoyGrpc, TargetSpecifier};
use envoy_types::pb::envoy::config::core::v3::http_uri::HttpUpstreamType;
use envoy_types::pb::envoy::config::core::v3::{ApiVersion, GrpcService, HeaderValue, HttpUri};
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::ext_authz::Services;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::{
    AuthorizationRequest, AuthorizationResponse, BufferSettings, ExtAuthz, HttpService,
};
use envoy_types::pb::envoy::extensions::filters::network::ext_authz::v3::ExtAuthz as NetworkExtAuthz;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{ListStringMatcher, MetadataMatcher};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use mesh_api::mesh_config::{ExtAuthzGrpc, ExtAuthzHttp, ExtensionProvider, RequestBody};
use mesh_model::{AuthorizationPolicy, Mesh, Node};

use super::Policies;
use super::matcher::{metadata, string, string_value, with};
use super::rbac::{self, HttpRbac, NetworkRbac, Rules, Verdict};
use crate::names;
use crate::pb::{any, duration};
use crate::resources::Resources;

const HTTP_NAME: &str = "envoy.filters.http.ext_authz";
const NETWORK_NAME: &str = "envoy.filters.network.ext_authz";
/// Limit for an answer where the provider names none: what the service's own DestinationRule allows is shorter.
const TIMEOUT: Duration = Duration::from_secs(600);
/// How the RBAC filter tells the next one whether a rule matched.
const SHADOW_PREFIX: &str = "istio_ext_authz_";
const MATCHED: &str = "istio_ext_authz_shadow_effective_policy_id";

/// An authorizer as filters, for requests and, where it can judge them, for connections.
struct Authorizer {
    http: ExtAuthz,
    tcp: Option<NetworkExtAuthz>,
}

/// Adds a filter that finds out whether a rule matches, and the one that asks then. What can't be asked is refused.
pub(super) fn add<'a>(
    mesh: &Mesh,
    node: &Node,
    policies: &[&'a AuthorizationPolicy],
    filters: &mut Policies<'a>,
    resources: &mut Resources,
) {
    let mut providers: Vec<&str> = policies
        .iter()
        .map(|policy| policy.provider.as_str())
        .collect();
    providers.sort_unstable();
    providers.dedup();
    let several = (providers.len() > 1).then(|| {
        format!(
            "policies with action CUSTOM name several providers ({}) for one workload, and only one is possible",
            providers.join(", ")
        )
    });
    for name in &providers {
        let of_provider: Vec<&'a AuthorizationPolicy> = policies
            .iter()
            .copied()
            .filter(|policy| policy.provider == *name)
            .collect();
        let prefix = format!("istio-ext-authz-{name}-");
        let rules = |tcp| Rules::of(mesh, &of_provider, Verdict::Deny, tcp, &prefix);
        let authorizer = match &several {
            Some(reason) => Err(reason.clone()),
            None => authorizer(mesh, node, name),
        };
        let authorizer = match authorizer {
            Ok(authorizer) => Some(authorizer),
            Err(reason) => {
                for policy in &of_provider {
                    let message = format!("{reason}; what the rules match is refused");
                    resources.report(&policy.key, "spec.provider.name", message);
                }
                None
            }
        };
        let Some(authorizer) = authorizer else {
            let refused = HttpRbac::new(Some(rules(false).refusing()), None, "");
            filters.push_http(rbac::HTTP_NAME, refused.any());
            let refused = NetworkRbac::new(Some(rules(true).refusing()), None, "");
            filters.push_tcp(rbac::NETWORK_NAME, refused.any());
            continue;
        };
        let shadow = HttpRbac::new(None, Some(rules(false)), SHADOW_PREFIX);
        filters.push_http(rbac::HTTP_NAME, shadow.any());
        let ask = ExtAuthz {
            filter_enabled_metadata: Some(matched(rbac::HTTP_NAME, &prefix)),
            ..authorizer.http
        };
        filters.push_http(HTTP_NAME, any(&ask));
        // An authorizer over HTTP judges requests only: connections pass it by, as in Istio.
        match authorizer.tcp {
            None => filters.requests_only.extend(&of_provider),
            Some(tcp) => {
                let shadow = NetworkRbac::new(None, Some(rules(true)), SHADOW_PREFIX);
                filters.push_tcp(rbac::NETWORK_NAME, shadow.any());
                let ask = NetworkExtAuthz {
                    filter_enabled_metadata: Some(matched(rbac::NETWORK_NAME, &prefix)),
                    ..tcp
                };
                filters.push_tcp(NETWORK_NAME, any(&ask));
            }
        }
    }
}

/// True unless no rule of a policy is for this port.
pub(super) fn concerns(policy: &AuthorizationPolicy, port: u16) -> bool {
    let port = port.to_string();
    let mut rules = policy.rules.iter();
    rules.any(|rule| {
        let mut operations = rule.to.iter().filter_map(|to| to.operation.as_ref());
        rule.to.is_empty()
            || operations.any(|operation| {
                (operation.ports.is_empty() || operation.ports.contains(&port))
                    && !operation.not_ports.contains(&port)
            })
    })
}

/// True where the RBAC filter before found a rule of the provider that matches.
fn matched(filter: &str, prefix: &str) -> MetadataMatcher {
    let prefix = with(MatchPattern::Prefix(prefix.to_owned()));
    metadata(filter, &[MATCHED], string_value(prefix))
}

fn authorizer(mesh: &Mesh, node: &Node, name: &str) -> Result<Authorizer, String> {
    let provider: &ExtensionProvider = mesh
        .config()
        .extension_providers
        .iter()
        .find(|provider| provider.name == name)
        .ok_or("it is not among extensionProviders of the mesh configuration")?;
    match (
        &provider.envoy_ext_authz_http,
        &provider.envoy_ext_authz_grpc,
    ) {
        (Some(http), None) => over_http(mesh, node, http),
        (None, Some(grpc)) => over_grpc(mesh, node, grpc),
        _ => Err("it is neither envoyExtAuthzHttp nor envoyExtAuthzGrpc".to_owned()),
    }
}

/// Host and cluster of `[NAMESPACE/]HOST`.
fn service(mesh: &Mesh, node: &Node, service: &str, port: u32) -> Result<(String, String), String> {
    let port = u16::try_from(port)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| format!("port {port} is not from 1 to 65535"))?;
    let (namespace, host) = match service.split_once('/') {
        Some((namespace, host)) => (Some(namespace), host),
        None => (None, service),
    };
    let short = namespace.map(|namespace| format!("{host}.{namespace}.svc.{}", mesh.domain()));
    let found = [Some(host.to_owned()), short]
        .into_iter()
        .flatten()
        .filter_map(|host| mesh.service(&host))
        .find(|service| namespace.is_none_or(|namespace| namespace == service.namespace))
        .filter(|service| service.visibility.includes(&node.namespace))
        .ok_or_else(|| format!("service {service:?} is not known (write NAMESPACE/HOST with the full name of the service)"))?;
    if found.port(port).is_none() {
        return Err(format!("{} has no port {port}", found.host));
    }
    Ok((
        found.host.clone(),
        names::outbound_cluster(port, "", &found.host),
    ))
}

fn over_http(mesh: &Mesh, node: &Node, given: &ExtAuthzHttp) -> Result<Authorizer, String> {
    let (host, cluster) = service(mesh, node, &given.service, given.port)?;
    if !given.path_prefix.is_empty() && !given.path_prefix.starts_with('/') {
        return Err(format!(
            "pathPrefix {:?} does not begin with /",
            given.path_prefix
        ));
    }
    let seen = if given.include_request_headers_in_check.is_empty() {
        &given.include_headers_in_check
    } else {
        &given.include_request_headers_in_check
    };
    let added: Vec<HeaderValue> = given
        .include_additional_headers_in_check
        .iter()
        .map(|(key, value)| HeaderValue {
            key: key.clone(),
            value: value.clone(),
            ..HeaderValue::default()
        })
        .collect();
    let response = AuthorizationResponse {
        allowed_upstream_headers: headers(&given.headers_to_upstream_on_allow),
        allowed_client_headers: headers(&given.headers_to_downstream_on_deny),
        allowed_client_headers_on_success: headers(&given.headers_to_downstream_on_allow),
        ..AuthorizationResponse::default()
    };
    let service = HttpService {
        server_uri: Some(HttpUri {
            uri: format!("http://{host}"),
            timeout: duration(given.timeout.map_or(TIMEOUT, |timeout| timeout.0)),
            http_upstream_type: Some(HttpUpstreamType::Cluster(cluster)),
        }),
        path_prefix: given.path_prefix.clone(),
        authorization_request: (!added.is_empty()).then(|| AuthorizationRequest {
            headers_to_add: added,
            ..AuthorizationRequest::default()
        }),
        authorization_response: (response != AuthorizationResponse::default()).then_some(response),
        ..HttpService::default()
    };
    let http = ExtAuthz {
        transport_api_version: ApiVersion::V3 as i32,
        failure_mode_allow: given.fail_open,
        clear_route_cache: given.clear_route_cache,
        status_on_error: status(&given.status_on_error)?,
        with_request_body: given.include_request_body_in_check.as_ref().map(body),
        allowed_headers: headers(seen),
        services: Some(Services::HttpService(service)),
        ..ExtAuthz::default()
    };
    Ok(Authorizer { http, tcp: None })
}

fn over_grpc(mesh: &Mesh, node: &Node, given: &ExtAuthzGrpc) -> Result<Authorizer, String> {
    let (_, cluster) = service(mesh, node, &given.service, given.port)?;
    let service = GrpcService {
        timeout: duration(given.timeout.map_or(TIMEOUT, |timeout| timeout.0)),
        target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
            // The name of a cluster has letters that may not be in an authority.
            authority: cluster.replace('|', "_."),
            cluster_name: cluster,
            ..EnvoyGrpc::default()
        })),
        ..GrpcService::default()
    };
    let http = ExtAuthz {
        transport_api_version: ApiVersion::V3 as i32,
        failure_mode_allow: given.fail_open,
        clear_route_cache: given.clear_route_cache,
        status_on_error: status(&given.status_on_error)?,
        with_request_body: given.include_request_body_in_check.as_ref().map(body),
        services: Some(Services::GrpcService(service.clone())),
        ..ExtAuthz::default()
    };
    let tcp = NetworkExtAuthz {
        stat_prefix: "tcp.".to_owned(),
        grpc_service: Some(service),
        failure_mode_allow: given.fail_open,
        transport_api_version: ApiVersion::V3 as i32,
        ..NetworkExtAuthz::default()
    };
    Ok(Authorizer {
        http,
        tcp: Some(tcp),
    })
}

fn status(text: &str) -> Result<Option<HttpStatus>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let code: i32 = text
        .parse()
        .ok()
        .filter(|code| (100..600).contains(code))
        .ok_or_else(|| format!("statusOnError {text:?} is not a status code"))?;
    Ok(Some(HttpStatus { code }))
}

fn body(given: &RequestBody) -> BufferSettings {
    BufferSettings {
        max_request_bytes: given.max_request_bytes,
        allow_partial_message: given.allow_partial_message,
        pack_as_bytes: given.pack_as_bytes,
    }
}

/// Names of headers, `x*` and `*x` allowed; none where none is given.
fn headers(names: &[String]) -> Option<ListStringMatcher> {
    (!names.is_empty()).then(|| ListStringMatcher {
        patterns: names.iter().map(|name| string(name)).collect(),
    })
}
