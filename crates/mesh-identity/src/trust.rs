//! What is trusted: sets of root certificates, and what a certificate says, for people and for the way of a rotation.

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::UnixSeconds;

/// Most certificates in a bundle; a text with more is refused.
pub const MAX_ROOTS: usize = 64;

/// Why certificates can't be used as what is trusted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The text is not PEM.
    #[error("reading certificates: {0}")]
    Pem(String),
    /// A certificate can't be read.
    #[error("reading a certificate: {0}")]
    Certificate(String),
    /// No certificate at all.
    #[error("there is no certificate in the text")]
    Empty,
    /// More than [`MAX_ROOTS`].
    #[error("there are {0} certificates, more than {MAX_ROOTS}")]
    TooMany(usize),
}

/// Root certificates, each once, in the order given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrustBundle {
    roots: Vec<Vec<u8>>,
    pem: String,
}

impl TrustBundle {
    /// Reads a bundle from PEM text.
    ///
    /// # Errors
    /// Text that holds no certificate, or one that can't be read.
    pub fn from_pem(pem: &str) -> Result<Self, TrustError> {
        Self::of(ders(pem)?)
    }

    /// This bundle with the certificates of another after it.
    ///
    /// # Errors
    /// More than [`MAX_ROOTS`] together.
    pub fn and(&self, other: &Self) -> Result<Self, TrustError> {
        Self::of(self.roots.iter().chain(&other.roots).cloned().collect())
    }

    /// This bundle with the certificate of this fingerprint at its begin.
    #[must_use]
    pub fn with_first(&self, first: &str) -> Self {
        let mut roots = self.roots.clone();
        // A stable sort: the others keep their order.
        roots.sort_by_key(|der| fingerprint(der) != first);
        let pem = roots.iter().map(|der| to_pem(der)).collect();
        Self { roots, pem }
    }

    fn of(all: Vec<Vec<u8>>) -> Result<Self, TrustError> {
        let mut roots: Vec<Vec<u8>> = Vec::with_capacity(all.len());
        for der in all {
            parse(&der)?;
            if !roots.contains(&der) {
                roots.push(der);
            }
        }
        match roots.len() {
            0 => return Err(TrustError::Empty),
            many if many > MAX_ROOTS => return Err(TrustError::TooMany(many)),
            _ => {}
        }
        let pem = roots.iter().map(|der| to_pem(der)).collect();
        Ok(Self { roots, pem })
    }

    /// All certificates, PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// All certificates, DER.
    pub fn ders(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.roots.iter()
    }

    /// The fingerprints of all, in order.
    pub fn fingerprints(&self) -> Vec<String> {
        self.roots.iter().map(|der| fingerprint(der)).collect()
    }

    /// The fingerprint of the root whose key signed the last certificate of a chain (PEM, without the root), or `None`.
    pub fn root_of(&self, chain_pem: &str) -> Option<String> {
        let ders = ders(chain_pem).ok()?;
        let last = parse(ders.last()?).ok()?;
        let signed = |root: &&Vec<u8>| {
            parse(root).is_ok_and(|root| {
                last.issuer() == root.subject()
                    && last.verify_signature(Some(root.public_key())).is_ok()
            })
        };
        self.roots.iter().find(signed).map(|root| fingerprint(root))
    }
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    /// Serial number, in hexadecimal digits.
    pub serial: String,
    /// Start of validity, seconds since 1970.
    pub not_before: UnixSeconds,
    /// End of validity.
    pub not_after: UnixSeconds,
    /// Whether it may issue others.
    pub is_ca: bool,
    /// The subject, in the form of RFC 4514.
    pub subject: String,
    /// The issuer.
    pub issuer: String,
    /// URIs among its names: of a workload's exactly one, its SPIFFE id.
    pub uris: Vec<String>,
    /// DNS names among its names.
    pub dns_names: Vec<String>,
    /// [`fingerprint`] of it.
    pub fingerprint: String,
}

/// What the certificates in a PEM text say, in their order.
///
/// # Errors
/// Text that is not PEM, or a certificate that can't be read.
pub fn describe(pem: &str) -> Result<Vec<Described>, TrustError> {
    ders(pem)?.iter().map(|der| described(der)).collect()
}

pub(crate) fn described(der: &[u8]) -> Result<Described, TrustError> {
    let certificate = parse(der)?;
    let mut uris = Vec::new();
    let mut dns_names = Vec::new();
    if let Ok(Some(names)) = certificate.subject_alternative_name() {
        for name in &names.value.general_names {
            match name {
                GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                GeneralName::DNSName(dns) => dns_names.push((*dns).to_owned()),
                _ => {}
            }
        }
    }
    let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
    let serial = certificate.raw_serial();
    Ok(Described {
        serial: serial.iter().map(|byte| format!("{byte:02x}")).collect(),
        not_before: seconds(certificate.validity().not_before.timestamp()),
        not_after: seconds(certificate.validity().not_after.timestamp()),
        is_ca: certificate.is_ca(),
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        uris,
        dns_names,
        fingerprint: fingerprint(der),
    })
}

/// SHA-256 of a certificate's DER, in hexadecimal digits.
#[must_use]
pub fn fingerprint(der: &[u8]) -> String {
    let mut hash = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256
        .tls13()
        .map(|suite| suite.common.hash_provider.start());
    if let Some(hash) = &mut hash {
        hash.update(der);
    }
    let digest = hash.map(|hash| hash.finish());
    digest
        .iter()
        .flat_map(|digest| digest.as_ref())
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The certificates of a PEM text, DER; none where the text is empty.
pub(crate) fn ders(pem: &str) -> Result<Vec<Vec<u8>>, TrustError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .map(|der| der.map(|der| der.to_vec()))
        .collect::<Result<_, _>>()
        .map_err(|error| TrustError::Pem(error.to_string()))
}

pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, TrustError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(TrustError::Certificate(
            "there are bytes after its end".to_owned(),
        )),
        Err(error) => Err(TrustError::Certificate(error.to_string())),
    }
}

/// A certificate as PEM (RFC 7468): lines of 64 characters.
pub(crate) fn to_pem(der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}
