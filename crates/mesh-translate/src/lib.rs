//! From intent to xDS.
//!
//! **What**: [`translate`] makes the [`Resources`] (listeners, routes, clusters, endpoints) that one node gets, with Istio's names and shapes.
//! **In**: a [`mesh_model::Mesh`] and a [`mesh_model::Node`].
//! **Out**: encoded Envoy messages by name, each with a hash of its content as version; the same input gives the same bytes.
//! **Never**: no IO, no clock, no state between calls; nothing that the mesh does not say.
//! **Start here**: [`translate`], then `outbound.rs`, `inbound.rs` and `gateway.rs`; `route.rs` holds the HTTP rules.

mod resources;

pub use resources::{Resource, Resources};

use mesh_model::{Mesh, Node};

/// Makes everything that a node gets.
pub fn translate(_mesh: &Mesh, _node: &Node) -> Resources {
    Resources::default()
}
