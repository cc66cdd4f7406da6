//! Deployments and ReplicaSets.

use serde_json::{Value, json};

use super::pod;
use crate::errors::{FieldError, FieldErrorKind};
use crate::names::validate_labels;
use crate::registry::Resource;
use crate::selector::LabelSelector;

/// Strategy, template.
pub fn defaults(storage: &str, object: &mut Value) {
    let spec = &mut object["spec"];
    if storage == "apps/deployments" {
        let strategy = &mut spec["strategy"];
        if strategy.get("type").is_none() {
            strategy["type"] = "RollingUpdate".into();
        }
        if strategy["type"] == "RollingUpdate" {
            for field in ["maxUnavailable", "maxSurge"] {
                if strategy["rollingUpdate"].get(field).is_none() {
                    strategy["rollingUpdate"][field] = "25%".into();
                }
            }
        }
    }
    if spec["template"]["spec"].is_object() {
        pod::defaults(&mut spec["template"]["spec"]);
    }
}

/// Selector and template must agree, and the selector can't change.
pub fn validate(
    resource: &Resource,
    object: &Value,
    old: Option<&Value>,
    errors: &mut Vec<FieldError>,
) {
    let spec = &object["spec"];
    if spec["replicas"].as_i64().is_some_and(|n| n < 0) {
        let detail = "must be greater than or equal to 0";
        errors.push(FieldError::invalid(
            "spec.replicas",
            spec["replicas"].clone(),
            detail,
        ));
    }
    if spec.get("selector").is_none() {
        return errors.push(FieldError::required("spec.selector", ""));
    }
    let labels = &spec["template"]["metadata"]["labels"];
    validate_labels(labels, "spec.template.metadata.labels", errors);
    match LabelSelector::from_object(&spec["selector"]) {
        Err(error) => errors.push(FieldError::invalid(
            "spec.selector",
            spec["selector"].clone(),
            &error.message,
        )),
        Ok(selector) if selector.is_empty() => {
            let detail = format!("empty selector is invalid for {}", resource.singular);
            errors.push(FieldError::invalid(
                "spec.selector",
                spec["selector"].clone(),
                &detail,
            ));
        }
        Ok(selector) if !selector.matches_labels(labels) => {
            let shown = if labels.is_null() {
                json!({})
            } else {
                labels.clone()
            };
            let detail = "`selector` does not match template `labels`";
            errors.push(FieldError::invalid(
                "spec.template.metadata.labels",
                shown,
                detail,
            ));
        }
        Ok(_) => {}
    }
    if old.is_some_and(|old| old["spec"]["selector"] != spec["selector"]) {
        errors.push(FieldError::invalid(
            "spec.selector",
            spec["selector"].clone(),
            "field is immutable",
        ));
    }
    let template = &spec["template"]["spec"];
    if !template.is_object() {
        return errors.push(FieldError::required("spec.template.spec.containers", ""));
    }
    pod::validate_spec(template, "spec.template.spec", errors);
    if template["restartPolicy"] != "Always" {
        errors.push(FieldError::make(
            "spec.template.spec.restartPolicy",
            FieldErrorKind::NotSupported,
            template["restartPolicy"].clone(),
            "supported values: \"Always\"",
        ));
    }
    let rolling = &spec["strategy"];
    if rolling["type"] == "Recreate" && rolling.get("rollingUpdate").is_some() {
        let detail = "may not be specified when strategy `type` is 'Recreate'";
        errors.push(FieldError::forbidden("spec.strategy.rollingUpdate", detail));
    }
    let zero = |value: &Value| matches!(value.as_i64(), Some(0)) || value == "0%";
    if zero(&rolling["rollingUpdate"]["maxSurge"])
        && zero(&rolling["rollingUpdate"]["maxUnavailable"])
    {
        let field = "spec.strategy.rollingUpdate.maxUnavailable";
        errors.push(FieldError::invalid(
            field,
            0,
            "may not be 0 when `maxSurge` is 0",
        ));
    }
}
