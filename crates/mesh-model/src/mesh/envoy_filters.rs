//! Which EnvoyFilters hold for a node.

use std::sync::Arc;

use mesh_envoy_json::Descriptors;

use crate::{EnvoyFilter, Mesh, Node};

/// All EnvoyFilters, ordered by key.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct EnvoyFilters {
    pub(crate) list: Vec<Arc<EnvoyFilter>>,
    /// What patching takes stays in memory while there is something to patch.
    pub(crate) descriptors: Option<Descriptors>,
}

impl Mesh {
    /// The EnvoyFilters of a node in the order in which they apply: by priority, then those of the root namespace before those of the node's own,
    /// then by age and name.
    pub fn envoy_filters_of(&self, node: &Node) -> Vec<&Arc<EnvoyFilter>> {
        let root = self.config.root_namespace.as_str();
        let labels = self.labels_of(node);
        let mut found: Vec<&Arc<EnvoyFilter>> = self
            .envoy_filters
            .list
            .iter()
            .filter(|filter| {
                let namespace = &filter.key.namespace;
                (namespace == root || *namespace == node.namespace) && filter.selects(node, labels)
            })
            .collect();
        found.sort_by_key(|filter| {
            let key = &filter.key;
            (
                filter.priority,
                key.namespace != root,
                filter.created,
                &key.name,
            )
        });
        found
    }
}
