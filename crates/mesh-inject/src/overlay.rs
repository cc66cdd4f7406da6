//! Laying one part of a pod over another, as Kubernetes' strategic merge does.

use serde_json::{Map, Value};

/// Lists whose items are merged field by field, by their `name`.
const MERGED: &[&str] = &["containers", "initContainers", "ephemeralContainers"];

/// Lists of which an item takes the place of the one with the same key. Kubernetes merges the fields of these, too, which can only leave what
/// it refuses itself, such as a variable with a value and a source.
const REPLACED: &[(&str, &str)] = &[
    ("env", "name"),
    ("ports", "containerPort"),
    ("volumeMounts", "mountPath"),
    ("volumeDevices", "devicePath"),
    ("volumes", "name"),
    ("imagePullSecrets", "name"),
    ("resourceClaims", "name"),
    ("hostAliases", "ip"),
];

/// The instruction of a list's item, `$patch: delete`, that takes it out.
const DIRECTIVE: &str = "$patch";

/// Lays a user's container on the one that injection makes. An image `auto` leaves the base's image.
pub(crate) fn container(base: &mut Value, over: &Value) {
    let (Some(base), Some(over)) = (base.as_object_mut(), over.as_object()) else {
        return;
    };
    for (name, value) in over {
        if name != "image" || value != "auto" {
            field(base, name, value);
        }
    }
}

/// Lays an overlay on a pod or a part of it: maps by field, lists of named things by name, other lists as a whole; null takes a field away.
pub(crate) fn merge(base: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (name, value) in over {
        field(base, name, value);
    }
}

fn field(base: &mut Map<String, Value>, name: &str, value: &Value) {
    if value.is_null() {
        base.shift_remove(name);
        return;
    }
    let key = REPLACED.iter().find(|(list, _)| *list == name);
    match (base.get_mut(name), value) {
        (Some(Value::Array(items)), Value::Array(more)) if MERGED.contains(&name) => {
            list(items, more, "name", |there, item| {
                if let (Value::Object(there), Value::Object(item)) = (there, item) {
                    merge(there, item);
                }
            });
        }
        (Some(Value::Array(items)), Value::Array(more)) if key.is_some() => {
            let key = key.map_or("name", |(_, key)| key);
            list(items, more, key, |there, item| *there = item.clone());
        }
        (Some(Value::Object(fields)), Value::Object(more)) => merge(fields, more),
        (_, Value::Array(more)) => {
            let items = more.iter().filter(|item| !deletes(item)).cloned();
            base.insert(name.to_owned(), items.collect());
        }
        _ => {
            base.insert(name.to_owned(), value.clone());
        }
    }
}

fn list(items: &mut Vec<Value>, over: &[Value], key: &str, change: impl Fn(&mut Value, &Value)) {
    for item in over {
        let same = |there: &Value| there.get(key).is_some() && there.get(key) == item.get(key);
        if deletes(item) {
            items.retain(|there| !same(there));
            continue;
        }
        match items.iter_mut().find(|there| same(there)) {
            Some(there) => change(there, item),
            None => items.push(item.clone()),
        }
    }
}

fn deletes(item: &Value) -> bool {
    item.get(DIRECTIVE).is_some_and(|what| what == "delete")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn merged(mut base: Value, over: Value) -> Value {
        merge(
            base.as_object_mut().expect("a map"),
            over.as_object().expect("a map"),
        );
        base
    }

    #[test]
    fn lists_are_merged_by_their_keys_and_others_replaced() {
        let base = json!({ "containers": [{ "name": "a", "args": ["x"], "env": [{ "name": "V", "value": "1" }] }], "tolerations": [1], "x": 1 });
        let over = json!({ "containers": [
            { "name": "a", "args": ["y"], "env": [{ "name": "V", "valueFrom": {} }, { "name": "W", "value": "2" }] }, { "name": "b" },
        ], "tolerations": [2], "x": null });
        let expected = json!({ "containers": [
            { "name": "a", "args": ["y"], "env": [{ "name": "V", "valueFrom": {} }, { "name": "W", "value": "2" }] }, { "name": "b" },
        ], "tolerations": [2] });
        assert_eq!(merged(base, over), expected);
    }

    #[test]
    fn an_item_can_be_taken_out() {
        let base = json!({ "volumes": [{ "name": "a" }, { "name": "b" }] });
        let over = json!({ "volumes": [{ "name": "a", "$patch": "delete" }, { "name": "c", "$patch": "delete" }] });
        assert_eq!(merged(base, over), json!({ "volumes": [{ "name": "b" }] }));
        let over = json!({ "volumes": [{ "name": "a", "$patch": "delete" }] });
        assert_eq!(merged(json!({}), over), json!({ "volumes": [] }));
    }
}
