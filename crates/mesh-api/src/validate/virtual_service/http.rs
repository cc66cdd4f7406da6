//! Rules for HTTP routes.

use crate::networking::VirtualService;
use crate::networking::virtual_service::{
    CorsPolicy, GRPC_STATUS, HeaderOperations, Headers, HttpBody, HttpDirectResponse,
    HttpFaultInjection, HttpMatchRequest, HttpRedirect, HttpRetry, HttpRewrite, HttpRoute, Percent,
};
use crate::{Duration, StringMatch};

use super::super::destination_rule::duration;
use super::super::{Check, names};
use super::{destination, gateway, pattern, string_match, weights};

/// The names that `retryOn` takes, beside status codes (Istio's validation of HTTPRetry).
const RETRY_CONDITIONS: &[&str] = &[
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "envoy-ratelimited",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];
const CORS_METHODS: &[&str] = &[
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "*",
];
/// Whether an entry of `retryOn` is a status code or one of the names that Istio's validation knows.
pub fn is_retry_condition(entry: &str) -> bool {
    let code = entry.parse::<u16>();
    code.is_ok_and(|code| (100..600).contains(&code)) || RETRY_CONDITIONS.contains(&entry)
}

/// Largest body of a direct response, in bytes, and the size from which it is worth a warning.
const BODY_LIMIT: usize = 1024 * 1024;
const BODY_WARNING: usize = 100 * 1024;

/// Checks a route.
pub(super) fn route(route: &HttpRoute, service: &VirtualService, in_mesh: bool, check: &mut Check) {
    action(route, service, check);
    check.each("match", &route.matches, |check, entry| {
        request(entry, in_mesh, check)
    });
    check.each("route", &route.route, |check, entry| {
        check.at("destination", |check| {
            destination(&entry.destination, check)
        });
        headers(entry.headers.as_ref(), check);
    });
    weights(route.route.iter().map(|entry| entry.weight), check);
    duration(route.timeout, "timeout", check);
    headers(route.headers.as_ref(), check);
    with(
        "redirect",
        route.redirect.as_ref(),
        check,
        |redirect, check| self::redirect(redirect, route, check),
    );
    with(
        "directResponse",
        route.direct_response.as_ref(),
        check,
        direct_response,
    );
    with("rewrite", route.rewrite.as_ref(), check, rewrite);
    with("retries", route.retries.as_ref(), check, retries);
    with("fault", route.fault.as_ref(), check, fault);
    with("corsPolicy", route.cors_policy.as_ref(), check, cors);
    mirrors(route, check);
}

fn with<T>(field: &str, part: Option<&T>, check: &mut Check, body: impl FnOnce(&T, &mut Check)) {
    if let Some(part) = part {
        check.at(field, |check| body(part, check));
    }
}

/// Exactly one thing is done with a request, and what goes with it fits.
fn action(route: &HttpRoute, service: &VirtualService, check: &mut Check) {
    let actions = [
        !route.route.is_empty(),
        route.redirect.is_some(),
        route.direct_response.is_some(),
    ];
    let count = actions.iter().filter(|given| **given).count();
    match (&route.delegate, count) {
        (Some(delegate), 0) => {
            check.require(
                !service.hosts.is_empty(),
                "delegate",
                "a delegate can't delegate further",
            );
            check.require(
                !delegate.name.is_empty(),
                "delegate.name",
                "the name of a VirtualService is needed",
            );
        }
        (Some(_), _) => check.error_at(
            "delegate",
            "delegate and route, redirect or directResponse exclude each other",
        ),
        (None, 0) => check.error("one of route, redirect, directResponse and delegate is needed"),
        (None, 1) => {}
        (None, _) => check.error("route, redirect and directResponse exclude each other"),
    }
    let answers = route.redirect.is_some() || route.direct_response.is_some();
    check.require(
        !answers || route.fault.is_none(),
        "fault",
        "nothing is sent on, so there is nothing to delay or abort",
    );
    check.require(
        !answers || route.rewrite.is_none(),
        "rewrite",
        "nothing is sent on, so there is nothing to rewrite",
    );
}

