//! The JSON form of Envoy's messages, both ways (protobuf's JSON mapping, with every `Any` expanded).
//!
//! Nothing on the way of a request needs it.

use base64::Engine;
use prost::Message;
use prost_reflect::{
    DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage,
    SerializeOptions, Value as Field,
};
use serde_json::{Map, Value};

use crate::descriptors::Descriptors;
use crate::locate;
use crate::nds::{NAME_TABLE, NameTable};

pub(crate) const ANY: &str = "google.protobuf.Any";
pub(crate) const DURATION: &str = "google.protobuf.Duration";
const STRUCT_URL: &str = "type.googleapis.com/google.protobuf.Struct";

/// How fields are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `connect_timeout`, as Envoy's `/config_dump`.
    Proto,
    /// `connectTimeout`, as `istioctl proxy-config -o json`.
    Camel,
}

/// Why a message has no JSON form, or a JSON text no message.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// The type is not one of Envoy's.
    #[error("unknown message type {0:?}; known are the types of Envoy's v3 API")]
    UnknownType(String),
    /// An `Any` without its type.
    #[error("an object with \"@type\" (type.googleapis.com/...) is expected")]
    NoType,
    /// The bytes are not of this type.
    #[error("reading a {0} from its bytes: {1}")]
    Decode(String, prost::DecodeError),
    /// The message does not fit JSON.
    #[error("writing a {0} as JSON: {1}")]
    Serialize(String, serde_json::Error),
    /// The JSON does not fit the type.
    #[error("reading a {0} from JSON: {1}")]
    Deserialize(String, serde_json::Error),
    /// A part of the JSON does not fit: the way to it (empty for the whole), and why.
    #[error("{}{message}", if .path.is_empty() { String::new() } else { format!("{path}: ") })]
    Field {
        /// Names of fields with dots, places in lists in brackets.
        path: String,
        /// What is wrong, and what would be right.
        message: String,
    },
}

/// The JSON form of an encoded message. An `Any` of unknown type inside is shown as `{"@type": …, "value": base64}`.
///
/// # Errors
/// An unknown type, or bytes that are not of the type.
pub fn to_json(type_url: &str, bytes: &[u8], naming: Naming) -> Result<Value, JsonError> {
    if type_url == NAME_TABLE {
        return NameTable::json_of(bytes);
    }
    let _held = Descriptors::hold();
    let descriptor = descriptor(type_url)?;
    let name = descriptor.full_name().to_owned();
    let mut message = DynamicMessage::decode(descriptor, bytes)
        .map_err(|error| JsonError::Decode(name.clone(), error))?;
    // The common case has no unknown types, so looking for them waits for the first failure.
    let mut value = match serialize(&message, naming) {
        Ok(value) => value,
        Err(_) => {
            hide_unknown(&mut message);
            serialize(&message, naming).map_err(|error| JsonError::Serialize(name, error))?
        }
    };
    tidy(&mut value);
    Ok(value)
}

/// As [`to_json`], with the type as first field `@type`, as inside an `Any`.
///
/// # Errors
/// As [`to_json`].
pub fn any_to_json(type_url: &str, bytes: &[u8], naming: Naming) -> Result<Value, JsonError> {
    let value = to_json(type_url, bytes, naming)?;
    let mut object = Map::new();
    object.insert("@type".to_owned(), Value::String(type_url.to_owned()));
    match value {
        Value::Object(fields) => object.extend(fields),
        other => {
            object.insert("value".to_owned(), other);
        }
    }
    Ok(Value::Object(object))
}

/// The encoded message of a JSON value. Fields may be named either way, unknown ones are an error; durations may be in Go's
/// form (`500ms`, `1m30s`), which Istio takes too.
///
/// # Errors
/// An unknown type or a value that does not fit it; the text names the field.
pub fn from_json(type_url: &str, value: &Value) -> Result<Vec<u8>, JsonError> {
    let _held = Descriptors::hold();
    let descriptor = descriptor(type_url)?;
    let name = descriptor.full_name().to_owned();
    let mut value = value.clone();
    convert_durations(&descriptor, &mut value);
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let message = DynamicMessage::deserialize_with_options(descriptor.clone(), &value, &options)
        .map_err(|error| match locate::fault(&descriptor, &value) {
            Some(fault) => JsonError::Field {
                path: fault.path,
                message: fault.message,
            },
            None => JsonError::Deserialize(name, error),
        })?;
    Ok(message.encode_to_vec())
}

