//! ProxyConfig: settings of the proxies of some workloads.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::LabelSelector;

/// Settings of the proxies of some workloads.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// Workloads; none is all of the namespace.
    pub selector: Option<LabelSelector>,
    /// Worker threads; 0 is one per core.
    pub concurrency: Option<i32>,
    /// More environment variables of the proxy.
    pub environment_variables: BTreeMap<String, String>,
    /// Image of the proxy.
    pub image: Option<ProxyImage>,
}

/// Image of the proxy.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProxyImage {
    /// Variant, such as `distroless`.
    pub image_type: String,
}
