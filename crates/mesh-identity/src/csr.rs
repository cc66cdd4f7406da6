//! Certificate requests (PKCS #10, RFC 2986) of workloads: what is taken from them, and what is refused.
//!
//! Only the public key is taken. Who the certificate is for comes from the caller's credentials, never from the request; a request
//! that asks for anything else than that is refused as a whole, so that an attempt is seen.

use rcgen::SubjectPublicKeyInfo;
use x509_parser::certification_request::{X509CertificationRequest, X509CertificationRequestInfo};
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

use crate::spiffe::SpiffeId;

/// Largest request that is looked at, in bytes of PEM. One with an RSA key of 8,192 bits has 3 KiB.
pub const MAX_REQUEST_BYTES: usize = 16 * 1024;
/// Smallest RSA key, in bits (CA/Browser Forum baseline requirements, section 6.1.5).
const MIN_RSA_BITS: usize = 2048;
/// Largest RSA key, in bits: what verifiers accept.
const MAX_RSA_BITS: usize = 8192;
/// OID of P-256 and P-384, the curves that every TLS implementation has.
const CURVES: [&str; 2] = ["1.2.840.10045.3.1.7", "1.3.132.0.34"];
const EC_KEY: &str = "1.2.840.10045.2.1";

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Longer than [`MAX_REQUEST_BYTES`].
    #[error("the certificate request has {0} bytes, more than {MAX_REQUEST_BYTES}")]
    TooLarge(usize),
    /// Not PEM, not a request, or with bytes after its end.
    #[error("the certificate request can't be read: {0}; send one PEM block CERTIFICATE REQUEST")]
    Malformed(String),
    /// The signature does not belong to the key in the request: the sender may not have the key.
    #[error(
        "the signature of the certificate request is wrong, or of an algorithm that is not accepted"
    )]
    Signature,
    /// A key that is too weak, too large, or of a kind that peers can't use.
    #[error(
        "the key in the certificate request is {0}; use ECDSA P-256 or P-384, or RSA with 2,048 to 8,192 bits"
    )]
    Key(String),
    /// A name that the caller does not have.
    #[error("the certificate request asks for the name {asked}, the caller is {caller}")]
    Name {
        /// What was asked for.
        asked: String,
        /// Who asks.
        caller: String,
    },
    /// A certificate that could itself issue others.
    #[error("the certificate request asks for a certificate authority")]
    Authority,
    /// A subject, which a signer elsewhere would certify as it is.
    #[error(
        "the certificate request names the subject {0:?}; leave the subject empty: the name is the SPIFFE id"
    )]
    Subject(String),
    /// An extension that no workload needs.
    #[error("the certificate request asks for the extension {0}, which no workload gets")]
    Extension(String),
}

impl CsrError {
    /// Whether the request could not be read at all, as opposed to asking for what it must not have.
    #[must_use]
    pub fn is_unreadable(&self) -> bool {
        matches!(self, Self::TooLarge(_) | Self::Malformed(_))
    }
}

/// A request that was found good: the key to be certified.
#[derive(Debug)]
pub struct CertificateRequest {
    pub(crate) key: SubjectPublicKeyInfo,
    /// The same, DER.
    pub(crate) key_der: Vec<u8>,
}

/// Checks a request of a caller who may be called by any of `identities` (its own, and the same in other names of the trust domain);
/// the first one is the caller as errors name it.
///
/// # Errors
/// See [`CsrError`].
pub fn check(pem: &str, identities: &[SpiffeId]) -> Result<CertificateRequest, CsrError> {
    let block = block(pem)?;
    let request = request(&block)?;
    // The key comes first: a weak one is named as such, not as a signature that can't be checked.
    let info = &request.certification_request_info;
    let key = key(info.subject_pki.raw, &info.subject_pki)?;
    request
        .verify_signature()
        .map_err(|_| CsrError::Signature)?;
    for extension in request.requested_extensions().into_iter().flatten() {
        allowed(extension, identities)?;
    }
    Ok(CertificateRequest {
        key,
        key_der: info.subject_pki.raw.to_vec(),
    })
}

