//! Namespace, ConfigMap, Secret, ServiceAccount.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::null_as_default;
use crate::meta::Meta;

/// A namespace; the mesh reads its labels.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// Metadata.
    #[serde(rename = "metadata")]
    pub meta: Meta,
}

/// Configuration as text by key.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ConfigMap {
    /// Metadata.
    #[serde(rename = "metadata")]
    pub meta: Meta,
    /// Values by key.
    #[serde(deserialize_with = "null_as_default")]
    pub data: BTreeMap<String, String>,
}

/// Secret data by key.
#[derive(Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Secret {
    /// Metadata.
    #[serde(rename = "metadata")]
    pub meta: Meta,
    /// Values by key, in base64.
    #[serde(deserialize_with = "null_as_default")]
    pub data: BTreeMap<String, String>,
    /// Type, for instance `kubernetes.io/tls`.
    #[serde(rename = "type")]
    pub secret_type: String,
}

impl Secret {
    /// The decoded value of a key; `None` if it is missing or not base64.
    pub fn bytes(&self, key: &str) -> Option<Vec<u8>> {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD
            .decode(self.data.get(key)?)
            .ok()
    }
}

impl std::fmt::Debug for Secret {
    /// Values are not shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret")
            .field("meta", &self.meta)
            .field("keys", &self.data.keys())
            .finish_non_exhaustive()
    }
}

/// A service account: an identity for pods.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ServiceAccount {
    /// Metadata.
    #[serde(rename = "metadata")]
    pub meta: Meta,
}
