//! Where a JSON value does not fit its message, and why: what a person has to be told, which the deserializer's own errors are not.

use prost_reflect::{DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value};

use crate::json::{ANY, DURATION, find};

/// Values of an enum that are named in a message.
const NAMED: usize = 16;

/// The first thing that does not fit.
pub(crate) struct Fault {
    /// The way there, such as `filters[0].typed_config.stat_prefix`; empty for the value as a whole.
    pub(crate) path: String,
    pub(crate) message: String,
}

/// Looks for it; `None` where every part fits by itself.
pub(crate) fn fault(descriptor: &MessageDescriptor, value: &Value) -> Option<Fault> {
    let mut path = String::new();
    let message = of_message(descriptor, value, &mut path)?;
    Some(Fault { path, message })
}

/// Where this finds something, `path` stays at it.
fn of_message(descriptor: &MessageDescriptor, value: &Value, path: &mut String) -> Option<String> {
    let Some(object) = value.as_object() else {
        return Some(format!(
            "an object with fields of {} is expected, not {}",
            descriptor.full_name(),
            shown(value)
        ));
    };
    if descriptor.full_name() != ANY {
        return of_fields(descriptor, object, path);
    }
    let Some(Value::String(type_url)) = object.get("@type") else {
        return Some("an object with \"@type\" (type.googleapis.com/...) is expected".to_owned());
    };
    let Some(inner) = find(type_url) else {
        enter(path, "@type");
        return Some(format!(
            "unknown message type {type_url:?}; known are the types of Envoy's v3 API"
        ));
    };
    if is_well_known(&inner) {
        return None;
    }
    let mut fields = object.clone();
    fields.remove("@type");
    of_fields(&inner, &fields, path)
}

fn of_fields(
    descriptor: &MessageDescriptor,
    object: &Map<String, Value>,
    path: &mut String,
) -> Option<String> {
    let mut chosen: Vec<(String, &str)> = Vec::new();
    for (key, value) in object.iter().filter(|(_, value)| !value.is_null()) {
        let before = path.len();
        enter(path, key);
        let field = descriptor
            .get_field_by_json_name(key)
            .or_else(|| descriptor.get_field_by_name(key));
        let Some(field) = field else {
            return Some(unknown(descriptor, key));
        };
        if let Some(message) = of_field(descriptor, &field, key, value, path) {
            return Some(message);
        }
        if let Some(group) = field.containing_oneof() {
            let group = group.name().to_owned();
            if let Some((_, other)) = chosen.iter().find(|(known, _)| *known == group) {
                path.truncate(before);
                return Some(format!("{other:?} and {key:?} exclude each other"));
            }
            chosen.push((group, key));
        }
        path.truncate(before);
    }
    None
}

fn of_field(
    descriptor: &MessageDescriptor,
    field: &FieldDescriptor,
    key: &str,
    value: &Value,
    path: &mut String,
) -> Option<String> {
    let inner = match field.kind() {
        Kind::Message(inner) if !field.is_map() && !is_well_known(&inner) => inner,
        _ => return of_leaf(descriptor, field, key, value),
    };
    if !field.is_list() {
        return of_message(&inner, value, path);
    }
    let Some(items) = value.as_array() else {
        return Some(format!("a list is expected, not {}", shown(value)));
    };
    for (index, item) in items.iter().enumerate() {
        let before = path.len();
        path.push_str(&format!("[{index}]"));
        let found = of_message(&inner, item, path);
        if found.is_some() {
            return found;
        }
        path.truncate(before);
    }
    None
}

/// A field that is tried by itself.
fn of_leaf(
    descriptor: &MessageDescriptor,
    field: &FieldDescriptor,
    key: &str,
    value: &Value,
) -> Option<String> {
    let alone = Value::Object(Map::from_iter([(key.to_owned(), value.clone())]));
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let error =
        DynamicMessage::deserialize_with_options(descriptor.clone(), &alone, &options).err()?;
    let expected = if field.is_map() {
        format!("an object of the form of {} ({error})", field.full_name())
    } else if field.is_list() {
        format!("a list of which each is {}", expected(&field.kind()))
    } else {
        expected(&field.kind())
    };
    Some(format!("{expected} is expected, not {}", shown(value)))
}

