//! EnvoyFilters: patches to generated configuration.

use std::collections::BTreeMap;

use mesh_api::networking::envoy_filter::{
    ApplyTo, ClusterMatch, ListenerMatch, PatchContext, PatchOperation, RouteConfigurationMatch,
};
use regex::Regex;
use serde_json::Value;

use crate::service::contains_labels;
use crate::{Node, NodeKind, ObjectKey};

/// An EnvoyFilter with its patches read; patches that have no effect are reported and taken out.
#[derive(Debug, Clone, PartialEq)]
pub struct EnvoyFilter {
    /// The object.
    pub key: ObjectKey,
    /// Order among EnvoyFilters, lowest first.
    pub priority: i32,
    /// When it was created, in seconds since 1970 (0 if unknown).
    pub created: i64,
    /// Labels of the workloads that it is for; empty is every one of its namespace.
    pub selector: BTreeMap<String, String>,
    /// Kubernetes Gateways of its namespace that it is for; where there are any it is for no other proxy.
    pub gateways: Vec<String>,
    /// True if `targetRefs` are given, even if none of them is one that this version applies.
    pub targeted: bool,
    /// Patches in order.
    pub patches: Vec<EnvoyPatch>,
}

/// One patch.
#[derive(Debug, Clone, PartialEq)]
pub struct EnvoyPatch {
    /// Where it stands in the object, such as `spec.configPatches[2]`.
    pub field: String,
    /// What is patched.
    pub apply_to: ApplyTo,
    /// Kind of proxy and direction.
    pub context: PatchContext,
    /// Condition on the proxy's version.
    pub proxy_version: Option<VersionPattern>,
    /// Conditions on the proxy's metadata.
    pub metadata: BTreeMap<String, String>,
    /// Conditions on the listener.
    pub listener: Option<ListenerMatch>,
    /// Conditions on the route table.
    pub route_configuration: Option<RouteConfigurationMatch>,
    /// Conditions on the cluster.
    pub cluster: Option<ClusterMatch>,
    /// What is done.
    pub operation: PatchOperation,
    /// The value as an encoded message of the type that is patched; empty for REMOVE.
    pub value: Vec<u8>,
}

/// A regular expression on a proxy's version, found anywhere in it.
#[derive(Debug, Clone)]
pub struct VersionPattern(Regex);

impl VersionPattern {
    pub(crate) fn new(regex: Regex) -> Self {
        Self(regex)
    }
}

impl PartialEq for VersionPattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl EnvoyFilter {
    /// True if the filter is for a node with these labels; which namespaces count is the mesh's to say.
    pub(crate) fn selects(&self, node: &Node, labels: &BTreeMap<String, String>) -> bool {
        if self.targeted {
            let name = labels.get("gateway.networking.k8s.io/gateway-name");
            return node.kind == NodeKind::Router
                && node.namespace == self.key.namespace
                && name.is_some_and(|name| self.gateways.contains(name));
        }
        contains_labels(labels, &self.selector)
    }
}

impl EnvoyPatch {
    /// True if the patch is for a proxy of the node's version and metadata.
    pub fn is_for(&self, node: &Node) -> bool {
        let reported = |key: &str| node.metadata.get(key).and_then(Value::as_str);
        let version = reported("ISTIO_VERSION").unwrap_or(&node.version);
        let versions = self
            .proxy_version
            .as_ref()
            .is_none_or(|pattern| !version.is_empty() && pattern.0.is_match(version));
        versions
            && self
                .metadata
                .iter()
                .all(|(key, value)| reported(key) == Some(value))
    }
}
