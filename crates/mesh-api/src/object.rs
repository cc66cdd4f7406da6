//! From raw JSON to a typed Istio object.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::meta::Meta;
use crate::registry::{self, KindInfo};

/// An object of an Istio kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Object<S> {
    /// Group and version under which it was written, for instance `networking.istio.io/v1`; all versions of a kind mean the same.
    pub api_version: String,
    /// Metadata.
    pub meta: Meta,
    /// What was asked for.
    pub spec: S,
}

/// Why an object was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}{}", if path.is_empty() { String::new() } else { format!("{path}: ") }, if expected.is_empty() { String::new() } else { format!("; expected {expected}") })]
pub struct ParseError {
    /// Where, such as `spec.http[0].route[1].weight`; empty for the object as a whole.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What would have been right; may be empty.
    pub expected: String,
}

impl ParseError {
    pub(crate) fn new(path: &str, message: impl Into<String>, expected: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            message: message.into(),
            expected: expected.into(),
        }
    }
}

macro_rules! any_object {
    ($($kind:ident = $spec:path, $doc:literal;)*) => {
        /// An object of any Istio kind.
        #[derive(Debug, Clone, PartialEq)]
        pub enum AnyObject {
            $(#[doc = $doc] $kind(Object<$spec>),)*
        }

        impl AnyObject {
            /// Metadata of the object.
            pub fn meta(&self) -> &Meta {
                match self { $(Self::$kind(object) => &object.meta,)* }
            }

            /// Group and version under which it was written.
            pub fn api_version(&self) -> &str {
                match self { $(Self::$kind(object) => &object.api_version,)* }
            }

            /// Kind, for instance `VirtualService`.
            pub fn kind(&self) -> &'static str {
                match self { $(Self::$kind(_) => stringify!($kind),)* }
            }

            /// The kind's line in the registry.
            pub fn info(&self) -> &'static KindInfo {
                match self { $(Self::$kind(_) => &registry::info::$kind,)* }
            }
        }

        /// One parser per kind, for the registry.
        pub(crate) mod parsers {
            use super::{AnyObject, ParseError, Value, parse_as};
            $(
                #[allow(non_snake_case)]
                pub(crate) fn $kind(raw: &Value) -> Result<AnyObject, ParseError> {
                    parse_as(raw).map(AnyObject::$kind)
                }
            )*
        }
    };
}

any_object! {
    TrafficExtension = crate::extensions::TrafficExtension, "TrafficExtension.";
    WasmPlugin = crate::extensions::WasmPlugin, "WasmPlugin.";
    DestinationRule = crate::networking::DestinationRule, "DestinationRule.";
    EnvoyFilter = crate::networking::EnvoyFilter, "EnvoyFilter.";
    Gateway = crate::networking::Gateway, "Gateway.";
    ProxyConfig = crate::networking::ProxyConfig, "ProxyConfig.";
    ServiceEntry = crate::networking::ServiceEntry, "ServiceEntry.";
    Sidecar = crate::networking::Sidecar, "Sidecar.";
    VirtualService = crate::networking::VirtualService, "VirtualService.";
    WorkloadEntry = crate::networking::WorkloadEntry, "WorkloadEntry.";
    WorkloadGroup = crate::networking::WorkloadGroup, "WorkloadGroup.";
    AuthorizationPolicy = crate::security::AuthorizationPolicy, "AuthorizationPolicy.";
    PeerAuthentication = crate::security::PeerAuthentication, "PeerAuthentication.";
    RequestAuthentication = crate::security::RequestAuthentication, "RequestAuthentication.";
    Telemetry = crate::telemetry::Telemetry, "Telemetry.";
}

/// Reads an object of any Istio kind, strictly: an unknown field in the specification is an error with its path.
///
/// # Errors
/// An unknown or unserved kind, a missing name, an unknown field, or a value of the wrong form.
pub fn parse(raw: &Value) -> Result<AnyObject, ParseError> {
    let api_version = raw
        .get("apiVersion")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let kind = raw.get("kind").and_then(Value::as_str).unwrap_or_default();
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let Some(info) = registry::lookup(group, kind) else {
        return Err(ParseError::new(
            "kind",
            format!("{kind:?} of {api_version:?} is not an Istio kind"),
            "",
        ));
    };
    if !info.versions.iter().any(|served| served.name == version) {
        let served: Vec<_> = info
            .versions
            .iter()
            .map(|v| format!("{group}/{}", v.name))
            .collect();
        return Err(ParseError::new(
            "apiVersion",
            format!("{kind} has no version {version:?}"),
            served.join(" or "),
        ));
    }
    (info.parse)(raw)
}

