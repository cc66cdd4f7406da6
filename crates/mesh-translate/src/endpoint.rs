//! Endpoints.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, HealthStatus, Locality, SocketAddress};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
};
use mesh_model::{
    self as model, DestinationRule, Health, Mesh, MtlsMode, Node, Service, ServicePort,
};

use crate::cluster::Policy;
use crate::metadata;
use crate::pb::{address, uint32};
use crate::resources::{ENDPOINT, Resource};

use locality::Group;

mod locality;

/// Which endpoints a cluster has.
pub(crate) struct Part<'a> {
    pub(crate) service: &'a Service,
    pub(crate) port: &'a ServicePort,
    /// Empty for all.
    pub(crate) subset: &'a str,
    /// Where the subset is defined.
    pub(crate) rule: Option<&'a DestinationRule>,
    /// Those alone that take mutual TLS of the mesh.
    pub(crate) mutual_tls_only: bool,
}

/// The endpoints of a service port, whole or in part, with priorities and weights by their distance from the node. Endpoints
/// that are going away are left out: requests that they have in hand end on their connections.
pub(crate) fn assignment(
    mesh: &Mesh,
    node: &Node,
    name: &str,
    part: &Part<'_>,
    policy: &Policy<'_>,
) -> (String, Resource) {
    let labels = part
        .rule
        .and_then(|rule| rule.subsets.get(part.subset))
        .map(|subset| &subset.labels);
    let mut by_locality: BTreeMap<&str, Vec<&model::Endpoint>> = BTreeMap::new();
    for endpoint in part
        .service
        .endpoints(part.port.number)
        .iter()
        .filter(|endpoint| endpoint.health == Health::Ready)
    {
        let fits = !part.mutual_tls_only || takes_mutual_tls(mesh, endpoint);
        if fits && labels.is_none_or(|labels| endpoint.has_labels(labels)) {
            by_locality
                .entry(&endpoint.locality)
                .or_default()
                .push(endpoint);
        }
    }
    let mut groups: Vec<Group<'_>> = by_locality
        .into_iter()
        .map(|(locality, endpoints)| Group::new(locality, endpoints))
        .collect();
    if let Some(setting) = policy.locality() {
        locality::apply(&mut groups, setting, policy.fails_over(), mesh, node);
    }
    let message = ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: groups
            .iter()
            .map(|group| encoded(mesh, group, node))
            .collect(),
        ..ClusterLoadAssignment::default()
    };
    (name.to_owned(), Resource::new(ENDPOINT, &message))
}

fn encoded(mesh: &Mesh, group: &Group<'_>, node: &Node) -> LocalityLbEndpoints {
    let [region, zone, sub_zone] = locality::parts(group.locality).map(str::to_owned);
    LocalityLbEndpoints {
        locality: Some(Locality {
            region,
            zone,
            sub_zone,
        }),
        load_balancing_weight: uint32(group.weight),
        priority: group.priority,
        lb_endpoints: group
            .endpoints
            .iter()
            .map(|endpoint| lb_endpoint(mesh, endpoint, node))
            .collect(),
        ..LocalityLbEndpoints::default()
    }
}

/// An endpoint whose address DNS knows.
pub(crate) fn by_name(name: &str, port: u16) -> LbEndpoint {
    let address = SocketAddress {
        address: name.to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(u32::from(port))),
        ..SocketAddress::default()
    };
    LbEndpoint {
        load_balancing_weight: uint32(1u32),
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(Address {
                address: Some(AddressKind::SocketAddress(address)),
            }),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    }
}

/// True if the pod behind an endpoint has a proxy that takes mutual TLS on this port.
pub(crate) fn takes_mutual_tls(mesh: &Mesh, endpoint: &model::Endpoint) -> bool {
    endpoint.workload.as_ref().is_some_and(|workload| {
        let mode = mesh.mtls(&workload.namespace, &workload.labels, endpoint.port);
        workload.offers_mutual_tls() && mode != MtlsMode::Disable
    })
}

fn lb_endpoint(mesh: &Mesh, endpoint: &model::Endpoint, node: &Node) -> LbEndpoint {
    LbEndpoint {
        health_status: HealthStatus::Healthy as i32,
        metadata: endpoint.workload.as_ref().map(|workload| {
            metadata::endpoint(described(workload, node), takes_mutual_tls(mesh, endpoint))
        }),
        load_balancing_weight: uint32(1u32),
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: address(endpoint.address, endpoint.port),
            ..Endpoint::default()
        })),
    }
}

/// Istio's compact form `name;namespace;canonical name;canonical revision;cluster`, from which proxies take the `destination_*` labels.
fn described(workload: &model::Workload, node: &Node) -> String {
    let parts = [
        &workload.name,
        &workload.namespace,
        workload.canonical_name(),
        workload.canonical_revision(),
        node.cluster_id(),
    ];
    parts.join(";")
}
