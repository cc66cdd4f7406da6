//! JSON as CEL values, by schema: formats become timestamps, durations and bytes, field names are escaped as Kubernetes does
//! ("CEL type integration" of the CustomResourceDefinition documentation).

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use cel::Value as CelValue;
use cel::objects::{Key, Map as CelMap};
use serde_json::{Map, Value};

use crate::schema::{Schema, SchemaKind};

/// CEL's reserved words, which can't be field names as they are.
const RESERVED: [&str; 21] = [
    "true",
    "false",
    "null",
    "in",
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
    "while",
];

/// A value of this schema. Of metadata only the names can be seen.
pub fn value(json: &Value, schema: &Schema, is_root: bool) -> CelValue {
    match json {
        Value::Object(map) if schema.kind == SchemaKind::Object => object(map, schema, is_root),
        Value::Array(list) => {
            let items = schema.items_or_any();
            let all = list.iter().map(|item| value(item, &items, false));
            CelValue::List(Arc::new(all.collect()))
        }
        Value::String(text) => self::text(text, &schema.format),
        Value::Number(number) if schema.kind == SchemaKind::Number => {
            CelValue::Float(number.as_f64().unwrap_or_default())
        }
        other => plain(other),
    }
}

fn object(map: &Map<String, Value>, schema: &Schema, is_root: bool) -> CelValue {
    let mut fields = HashMap::new();
    for (key, child) in map {
        let known = schema.known(key);
        if key == "metadata" && (is_root || schema.embedded) {
            fields.insert(named(key), metadata(child));
            continue;
        }
        let (name, child_schema) = match (known, &schema.additional) {
            (Some(field), _) => (escape(key), field.clone()),
            (None, Some(values)) => (Some(key.clone()), values.clone()),
            (None, None) => (escape(key), Schema::any()),
        };
        if let Some(name) = name {
            fields.insert(named(&name), value(child, &child_schema, false));
        }
    }
    CelValue::Map(CelMap {
        map: Arc::new(fields),
    })
}

fn metadata(json: &Value) -> CelValue {
    let names = ["name", "generateName"];
    let fields = names.into_iter().filter_map(|name| {
        let text = json.get(name)?;
        Some((named(name), plain(text)))
    });
    CelValue::Map(CelMap {
        map: Arc::new(fields.collect()),
    })
}

fn named(name: &str) -> Key {
    Key::String(Arc::new(name.to_owned()))
}

/// A value of which nothing is known.
pub fn plain(json: &Value) -> CelValue {
    match json {
        Value::Null => CelValue::Null,
        Value::Bool(flag) => CelValue::Bool(*flag),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => CelValue::Int(whole),
            None => CelValue::Float(number.as_f64().unwrap_or_default()),
        },
        Value::String(text) => CelValue::String(Arc::new(text.clone())),
        Value::Array(list) => CelValue::List(Arc::new(list.iter().map(plain).collect())),
        Value::Object(map) => {
            let fields = map.iter().map(|(key, child)| (named(key), plain(child)));
            CelValue::Map(CelMap {
                map: Arc::new(fields.collect()),
            })
        }
    }
}

/// A text in its format; one that is not in it stays a text.
fn text(text: &str, format: &str) -> CelValue {
    let typed = match format {
        "date-time" => chrono::DateTime::parse_from_rfc3339(text)
            .ok()
            .map(CelValue::Timestamp),
        "date" => chrono::DateTime::parse_from_rfc3339(&format!("{text}T00:00:00Z"))
            .ok()
            .map(CelValue::Timestamp),
        "duration" => duration(text).map(CelValue::Duration),
        "byte" => base64::engine::general_purpose::STANDARD
            .decode(text)
            .ok()
            .map(|bytes| CelValue::Bytes(Arc::new(bytes))),
        _ => None,
    };
    typed.unwrap_or_else(|| CelValue::String(Arc::new(text.to_owned())))
}

/// A duration in Go's form, for example `1h2m3.5s`.
fn duration(text: &str) -> Option<chrono::Duration> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        let unit_end = rest[end..]
            .find(|c: char| c.is_ascii_digit())
            .map_or(rest.len(), |at| end + at);
        seconds += number
            * match &rest[end..unit_end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &rest[unit_end..];
    }
    let nanoseconds = (seconds * 1e9).round() * if negative { -1.0 } else { 1.0 };
    // Beyond this range the value would be cut.
    (nanoseconds.abs() < 9e18).then(|| chrono::Duration::nanoseconds(nanoseconds as i64))
}

/// A field's name as CEL can say it; `None` for one that can't be said.
fn escape(name: &str) -> Option<String> {
    if RESERVED.contains(&name) {
        return Some(format!("__{name}__"));
    }
    let mut letters = name.chars();
    let first = letters.next()?;
    if !(first.is_ascii_alphabetic() || first == '_')
        || !letters.all(|c| c.is_ascii_alphanumeric() || "_.-/".contains(c))
    {
        return None;
    }
    Some(
        name.replace("__", "__underscores__")
            .replace('.', "__dot__")
            .replace('-', "__dash__")
            .replace('/', "__slash__"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_as_kubernetes_does() {
        for (name, escaped) in [
            ("plain", Some("plain")),
            ("if", Some("__if__")),
            ("a-b.c/d", Some("a__dash__b__dot__c__slash__d")),
            ("a__b", Some("a__underscores__b")),
            ("1a", None),
            ("a b", None),
        ] {
            assert_eq!(escape(name).as_deref(), escaped, "{name}");
        }
    }

    #[test]
    fn durations_are_read_as_go_does() {
        for (text, milliseconds) in [
            ("1h", 3_600_000),
            ("1m30s", 90_000),
            ("-1.5s", -1500),
            ("20ms", 20),
        ] {
            assert_eq!(
                duration(text).map(|d| d.num_milliseconds()),
                Some(milliseconds),
                "{text}"
            );
        }
        assert_eq!(duration("1x"), None);
        assert_eq!(duration("soon"), None);
    }
}
