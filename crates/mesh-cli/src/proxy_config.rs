//! `mesh proxy-config`: what a proxy has, from its own admin interface.

use std::process::ExitCode;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_identity::trust::{Described, describe};
use serde_json::Value;

use crate::Global;
use crate::cluster::Cluster;
use crate::pages;
use crate::pods;
use crate::table::Table;

/// Where proxies serve their admin interface, on the pod's loopback address.
const ADMIN_PORT: u16 = 15000;

/// Show what a proxy has
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum What {
    /// Certificates and roots
    #[command(alias = "s", alias = "secrets")]
    Secret {
        /// POD, POD.NAMESPACE or TYPE/NAME, for instance deployment/reviews-v1
        #[arg(value_name = "POD")]
        target: String,
        /// short: a table; json: the proxy's own form
        #[arg(short, long, value_name = "FORM", default_value = "short", value_parser = ["short", "json"])]
        output: String,
    },
    /// Whether two proxies trust the same roots
    #[command(alias = "rc")]
    RootcaCompare {
        /// One
        #[arg(value_name = "POD")]
        one: String,
        /// The other
        #[arg(value_name = "POD")]
        other: String,
    },
}

/// Runs the command.
///
/// # Errors
/// No such pod, or none whose proxy answers.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    match args.what {
        What::Secret { target, output } => {
            let section = secrets(&cluster, &target).await?;
            if output == "json" {
                let text = serde_json::to_string_pretty(&section)?;
                global.out.line(text)?;
            } else {
                let table = table(&section, unix_now());
                global.out.print(&table.render(&table.widths(), true))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        What::RootcaCompare { one, other } => {
            let roots =
                async |target: &str| anyhow::Ok(roots_of(&secrets(&cluster, target).await?));
            let (first, second) = (roots(&one).await?, roots(&other).await?);
            anyhow::ensure!(
                !first.is_empty() && !second.is_empty(),
                "one of the proxies has no roots (ROOTCA) yet"
            );
            let common = first.iter().any(|root| second.contains(root));
            global.out.line(match common {
                true => format!("Both {one} and {other} have a root in common: each trusts the other's certificate of it"),
                false => format!("{one} and {other} have no root in common: mutual TLS between them fails"),
            })?;
            Ok(match common {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            })
        }
    }
}

/// Namespace and name of the pod that a person means.
pub(crate) async fn pod_of(cluster: &Cluster, target: &str) -> anyhow::Result<(String, String)> {
    match target.split_once('.') {
        // Istio's way to name a pod of another namespace.
        Some((name, namespace)) if !target.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => {
            let pod = pods::find(cluster, target).await?;
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            Ok((cluster.namespace.clone(), name.to_owned()))
        }
    }
}

/// The secrets of a proxy, as it dumps them.
async fn secrets(cluster: &Cluster, target: &str) -> anyhow::Result<Value> {
    let (namespace, name) = pod_of(cluster, target).await?;
    let dump = admin(cluster, &namespace, &name, "/config_dump")
        .await
        .with_context(|| format!("asking the proxy of pod {name} in namespace {namespace}"))?;
    let mut sections = dump["configs"].as_array().into_iter().flatten();
    let section = sections
        .find(|section| {
            let kind = section["@type"].as_str().unwrap_or_default();
            kind.ends_with(".SecretsConfigDump")
        })
        .context("the proxy's dump has no secrets")?;
    Ok(section.clone())
}

/// GET of a page of a proxy's admin interface, through the API.
pub(crate) async fn admin(
    cluster: &Cluster,
    namespace: &str,
    pod: &str,
    path: &str,
) -> anyhow::Result<Value> {
    let page = pages::get(cluster, namespace, pod, ADMIN_PORT, path).await;
    page.context("does the pod have a proxy?")?.json()
}

