//! A CRD's OpenAPI v3 schema as a [`Schema`].

use std::sync::Arc;

use serde_json::Value;

use super::{ListType, Schema, SchemaKind, builtin};
use crate::rules::Rule;

/// Constraints that are kept as they are and looked at while validating.
const RULES: [&str; 17] = [
    "minLength",
    "maxLength",
    "pattern",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minItems",
    "maxItems",
    "uniqueItems",
    "minProperties",
    "maxProperties",
    "oneOf",
    "anyOf",
    "allOf",
    "not",
];

/// The schema of a whole custom object; `apiVersion`, `kind` and `metadata` are those of every object.
pub fn root(raw: Option<&Value>) -> Schema {
    let mut schema = raw.map_or_else(
        || {
            let mut open = Schema::of(SchemaKind::Object);
            open.preserve_unknown = true;
            open
        },
        from_json,
    );
    schema.kind = SchemaKind::Object;
    schema
        .props
        .retain(|(key, _)| !matches!(key.as_str(), "apiVersion" | "kind" | "metadata"));
    let text = Arc::new(Schema::of(SchemaKind::String));
    schema.props.push(("apiVersion".to_owned(), text.clone()));
    schema.props.push(("kind".to_owned(), text));
    schema.props.push((
        "metadata".to_owned(),
        builtin::lookup("ObjectMeta").unwrap_or_else(Schema::any),
    ));
    schema
}

/// One node of a schema; what is not understood means "no constraint".
pub fn from_json(raw: &Value) -> Schema {
    let text = |key: &str| raw.get(key).and_then(Value::as_str).unwrap_or_default();
    let flag = |key: &str| raw.get(key).and_then(Value::as_bool).unwrap_or_default();
    let strings = |key: &str| -> Vec<String> {
        let list = raw.get(key).and_then(Value::as_array);
        list.into_iter()
            .flatten()
            .filter_map(|v| v.as_str().map(str::to_owned))
            .collect()
    };
    let mut schema = Schema::of(kind_of(raw));
    schema.description = text("description").to_owned();
    schema.format = text("format").to_owned();
    schema.required = strings("required");
    schema.default = raw.get("default").cloned();
    schema.allowed = raw
        .get("enum")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    schema.nullable = flag("nullable");
    schema.embedded = flag("x-kubernetes-embedded-resource");
    schema.preserve_unknown |= flag("x-kubernetes-preserve-unknown-fields");
    schema.atomic = text("x-kubernetes-map-type") == "atomic";
    schema.list_type = match text("x-kubernetes-list-type") {
        "set" => ListType::Set,
        "map" => ListType::Map(strings("x-kubernetes-list-map-keys")),
        _ => ListType::Atomic,
    };
    if schema.list_type != ListType::Atomic {
        schema
            .rules
            .insert("x-unique".to_owned(), Value::Bool(true));
    }
    if let Some(props) = raw.get("properties").and_then(Value::as_object) {
        schema.props = props
            .iter()
            .map(|(key, value)| (key.clone(), Arc::new(from_json(value))))
            .collect();
    }
    schema.additional = match raw.get("additionalProperties") {
        Some(Value::Bool(true)) => Some(Schema::any()),
        Some(inner @ Value::Object(_)) => Some(Arc::new(from_json(inner))),
        _ => None,
    };
    schema.items = raw
        .get("items")
        .filter(|v| v.is_object())
        .map(|inner| Arc::new(from_json(inner)));
    for rule in RULES {
        if let Some(value) = raw.get(rule) {
            schema.rules.insert(rule.to_owned(), value.clone());
        }
    }
    schema.validations = Rule::of(raw);
    let below = schema.props.iter().map(|(_, field)| field);
    let below = below.chain(&schema.additional).chain(&schema.items);
    schema.has_validations =
        !schema.validations.is_empty() || below.into_iter().any(|field| field.has_validations);
    schema
}

fn kind_of(raw: &Value) -> SchemaKind {
    if raw.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
        return SchemaKind::IntOrString;
    }
    match raw.get("type").and_then(Value::as_str) {
        Some("object") => SchemaKind::Object,
        Some("array") => SchemaKind::Array,
        Some("string") => SchemaKind::String,
        Some("integer") => SchemaKind::Integer,
        Some("number") => SchemaKind::Number,
        Some("boolean") => SchemaKind::Boolean,
        _ => SchemaKind::Any,
    }
}
