//! Deployments, ReplicaSets, StatefulSets, DaemonSets and the ControllerRevisions of the last two.

use serde_json::{Value, json};

use super::pod;
use crate::errors::{FieldError, FieldErrorKind};
use crate::names::validate_labels;
use crate::registry::Resource;
use crate::selector::LabelSelector;

/// Strategy, template.
pub fn defaults(storage: &str, object: &mut Value) {
    let spec = &mut object["spec"];
    let (field, pace): (_, Vec<(&str, Value)>) = match storage {
        "apps/deployments" => (
            "strategy",
            vec![("maxUnavailable", json!("25%")), ("maxSurge", json!("25%"))],
        ),
        "apps/statefulsets" => ("updateStrategy", vec![("partition", json!(0))]),
        "apps/daemonsets" => (
            "updateStrategy",
            vec![("maxUnavailable", json!(1)), ("maxSurge", json!(0))],
        ),
        _ => ("", Vec::new()),
    };
    if !field.is_empty() {
        let strategy = &mut spec[field];
        if strategy.get("type").is_none() {
            strategy["type"] = "RollingUpdate".into();
        }
        if strategy["type"] == "RollingUpdate" {
            for (name, default) in pace {
                if strategy["rollingUpdate"].get(name).is_none() {
                    strategy["rollingUpdate"][name] = default;
                }
            }
        }
    }
    if storage == "apps/statefulsets" {
        let policy = &mut spec["persistentVolumeClaimRetentionPolicy"];
        for name in ["whenDeleted", "whenScaled"] {
            if policy.get(name).is_none() {
                policy[name] = "Retain".into();
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
    let field = if resource.kind == "Deployment" {
        "spec.strategy"
    } else {
        "spec.updateStrategy"
    };
    validate_strategy(&spec[&field["spec.".len()..]], field, errors);
    if resource.kind == "StatefulSet" {
        validate_stateful_set(spec, old.map(|old| &old["spec"]), errors);
    }
}

/// The pace of a rollout; another type than rolling has none.
fn validate_strategy(strategy: &Value, field: &str, errors: &mut Vec<FieldError>) {
    let rolling = &strategy["rollingUpdate"];
    let kind = strategy["type"].as_str().unwrap_or_default();
    if kind != "RollingUpdate" && rolling.is_object() {
        let detail = format!("may not be specified when strategy `type` is '{kind}'");
        errors.push(FieldError::forbidden(
            format!("{field}.rollingUpdate"),
            &detail,
        ));
    }
    for name in ["maxSurge", "maxUnavailable", "partition"] {
        let value = &rolling[name];
        let percent = value.as_str().and_then(|text| text.strip_suffix('%'));
        let good = match (value, percent.map(str::parse::<u32>)) {
            (Value::Null, _) => true,
            (Value::Number(number), _) => number.as_i64().is_some_and(|number| number >= 0),
            (_, Some(Ok(percent))) => name == "maxSurge" || percent <= 100,
            _ => false,
        };
        if !good {
            errors.push(FieldError::invalid(
                format!("{field}.rollingUpdate.{name}"),
                value.clone(),
                "must be a whole number that is not negative, or a percentage",
            ));
        }
    }
    let zero = |value: &Value| matches!(value.as_i64(), Some(0)) || value == "0%";
    let some = |value: &Value| !value.is_null() && !zero(value);
    let at = format!("{field}.rollingUpdate.maxUnavailable");
    if zero(&rolling["maxUnavailable"])
        && (zero(&rolling["maxSurge"]) || rolling.get("partition").is_some())
    {
        let detail = "may not be 0 when `maxSurge` is 0";
        errors.push(FieldError::invalid(at, 0, detail));
    } else if field == "spec.updateStrategy"
        && some(&rolling["maxSurge"])
        && some(&rolling["maxUnavailable"])
    {
        let shown = rolling["maxSurge"].clone();
        let detail = "may not be set when maxUnavailable is non-zero";
        errors.push(FieldError::invalid(
            format!("{field}.rollingUpdate.maxSurge"),
            shown,
            detail,
        ));
    }
}

/// What of a StatefulSet may change, and what this cluster lacks.
fn validate_stateful_set(spec: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    if spec["volumeClaimTemplates"]
        .as_array()
        .is_some_and(|list| !list.is_empty())
    {
        let detail = "persistent volume claims are not supported by this server; put an emptyDir or hostPath volume into the template";
        errors.push(FieldError::forbidden("spec.volumeClaimTemplates", detail));
    }
    if spec["ordinals"]["start"].as_i64().is_some_and(|n| n < 0) {
        errors.push(FieldError::invalid(
            "spec.ordinals.start",
            spec["ordinals"]["start"].clone(),
            "must be greater than or equal to 0",
        ));
    }
    let fixed = |field: &&str| old.is_some_and(|old| old[*field] != spec[*field]);
    if let Some(field) = ["serviceName", "podManagementPolicy", "volumeClaimTemplates"]
        .into_iter()
        .find(fixed)
    {
        let detail = format!(
            "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', \
             'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden (changed: '{field}')"
        );
        errors.push(FieldError::forbidden("spec", &detail));
    }
}

/// A revision counts up from 0 and its data stays.
pub fn validate_revision(object: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    if object["revision"].as_i64().is_some_and(|n| n < 0) {
        errors.push(FieldError::invalid(
            "revision",
            object["revision"].clone(),
            "must be greater than or equal to 0",
        ));
    }
    if old.is_some_and(|old| old["data"] != object["data"]) {
        let data = object["data"].clone();
        errors.push(FieldError::invalid("data", data, "field is immutable"));
    }
}