/// Replaces every `TypedStruct` (of `udpa.type.v1` or `xds.type.v3`: a type's name beside its content as free JSON) whose type is known by that type,
/// so that its fields are read, and checked, like all others. Envoy does the same when it loads such a configuration.
pub fn resolve_typed_structs(value: &mut Value) {
    let _held = Descriptors::hold();
    match value {
        Value::Array(list) => list.iter_mut().for_each(resolve_typed_structs),
        Value::Object(object) => {
            if let Some(resolved) = resolved(object) {
                *object = resolved;
            }
            object.values_mut().for_each(resolve_typed_structs);
        }
        _ => {}
    }
}

fn resolved(object: &Map<String, Value>) -> Option<Map<String, Value>> {
    let outer = object.get("@type")?.as_str()?;
    if !outer.ends_with("udpa.type.v1.TypedStruct") && !outer.ends_with("xds.type.v3.TypedStruct") {
        return None;
    }
    let inner = object.get("type_url").or_else(|| object.get("typeUrl"))?;
    find(inner.as_str()?)?;
    let mut resolved = Map::new();
    resolved.insert("@type".to_owned(), inner.clone());
    if let Some(Value::Object(fields)) = object.get("value") {
        resolved.extend(fields.clone());
    }
    Some(resolved)
}

/// The type URL and encoded message of a JSON object that has `@type`.
///
/// # Errors
/// As [`from_json`], and a missing `@type`.
pub fn any_from_json(value: &Value) -> Result<(String, Vec<u8>), JsonError> {
    let mut object = value.as_object().ok_or(JsonError::NoType)?.clone();
    let Some(Value::String(type_url)) = object.remove("@type") else {
        return Err(JsonError::NoType);
    };
    let bytes = from_json(&type_url, &Value::Object(object))?;
    Ok((type_url, bytes))
}

pub(crate) fn descriptor(type_url: &str) -> Result<MessageDescriptor, JsonError> {
    find(type_url).ok_or_else(|| JsonError::UnknownType(type_url.to_owned()))
}

pub(crate) fn find(type_url: &str) -> Option<MessageDescriptor> {
    Descriptors::hold().find(type_url)
}

fn serialize(message: &DynamicMessage, naming: Naming) -> Result<Value, serde_json::Error> {
    let options = SerializeOptions::new()
        .use_proto_field_name(naming == Naming::Proto)
        .stringify_64_bit_integers(true)
        .skip_default_fields(true);
    message.serialize_with_options(serde_json::value::Serializer, &options)
}

/// Replaces each `Any` of unknown type by one that holds a `Struct` with its type and bytes; [`tidy`] unwraps it again.
fn hide_unknown(message: &mut DynamicMessage) {
    if message.descriptor().full_name() == ANY {
        hide_in_any(message);
        return;
    }
    let fields: Vec<FieldDescriptor> = message.fields().map(|(field, _)| field).collect();
    for field in fields {
        match message.get_field_mut(&field) {
            Field::Message(inner) => hide_unknown(inner),
            Field::List(list) => list.iter_mut().for_each(hide_in_value),
            Field::Map(map) => map.values_mut().for_each(hide_in_value),
            _ => {}
        }
    }
}

fn hide_in_value(value: &mut Field) {
    if let Field::Message(inner) = value {
        hide_unknown(inner);
    }
}

fn hide_in_any(any: &mut DynamicMessage) {
    let (Some(type_url), Some(bytes)) = (
        any.get_field_by_name("type_url")
            .and_then(|field| field.as_str().map(str::to_owned)),
        any.get_field_by_name("value")
            .and_then(|field| field.as_bytes().cloned()),
    ) else {
        return;
    };
    let known = find(&type_url)
        .and_then(|descriptor| DynamicMessage::decode(descriptor, bytes.clone()).ok());
    let (type_url, bytes) = match known {
        Some(mut inner) => {
            hide_unknown(&mut inner);
            (type_url, inner.encode_to_vec())
        }
        None => {
            let text = base64::engine::general_purpose::STANDARD.encode(&bytes);
            let stand_in = serde_json::json!({"@type": type_url, "value": text});
            match from_json(STRUCT_URL, &stand_in) {
                Ok(bytes) => (STRUCT_URL.to_owned(), bytes),
                Err(_) => return,
            }
        }
    };
    any.set_field_by_name("type_url", Field::String(type_url));
    any.set_field_by_name("value", Field::Bytes(bytes.into()));
}