/// As [`check`], for a request that a signer elsewhere will read: it must ask for one of the names, and hold nothing that a signer could
/// take for more. A signer takes the subject as it is, and software differs in which of two attributes it reads.
///
/// # Errors
/// See [`CsrError`].
pub fn check_for_signer(
    pem: &str,
    identities: &[SpiffeId],
) -> Result<CertificateRequest, CsrError> {
    let checked = check(pem, identities)?;
    let block = block(pem)?;
    let request = request(&block)?;
    let info = &request.certification_request_info;
    for attribute in info.subject.iter_attributes() {
        // Istio's agents send an organization without a name.
        if !attribute.attr_value().data.is_empty() {
            return Err(CsrError::Subject(shown(&info.subject.to_string())));
        }
    }
    let mut requests = 0;
    for attribute in info.iter_attributes() {
        match attribute.parsed_attribute() {
            ParsedCriAttribute::ExtensionRequest(_) => requests += 1,
            _ => {
                let text = format!("as attribute {}", attribute.oid.to_id_string());
                return Err(CsrError::Extension(text));
            }
        }
    }
    let is_name = |extension: &&ParsedExtension<'_>| matches!(extension, ParsedExtension::SubjectAlternativeName(names) if names.general_names.len() == 1);
    let extensions = request.requested_extensions().into_iter().flatten();
    let named = extensions.filter(is_name).count();
    let extensions = request.requested_extensions().into_iter().flatten().count();
    let distinct = request_oids(info);
    if requests != 1 || named != 1 || distinct != extensions {
        let caller = identities.first().map(ToString::to_string);
        return Err(CsrError::Name {
            asked: "(none, or several times)".to_owned(),
            caller: caller.unwrap_or_default(),
        });
    }
    Ok(checked)
}

/// How many different extensions are asked for.
fn request_oids(info: &X509CertificationRequestInfo<'_>) -> usize {
    let mut oids = std::collections::BTreeSet::new();
    for attribute in info.iter_attributes() {
        if let ParsedCriAttribute::ExtensionRequest(asked) = attribute.parsed_attribute() {
            let names = asked.extensions.iter();
            oids.extend(names.map(|extension| extension.oid.to_id_string()));
        }
    }
    oids.len()
}

/// Reads a request of anybody for anything, as a Kubernetes API takes it: one PEM block with a good signature. Gives the organizations
/// of its subject, which are groups where a signer certifies users.
///
/// # Errors
/// [`CsrError::TooLarge`], [`CsrError::Malformed`], [`CsrError::Signature`].
pub fn organizations(pem: &str) -> Result<Vec<String>, CsrError> {
    let block = block(pem)?;
    let request = request(&block)?;
    request
        .verify_signature()
        .map_err(|_| CsrError::Signature)?;
    let subject = &request.certification_request_info.subject;
    let organizations = subject.iter_organization();
    Ok(organizations
        .map(|name| String::from_utf8_lossy(name.attr_value().data).into_owned())
        .collect())
}

/// The one PEM block of a request.
fn block(pem: &str) -> Result<x509_parser::pem::Pem, CsrError> {
    if pem.len() > MAX_REQUEST_BYTES {
        return Err(CsrError::TooLarge(pem.len()));
    }
    let malformed = |reason: &str| CsrError::Malformed(reason.to_owned());
    let (rest, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes())
        .map_err(|error| CsrError::Malformed(error.to_string()))?;
    if !rest.iter().all(u8::is_ascii_whitespace) {
        return Err(malformed("there is text after its end"));
    }
    // Both labels are in use (RFC 7468 section 7).
    if !matches!(
        block.label.as_str(),
        "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST"
    ) {
        return Err(malformed("it is a PEM block of another kind"));
    }
    Ok(block)
}

fn request(block: &x509_parser::pem::Pem) -> Result<X509CertificationRequest<'_>, CsrError> {
    let (rest, request) = X509CertificationRequest::from_der(&block.contents)
        .map_err(|error| CsrError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed(
            "there are bytes after its end".to_owned(),
        ));
    }
    Ok(request)
}

