//! Between the stored form of an object and a version of its kind.
//!
//! Versions of a custom kind differ in `apiVersion` only (conversion strategy None). Events have two groups with different field names;
//! the core form is stored. HorizontalPodAutoscalers have two versions; the newer is stored.

use serde_json::{Map, Value};

use crate::registry::Resource;
use crate::strategy::autoscaler;

/// Core name and `events.k8s.io` name of each field that differs.
const EVENT_FIELDS: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("count", "deprecatedCount"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("source", "deprecatedSource"),
];

/// A stored object in the version of `resource`.
pub fn to_version(resource: &Resource, mut object: Value) -> Value {
    if resource.group == "events.k8s.io" {
        rename(&mut object, |core, new| (core, new));
    }
    if is_old_autoscaler(resource) {
        autoscaler::to_old(&mut object);
    }
    set_type(&mut object, resource);
    object
}

/// An object in the version of `resource` as it is stored.
pub fn to_storage(resource: &Resource, mut object: Value) -> Value {
    set_type(&mut object, resource);
    if resource.group == "events.k8s.io" {
        rename(&mut object, |core, new| (new, core));
        object["apiVersion"] = "v1".into();
    }
    if is_old_autoscaler(resource) {
        autoscaler::from_old(&mut object);
        object["apiVersion"] = "autoscaling/v2".into();
    }
    object
}

fn is_old_autoscaler(resource: &Resource) -> bool {
    resource.group == "autoscaling" && resource.version == "v1"
}

/// `apiVersion` and `kind` first, as people expect them.
fn set_type(object: &mut Value, resource: &Resource) {
    let Value::Object(map) = object else { return };
    let api_version = resource.api_version();
    let right = map.get("apiVersion").and_then(Value::as_str) == Some(&api_version)
        && map.get("kind").and_then(Value::as_str) == Some(&resource.kind);
    if right
        && map
            .keys()
            .next()
            .is_some_and(|k| k == "apiVersion" || k == "kind")
    {
        return;
    }
    let mut ordered = Map::with_capacity(map.len() + 2);
    ordered.insert("apiVersion".to_owned(), api_version.into());
    ordered.insert("kind".to_owned(), resource.kind.clone().into());
    for (key, value) in std::mem::take(map) {
        if key != "apiVersion" && key != "kind" {
            ordered.insert(key, value);
        }
    }
    *map = ordered;
}

fn rename(
    object: &mut Value,
    pick: impl Fn(&'static str, &'static str) -> (&'static str, &'static str),
) {
    let Value::Object(map) = object else { return };
    for (core, new) in EVENT_FIELDS {
        let (from, to) = pick(core, new);
        if let Some(value) = map.shift_remove(from) {
            map.insert(to.to_owned(), value);
        }
    }
}