/// Unwraps what [`hide_unknown`] made, and writes whole numbers of a `Struct` without a fraction, as Envoy and Go do.
fn tidy(value: &mut Value) {
    match value {
        Value::Number(number) => {
            if let Some(float) = number.as_f64().filter(|_| number.is_f64())
                && float.fract() == 0.0
                && float.abs() < 9_007_199_254_740_992.0
            {
                *number = (float as i64).into();
            }
        }
        Value::Array(list) => list.iter_mut().for_each(tidy),
        Value::Object(object) => {
            let stand_in = object.get("@type").is_some_and(|t| t == STRUCT_URL)
                && object
                    .get("value")
                    .is_some_and(|v| v.get("@type").is_some());
            if stand_in && let Some(inner) = object.get_mut("value") {
                *value = inner.take();
                return;
            }
            object.values_mut().for_each(tidy);
        }
        _ => {}
    }
}

/// Rewrites durations in Go's form to protobuf's (seconds). What is not understood is left for the reader to refuse.
fn convert_durations(descriptor: &MessageDescriptor, value: &mut Value) {
    if descriptor.full_name() == DURATION {
        if let Value::String(text) = value
            && let Some(nanos) = go_duration(text)
        {
            *text = protobuf_duration(nanos);
        }
        return;
    }
    let Value::Object(object) = value else { return };
    if descriptor.full_name() == ANY {
        let inner = object.get("@type").and_then(Value::as_str).and_then(find);
        if let Some(inner) = inner {
            // An Any that holds an Any keeps it under `value`, as all types with a JSON form of their own do.
            if inner.full_name() == DURATION || inner.full_name() == ANY {
                object
                    .get_mut("value")
                    .into_iter()
                    .for_each(|value| convert_durations(&inner, value));
            } else {
                convert_durations(&inner, value);
            }
        }
        return;
    }
    for (key, value) in object {
        let field = descriptor
            .get_field_by_json_name(key)
            .or_else(|| descriptor.get_field_by_name(key));
        if let Some(field) = field {
            convert_field(&field, value);
        }
    }
}

fn convert_field(field: &FieldDescriptor, value: &mut Value) {
    let kind = if field.is_map() {
        match field.kind() {
            Kind::Message(entry) => entry.map_entry_value_field().kind(),
            other => other,
        }
    } else {
        field.kind()
    };
    let Kind::Message(inner) = kind else { return };
    match value {
        Value::Array(list) if field.is_list() => {
            list.iter_mut()
                .for_each(|item| convert_durations(&inner, item));
        }
        Value::Object(map) if field.is_map() => {
            map.values_mut()
                .for_each(|item| convert_durations(&inner, item));
        }
        value => convert_durations(&inner, value),
    }
}

/// Nanoseconds of a duration in Go's form (`1h30m`, `1.5s`, `500ms`, `10us`).
fn go_duration(text: &str) -> Option<i128> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text),
    };
    let mut total = 0_i128;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, unit_on) = rest.split_at(digits);
        let end = unit_on
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(unit_on.len());
        let (unit, next) = unit_on.split_at(end);
        let scale: i128 = match unit {
            "ns" => 1,
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.len() > 12 || fraction.len() > 12 || (whole.is_empty() && fraction.is_empty()) {
            return None;
        }
        let parse = |digits: &str| match digits {
            "" => Some(0_i128),
            digits => digits.parse().ok(),
        };
        let divisor = 10_i128.pow(u32::try_from(fraction.len()).ok()?);
        total += parse(whole)? * scale + parse(fraction)? * scale / divisor;
        rest = next;
    }
    Some(sign * total)
}