/// Makes a key (ECDSA P-256) and a request for `identity` with it: what a workload sends. Gives the request and the key, both PEM.
///
/// # Errors
/// When the system has no random numbers.
pub fn make(identity: &SpiffeId) -> Result<(String, String), rcgen::Error> {
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![rcgen::SanType::URI(identity.to_string().try_into()?)];
    let request = params.serialize_request(&key)?.pem()?;
    Ok((request, key.serialize_pem()))
}

/// Makes a key (ECDSA P-256) and a request for a server of these names with it. Gives the request and the key, both PEM.
///
/// # Errors
/// A name that can't stand in a certificate, or no random numbers.
pub fn make_server(dns_names: &[&str]) -> Result<(String, String), rcgen::Error> {
    let key = rcgen::KeyPair::generate()?;
    let names: Vec<String> = dns_names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = rcgen::CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    let request = params.serialize_request(&key)?.pem()?;
    Ok((request, key.serialize_pem()))
}

fn key(
    der: &[u8],
    info: &x509_parser::x509::SubjectPublicKeyInfo<'_>,
) -> Result<SubjectPublicKeyInfo, CsrError> {
    let algorithm = info.algorithm.algorithm.to_id_string();
    let parsed = info
        .parsed()
        .map_err(|_| CsrError::Key(format!("of the unknown algorithm {algorithm}")))?;
    match parsed {
        PublicKey::RSA(rsa) => {
            let bits = rsa.key_size();
            if !(MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) {
                return Err(CsrError::Key(format!("RSA with {bits} bits")));
            }
        }
        PublicKey::EC(_) if algorithm == EC_KEY => {
            let curve = info
                .algorithm
                .parameters
                .as_ref()
                .and_then(|p| p.as_oid().ok());
            let curve = curve.map(|oid| oid.to_id_string()).unwrap_or_default();
            if !CURVES.contains(&curve.as_str()) {
                return Err(CsrError::Key(format!("on the curve {curve:?}")));
            }
        }
        _ => return Err(CsrError::Key(format!("of the algorithm {algorithm}"))),
    }
    SubjectPublicKeyInfo::from_der(der).map_err(|error| CsrError::Key(error.to_string()))
}

fn allowed(extension: &ParsedExtension<'_>, identities: &[SpiffeId]) -> Result<(), CsrError> {
    match extension {
        ParsedExtension::SubjectAlternativeName(names) => names
            .general_names
            .iter()
            .try_for_each(|name| own(name, identities)),
        ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
            Err(CsrError::Authority)
        }
        ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() || usage.crl_sign() => {
            Err(CsrError::Authority)
        }
        ParsedExtension::BasicConstraints(_) | ParsedExtension::KeyUsage(_) => Ok(()),
        ParsedExtension::ExtendedKeyUsage(usage) => {
            let others = usage.any
                || usage.code_signing
                || usage.email_protection
                || usage.time_stamping
                || usage.ocsp_signing
                || !usage.other.is_empty();
            match others {
                true => Err(CsrError::Extension(
                    "extendedKeyUsage other than TLS".to_owned(),
                )),
                false => Ok(()),
            }
        }
        ParsedExtension::SubjectKeyIdentifier(_) => Ok(()),
        ParsedExtension::NameConstraints(_) => Err(CsrError::Authority),
        other => Err(CsrError::Extension(shown(&format!("{other:?}")))),
    }
}

/// Whether a name is the caller's. A wildcard, an address, a DNS name never is.
fn own(name: &GeneralName<'_>, identities: &[SpiffeId]) -> Result<(), CsrError> {
    if let GeneralName::URI(uri) = name
        && identities
            .iter()
            .any(|identity| identity.to_string() == *uri)
    {
        return Ok(());
    }
    let asked = match name {
        GeneralName::URI(text) | GeneralName::DNSName(text) | GeneralName::RFC822Name(text) => {
            shown(text)
        }
        other => shown(&other.to_string()),
    };
    let caller = identities
        .first()
        .map(ToString::to_string)
        .unwrap_or_default();
    Err(CsrError::Name { asked, caller })
}

/// A text of the sender as it may stand in a log: bounded, without control characters.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(200).collect();
    short.escape_debug().to_string()
}
