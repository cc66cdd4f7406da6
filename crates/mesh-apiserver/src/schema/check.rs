//! Pruning, defaulting and validation of a value by its schema, in that order (Kubernetes structural schemas).

use serde_json::{Map, Value};

use super::{ListType, Schema, SchemaKind, crd};
use crate::errors::{FieldError, FieldErrorKind};

/// Removes fields that the schema does not know; their paths go to `unknown`.
pub fn prune(value: &mut Value, schema: &Schema, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(map) => prune_object(map, schema, path, unknown),
        Value::Array(list) => {
            if let Some(items) = &schema.items {
                for (index, item) in list.iter_mut().enumerate() {
                    prune(item, items, &format!("{path}[{index}]"), unknown);
                }
            }
        }
        _ => {}
    }
}

fn prune_object(
    map: &mut Map<String, Value>,
    schema: &Schema,
    path: &str,
    unknown: &mut Vec<String>,
) {
    let keep_all = schema.preserve_unknown || schema.kind != SchemaKind::Object;
    let envelope = |key: &str| schema.embedded && matches!(key, "apiVersion" | "kind" | "metadata");
    map.retain(|key, _| {
        let known = keep_all || schema.field(key).is_some() || envelope(key);
        if !known {
            unknown.push(join(path, key));
        }
        known
    });
    for (key, child) in map.iter_mut() {
        if let Some(field) = schema.field(key) {
            prune(child, field, &join(path, key), unknown);
        }
    }
}

/// Drops nulls that are not values, then puts defaults where fields are missing.
pub fn fill_defaults(value: &mut Value, schema: &Schema) {
    match value {
        Value::Object(map) => {
            if schema.kind == SchemaKind::Object {
                map.retain(|key, child| {
                    !child.is_null()
                        || schema
                            .field(key)
                            .is_none_or(|field| field.nullable || field.preserve_unknown)
                });
            }
            for (key, field) in &schema.props {
                if let Some(default) = &field.default
                    && !map.contains_key(key)
                {
                    map.insert(key.clone(), default.clone());
                }
            }
            for (key, child) in map.iter_mut() {
                if let Some(field) = schema.field(key) {
                    fill_defaults(child, field);
                }
            }
        }
        Value::Array(list) => {
            if let Some(items) = &schema.items {
                list.iter_mut().for_each(|item| fill_defaults(item, items));
            }
        }
        _ => {}
    }
}

/// Adds what is wrong with `value` to `errors`.
pub fn validate(value: &Value, schema: &Schema, path: &str, errors: &mut Vec<FieldError>) {
    if value.is_null() && (schema.nullable || schema.kind == SchemaKind::Any) {
        return;
    }
    if !has_type(value, schema.kind) {
        let detail = format!(
            "{} in body must be of type {}: \"{}\"",
            dot(path),
            kind_name(schema.kind),
            type_name(value)
        );
        errors.push(FieldError::make(
            path,
            FieldErrorKind::TypeInvalid,
            type_name(value).into(),
            &detail,
        ));
        return;
    }
    if !schema.allowed.is_empty() && !schema.allowed.contains(value) {
        let mut allowed: Vec<String> = schema.allowed.iter().map(Value::to_string).collect();
        allowed.sort();
        let detail = format!("supported values: {}", allowed.join(", "));
        errors.push(FieldError::make(
            path,
            FieldErrorKind::NotSupported,
            value.clone(),
            &detail,
        ));
    }
    match value {
        Value::Object(map) => validate_object(map, schema, path, errors),
        Value::Array(list) => validate_list(list, schema, path, errors),
        Value::String(text) => validate_text(text, schema, path, errors),
        Value::Number(number) => validate_number(number, schema, path, errors),
        _ => {}
    }
    validate_combinations(value, schema, path, errors);
}

