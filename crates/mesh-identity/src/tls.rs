//! rustls configurations from PEM text, with aws-lc-rs as the one crypto provider.

use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::ca::Leaf;

/// Why a TLS configuration could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// PEM text can't be read.
    #[error("reading the PEM text of {what}: {reason}")]
    Pem {
        /// What the text was meant to be.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// rustls refused the parts.
    #[error("making a TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
}

/// A server configuration that presents `leaf` and asks no certificate of clients; TLS 1.2 and 1.3. `alpn` in order of preference.
pub fn server_config(leaf: &Leaf, alpn: &[&str]) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = certificates(&leaf.chain_pem)?;
    let key = PrivateKeyDer::from_pem_slice(leaf.key_pem.as_bytes()).map_err(|e| pem("key", &e))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    Ok(Arc::new(config))
}

/// A client configuration that trusts the certificates in `roots_pem` and nobody else.
pub fn client_config(roots_pem: &str, alpn: &[&str]) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(roots_pem)? {
        roots.add(certificate)?;
    }
    if roots.is_empty() {
        return Err(TlsError::Pem {
            what: "trusted certificates",
            reason: "there is no certificate in it".to_owned(),
        });
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    Ok(Arc::new(config))
}

fn certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| pem("certificates", &e))
}

fn pem(what: &'static str, error: &rustls_pki_types::pem::Error) -> TlsError {
    TlsError::Pem {
        what,
        reason: error.to_string(),
    }
}
