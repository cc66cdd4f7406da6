//! Sets of field paths: the `fieldsV1` of managed fields, and which fields two objects differ in.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::schema::{ListType, Schema};

/// A set of paths as a tree; an edge is a path element in its `fieldsV1` form (`f:name`, `k:{"name":"x"}`, `v:"x"`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet {
    member: bool,
    children: BTreeMap<String, FieldSet>,
}

/// How two objects differ.
#[derive(Debug, Default)]
pub struct Difference {
    /// Fields that are new or have another value.
    pub changed: FieldSet,
    /// Fields that are gone.
    pub removed: FieldSet,
}

impl FieldSet {
    /// From `fieldsV1`.
    pub fn from_json(value: &Value) -> FieldSet {
        let mut set = FieldSet::default();
        for (key, child) in value.as_object().into_iter().flatten() {
            if key == "." {
                set.member = true;
                continue;
            }
            let mut inner = FieldSet::from_json(child);
            inner.member |= inner.children.is_empty();
            set.children.insert(key.clone(), inner);
        }
        set
    }

    /// As `fieldsV1`.
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.member && !self.children.is_empty() {
            map.insert(".".to_owned(), json!({}));
        }
        for (key, child) in &self.children {
            map.insert(key.clone(), child.to_json());
        }
        Value::Object(map)
    }

    /// No path at all.
    pub fn is_empty(&self) -> bool {
        !self.member && self.children.values().all(FieldSet::is_empty)
    }

    /// Whether this node itself is in the set.
    pub fn is_member(&self) -> bool {
        self.member
    }

    /// The children, by path element.
    pub fn children(&self) -> &BTreeMap<String, FieldSet> {
        &self.children
    }

    /// The set below a path element.
    pub fn child(&self, element: &str) -> Option<&FieldSet> {
        self.children.get(element)
    }

    /// Everything in either.
    pub fn union(mut self, other: &FieldSet) -> FieldSet {
        self.member |= other.member;
        for (key, child) in &other.children {
            let mine = self.children.remove(key).unwrap_or_default();
            self.children.insert(key.clone(), mine.union(child));
        }
        self
    }

    /// What is here and not in `other`.
    pub fn minus(&self, other: &FieldSet) -> FieldSet {
        let mut set = FieldSet {
            member: self.member && !other.member,
            children: BTreeMap::new(),
        };
        for (key, child) in &self.children {
            let rest = other
                .children
                .get(key)
                .map_or_else(|| child.clone(), |o| child.minus(o));
            if !rest.is_empty() {
                set.children.insert(key.clone(), rest);
            }
        }
        set
    }

    /// What is in both.
    pub fn intersect(&self, other: &FieldSet) -> FieldSet {
        let mut set = FieldSet {
            member: self.member && other.member,
            children: BTreeMap::new(),
        };
        for (key, child) in &self.children {
            if let Some(common) = other.children.get(key).map(|o| child.intersect(o))
                && !common.is_empty()
            {
                set.children.insert(key.clone(), common);
            }
        }
        set
    }

    /// All paths for people, for example `.spec.containers[name="a"].image`.
    pub fn paths(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.collect_paths("", &mut out);
        out
    }

    fn collect_paths(&self, prefix: &str, out: &mut Vec<String>) {
        if self.member {
            out.push(prefix.to_owned());
        }
        for (key, child) in &self.children {
            child.collect_paths(&format!("{prefix}{}", element_text(key)), out);
        }
    }

    /// Without what nobody owns: identity and what the server sets.
    pub fn without_system_fields(mut self) -> FieldSet {
        self.children.remove("f:apiVersion");
        self.children.remove("f:kind");
        if let Some(metadata) = self.children.get_mut("f:metadata") {
            metadata.member = false;
            for field in [
                "name",
                "namespace",
                "creationTimestamp",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
                "selfLink",
                "uid",
                "generation",
                "managedFields",
                "resourceVersion",
                "generateName",
            ] {
                metadata.children.remove(&format!("f:{field}"));
            }
            if metadata.children.is_empty() {
                self.children.remove("f:metadata");
            }
        }
        self
    }

    /// Only (`keep`), or everything but, the status.
    pub fn status_only(mut self, keep: bool) -> FieldSet {
        self.children.retain(|key, _| (key == "f:status") == keep);
        self
    }

    fn at(&mut self, element: String) -> &mut FieldSet {
        self.children.entry(element).or_default()
    }
}

