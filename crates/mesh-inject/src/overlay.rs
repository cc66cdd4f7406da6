//! Laying a container of the user over the one that injection makes, as a strategic merge does.

use serde_json::{Map, Value};

/// Keys by which Kubernetes merges the lists of a container.
const LIST_KEYS: &[(&str, &str)] = &[
    ("env", "name"),
    ("ports", "containerPort"),
    ("volumeMounts", "mountPath"),
    ("volumeDevices", "devicePath"),
];

/// Lays `over` on `base`. An image `auto` leaves the base's image.
pub(crate) fn container(base: &mut Value, over: &Value) {
    let (Some(base), Some(over)) = (base.as_object_mut(), over.as_object()) else {
        return;
    };
    for (field, value) in over {
        if field == "image" && value == "auto" {
            continue;
        }
        let key = LIST_KEYS
            .iter()
            .find(|(list, _)| list == field)
            .map(|(_, key)| *key);
        match (base.get_mut(field), key, value) {
            (Some(Value::Array(items)), Some(key), Value::Array(more)) => list(items, more, key),
            (Some(Value::Object(fields)), _, Value::Object(more)) => map(fields, more),
            _ => {
                base.insert(field.clone(), value.clone());
            }
        }
    }
}

fn list(items: &mut Vec<Value>, over: &[Value], key: &str) {
    for item in over {
        match items
            .iter_mut()
            .find(|there| there.get(key) == item.get(key))
        {
            Some(there) => *there = item.clone(),
            None => items.push(item.clone()),
        }
    }
}

fn map(fields: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (field, value) in over {
        match (fields.get_mut(field), value) {
            (Some(Value::Object(fields)), Value::Object(more)) => map(fields, more),
            _ => {
                fields.insert(field.clone(), value.clone());
            }
        }
    }
}
