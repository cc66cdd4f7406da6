//! Texts that go into headers and paths. Envoy refuses a whole route table for one bad text in it, so a bad one is taken out here.

use std::collections::BTreeMap;

use base64::Engine as _;
use mesh_api::networking::virtual_service::{HeaderOperations, HttpBody, HttpRetry, HttpRoute};
use mesh_api::validate::is_retry_condition;

use crate::Severity;
use crate::problem::Reporter;

/// Longest body of a fixed response, in bytes: Istio's limit.
const BODY_LIMIT: usize = 1 << 20;
/// Longest value of a header that Envoy's configuration takes, in bytes (`HeaderValue.value`).
const VALUE_LIMIT: usize = 16_384;
/// Takes header operations and retry conditions out that could not be applied.
pub(super) fn rule(rule: &mut HttpRoute, field: &str, report: &mut Reporter<'_>) {
    let of_rule = rule
        .headers
        .as_mut()
        .map(|headers| (format!("{field}.headers"), headers));
    let of_routes = rule.route.iter_mut().enumerate();
    let of_routes = of_routes.filter_map(|(index, route)| {
        Some((
            format!("{field}.route[{index}].headers"),
            route.headers.as_mut()?,
        ))
    });
    for (field, headers) in of_rule.into_iter().chain(of_routes) {
        for (name, operations) in [
            ("request", &mut headers.request),
            ("response", &mut headers.response),
        ] {
            if let Some(operations) = operations {
                header_operations(
                    operations,
                    name == "request",
                    &format!("{field}.{name}"),
                    report,
                );
            }
        }
    }
    if let Some(retries) = &mut rule.retries {
        retry_conditions(retries, &format!("{field}.retries.retryOn"), report);
    }
}

fn header_operations(
    operations: &mut HeaderOperations,
    request: bool,
    field: &str,
    report: &mut Reporter<'_>,
) {
    let mut refuse = |field: String, message: String| {
        report.report(
            Severity::Error,
            Some("IST0106"),
            field,
            format!("{message}; this operation has no effect"),
        );
    };
    let mut keep = |group: &str, name: &str, value: &str| {
        let host = request && is_host(name);
        let problem = if !host && (name.starts_with(':') || is_host(name) || !is_header_name(name))
        {
            format!("{name:?} is not the name of a header that may be changed")
        } else if !is_header_value(value) {
            format!("{value:?} is not a header value")
        } else if let Err(message) = check_commands(value) {
            message
        } else {
            return true;
        };
        refuse(format!("{field}.{group}[{name}]"), problem);
        false
    };
    let mut filter = |group: &str, map: &mut BTreeMap<String, String>| {
        map.retain(|name, value| keep(group, name, value))
    };
    filter("set", &mut operations.set);
    filter("add", &mut operations.add);
    operations.remove.retain(|name| {
        let good = is_header_name(name) && !is_host(name);
        if !good {
            refuse(
                format!("{field}.remove"),
                format!("{name:?} is not the name of a header that may be removed"),
            );
        }
        good
    });
}

/// What may stand between two `%` in the value of a header (Envoy's substitution format), as far as both stock Envoy and
/// mesh's own proxy know it. An unknown one would cost
/// the whole route table.
const COMMANDS: [&str; 25] = [
    "BYTES_RECEIVED",
    "BYTES_SENT",
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS",
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT",
    "DOWNSTREAM_DIRECT_REMOTE_PORT",
    "DOWNSTREAM_LOCAL_ADDRESS",
    "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT",
    "DOWNSTREAM_LOCAL_PORT",
    "DOWNSTREAM_REMOTE_ADDRESS",
    "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT",
    "DOWNSTREAM_REMOTE_PORT",
    "DURATION",
    "HOSTNAME",
    "PROTOCOL",
    "REQUESTED_SERVER_NAME",
    "RESPONSE_CODE",
    "RESPONSE_FLAGS",
    "ROUTE_NAME",
    "START_TIME",
    "UPSTREAM_CLUSTER",
    "UPSTREAM_HOST",
    "UPSTREAM_REMOTE_ADDRESS",
    "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT",
    "UPSTREAM_REMOTE_PORT",
    "UPSTREAM_REQUEST_ATTEMPT_COUNT",
];
/// The same with an argument in parentheses, the name of a header.
const COMMANDS_WITH_ARGUMENT: [&str; 3] = ["REQ", "RESP", "TRAILER"];

