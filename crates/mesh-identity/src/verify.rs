//! Whose certificate it is: the names in a certificate, and verifiers that look at them.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::X509Name;

use crate::UnixSeconds;
use crate::tls::TlsError;

/// The names in a certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CertificateNames {
    /// URI names, in the order of the certificate.
    pub uri: Vec<String>,
    /// DNS names.
    pub dns: Vec<String>,
    /// Addresses as text.
    pub ip: Vec<String>,
    /// Mail addresses.
    pub email: Vec<String>,
    /// Subject in the form of RFC 2253.
    pub subject: String,
    /// Issuer in the form of RFC 2253.
    pub issuer: String,
    /// Serial number, lower-case hex.
    pub serial: String,
    /// Begin of its validity.
    pub not_before: UnixSeconds,
    /// End of its validity.
    pub not_after: UnixSeconds,
}

impl CertificateNames {
    /// Reads them from DER. Nothing is verified here.
    pub fn of(certificate: &[u8]) -> Result<Self, TlsError> {
        let broken = |reason: String| TlsError::Certificate { reason };
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|e| broken(e.to_string()))?;
        let seconds = |time: i64| UnixSeconds::try_from(time).unwrap_or(0);
        let mut names = Self {
            subject: rfc2253(parsed.subject()),
            issuer: rfc2253(parsed.issuer()),
            serial: hex(parsed.raw_serial()),
            not_before: seconds(parsed.validity().not_before.timestamp()),
            not_after: seconds(parsed.validity().not_after.timestamp()),
            ..Self::default()
        };
        for extension in parsed.extensions() {
            let ParsedExtension::SubjectAlternativeName(san) = extension.parsed_extension() else {
                continue;
            };
            for name in &san.general_names {
                match name {
                    GeneralName::URI(uri) => names.uri.push((*uri).to_owned()),
                    GeneralName::DNSName(dns) => names.dns.push((*dns).to_owned()),
                    GeneralName::RFC822Name(mail) => names.email.push((*mail).to_owned()),
                    GeneralName::IPAddress(bytes) => names.ip.extend(address(bytes)),
                    _ => {}
                }
            }
        }
        Ok(names)
    }
}

fn address(bytes: &[u8]) -> Option<String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(std::net::IpAddr::from(v4).to_string());
    }
    let v6 = <[u8; 16]>::try_from(bytes).ok()?;
    Some(std::net::IpAddr::from(v6).to_string())
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// RFC 2253: the last name first, special characters escaped (section 2.4).
fn rfc2253(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = name
        .iter_rdn()
        .map(|rdn| {
            let attributes: Vec<String> = rdn
                .iter()
                .map(|attribute| {
                    let oid = attribute.attr_type();
                    let key =
                        x509_parser::objects::oid2abbrev(oid, x509_parser::objects::oid_registry());
                    let value = attribute.as_str().unwrap_or("");
                    match key {
                        Ok(key) => format!("{key}={}", escaped(value)),
                        Err(_) => format!("{}={}", oid.to_id_string(), escaped(value)),
                    }
                })
                .collect();
            attributes.join("+")
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

/// Also control characters and what is not ASCII, as OpenSSL does it (`XN_FLAG_RFC2253`).
fn escaped(value: &str) -> String {
    use fmt::Write as _;
    let mut out = String::with_capacity(value.len());
    let last = value.len().saturating_sub(1);
    for (i, byte) in value.bytes().enumerate() {
        let special = b",+\"\\<>;".contains(&byte)
            || (i == 0 && matches!(byte, b'#' | b' '))
            || (i == last && byte == b' ');
        // Writing to a String cannot fail.
        let _ = match byte {
            0x20..0x7f if special => write!(out, "\\{}", char::from(byte)),
            0x20..0x7f => write!(out, "{}", char::from(byte)),
            _ => write!(out, "\\{byte:02X}"),
        };
    }
    out
}

/// What a certificate is asked: its names, and it in DER.
pub type NameCheck = Arc<dyn Fn(&CertificateNames, &[u8]) -> bool + Send + Sync>;

/// Whom a side of a connection trusts.
#[derive(Clone)]
pub struct Trust {
    /// The certificates of the authorities.
    pub roots: Arc<RootCertStore>,
    /// Certificates that were called back.
    pub revoked: Vec<CertificateRevocationListDer<'static>>,
    /// Whose certificates are good, of those that the authorities have signed; `None` takes all.
    pub names: Option<NameCheck>,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("roots", &self.roots.len())
            .field("revoked", &self.revoked.len())
            .field("names", &self.names.is_some())
            .finish()
    }
}

impl Trust {
    /// A verifier of clients' certificates. `required`: a client without one is refused. `only_leaf_revoked`: only the leaf is looked up
    /// in the revocation lists.
    pub fn of_clients(
        self,
        provider: &Arc<CryptoProvider>,
        required: bool,
        only_leaf_revoked: bool,
    ) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let mut builder =
            WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider.clone());
        if !self.revoked.is_empty() {
            builder = builder
                .with_crls(self.revoked)
                .allow_unknown_revocation_status();
        }
        if only_leaf_revoked {
            builder = builder.only_check_end_entity_revocation();
        }
        if !required {
            builder = builder.allow_unauthenticated();
        }
        let chain = builder.build().map_err(|error| TlsError::Trust {
            reason: error.to_string(),
        })?;
        Ok(Arc::new(Clients {
            chain,
            names: self.names,
        }))
    }

    /// A verifier of servers' certificates. `match_server_name`: the certificate must be for the name that the connection asks for.
    pub fn of_servers(
        self,
        provider: &Arc<CryptoProvider>,
        match_server_name: bool,
        only_leaf_revoked: bool,
    ) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        let mut builder =
            WebPkiServerVerifier::builder_with_provider(self.roots.clone(), provider.clone());
        if !self.revoked.is_empty() {
            builder = builder
                .with_crls(self.revoked)
                .allow_unknown_revocation_status();
        }
        if only_leaf_revoked {
            builder = builder.only_check_end_entity_revocation();
        }
        let chain = builder.build().map_err(|error| TlsError::Trust {
            reason: error.to_string(),
        })?;
        Ok(Arc::new(Servers {
            chain,
            match_server_name,
            names: self.names,
        }))
    }
}

