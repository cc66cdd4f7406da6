//! TLS between the control plane and its clients: the server is known by its DNS name, the client by a certificate, or by a token that it
//! sends inside.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::ca::Leaf;
use crate::spiffe::SpiffeId;
use crate::trust::{self, TrustBundle};

/// Why a configuration could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// A key or certificate can't be read.
    #[error("reading the PEM text of a certificate or its key: {0}")]
    Pem(String),
    /// The roots can't verify anybody.
    #[error("making a verifier of client certificates: {0}")]
    Verifier(String),
    /// rustls refused the parts.
    #[error("making a TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
}

/// A server that presents `leaf` and takes clients without a certificate, and those with one that leads to `trusted`. TLS 1.2 and 1.3,
/// HTTP/2. Sessions are not resumed: a resumed session carries the certificate of before, whatever is trusted now.
///
/// # Errors
/// Parts that rustls does not take.
pub fn server(leaf: &Leaf, trusted: &TrustBundle) -> Result<Arc<ServerConfig>, ChannelError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots(trusted)?),
        Arc::clone(&provider),
    )
    .allow_unauthenticated()
    .build()
    .map_err(|error| ChannelError::Verifier(error.to_string()))?;
    let (chain, key) = pair(leaf)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// A client that trusts servers below `trusted`, and presents `leaf` where it has one. TLS 1.2 and 1.3, HTTP/2, nothing resumed.
///
/// # Errors
/// Parts that rustls does not take.
pub fn client(
    trusted: &TrustBundle,
    leaf: Option<&Leaf>,
) -> Result<Arc<ClientConfig>, ChannelError> {
    let provider: Arc<CryptoProvider> = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(trusted)?);
    let mut config = match leaf {
        None => builder.with_no_client_auth(),
        Some(leaf) => {
            let (chain, key) = pair(leaf)?;
            builder.with_client_auth_cert(chain, key)?
        }
    };
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// The workload behind a verified client certificate: its only URI (X.509-SVID section 2: exactly one).
#[must_use]
pub fn workload(certificate: &CertificateDer<'_>) -> Option<SpiffeId> {
    let described = trust::described(certificate).ok()?;
    match &described.uris[..] {
        [uri] => uri.parse().ok(),
        _ => None,
    }
}

fn roots(trusted: &TrustBundle) -> Result<RootCertStore, ChannelError> {
    let mut roots = RootCertStore::empty();
    for der in trusted.ders() {
        roots.add(CertificateDer::from(der.clone()))?;
    }
    Ok(roots)
}

fn pair(
    leaf: &Leaf,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), ChannelError> {
    let pem = |error: rustls_pki_types::pem::Error| ChannelError::Pem(error.to_string());
    let chain = CertificateDer::pem_slice_iter(leaf.chain_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(pem)?;
    let key = PrivateKeyDer::from_pem_slice(leaf.key_pem.as_bytes()).map_err(pem)?;
    Ok((chain, key))
}
