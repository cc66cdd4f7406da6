//! Cross-origin resource sharing: the `envoy.filters.http.cors` filter.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::cors_policy::EnabledSpecifier;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3 as pb;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::Percent;
use crate::error::{CompileError, Result, Within, every_field};
use crate::matcher::StringMatch;
use crate::route::RequestView;

const REQUEST_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-allow-private-network");
const TRUE: HeaderValue = HeaderValue::from_static("true");

/// A compiled `CorsPolicy`. Fields that are left open are taken from the next outer policy.
#[derive(Debug)]
pub struct CorsPolicy {
    enabled: Percent,
    origins: Vec<StringMatch>,
    methods: Option<HeaderValue>,
    headers: Option<HeaderValue>,
    expose: Option<HeaderValue>,
    max_age: Option<HeaderValue>,
    credentials: Option<bool>,
    private_network: Option<bool>,
    forward_unmatched: Option<bool>,
}

/// What the filter makes of a request.
#[derive(Debug)]
pub enum Verdict {
    /// Nothing: not across origins, or no policy.
    Pass,
    /// Let it through; these headers go onto the response.
    Decorate(HeaderMap),
    /// A preflight, answered with 200 and these headers.
    Answer(HeaderMap),
}

impl CorsPolicy {
    pub(crate) fn compile(m: &pb::CorsPolicy) -> Result<Self> {
        every_field!(m, pb::CorsPolicy,
            used {
                allow_origin_string_match, allow_methods, allow_headers, expose_headers, max_age, allow_credentials, filter_enabled,
                allow_private_network_access, forward_not_matching_preflights,
            }
            // The shadow mode only counts, in statistics that are not kept.
            irrelevant { shadow_enabled }
            refused {});
        let mut origins = Vec::with_capacity(m.allow_origin_string_match.len());
        for (i, origin) in m.allow_origin_string_match.iter().enumerate() {
            let at = format_args!("allow_origin_string_match[{i}]");
            origins.push(StringMatch::compile(origin).within(at)?);
        }
        Ok(Self {
            enabled: Percent::of_runtime(m.filter_enabled.as_ref(), Percent::ALL)
                .within("filter_enabled")?,
            origins,
            methods: value("allow_methods", &m.allow_methods)?,
            headers: value("allow_headers", &m.allow_headers)?,
            expose: value("expose_headers", &m.expose_headers)?,
            max_age: value("max_age", &m.max_age)?,
            credentials: m.allow_credentials.map(|b| b.value),
            private_network: m.allow_private_network_access.map(|b| b.value),
            forward_unmatched: m.forward_not_matching_preflights.map(|b| b.value),
        })
    }

    /// The message of the fields that virtual hosts and routes had for it before.
    pub(crate) fn compile_old(m: &route::CorsPolicy) -> Result<Self> {
        every_field!(m, route::CorsPolicy,
            used {
                allow_origin_string_match, allow_methods, allow_headers, expose_headers, max_age, allow_credentials,
                enabled_specifier, shadow_enabled, allow_private_network_access, forward_not_matching_preflights,
            }
            irrelevant {}
            refused {});
        Self::compile(&pb::CorsPolicy {
            allow_origin_string_match: m.allow_origin_string_match.clone(),
            allow_methods: m.allow_methods.clone(),
            allow_headers: m.allow_headers.clone(),
            expose_headers: m.expose_headers.clone(),
            max_age: m.max_age.clone(),
            allow_credentials: m.allow_credentials,
            filter_enabled: m
                .enabled_specifier
                .as_ref()
                .map(|EnabledSpecifier::FilterEnabled(enabled)| enabled.clone()),
            shadow_enabled: m.shadow_enabled.clone(),
            allow_private_network_access: m.allow_private_network_access,
            forward_not_matching_preflights: m.forward_not_matching_preflights,
        })
    }
}

