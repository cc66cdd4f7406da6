//! The roles and bindings that every cluster has (`defaults.yaml`), created at the start and repaired: what was taken out of them comes
//! back, what was added stays, unless `rbac.authorization.kubernetes.io/autoupdate` is `"false"` on the object.

use serde_json::{Value, json};

use super::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, GROUP, Rule, aggregate, missing};
use crate::bootstrap::ensure;
use crate::{ApiServer, OpenError};

const TABLE: &str = include_str!("defaults.yaml");
const AUTO_UPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";
const BOOTSTRAPPING: &str = "kubernetes.io/bootstrapping";

/// Creates and repairs.
pub fn create(api: &ApiServer) -> Result<(), OpenError> {
    let bad =
        |error: &dyn std::fmt::Display| OpenError::Bootstrap(format!("the default roles: {error}"));
    let table: Value = serde_yaml::from_str(TABLE).map_err(|error| bad(&error))?;
    let list = |field: &str| table[field].as_array().cloned().unwrap_or_default();
    for entry in list("roles") {
        store(
            api,
            CLUSTER_ROLES,
            &entry["name"],
            role(&entry),
            repaired_role,
        )?;
    }
    for entry in list("bindings") {
        store(
            api,
            CLUSTER_ROLE_BINDINGS,
            &entry["role"],
            binding(&entry),
            repaired_binding,
        )?;
    }
    // As with all first objects: nobody else waits while this thread does.
    futures::executor::block_on(aggregate::run(api)).map_err(|error| bad(&error))
}

fn metadata(name: &Value) -> Value {
    json!({
        "name": name, "labels": { BOOTSTRAPPING: "rbac-defaults" }, "annotations": { AUTO_UPDATE: "true" },
    })
}

fn role(entry: &Value) -> Value {
    let mut role = json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": "ClusterRole", "metadata": metadata(&entry["name"]),
    });
    for label in entry["adds"].as_array().into_iter().flatten() {
        role["metadata"]["labels"][label.as_str().unwrap_or_default()] = "true".into();
    }
    match entry["selects"].as_str() {
        None => role["rules"] = entry["rules"].clone(),
        Some(label) => {
            role["aggregationRule"] =
                json!({ "clusterRoleSelectors": [{ "matchLabels": { label: "true" } }] });
            role["rules"] = json!([]);
        }
    }
    role
}

fn binding(entry: &Value) -> Value {
    let groups = entry["groups"].as_array().into_iter().flatten();
    let subjects: Vec<Value> = groups
        .map(|group| json!({ "kind": "Group", "apiGroup": GROUP, "name": group }))
        .collect();
    json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": "ClusterRoleBinding", "metadata": metadata(&entry["role"]),
        "roleRef": { "apiGroup": GROUP, "kind": "ClusterRole", "name": entry["role"] }, "subjects": subjects,
    })
}

fn store(
    api: &ApiServer,
    storage: &str,
    name: &Value,
    wanted: Value,
    repaired: fn(&Value, &Value) -> Value,
) -> Result<(), OpenError> {
    let key = format!("/{}", name.as_str().unwrap_or_default());
    let object = match api.storage().get(storage, &key) {
        None => wanted,
        Some(found) if found.value["metadata"]["annotations"][AUTO_UPDATE] == "false" => {
            return Ok(());
        }
        Some(found) => {
            let mut object = repaired(&found.value, &wanted);
            for part in ["labels", "annotations"] {
                for (key, value) in wanted["metadata"][part].as_object().into_iter().flatten() {
                    object["metadata"][part][key] = value.clone();
                }
            }
            object
        }
    };
    ensure(api, storage, &key, object, true)
}

/// `found` with the rules of `wanted` that it lacks.
fn repaired_role(found: &Value, wanted: &Value) -> Value {
    let mut role = found.clone();
    if wanted["aggregationRule"].is_object() {
        role["aggregationRule"] = wanted["aggregationRule"].clone();
        return role;
    }
    let mut rules = Rule::list(found);
    for rule in Rule::list(wanted) {
        if !missing(&rules, std::slice::from_ref(&rule)).is_empty() {
            rules.push(rule);
        }
    }
    role["rules"] = rules.iter().map(Rule::to_json).collect();
    role
}

/// `found` with the subjects of `wanted` that it lacks; one that has another role is replaced.
fn repaired_binding(found: &Value, wanted: &Value) -> Value {
    let mut binding = found.clone();
    if found["roleRef"] != wanted["roleRef"] {
        binding["roleRef"] = wanted["roleRef"].clone();
        binding["subjects"] = wanted["subjects"].clone();
        return binding;
    }
    let mut subjects = found["subjects"].as_array().cloned().unwrap_or_default();
    for subject in wanted["subjects"].as_array().into_iter().flatten() {
        if !subjects.contains(subject) {
            subjects.push(subject.clone());
        }
    }
    binding["subjects"] = subjects.into();
    binding
}
