//! ServiceEntry: a service that Kubernetes does not know.

use schemars::JsonSchema;
use serde::Deserialize;

use super::WorkloadEntry;
use crate::WorkloadSelector;

/// A service that Kubernetes does not know.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["hosts"]))]
pub struct ServiceEntry {
    /// Hosts, 1 to 256; wildcards allowed, but not `*`.
    pub hosts: Vec<String>,
    /// Virtual addresses, or CIDR with NONE or STATIC.
    pub addresses: Vec<String>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Inside or outside the mesh.
    pub location: Location,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Endpoints; excludes workloadSelector.
    pub endpoints: Vec<WorkloadEntry>,
    /// Pods and WorkloadEntries of this namespace that are the endpoints.
    pub workload_selector: Option<WorkloadSelector>,
    /// Namespaces that see this object: `.` its own, `*` all (default), `~` none, or names.
    pub export_to: Vec<String>,
    /// Names of which an endpoint's certificate must have one.
    pub subject_alt_names: Vec<String>,
}

/// A port of the service.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["number", "name"]))]
pub struct ServicePort {
    /// Number, 1 to 65535, unique.
    pub number: u32,
    /// HTTP, HTTPS, GRPC, HTTP2, MONGO, TCP or TLS; empty is sniffed.
    pub protocol: String,
    /// Name, unique.
    pub name: String,
    /// Port of the endpoints; 0 is the same number.
    pub target_port: u32,
}

/// Whether a service belongs to the mesh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Location {
    /// Outside: no mutual TLS by default.
    #[default]
    MeshExternal,
    /// Inside.
    MeshInternal,
}

/// How endpoints are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    /// The address that the client asked for.
    #[default]
    None,
    /// The endpoints listed.
    Static,
    /// All addresses of the names.
    Dns,
    /// The first address of the one name, resolved again and again.
    DnsRoundRobin,
    /// The name of each request, resolved by the proxy.
    DynamicDns,
}
