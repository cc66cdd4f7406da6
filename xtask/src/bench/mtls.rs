//! What mutual TLS costs: two proxies one behind the other, as the sidecars of a client and a server are, beside two Envoys.

use std::path::Path;
use std::process::Child;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use serde_json::{Value, json};

use super::discovery::Resources;
use super::{Args, BACKEND, Peer, measure, peers};
use crate::judges::install;

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";

/// Prints the table of both pairs.
pub(super) fn beside_envoys(args: &Args, binary: &Path) -> anyhow::Result<()> {
    let wrk = install::debian("wrk", "wrk")?;
    let place = tempfile::Builder::new().prefix("mesh-bench-").tempdir()?;
    let path = place.path();
    certificates(path)?;
    let mut backend = peers::nginx(path, BACKEND)?;
    let client = |port, inner| Resources::new(port, inner).with_client(client_context(path));
    let server = |port| Resources::new(port, BACKEND).with_server(server_context(path));
    let ours = |resources, health| peers::mesh_with(binary, path, resources, health);
    let envoys = |resources, base| peers::envoy_with(path, resources, base);
    let started = (|| {
        Ok::<_, anyhow::Error>(vec![
            pair(
                "mesh",
                18101,
                ours(client(18101, 18102), 18123)?,
                ours(server(18102), 18133)?,
            ),
            pair(
                "envoy",
                18103,
                envoys(client(18103, 18104), 81)?,
                envoys(server(18104), 82)?,
            ),
            // Each as the other's peer: no figure of interest, but they have to understand each other.
            pair(
                "mesh to envoy",
                18105,
                ours(client(18105, 18106), 18143)?,
                envoys(server(18106), 83)?,
            ),
            pair(
                "envoy to mesh",
                18107,
                envoys(client(18107, 18108), 84)?,
                ours(server(18108), 18153)?,
            ),
        ])
    })();
    println!("\na pair of proxies, mutual TLS 1.3 between them:");
    let outcome = started.and_then(|peers| measure(args, &wrk, &peers));
    // Killing is enough: it has nothing to say at its end.
    let _ = backend.kill();
    let _ = backend.wait();
    outcome
}

fn pair(name: &'static str, port: u16, client: Child, server: Child) -> Peer {
    Peer {
        name,
        port,
        children: vec![client, server],
    }
}

/// A root and two workload certificates (ECDSA P-256) as Istio's CA makes them, in files.
fn certificates(place: &Path) -> anyhow::Result<()> {
    let mut params = CertificateParams::new(Vec::new())?;
    params
        .distinguished_name
        .push(DnType::OrganizationName, "cluster.local");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    std::fs::write(place.join("root.pem"), params.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(params, key);
    for (name, identity) in [("client", CLIENT), ("server", SERVER)] {
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        params.not_before = (SystemTime::now() - Duration::from_secs(120)).into();
        params.not_after = (SystemTime::now() + Duration::from_secs(86_400)).into();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate()?;
        let chain = params.signed_by(&key, &issuer).context("issuing")?;
        std::fs::write(place.join(format!("{name}.pem")), chain.pem())?;
        std::fs::write(place.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

/// What both sides have, with the names that a mesh checks.
fn common(place: &Path, name: &str, peer: &str) -> Value {
    let file = |name: &str| json!({"filename": place.join(name)});
    let peer = json!({"san_type": "URI", "matcher": {"exact": peer}});
    json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": file(&format!("{name}.pem")), "private_key": file(&format!("{name}.key"))}],
        "validation_context": {"trusted_ca": file("root.pem"), "match_typed_subject_alt_names": [peer]},
        "alpn_protocols": ["http/1.1"],
    })
}

fn server_context(place: &Path) -> Value {
    json!({"common_tls_context": common(place, "server", CLIENT), "require_client_certificate": true})
}

fn client_context(place: &Path) -> Value {
    let sni = "outbound_.8080_._.backend.default.svc.cluster.local";
    json!({"common_tls_context": common(place, "client", SERVER), "sni": sni})
}
