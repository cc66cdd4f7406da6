//! Pods and pod templates.

use serde_json::{Value, json};

use crate::ApiServer;
use crate::errors::{ApiError, FieldError, FieldErrorKind};
use crate::names;
use crate::registry::Resource;
use crate::strategy::items_mut;

const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const TOKEN_VOLUME: &str = "kube-api-access-";

/// Image pull policy, requests from limits, the old name of the service account field, volumes without a source.
pub fn defaults(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        for container in items_mut(spec, list).filter(|c| c.is_object()) {
            container_defaults(container);
        }
    }
    drop_null_lists(spec);
    let account = ["serviceAccountName", "serviceAccount"]
        .into_iter()
        .find_map(|field| {
            spec[field]
                .as_str()
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
        });
    if let Some(account) = account {
        spec["serviceAccountName"] = account.as_str().into();
        spec["serviceAccount"] = account.into();
    }
    for volume in items_mut(spec, "volumes") {
        if let Some(map) = volume.as_object_mut()
            && map.len() == 1
            && map.contains_key("name")
        {
            map.insert("emptyDir".to_owned(), json!({}));
        }
    }
    drop_null_lists(spec);
}

/// Indexing for writing leaves nulls behind where there was nothing.
fn drop_null_lists(spec: &mut Value) {
    if let Some(map) = spec.as_object_mut() {
        map.retain(|_, value| !value.is_null());
    }
}

