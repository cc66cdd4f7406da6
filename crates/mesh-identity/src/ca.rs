//! A certificate authority: a self-signed root (or a loaded one) that issues serving certificates.

use std::net::IpAddr;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

use crate::UnixSeconds;

/// Certificates start to be valid this many seconds before they are issued, against clocks that differ (Istio's CA does the same).
pub const BACKDATE_SECONDS: u64 = 120;

/// Why a certificate could not be made or an authority not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The PEM text of the authority's key or certificate can't be used.
    #[error("loading the certificate authority: {0}; delete it to have a new one made")]
    Load(rcgen::Error),
    /// A name or address can't stand in a certificate.
    #[error("issuing a certificate for {subject}: {source}")]
    Issue {
        /// For whom the certificate was meant.
        subject: String,
        /// What the certificate library said.
        source: rcgen::Error,
    },
    /// The time is outside what a certificate can express.
    #[error("{0} seconds since 1970 is not a time that a certificate can carry")]
    Time(UnixSeconds),
}

/// A certificate chain (leaf first) with its private key, both PEM.
#[derive(Clone)]
pub struct Leaf {
    /// The certificates, the leaf first, the root not among them.
    pub chain_pem: String,
    /// The private key, PKCS #8.
    pub key_pem: String,
}

/// A root certificate with its key.
pub struct Authority {
    certificate_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
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
        let mut params = CertificateParams::new(Vec::new()).map_err(issue)?;
        params.distinguished_name = subject(Some(organization), common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        params.not_before = date(now.saturating_sub(BACKDATE_SECONDS))?;
        params.not_after = date(now + lifetime_seconds)?;
        let certificate_pem = params.self_signed(&key).map_err(issue)?.pem();
        Self::from_pem(&certificate_pem, &key.serialize_pem())
    }

    /// Loads a root from its PEM certificate and PEM key.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, CaError> {
        let key = KeyPair::from_pem(key_pem).map_err(CaError::Load)?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key).map_err(CaError::Load)?;
        Ok(Self {
            certificate_pem: certificate_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            issuer,
        })
    }

    /// The root certificate, PEM: what clients must trust.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The root's private key, PEM. Whoever holds it can be anyone.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
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
        let mut params = CertificateParams::new(names).map_err(issue)?;
        params.distinguished_name = subject(None, name);
        params
            .subject_alt_names
            .extend(addresses.iter().copied().map(SanType::IpAddress));
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        params.not_before = date(now.saturating_sub(BACKDATE_SECONDS))?;
        params.not_after = date(now + lifetime_seconds)?;
        let key = KeyPair::generate().map_err(issue)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(issue)?;
        Ok(Leaf {
            chain_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }
}

/// The end of validity of the first certificate in `pem`, or `None` when there is none to read.
pub fn not_after(pem: &str) -> Option<UnixSeconds> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
    let certificate = pem.parse_x509().ok()?;
    u64::try_from(certificate.validity().not_after.timestamp()).ok()
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
