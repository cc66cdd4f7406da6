//! rustls configurations from PEM text, with aws-lc-rs as the one crypto provider.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::sign::CertifiedKey;
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
    /// A certificate can't be read.
    #[error("reading a certificate: {reason}")]
    Certificate {
        /// What is wrong with it.
        reason: String,
    },
    /// Trusted certificates or revocation lists can't be used.
    #[error("using trusted certificates: {reason}")]
    Trust {
        /// What is wrong with them.
        reason: String,
    },
    /// rustls refused the parts.
    #[error("making a TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
}

/// The one crypto provider.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// A server configuration that presents `leaf` and asks no certificate of clients; TLS 1.2 and 1.3. `alpn` in order of preference.
pub fn server_config(leaf: &Leaf, alpn: &[&str]) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(split_certificates(&leaf.chain_pem)?, key(&leaf.key_pem)?)?;
    config.alpn_protocols = owned(alpn);
    Ok(Arc::new(config))
}

/// A client configuration that trusts the certificates in `roots_pem` and nobody else.
pub fn client_config(roots_pem: &str, alpn: &[&str]) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(roots_pem)?)
        .with_no_client_auth();
    config.alpn_protocols = owned(alpn);
    Ok(Arc::new(config))
}

fn owned(alpn: &[&str]) -> Vec<Vec<u8>> {
    alpn.iter().map(|p| p.as_bytes().to_vec()).collect()
}

/// The certificates in PEM text, in its order. Text without any is refused.
pub fn split_certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| pem("certificates", &e))?;
    match all.is_empty() {
        true => Err(TlsError::Pem {
            what: "certificates",
            reason: "there is no certificate in it".to_owned(),
        }),
        false => Ok(all),
    }
}

/// The certificates in PEM text as those to trust.
pub fn roots(text: &str) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in split_certificates(text)? {
        roots.add(certificate)?;
    }
    Ok(Arc::new(roots))
}

/// A certificate chain (leaf first) with its key, which must be the leaf's.
pub fn certified_key(chain_pem: &str, key_pem: &str) -> Result<CertifiedKey, TlsError> {
    let chain = split_certificates(chain_pem)?;
    let certified = CertifiedKey::from_der(chain, key(key_pem)?, &aws_lc_rs::default_provider())?;
    Ok(certified)
}

fn key(text: &str) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|e| pem("private key", &e))
}

fn pem(what: &'static str, error: &rustls_pki_types::pem::Error) -> TlsError {
    TlsError::Pem {
        what,
        reason: error.to_string(),
    }
}
