//! HorizontalPodAutoscalers: validation, and the conversion between the two versions of the kind.

use serde_json::{Value, json};

use crate::errors::FieldError;
use crate::registry::Resource;

/// Where the old version carries what it has no fields for, as JSON in annotations (the names are Kubernetes').
const CARRIED: [(&str, &str, &str); 3] = [
    ("spec", "metrics", "autoscaling.alpha.kubernetes.io/metrics"),
    (
        "spec",
        "behavior",
        "autoscaling.alpha.kubernetes.io/behavior",
    ),
    (
        "status",
        "conditions",
        "autoscaling.alpha.kubernetes.io/conditions",
    ),
];
const CPU: &str = "targetCPUUtilizationPercentage";

/// Bounds and target.
pub fn validate(resource: &Resource, object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    let number = |field: &str| spec[field].as_i64().unwrap_or(1);
    for field in ["minReplicas", "maxReplicas"] {
        if number(field) < 1 {
            let detail = "must be greater than 0";
            let at = format!("spec.{field}");
            errors.push(FieldError::invalid(at, spec[field].clone(), detail));
        }
    }
    if number("maxReplicas") < number("minReplicas") {
        let detail = "must be greater than or equal to `minReplicas`";
        errors.push(FieldError::invalid(
            "spec.maxReplicas",
            spec["maxReplicas"].clone(),
            detail,
        ));
    }
    for field in ["kind", "name"] {
        if spec["scaleTargetRef"][field]
            .as_str()
            .unwrap_or_default()
            .is_empty()
        {
            let at = format!("spec.scaleTargetRef.{field}");
            errors.push(FieldError::required(at, ""));
        }
    }
    if resource.version == "v1" && spec[CPU].as_i64().is_some_and(|percent| percent < 1) {
        errors.push(FieldError::invalid(
            format!("spec.{CPU}"),
            spec[CPU].clone(),
            "must be greater than 0",
        ));
    }
}

/// The stored form in version `autoscaling/v1`.
pub fn to_old(object: &mut Value) {
    let mut metrics = take(object, "spec", "metrics")
        .and_then(|metrics| metrics.as_array().cloned())
        .unwrap_or_default();
    if let Some(index) = metrics
        .iter()
        .position(|metric| cpu_percent(metric).is_some())
    {
        let metric = metrics.remove(index);
        object["spec"][CPU] = cpu_percent(&metric).into();
    }
    if !metrics.is_empty() {
        object["spec"]["metrics"] = metrics.into();
    }
    for (part, field, annotation) in CARRIED {
        if let Some(value) = take(object, part, field) {
            object["metadata"]["annotations"][annotation] = value.to_string().into();
        }
    }
    take(object, "status", "currentMetrics");
}

/// An object of version `autoscaling/v1` as it is stored.
pub fn from_old(object: &mut Value) {
    for (part, field, annotation) in CARRIED {
        let Some(annotations) = object["metadata"]
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        else {
            break;
        };
        if let Some(Value::String(text)) = annotations.shift_remove(annotation)
            && let Ok(value) = serde_json::from_str::<Value>(&text)
        {
            object[part][field] = value;
        }
    }
    if let Some(percent) = take(object, "spec", CPU) {
        let metric = json!({ "type": "Resource", "resource": { "name": "cpu", "target": {
            "type": "Utilization", "averageUtilization": percent,
        } } });
        let mut metrics = vec![metric];
        metrics.extend(
            object["spec"]["metrics"]
                .as_array()
                .cloned()
                .unwrap_or_default(),
        );
        object["spec"]["metrics"] = metrics.into();
    }
    if object["metadata"]["annotations"]
        .as_object()
        .is_some_and(serde_json::Map::is_empty)
    {
        take(object, "metadata", "annotations");
    }
}

fn take(object: &mut Value, part: &str, field: &str) -> Option<Value> {
    object.get_mut(part)?.as_object_mut()?.shift_remove(field)
}

fn cpu_percent(metric: &Value) -> Option<i64> {
    let resource = &metric["resource"];
    let is_cpu = metric["type"] == "Resource" && resource["name"] == "cpu";
    is_cpu
        .then(|| resource["target"]["averageUtilization"].as_i64())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_version_loses_nothing() {
        let metric = |name: &str| {
            json!({ "type": "Resource", "resource": { "name": name, "target": {
                "type": "Utilization", "averageUtilization": 80 } } })
        };
        let new = json!({
            "metadata": { "name": "a" },
            "spec": { "maxReplicas": 3, "behavior": { "scaleUp": {} }, "metrics": [metric("cpu"), metric("memory")] },
            "status": { "conditions": [{ "type": "AbleToScale", "status": "True" }] },
        });
        let mut old = new.clone();
        to_old(&mut old);
        assert_eq!(old["spec"][CPU], 80);
        assert_eq!(old["spec"].get("metrics"), None);
        assert_eq!(old["metadata"]["annotations"].as_object().unwrap().len(), 3);
        from_old(&mut old);
        assert_eq!(old, new);
    }
}