fn request(entry: &HttpMatchRequest, in_mesh: bool, check: &mut Check) {
    // An empty prefix is allowed here alone, since ingress controllers write it.
    if !matches!(&entry.uri, Some(StringMatch::Prefix(prefix)) if prefix.is_empty()) {
        string_match(entry.uri.as_ref(), "uri", check);
    }
    string_match(entry.scheme.as_ref(), "scheme", check);
    string_match(entry.method.as_ref(), "method", check);
    string_match(entry.authority.as_ref(), "authority", check);
    for (field, map) in [
        ("headers", &entry.headers),
        ("withoutHeaders", &entry.without_headers),
    ] {
        for (name, value) in map {
            check.at(&format!("{field}[{name}]"), |check| {
                let claim = names::is_about_claims(name);
                if claim && in_mesh {
                    check.error("claims of tokens can be matched on gateways only; name gateways without \"mesh\"");
                } else if claim && names::claim_of_token(name).is_none() {
                    check.error(format!("{name:?} names no claim; write @request.auth.claims.NAME, or @request.auth.claims[NAME][NAME] for names with dots"));
                } else if !claim && !header_name(name) {
                    check.error(format!("{name:?} is not a header name"));
                } else if name.as_str() != name.to_ascii_lowercase() && !claim {
                    check.warn(format!(
                        "header names are compared in lower case; write {:?}",
                        name.to_ascii_lowercase()
                    ));
                }
                pattern(value, check);
            });
        }
    }
    for (name, value) in &entry.query_params {
        check.at(&format!("queryParams[{name}]"), |check| {
            pattern(value, check)
        });
    }
    if entry.ignore_uri_case && matches!(entry.uri, Some(StringMatch::Regex(_))) {
        check.warn_at(
            "ignoreUriCase",
            "has no effect on a regular expression; write (?i) in it",
        );
    }
    check.require(
        entry.port <= 65535,
        "port",
        "a port is a number from 1 to 65535",
    );
    names::labels("sourceLabels", &entry.source_labels, check);
    check.each("gateways", &entry.gateways, |check, name| {
        gateway(name, check)
    });
    if !entry.stat_prefix.is_empty() {
        check.require(
            !entry.stat_prefix.contains(char::is_whitespace),
            "statPrefix",
            "no blanks are allowed",
        );
    }
}

