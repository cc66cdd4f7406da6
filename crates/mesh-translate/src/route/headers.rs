//! Changes to headers: groups in the order of their names, `set` before `add`.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption};
use envoy_types::pb::envoy::config::route::v3::Route;
use mesh_api::networking::virtual_service::{HeaderOperations, Headers, HttpRoute};

/// What one set of operations says.
#[derive(Default)]
pub(super) struct Operations {
    pub(super) request_add: Vec<HeaderValueOption>,
    pub(super) request_remove: Vec<String>,
    pub(super) response_add: Vec<HeaderValueOption>,
    pub(super) response_remove: Vec<String>,
}

/// Reads operations; the Host header is not among them, it is rewritten instead (see [`host`]).
pub(super) fn operations(headers: Option<&Headers>) -> Operations {
    let request = headers.and_then(|headers| headers.request.as_ref());
    let response = headers.and_then(|headers| headers.response.as_ref());
    Operations {
        request_add: additions(request),
        request_remove: removals(request),
        response_add: additions(response),
        response_remove: removals(response),
    }
}

/// Adds the rule's operations to a route, and those of its destination where it has only one.
pub(super) fn on_route(route: &mut Route, http: &HttpRoute) {
    let single = if let [only] = http.route.as_slice() {
        only.headers.as_ref()
    } else {
        None
    };
    for headers in [http.headers.as_ref(), single] {
        let operations = operations(headers);
        route.request_headers_to_add.extend(operations.request_add);
        route
            .request_headers_to_remove
            .extend(operations.request_remove);
        route
            .response_headers_to_add
            .extend(operations.response_add);
        route
            .response_headers_to_remove
            .extend(operations.response_remove);
    }
}

/// The new Host header that request operations ask for; `set` beats `add`.
pub(super) fn host(headers: Option<&Headers>) -> Option<String> {
    let request = headers?.request.as_ref()?;
    let of = |group: &BTreeMap<String, String>| {
        group
            .iter()
            .find(|(name, _)| is_host(name))
            .map(|(_, value)| value.clone())
    };
    of(&request.set).or_else(|| of(&request.add))
}

fn additions(operations: Option<&HeaderOperations>) -> Vec<HeaderValueOption> {
    let Some(operations) = operations else {
        return Vec::new();
    };
    let option = |action: HeaderAppendAction| {
        move |(name, value): (&String, &String)| HeaderValueOption {
            header: Some(HeaderValue {
                key: name.clone(),
                value: value.clone(),
                ..HeaderValue::default()
            }),
            append_action: action as i32,
            ..HeaderValueOption::default()
        }
    };
    let set = operations
        .set
        .iter()
        .filter(|(name, _)| !is_pseudo(name))
        .map(option(HeaderAppendAction::OverwriteIfExistsOrAdd));
    let add = operations
        .add
        .iter()
        .filter(|(name, _)| !is_pseudo(name))
        .map(option(HeaderAppendAction::AppendIfExistsOrAdd));
    set.chain(add).collect()
}

fn removals(operations: Option<&HeaderOperations>) -> Vec<String> {
    operations.map_or_else(Vec::new, |operations| {
        operations
            .remove
            .iter()
            .filter(|name| !is_pseudo(name))
            .cloned()
            .collect()
    })
}

fn is_host(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority")
}

/// Headers that Envoy does not let operations touch.
fn is_pseudo(name: &str) -> bool {
    is_host(name) || name.starts_with(':')
}
