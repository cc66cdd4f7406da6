//! Pod: what runs, where, with which identity.

use serde::Deserialize;

use super::null_as_default;
use crate::meta::Meta;

/// A pod.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// Metadata.
    #[serde(rename = "metadata")]
    pub meta: Meta,
    /// What was asked for.
    pub spec: PodSpec,
    /// What is.
    pub status: PodStatus,
}

/// What was asked for.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// Node on which the pod runs; empty before it is scheduled.
    pub node_name: String,
    /// Service account; empty means `default`.
    pub service_account_name: String,
    /// True if the pod shares the node's network.
    pub host_network: bool,
    /// Host name of the pod in DNS, together with `subdomain`.
    pub hostname: String,
    /// Headless service that gives the pod a DNS name.
    pub subdomain: String,
    /// Containers.
    #[serde(deserialize_with = "null_as_default")]
    pub containers: Vec<Container>,
    /// Init containers, native sidecars among them.
    #[serde(deserialize_with = "null_as_default")]
    pub init_containers: Vec<Container>,
}

/// A container.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    /// Name.
    pub name: String,
    /// Image.
    pub image: String,
    /// Ports that it says it listens on.
    #[serde(deserialize_with = "null_as_default")]
    pub ports: Vec<ContainerPort>,
    /// `Always` makes an init container a native sidecar.
    pub restart_policy: String,
}

/// A port of a container.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// Name, to which a service's target port may refer.
    pub name: String,
    /// Number.
    pub container_port: u16,
    /// `TCP` (default when empty), `UDP` or `SCTP`.
    pub protocol: String,
}

/// What is.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    pub phase: String,
    /// Address of the pod; empty before it has one.
    #[serde(rename = "podIP")]
    pub pod_ip: String,
    /// Address of the node.
    #[serde(rename = "hostIP")]
    pub host_ip: String,
    /// Conditions.
    #[serde(deserialize_with = "null_as_default")]
    pub conditions: Vec<PodCondition>,
}

/// A condition of a pod.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PodCondition {
    /// Type, for instance `Ready`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

impl Pod {
    /// True if the pod's Ready condition is true.
    pub fn is_ready(&self) -> bool {
        self.status
            .conditions
            .iter()
            .any(|condition| condition.kind == "Ready" && condition.status == "True")
    }

    /// Name of the service account, `default` where none is given.
    pub fn service_account(&self) -> &str {
        if self.spec.service_account_name.is_empty() {
            "default"
        } else {
            &self.spec.service_account_name
        }
    }

    /// Name of the workload that owns the pod: the Deployment behind a ReplicaSet, else the controller, else the pod.
    pub fn workload_name(&self) -> &str {
        let Some(owner) = self.meta.controller() else {
            return &self.meta.name;
        };
        let hash = self.meta.labels.get("pod-template-hash");
        match hash.and_then(|hash| owner.name.strip_suffix(hash.as_str())) {
            Some(name) if owner.kind == "ReplicaSet" => name.strip_suffix('-').unwrap_or(name),
            _ => &owner.name,
        }
    }

    /// Number of the container port with a name.
    pub fn named_port(&self, name: &str) -> Option<u16> {
        let sidecars = self
            .spec
            .init_containers
            .iter()
            .filter(|container| container.restart_policy == "Always");
        self.spec
            .containers
            .iter()
            .chain(sidecars)
            .flat_map(|container| &container.ports)
            .find(|port| port.name == name)
            .map(|port| port.container_port)
    }
}
