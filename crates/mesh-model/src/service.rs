//! Services and what is behind them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::{Protocol, Visibility};

/// A name that clients call, with its ports and endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Full name, for instance `reviews.default.svc.cluster.local`.
    pub host: String,
    /// Name of the Kubernetes Service.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// When it was created, in seconds since 1970 (0 if unknown); of two services that claim the same, the older wins.
    pub created: i64,
    /// Addresses that clients connect to; none for a headless service.
    pub addresses: Vec<IpAddr>,
    /// True if names lead to the pods themselves.
    pub headless: bool,
    /// The host that an ExternalName service stands for.
    pub external_name: Option<String>,
    /// Labels of the pods behind it; empty if endpoints are given by hand.
    pub selector: BTreeMap<String, String>,
    /// TCP ports in the order of the Service; UDP ports are left to the kernel.
    pub ports: Vec<ServicePort>,
    /// Who sees it.
    pub visibility: Visibility,
    /// Endpoints by service port, ordered by address; ready and draining ones.
    pub endpoints: BTreeMap<u16, Vec<Endpoint>>,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Number that clients use.
    pub number: u16,
    /// Name, may be empty.
    pub name: String,
    /// Protocol, as far as it was declared.
    pub protocol: Protocol,
    /// Where the pods listen.
    pub target: TargetPort,
}

/// Where the pods of a service listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// The name of a container port.
    Name(String),
}

/// An address behind a service port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// Whether it takes requests.
    pub health: Health,
    /// Locality `region/zone/subzone`, shorter or empty where unknown.
    pub locality: String,
    /// The pod behind it, where there is one.
    pub workload: Option<Arc<Workload>>,
}

/// Whether an endpoint takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Health {
    /// It does.
    Ready,
    /// It is going away: only what is bound to it already.
    Draining,
}

/// A pod, as far as the mesh knows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Workload {
    /// Name of the pod.
    pub pod: String,
    /// Namespace.
    pub namespace: String,
    /// Name of the workload that owns the pod, for instance the Deployment.
    pub name: String,
    /// Labels of the pod.
    pub labels: BTreeMap<String, String>,
    /// Service account.
    pub service_account: String,
    /// Cluster node on which the pod runs; empty before it is scheduled.
    pub node: String,
    /// Address; `None` before it has one, or if it shares the node's.
    pub address: Option<IpAddr>,
    /// Locality of the cluster node.
    pub locality: String,
    /// Container ports by name, to which target ports may refer.
    pub named_ports: BTreeMap<String, u16>,
}

impl Service {
    /// A port by number.
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.number == number)
    }

    /// Endpoints of a port; none if the port does not exist.
    pub fn endpoints(&self, port: u16) -> &[Endpoint] {
        self.endpoints.get(&port).map_or(&[], Vec::as_slice)
    }

    /// The identities `namespace/service account` that the endpoints run with.
    pub fn service_accounts(&self) -> BTreeSet<(&str, &str)> {
        let workloads = self
            .endpoints
            .values()
            .flatten()
            .filter_map(|endpoint| endpoint.workload.as_deref());
        workloads
            .map(|workload| {
                (
                    workload.namespace.as_str(),
                    workload.service_account.as_str(),
                )
            })
            .collect()
    }
}

impl ServicePort {
    /// The number on which a workload listens for this port; `None` if it has no port of that name.
    pub fn target_on(&self, named_ports: &BTreeMap<String, u16>) -> Option<u16> {
        match &self.target {
            TargetPort::Number(number) => Some(*number),
            TargetPort::Name(name) => named_ports.get(name).copied(),
        }
    }
}

impl Endpoint {
    /// True if the endpoint's pod has all these labels; an endpoint without a pod has none.
    pub fn has_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        labels.is_empty()
            || self
                .workload
                .as_ref()
                .is_some_and(|workload| contains_labels(&workload.labels, labels))
    }
}

impl Workload {
    /// True if the pod's proxy takes mutual TLS of the mesh, as the injector's label says.
    pub fn offers_mutual_tls(&self) -> bool {
        self.labels
            .get("security.istio.io/tlsMode")
            .is_some_and(|mode| mode == "istio")
    }

    /// Canonical service name: by label, else the app's, else the workload's name.
    pub fn canonical_name(&self) -> &str {
        let labels = [
            "service.istio.io/canonical-name",
            "app.kubernetes.io/name",
            "app",
        ];
        labels
            .iter()
            .find_map(|label| self.labels.get(*label))
            .unwrap_or(&self.name)
    }

    /// Canonical revision: by label, else the app's version, else `latest`.
    pub fn canonical_revision(&self) -> &str {
        let labels = [
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ];
        labels
            .iter()
            .find_map(|label| self.labels.get(*label))
            .map_or("latest", String::as_str)
    }
}

impl Workload {
    /// Labels of the pod with those of its place (`topology.kubernetes.io/region` and so on), as Istio adds them for failoverPriority.
    pub fn placed_labels(&self, cluster: &str) -> BTreeMap<String, String> {
        let mut labels = self.labels.clone();
        let mut parts = self.locality.splitn(3, '/');
        let mut place = |key: &str, value: &str| {
            if !value.is_empty() {
                labels.insert(key.to_owned(), value.to_owned());
            }
        };
        place("topology.istio.io/cluster", cluster);
        place("kubernetes.io/hostname", &self.node);
        for key in [
            "topology.kubernetes.io/region",
            "topology.kubernetes.io/zone",
            "topology.istio.io/subzone",
        ] {
            place(key, parts.next().unwrap_or_default());
        }
        labels
    }
}

/// True if `labels` has all of `wanted`.
pub(crate) fn contains_labels(
    labels: &BTreeMap<String, String>,
    wanted: &BTreeMap<String, String>,
) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}