fn element_text(element: &str) -> String {
    if let Some(name) = element.strip_prefix("f:") {
        return format!(".{name}");
    }
    if let Some(keys) = element.strip_prefix("k:") {
        let keys: Value = serde_json::from_str(keys).unwrap_or_default();
        let pairs: Vec<String> = keys
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        return format!("[{}]", pairs.join(","));
    }
    format!("[={}]", element.trim_start_matches("v:"))
}

/// Path element of a list item; `None` for an item without keys.
pub fn item_element(item: &Value, schema: &Schema) -> Option<String> {
    match &schema.list_type {
        ListType::Atomic => None,
        ListType::Set => Some(format!("v:{item}")),
        ListType::Map(keys) => {
            let item_schema = schema.items_or_any();
            let mut found = BTreeMap::new();
            for key in keys {
                let default = item_schema.known(key).and_then(|s| s.default.clone());
                if let Some(value) = item.get(key).cloned().or(default) {
                    found.insert(key.clone(), value);
                }
            }
            (!found.is_empty()).then(|| format!("k:{}", json!(found)))
        }
    }
}

/// Whether a value is owned and replaced as one.
pub fn is_leaf(value: &Value, schema: &Schema) -> bool {
    match value {
        Value::Object(_) => schema.atomic,
        Value::Array(_) => schema.list_type == ListType::Atomic,
        _ => true,
    }
}

/// The fields that an applied object sets.
pub fn set_of(value: &Value, schema: &Schema) -> FieldSet {
    let mut set = FieldSet::default();
    if is_leaf(value, schema) {
        set.member = true;
        return set;
    }
    match value {
        Value::Object(map) => {
            for (key, child) in map {
                let mut inner = set_of(child, &schema.field_or_any(key));
                let empty = child.as_object().is_some_and(Map::is_empty);
                inner.member |= empty || schema.known(key).is_none() && schema.additional.is_some();
                *set.at(format!("f:{key}")) = inner;
            }
        }
        Value::Array(list) => {
            for item in list {
                if let Some(element) = item_element(item, schema) {
                    let mut inner = set_of(item, &schema.items_or_any());
                    inner.member = true;
                    *set.at(element) = inner;
                }
            }
            set.member |= list.is_empty();
        }
        _ => {}
    }
    set
}

/// Which fields differ from `old` to `new`.
pub fn compare(old: &Value, new: &Value, schema: &Schema) -> Difference {
    let mut difference = Difference::default();
    if old == new {
        return difference;
    }
    match (old, new) {
        (Value::Object(a), Value::Object(b)) if !schema.atomic => {
            for (key, value) in b {
                let inner = schema.field_or_any(key);
                note(
                    &mut difference,
                    format!("f:{key}"),
                    a.get(key),
                    Some(value),
                    &inner,
                );
            }
            for (key, value) in a.iter().filter(|(key, _)| !b.contains_key(*key)) {
                note(
                    &mut difference,
                    format!("f:{key}"),
                    Some(value),
                    None,
                    &schema.field_or_any(key),
                );
            }
        }
        (Value::Array(a), Value::Array(b)) if schema.list_type != ListType::Atomic => {
            let items = schema.items_or_any();
            let index = |list: &[Value]| -> BTreeMap<String, Value> {
                list.iter()
                    .filter_map(|item| Some((item_element(item, schema)?, item.clone())))
                    .collect()
            };
            let (a, b) = (index(a), index(b));
            for (element, value) in &b {
                note(
                    &mut difference,
                    element.clone(),
                    a.get(element),
                    Some(value),
                    &items,
                );
            }
            for (element, value) in a.iter().filter(|(element, _)| !b.contains_key(*element)) {
                note(&mut difference, element.clone(), Some(value), None, &items);
            }
        }
        _ => difference.changed.member = true,
    }
    difference
}

fn note(
    difference: &mut Difference,
    element: String,
    old: Option<&Value>,
    new: Option<&Value>,
    schema: &Schema,
) {
    match (old, new) {
        (Some(old), Some(new)) => {
            let inner = compare(old, new, schema);
            if !inner.changed.is_empty() {
                *difference.changed.at(element.clone()) = inner.changed;
            }
            if !inner.removed.is_empty() {
                *difference.removed.at(element) = inner.removed;
            }
        }
        (None, Some(new)) => {
            let mut set = set_of(new, schema);
            set.member = true;
            mark_containers(&mut set);
            *difference.changed.at(element) = set;
        }
        (Some(old), None) => {
            let mut set = set_of(old, schema);
            set.member = true;
            mark_containers(&mut set);
            *difference.removed.at(element) = set;
        }
        (None, None) => {}
    }
}

/// What appears or goes as a whole includes the objects and lists inside.
fn mark_containers(set: &mut FieldSet) {
    set.member = true;
    set.children.values_mut().for_each(mark_containers);
}
