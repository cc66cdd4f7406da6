//! Conditions of rules.

use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::config::route::v3::query_parameter_matcher::QueryParameterMatchSpecifier;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::config::route::v3::{HeaderMatcher, QueryParameterMatcher, RouteMatch};
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{MetadataMatcher, RegexMatcher, StringMatcher};
use mesh_api::StringMatch;
use mesh_api::networking::virtual_service::HttpMatchRequest;
use mesh_api::validate::claim_of_token;

use crate::pb::boolean;
use crate::policy;

pub(super) fn of(condition: &HttpMatchRequest) -> RouteMatch {
    let is_claim = |name: &String| claim_of_token(name).is_some();
    let mut headers: Vec<HeaderMatcher> = condition
        .headers
        .iter()
        .filter(|(name, _)| !is_claim(name))
        .map(|(name, value)| header(name, value))
        .collect();
    headers.extend(
        condition
            .without_headers
            .iter()
            .filter(|(name, _)| !is_claim(name))
            .map(|(name, value)| without_header(name, value)),
    );
    let claims = condition
        .headers
        .iter()
        .filter_map(|(name, value)| claim(name, value, false));
    let without = condition
        .without_headers
        .iter()
        .filter_map(|(name, value)| claim(name, value, true));
    headers.sort_by(|a, b| a.name.cmp(&b.name));
    let pseudo = [
        (":method", &condition.method),
        (":authority", &condition.authority),
        (":scheme", &condition.scheme),
    ];
    headers.extend(
        pseudo
            .into_iter()
            .filter_map(|(name, value)| Some(header(name, value.as_ref()?))),
    );
    RouteMatch {
        path_specifier: Some(path(condition.uri.as_ref())),
        case_sensitive: boolean(!condition.ignore_uri_case),
        headers,
        query_parameters: condition
            .query_params
            .iter()
            .map(|(name, value)| query_parameter(name, value))
            .collect(),
        dynamic_metadata: claims.chain(without).collect(),
        ..RouteMatch::default()
    }
}

/// A condition on a claim.
fn claim(name: &str, value: &StringMatch, invert: bool) -> Option<MetadataMatcher> {
    let names = claim_of_token(name)?;
    let matcher = pattern(value).unwrap_or_else(|| StringMatcher {
        match_pattern: Some(MatchPattern::SafeRegex(regex(".+"))),
        ignore_case: false,
    });
    Some(MetadataMatcher {
        invert,
        ..policy::claim(&names, vec![matcher])
    })
}

fn path(uri: Option<&StringMatch>) -> PathSpecifier {
    match uri {
        Some(StringMatch::Exact(path)) => PathSpecifier::Path(path.clone()),
        Some(StringMatch::Prefix(prefix)) if !prefix.is_empty() => {
            PathSpecifier::Prefix(prefix.clone())
        }
        Some(StringMatch::Regex(pattern)) if !is_presence_regex(pattern) => {
            PathSpecifier::SafeRegex(regex(pattern))
        }
        _ => PathSpecifier::Prefix("/".to_owned()),
    }
}

fn header(name: &str, value: &StringMatch) -> HeaderMatcher {
    let specifier = match pattern(value) {
        Some(pattern) => HeaderMatchSpecifier::StringMatch(pattern),
        None => HeaderMatchSpecifier::PresentMatch(true),
    };
    HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(specifier),
        ..HeaderMatcher::default()
    }
}

/// Inverted; a missing header counts as an empty one unless only presence is asked for.
fn without_header(name: &str, value: &StringMatch) -> HeaderMatcher {
    let matcher = header(name, value);
    let by_value = matches!(
        matcher.header_match_specifier,
        Some(HeaderMatchSpecifier::StringMatch(_))
    );
    HeaderMatcher {
        invert_match: true,
        treat_missing_header_as_empty: by_value,
        ..matcher
    }
}

fn query_parameter(name: &str, value: &StringMatch) -> QueryParameterMatcher {
    let specifier = match pattern(value) {
        Some(pattern) => QueryParameterMatchSpecifier::StringMatch(pattern),
        None => QueryParameterMatchSpecifier::PresentMatch(true),
    };
    QueryParameterMatcher {
        name: name.to_owned(),
        query_parameter_match_specifier: Some(specifier),
    }
}

/// `None` where only presence is asked for, which has several spellings; an empty prefix is one, and Envoy refuses it as a pattern.
pub(super) fn pattern(value: &StringMatch) -> Option<StringMatcher> {
    let pattern = match value {
        StringMatch::Exact(text) => MatchPattern::Exact(text.clone()),
        StringMatch::Prefix(text) if !text.is_empty() => MatchPattern::Prefix(text.clone()),
        StringMatch::Regex(text) if !is_presence_regex(text) => {
            MatchPattern::SafeRegex(regex(text))
        }
        _ => return None,
    };
    Some(StringMatcher {
        match_pattern: Some(pattern),
        ignore_case: false,
    })
}

fn is_presence_regex(pattern: &str) -> bool {
    matches!(pattern, "*" | "")
}

fn regex(pattern: &str) -> RegexMatcher {
    RegexMatcher {
        regex: pattern.to_owned(),
        ..RegexMatcher::default()
    }
}
