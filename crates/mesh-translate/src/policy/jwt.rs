//! Tokens: the filter that checks them.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::route::v3::RouteMatch;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::jwt_provider::{
    JwksSourceSpecifier, NormalizePayload,
};
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::jwt_requirement::RequiresType;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::requirement_rule::RequirementType;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::{
    JwtClaimToHeader, JwtHeader, JwtProvider, JwtRequirement, JwtRequirementAndList,
    JwtRequirementOrList, RequirementRule,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::google::protobuf::{Any, Empty};
use mesh_api::security::request_authentication::{JwtRule, Presence};
use mesh_model::{KeySource, Mesh, Node, NodeKind};
use prost::Message;

const NAME: &str = "envoy.filters.http.jwt_authn";
const TYPE: &str =
    "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
/// Key of what a token says in the filter's metadata.
const PAYLOAD: &str = "payload";
/// Claims that are lists separated by spaces, whatever rules say (RFC 8693 section 4.2, and Istio's own).
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];
/// No key, so that every token fails.
const NO_KEYS: &str = r#"{"keys":[]}"#;
/// A key that has signed nothing, for Envoys that refuse an empty set: the point of P-256 whose x coordinate is the first on the curve that
/// SHA-256 of "mesh: a key that nobody has, N" gives for N from 0 on, so that nobody knows its private part.
const NOBODYS_KEY: &str = r#"{"keys":[{"kty":"EC","crv":"P-256","alg":"ES256","kid":"none","x":"yJ963_Gz1DnhfovHyQi6zHyOjP3T8ReWjvzYoAvFRmk","y":"gikhYKQu6hmD5SlZuW-VCLG6z-UYaeszhX77g3YiLkk"}]}"#;

/// `envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication` with an ordered map; field numbers as published.
#[derive(Clone, PartialEq, Message)]
struct JwtAuthentication {
    #[prost(btree_map = "string, message", tag = "1")]
    providers: BTreeMap<String, JwtProvider>,
    #[prost(message, repeated, tag = "2")]
    rules: Vec<RequirementRule>,
    #[prost(bool, tag = "4")]
    bypass_cors_preflight: bool,
}

/// The filter for a node's rules; none without rules.
pub(super) fn filter(mesh: &Mesh, node: &Node) -> Option<HttpFilter> {
    let mut rules = mesh.jwt_rules(node);
    if rules.is_empty() {
        return None;
    }
    rules.sort_by(|a, b| a.issuer.cmp(&b.issuer));
    let providers = rules
        .iter()
        .enumerate()
        .map(|(index, rule)| (name(index), provider(mesh, node, rule)));
    let config = JwtAuthentication {
        providers: providers.collect(),
        rules: vec![RequirementRule {
            r#match: Some(RouteMatch {
                path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
                ..RouteMatch::default()
            }),
            requirement_type: Some(RequirementType::Requires(requirement(&rules))),
        }],
        bypass_cors_preflight: true,
    };
    let config = Any {
        type_url: TYPE.to_owned(),
        value: config.encode_to_vec(),
    };
    Some(super::http_filter(NAME, config))
}

fn name(index: usize) -> String {
    format!("origins-{index}")
}

/// A token that is there has to be good. With several rules, one of them is enough, since rules may look in the same place: the rest of the condition
/// is for requests whose tokens none of them is about.
fn requirement(rules: &[&JwtRule]) -> JwtRequirement {
    let provider = |index: usize| requires(RequiresType::ProviderName(name(index)));
    let each: Vec<JwtRequirement> = rules
        .iter()
        .enumerate()
        .map(|(index, rule)| match rule.presence {
            Presence::Required => provider(index),
            Presence::Optional => any_of(vec![
                provider(index),
                requires(RequiresType::AllowMissing(Empty {})),
            ]),
        })
        .collect();
    if let [only] = each.as_slice() {
        return only.clone();
    }
    let required = rules.iter().any(|rule| rule.presence == Presence::Required);
    let all = requires(RequiresType::RequiresAll(JwtRequirementAndList {
        requirements: each,
    }));
    if required {
        return all;
    }
    let mut list: Vec<JwtRequirement> = (0..rules.len()).map(provider).collect();
    list.push(all);
    any_of(list)
}

fn any_of(requirements: Vec<JwtRequirement>) -> JwtRequirement {
    requires(RequiresType::RequiresAny(JwtRequirementOrList {
        requirements,
    }))
}

fn requires(kind: RequiresType) -> JwtRequirement {
    JwtRequirement {
        requires_type: Some(kind),
    }
}

fn provider(mesh: &Mesh, node: &Node, rule: &JwtRule) -> JwtProvider {
    let header = |header: &mesh_api::security::request_authentication::JwtHeader| JwtHeader {
        name: header.name.clone(),
        value_prefix: header.prefix.clone(),
    };
    let claim =
        |claim: &mesh_api::security::request_authentication::ClaimToHeader| JwtClaimToHeader {
            header_name: claim.header.clone(),
            claim_name: claim.claim.clone(),
            ..JwtClaimToHeader::default()
        };
    JwtProvider {
        issuer: rule.issuer.clone(),
        audiences: rule.audiences.clone(),
        forward: rule.forward_original_token,
        forward_payload_header: Some(rule.output_payload_to_header.clone())
            .filter(|name| is_header(name))
            .unwrap_or_default(),
        payload_in_metadata: PAYLOAD.to_owned(),
        normalize_payload_in_metadata: Some(NormalizePayload {
            space_delimited_claims: space_delimited(rule),
        }),
        from_headers: rule
            .from_headers
            .iter()
            .filter(|header| is_header(&header.name))
            .map(header)
            .collect(),
        from_params: rule.from_params.clone(),
        from_cookies: rule.from_cookies.clone(),
        claim_to_headers: rule
            .output_claim_to_headers
            .iter()
            .filter(|claim| is_header(&claim.header) && !claim.claim.is_empty())
            .map(claim)
            .collect(),
        // Routes of gateways may depend on claims, which are known only now.
        clear_route_cache: node.kind == NodeKind::Router,
        jwks_source_specifier: Some(JwksSourceSpecifier::LocalJwks(DataSource {
            specifier: Some(Specifier::InlineString(keys(mesh, node, rule))),
            ..DataSource::default()
        })),
        ..JwtProvider::default()
    }
}

/// True for the name of a header (RFC 9110 section 5.1); validation refuses others, and one that came through must not cost the whole listener.
fn is_header(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.bytes().all(fits)
}

fn space_delimited(rule: &JwtRule) -> Vec<String> {
    let mut claims: Vec<String> = SPACE_DELIMITED.map(str::to_owned).to_vec();
    for claim in &rule.space_delimited_claims {
        if !claims.contains(claim) {
            claims.push(claim.clone());
        }
    }
    claims
}

/// The rule's own keys, or those that were fetched; without any, every token fails.
fn keys(mesh: &Mesh, node: &Node, rule: &JwtRule) -> String {
    let fetched = |source: KeySource| mesh.jwks(&source).map(str::to_owned);
    let none = if node.stock_envoy {
        NOBODYS_KEY
    } else {
        NO_KEYS
    };
    let known = match KeySource::of(rule) {
        None => Some(rule.jwks.clone()),
        Some(source) => fetched(source),
    };
    known
        .filter(|keys| keys != NO_KEYS)
        .unwrap_or_else(|| none.to_owned())
}
