//! TrafficExtension: a WebAssembly or Lua filter.

use schemars::JsonSchema;
use serde::Deserialize;

use super::wasm_plugin::{FailStrategy, PluginType, PullPolicy, TrafficSelector, VmConfig};
use crate::{LabelSelector, PolicyTargetReference};

/// A WebAssembly or Lua filter for some workloads; exactly one of wasm and lua.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TrafficExtension {
    /// Workloads; none is all of the namespace.
    pub selector: Option<LabelSelector>,
    /// Targets instead of workloads.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Where in the filter chain.
    pub phase: ExtensionPhase,
    /// Order within a phase, highest first.
    pub priority: Option<i32>,
    /// Which traffic.
    #[serde(rename = "match")]
    pub matches: Vec<TrafficSelector>,
    /// A WebAssembly module.
    pub wasm: Option<Wasm>,
    /// A Lua script.
    pub lua: Option<Lua>,
}

/// Where in the filter chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ExtensionPhase {
    /// At the end, before the router.
    #[default]
    Unspecified,
    /// Before authentication.
    Authn,
    /// After authentication, before authorization.
    Authz,
    /// After authorization, before statistics.
    Stats,
}

/// A WebAssembly module.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["url"]))]
pub struct Wasm {
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
    /// HTTP or network filter.
    #[serde(rename = "type")]
    pub plugin_type: PluginType,
    /// What happens when it fails.
    pub fail_strategy: FailStrategy,
    /// Environment of the module.
    pub vm_config: Option<VmConfig>,
}

/// A Lua script.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["inlineCode"]))]
pub struct Lua {
    /// The script, 1 to 65536 characters.
    pub inline_code: String,
}
