//! Certificates and the root are changed under a pair of proxies while a load generator asks as fast as it can: no request may fail.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::discovery::{Resources, Secrets, serve_changing};
use super::{BACKEND, await_port, peers, pinned};
use crate::e2e::http::{Client, runtime};
use crate::judges::install;
use crate::pki::{CLIENT, SERVER, root, workload};

const CHANGES: u32 = 20;
/// Between two changes.
const PACE: Duration = Duration::from_millis(750);
/// Before the first and after the last one.
const MARGIN: Duration = Duration::from_secs(2);
const ENTRY: u16 = 18111;
const BETWEEN: u16 = 18112;
/// Of the client's proxy; its admin interface is two below.
const HEALTH: u16 = 18163;

/// Runs it, and prints what was counted.
pub(super) fn under_load(binary: &Path) -> anyhow::Result<()> {
    let wrk = install::debian("wrk", "wrk")?;
    let place = tempfile::Builder::new().prefix("mesh-bench-").tempdir()?;
    let mut children = vec![peers::nginx(place.path(), BACKEND)?];
    let outcome = (|| {
        let client = Resources::new(ENTRY, BETWEEN)
            .with_client(context(
                SERVER,
                "sni",
                json!("backend.default.svc.cluster.local"),
            ))
            .with_connections_renewed_after(500);
        let server = Resources::new(BETWEEN, BACKEND).with_server(context(
            CLIENT,
            "require_client_certificate",
            json!(true),
        ));
        let (of_client, client) = serve_changing(client)?;
        let (of_server, server) = serve_changing(server)?;
        let mut pair = [(client, CLIENT), (server, SERVER)];
        let old = root()?;
        give(&mut pair, &old, &old.0)?;
        for (address, health) in [(of_client, HEALTH), (of_server, HEALTH + 10)] {
            children.push(peers::mesh_of(binary, place.path(), address, health)?);
        }
        await_port(BETWEEN)?;
        await_port(ENTRY)?;
        let lasts = MARGIN * 2 + PACE * CHANGES;
        let load = pinned(0, &wrk)
            .args(["-t1", "-c", "64", "-d", &format!("{}s", lasts.as_secs())])
            .arg(format!("http://127.0.0.1:{ENTRY}/"))
            .stdout(Stdio::piped())
            .spawn()
            .context("starting wrk")?;
        std::thread::sleep(MARGIN);
        let changed = change(&mut pair, &old);
        let out = load.wait_with_output()?;
        changed?;
        let out = String::from_utf8_lossy(&out.stdout).into_owned();
        ensure!(
            !out.contains("Non-2xx") && !out.contains("Socket errors"),
            "not every request was answered:\n{out}"
        );
        let shown = out
            .lines()
            .filter(|line| line.contains("requests in") || line.contains("Requests/sec"));
        let shown: Vec<&str> = shown.map(str::trim).collect();
        ensure!(!shown.is_empty(), "wrk printed no count:\n{out}");
        println!(
            "\n{CHANGES} changes of both certificates and one of the root under load: {}; no failure; {} handshakes",
            shown.join(", "),
            handshakes()?
        );
        Ok(())
    })();
    for child in &mut children {
        let _ = child.kill();
        let _ = child.wait();
    }
    outcome
}

/// New certificates again and again; in the middle a new root is trusted beside the old one, signs, and is then the only one.
fn change(pair: &mut [(Secrets, &str); 2], old: &(String, String)) -> anyhow::Result<()> {
    let new = root()?;
    let both = format!("{}{}", old.0, new.0);
    for change in 0..CHANGES {
        match change {
            0..8 => give(pair, old, &old.0)?,
            8..10 => give(pair, old, &both)?,
            10..12 => give(pair, &new, &both)?,
            _ => give(pair, &new, &new.0)?,
        }
        std::thread::sleep(PACE);
    }
    Ok(())
}

fn give(
    pair: &mut [(Secrets, &str); 2],
    authority: &(String, String),
    roots: &str,
) -> anyhow::Result<()> {
    for (secrets, identity) in pair {
        let (chain, key) = workload(&authority.0, &authority.1, identity)?;
        secrets.give(&chain, &key, roots)?;
    }
    Ok(())
}

/// Secrets come over the discovery stream, as a gateway's do.
fn context(peer: &str, field: &str, value: Value) -> Value {
    let ads = json!({"ads": {}, "resource_api_version": "V3"});
    let secret = |name: &str| json!({"name": name, "sds_config": ads});
    let peer = json!({"san_type": "URI", "matcher": {"exact": peer}});
    json!({
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificate_sds_secret_configs": [secret("own")],
            "combined_validation_context": {
                "default_validation_context": {"match_typed_subject_alt_names": [peer]},
                "validation_context_sds_secret_config": secret("roots"),
            },
            "alpn_protocols": ["http/1.1"],
        },
        field: value,
    })
}

/// Of the client's proxy with the server's.
fn handshakes() -> anyhow::Result<u64> {
    let admin = Client::new(&format!("http://127.0.0.1:{}", HEALTH - 2));
    let answer = runtime()?.block_on(admin.get("/stats?filter=backend.ssl.handshake", &[]))?;
    let text = answer.body;
    let count = text
        .lines()
        .find_map(|line| line.rsplit_once(": ")?.1.trim().parse().ok());
    match count {
        Some(count) => Ok(count),
        None => bail!("the proxy counts no handshakes: {text:?}"),
    }
}
