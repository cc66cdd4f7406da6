//! Certificates for proxies that are measured or compared in mutual TLS.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};

/// Who the client's proxy is.
pub const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
/// Who the server's proxy is.
pub const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";

/// A root and two workload certificates (ECDSA P-256) as Istio's CA makes them, in files.
pub fn certificates(place: &Path) -> anyhow::Result<()> {
    let (root, key) = root()?;
    std::fs::write(place.join("root.pem"), &root)?;
    for (name, identity) in [("client", CLIENT), ("server", SERVER)] {
        let (chain, key) = workload(&root, &key, identity)?;
        std::fs::write(place.join(format!("{name}.pem")), chain)?;
        std::fs::write(place.join(format!("{name}.key")), key)?;
    }
    Ok(())
}

/// An authority (ECDSA P-256) of its own, and its key, PEM.
pub fn root() -> anyhow::Result<(String, String)> {
    let mut params = CertificateParams::new(Vec::new())?;
    params
        .distinguished_name
        .push(DnType::OrganizationName, "cluster.local");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

/// A workload's certificate by an authority, and its key, all PEM.
pub fn workload(
    authority: &str,
    authority_key: &str,
    identity: &str,
) -> anyhow::Result<(String, String)> {
    let key = KeyPair::from_pem(authority_key).context("reading the authority's key")?;
    let issuer = Issuer::from_ca_cert_pem(authority, key).context("reading the authority")?;
    leaf(&issuer, identity)
}

fn leaf(issuer: &Issuer<'_, KeyPair>, identity: &str) -> anyhow::Result<(String, String)> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
    params.not_before = (SystemTime::now() - Duration::from_secs(120)).into();
    params.not_after = (SystemTime::now() + Duration::from_secs(86_400)).into();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let key = KeyPair::generate()?;
    let chain = params.signed_by(&key, issuer).context("issuing")?;
    Ok((chain.pem(), key.serialize_pem()))
}