fn value(field: &str, text: &str) -> Result<Option<HeaderValue>> {
    if text.is_empty() {
        return Ok(None);
    }
    HeaderValue::from_str(text)
        .map(Some)
        .map_err(|_| CompileError::new(field, "is not a header value"))
}

/// Judges a request by its policies, the most specific first (Fetch standard, "CORS protocol"; what is answered is Envoy's).
pub fn judge(policies: &[Arc<CorsPolicy>], request: &RequestView<'_>, random: u64) -> Verdict {
    let headers = request.headers;
    let enabled = policies.first().is_some_and(|p| p.enabled.covers(random));
    let origin = headers.get(ORIGIN).filter(|origin| !origin.is_empty());
    let (Some(origin), true) = (origin, enabled) else {
        return Verdict::Pass;
    };
    let allowed = is_allowed(policies, origin);
    let wanted = headers
        .get(ACCESS_CONTROL_REQUEST_METHOD)
        .filter(|method| !method.is_empty());
    let mut out = HeaderMap::new();
    if allowed {
        out.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        if flag(policies, |p| p.credentials, false) {
            out.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, TRUE);
        }
        if let Some(expose) = first(policies, |p| p.expose.as_ref()) {
            out.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
    }
    match wanted.filter(|_| request.method == "OPTIONS") {
        Some(method) if allowed || !flag(policies, |p| p.forward_unmatched, true) => {
            preflight(policies, headers, method, &mut out);
            Verdict::Answer(out)
        }
        _ if out.is_empty() => Verdict::Pass,
        _ => Verdict::Decorate(out),
    }
}

fn is_allowed(policies: &[Arc<CorsPolicy>], origin: &HeaderValue) -> bool {
    let origin = String::from_utf8_lossy(origin.as_bytes());
    first(policies, |p| (!p.origins.is_empty()).then_some(&p.origins)).is_some_and(|origins| {
        origins
            .iter()
            .any(|allowed| allowed.matches("*") || allowed.matches(&origin))
    })
}

/// Adds what only the answer to a preflight has. `*` allows what is asked for, since browsers do not take it literally with credentials.
fn preflight(
    policies: &[Arc<CorsPolicy>],
    headers: &HeaderMap,
    method: &HeaderValue,
    out: &mut HeaderMap,
) {
    if flag(policies, |p| p.credentials, false) {
        out.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, TRUE);
    }
    if let Some(methods) = first(policies, |p| p.methods.as_ref()) {
        let any = methods.as_bytes() == b"*";
        out.insert(
            ACCESS_CONTROL_ALLOW_METHODS,
            if any { method } else { methods }.clone(),
        );
    }
    if let Some(allowed) = first(policies, |p| p.headers.as_ref()) {
        let asked = headers.get(ACCESS_CONTROL_REQUEST_HEADERS);
        let allowed = match allowed.as_bytes() {
            b"*" => asked,
            _ => Some(allowed),
        };
        if let Some(allowed) = allowed {
            out.insert(ACCESS_CONTROL_ALLOW_HEADERS, allowed.clone());
        }
    }
    if let Some(age) = first(policies, |p| p.max_age.as_ref()) {
        out.insert(ACCESS_CONTROL_MAX_AGE, age.clone());
    }
    let private = headers
        .get(REQUEST_PRIVATE_NETWORK)
        .is_some_and(|v| v.as_bytes() == b"true");
    if private && flag(policies, |p| p.private_network, false) {
        out.insert(ALLOW_PRIVATE_NETWORK, TRUE);
    }
}

fn first<'a, T>(
    policies: &'a [Arc<CorsPolicy>],
    field: impl Fn(&'a CorsPolicy) -> Option<T>,
) -> Option<T> {
    policies.iter().find_map(|policy| field(policy))
}

fn flag(
    policies: &[Arc<CorsPolicy>],
    field: impl Fn(&CorsPolicy) -> Option<bool>,
    default: bool,
) -> bool {
    first(policies, field).unwrap_or(default)
}
