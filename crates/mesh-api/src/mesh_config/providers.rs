//! Services outside of the proxy that policies name.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Duration;
use crate::object::ParseError;

/// A named service; exactly one kind is given.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ExtensionProvider {
    /// Name by which policies refer to it.
    pub name: String,
    /// External authorization over HTTP.
    pub envoy_ext_authz_http: Option<ExtAuthzHttp>,
    /// External authorization over gRPC.
    pub envoy_ext_authz_grpc: Option<ExtAuthzGrpc>,
}

/// External authorization over HTTP.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ExtAuthzHttp {
    /// `[namespace/]host` of the service.
    pub service: String,
    /// Its port.
    pub port: u32,
    /// Limit for an answer; default 600s, so that the service's own timeouts rule.
    pub timeout: Option<Duration>,
    /// Put before the path of each request that is asked about.
    pub path_prefix: String,
    /// A request passes when the service can't be reached or answers 5xx.
    pub fail_open: bool,
    /// Routes are chosen anew when the service changed headers.
    pub clear_route_cache: bool,
    /// Status for requests where the service can't be reached; default 403.
    pub status_on_error: String,
    /// Older name of `includeRequestHeadersInCheck`.
    pub include_headers_in_check: Vec<String>,
    /// Headers of the request that the service sees, beside Host, Method, Path, Content-Length and Authorization; `x*` and `*x` are allowed.
    pub include_request_headers_in_check: Vec<String>,
    /// More headers for the service.
    pub include_additional_headers_in_check: BTreeMap<String, String>,
    /// How much of the body the service sees; default nothing.
    pub include_request_body_in_check: Option<RequestBody>,
    /// Headers of the answer that replace the request's.
    pub headers_to_upstream_on_allow: Vec<String>,
    /// Headers of the answer that the client gets with a refusal; default all but Envoy's own list.
    pub headers_to_downstream_on_deny: Vec<String>,
    /// Headers of the answer that the client gets with the response.
    pub headers_to_downstream_on_allow: Vec<String>,
}

/// External authorization over gRPC.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ExtAuthzGrpc {
    /// `[namespace/]host` of the service.
    pub service: String,
    /// Its port.
    pub port: u32,
    /// Limit for an answer; default 600s, so that the service's own timeouts rule.
    pub timeout: Option<Duration>,
    /// A request passes when the service can't be reached.
    pub fail_open: bool,
    /// Routes are chosen anew when the service changed headers.
    pub clear_route_cache: bool,
    /// Status for requests where the service can't be reached; default 403.
    pub status_on_error: String,
    /// How much of the body the service sees; default nothing.
    pub include_request_body_in_check: Option<RequestBody>,
}

/// How much of a body an authorization service sees.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RequestBody {
    /// Bytes that are held back at most.
    pub max_request_bytes: u32,
    /// Longer bodies are cut off instead of refused with 413.
    pub allow_partial_message: bool,
    /// Sent as bytes instead of text (gRPC only).
    pub pack_as_bytes: bool,
}

/// Kinds of providers that Istio knows and this version does not implement.
const NOT_IMPLEMENTED: &[&str] = &[
    "zipkin",
    "lightstep",
    "datadog",
    "opencensus",
    "skywalking",
    "opentelemetry",
    "prometheus",
    "stackdriver",
    "envoyFileAccessLog",
    "envoyHttpAls",
    "envoyTcpAls",
    "envoyOtelAls",
    "sds",
];

/// Takes kinds of providers that are not implemented out of the list; gives their paths.
///
/// # Errors
/// A list that is none.
pub(super) fn take_unsupported(fields: &mut Map<String, Value>) -> Result<Vec<String>, ParseError> {
    const FIELD: &str = "extensionProviders";
    let Some(list) = fields.get_mut(FIELD) else {
        return Ok(Vec::new());
    };
    let Some(list) = list.as_array_mut() else {
        return Err(ParseError::new(FIELD, "not a list", "a list of providers"));
    };
    let mut unsupported = Vec::new();
    for (index, provider) in list.iter_mut().enumerate() {
        let Some(provider) = provider.as_object_mut() else {
            continue;
        };
        for kind in NOT_IMPLEMENTED {
            if provider.remove(*kind).is_some() {
                unsupported.push(format!("{FIELD}[{index}].{kind}"));
            }
        }
    }
    Ok(unsupported)
}