fn protobuf_duration(nanos: i128) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let (seconds, rest) = (nanos.abs() / 1_000_000_000, nanos.abs() % 1_000_000_000);
    if rest == 0 {
        return format!("{sign}{seconds}s");
    }
    let fraction = format!("{rest:09}");
    format!("{sign}{seconds}.{}s", fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
    const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";

    #[test]
    fn an_any_of_an_any_ends() {
        let any = "type.googleapis.com/google.protobuf.Any";
        for value in [
            json!({"@type": any, "value": {}}),
            json!({"@type": any, "value": {"@type": any, "value": {"@type": any}}}),
        ] {
            let options = json!({"typed_extension_protocol_options": {"a": value}});
            // An answer, whichever: the reader used to go round for ever.
            let _ = from_json(CLUSTER, &options);
        }
    }

    #[test]
    fn both_ways_with_nested_any() {
        let listener = json!({
            "name": "virtualOutbound",
            "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15001}},
            "filter_chains": [{"filters": [{
                "name": "envoy.filters.network.tcp_proxy",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                    "stat_prefix": "PassthroughCluster",
                    "cluster": "PassthroughCluster",
                    "idle_timeout": "1h"
                }
            }]}],
            "metadata": {"filter_metadata": {"istio": {"weight": 3, "share": 0.5}}}
        });
        let bytes = from_json(LISTENER, &listener).unwrap();
        let back = to_json(LISTENER, &bytes, Naming::Proto).unwrap();
        let mut expected = listener;
        expected["filter_chains"][0]["filters"][0]["typed_config"]["idle_timeout"] = json!("3600s");
        assert_eq!(back, expected);
        let camel = to_json(LISTENER, &bytes, Naming::Camel).unwrap();
        assert_eq!(camel["address"]["socketAddress"]["portValue"], 15001);
        let any = any_to_json(LISTENER, &bytes, Naming::Camel).unwrap();
        // The order of map entries in the bytes is free, so JSON is compared.
        let (type_url, again) = any_from_json(&any).unwrap();
        assert_eq!(type_url, LISTENER);
        assert_eq!(to_json(&type_url, &again, Naming::Proto).unwrap(), back);
    }

    #[test]
    fn an_unknown_any_is_shown_not_an_error() {
        let any = |value: &[u8]| envoy_types::pb::google::protobuf::Any {
            type_url: "type.googleapis.com/foo.Bar".to_owned(),
            value: value.to_vec(),
        };
        let cluster = envoy_types::pb::envoy::config::cluster::v3::Cluster {
            name: "c".to_owned(),
            typed_extension_protocol_options: [("x".to_owned(), any(&[8, 1]))].into(),
            ..Default::default()
        };
        let bytes = prost::Message::encode_to_vec(&cluster);
        let value = to_json(CLUSTER, &bytes, Naming::Proto).unwrap();
        assert_eq!(
            value["typed_extension_protocol_options"]["x"],
            json!({"@type": "type.googleapis.com/foo.Bar", "value": "CAE="})
        );
    }

    #[test]
    fn unknown_fields_and_types_are_named() {
        let error = from_json(CLUSTER, &json!({"name": "c", "bogus": 1})).unwrap_err();
        assert!(error.to_string().contains("bogus"), "{error}");
        let error = from_json("type.googleapis.com/foo.Bar", &json!({})).unwrap_err();
        assert!(error.to_string().contains("foo.Bar"), "{error}");
        assert!(to_json(CLUSTER, &[255, 255], Naming::Proto).is_err());
    }

    #[test]
    fn durations_of_go() {
        for (go, protobuf) in [
            ("500ms", "0.5s"),
            ("1m30s", "90s"),
            ("1.5h", "5400s"),
            ("-10us", "-0.00001s"),
            ("0.25s", "0.25s"),
        ] {
            assert_eq!(
                go_duration(go).map(protobuf_duration).as_deref(),
                Some(protobuf)
            );
        }
        for bad in ["", "5", "s", "1x", ".s", "99999999999999s"] {
            assert_eq!(go_duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_message_of_the_filters_in_use_is_known() {
        for name in [
            "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "envoy.extensions.filters.http.router.v3.Router",
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "envoy.config.bootstrap.v3.Bootstrap",
            "envoy.admin.v3.ConfigDump",
            "udpa.type.v1.TypedStruct",
            "xds.type.v3.TypedStruct",
        ] {
            assert!(find(name).is_some(), "{name}");
        }
    }
}
