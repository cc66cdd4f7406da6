//! EnvoyFilters: patches to what was generated, in Istio's order and with its conditions (pilot/pkg/networking/core/envoyfilter).
//!
//! They come last, so that a node without EnvoyFilters costs nothing, and of the others only those resources are decoded again that a kind of
//! patch can touch.

use std::collections::BTreeSet;

use mesh_api::networking::envoy_filter::{ApplyTo, PatchContext, PatchOperation};
use mesh_envoy_json::Lists;
use mesh_model::{EnvoyPatch, Mesh, Node, NodeKind, ObjectKey, Problem, Severity};
use prost::{Message, Name};

use envoy_types::pb::google::protobuf::Any;

use crate::resources::Resources;

mod cluster;
mod filter;
mod list;
mod listener;
mod matching;
mod route;

/// Patches a node's resources.
pub(crate) fn apply(mesh: &Mesh, node: &Node, resources: &mut Resources) {
    let filters = mesh.envoy_filters_of(node);
    let patches: Vec<Patch<'_>> = filters
        .iter()
        .flat_map(|filter| {
            let of_filter = filter.patches.iter().filter(|patch| patch.is_for(node));
            of_filter.map(|patch| Patch {
                object: &filter.key,
                patch,
            })
        })
        .collect();
    if patches.is_empty() {
        return;
    }
    let patcher = Patcher {
        node,
        patches,
        gateway_ports: mesh
            .served_by(node)
            .into_iter()
            .map(|(target, _, port)| (target, port.number))
            .collect(),
    };
    cluster::apply(&patcher, resources);
    route::apply(&patcher, resources);
    listener::apply(&patcher, resources);
}

/// A patch with the object that it stands in.
#[derive(Clone, Copy)]
struct Patch<'a> {
    object: &'a ObjectKey,
    patch: &'a EnvoyPatch,
}

/// All patches for one node.
struct Patcher<'a> {
    node: &'a Node,
    patches: Vec<Patch<'a>>,
    /// Ports on which the node listens with those of Services that lead there, as which a gateway's users know them.
    gateway_ports: BTreeSet<(u16, u16)>,
}

impl<'a> Patcher<'a> {
    /// Patches of a kind for a place, in order.
    fn patches(
        &self,
        apply_to: ApplyTo,
        context: PatchContext,
    ) -> impl Iterator<Item = Patch<'a>> + '_ {
        self.patches.iter().copied().filter(move |patch| {
            patch.patch.apply_to == apply_to && matching::context(patch.patch, context)
        })
    }

    fn has_any(&self, kinds: &[ApplyTo]) -> bool {
        self.patches
            .iter()
            .any(|patch| kinds.contains(&patch.patch.apply_to))
    }

    /// What is outgoing traffic at a sidecar is all traffic at a gateway.
    fn outbound(&self) -> PatchContext {
        match self.node.kind {
            NodeKind::Sidecar => PatchContext::SidecarOutbound,
            NodeKind::Router => PatchContext::Gateway,
        }
    }
}

impl Patch<'_> {
    fn is(&self, operation: PatchOperation) -> bool {
        self.patch.operation == operation
    }

    /// How lists are merged; `None` if the patch does not merge.
    fn merges(&self) -> Option<Lists> {
        match self.patch.operation {
            PatchOperation::Merge => Some(Lists::Append),
            PatchOperation::MergeAndReplaceList => Some(Lists::Replace),
            _ => None,
        }
    }

    /// The value as a message.
    fn value<M: Message + Default>(&self, changes: &mut Changes) -> Option<M> {
        match M::decode(self.patch.value.as_slice()) {
            Ok(value) => Some(value),
            Err(error) => {
                changes.fail(*self, error.to_string());
                None
            }
        }
    }

    /// Merges the value into a message.
    fn merge_into<M: Message + Name + Default>(
        &self,
        message: &mut M,
        lists: Lists,
        changes: &mut Changes,
    ) {
        let bytes = message.encode_to_vec();
        let merged = mesh_envoy_json::merge(&M::type_url(), &bytes, &self.patch.value, lists)
            .map_err(|error| error.to_string())
            .and_then(|bytes| M::decode(bytes.as_slice()).map_err(|error| error.to_string()));
        match merged {
            Ok(merged) => {
                *message = merged;
                changes.done(*self);
            }
            Err(error) => changes.fail(*self, error),
        }
    }

    /// Merges one typed configuration into another of the same type; another type is an error.
    fn merge_any(&self, base: &mut Any, given: &Any, lists: Lists, changes: &mut Changes) {
        if base.type_url != given.type_url {
            let message = format!(
                "a {} can't be merged into a {}; use REPLACE, or merge the same type",
                given.type_url, base.type_url
            );
            return changes.fail(*self, message);
        }
        match mesh_envoy_json::merge(&base.type_url, &base.value, &given.value, lists) {
            Ok(value) => {
                base.value = value;
                changes.done(*self);
            }
            Err(error) => changes.fail(*self, error.to_string()),
        }
    }
}

/// What patches did to one resource.
#[derive(Default)]
struct Changes {
    /// Objects of which a patch was applied.
    objects: BTreeSet<ObjectKey>,
    problems: Vec<Problem>,
}

impl Changes {
    fn done(&mut self, patch: Patch<'_>) {
        if !self.objects.contains(patch.object) {
            self.objects.insert(patch.object.clone());
        }
    }

    fn fail(&mut self, patch: Patch<'_>, message: String) {
        self.problems.push(Problem {
            object: patch.object.clone(),
            field: format!("{}.patch.value", patch.patch.field),
            severity: Severity::Error,
            message,
            code: Some("IST0106"),
        });
    }

    fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}
