//! Endpoints.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, HealthStatus, Locality, SocketAddress};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
};
use mesh_model::{self as model, DestinationRule, Health, Mesh, Node, Service, ServicePort};

use crate::cluster::Policy;
use crate::pb::{address, uint32};
use crate::resources::{ENDPOINT, Resource};
use crate::{metadata, names};

use locality::Group;

mod locality;

/// The endpoints of a service port, whole (`subset` empty) or in part, with priorities and weights by their distance from the node. Endpoints
/// that are going away are left out: requests that they have in hand end on their connections.
pub(crate) fn assignment(
    mesh: &Mesh,
    node: &Node,
    service: &Service,
    port: &ServicePort,
    subset: &str,
    rule: Option<&DestinationRule>,
    policy: &Policy<'_>,
) -> (String, Resource) {
    let name = names::outbound_cluster(port.number, subset, &service.host);
    let labels = rule
        .and_then(|rule| rule.subsets.get(subset))
        .map(|subset| &subset.labels);
    let mut by_locality: BTreeMap<&str, Vec<&model::Endpoint>> = BTreeMap::new();
    for endpoint in service
        .endpoints(port.number)
        .iter()
        .filter(|endpoint| endpoint.health == Health::Ready)
    {
        if labels.is_none_or(|labels| endpoint.has_labels(labels)) {
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
        cluster_name: name.clone(),
        endpoints: groups.iter().map(|group| encoded(group, node)).collect(),
        ..ClusterLoadAssignment::default()
    };
    (name, Resource::new(ENDPOINT, &message))
}

fn encoded(group: &Group<'_>, node: &Node) -> LocalityLbEndpoints {
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
            .map(|endpoint| lb_endpoint(endpoint, node))
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

fn lb_endpoint(endpoint: &model::Endpoint, node: &Node) -> LbEndpoint {
    LbEndpoint {
        health_status: HealthStatus::Healthy as i32,
        metadata: endpoint
            .workload
            .as_ref()
            .and_then(|workload| metadata::single("workload", described(workload, node))),
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
