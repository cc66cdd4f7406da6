//! Server-side apply: merge what a manager wants into what is there, with its fields tracked and conflicts told.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::fieldset::{FieldSet, compare, is_leaf, item_element, set_of};
use crate::errors::ApiError;
use crate::managed::{self, Entry, Manager};
use crate::registry::Resource;
use crate::schema::{ListType, Schema};

/// The object after `config` is applied to `live`, with its managed fields.
///
/// # Errors
/// 409 with a cause for each field that another manager owns with another value, unless `force`.
pub fn apply(
    resource: &Resource,
    live: Option<&Value>,
    config: &Value,
    manager: &Manager,
    force: bool,
) -> Result<Value, ApiError> {
    let schema = &*resource.schema;
    let empty = json!({ "metadata": {} });
    let live_or_empty = live.unwrap_or(&empty);
    let mut entries = managed::entries(live_or_empty);
    let mut wanted = set_of(config, schema).without_system_fields();
    if resource.has("status") {
        wanted = wanted.status_only(manager.subresource == "status");
    }
    let previous = entries
        .iter()
        .find(|e| e.is(manager))
        .map(|e| e.set.clone())
        .unwrap_or_default();
    let others = entries
        .iter()
        .filter(|e| !e.is(manager))
        .fold(FieldSet::default(), |all, e| all.union(&e.set));

    let mut merged = merge(live_or_empty, config, schema);
    prune(
        &mut merged,
        &previous.minus(&wanted),
        &others,
        &wanted,
        schema,
    );
    keep_identity(live, config, &mut merged);

    let difference = compare(live_or_empty, &merged, schema);
    let changed = difference.changed.without_system_fields();
    let removed = difference.removed.without_system_fields();
    let conflicts: Vec<(Entry, FieldSet)> = entries
        .iter()
        .filter(|entry| !entry.is(manager))
        .map(|entry| (entry.clone(), entry.set.intersect(&changed)))
        .filter(|(_, set)| !set.is_empty())
        .collect();
    if !conflicts.is_empty() && !force {
        return Err(conflict_error(&conflicts));
    }
    for entry in entries.iter_mut().filter(|entry| !entry.is(manager)) {
        entry.set = entry.set.minus(&changed).minus(&removed);
    }
    managed::set_entry(&mut entries, manager, wanted);
    managed::store(&mut merged, &entries);
    Ok(merged)
}

fn keep_identity(live: Option<&Value>, config: &Value, merged: &mut Value) {
    for field in ["apiVersion", "kind"] {
        merged[field] = config[field].clone();
    }
    let asked = config["metadata"].get("resourceVersion").cloned();
    let Some(metadata) = merged["metadata"].as_object_mut() else {
        return;
    };
    // Only a revision that the client itself names is a precondition.
    match asked {
        Some(revision) => metadata.insert("resourceVersion".to_owned(), revision),
        None => metadata.shift_remove("resourceVersion"),
    };
    if live.is_none() {
        metadata.shift_remove("managedFields");
    }
}

fn conflict_error(conflicts: &[(Entry, FieldSet)]) -> ApiError {
    let mut causes = Vec::new();
    let mut texts = Vec::new();
    for (entry, set) in conflicts {
        let mut who = format!("\"{}\"", entry.text("manager"));
        if !entry.text("subresource").is_empty() {
            who.push_str(&format!(
                " with subresource \"{}\"",
                entry.text("subresource")
            ));
        }
        if entry.text("operation") == "Update" {
            who.push_str(&format!(" using {}", entry.text("apiVersion")));
        }
        let paths = set.paths();
        for path in &paths {
            causes.push(json!({
                "reason": "FieldManagerConflict", "message": format!("conflict with {who}"), "field": path,
            }));
        }
        texts.push(match paths.as_slice() {
            [one] => format!("conflict with {who}: {one}"),
            many => format!("conflicts with {who}:\n- {}", many.join("\n- ")),
        });
    }
    let plural = if causes.len() == 1 {
        "conflict"
    } else {
        "conflicts"
    };
    let message = format!(
        "Apply failed with {} {plural}: {}",
        causes.len(),
        texts.join("\n")
    );
    let mut error = ApiError::new(409, "Conflict", message);
    error.details = Some(json!({ "causes": causes }));
    error
}

