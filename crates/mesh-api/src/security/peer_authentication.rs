//! PeerAuthentication: whether mutual TLS is asked of peers.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::LabelSelector;

/// Whether mutual TLS is asked of peers.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PeerAuthentication {
    /// Workloads; none is all of the namespace.
    pub selector: Option<LabelSelector>,
    /// For all ports.
    pub mtls: Option<MutualTls>,
    /// For single ports of the workload, by number.
    pub port_level_mtls: BTreeMap<String, MutualTls>,
}

/// Setting of mutual TLS.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MutualTls {
    /// Mode.
    pub mode: MutualTlsMode,
}

/// Modes of mutual TLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MutualTlsMode {
    /// Inherited; PERMISSIVE at last.
    #[default]
    Unset,
    /// Plain text.
    Disable,
    /// Both.
    Permissive,
    /// Mutual TLS only.
    Strict,
}
