//! Resources as they travel: named, versioned by content, opaque.

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::bytes::Bytes;

/// One resource of one type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The name, unique in its type.
    pub name: String,
    /// A hash of the content. Two resources with the same name and version are taken for the same.
    pub version: String,
    /// The type URL (`type.googleapis.com/…`) of the message in `value`.
    pub type_url: String,
    /// The encoded message.
    pub value: Bytes,
}

/// The resources of one type by name.
pub type ByName = BTreeMap<String, Arc<Resource>>;

/// Everything one node gets: type URL, then name. Cheap to clone; a type that did not change should keep its `Arc`, which
/// makes comparing it free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResourceSet {
    types: BTreeMap<String, Arc<ByName>>,
}

/// What differs in one type between two sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// New and changed resources.
    pub upserts: Vec<Arc<Resource>>,
    /// Names that are gone.
    pub removals: Vec<String>,
}

impl Diff {
    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.removals.is_empty()
    }
}

impl ResourceSet {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces one resource; its type URL says where it goes.
    pub fn insert(&mut self, resource: Resource) {
        let by_name = self.types.entry(resource.type_url.clone()).or_default();
        Arc::make_mut(by_name).insert(resource.name.clone(), Arc::new(resource));
    }

    /// Sets all resources of a type.
    pub fn set_type(&mut self, type_url: &str, resources: Arc<ByName>) {
        self.types.insert(type_url.to_owned(), resources);
    }

    /// The resources of a type, if it has any.
    #[must_use]
    pub fn of_type(&self, type_url: &str) -> Option<&Arc<ByName>> {
        self.types.get(type_url)
    }

    /// The type URLs that are present.
    pub fn type_urls(&self) -> impl Iterator<Item = &str> {
        self.types.keys().map(String::as_str)
    }

    /// One resource.
    #[must_use]
    pub fn find(&self, type_url: &str, name: &str) -> Option<&Arc<Resource>> {
        self.types.get(type_url)?.get(name)
    }

    /// How many resources there are in all types.
    #[must_use]
    pub fn len(&self) -> usize {
        self.types.values().map(|by_name| by_name.len()).sum()
    }

    /// Whether there is no resource.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What changed in one type from `older` to `self`. A type whose `Arc` is shared costs nothing.
    #[must_use]
    pub fn diff(&self, older: &Self, type_url: &str) -> Diff {
        let empty = Arc::new(ByName::new());
        let new = self.types.get(type_url).unwrap_or(&empty);
        let old = older.types.get(type_url).unwrap_or(&empty);
        if Arc::ptr_eq(new, old) {
            return Diff::default();
        }
        Diff {
            upserts: new
                .values()
                .filter(|resource| {
                    old.get(&resource.name)
                        .is_none_or(|known| known.version != resource.version)
                })
                .cloned()
                .collect(),
            removals: old
                .keys()
                .filter(|name| !new.contains_key(*name))
                .cloned()
                .collect(),
        }
    }

    /// Takes over from `older` what is equal, so that equal parts are shared in memory and later diffs of them are free.
    #[must_use]
    pub fn sharing(mut self, older: &Self) -> Self {
        for (type_url, by_name) in &mut self.types {
            let Some(old) = older.types.get(type_url) else {
                continue;
            };
            let same_versions = old.len() == by_name.len()
                && old
                    .iter()
                    .zip(by_name.iter())
                    .all(|((a, x), (b, y))| a == b && x.version == y.version);
            if same_versions {
                *by_name = Arc::clone(old);
                continue;
            }
            for (name, resource) in Arc::make_mut(by_name) {
                match old.get(name) {
                    Some(known) if known.version == resource.version => {
                        *resource = Arc::clone(known);
                    }
                    _ => {}
                }
            }
        }
        self
    }
}

impl FromIterator<Resource> for ResourceSet {
    fn from_iter<I: IntoIterator<Item = Resource>>(resources: I) -> Self {
        let mut set = Self::new();
        for resource in resources {
            set.insert(resource);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{CLUSTER, ROUTE};

    fn resource(type_url: &str, name: &str, version: &str) -> Resource {
        Resource {
            name: name.to_owned(),
            version: version.to_owned(),
            type_url: type_url.to_owned(),
            value: Bytes::new(),
        }
    }

    #[test]
    fn diff_names_what_changed() {
        let old: ResourceSet = [
            resource(CLUSTER, "a", "1"),
            resource(CLUSTER, "b", "1"),
            resource(CLUSTER, "c", "1"),
        ]
        .into_iter()
        .collect();
        let new: ResourceSet = [
            resource(CLUSTER, "a", "1"),
            resource(CLUSTER, "b", "2"),
            resource(CLUSTER, "d", "1"),
        ]
        .into_iter()
        .collect();
        let diff = new.diff(&old, CLUSTER);
        let names: Vec<_> = diff.upserts.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["b", "d"]);
        assert_eq!(diff.removals, ["c"]);
        assert!(new.diff(&old, ROUTE).is_empty());
    }

    #[test]
    fn sharing_keeps_equal_parts() {
        let old: ResourceSet = [resource(CLUSTER, "a", "1"), resource(ROUTE, "r", "1")]
            .into_iter()
            .collect();
        let new: ResourceSet = [
            resource(CLUSTER, "a", "1"),
            resource(ROUTE, "r", "1"),
            resource(ROUTE, "s", "1"),
        ]
        .into_iter()
        .collect();
        let new = new.sharing(&old);
        let (Some(a), Some(b)) = (new.of_type(CLUSTER), old.of_type(CLUSTER)) else {
            panic!("both sets hold clusters");
        };
        assert!(Arc::ptr_eq(a, b));
        let (Some(r), Some(s)) = (new.find(ROUTE, "r"), old.find(ROUTE, "r")) else {
            panic!("both sets hold the route");
        };
        assert!(Arc::ptr_eq(r, s));
        assert!(new.find(ROUTE, "s").is_some());
    }
}
