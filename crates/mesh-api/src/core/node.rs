//! Node: where pods run; the mesh reads its locality.

use serde::Deserialize;

use crate::meta::Meta;

/// A node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Metadata.
    #[serde(rename = "metadata")]
    pub meta: Meta,
}

impl Node {
    /// Locality as `region/zone/subzone` from the well-known labels; later parts are left off when empty, and the whole is empty
    /// where no region is known.
    pub fn locality(&self) -> String {
        let label = |names: [&str; 2]| {
            names
                .iter()
                .find_map(|name| self.meta.labels.get(*name))
                .map_or("", String::as_str)
        };
        let parts = [
            label([
                "topology.kubernetes.io/region",
                "failure-domain.beta.kubernetes.io/region",
            ]),
            label([
                "topology.kubernetes.io/zone",
                "failure-domain.beta.kubernetes.io/zone",
            ]),
            label(["topology.istio.io/subzone", ""]),
        ];
        parts
            .iter()
            .take_while(|part| !part.is_empty())
            .copied()
            .collect::<Vec<_>>()
            .join("/")
    }
}
