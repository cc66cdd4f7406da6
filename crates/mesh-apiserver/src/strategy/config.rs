//! ConfigMaps, Secrets and webhook configurations.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::errors::FieldError;
use crate::rules::{CONDITION_VARIABLES, Expression};

/// Bytes of data in one object (as in Kubernetes).
const MAX_DATA: usize = 1 << 20;

/// Writes `stringData` into `data`.
pub fn fold_string_data(secret: &mut Value) {
    let Some(map) = secret.as_object_mut() else {
        return;
    };
    let Some(text) = map.shift_remove("stringData") else {
        return;
    };
    for (key, value) in text.as_object().into_iter().flatten() {
        let encoded = STANDARD.encode(value.as_str().unwrap_or_default());
        let data = map
            .entry("data")
            .or_insert_with(|| Value::Object(serde_json::Map::new()));
        data[key.as_str()] = encoded.into();
    }
}

/// Keys, size, immutability, required keys of typed secrets.
pub fn validate(object: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    let mut size = 0;
    for field in ["data", "binaryData"] {
        for (key, value) in object[field].as_object().into_iter().flatten() {
            size += value.as_str().map_or(0, str::len);
            let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            if key.is_empty()
                || key.len() > 253
                || !key.bytes().all(good)
                || key == "."
                || key == ".."
            {
                let detail = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
                              'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
                errors.push(FieldError::invalid(
                    format!("{field}[{key}]"),
                    key.as_str(),
                    detail,
                ));
            }
        }
    }
    if size > MAX_DATA {
        errors.push(FieldError::invalid(
            "",
            "",
            &format!("Too long: must have at most {MAX_DATA} bytes"),
        ));
    }
    if object["type"] == "kubernetes.io/tls" {
        for key in ["tls.crt", "tls.key"] {
            if object["data"].get(key).is_none() {
                errors.push(FieldError::required(format!("data[{key}]"), ""));
            }
        }
    }
    let Some(old) = old else { return };
    if old["type"] != object["type"] {
        errors.push(FieldError::invalid(
            "type",
            object["type"].clone(),
            "field is immutable",
        ));
    }
    if old["immutable"] == Value::Bool(true) {
        for field in ["data", "binaryData", "immutable"] {
            if old[field] != object[field] {
                errors.push(FieldError::forbidden(
                    field,
                    "field is immutable when `immutable` is set",
                ));
            }
        }
    }
}

/// How a webhook is called must be said once and well.
pub fn validate_webhooks(object: &Value, errors: &mut Vec<FieldError>) {
    for (index, webhook) in object["webhooks"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let at = |field: &str| format!("webhooks[{index}].{field}");
        let name = webhook["name"].as_str().unwrap_or_default();
        if name.split('.').count() < 3 {
            let detail = "should be a domain with at least three segments separated by dots";
            errors.push(FieldError::invalid(at("name"), name, detail));
        }
        let config = &webhook["clientConfig"];
        if config["url"].is_string() == config["service"].is_object() {
            errors.push(FieldError::required(
                at("clientConfig"),
                "exactly one of url or service is required",
            ));
        }
        if config["url"]
            .as_str()
            .is_some_and(|url| !url.starts_with("https://"))
        {
            let detail = "'https' is the only allowed URL scheme";
            errors.push(FieldError::invalid(
                at("clientConfig.url"),
                config["url"].clone(),
                detail,
            ));
        }
        if webhook["timeoutSeconds"]
            .as_i64()
            .is_some_and(|s| !(1..=30).contains(&s))
        {
            let detail = "the timeout value must be between 1 and 30 seconds";
            errors.push(FieldError::invalid(
                at("timeoutSeconds"),
                webhook["timeoutSeconds"].clone(),
                detail,
            ));
        }
        let versions = webhook["admissionReviewVersions"].as_array();
        if !versions.is_some_and(|v| v.iter().any(|v| v == "v1")) {
            let detail = "must include at least one of v1";
            let found = webhook["admissionReviewVersions"].clone();
            errors.push(FieldError::invalid(
                at("admissionReviewVersions"),
                found,
                detail,
            ));
        }
        let conditions = webhook["matchConditions"].as_array();
        for (index, condition) in conditions.into_iter().flatten().enumerate() {
            let source = condition["expression"].as_str().unwrap_or_default();
            if let Err(reason) = Expression::compile(source, &CONDITION_VARIABLES) {
                errors.push(FieldError::invalid(
                    at(&format!("matchConditions[{index}].expression")),
                    source,
                    &format!("compilation failed: {reason}"),
                ));
            }
        }
    }
}
