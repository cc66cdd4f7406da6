//! What mutual TLS costs: two proxies one behind the other, as the sidecars of a client and a server are, beside two Envoys.

use std::path::Path;
use std::process::Child;

use anyhow::Context;
use serde_json::{Value, json};

use super::discovery::Resources;
use super::{Args, BACKEND, Peer, await_port, measure, peers};
use crate::judges::install;
use crate::pki::{CLIENT, SERVER, certificates};

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
    let started = [
        (
            "mesh",
            18101,
            [
                ours(client(18101, 18102), 18123),
                ours(server(18102), 18133),
            ],
        ),
        (
            "envoy",
            18103,
            [envoys(client(18103, 18104), 81), envoys(server(18104), 82)],
        ),
        // Each as the other's peer: no figure of interest, but they have to understand each other.
        (
            "mesh to envoy",
            18105,
            [ours(client(18105, 18106), 18143), envoys(server(18106), 83)],
        ),
        (
            "envoy to mesh",
            18107,
            [envoys(client(18107, 18108), 84), ours(server(18108), 18153)],
        ),
    ];
    let started: anyhow::Result<Vec<Peer>> = started.into_iter().map(pair).collect();
    println!("\na pair of proxies, mutual TLS 1.3 between them:");
    let outcome = started.and_then(|peers| {
        for inner in [18102, 18104, 18106, 18108] {
            await_port(inner)
                .with_context(|| format!("a server's proxy is not up on port {inner}"))?;
        }
        measure(args, &wrk, &peers)
    });
    // Killing is enough: it has nothing to say at its end.
    let _ = backend.kill();
    let _ = backend.wait();
    outcome
}

/// Both processes, or none.
fn pair(
    (name, port, started): (&'static str, u16, [anyhow::Result<Child>; 2]),
) -> anyhow::Result<Peer> {
    let mut peer = Peer {
        name,
        port,
        children: Vec::new(),
    };
    let mut failed = None;
    for child in started {
        match child {
            Ok(child) => peer.children.push(child),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        None => Ok(peer),
        Some(error) => Err(error),
    }
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