fn container_defaults(container: &mut Value) {
    if container["imagePullPolicy"]
        .as_str()
        .unwrap_or_default()
        .is_empty()
    {
        let image = container["image"].as_str().unwrap_or_default();
        let last = image.rsplit('/').next().unwrap_or_default();
        let tag = last.split_once(':').map_or("latest", |(_, tag)| tag);
        let latest = tag == "latest" && !last.contains('@');
        container["imagePullPolicy"] = if latest { "Always" } else { "IfNotPresent" }.into();
    }
    let limits = container["resources"]["limits"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    for (name, limit) in limits {
        if container["resources"]["requests"].get(&name).is_none() {
            container["resources"]["requests"][name.as_str()] = limit;
        }
    }
    if let Some(resources) = container["resources"].as_object_mut() {
        resources.retain(|_, v| !v.is_null());
    }
}

/// Gives the pod its service account and, unless it does not want it, a token for every container. Runs again after the webhooks, for
/// the containers that they add.
///
/// # Errors
/// 403 when the service account does not exist.
pub fn admit_service_account(
    api: &ApiServer,
    resource: &Resource,
    pod: &mut Value,
) -> Result<(), ApiError> {
    let namespace = pod["metadata"]["namespace"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let pod_name = pod["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let spec = &mut pod["spec"];
    let name = spec["serviceAccountName"]
        .as_str()
        .filter(|n| !n.is_empty())
        .unwrap_or("default")
        .to_owned();
    spec["serviceAccountName"] = name.as_str().into();
    spec["serviceAccount"] = name.as_str().into();
    let account = api
        .storage()
        .get("core/serviceaccounts", &format!("{namespace}/{name}"));
    // The default account of a new namespace may be a moment behind its first pod.
    if account.is_none() && name != "default" {
        let why = format!(
            "error looking up service account {namespace}/{name}: serviceaccount \"{name}\" not found"
        );
        return Err(ApiError::forbidden(resource, &pod_name, &why));
    }
    let account_wants = account.and_then(|a| a.value["automountServiceAccountToken"].as_bool());
    if spec["automountServiceAccountToken"]
        .as_bool()
        .or(account_wants)
        != Some(false)
    {
        mount_token(spec);
    }
    drop_null_lists(spec);
    Ok(())
}

fn mount_token(spec: &mut Value) {
    let existing = spec["volumes"]
        .as_array()
        .into_iter()
        .flatten()
        .find_map(|volume| {
            volume["name"]
                .as_str()
                .filter(|name| name.starts_with(TOKEN_VOLUME))
                .map(str::to_owned)
        });
    let volume = existing
        .clone()
        .unwrap_or_else(|| names::generate(TOKEN_VOLUME));
    let mut mounted = false;
    for list in ["initContainers", "containers"] {
        for container in items_mut(spec, list).filter(|c| c.is_object()) {
            let has = container["volumeMounts"]
                .as_array()
                .is_some_and(|m| m.iter().any(|m| m["mountPath"] == TOKEN_PATH));
            if !has {
                push(
                    &mut container["volumeMounts"],
                    json!({ "mountPath": TOKEN_PATH, "name": volume, "readOnly": true }),
                );
                mounted = true;
            }
        }
    }
    if mounted && existing.is_none() {
        push(
            &mut spec["volumes"],
            json!({ "name": volume, "projected": { "defaultMode": 420, "sources": [
            { "serviceAccountToken": { "expirationSeconds": 3607, "path": "token" } },
            { "configMap": { "items": [{ "key": "ca.crt", "path": "ca.crt" }], "name": "kube-root-ca.crt" } },
            { "downwardAPI": { "items": [{
                "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" }, "path": "namespace",
            }] } },
        ] } }),
        );
    }
}

fn push(list: &mut Value, item: Value) {
    match list {
        Value::Array(items) => items.push(item),
        other => *other = json!([item]),
    }
}

/// Tolerations, priority, first status.
pub fn prepare_create(pod: &mut Value) {
    let spec = &mut pod["spec"];
    for key in [
        "node.kubernetes.io/not-ready",
        "node.kubernetes.io/unreachable",
    ] {
        let has = spec["tolerations"]
            .as_array()
            .is_some_and(|t| t.iter().any(|t| t["key"] == key));
        if !has {
            let toleration = json!({ "effect": "NoExecute", "key": key, "operator": "Exists", "tolerationSeconds": 300 });
            push(&mut spec["tolerations"], toleration);
        }
    }
    if spec.get("priority").is_none_or(Value::is_null) {
        spec["priority"] = 0.into();
        spec["preemptionPolicy"] = "PreemptLowerPriority".into();
    }
    pod["status"] = json!({ "phase": "Pending", "qosClass": qos_class(&pod["spec"]) });
}

/// Token volumes and the like stay when a client's update leaves defaults out.
pub fn prepare_update(old: &Value, new: &mut Value) {
    for field in [
        "priority",
        "preemptionPolicy",
        "serviceAccountName",
        "serviceAccount",
        "nodeName",
    ] {
        if new["spec"].get(field).is_none_or(Value::is_null)
            && let Some(value) = old["spec"].get(field)
        {
            new["spec"][field] = value.clone();
        }
    }
    drop_null_lists(&mut new["spec"]);
}

/// Kubernetes' quality of service classes.
fn qos_class(spec: &Value) -> &'static str {
    let containers = ["containers", "initContainers"]
        .into_iter()
        .flat_map(|l| spec[l].as_array().into_iter().flatten());
    let (mut any, mut all) = (false, true);
    for container in containers {
        let (requests, limits) = (
            &container["resources"]["requests"],
            &container["resources"]["limits"],
        );
        for resource in ["cpu", "memory"] {
            any |= !requests[resource].is_null() || !limits[resource].is_null();
            all &= !limits[resource].is_null() && requests[resource] == limits[resource];
        }
    }
    match (any, all) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// A whole pod.
pub fn validate(
    subresource: Option<&str>,
    pod: &Value,
    old: Option<&Value>,
    errors: &mut Vec<FieldError>,
) {
    let Some(old) = old else {
        if !pod["spec"].is_object() {
            return errors.push(FieldError::required("spec.containers", ""));
        }
        return validate_spec(&pod["spec"], "spec", errors);
    };
    if subresource.is_some() {
        return;
    }
    let fixed = |pod: &Value| {
        let mut spec = pod["spec"].clone();
        for list in ["containers", "initContainers"] {
            for container in items_mut(&mut spec, list) {
                container["image"] = Value::Null;
            }
        }
        for field in [
            "activeDeadlineSeconds",
            "terminationGracePeriodSeconds",
            "tolerations",
            "initContainers",
        ] {
            if let Some(map) = spec.as_object_mut()
                && (field != "initContainers" || map.get(field).is_none_or(Value::is_null))
            {
                map.shift_remove(field);
            }
        }
        spec
    };
    if fixed(old) != fixed(pod) {
        errors.push(FieldError::forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,\
             `spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),\
             `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
}

/// The spec of a pod or of a template.
pub fn validate_spec(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let list = |name: &str| spec[name].as_array().cloned().unwrap_or_default();
    if list("containers").is_empty() {
        errors.push(FieldError::required(format!("{path}.containers"), ""));
    }
    let volumes: Vec<Value> = list("volumes").iter().map(|v| v["name"].clone()).collect();
    let mut seen: Vec<Value> = Vec::new();
    for group in ["initContainers", "containers"] {
        for (index, container) in list(group).iter().enumerate() {
            let at = format!("{path}.{group}[{index}]");
            if seen.contains(&container["name"]) {
                let name = container["name"].clone();
                errors.push(FieldError::make(
                    format!("{at}.name"),
                    FieldErrorKind::Duplicate,
                    name,
                    "",
                ));
            }
            seen.push(container["name"].clone());
            validate_container(container, &at, &volumes, errors);
            let restart = container["restartPolicy"].as_str();
            if group == "initContainers" && restart.is_some_and(|r| r != "Always") {
                errors.push(FieldError::make(
                    format!("{at}.restartPolicy"),
                    FieldErrorKind::NotSupported,
                    container["restartPolicy"].clone(),
                    "supported values: \"Always\"",
                ));
            }
        }
    }
    for (index, volume) in list("volumes").iter().enumerate() {
        let field = format!("{path}.volumes[{index}].name");
        errors.extend(names::label_error(
            &field,
            volume["name"].as_str().unwrap_or_default(),
        ));
        if volumes[..index].contains(&volume["name"]) {
            errors.push(FieldError::make(
                field,
                FieldErrorKind::Duplicate,
                volume["name"].clone(),
                "",
            ));
        }
    }
    if spec["terminationGracePeriodSeconds"]
        .as_i64()
        .is_some_and(|s| s < 0)
    {
        let value = spec["terminationGracePeriodSeconds"].clone();
        let field = format!("{path}.terminationGracePeriodSeconds");
        errors.push(FieldError::invalid(
            field,
            value,
            "must be greater than or equal to 0",
        ));
    }
}

fn validate_container(
    container: &Value,
    at: &str,
    volumes: &[Value],
    errors: &mut Vec<FieldError>,
) {
    errors.extend(names::label_error(
        &format!("{at}.name"),
        container["name"].as_str().unwrap_or_default(),
    ));
    if container["image"]
        .as_str()
        .unwrap_or_default()
        .trim()
        .is_empty()
    {
        errors.push(FieldError::required(format!("{at}.image"), ""));
    }
    let items = |name: &str| container[name].as_array().cloned().unwrap_or_default();
    for (index, port) in items("ports").iter().enumerate() {
        if !port["containerPort"]
            .as_i64()
            .is_some_and(|p| (1..=65535).contains(&p))
        {
            let field = format!("{at}.ports[{index}].containerPort");
            let detail = "must be between 1 and 65535, inclusive";
            errors.push(FieldError::invalid(
                field,
                port["containerPort"].clone(),
                detail,
            ));
        }
    }
    for (index, variable) in items("env").iter().enumerate() {
        let field = format!("{at}.env[{index}].name");
        match variable["name"].as_str().unwrap_or_default() {
            "" => errors.push(FieldError::required(field, "")),
            name if name.contains('=') => {
                errors.push(FieldError::invalid(
                    field,
                    name,
                    "a valid environment variable name must not contain '='",
                ));
            }
            _ => {}
        }
    }
    let mut paths: Vec<Value> = Vec::new();
    for (index, mount) in items("volumeMounts").iter().enumerate() {
        if !volumes.contains(&mount["name"]) {
            let field = format!("{at}.volumeMounts[{index}].name");
            errors.push(FieldError::make(
                field,
                FieldErrorKind::NotFound,
                mount["name"].clone(),
                "",
            ));
        }
        if paths.contains(&mount["mountPath"]) {
            let field = format!("{at}.volumeMounts[{index}].mountPath");
            errors.push(FieldError::invalid(
                field,
                mount["mountPath"].clone(),
                "must be unique",
            ));
        }
        paths.push(mount["mountPath"].clone());
    }
}
