//! How objects select workloads and name their targets.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

/// Selects workloads by labels, in the form of the networking kinds (`labels`).
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WorkloadSelector {
    /// Labels that a workload must have; none selects every workload of the namespace.
    pub labels: BTreeMap<String, String>,
}

/// Selects workloads by labels, in the form of the security and telemetry kinds (`matchLabels`).
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LabelSelector {
    /// Labels that a workload must have; none selects every workload of the namespace.
    pub match_labels: BTreeMap<String, String>,
}

/// Names the object to which a policy is attached.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["kind", "name"]))]
pub struct PolicyTargetReference {
    /// API group of the target; empty is the core group.
    pub group: String,
    /// Kind of the target.
    pub kind: String,
    /// Name of the target.
    pub name: String,
    /// Must be empty: a policy is attached in its own namespace only.
    pub namespace: String,
}
