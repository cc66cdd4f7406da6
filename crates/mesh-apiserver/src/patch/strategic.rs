//! Strategic merge patch: merge patch that knows which lists are keyed, with its directives (`$patch`, `$retainKeys`,
//! `$setElementOrder/…`, `$deleteFromPrimitiveList/…`).

use serde_json::{Map, Value};

use crate::errors::ApiError;
use crate::schema::{ListType, Schema};

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE: &str = "$deleteFromPrimitiveList/";

/// Applies `patch` to `original`.
///
/// # Errors
/// 400 for a directive that makes no sense.
pub fn merge(original: &mut Value, patch: &Value, schema: &Schema) -> Result<(), ApiError> {
    let Value::Object(patch) = patch else {
        *original = patch.clone();
        return Ok(());
    };
    match patch.get(PATCH).and_then(Value::as_str) {
        None | Some("merge") => {}
        Some("replace") => {
            let mut replaced = patch.clone();
            replaced.shift_remove(PATCH);
            *original = Value::Object(replaced);
            return Ok(());
        }
        Some("delete") => {
            *original = Value::Object(Map::new());
            return Ok(());
        }
        Some(other) => return Err(bad(&format!("unrecognized {PATCH} directive {other:?}"))),
    }
    if !original.is_object() {
        *original = Value::Object(Map::new());
    }
    let Value::Object(object) = original else {
        return Ok(());
    };
    retain_keys(object, patch)?;
    delete_primitives(object, patch);
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        let inner = schema.field_or_any(key);
        match value {
            Value::Null => {
                object.shift_remove(key);
            }
            Value::Object(_) => {
                let child = object.entry(key.clone()).or_insert(Value::Null);
                merge(child, value, &inner)?;
            }
            Value::Array(items) => {
                let child = object.entry(key.clone()).or_insert(Value::Null);
                merge_list(child, items, &inner, key)?;
            }
            scalar => {
                object.insert(key.clone(), scalar.clone());
            }
        }
    }
    for (directive, order) in patch {
        if let Some(key) = directive.strip_prefix(ORDER)
            && let (Some(Value::Array(list)), Some(order)) = (object.get_mut(key), order.as_array())
        {
            reorder(list, order, &schema.field_or_any(key));
        }
    }
    Ok(())
}

fn bad(message: &str) -> ApiError {
    ApiError::bad_request(format!("strategic merge patch: {message}"))
}

fn retain_keys(
    object: &mut Map<String, Value>,
    patch: &Map<String, Value>,
) -> Result<(), ApiError> {
    let Some(keys) = patch.get(RETAIN) else {
        return Ok(());
    };
    let keys = keys
        .as_array()
        .ok_or_else(|| bad(&format!("{RETAIN} must be a list")))?;
    if patch
        .iter()
        .any(|(k, v)| !k.starts_with('$') && !v.is_null() && !keys.iter().any(|r| r == k.as_str()))
    {
        return Err(bad(&format!("{RETAIN} must name all fields of the patch")));
    }
    object.retain(|key, _| keys.iter().any(|r| r == key.as_str()));
    Ok(())
}

fn delete_primitives(object: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (directive, gone) in patch {
        if let Some(key) = directive.strip_prefix(DELETE)
            && let (Some(Value::Array(list)), Some(gone)) = (object.get_mut(key), gone.as_array())
        {
            list.retain(|item| !gone.contains(item));
        }
    }
}

fn merge_list(
    original: &mut Value,
    patch: &[Value],
    schema: &Schema,
    name: &str,
) -> Result<(), ApiError> {
    if !original.is_array() {
        *original = Value::Array(Vec::new());
    }
    let Value::Array(list) = original else {
        return Ok(());
    };
    match &schema.list_type {
        ListType::Atomic => *list = patch.to_vec(),
        ListType::Set => {
            for item in patch {
                if !list.contains(item) {
                    list.push(item.clone());
                }
            }
        }
        ListType::Map(keys) => {
            let Some(key) = keys.first() else {
                return Ok(());
            };
            if patch.iter().any(|item| item[PATCH] == "replace") {
                *list = patch
                    .iter()
                    .filter(|item| item[PATCH] != "replace")
                    .cloned()
                    .collect();
                return Ok(());
            }
            for item in patch {
                merge_item(list, item, key, schema, name)?;
            }
        }
    }
    Ok(())
}

fn merge_item(
    list: &mut Vec<Value>,
    item: &Value,
    key: &str,
    schema: &Schema,
    name: &str,
) -> Result<(), ApiError> {
    let Some(id) = item.get(key) else {
        return Err(bad(&format!(
            "an item of {name} does not contain declared merge key: {key}"
        )));
    };
    if item[PATCH] == "delete" {
        list.retain(|old| old.get(key) != Some(id));
        return Ok(());
    }
    let items = schema.items_or_any();
    match list.iter_mut().find(|old| old.get(key) == Some(id)) {
        Some(old) => merge(old, item, &items),
        None => {
            let mut new = Value::Null;
            merge(&mut new, item, &items)?;
            list.push(new);
            Ok(())
        }
    }
}

/// Items in the order of the directive; those that it does not name stay behind the item that they followed.
fn reorder(list: &mut Vec<Value>, order: &[Value], schema: &Schema) {
    let id = |item: &Value| match &schema.list_type {
        ListType::Map(keys) => keys
            .first()
            .and_then(|k| item.get(k))
            .cloned()
            .unwrap_or_default(),
        _ => item.clone(),
    };
    let named: Vec<Value> = order.iter().map(id).collect();
    let position = |item: &Value| named.iter().position(|n| *n == id(item));
    let mut sorted: Vec<Value> = list
        .iter()
        .filter(|item| position(item).is_some())
        .cloned()
        .collect();
    sorted.sort_by_key(|item| position(item));
    for (index, item) in list
        .iter()
        .enumerate()
        .filter(|(_, item)| position(item).is_none())
    {
        let after = list[..index]
            .last()
            .and_then(|before| sorted.iter().position(|s| s == before));
        sorted.insert(after.map_or(0, |at| at + 1), item.clone());
    }
    *list = sorted;
}