/// RFC 9110 section 5.1: a token; or one of HTTP/2's pseudo headers.
fn header_name(name: &str) -> bool {
    let token = name.strip_prefix(':').unwrap_or(name);
    !token.is_empty()
        && token
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn headers(part: Option<&Headers>, check: &mut Check) {
    let Some(part) = part else { return };
    check.at("headers", |check| {
        with("request", part.request.as_ref(), check, header_operations);
        with("response", part.response.as_ref(), check, header_operations);
    });
}

fn header_operations(operations: &HeaderOperations, check: &mut Check) {
    for (field, map) in [("set", &operations.set), ("add", &operations.add)] {
        for (name, value) in map {
            check.at(&format!("{field}[{name}]"), |check| {
                if !header_name(name) {
                    check.error(format!("{name:?} is not a header name"));
                }
                if value.bytes().any(|b| b < 0x20 && b != b'\t' || b == 0x7f) {
                    check.error("control characters can't be sent in a header");
                }
                if !balanced(value) {
                    check.error(
                        "a '%' begins a command such as %REQ(name)%; write %% for the character",
                    );
                }
            });
        }
    }
    let host =
        |name: &str| name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority");
    check.require(
        operations.set.keys().filter(|name| host(name)).count() < 2,
        "set",
        "Host and :authority are the same; set one of them",
    );
    check.each("remove", &operations.remove, |check, name| {
        if !header_name(name) {
            check.error(format!("{name:?} is not a header name"));
        } else if host(name) || name.starts_with(':') {
            check.error(format!("{name:?} can't be removed"));
        }
    });
}

/// True if every `%` begins or ends a command, or is doubled.
fn balanced(value: &str) -> bool {
    let mut rest = value;
    while let Some(start) = rest.find('%') {
        rest = &rest[start + 1..];
        match rest.find('%') {
            Some(end) => rest = &rest[end + 1..],
            None => return false,
        }
    }
    true
}

fn redirect(redirect: &HttpRedirect, route: &HttpRoute, check: &mut Check) {
    let target = !redirect.uri.is_empty()
        || !redirect.authority.is_empty()
        || !redirect.scheme.is_empty()
        || !redirect.prefix_rewrite.is_empty();
    if !target && redirect.port.is_none() && redirect.derive_port.is_none() {
        check.error("at least one of uri, prefixRewrite, authority, scheme and port is needed");
    }
    check.require(
        matches!(redirect.redirect_code, 0 | 301 | 302 | 303 | 307 | 308),
        "redirectCode",
        "one of 301, 302, 303, 307 and 308",
    );
    check.require(
        matches!(redirect.scheme.as_str(), "" | "http" | "https"),
        "scheme",
        "http or https",
    );
    check.require(
        redirect.port.is_none() || redirect.derive_port.is_none(),
        "port",
        "port and derivePort exclude each other",
    );
    if let Some(port) = redirect.port {
        names::port(port, "port", check);
    }
    if !redirect.prefix_rewrite.is_empty() {
        check.require(
            redirect.uri.is_empty(),
            "prefixRewrite",
            "uri and prefixRewrite exclude each other",
        );
        let prefixes = route
            .matches
            .iter()
            .all(|entry| matches!(entry.uri, Some(StringMatch::Prefix(_))));
        check.require(
            prefixes,
            "prefixRewrite",
            "every match of the rule has to be by uri.prefix",
        );
    }
}

fn direct_response(response: &HttpDirectResponse, check: &mut Check) {
    check.require(
        (200..=599).contains(&response.status),
        "status",
        "a status code is a number from 200 to 599",
    );
    let size = match &response.body {
        Some(HttpBody::String(text)) => text.len(),
        Some(HttpBody::Bytes(text)) => {
            use base64::Engine as _;
            let bytes = base64::engine::general_purpose::STANDARD.decode(text);
            check.require(bytes.is_ok(), "body.bytes", "not base64");
            bytes.map_or(0, |bytes| bytes.len())
        }
        None => 0,
    };
    if size > BODY_LIMIT {
        check.error_at(
            "body",
            format!("{size} bytes; at most {BODY_LIMIT} are allowed"),
        );
    } else if size > BODY_WARNING {
        check.warn_at("body", format!("{size} bytes are sent to every proxy; more than {BODY_WARNING} should come from a server"));
    }
}

fn rewrite(rewrite: &HttpRewrite, check: &mut Check) {
    if rewrite.uri.is_empty() && rewrite.authority.is_empty() && rewrite.uri_regex_rewrite.is_none()
    {
        check.error("uri, authority or uriRegexRewrite is needed");
    }
    if let Some(regex) = &rewrite.uri_regex_rewrite {
        check.require(
            rewrite.uri.is_empty(),
            "uriRegexRewrite",
            "uri and uriRegexRewrite exclude each other",
        );
        check.at("uriRegexRewrite.match", |check| {
            names::regex(&regex.pattern, check)
        });
        check.require(
            !regex.rewrite.is_empty(),
            "uriRegexRewrite.rewrite",
            "a replacement is needed",
        );
    }
}

fn retries(retry: &HttpRetry, check: &mut Check) {
    check.require(retry.attempts >= 0, "attempts", "can't be negative");
    let others = !retry.retry_on.is_empty()
        || retry.per_try_timeout.is_some()
        || retry.backoff.is_some()
        || retry.retry_remote_localities.is_some();
    check.require(
        retry.attempts != 0 || !others,
        "attempts",
        "0 turns retries off, so the other fields have no meaning",
    );
    duration(retry.per_try_timeout, "perTryTimeout", check);
    duration(retry.backoff, "backoff", check);
    for token in retry
        .retry_on
        .split(',')
        .filter(|_| !retry.retry_on.is_empty())
        .map(str::trim)
    {
        check.require(
            is_retry_condition(token),
            "retryOn",
            &format!(
                "{token:?} is neither a status code nor one of {}",
                RETRY_CONDITIONS.join(", ")
            ),
        );
    }
}

fn fault(fault: &HttpFaultInjection, check: &mut Check) {
    if fault.delay.is_none() && fault.abort.is_none() {
        check.error("delay or abort is needed");
    }
    with("delay", fault.delay.as_ref(), check, |delay, check| {
        check.require(
            delay.exponential_delay.is_none(),
            "exponentialDelay",
            "never implemented by Istio; use fixedDelay",
        );
        check.require(
            delay.fixed_delay.is_some() || delay.exponential_delay.is_some(),
            "fixedDelay",
            "a duration is needed",
        );
        duration(delay.fixed_delay, "fixedDelay", check);
        check.require(
            (0..=100).contains(&delay.percent),
            "percent",
            "a share is a number from 0 to 100",
        );
        percent(delay.percentage.as_ref(), "percentage", check);
    });
    with("abort", fault.abort.as_ref(), check, |abort, check| {
        check.require(
            abort.http2_error.is_empty(),
            "http2Error",
            "never implemented by Istio; use httpStatus or grpcStatus",
        );
        let given = [
            abort.http_status.is_some(),
            !abort.grpc_status.is_empty(),
            !abort.http2_error.is_empty(),
        ]
        .iter()
        .filter(|given| **given)
        .count();
        if given != 1 {
            check.error("exactly one of httpStatus and grpcStatus is needed");
        }
        check.require(
            abort
                .http_status
                .is_none_or(|status| (200..=600).contains(&status)),
            "httpStatus",
            "a status code is a number from 200 to 600",
        );
        let grpc = abort.grpc_status.is_empty() || abort.grpc_code().is_some();
        check.require(
            grpc,
            "grpcStatus",
            &format!("one of {}", GRPC_STATUS.join(", ")),
        );
        percent(abort.percentage.as_ref(), "percentage", check);
    });
}

fn percent(value: Option<&Percent>, field: &str, check: &mut Check) {
    let right = value
        .is_none_or(|percent| percent.value == 0.0 || (0.0001..=100.0).contains(&percent.value));
    check.require(
        right,
        &format!("{field}.value"),
        "a share is 0, or a number from 0.0001 to 100",
    );
}

fn cors(cors: &CorsPolicy, check: &mut Check) {
    check.each(
        "allowOrigins",
        &cors.allow_origins,
        |check, origin| match origin {
            StringMatch::Present => check.error("empty; write exact, prefix or regex"),
            origin => pattern(origin, check),
        },
    );
    check.each("allowMethods", &cors.allow_methods, |check, method| {
        if !CORS_METHODS.contains(&method.as_str()) {
            check.error(format!(
                "{method:?} is not a method; one of {}",
                CORS_METHODS.join(", ")
            ));
        }
    });
    for (field, list) in [
        ("allowHeaders", &cors.allow_headers),
        ("exposeHeaders", &cors.expose_headers),
    ] {
        check.each(field, list, |check, name| {
            if !header_name(name) {
                check.error(format!("{name:?} is not a header name"));
            }
        });
    }
    check.require(
        cors.max_age.is_none_or(Duration::is_whole_secs),
        "maxAge",
        "whole seconds are needed",
    );
}

fn mirrors(route: &HttpRoute, check: &mut Check) {
    check.require(
        route.mirror.is_none() || route.mirrors.is_empty(),
        "mirrors",
        "mirror and mirrors exclude each other",
    );
    with("mirror", route.mirror.as_ref(), check, destination);
    percent(route.mirror_percentage.as_ref(), "mirrorPercentage", check);
    check.require(
        route.mirror_percent.unwrap_or(0) <= 100,
        "mirrorPercent",
        "a share is a number from 0 to 100",
    );
    check.each("mirrors", &route.mirrors, |check, mirror| {
        check.at("destination", |check| {
            destination(&mirror.destination, check)
        });
        percent(mirror.percentage.as_ref(), "percentage", check);
    });
}
