//! Sidecar: what the sidecars of some workloads accept and reach.

use schemars::JsonSchema;
use serde::Deserialize;

use super::destination_rule::ConnectionPoolSettings;
use super::gateway::{Port, ServerTlsSettings};
use super::virtual_service::Destination;
use crate::WorkloadSelector;

/// What the sidecars of some workloads accept and reach.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Sidecar {
    /// Workloads; none is all of the namespace.
    pub workload_selector: Option<WorkloadSelector>,
    /// What is accepted.
    pub ingress: Vec<IstioIngressListener>,
    /// What can be reached.
    pub egress: Vec<IstioEgressListener>,
    /// Limits for incoming connections.
    pub inbound_connection_pool: Option<ConnectionPoolSettings>,
    /// What happens to unknown destinations.
    pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
}

/// One incoming port.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["port"]))]
pub struct IstioIngressListener {
    /// The port.
    pub port: Port,
    /// Address to listen on.
    pub bind: String,
    /// How traffic reaches the listener.
    pub capture_mode: CaptureMode,
    /// `127.0.0.1:PORT`, `0.0.0.0:PORT` or `unix:///path` of the application.
    pub default_endpoint: String,
    /// TLS toward clients from outside the mesh.
    pub tls: Option<ServerTlsSettings>,
    /// Limits.
    pub connection_pool: Option<ConnectionPoolSettings>,
}

/// Some destinations.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["hosts"]))]
pub struct IstioEgressListener {
    /// Port; none is the rest.
    pub port: Option<Port>,
    /// Address or unix socket to listen on.
    pub bind: String,
    /// How traffic reaches the listener.
    pub capture_mode: CaptureMode,
    /// `namespace/host`; namespace may be `.`, `*` or `~`.
    pub hosts: Vec<String>,
}

/// How traffic reaches a listener.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum CaptureMode {
    /// As the workload is set up.
    #[default]
    Default,
    /// By redirection.
    Iptables,
    /// The application connects to the listener itself.
    None,
}

/// What happens to unknown destinations.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OutboundTrafficPolicy {
    /// Allow or refuse.
    pub mode: OutboundTrafficMode,
    /// Where unknown traffic is sent; ALLOW_ANY only.
    pub egress_proxy: Option<Destination>,
}

/// What happens to unknown destinations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundTrafficMode {
    /// Refused.
    #[default]
    RegistryOnly,
    /// Passed through.
    AllowAny,
}
