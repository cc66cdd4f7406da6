//! Protocol versions, cipher suites and key exchange groups.

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol;

use crate::error::{CompileError, Result, every_field};

/// A TLS version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// RFC 5246.
    Tls12,
    /// RFC 8446.
    Tls13,
}

/// A cipher suite of TLS 1.2; those of 1.3 are not configurable, as in Envoy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the registry's")]
pub enum Suite {
    EcdheEcdsaAes128,
    EcdheEcdsaAes256,
    EcdheEcdsaChacha20,
    EcdheRsaAes128,
    EcdheRsaAes256,
    EcdheRsaChacha20,
}

/// A key exchange group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Curve25519.
    X25519,
    /// NIST P-256.
    P256,
    /// NIST P-384.
    P384,
    /// Curve25519 with ML-KEM 768: holds against quantum computers, too.
    X25519MlKem768,
}

/// What may be spoken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// The oldest version.
    pub min: Version,
    /// The newest version. (Envoy's clients stop at 1.2 unless told otherwise; ours do not.)
    pub max: Version,
    /// In order of preference; empty means all.
    pub suites: Vec<Suite>,
    /// In order of preference; empty means X25519, P-256 and P-384.
    pub groups: Vec<Group>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            min: Version::Tls12,
            max: Version::Tls13,
            suites: Vec::new(),
            groups: Vec::new(),
        }
    }
}

impl Params {
    pub(super) fn compile(m: &pb::TlsParameters) -> Result<Self> {
        every_field!(m, pb::TlsParameters,
            used { tls_minimum_protocol_version, tls_maximum_protocol_version, cipher_suites, ecdh_curves }
            irrelevant {}
            refused { signature_algorithms, compliance_policies });
        let default = Self::default();
        let params = Self {
            min: version(
                "tls_minimum_protocol_version",
                m.tls_minimum_protocol_version,
                default.min,
            )?,
            max: version(
                "tls_maximum_protocol_version",
                m.tls_maximum_protocol_version,
                default.max,
            )?,
            suites: suites(&m.cipher_suites)?,
            groups: m
                .ecdh_curves
                .iter()
                .map(|name| group(name))
                .collect::<Result<_>>()?,
        };
        if params.min > params.max {
            return Err(CompileError::new(
                "tls_maximum_protocol_version",
                "is older than tls_minimum_protocol_version",
            ));
        }
        if params.suites.is_empty() && !m.cipher_suites.is_empty() && params.min == Version::Tls12 {
            return Err(CompileError::new(
                "cipher_suites",
                "this proxy has none of them (it has ECDHE with AES-GCM and CHACHA20-POLY1305)",
            ));
        }
        Ok(params)
    }
}

fn version(field: &str, value: i32, default: Version) -> Result<Version> {
    match TlsProtocol::try_from(value) {
        Ok(TlsProtocol::TlsAuto) => Ok(default),
        Ok(TlsProtocol::TlSv12) => Ok(Version::Tls12),
        Ok(TlsProtocol::TlSv13) => Ok(Version::Tls13),
        Ok(old) => Err(CompileError::new(
            field,
            format!(
                "{} is broken and not implemented; TLSv1_2 is the oldest here",
                old.as_str_name()
            ),
        )),
        Err(_) => Err(CompileError::new(field, "is unknown")),
    }
}

/// Entries may be groups of equal rank (`[A|B]`), which are taken in the order in which they are written.
fn suites(list: &[String]) -> Result<Vec<Suite>> {
    let mut all = Vec::new();
    for entry in list {
        let names = entry.trim_start_matches('[').trim_end_matches(']');
        for name in names.split('|') {
            let suite = match name {
                "ECDHE-ECDSA-AES128-GCM-SHA256" => Suite::EcdheEcdsaAes128,
                "ECDHE-ECDSA-AES256-GCM-SHA384" => Suite::EcdheEcdsaAes256,
                "ECDHE-ECDSA-CHACHA20-POLY1305" => Suite::EcdheEcdsaChacha20,
                "ECDHE-RSA-AES128-GCM-SHA256" => Suite::EcdheRsaAes128,
                "ECDHE-RSA-AES256-GCM-SHA384" => Suite::EcdheRsaAes256,
                "ECDHE-RSA-CHACHA20-POLY1305" => Suite::EcdheRsaChacha20,
                "AES128-GCM-SHA256" | "AES256-GCM-SHA384" => continue,
                other => {
                    let reason = format!("{other:?} is not implemented by this proxy");
                    return Err(CompileError::new("cipher_suites", reason));
                }
            };
            if !all.contains(&suite) {
                all.push(suite);
            }
        }
    }
    Ok(all)
}

fn group(name: &str) -> Result<Group> {
    match name {
        "X25519" => Ok(Group::X25519),
        "P-256" => Ok(Group::P256),
        "P-384" => Ok(Group::P384),
        "X25519MLKEM768" => Ok(Group::X25519MlKem768),
        other => Err(CompileError::new(
            "ecdh_curves",
            format!("{other:?} is not implemented by this proxy"),
        )),
    }
}
