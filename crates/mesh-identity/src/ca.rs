//! A certificate authority: a self-signed root (or a loaded one, or an intermediate of somebody's) that issues certificates to workloads
//! and to servers.

use std::net::IpAddr;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::crypto::aws_lc_rs;
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;

use crate::UnixSeconds;
use crate::csr::CertificateRequest;
use crate::spiffe::SpiffeId;
use crate::trust::{self, TrustBundle, TrustError};

/// Certificates start to be valid this many seconds before they are issued, against clocks that differ (Istio's CA does the same).
pub const BACKDATE_SECONDS: u64 = 120;

/// Why a certificate could not be made or an authority not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The PEM text of the authority's key or certificate can't be used.
    #[error("loading the certificate authority: {0}; delete it to have a new one made")]
    Load(rcgen::Error),
    /// The parts of an authority don't belong together.
    #[error("loading the certificate authority: {0}")]
    Parts(String),
    /// The certificates that come with it can't be read.
    #[error("loading the certificate authority: {0}")]
    Trust(#[from] TrustError),
    /// A name or address can't stand in a certificate.
    #[error("issuing a certificate for {subject}: {source}")]
    Issue {
        /// For whom the certificate was meant.
        subject: String,
        /// What the certificate library said.
        source: rcgen::Error,
    },
    /// The authority's own certificate is not valid any more.
    #[error("the certificate authority expired at {0} seconds since 1970; rotate it")]
    Expired(UnixSeconds),
    /// The time is outside what a certificate can express.
    #[error("{0} seconds since 1970 is not a time that a certificate can carry")]
    Time(UnixSeconds),
    /// The system has no random numbers.
    #[error("no random numbers for a serial number")]
    Random,
}

/// A certificate chain (leaf first) with its private key, both PEM.
#[derive(Clone)]
pub struct Leaf {
    /// The certificates, the leaf first, the root not among them.
    pub chain_pem: String,
    /// The private key, PKCS #8.
    pub key_pem: String,
}

/// The parts of an authority as they are kept, PEM (the keys of Istio's Secrets `cacerts` and `istio-ca-secret`).
#[derive(Clone, Copy, Debug, Default)]
pub struct Parts<'a> {
    /// The certificate that issues (`ca-cert.pem`).
    pub certificate: &'a str,
    /// Its private key (`ca-key.pem`).
    pub key: &'a str,
    /// The certificates from it to the root (`cert-chain.pem`); empty where the issuing certificate is a root itself.
    pub chain: &'a str,
    /// What everybody trusts (`root-cert.pem`), one or several certificates; empty means the issuing certificate.
    pub roots: &'a str,
}

/// A certificate that issues others, with its key.
pub struct Authority {
    certificate_pem: String,
    key_pem: String,
    /// What goes after a leaf: the issuing certificate and those between it and the root. Empty where it is the root.
    chain_pem: String,
    roots: TrustBundle,
    /// Fingerprint of the root that this authority's certificates lead to.
    root: String,
    not_after: UnixSeconds,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new self-signed root (ECDSA P-256) that is valid for `lifetime_seconds` from `now`.
    pub fn generate(
        organization: &str,
        common_name: &str,
        now: UnixSeconds,
        lifetime_seconds: u64,
    ) -> Result<Self, CaError> {
        let issue = |source| CaError::Issue {
            subject: common_name.to_owned(),
            source,
        };
        let key = KeyPair::generate().map_err(issue)?;
        let mut params = authority_params(organization, common_name, now, lifetime_seconds)?;
        params.serial_number = Some(serial()?);
        let certificate_pem = params.self_signed(&key).map_err(issue)?.pem();
        Self::from_pem(&certificate_pem, &key.serialize_pem())
    }

    /// Makes an intermediate below this authority, as operators do who keep the root's key elsewhere (`cacerts`).
    pub fn intermediate(
        &self,
        organization: &str,
        common_name: &str,
        now: UnixSeconds,
        lifetime_seconds: u64,
    ) -> Result<Self, CaError> {
        let issue = |source| CaError::Issue {
            subject: common_name.to_owned(),
            source,
        };
        let key = KeyPair::generate().map_err(issue)?;
        let mut params = authority_params(organization, common_name, now, lifetime_seconds)?;
        params.serial_number = Some(serial()?);
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(issue)?.pem();
        Self::load(Parts {
            certificate: &certificate,
            key: &key.serialize_pem(),
            chain: &format!("{certificate}{}", self.chain_pem),
            roots: self.roots.pem(),
        })
    }

