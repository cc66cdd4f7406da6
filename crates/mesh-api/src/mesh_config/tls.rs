//! TLS and path settings of the whole mesh.

use serde::Deserialize;

/// Limits for TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Lowest version; `TLS_AUTO` is 1.2.
    pub min_protocol_version: MinTlsVersion,
    /// Curves for key exchange in order of preference, by Envoy's names (`X25519`, `P-256`, `X25519MLKEM768`); none is the proxy's own list.
    pub ecdh_curves: Vec<String>,
    /// Cipher suites of TLS 1.2 by OpenSSL's names; none is the proxy's own list.
    pub cipher_suites: Vec<String>,
}

/// Lowest version of TLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum MinTlsVersion {
    /// 1.2.
    #[default]
    #[serde(rename = "TLS_AUTO")]
    Auto,
    /// 1.2.
    #[serde(rename = "TLSV1_2")]
    V1_2,
    /// 1.3.
    #[serde(rename = "TLSV1_3")]
    V1_3,
}

/// What is done to paths before anything looks at them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PathNormalization {
    /// Kind.
    pub normalization: PathNormalizationKind,
}

/// Kinds of path normalization; each does what the one before does, too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PathNormalizationKind {
    /// Nothing.
    None,
    /// RFC 3986: dot segments removed, unreserved characters decoded. `DEFAULT` means this.
    #[default]
    #[serde(alias = "DEFAULT")]
    Base,
    /// Slashes in a row become one.
    MergeSlashes,
    /// `%2F`, `%2f`, `%5C` and `%5c` are decoded first.
    DecodeAndMergeSlashes,
}