/// A verifier of servers that takes any certificate, as Envoy does where a cluster names no authority. The server must still hold the
/// certificate's key, and the certificate the names that are asked.
pub fn any_server(
    provider: &Arc<CryptoProvider>,
    names: Option<NameCheck>,
) -> Arc<dyn ServerCertVerifier> {
    Arc::new(Anyone(provider.clone(), names))
}

/// SHA-256 of a certificate's public key info and of the certificate itself; `None` where it cannot be read.
pub fn hashes(certificate: &[u8]) -> Option<([u8; 32], [u8; 32])> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some((sha256(parsed.subject_pki.raw)?, sha256(certificate)?))
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> Option<[u8; 32]> {
    let suite = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13()?;
    let hash = suite.common.hash_provider.hash(bytes);
    hash.as_ref().try_into().ok()
}

fn check(names: Option<&NameCheck>, certificate: &CertificateDer<'_>) -> Result<(), Error> {
    let Some(holds) = names else { return Ok(()) };
    let read = CertificateNames::of(certificate)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    match holds(&read, certificate) {
        true => Ok(()),
        false => Err(Error::InvalidCertificate(CertificateError::NotValidForName)),
    }
}

struct Clients {
    chain: Arc<dyn ClientCertVerifier>,
    names: Option<NameCheck>,
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clients").finish_non_exhaustive()
    }
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn offer_client_auth(&self) -> bool {
        self.chain.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(certificate, intermediates, now)?;
        check(self.names.as_ref(), certificate)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

struct Servers {
    chain: Arc<WebPkiServerVerifier>,
    match_server_name: bool,
    names: Option<NameCheck>,
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Servers").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain =
            self.chain
                .verify_server_cert(certificate, intermediates, server_name, ocsp, now);
        match chain {
            Ok(_) => {}
            // The name is looked at last, so the chain is good; SPIFFE certificates are not for the name that was asked for.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.match_server_name => {}
            Err(error) => return Err(error),
        }
        check(self.names.as_ref(), certificate)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

struct Anyone(Arc<CryptoProvider>, Option<NameCheck>);

impl fmt::Debug for Anyone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Anyone").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        check(self.1.as_ref(), certificate)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_escaped_as_openssl_does_it() {
        assert_eq!(escaped("a,b\"c"), "a\\,b\\\"c");
        assert_eq!(escaped(" x "), "\\ x\\ ");
        assert_eq!(escaped("M\u{fc}ller\n"), "M\\C3\\BCller\\0A");
    }
}
