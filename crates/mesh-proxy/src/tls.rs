//! TLS on both sides of the proxy: rustls configurations made of compiled settings and secrets, handshakes, protected streams.
//!
//! Settings are in `mesh_routing::tls`, keys and authorities in [`crate::secrets`]. [`contexts`] joins them, once for each change of either;
//! [`accept`] and [`connect`] run handshakes. What is resumed was verified under the authorities that hold now: a change of trust makes new
//! tickets and forgets sessions.

pub mod accept;
pub mod connect;
pub mod contexts;
pub mod counters;
mod tickets;
pub mod wire;

use mesh_identity::tls::TlsError;
use rustls::{CipherSuite, ProtocolVersion};

/// Why there is no TLS connection.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// A secret is not there (yet).
    #[error("secret {0:?} is not there")]
    NotReady(String),
    /// The settings and secrets do not make a configuration.
    #[error("{0}")]
    Config(#[from] TlsError),
    /// The handshake failed.
    #[error("{0}")]
    Failed(#[from] std::io::Error),
    /// It took too long.
    #[error("the handshake took too long")]
    Timeout,
    /// The client asks for no server name, which the settings require.
    #[error("the client asks for no server name")]
    NoServerName,
    /// A resumed session belongs to a certificate that is not valid any more.
    #[error("the certificate of the resumed session has expired")]
    Expired,
    /// Too many handshakes are under way.
    #[error("too many handshakes are under way")]
    Overload,
}

impl HandshakeError {
    /// What rustls says, where it was asked.
    pub fn tls(&self) -> Option<&rustls::Error> {
        match self {
            Self::Failed(error) => error.get_ref()?.downcast_ref::<rustls::Error>(),
            _ => None,
        }
    }
}

/// As Envoy writes it.
pub(crate) fn version_name(version: Option<ProtocolVersion>) -> &'static str {
    match version {
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
        Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
        _ => "",
    }
}

/// As OpenSSL writes it.
pub(crate) fn cipher_name(suite: Option<CipherSuite>) -> &'static str {
    match suite {
        Some(CipherSuite::TLS13_AES_128_GCM_SHA256) => "TLS_AES_128_GCM_SHA256",
        Some(CipherSuite::TLS13_AES_256_GCM_SHA384) => "TLS_AES_256_GCM_SHA384",
        Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256) => "TLS_CHACHA20_POLY1305_SHA256",
        Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256) => {
            "ECDHE-ECDSA-AES128-GCM-SHA256"
        }
        Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384) => {
            "ECDHE-ECDSA-AES256-GCM-SHA384"
        }
        Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256) => {
            "ECDHE-ECDSA-CHACHA20-POLY1305"
        }
        Some(CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256) => "ECDHE-RSA-AES128-GCM-SHA256",
        Some(CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384) => "ECDHE-RSA-AES256-GCM-SHA384",
        Some(CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256) => {
            "ECDHE-RSA-CHACHA20-POLY1305"
        }
        _ => "",
    }
}