    /// Loads a root from its PEM certificate and PEM key.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, CaError> {
        Self::load(Parts {
            certificate: certificate_pem,
            key: key_pem,
            ..Parts::default()
        })
    }

    /// Loads an authority from its parts, which must belong together: the key to the certificate, the chain up to one of the roots.
    ///
    /// # Errors
    /// Parts that can't be read or don't belong together. Whether it is valid now is only asked when it issues.
    pub fn load(parts: Parts<'_>) -> Result<Self, CaError> {
        let key = KeyPair::from_pem(parts.key).map_err(CaError::Load)?;
        let own = trust::ders(parts.certificate)?;
        let [own] = &own[..] else {
            return Err(CaError::Parts(format!(
                "there are {} issuing certificates (ca-cert.pem), not one",
                own.len()
            )));
        };
        let certificate = trust::parse(own)?;
        if !certificate.is_ca() {
            return Err(CaError::Parts(
                "the issuing certificate is not a certificate authority's (CA:TRUE)".to_owned(),
            ));
        }
        if certificate.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
            return Err(CaError::Parts(
                "the key does not belong to the certificate".to_owned(),
            ));
        }
        let roots = TrustBundle::from_pem(if parts.roots.trim().is_empty() {
            parts.certificate
        } else {
            parts.roots
        })?;
        let (chain, root) = chain(own, &trust::ders(parts.chain)?, &roots)?;
        let issuer = Issuer::from_ca_cert_pem(parts.certificate, key).map_err(CaError::Load)?;
        let not_after = chain
            .iter()
            .chain([own])
            .filter_map(|der| trust::parse(der).ok().and_then(|c| seconds(&c)))
            .min()
            .unwrap_or(0);
        Ok(Self {
            certificate_pem: parts.certificate.to_owned(),
            key_pem: parts.key.to_owned(),
            chain_pem: chain.iter().map(|der| trust::to_pem(der)).collect(),
            roots,
            root,
            not_after,
            issuer,
        })
    }

    /// The issuing certificate, PEM: of a self-signed authority what clients must trust.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The private key, PEM. Whoever holds it can be anyone.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// What goes between a leaf and the root, PEM; empty where this is the root.
    pub fn chain_pem(&self) -> &str {
        &self.chain_pem
    }

    /// What everybody trusts.
    pub fn roots(&self) -> &TrustBundle {
        &self.roots
    }

    /// The fingerprint ([`trust::fingerprint`]) of the root that what is issued here leads to.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The end of validity, of it and of all above it but the root.
    pub fn not_after(&self) -> UnixSeconds {
        self.not_after
    }

    /// Issues a serving certificate for DNS names and addresses, valid for `lifetime_seconds` from `now`.
    pub fn issue_server(
        &self,
        dns_names: &[&str],
        addresses: &[IpAddr],
        now: UnixSeconds,
        lifetime_seconds: u64,
    ) -> Result<Leaf, CaError> {
        let name = dns_names.first().copied().unwrap_or("mesh");
        let issue = |source| CaError::Issue {
            subject: name.to_owned(),
            source,
        };
        let names: Vec<String> = dns_names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = self
            .leaf_params(names, now, lifetime_seconds)
            .map_err(issue)??;
        params.distinguished_name = subject(None, name);
        params
            .subject_alt_names
            .extend(addresses.iter().copied().map(SanType::IpAddress));
        let key = KeyPair::generate().map_err(issue)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(issue)?;
        Ok(Leaf {
            chain_pem: format!("{}{}", certificate.pem(), self.chain_pem),
            key_pem: key.serialize_pem(),
        })
    }

    /// Issues a certificate for a workload's key: its identity as the only name (an URI, marked critical since the subject is empty:
    /// X.509-SVID sections 2 and 4.1), valid for `lifetime_seconds` from `now`, never longer than the authority itself. Gives the chain
    /// without the root, PEM, the leaf first.
    ///
    /// # Errors
    /// An authority that has expired.
    pub fn issue_workload(
        &self,
        request: &CertificateRequest,
        identity: &SpiffeId,
        now: UnixSeconds,
        lifetime_seconds: u64,
    ) -> Result<String, CaError> {
        let issue = |source| CaError::Issue {
            subject: identity.to_string(),
            source,
        };
        let mut params = self
            .leaf_params(Vec::new(), now, lifetime_seconds)
            .map_err(issue)??;
        params.distinguished_name = DistinguishedName::new();
        let uri = identity.to_string().try_into().map_err(issue)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        let certificate = params
            .signed_by(&request.key, &self.issuer)
            .map_err(issue)?;
        Ok(format!("{}{}", certificate.pem(), self.chain_pem))
    }

    fn leaf_params(
        &self,
        names: Vec<String>,
        now: UnixSeconds,
        lifetime_seconds: u64,
    ) -> Result<Result<CertificateParams, CaError>, rcgen::Error> {
        let mut params = CertificateParams::new(names)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        Ok(self.dated(params, now, lifetime_seconds))
    }

    fn dated(
        &self,
        mut params: CertificateParams,
        now: UnixSeconds,
        lifetime_seconds: u64,
    ) -> Result<CertificateParams, CaError> {
        if now >= self.not_after {
            return Err(CaError::Expired(self.not_after));
        }
        params.serial_number = Some(serial()?);
        params.not_before = date(now.saturating_sub(BACKDATE_SECONDS))?;
        params.not_after = date(now.saturating_add(lifetime_seconds).min(self.not_after))?;
        Ok(params)
    }
}

