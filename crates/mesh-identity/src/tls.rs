//! rustls configurations from PEM text, with aws-lc-rs as the one crypto provider.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509Version};

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

/// A certificate chain (leaf first) with its key, which must be the leaf's. The leaf may be of X.509 v1, which rustls does not read but can show:
/// `openssl x509 -req`, as in Istio's own tasks, makes those where nobody asks for extensions.
pub fn certified_key(chain_pem: &str, key_pem: &str) -> Result<CertifiedKey, TlsError> {
    let chain = split_certificates(chain_pem)?;
    let key = key(key_pem)?;
    let provider = aws_lc_rs::default_provider();
    let is_first = |leaf: &CertificateDer<'_>| {
        X509Certificate::from_der(leaf).is_ok_and(|(_, leaf)| leaf.version() == X509Version::V1)
    };
    if !chain.first().is_some_and(is_first) {
        return Ok(CertifiedKey::from_der(chain, key, &provider)?);
    }
    let key = provider.key_provider.load_private_key(key)?;
    let leaf = chain.first().map_or(&[][..], |leaf| leaf.as_ref());
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|error| TlsError::Certificate {
        reason: error.to_string(),
    })?;
    let public = key.public_key();
    if public.is_none_or(|public| public.as_ref() != leaf.public_key().raw) {
        let mismatch = rustls::InconsistentKeys::KeyMismatch;
        return Err(rustls::Error::InconsistentKeys(mismatch).into());
    }
    Ok(CertifiedKey::new(chain, key))
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

#[cfg(test)]
mod tests {
    use base64::Engine as _;

    use super::*;

    /// The values in a sequence of DER, each with its tag and length (X.690 section 8.1).
    fn parts(sequence: &[u8]) -> Vec<&[u8]> {
        let mut rest = &sequence[header(sequence).0..];
        let mut all = Vec::new();
        while !rest.is_empty() {
            let (before, length) = header(rest);
            let (part, after) = rest.split_at(before + length);
            all.push(part);
            rest = after;
        }
        all
    }

    /// How long tag and length are, and what follows.
    fn header(der: &[u8]) -> (usize, usize) {
        match usize::from(der[1]) {
            short @ 0..=0x7f => (2, short),
            long => {
                let bytes = long & 0x7f;
                let length = der[2..2 + bytes].iter();
                (2 + bytes, length.fold(0, |n, b| n << 8 | usize::from(*b)))
            }
        }
    }

    fn sequence(parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        [&[0x30, 0x82][..], &length, &content].concat()
    }

    /// As `openssl x509 -req` makes it without a file of extensions.
    #[test]
    fn a_certificate_of_the_first_version_can_be_shown() {
        let made = rcgen::generate_simple_self_signed(["example.com".to_owned()]).unwrap();
        let der = made.cert.der();
        let outer = parts(der);
        let inner = parts(outer[0]);
        // Version 1 is the default, and has no extensions (RFC 5280 section 4.1.2.1).
        let first = sequence(&[&sequence(&inner[1..7]), outer[1], outer[2]]);
        assert_eq!(X509Certificate::from_der(&first).unwrap().1.version().0, 0);
        let text = base64::engine::general_purpose::STANDARD.encode(first);
        let pem = format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n");
        let key = made.signing_key.serialize_pem();
        assert!(certified_key(&pem, &key).is_ok());
        let other = rcgen::KeyPair::generate().unwrap().serialize_pem();
        let error = certified_key(&pem, &other).unwrap_err();
        assert!(matches!(
            error,
            TlsError::Rustls(rustls::Error::InconsistentKeys(_))
        ));
    }
}
