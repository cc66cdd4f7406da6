//! Rules with every name made absolute.

use std::collections::BTreeMap;

use mesh_api::networking::destination_rule::SimpleLb;
use mesh_api::networking::virtual_service::HttpRoute;

use crate::{ObjectKey, Protocol, Visibility};

/// The name that stands for all sidecars in a list of gateways.
pub const MESH_GATEWAY: &str = "mesh";

/// A VirtualService. Hosts and destinations are full names, gateways are `namespace/name` or [`MESH_GATEWAY`], ports of destinations are filled in
/// where the service has exactly one; parts that are not applied are reported and taken out.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualService {
    /// The object.
    pub key: ObjectKey,
    /// When it was created, in seconds since 1970 (0 if unknown); of two for the same host the older wins.
    pub created: i64,
    /// Hosts, lower case.
    pub hosts: Vec<String>,
    /// Gateways that apply it; never empty.
    pub gateways: Vec<String>,
    /// Who sees it.
    pub visibility: Visibility,
    /// HTTP rules in order.
    pub http: Vec<HttpRoute>,
}

impl VirtualService {
    /// True if a gateway (`namespace/name`, or [`MESH_GATEWAY`]) applies it.
    pub fn is_bound_to(&self, gateway: &str) -> bool {
        self.gateways.iter().any(|name| name == gateway)
    }
}

/// All DestinationRules of one namespace for one host, merged: subsets of all of them, the first trafficPolicy.
#[derive(Debug, Clone, PartialEq)]
pub struct DestinationRule {
    /// The objects, oldest first.
    pub keys: Vec<ObjectKey>,
    /// Full name of the service, or a wildcard.
    pub host: String,
    /// Who sees it.
    pub visibility: Visibility,
    /// Policy for the whole host.
    pub policy: PortPolicy,
    /// Subsets by name.
    pub subsets: BTreeMap<String, Subset>,
}

/// A named part of a service's endpoints.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Subset {
    /// Labels that the endpoint's pod must have.
    pub labels: BTreeMap<String, String>,
    /// Policy that overrides the host's.
    pub policy: PortPolicy,
}

/// A traffic policy with what it says for single ports.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PortPolicy {
    /// Load balancing for all ports; `None` if the policy does not say.
    pub load_balancer: Option<SimpleLb>,
    /// Load balancing for single ports; the inner `None` means that the port's settings replace the policy and don't say.
    pub ports: BTreeMap<u16, Option<SimpleLb>>,
}

impl PortPolicy {
    /// What the policy says for a port.
    fn for_port(&self, port: u16) -> Option<SimpleLb> {
        self.ports.get(&port).copied().unwrap_or(self.load_balancer)
    }
}

impl DestinationRule {
    /// Load balancing for a subset (empty for the whole host) and port: the subset's policy wins, then the host's, then LEAST_REQUEST.
    pub fn load_balancer(&self, subset: &str, port: u16) -> SimpleLb {
        let subset = self
            .subsets
            .get(subset)
            .and_then(|subset| subset.policy.for_port(port));
        match subset.or_else(|| self.policy.for_port(port)) {
            None | Some(SimpleLb::Unspecified | SimpleLb::LeastConn) => SimpleLb::LeastRequest,
            Some(lb) => lb,
        }
    }
}

/// A Gateway: ports and hosts that the selected proxies serve.
#[derive(Debug, Clone, PartialEq)]
pub struct Gateway {
    /// The object.
    pub key: ObjectKey,
    /// When it was created, in seconds since 1970 (0 if unknown).
    pub created: i64,
    /// Labels of the proxies that serve it; empty selects all.
    pub selector: BTreeMap<String, String>,
    /// Servers that this version serves; the others are reported.
    pub servers: Vec<GatewayServer>,
}

/// One port of a Gateway with its hosts.
#[derive(Debug, Clone, PartialEq)]
pub struct GatewayServer {
    /// Number, as clients of the gateway's Service see it.
    pub port: u16,
    /// Name of the port.
    pub name: String,
    /// Protocol; HTTP and its kin only, so far.
    pub protocol: Protocol,
    /// Hosts: the namespace whose VirtualServices may bind (`None`: any) and the name, wildcards allowed.
    pub hosts: Vec<(Option<String>, String)>,
}

impl Gateway {
    /// `namespace/name`, as VirtualServices refer to it.
    pub fn reference(&self) -> String {
        format!("{}/{}", self.key.namespace, self.key.name)
    }
}
