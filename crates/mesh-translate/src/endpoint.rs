//! Endpoints.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::{HealthStatus, Locality};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
};
use mesh_model::{self as model, Health, Mesh, Node, Service, ServicePort};

use crate::pb::{address, uint32};
use crate::resources::{ENDPOINT, Resource};
use crate::{metadata, names};

/// The endpoints of a service port, whole (`subset` empty) or in part. Endpoints that are going away are left out: requests that they have in
/// hand end on their connections.
pub(crate) fn assignment(
    mesh: &Mesh,
    node: &Node,
    service: &Service,
    port: &ServicePort,
    subset: &str,
) -> (String, Resource) {
    let name = names::outbound_cluster(port.number, subset, &service.host);
    let rule = mesh.destination_rule(&service.host, &node.namespace);
    let labels = rule
        .and_then(|rule| rule.subsets.get(subset))
        .map(|subset| &subset.labels);
    let mut localities: BTreeMap<&str, Vec<LbEndpoint>> = BTreeMap::new();
    for endpoint in service
        .endpoints(port.number)
        .iter()
        .filter(|endpoint| endpoint.health == Health::Ready)
    {
        if labels.is_none_or(|labels| endpoint.has_labels(labels)) {
            localities
                .entry(&endpoint.locality)
                .or_default()
                .push(lb_endpoint(endpoint, node));
        }
    }
    let message = ClusterLoadAssignment {
        cluster_name: name.clone(),
        endpoints: localities
            .into_iter()
            .map(|(name, endpoints)| locality(name, endpoints))
            .collect(),
        ..ClusterLoadAssignment::default()
    };
    (name, Resource::new(ENDPOINT, &message))
}

fn locality(name: &str, lb_endpoints: Vec<LbEndpoint>) -> LocalityLbEndpoints {
    let mut parts = name.splitn(3, '/').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    LocalityLbEndpoints {
        locality: Some(Locality {
            region: next(),
            zone: next(),
            sub_zone: next(),
        }),
        load_balancing_weight: uint32(u32::try_from(lb_endpoints.len()).unwrap_or(u32::MAX)),
        lb_endpoints,
        ..LocalityLbEndpoints::default()
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