fn authority_params(
    organization: &str,
    common_name: &str,
    now: UnixSeconds,
    lifetime_seconds: u64,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject(Some(organization), common_name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params.not_before = date(now.saturating_sub(BACKDATE_SECONDS))?;
    params.not_after = date(now.saturating_add(lifetime_seconds))?;
    Ok(params)
}

/// The certificates from the issuing one up to the one below the root, and the root's fingerprint.
pub(crate) fn chain(
    own: &[u8],
    given: &[Vec<u8>],
    roots: &TrustBundle,
) -> Result<(Vec<Vec<u8>>, String), CaError> {
    let signed_by = |lower: &X509Certificate<'_>, upper: &[u8]| {
        trust::parse(upper).is_ok_and(|upper| {
            upper.is_ca()
                && lower.issuer() == upper.subject()
                && lower.verify_signature(Some(upper.public_key())).is_ok()
        })
    };
    let mut present = own.to_vec();
    let mut chain = Vec::new();
    // Each round goes one certificate up, so the chain given bounds it.
    for _ in 0..=given.len() {
        if let Some(root) = roots.ders().find(|root| **root == present) {
            return Ok((chain, trust::fingerprint(root)));
        }
        let certificate = trust::parse(&present)?;
        let root = roots.ders().find(|root| signed_by(&certificate, root));
        let next = given
            .iter()
            .find(|upper| **upper != present && signed_by(&certificate, upper))
            .cloned();
        drop(certificate);
        chain.push(present);
        if let Some(root) = root {
            return Ok((chain, trust::fingerprint(root)));
        }
        let Some(next) = next else { break };
        present = next;
    }
    let reason = "the certificates (ca-cert.pem, cert-chain.pem) don't lead to any of the roots (root-cert.pem)";
    Err(CaError::Parts(reason.to_owned()))
}

/// The end of validity of the first certificate in `pem`, or `None` when there is none to read.
pub fn not_after(pem: &str) -> Option<UnixSeconds> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
    let certificate = pem.parse_x509().ok()?;
    seconds(&certificate)
}

fn seconds(certificate: &X509Certificate<'_>) -> Option<UnixSeconds> {
    u64::try_from(certificate.validity().not_after.timestamp()).ok()
}

/// 127 random bits (RFC 5280 section 4.1.2.2: positive, at most 20 bytes): two certificates for one key differ in it.
fn serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0_u8; 16];
    aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| CaError::Random)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn subject(organization: Option<&str>, common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name.push(DnType::CommonName, common_name);
    name
}

fn date(seconds: UnixSeconds) -> Result<OffsetDateTime, CaError> {
    i64::try_from(seconds)
        .ok()
        .and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok())
        .ok_or(CaError::Time(seconds))
}