fn parse_as<S: DeserializeOwned + Default>(raw: &Value) -> Result<Object<S>, ParseError> {
    if let Some(object) = raw.as_object()
        && let Some(unknown) = object.keys().find(|key| {
            !matches!(
                key.as_str(),
                "apiVersion" | "kind" | "metadata" | "spec" | "status"
            )
        })
    {
        return Err(ParseError::new(
            unknown,
            "unknown field",
            "apiVersion, kind, metadata, spec or status",
        ));
    }
    let meta: Meta = section(raw, "metadata")?;
    if meta.name.is_empty() && meta.generate_name.is_empty() {
        return Err(ParseError::new(
            "metadata.name",
            "the object has no name",
            "",
        ));
    }
    Ok(Object {
        api_version: raw["apiVersion"].as_str().unwrap_or_default().to_owned(),
        meta,
        spec: section(raw, "spec")?,
    })
}

/// Reads one part of an object; an absent or null part is the default.
fn section<T: DeserializeOwned + Default>(raw: &Value, name: &str) -> Result<T, ParseError> {
    match raw.get(name) {
        None | Some(Value::Null) => Ok(T::default()),
        Some(value) => typed(&without_nulls(value), name),
    }
}

/// Reads a value into a type; errors carry the path below `root`.
pub(crate) fn typed<T: DeserializeOwned>(value: &Value, root: &str) -> Result<T, ParseError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let below = match error.path().to_string() {
            path if path == "." => String::new(),
            path => path,
        };
        let dot = if root.is_empty() || below.is_empty() || below.starts_with('[') {
            ""
        } else {
            "."
        };
        let text = error.inner().to_string();
        let (message, expected) = text.rsplit_once(", expected ").unwrap_or((&text, ""));
        let path = format!("{root}{dot}{below}");
        ParseError::new(&path, found(message), wanted(expected))
    })
}

/// What stands there, in the words of YAML instead of serde's.
fn found(message: &str) -> String {
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        return format!("unknown value {rest}");
    }
    let Some(given) = message
        .strip_prefix("invalid type: ")
        .or_else(|| message.strip_prefix("invalid value: "))
    else {
        return message.to_owned();
    };
    let (kind, value) = given.split_once(' ').unwrap_or((given, ""));
    let value = value.trim_matches('`');
    match kind {
        "string" => format!("the text {value} is given"),
        "integer" | "floating" => {
            let number = value.trim_start_matches("point ").trim_matches('`');
            format!("the number {number} is given")
        }
        "boolean" => format!("{value} is given"),
        "map" => "an object is given".to_owned(),
        "sequence" => "a list is given".to_owned(),
        _ => format!("{given} is given"),
    }
}

/// What would be right, in the same words.
fn wanted(expected: &str) -> String {
    match expected {
        "a string" => "a text".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "u8" | "u16" | "u32" | "u64" => "a whole number from 0".to_owned(),
        "i32" | "i64" => "a whole number".to_owned(),
        "f64" => "a number".to_owned(),
        "a map" => "an object".to_owned(),
        other if other.starts_with("struct ") => "an object with fields".to_owned(),
        other => other.to_owned(),
    }
}

/// Kubernetes treats a null like an absent field; free-form values (EnvoyFilter patches, configuration of plugins) keep theirs.
fn without_nulls(value: &Value) -> Value {
    let free_form =
        |key: &str, item: &Value| key == "pluginConfig" || (key == "value" && item.is_object());
    match value {
        Value::Object(map) => Value::Object(
            map.iter()
                .filter(|(_, item)| !item.is_null())
                .map(|(key, item)| {
                    (
                        key.clone(),
                        if free_form(key, item) {
                            item.clone()
                        } else {
                            without_nulls(item)
                        },
                    )
                })
                .collect(),
        ),
        Value::Array(items) => Value::Array(items.iter().map(without_nulls).collect()),
        other => other.clone(),
    }
}