/// istioctl's columns.
fn table(section: &Value, now: u64) -> Table {
    let headings = [
        "RESOURCE NAME",
        "TYPE",
        "STATUS",
        "VALID CERT",
        "SERIAL NUMBER",
        "NOT AFTER",
        "NOT BEFORE",
    ];
    let mut rows = Vec::new();
    for (state, list) in [
        ("ACTIVE", "dynamic_active_secrets"),
        ("WARMING", "dynamic_warming_secrets"),
    ] {
        for entry in section[list].as_array().into_iter().flatten() {
            let name = entry["name"].as_str().unwrap_or_default();
            let (kind, pem) = certificates(&entry["secret"]);
            let described = describe(&pem).unwrap_or_default();
            if described.is_empty() {
                let unknown = [name, kind, state, "false", "", "", ""];
                rows.push(unknown.map(str::to_owned).to_vec());
            }
            // Of a chain the leaf; of roots each.
            let shown = if kind == "CA" { described.len() } else { 1 };
            rows.extend(
                described
                    .iter()
                    .take(shown)
                    .map(|one| row(name, kind, state, one, now)),
            );
        }
    }
    Table::new(&headings, rows)
}

fn row(name: &str, kind: &str, state: &str, one: &Described, now: u64) -> Vec<String> {
    let valid = (one.not_before..one.not_after).contains(&now);
    vec![
        name.to_owned(),
        kind.to_owned(),
        state.to_owned(),
        valid.to_string(),
        one.serial.clone(),
        time(one.not_after),
        time(one.not_before),
    ]
}

/// What kind of secret it is in istioctl's words, and its certificates as PEM.
fn certificates(secret: &Value) -> (&'static str, String) {
    let text = |source: &Value| {
        let encoded = source["inline_bytes"].as_str().unwrap_or_default();
        let bytes = BASE64.decode(encoded).unwrap_or_default();
        String::from_utf8(bytes).unwrap_or_default()
    };
    match secret.get("tls_certificate") {
        Some(certificate) => ("Cert Chain", text(&certificate["certificate_chain"])),
        None => ("CA", text(&secret["validation_context"]["trusted_ca"])),
    }
}

/// Fingerprints of what a proxy trusts in the mesh.
fn roots_of(section: &Value) -> Vec<String> {
    let entries = section["dynamic_active_secrets"].as_array();
    let roots = entries
        .into_iter()
        .flatten()
        .find(|entry| entry["name"] == "ROOTCA");
    let pem = roots.map(|entry| certificates(&entry["secret"]).1);
    let described = describe(&pem.unwrap_or_default()).unwrap_or_default();
    described.into_iter().map(|root| root.fingerprint).collect()
}

pub(crate) fn time(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds)
        .map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

pub(crate) fn unix_now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use mesh_identity::ca::Authority;
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_are_shown_in_istioctls_columns() {
        let now = 1_800_000_000;
        let root = Authority::generate("cluster.local", "Root CA", now, 1000).expect("a root");
        let leaf = root
            .issue_server(&["a.example"], &[], now, 100)
            .expect("a leaf");
        let inline = |pem: &str| json!({ "inline_bytes": BASE64.encode(pem) });
        let section = json!({ "dynamic_active_secrets": [
            { "name": "default", "secret": { "tls_certificate": { "certificate_chain": inline(&leaf.chain_pem) } } },
            { "name": "ROOTCA", "secret": { "validation_context": { "trusted_ca": inline(root.certificate_pem()) } } },
            { "name": "broken", "secret": {} },
        ] });
        let shown = |now| {
            let table = table(&section, now);
            table.render(&table.widths(), true)
        };
        let text = shown(now);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0]
                .starts_with("RESOURCE NAME   TYPE         STATUS   VALID CERT   SERIAL NUMBER"),
            "{text}"
        );
        assert!(
            lines[1].starts_with("default         Cert Chain   ACTIVE   true"),
            "{text}"
        );
        assert!(
            lines[1].contains("2027-01-15T08:01:40Z   2027-01-15T07:58:00Z"),
            "{text}"
        );
        assert!(
            lines[2].starts_with("ROOTCA          CA           ACTIVE   true"),
            "{text}"
        );
        assert!(
            lines[3].starts_with("broken          CA           ACTIVE   false"),
            "{text}"
        );
        assert!(shown(now + 500).contains("Cert Chain   ACTIVE   false"));
        assert_eq!(roots_of(&section), [root.root()]);
    }
}
