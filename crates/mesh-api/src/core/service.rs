//! Service and EndpointSlice: a name, and what is behind it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::null_as_default;
use crate::meta::Meta;

/// A service.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Service {
    /// Metadata.
    #[serde(rename = "metadata")]
    pub meta: Meta,
    /// What was asked for.
    pub spec: ServiceSpec,
    /// What is.
    pub status: ServiceStatus,
}

/// What was asked for.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ServiceSpec {
    /// `ClusterIP` (default when empty), `NodePort`, `LoadBalancer` or `ExternalName`.
    #[serde(rename = "type")]
    pub service_type: String,
    /// Address; `None` for a headless service, empty before one is given.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    /// All addresses.
    #[serde(rename = "clusterIPs", deserialize_with = "null_as_default")]
    pub cluster_ips: Vec<String>,
    /// Name that an ExternalName service stands for.
    #[serde(rename = "externalName")]
    pub external_name: String,
    /// More addresses that lead here.
    #[serde(rename = "externalIPs", deserialize_with = "null_as_default")]
    pub external_ips: Vec<String>,
    /// Labels of the pods behind the service.
    #[serde(deserialize_with = "null_as_default")]
    pub selector: BTreeMap<String, String>,
    /// Ports.
    #[serde(deserialize_with = "null_as_default")]
    pub ports: Vec<ServicePort>,
    /// True if endpoints count before they are ready.
    #[serde(rename = "publishNotReadyAddresses")]
    pub publish_not_ready_addresses: bool,
    /// `Cluster` or `Local`; empty is Cluster.
    #[serde(rename = "internalTrafficPolicy")]
    pub internal_traffic_policy: String,
    /// `PreferClose` and others; empty is no preference.
    #[serde(rename = "trafficDistribution")]
    pub traffic_distribution: String,
}

/// A port of a service.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// Name, which also tells the protocol (`http-web`).
    pub name: String,
    /// `TCP` (default when empty), `UDP` or `SCTP`.
    pub protocol: String,
    /// Application protocol; wins over the name.
    pub app_protocol: Option<String>,
    /// Number.
    pub port: u16,
    /// Port of the pods: a number or the name of a container port; none is the same number.
    pub target_port: Option<IntOrString>,
    /// Port on the nodes; 0 is none.
    pub node_port: u16,
}

/// A number or a name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum IntOrString {
    /// Number.
    Int(i32),
    /// Name.
    String(String),
}

/// What is.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// Addresses of the load balancer.
    pub load_balancer: LoadBalancerStatus,
}

/// Addresses of a load balancer.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct LoadBalancerStatus {
    /// The addresses.
    #[serde(deserialize_with = "null_as_default")]
    pub ingress: Vec<LoadBalancerIngress>,
}

/// One address of a load balancer.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct LoadBalancerIngress {
    /// IP address.
    pub ip: String,
    /// Host name.
    pub hostname: String,
}

impl Service {
    /// True if the service has no address of its own and names lead to its pods.
    pub fn is_headless(&self) -> bool {
        self.spec.cluster_ip == "None"
    }
}

/// Some endpoints of a service.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    /// Metadata; the label `kubernetes.io/service-name` names the service.
    #[serde(rename = "metadata")]
    pub meta: Meta,
    /// `IPv4`, `IPv6` or `FQDN`.
    pub address_type: String,
    /// Endpoints.
    #[serde(deserialize_with = "null_as_default")]
    pub endpoints: Vec<Endpoint>,
    /// Ports that all endpoints of this slice have.
    #[serde(deserialize_with = "null_as_default")]
    pub ports: Vec<EndpointPort>,
}

impl EndpointSlice {
    /// Name of the service, in the namespace of the slice.
    pub fn service_name(&self) -> Option<&str> {
        self.meta
            .labels
            .get("kubernetes.io/service-name")
            .map(String::as_str)
    }
}

/// An endpoint.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    /// Addresses; only the first counts.
    #[serde(deserialize_with = "null_as_default")]
    pub addresses: Vec<String>,
    /// State.
    pub conditions: EndpointConditions,
    /// Host name of the endpoint.
    #[serde(deserialize_with = "null_as_default")]
    pub hostname: String,
    /// The pod behind it.
    pub target_ref: Option<TargetRef>,
    /// Node on which it runs.
    #[serde(deserialize_with = "null_as_default")]
    pub node_name: String,
    /// Zone in which it runs.
    #[serde(deserialize_with = "null_as_default")]
    pub zone: String,
}

/// State of an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EndpointConditions {
    /// Takes new requests; none means yes.
    pub ready: Option<bool>,
    /// Still answers, perhaps while it is terminating; none means as `ready`.
    pub serving: Option<bool>,
    /// Is going away; none means no.
    pub terminating: Option<bool>,
}

impl EndpointConditions {
    /// True if the endpoint takes new requests.
    pub fn is_ready(&self) -> bool {
        self.ready.unwrap_or(true)
    }
}

/// The object behind an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    /// Kind, normally `Pod`.
    pub kind: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// A port of the endpoints of a slice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointPort {
    /// Name of the service's port.
    #[serde(deserialize_with = "null_as_default")]
    pub name: String,
    /// Number on the endpoints; none means all ports.
    pub port: Option<u16>,
    /// `TCP` (default when empty), `UDP` or `SCTP`.
    pub protocol: String,
    /// Application protocol.
    pub app_protocol: Option<String>,
}
