//! Certificates that an authority elsewhere issued: whether they are what was asked for, before anybody gets them.

use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use crate::UnixSeconds;
use crate::csr::CertificateRequest;
use crate::spiffe::SpiffeId;
use crate::trust::{self, TrustBundle, TrustError};

/// Most certificates in an answer: the leaf and what leads to the root.
const MAX_CHAIN: usize = 16;
/// By how much the clock of an authority may be ahead of ours, in seconds.
const CLOCKS: u64 = 300;

/// Why a certificate is not handed on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IssuedError {
    /// Not PEM, no certificate, too many.
    #[error("it can't be read: {0}")]
    Unreadable(String),
    /// For another key than that of the request.
    #[error("it is for another key than the one in the request")]
    Key,
    /// Not exactly the name that was asked for.
    #[error("it is for {found:?}, not for {wanted}")]
    Names {
        /// What it says.
        found: String,
        /// What it should say.
        wanted: String,
    },
    /// It could issue others.
    #[error("it is a certificate authority's (CA:TRUE)")]
    Authority,
    /// It is not for both ends of TLS.
    #[error("its extended key usage leaves out {0}; a workload is client and server")]
    Usage(&'static str),
    /// Not valid now, or valid for too long.
    #[error("it is valid from {from} to {to} (seconds since 1970): {reason}")]
    Validity {
        /// Begin.
        from: UnixSeconds,
        /// End.
        to: UnixSeconds,
        /// What is wrong with that.
        reason: String,
    },
    /// It leads to no root that is trusted.
    #[error(
        "it leads to none of the signer's roots: {0}; correct caCertificates in the mesh configuration, or what the signer is set to"
    )]
    Chain(String),
}

impl From<TrustError> for IssuedError {
    fn from(error: TrustError) -> Self {
        Self::Unreadable(error.to_string())
    }
}

/// A certificate that was found good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The leaf and what leads to the root, in order, without the root, PEM.
    pub chain_pem: String,
    /// Fingerprint of the root.
    pub root: String,
    /// End of validity.
    pub not_after: UnixSeconds,
}

/// Judges the answer to a workload's request: the key of the request, one of `identities` as the only name, not an authority, for client
/// and server, valid now and for at most `max_lifetime` seconds, and leading to `trusted`.
///
/// # Errors
/// See [`IssuedError`].
pub fn workload(
    answer: &str,
    request: &CertificateRequest,
    identities: &[SpiffeId],
    trusted: &TrustBundle,
    now: UnixSeconds,
    max_lifetime: u64,
) -> Result<Issued, IssuedError> {
    let ders = read(answer)?;
    let leaf = trust::parse(&ders[0])?;
    if leaf.public_key().raw != request.key_der {
        return Err(IssuedError::Key);
    }
    let names = names(&leaf)?;
    let own = |name: &str| identities.iter().any(|id| id.to_string() == name);
    if !matches!(&names[..], [(true, name)] if own(name)) {
        let found: Vec<&str> = names.iter().map(|(_, name)| name.as_str()).collect();
        return Err(IssuedError::Names {
            found: found.join(", "),
            wanted: identities
                .first()
                .map(ToString::to_string)
                .unwrap_or_default(),
        });
    }
    let issued = common(&ders, &leaf, trusted, now)?;
    let from = seconds(leaf.validity().not_before.timestamp());
    if issued.not_after.saturating_sub(now) > max_lifetime.saturating_add(CLOCKS) {
        let reason =
            format!("more than {max_lifetime} seconds (MAX_WORKLOAD_CERT_TTL) are left of that");
        let to = issued.not_after;
        return Err(IssuedError::Validity { from, to, reason });
    }
    Ok(issued)
}

