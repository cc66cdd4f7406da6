//! WorkloadEntry: one workload outside Kubernetes.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

/// One workload outside Kubernetes, or one endpoint of a ServiceEntry.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WorkloadEntry {
    /// IP address, DNS name or `unix:///path`.
    pub address: String,
    /// Ports by name of the service's port.
    pub ports: BTreeMap<String, u32>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Network in which the address can be reached.
    pub network: String,
    /// `region/zone/subzone`.
    pub locality: String,
    /// Share of traffic.
    pub weight: u32,
    /// Service account whose identity the workload has.
    pub service_account: String,
}
