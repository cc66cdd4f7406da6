//! Which DestinationRule holds for a host and a client.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{DestinationRule, Mesh, Node, hostname};

impl Mesh {
    /// The DestinationRule for a host as a node sees it: of the node's namespace, then the service's, then the root namespace; in each, the exact
    /// host before wildcards, longer ones first. Among several rules of one host, one that selects the node's labels wins, then the last
    /// without a selector (Istio: rules with other `exportTo` don't merge).
    pub fn destination_rule_for(&self, host: &str, node: &Node) -> Option<&Arc<DestinationRule>> {
        let rules = self.destination_rules(host, &node.namespace);
        let labels = self.labels_of(node);
        rules
            .iter()
            .copied()
            .find(|rule| rule.selects(labels, &node.namespace))
            .or_else(|| rules.iter().copied().rfind(|rule| rule.selector.is_none()))
    }

    /// The DestinationRule for a host as those clients of a namespace see it that no rule selects by label.
    pub fn destination_rule(
        &self,
        host: &str,
        client_namespace: &str,
    ) -> Option<&Arc<DestinationRule>> {
        let rules = self.destination_rules(host, client_namespace);
        rules.into_iter().rfind(|rule| rule.selector.is_none())
    }

    /// All DestinationRules for a host that clients in a namespace may see, whatever their labels; empty if none.
    pub fn destination_rules(
        &self,
        host: &str,
        client_namespace: &str,
    ) -> Vec<&Arc<DestinationRule>> {
        let root = self.config.root_namespace.as_str();
        let service_namespace = self
            .services
            .get(host)
            .map_or("", |service| service.namespace.as_str());
        let of = |namespace: &str, keep: &dyn Fn(&DestinationRule) -> bool| {
            let rules = self.most_specific_rules(namespace, host);
            let kept = rules
                .iter()
                .filter(|rule| rule.visibility.includes(client_namespace) && keep(rule));
            Some(kept.collect::<Vec<_>>()).filter(|rules| !rules.is_empty())
        };
        // Clients in the root namespace (gateways, mostly) must not take its mesh-wide rules for their own: only what is exported to nobody else
        // is meant for them before the service's rules.
        let is_private = |rule: &DestinationRule| rule.visibility.is_only(root);
        let own = if client_namespace == root {
            of(root, &is_private)
        } else {
            of(client_namespace, &|_| true)
        };
        own.or_else(|| of(service_namespace, &|_| true))
            .or_else(|| of(root, &|_| true))
            .unwrap_or_default()
    }

    /// The rules of a namespace for the exact host, or else for the longest wildcard that covers it.
    fn most_specific_rules(&self, namespace: &str, host: &str) -> &[Arc<DestinationRule>] {
        let Some(rules) = self.destination_rules.get(namespace) else {
            return &[];
        };
        if let Some(exact) = rules.get(host) {
            return exact;
        }
        let covering = rules.iter().filter(|(pattern, _)| {
            hostname::is_wildcard(pattern) && hostname::covers(pattern, host)
        });
        covering
            .min_by_key(|(pattern, _)| hostname::specificity(pattern))
            .map_or(&[], |(_, rules)| rules)
    }

    /// Locality `region/zone/subzone` of a node's pod, shorter or empty where unknown.
    pub fn locality_of(&self, node: &Node) -> &str {
        self.workload(&node.namespace, &node.name)
            .map_or("", |workload| &workload.locality)
    }

    /// Labels of a node's pod with those of its place, by which priorities are decided.
    pub fn placed_labels_of(&self, node: &Node) -> BTreeMap<String, String> {
        match self.workload(&node.namespace, &node.name) {
            Some(workload) => workload.placed_labels(node.cluster_id()),
            None => node.labels.clone(),
        }
    }
}
