//! WasmPlugin: a WebAssembly filter.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{LabelSelector, PolicyTargetReference};

/// A WebAssembly filter for some workloads.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["url"]))]
pub struct WasmPlugin {
    /// Workloads; none is all of the namespace.
    pub selector: Option<LabelSelector>,
    /// Target instead of workloads, older form.
    pub target_ref: Option<PolicyTargetReference>,
    /// Targets instead of workloads.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Where the module is: `oci://`, `http(s)://` or `file://`.
    pub url: String,
    /// Digest of the module, 64 hex digits.
    pub sha256: String,
    /// When it is fetched again.
    pub image_pull_policy: PullPolicy,
    /// Secret for the registry.
    pub image_pull_secret: String,
    /// Key of the module's signature.
    pub verification_key: String,
    /// Configuration of the module; null if not given.
    #[schemars(schema_with = "crate::schema::free_object")]
    pub plugin_config: serde_json::Value,
    /// Name inside the module.
    pub plugin_name: String,
    /// Where in the filter chain.
    pub phase: PluginPhase,
    /// Order within a phase, highest first.
    pub priority: Option<i32>,
    /// What happens when it fails.
    pub fail_strategy: FailStrategy,
    /// Environment of the module.
    pub vm_config: Option<VmConfig>,
    /// Which traffic.
    #[serde(rename = "match")]
    pub matches: Vec<TrafficSelector>,
    /// HTTP or network filter.
    #[serde(rename = "type")]
    pub plugin_type: PluginType,
}

/// When a module is fetched again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PullPolicy {
    /// IfNotPresent, or Always for the tag latest.
    #[default]
    #[serde(rename = "UNSPECIFIED_POLICY")]
    UnspecifiedPolicy,
    /// When it is not there.
    #[serde(rename = "IfNotPresent")]
    IfNotPresent,
    /// With every change.
    #[serde(rename = "Always")]
    Always,
}

/// Where in the filter chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PluginPhase {
    /// At the end, before the router.
    #[default]
    UnspecifiedPhase,
    /// Before authentication.
    Authn,
    /// After authentication, before authorization.
    Authz,
    /// After authorization, before statistics.
    Stats,
}

/// What happens when a module fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FailStrategy {
    /// Requests fail.
    #[default]
    FailClose,
    /// Requests pass.
    FailOpen,
    /// The module is loaded again.
    FailReload,
}

/// Kind of filter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PluginType {
    /// As HTTP.
    #[default]
    UnspecifiedPluginType,
    /// HTTP filter.
    Http,
    /// Network filter.
    Network,
}

/// Environment of a module.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VmConfig {
    /// Variables.
    pub env: Vec<EnvVar>,
}

/// A variable.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["name"]))]
pub struct EnvVar {
    /// Name.
    pub name: String,
    /// Where the value comes from.
    pub value_from: EnvValueSource,
    /// Value (INLINE).
    pub value: String,
}

/// Where a value comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EnvValueSource {
    /// From `value`.
    #[default]
    Inline,
    /// From the proxy's environment.
    Host,
}

/// Which traffic; both parts have to match.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TrafficSelector {
    /// Direction.
    pub mode: TrafficMode,
    /// Ports, of which one has to match.
    pub ports: Vec<PortSelector>,
}

/// Direction of traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TrafficMode {
    /// As CLIENT_AND_SERVER.
    #[default]
    Undefined,
    /// Outgoing.
    Client,
    /// Incoming.
    Server,
    /// Both.
    ClientAndServer,
}

/// A port.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["number"]))]
pub struct PortSelector {
    /// Number, 1 to 65535.
    pub number: u32,
}