/// Judges the answer to a request of a server: the key, at least the names asked for, and leading to `trusted`.
///
/// # Errors
/// See [`IssuedError`].
pub fn server(
    answer: &str,
    key_pem: &str,
    dns_names: &[&str],
    trusted: &TrustBundle,
    now: UnixSeconds,
) -> Result<Issued, IssuedError> {
    let ders = read(answer)?;
    let leaf = trust::parse(&ders[0])?;
    let key = rcgen::KeyPair::from_pem(key_pem)
        .map_err(|error| IssuedError::Unreadable(error.to_string()))?;
    if leaf.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&key) {
        return Err(IssuedError::Key);
    }
    let names = names(&leaf)?;
    let has = |wanted: &&&str| names.iter().any(|(_, name)| name == **wanted);
    if let Some(missing) = dns_names.iter().find(|name| !has(name)) {
        let found: Vec<&str> = names.iter().map(|(_, name)| name.as_str()).collect();
        return Err(IssuedError::Names {
            found: found.join(", "),
            wanted: (*missing).to_owned(),
        });
    }
    common(&ders, &leaf, trusted, now)
}

fn read(answer: &str) -> Result<Vec<Vec<u8>>, IssuedError> {
    let ders = trust::ders(answer)?;
    match ders.len() {
        0 => Err(TrustError::Empty.into()),
        many if many > MAX_CHAIN => Err(TrustError::TooMany(many).into()),
        _ => Ok(ders),
    }
}

/// All names of a certificate, and whether each is a URI. A kind of name that is not read is a name too.
fn names(leaf: &X509Certificate<'_>) -> Result<Vec<(bool, String)>, IssuedError> {
    let found = leaf
        .subject_alternative_name()
        .map_err(|error| IssuedError::Unreadable(error.to_string()))?;
    let names = found
        .into_iter()
        .flat_map(|names| &names.value.general_names);
    Ok(names
        .take(MAX_CHAIN)
        .map(|name| match name {
            GeneralName::URI(text) => (true, (*text).to_owned()),
            GeneralName::DNSName(text) => (false, (*text).to_owned()),
            other => (false, other.to_string()),
        })
        .collect())
}

/// What holds for all leaves.
fn common(
    ders: &[Vec<u8>],
    leaf: &X509Certificate<'_>,
    trusted: &TrustBundle,
    now: UnixSeconds,
) -> Result<Issued, IssuedError> {
    if leaf.is_ca() {
        return Err(IssuedError::Authority);
    }
    usage(leaf)?;
    let from = seconds(leaf.validity().not_before.timestamp());
    let to = seconds(leaf.validity().not_after.timestamp());
    let invalid = |reason: &str| IssuedError::Validity {
        from,
        to,
        reason: reason.to_owned(),
    };
    if to <= now {
        return Err(invalid("that is over"));
    }
    if from > now + CLOCKS {
        return Err(invalid("that has not begun; compare the clocks"));
    }
    let wrong = |error: &dyn std::fmt::Display| IssuedError::Chain(error.to_string());
    let (chain, root) = crate::ca::chain(&ders[0], &ders[1..], trusted)
        .map_err(|_| wrong(&"neither do the certificates that come with it"))?;
    // The rules of RFC 5280 as every peer applies them: path lengths, constraints of names, validity of each.
    let roots = crate::tls::roots(trusted.pem()).map_err(|error| wrong(&error))?;
    let provider = crate::tls::provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
        .build()
        .map_err(|error| wrong(&error))?;
    let all: Vec<CertificateDer<'_>> = chain.iter().map(|der| der.as_slice().into()).collect();
    // A clock that is ahead must not refuse what is good in a moment.
    let at = std::time::Duration::from_secs(now.max(from));
    let (first, above) = all
        .split_first()
        .ok_or_else(|| wrong(&"it is a root itself"))?;
    verifier
        .verify_client_cert(first, above, UnixTime::since_unix_epoch(at))
        .map_err(|error| wrong(&error))?;
    Ok(Issued {
        chain_pem: chain.iter().map(|der| trust::to_pem(der)).collect(),
        root,
        not_after: to,
    })
}

fn usage(leaf: &X509Certificate<'_>) -> Result<(), IssuedError> {
    let usage = leaf
        .extended_key_usage()
        .map_err(|error| IssuedError::Unreadable(error.to_string()))?;
    match usage.map(|usage| usage.value) {
        Some(usage) if !usage.any && !usage.server_auth => {
            Err(IssuedError::Usage("server authentication"))
        }
        Some(usage) if !usage.any && !usage.client_auth => {
            Err(IssuedError::Usage("client authentication"))
        }
        _ => Ok(()),
    }
}

fn seconds(time: i64) -> UnixSeconds {
    u64::try_from(time).unwrap_or(0)
}