/// `config` over `live`.
fn merge(live: &Value, config: &Value, schema: &Schema) -> Value {
    if is_leaf(config, schema) {
        return config.clone();
    }
    match (live, config) {
        (Value::Object(old), Value::Object(new)) => {
            let mut out = old.clone();
            for (key, value) in new {
                let inner = schema.field_or_any(key);
                let merged = old
                    .get(key)
                    .map_or_else(|| value.clone(), |o| merge(o, value, &inner));
                out.insert(key.clone(), merged);
            }
            Value::Object(out)
        }
        (Value::Array(old), Value::Array(new)) => Value::Array(merge_list(old, new, schema)),
        _ => config.clone(),
    }
}

fn merge_list(old: &[Value], new: &[Value], schema: &Schema) -> Vec<Value> {
    let items = schema.items_or_any();
    let element = |item: &Value| item_element(item, schema).unwrap_or_else(|| item.to_string());
    let mut pending: BTreeMap<String, &Value> =
        new.iter().map(|item| (element(item), item)).collect();
    let old_is_covered = old.iter().all(|item| pending.contains_key(&element(item)));
    if old_is_covered {
        // The applier names everything: its order counts.
        let before: BTreeMap<String, &Value> =
            old.iter().map(|item| (element(item), item)).collect();
        let merged = new.iter().map(|item| {
            before
                .get(&element(item))
                .map_or_else(|| item.clone(), |o| merge(o, item, &items))
        });
        return merged.collect();
    }
    let mut out: Vec<Value> = old
        .iter()
        .map(|item| match pending.remove(&element(item)) {
            Some(new) if matches!(schema.list_type, ListType::Map(_)) => merge(item, new, &items),
            _ => item.clone(),
        })
        .collect();
    out.extend(
        new.iter()
            .filter(|item| pending.contains_key(&element(item)))
            .cloned(),
    );
    out
}

/// Removes what the manager applied before and does not want now, as far as nobody else owns it.
fn prune(
    value: &mut Value,
    gone: &FieldSet,
    others: &FieldSet,
    wanted: &FieldSet,
    schema: &Schema,
) {
    let nothing = FieldSet::default();
    match value {
        Value::Object(map) => {
            let mut kept = Map::new();
            for (key, mut child) in std::mem::take(map) {
                let element = format!("f:{key}");
                let inner = schema.field_or_any(&key);
                if keep(&mut child, &element, gone, others, wanted, &inner, &nothing) {
                    kept.insert(key, child);
                }
            }
            *map = kept;
        }
        Value::Array(list) if schema.list_type != ListType::Atomic => {
            let items = schema.items_or_any();
            list.retain_mut(|item| match item_element(item, schema) {
                Some(element) => keep(item, &element, gone, others, wanted, &items, &nothing),
                None => true,
            });
        }
        _ => {}
    }
}

fn keep(
    child: &mut Value,
    element: &str,
    gone: &FieldSet,
    others: &FieldSet,
    wanted: &FieldSet,
    schema: &Schema,
    nothing: &FieldSet,
) -> bool {
    let Some(gone) = gone.child(element) else {
        return true;
    };
    let others = others.child(element).unwrap_or(nothing);
    let wanted = wanted.child(element).unwrap_or(nothing);
    if gone.is_member() && others.is_empty() && wanted.is_empty() {
        return false;
    }
    if gone.is_member() && gone.children().is_empty() && (others.is_member() || wanted.is_member())
    {
        return true;
    }
    prune(child, gone, others, wanted, schema);
    // An object that only held what is gone goes with it.
    let emptied =
        child.as_object().is_some_and(Map::is_empty) || child.as_array().is_some_and(Vec::is_empty);
    !(emptied && others.is_empty() && wanted.is_empty())
}