fn validate_object(
    map: &Map<String, Value>,
    schema: &Schema,
    path: &str,
    errors: &mut Vec<FieldError>,
) {
    for name in &schema.required {
        if !map.contains_key(name) {
            errors.push(FieldError::required(join(path, name), ""));
        }
    }
    for (key, child) in map {
        if let Some(field) = schema.field(key) {
            validate(child, field, &join(path, key), errors);
        }
    }
    bound(
        schema,
        "minProperties",
        map.len(),
        path,
        "should have at least",
        "properties",
        errors,
    );
    bound(
        schema,
        "maxProperties",
        map.len(),
        path,
        "should have at most",
        "properties",
        errors,
    );
}

fn validate_list(list: &[Value], schema: &Schema, path: &str, errors: &mut Vec<FieldError>) {
    for (index, item) in list.iter().enumerate() {
        let at = format!("{path}[{index}]");
        if let Some(items) = &schema.items {
            validate(item, items, &at, errors);
        }
        let same = |other: &Value| match &schema.list_type {
            ListType::Atomic => {
                schema.rules.get("uniqueItems") == Some(&Value::Bool(true)) && other == item
            }
            // Built-in lists are checked by kind: some of them may repeat keys (environment variables, container ports).
            _ if schema.rules.get("x-unique").is_none() => false,
            ListType::Set => other == item,
            ListType::Map(keys) => keys.iter().all(|key| other.get(key) == item.get(key)),
        };
        if list[..index].iter().any(same) {
            let shown = match &schema.list_type {
                ListType::Map(keys) if keys.len() == 1 => {
                    item.get(&keys[0]).cloned().unwrap_or(Value::Null)
                }
                ListType::Map(keys) => keys
                    .iter()
                    .filter_map(|k| item.get(k).map(|v| (k.clone(), v.clone())))
                    .collect::<Map<_, _>>()
                    .into(),
                _ => item.clone(),
            };
            let field = match &schema.list_type {
                ListType::Map(keys) if keys.len() == 1 => format!("{at}.{}", keys[0]),
                _ => at,
            };
            errors.push(FieldError::make(
                field,
                FieldErrorKind::Duplicate,
                shown,
                "",
            ));
        }
    }
    bound(
        schema,
        "minItems",
        list.len(),
        path,
        "should have at least",
        "items",
        errors,
    );
    bound(
        schema,
        "maxItems",
        list.len(),
        path,
        "should have at most",
        "items",
        errors,
    );
}

fn validate_text(text: &str, schema: &Schema, path: &str, errors: &mut Vec<FieldError>) {
    let length = text.chars().count();
    bound(
        schema,
        "minLength",
        length,
        path,
        "should be at least",
        "chars long",
        errors,
    );
    bound(
        schema,
        "maxLength",
        length,
        path,
        "should be at most",
        "chars long",
        errors,
    );
    if let Some(pattern) = schema.rules.get("pattern").and_then(Value::as_str) {
        let compiled = schema.pattern.get_or_init(|| {
            regex::RegexBuilder::new(pattern)
                .size_limit(1 << 20)
                .build()
                .map_err(|e| e.to_string())
        });
        match compiled {
            Ok(regex) if regex.is_match(text) => {}
            Ok(_) => {
                let detail = format!("{} in body should match '{pattern}'", dot(path));
                errors.push(FieldError::invalid(path, text, &detail));
            }
            Err(reason) => {
                let detail = format!("the schema's pattern '{pattern}' can't be used: {reason}");
                errors.push(FieldError::invalid(path, text, &detail));
            }
        }
    }
    if schema.format == "byte" && !is_base64(text) {
        errors.push(FieldError::invalid(path, text, "must be base64 encoded"));
    }
}

fn is_base64(text: &str) -> bool {
    use base64::Engine as _;
    let compact: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    base64::engine::general_purpose::STANDARD
        .decode(compact)
        .is_ok()
}