fn expected(kind: &Kind) -> String {
    match kind {
        Kind::Bool => "true or false".to_owned(),
        Kind::String => "a text".to_owned(),
        Kind::Bytes => "a text in base64".to_owned(),
        Kind::Double | Kind::Float => "a number".to_owned(),
        Kind::Enum(kind) => {
            let names: Vec<String> = kind
                .values()
                .take(NAMED)
                .map(|value| value.name().to_owned())
                .collect();
            format!("one of {}", names.join(", "))
        }
        Kind::Message(inner) => match inner.full_name() {
            DURATION => "a duration such as \"1.5s\"".to_owned(),
            "google.protobuf.BoolValue" => "true or false".to_owned(),
            "google.protobuf.StringValue" => "a text".to_owned(),
            "google.protobuf.DoubleValue" | "google.protobuf.FloatValue" => "a number".to_owned(),
            "google.protobuf.UInt32Value" | "google.protobuf.UInt64Value" => {
                "a whole number from 0".to_owned()
            }
            name => format!("a {name}"),
        },
        Kind::Uint32 | Kind::Uint64 | Kind::Fixed32 | Kind::Fixed64 => {
            "a whole number from 0".to_owned()
        }
        _ => "a whole number".to_owned(),
    }
}

/// What stands there, short.
fn shown(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        other => {
            let text = other.to_string();
            match text.char_indices().nth(60) {
                Some((end, _)) => format!("{}…", &text[..end]),
                None => text,
            }
        }
    }
}

fn unknown(descriptor: &MessageDescriptor, key: &str) -> String {
    let near = descriptor
        .fields()
        .map(|field| (distance(key, field.name()), field.name().to_owned()))
        .min()
        .filter(|(distance, _)| *distance <= 1 + key.len() / 4);
    let hint = near.map_or_else(String::new, |(_, name)| {
        format!(" (did you mean {name:?}?)")
    });
    format!("{} has no field {key:?}{hint}", descriptor.full_name())
}

/// Letters to insert, to take out or to change (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Types that have a JSON form of their own, but for `Any`, which has fields.
fn is_well_known(descriptor: &MessageDescriptor) -> bool {
    let name = descriptor.full_name();
    name.starts_with("google.protobuf.") && name != ANY
}

fn enter(path: &mut String, key: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(key);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::JsonError;

    #[test]
    fn faults_have_a_place_and_a_reason() {
        let cluster = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
        let filter = "type.googleapis.com/envoy.config.listener.v3.Filter";
        let tcp = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
        for (type_url, value, path, words) in [
            (
                cluster,
                json!({"conect_timeout": "3s"}),
                "conect_timeout",
                "did you mean \"connect_timeout\"?",
            ),
            (
                cluster,
                json!({"connectTimeout": "soon"}),
                "connectTimeout",
                "a duration such as \"1.5s\" is expected, not \"soon\"",
            ),
            (
                cluster,
                json!({"name": 3}),
                "name",
                "a text is expected, not 3",
            ),
            (
                cluster,
                json!({"type": "DNS"}),
                "type",
                "one of STATIC, STRICT_DNS",
            ),
            (
                cluster,
                json!({"load_assignment": []}),
                "load_assignment",
                "an object with fields of envoy.config.endpoint.v3.ClusterLoadAssignment is expected, not a list",
            ),
            (
                cluster,
                json!({"load_assignment": {"endpoints": {}}}),
                "load_assignment.endpoints",
                "a list is expected, not an object",
            ),
            (
                cluster,
                json!({"load_assignment": {"endpoints": [{}, {"priority": -1}]}}),
                "load_assignment.endpoints[1].priority",
                "a whole number from 0 is expected, not -1",
            ),
            (
                cluster,
                json!({"type": "EDS", "cluster_type": {"name": "a"}}),
                "",
                "exclude each other",
            ),
            (
                cluster,
                json!("text"),
                "",
                "an object with fields of envoy.config.cluster.v3.Cluster",
            ),
            (
                filter,
                json!({"typed_config": {"stat_prefix": "a"}}),
                "typed_config",
                "\"@type\"",
            ),
            (
                filter,
                json!({"typed_config": {"@type": "type.googleapis.com/foo.Bar"}}),
                "typed_config.@type",
                "unknown message type",
            ),
            (
                filter,
                json!({"typed_config": {"@type": tcp, "stat_prefixes": "a"}}),
                "typed_config.stat_prefixes",
                "did you mean \"stat_prefix\"?",
            ),
            (
                filter,
                json!({"typed_config": {"@type": tcp, "qqqqqqq": "a"}}),
                "typed_config.qqqqqqq",
                "TcpProxy has no field \"qqqqqqq\"",
            ),
        ] {
            let error = crate::from_json(type_url, &value).expect_err("a fault");
            let JsonError::Field {
                path: found,
                message,
            } = &error
            else {
                panic!("{value}: {error}");
            };
            assert!(found == path && message.contains(words), "{value}: {error}");
        }
    }
}