/// Whether the proxy can fill in what a value asks for.
fn check_commands(value: &str) -> Result<(), String> {
    let mut rest = value;
    while let Some((_, after)) = rest.split_once('%') {
        let Some((command, after)) = after.split_once('%') else {
            return Err(format!(
                "{value:?} has a single %; write %% for the character, %NAME% for a value of the request"
            ));
        };
        let (name, argument) = match command.split_once('(') {
            Some((name, argument)) => (name, Some(argument)),
            None => (command.split(':').next().unwrap_or_default(), None),
        };
        let known = match argument {
            _ if command.is_empty() => true,
            None => COMMANDS.contains(&name),
            Some(argument) => {
                let header = argument.split([')', '?', ':']).next().unwrap_or_default();
                COMMANDS_WITH_ARGUMENT.contains(&name)
                    && argument.contains(')')
                    && (is_header_name(header) || argument.starts_with(':'))
            }
        };
        if !known {
            return Err(format!(
                "%{command}% in {value:?} is nothing that mesh's proxy can fill in; write %% for the character"
            ));
        }
        rest = after;
    }
    Ok(())
}

fn retry_conditions(retries: &mut HttpRetry, field: &str, report: &mut Reporter<'_>) {
    let entries: Vec<&str> = retries
        .retry_on
        .split(',')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
        .collect();
    for entry in entries.iter().filter(|entry| !is_retry_condition(entry)) {
        let message = format!(
            "{entry:?} is neither a condition for retries nor a status code; it is left out"
        );
        report.report(Severity::Error, Some("IST0106"), field, message);
    }
    let kept: Vec<&str> = entries
        .into_iter()
        .filter(|entry| is_retry_condition(entry))
        .collect();
    retries.retry_on = kept.join(",");
}

/// Checks texts without which a rule makes no sense; field and message of the first bad one come back.
pub(super) fn texts(rule: &HttpRoute) -> Result<(), (&'static str, String)> {
    let mut all = Vec::new();
    if let Some(redirect) = &rule.redirect {
        all.push(("redirect.uri", &redirect.uri));
        all.push(("redirect.authority", &redirect.authority));
        all.push(("redirect.scheme", &redirect.scheme));
        all.push(("redirect.prefixRewrite", &redirect.prefix_rewrite));
    }
    if let Some(rewrite) = &rule.rewrite {
        all.push(("rewrite.uri", &rewrite.uri));
        all.push(("rewrite.authority", &rewrite.authority));
    }
    if let Some((field, text)) = all.into_iter().find(|(_, text)| !is_header_value(text)) {
        return Err((
            field,
            format!("{text:?} has characters that no header may have"),
        ));
    }
    let body = rule
        .direct_response
        .as_ref()
        .and_then(|response| response.body.as_ref());
    let length = match body {
        None => 0,
        Some(HttpBody::String(text)) => text.len(),
        Some(HttpBody::Bytes(text)) => match base64::engine::general_purpose::STANDARD.decode(text)
        {
            Ok(bytes) => bytes.len(),
            Err(error) => {
                return Err((
                    "directResponse.body.bytes",
                    format!("the text is not base64: {error}"),
                ));
            }
        },
    };
    if length > BODY_LIMIT {
        return Err((
            "directResponse.body",
            format!("the body has {length} bytes, more than {BODY_LIMIT}"),
        ));
    }
    Ok(())
}

fn is_host(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority")
}

/// A token of RFC 9110, section 5.6.2.
pub(super) fn is_header_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

/// RFC 9110, section 5.5: no control characters but the tabulator; not longer than Envoy takes it.
pub(super) fn is_header_value(value: &str) -> bool {
    value.len() <= VALUE_LIMIT
        && value
            .bytes()
            .all(|byte| byte == b'\t' || (byte >= b' ' && byte != 0x7f))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_proxy_can_fill_in_passes() {
        for (value, expected) in [
            ("plain", true),
            ("100%%", true),
            ("%REQ(x-id)%", true),
            ("%REQ(:path):10%", true),
            ("%REQ(x-a?x-b)%-%PROTOCOL%", true),
            ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", true),
            ("50%", false),
            ("%NOPE%", false),
            ("%REQ%", false),
            ("%REQ()%", false),
            ("%REQ(a b)%", false),
            ("%DYNAMIC_METADATA(a:b)%", false),
        ] {
            assert_eq!(check_commands(value).is_ok(), expected, "{value}");
        }
    }
}
