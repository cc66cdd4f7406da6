//! Which policies hold for a workload.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_api::security::request_authentication::JwtRule;

use crate::rules::{
    AuthorizationPolicy, KeySource, MtlsMode, NamespaceMtls, RequestAuthentication,
};
use crate::service::contains_labels;
use crate::{Mesh, Node};

/// Policies by namespace.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Security {
    pub(crate) peers: BTreeMap<String, NamespaceMtls>,
    /// Oldest first.
    pub(crate) authorization: BTreeMap<String, Vec<Arc<AuthorizationPolicy>>>,
    /// Oldest first.
    pub(crate) authentication: BTreeMap<String, Vec<Arc<RequestAuthentication>>>,
}

impl Mesh {
    /// The mode of mutual TLS that workloads of a namespace have where no policy selects them: the namespace's, else the mesh's, else PERMISSIVE.
    pub fn namespace_mtls(&self, namespace: &str) -> MtlsMode {
        let own = |namespace: &str| self.security.peers.get(namespace)?.mode;
        own(namespace)
            .or_else(|| own(&self.config.root_namespace))
            .unwrap_or_default()
    }

    /// The mode of mutual TLS of a workload's port: of the oldest policy that selects the workload, else of its namespace.
    pub fn mtls(&self, namespace: &str, labels: &BTreeMap<String, String>, port: u16) -> MtlsMode {
        let inherited = self.namespace_mtls(namespace);
        let selecting = self.security.peers.get(namespace).and_then(|policies| {
            policies
                .workloads
                .iter()
                .find(|policy| contains_labels(labels, &policy.selector))
        });
        selecting.map_or(inherited, |policy| policy.mode(port, inherited))
    }

    /// Ports of a workload for which a policy says something of their own; others have the mode of port 0.
    pub fn mtls_ports(&self, namespace: &str, labels: &BTreeMap<String, String>) -> BTreeSet<u16> {
        let policies = self.security.peers.get(namespace);
        policies
            .and_then(|policies| {
                policies
                    .workloads
                    .iter()
                    .find(|policy| contains_labels(labels, &policy.selector))
            })
            .map(|policy| policy.ports.keys().copied().collect())
            .unwrap_or_default()
    }

    /// AuthorizationPolicies for a node: the mesh's first, then its namespace's, each oldest first.
    pub fn authorization_policies(&self, node: &Node) -> Vec<&Arc<AuthorizationPolicy>> {
        let labels = self.labels_of(node);
        self.namespaces_for(node)
            .filter_map(|namespace| self.security.authorization.get(namespace))
            .flatten()
            .filter(|policy| policy.scope.includes(labels))
            .collect()
    }

    /// Rules for tokens of a node: of the mesh's policies first, then of its namespace's, each oldest first.
    pub fn jwt_rules(&self, node: &Node) -> Vec<&JwtRule> {
        let labels = self.labels_of(node);
        self.namespaces_for(node)
            .filter_map(|namespace| self.security.authentication.get(namespace))
            .flatten()
            .filter(|policy| policy.scope.includes(labels))
            .flat_map(|policy| &policy.rules)
            .collect()
    }

    /// The key set found at a source, in JSON; `None` before it was fetched for the first time.
    pub fn jwks(&self, source: &KeySource) -> Option<&str> {
        self.jwks.get(source).map(AsRef::as_ref)
    }

    /// Everything that keys have to be fetched from, with the longest time that a rule allows for it, if any says.
    pub fn key_sources(&self) -> BTreeMap<KeySource, Option<std::time::Duration>> {
        let mut sources = BTreeMap::new();
        let policies = self.security.authentication.values().flatten();
        for rule in policies.flat_map(|policy| &policy.rules) {
            if let Some(source) = KeySource::of(rule) {
                let limit = sources.entry(source).or_insert(None);
                *limit = (*limit).max(rule.timeout.map(|timeout| timeout.0));
            }
        }
        sources
    }

    /// The root namespace and the node's own.
    fn namespaces_for<'a>(&'a self, node: &'a Node) -> impl Iterator<Item = &'a str> {
        let root = self.config.root_namespace.as_str();
        let own = node.namespace.as_str();
        std::iter::once(root).chain((own != root).then_some(own))
    }
}
