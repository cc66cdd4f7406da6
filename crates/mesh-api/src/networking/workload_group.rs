//! WorkloadGroup: template and health check of workloads outside Kubernetes.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::WorkloadEntry;

/// Template and health check of workloads outside Kubernetes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["template"]))]
pub struct WorkloadGroup {
    /// Labels and annotations of the entries.
    pub metadata: WorkloadMetadata,
    /// Template; its address may be empty.
    pub template: Option<WorkloadEntry>,
    /// Health check.
    pub probe: Option<ReadinessProbe>,
}

/// Labels and annotations of the entries.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WorkloadMetadata {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// A health check; exactly one of httpGet, tcpSocket, exec and grpc.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ReadinessProbe {
    /// Pause before the first check, in seconds.
    pub initial_delay_seconds: i32,
    /// Limit per check, in seconds; default 1.
    pub timeout_seconds: i32,
    /// Pause between checks, in seconds; default 10.
    pub period_seconds: i32,
    /// Successes in a row to be healthy; default 1.
    pub success_threshold: i32,
    /// Failures in a row to be unhealthy; default 3.
    pub failure_threshold: i32,
    /// By HTTP.
    pub http_get: Option<HttpHealthCheck>,
    /// By connecting.
    pub tcp_socket: Option<TcpHealthCheck>,
    /// By a command.
    pub exec: Option<ExecHealthCheck>,
    /// By gRPC's health protocol.
    pub grpc: Option<GrpcHealthCheck>,
}

/// A check by HTTP.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["port"]))]
pub struct HttpHealthCheck {
    /// Path.
    pub path: String,
    /// Port.
    pub port: u32,
    /// Host; default is the workload.
    pub host: String,
    /// HTTP or HTTPS.
    pub scheme: String,
    /// Headers to send.
    pub http_headers: Vec<HttpHeader>,
}

/// A header.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpHeader {
    /// Name.
    pub name: String,
    /// Value.
    pub value: String,
}

/// A check by connecting.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["port"]))]
pub struct TcpHealthCheck {
    /// Host; default is the workload.
    pub host: String,
    /// Port.
    pub port: u32,
}

/// A check by a command.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["command"]))]
pub struct ExecHealthCheck {
    /// Program and arguments; exit status 0 is healthy.
    pub command: Vec<String>,
}

/// A check by gRPC's health protocol.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GrpcHealthCheck {
    /// Port.
    pub port: u32,
    /// Service to ask for.
    pub service: String,
}