fn validate_number(
    number: &serde_json::Number,
    schema: &Schema,
    path: &str,
    errors: &mut Vec<FieldError>,
) {
    let Some(value) = number.as_f64() else { return };
    let flag = |name: &str| schema.rules.get(name) == Some(&Value::Bool(true));
    if let Some(min) = schema.rules.get("minimum").and_then(Value::as_f64)
        && (value < min || (flag("exclusiveMinimum") && value == min))
    {
        let detail = format!(
            "{} in body should be greater than or equal to {min}",
            dot(path)
        );
        errors.push(FieldError::invalid(path, number.clone(), &detail));
    }
    if let Some(max) = schema.rules.get("maximum").and_then(Value::as_f64)
        && (value > max || (flag("exclusiveMaximum") && value == max))
    {
        let detail = format!(
            "{} in body should be less than or equal to {max}",
            dot(path)
        );
        errors.push(FieldError::invalid(path, number.clone(), &detail));
    }
    if let Some(step) = schema.rules.get("multipleOf").and_then(Value::as_f64)
        && step > 0.0
        && (value / step).fract() != 0.0
    {
        let detail = format!("{} in body should be a multiple of {step}", dot(path));
        errors.push(FieldError::invalid(path, number.clone(), &detail));
    }
    if schema.format == "int32" && value != value.clamp(f64::from(i32::MIN), f64::from(i32::MAX)) {
        errors.push(FieldError::invalid(
            path,
            number.clone(),
            "must fit into 32 bits",
        ));
    }
}

fn validate_combinations(value: &Value, schema: &Schema, path: &str, errors: &mut Vec<FieldError>) {
    for (rule, parts) in &schema.rules {
        let branches: Vec<&Value> = match parts {
            Value::Array(list) => list.iter().collect(),
            other => vec![other],
        };
        let matching = || branches.iter().filter(|part| matches(value, part)).count();
        let wrong = match rule.as_str() {
            "oneOf" => (matching() != 1).then_some("must validate one and only one schema (oneOf)"),
            "anyOf" => (matching() == 0).then_some("must validate at least one schema (anyOf)"),
            "allOf" => {
                (matching() != branches.len()).then_some("must validate all the schemas (allOf)")
            }
            "not" => (matching() != 0).then_some("must not validate the schema (not)"),
            _ => None,
        };
        if let Some(wrong) = wrong {
            let name = if path.is_empty() { "<nil>" } else { path };
            errors.push(FieldError::invalid(
                name,
                value.clone(),
                &format!("\"{}\" {wrong}", dot(path)),
            ));
        }
    }
}

fn matches(value: &Value, raw: &Value) -> bool {
    let mut errors = Vec::new();
    validate(value, &crd::from_json(raw), "", &mut errors);
    errors.is_empty()
}

fn bound(
    schema: &Schema,
    rule: &str,
    size: usize,
    path: &str,
    words: &str,
    unit: &str,
    errors: &mut Vec<FieldError>,
) {
    let Some(limit) = schema.rules.get(rule).and_then(Value::as_u64) else {
        return;
    };
    let broken = if rule.starts_with("min") {
        (size as u64) < limit
    } else {
        size as u64 > limit
    };
    if broken {
        let detail = format!("{} in body {words} {limit} {unit}", dot(path));
        errors.push(FieldError::invalid(path, size, &detail));
    }
}

fn has_type(value: &Value, kind: SchemaKind) -> bool {
    match kind {
        SchemaKind::Any => true,
        SchemaKind::Object => value.is_object(),
        SchemaKind::Array => value.is_array(),
        SchemaKind::String => value.is_string(),
        SchemaKind::Boolean => value.is_boolean(),
        SchemaKind::Number => value.is_number(),
        SchemaKind::Integer => is_integer(value),
        SchemaKind::IntOrString => value.is_string() || value.is_number(),
    }
}

fn is_integer(value: &Value) -> bool {
    value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0)
}

fn kind_name(kind: SchemaKind) -> &'static str {
    match kind {
        SchemaKind::Any => "any",
        SchemaKind::Object => "object",
        SchemaKind::Array => "array",
        SchemaKind::String => "string",
        SchemaKind::Boolean => "boolean",
        SchemaKind::Number => "number",
        SchemaKind::Integer => "integer",
        SchemaKind::IntOrString => "integer,string",
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) if is_integer(value) => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn dot(path: &str) -> &str {
    if path.is_empty() { "<root>" } else { path }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}
