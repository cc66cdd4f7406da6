//! The immutable intent and its look-ups.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::mesh_config::MeshConfig;

use crate::objects::{Name, Objects};
use crate::service::contains_labels;
use crate::{
    DestinationRule, Gateway, KeySource, MESH_GATEWAY, Node, NodeKind, Problem, Service,
    ServicePort, VirtualService, Workload, build,
};

mod destination_rules;
mod envoy_filters;
mod security;

pub(crate) use envoy_filters::EnvoyFilters;
pub(crate) use security::Security;

/// Everything that the objects mean together. Never changes once it is built.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Mesh {
    pub(crate) config: Arc<MeshConfig>,
    pub(crate) domain: String,
    pub(crate) services: BTreeMap<String, Arc<Service>>,
    pub(crate) workloads: BTreeMap<Name, Arc<Workload>>,
    /// Oldest first.
    pub(crate) virtual_services: Vec<Arc<VirtualService>>,
    /// By namespace, then by host.
    pub(crate) destination_rules: BTreeMap<String, BTreeMap<String, Vec<Arc<DestinationRule>>>>,
    pub(crate) envoy_filters: EnvoyFilters,
    /// Oldest first.
    pub(crate) gateways: Vec<Arc<Gateway>>,
    pub(crate) security: Security,
    /// Fetched keys of issuers, in JSON.
    pub(crate) jwks: Arc<BTreeMap<KeySource, Arc<str>>>,
    pub(crate) problems: Vec<Problem>,
}

/// Services of the control plane's domain; the objects don't say which it is.
pub(crate) const DOMAIN: &str = "cluster.local";

impl Mesh {
    /// Makes the intent from all objects. Never fails: what is wrong becomes a [`Problem`], the rest is used. The result does not depend on
    /// the order in which objects were added.
    pub fn build(objects: &Objects) -> Self {
        build::build(objects)
    }

    /// The mesh configuration.
    pub fn config(&self) -> &MeshConfig {
        &self.config
    }

    /// DNS domain of the cluster, `cluster.local`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// What is wrong with objects or not applied, ordered by object, field and severity.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// All services, ordered by host.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// A service by its full name.
    pub fn service(&self, host: &str) -> Option<&Arc<Service>> {
        self.services.get(host)
    }

    /// The service that traffic to a host reaches: ExternalName services lead to the service that they stand for, if the mesh knows it.
    pub fn resolve_alias<'a>(&'a self, service: &'a Arc<Service>) -> Option<&'a Arc<Service>> {
        let mut current = service;
        // A chain longer than this is a loop, or as good as one.
        for _ in 0..8 {
            match &current.external_name {
                None => return Some(current),
                Some(name) => current = self.services.get(name)?,
            }
        }
        None
    }

    /// True if a service stands for a name that the mesh does not know, so that only DNS can say where it is.
    pub fn is_outside(&self, service: &Service) -> bool {
        let mut current = service;
        // A longer chain is a loop, or as good as one.
        for _ in 0..8 {
            match &current.external_name {
                None => return false,
                Some(name) => match self.services.get(name) {
                    None => return !name.is_empty(),
                    Some(next) => current = next,
                },
            }
        }
        false
    }

    /// Services that a client in a namespace sees, ordered by host.
    pub fn visible_services<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Service>> {
        self.services
            .values()
            .filter(move |service| service.visibility.includes(namespace))
    }

    /// A pod by namespace and name.
    pub fn workload(&self, namespace: &str, pod: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(&(namespace.to_owned(), pod.to_owned()))
    }

    /// Number of VirtualServices, DestinationRules (after merging) and Gateways, for the control plane's metrics.
    pub fn rule_counts(&self) -> (usize, usize, usize) {
        (
            self.virtual_services.len(),
            self.destination_rules.values().map(BTreeMap::len).sum(),
            self.gateways.len(),
        )
    }

    /// VirtualServices that sidecars in a namespace apply, oldest first.
    pub fn sidecar_virtual_services<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Arc<VirtualService>> {
        self.virtual_services.iter().filter(move |rule| {
            rule.is_bound_to(MESH_GATEWAY) && rule.visibility.includes(namespace)
        })
    }

    /// VirtualServices that a gateway (`namespace/name`) applies when it runs in `namespace`, oldest first.
    pub fn gateway_virtual_services<'a>(
        &'a self,
        gateway: &'a str,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Arc<VirtualService>> {
        self.virtual_services
            .iter()
            .filter(move |rule| rule.is_bound_to(gateway) && rule.visibility.includes(namespace))
    }

    /// Gateways that a node serves, oldest first; none for sidecars.
    pub fn gateways_of<'a>(&'a self, node: &'a Node) -> impl Iterator<Item = &'a Arc<Gateway>> {
        let labels = self.labels_of(node);
        let serves = move |gateway: &&Arc<Gateway>| {
            node.kind == NodeKind::Router && contains_labels(labels, &gateway.selector)
        };
        self.gateways.iter().filter(serves)
    }

    /// The labels of a node's pod: as the API says where it is known, else as the node reports.
    pub fn labels_of<'a>(&'a self, node: &'a Node) -> &'a BTreeMap<String, String> {
        self.workload(&node.namespace, &node.name)
            .map_or(&node.labels, |workload| &workload.labels)
    }

    /// The ports on which a node's own pod serves, with the service and its port, ordered by port and then by the service's age: by selector, or
    /// because an endpoint has the node's address. A port that cannot be told yet (an unknown port name) is left out.
    pub fn served_by(&self, node: &Node) -> Vec<(u16, &Arc<Service>, &ServicePort)> {
        let workload = self.workload(&node.namespace, &node.name);
        let labels = self.labels_of(node);
        let named_ports = workload
            .map(|workload| &workload.named_ports)
            .filter(|ports| !ports.is_empty())
            .unwrap_or(&node.named_ports);
        let mut served = Vec::new();
        for service in self
            .services
            .values()
            .filter(|service| service.external_name.is_none())
        {
            if service.namespace == node.namespace
                && !service.selector.is_empty()
                && contains_labels(labels, &service.selector)
            {
                served.extend(
                    service
                        .ports
                        .iter()
                        .filter_map(|port| Some((port.target_on(named_ports)?, service, port))),
                );
            } else {
                served.extend(by_address(service, &node.ips));
            }
        }
        served.sort_by_key(|(target, service, port)| {
            (*target, service.created, &service.host, port.number)
        });
        served
    }

    /// All host names that exist: services and hosts of VirtualServices.
    pub fn hosts(&self) -> BTreeSet<&str> {
        let rules = self
            .virtual_services
            .iter()
            .flat_map(|rule| rule.hosts.iter());
        self.services
            .keys()
            .chain(rules)
            .map(String::as_str)
            .collect()
    }
}

/// Ports of a service whose endpoints have one of these addresses.
fn by_address<'a>(
    service: &'a Arc<Service>,
    addresses: &[IpAddr],
) -> Vec<(u16, &'a Arc<Service>, &'a ServicePort)> {
    let mut found = Vec::new();
    for port in &service.ports {
        let own = service
            .endpoints(port.number)
            .iter()
            .filter(|endpoint| addresses.contains(&endpoint.address));
        found.extend(own.map(|endpoint| (endpoint.port, service, port)));
    }
    found.dedup_by_key(|(target, _, port)| (*target, port.number));
    found
}
