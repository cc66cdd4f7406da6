//! Structural schemas, as CRDs want them, from the types' own schemas.
//!
//! Kubernetes takes a subset of JSON Schema: a `type` on every node, no `$ref`, no `additionalProperties: false`, and nothing but
//! conditions inside `oneOf`. What schemars makes is rewritten here to that form.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

/// The structural schema of a type.
pub(crate) fn structural<T: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    settings.meta_schema = None;
    let mut schema = settings
        .into_generator()
        .into_root_schema_for::<T>()
        .to_value();
    rewrite(&mut schema);
    if let Some(root) = schema.as_object_mut() {
        root.remove("title");
    }
    schema
}

/// Schema of a free-form object.
pub(crate) fn free_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}

/// Schema of the status that all Istio kinds share.
pub(crate) fn status() -> Value {
    let text = json!({ "type": "string" });
    json!({
        "type": "object",
        "description": "What the control plane made of the specification.",
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": {
            "conditions": { "type": "array", "description": "Current state, by type.", "items": { "type": "object", "properties": {
                "lastProbeTime": { "type": "string", "format": "date-time" },
                "lastTransitionTime": { "type": "string", "format": "date-time" },
                "message": text, "observedGeneration": { "type": "integer", "format": "int64" },
                "reason": text, "status": text, "type": text,
            } } },
            "observedGeneration": { "type": "integer", "format": "int64", "description": "Generation that this status is about." },
            "validationMessages": { "type": "array", "description": "Findings.", "items": { "type": "object", "properties": {
                "documentationUrl": text, "level": text,
                "type": { "type": "object", "properties": { "code": text, "name": text } },
            }, "x-kubernetes-preserve-unknown-fields": true } },
        },
    })
}

/// Rewrites a schema and everything below it.
fn rewrite(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else {
        return;
    };
    for noise in ["$schema", "default", "title"] {
        map.remove(noise);
    }
    drop_null(map);
    merge_alternatives(map);
    map_of_numbers(map);
    if map.get("additionalProperties") == Some(&Value::Bool(false)) {
        map.remove("additionalProperties");
    }
    number_formats(map);
    if let Some(properties) = map.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(rewrite);
    }
    for below in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(below) {
            rewrite(inner);
        }
    }
}

/// An optional field may be null for schemars; Kubernetes drops nulls by itself.
fn drop_null(map: &mut Map<String, Value>) {
    if let Some(types) = map.get_mut("type").and_then(Value::as_array_mut) {
        types.retain(|kind| kind != "null");
        if let Some(only) = types.first().cloned().filter(|_| types.len() == 1) {
            map.insert("type".into(), only);
        }
    }
    if let Some(Value::Array(mut choices)) = map.remove("anyOf") {
        choices.retain(|choice| choice != &json!({ "type": "null" }));
        if let [Value::Object(only)] = choices.as_slice() {
            for (key, value) in only {
                map.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
    }
}

/// Turns the `oneOf` of an enum into a list of values, and that of a tagged enum into properties of which one is required.
fn merge_alternatives(map: &mut Map<String, Value>) {
    let Some(Value::Array(choices)) = map.remove("oneOf") else {
        return;
    };
    if choices
        .iter()
        .all(|choice| choice.get("properties").is_some())
    {
        let mut properties = Map::new();
        let mut conditions = Vec::new();
        for choice in &choices {
            properties.extend(
                choice["properties"]
                    .as_object()
                    .cloned()
                    .unwrap_or_default(),
            );
            conditions.push(json!({ "required": choice["required"] }));
        }
        map.insert("type".into(), "object".into());
        map.insert("properties".into(), properties.into());
        map.insert("oneOf".into(), conditions.into());
        return;
    }
    let mut values = Vec::new();
    for choice in &choices {
        values.extend(choice.get("const").cloned());
        values.extend(
            choice
                .get("enum")
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default(),
        );
    }
    map.insert("type".into(), "string".into());
    map.insert("enum".into(), values.into());
}

/// A map with number keys is a map like any other in JSON.
fn map_of_numbers(map: &mut Map<String, Value>) {
    if let Some(Value::Object(patterns)) = map.remove("patternProperties")
        && let Some((_, value)) = patterns.into_iter().next()
    {
        map.insert("additionalProperties".into(), value);
    }
}

/// OpenAPI knows signed formats only; the bounds of an unsigned number are written out.
fn number_formats(map: &mut Map<String, Value>) {
    match map.get("format").and_then(Value::as_str) {
        Some("uint32") => {
            map.remove("format");
            map.insert("minimum".into(), 0.into());
            map.insert("maximum".into(), u32::MAX.into());
        }
        Some("uint64" | "uint" | "uint16" | "uint8") => {
            map.remove("format");
            map.insert("minimum".into(), 0.into());
        }
        _ => {}
    }
}
