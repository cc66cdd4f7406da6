//! Metadata that every object carries.

use std::collections::BTreeMap;

use serde::Deserialize;

/// The part of Kubernetes' ObjectMeta that a mesh reads. Unknown fields are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    /// Name, unique per kind and namespace.
    pub name: String,
    /// Prefix from which the API server makes the name when `name` is empty.
    pub generate_name: String,
    /// Namespace; empty for cluster-scoped objects.
    pub namespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Unique id, given by the API server; empty before.
    pub uid: String,
    /// Opaque version of the object, changed by every write.
    pub resource_version: String,
    /// Number of the specification, raised by every change of it.
    pub generation: i64,
    /// When the object was created; `None` for objects that no API server has seen.
    pub creation_timestamp: Option<jiff::Timestamp>,
    /// When deletion was asked for; the object is going away if set.
    pub deletion_timestamp: Option<jiff::Timestamp>,
    /// Owners, of which one may be the controller.
    pub owner_references: Vec<OwnerReference>,
}

/// A reference to an object that owns this one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OwnerReference {
    /// Group and version of the owner, for instance `apps/v1`.
    pub api_version: String,
    /// Kind of the owner.
    pub kind: String,
    /// Name of the owner, in the same namespace.
    pub name: String,
    /// Unique id of the owner.
    pub uid: String,
    /// True for the one owner that manages this object.
    pub controller: bool,
}

impl Meta {
    /// The owner that manages this object.
    pub fn controller(&self) -> Option<&OwnerReference> {
        self.owner_references.iter().find(|owner| owner.controller)
    }
}
