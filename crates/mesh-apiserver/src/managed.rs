//! `metadata.managedFields`: which client set which field last.

use serde_json::{Value, json};

use crate::patch::fieldset::{FieldSet, compare};
use crate::registry::Resource;

/// Managers of updates kept apart; the oldest beyond become one (as in Kubernetes).
const MAX_UPDATERS: usize = 10;
const ANCIENT: &str = "ancient-changes";

/// Who writes, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manager {
    /// Name of the field manager.
    pub name: String,
    /// `Apply` or `Update`.
    pub operation: &'static str,
    /// Version of the kind in which it writes.
    pub api_version: String,
    /// Subresource, or empty.
    pub subresource: String,
    /// Time of the write.
    pub time: String,
}

/// One entry of `managedFields`, read.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The entry without its fields.
    pub raw: Value,
    /// Its fields.
    pub set: FieldSet,
}

impl Entry {
    /// A text field of the entry.
    pub fn text(&self, field: &str) -> &str {
        self.raw[field].as_str().unwrap_or_default()
    }

    /// Whether the entry is this manager's; an apply in another version is the same manager's.
    pub fn is(&self, manager: &Manager) -> bool {
        self.text("manager") == manager.name
            && self.text("operation") == manager.operation
            && self.text("subresource") == manager.subresource
            && (manager.operation == "Apply" || self.text("apiVersion") == manager.api_version)
    }
}

/// The entries of an object.
pub fn entries(object: &Value) -> Vec<Entry> {
    let list = object["metadata"]["managedFields"]
        .as_array()
        .into_iter()
        .flatten();
    list.filter(|raw| raw.is_object())
        .map(|raw| Entry {
            set: FieldSet::from_json(&raw["fieldsV1"]),
            raw: raw.clone(),
        })
        .filter(|entry| !entry.set.is_empty())
        .collect()
}

/// Writes entries back, without empty ones.
pub fn store(object: &mut Value, entries: &[Entry]) {
    let list: Vec<Value> = entries
        .iter()
        .filter(|entry| !entry.set.is_empty())
        .map(|entry| {
            let mut raw = entry.raw.clone();
            raw["fieldsType"] = "FieldsV1".into();
            raw["fieldsV1"] = entry.set.to_json();
            raw
        })
        .collect();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        if list.is_empty() {
            metadata.shift_remove("managedFields");
        } else {
            metadata.insert("managedFields".to_owned(), list.into());
        }
    }
}

/// Makes the manager's entry hold `set`, with the time of now when that is a change.
pub fn set_entry(entries: &mut Vec<Entry>, manager: &Manager, set: FieldSet) {
    match entries.iter_mut().find(|entry| entry.is(manager)) {
        Some(entry) => {
            if entry.set != set {
                entry.raw["time"] = manager.time.as_str().into();
            }
            entry.raw["apiVersion"] = manager.api_version.as_str().into();
            entry.set = set;
        }
        None => {
            let mut raw = json!({
                "manager": manager.name, "operation": manager.operation, "apiVersion": manager.api_version,
                "time": manager.time,
            });
            if !manager.subresource.is_empty() {
                raw["subresource"] = manager.subresource.as_str().into();
            }
            entries.push(Entry { raw, set });
        }
    }
}

/// After an update (or creation) other than an apply: what changed belongs to the manager now, and to nobody else.
pub fn track(resource: &Resource, old: Option<&Value>, new: &mut Value, manager: &Manager) {
    let nothing = json!({});
    let difference = compare(old.unwrap_or(&nothing), new, &resource.schema);
    let changed = difference.changed.without_system_fields();
    let removed = difference.removed.without_system_fields();
    let mut all = if old.is_some() {
        entries(new)
    } else {
        Vec::new()
    };
    let mut own = FieldSet::default();
    for entry in &mut all {
        if entry.is(manager) {
            own = entry.set.clone();
        } else {
            entry.set = entry.set.minus(&changed).minus(&removed);
        }
    }
    let own = own.union(&changed).minus(&removed);
    if !own.is_empty() || all.iter().any(|entry| entry.is(manager)) {
        set_entry(&mut all, manager, own);
    }
    merge_ancient(&mut all);
    store(new, &all);
}

fn merge_ancient(all: &mut Vec<Entry>) {
    let updater =
        |entry: &Entry| entry.text("operation") == "Update" && entry.text("subresource").is_empty();
    while all.iter().filter(|e| updater(e)).count() > MAX_UPDATERS {
        let oldest = all
            .iter()
            .enumerate()
            .filter(|(_, e)| updater(e) && e.text("manager") != ANCIENT)
            .min_by_key(|(_, e)| e.text("time").to_owned());
        let Some((index, _)) = oldest else { return };
        let mut entry = all.remove(index);
        match all.iter_mut().find(|e| e.text("manager") == ANCIENT) {
            Some(ancient) => ancient.set = std::mem::take(&mut ancient.set).union(&entry.set),
            None => {
                entry.raw["manager"] = ANCIENT.into();
                all.push(entry);
            }
        }
    }
}

/// Whether two `managedFields` say the same but for times.
pub fn same_owners(a: &Value, b: &Value) -> bool {
    let plain = |list: &Value| -> Vec<Value> {
        let list = list.as_array().into_iter().flatten();
        list.map(|entry| {
            let mut entry = entry.clone();
            if let Some(map) = entry.as_object_mut() {
                map.shift_remove("time");
            }
            entry
        })
        .collect()
    };
    plain(a) == plain(b)
}
