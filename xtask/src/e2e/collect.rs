//! What is kept of a failed walk: objects, events, logs and what the proxies have, in one archive.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;

use anyhow::Context;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;

use super::cluster::Cluster;

/// Kinds that are written out. No Secrets: archives are handed around.
const KINDS: &[&str] = &[
    "nodes",
    "namespaces",
    "pods",
    "services",
    "endpointslices",
    "deployments",
    "replicasets",
    "events",
    "configmaps",
    "mutatingwebhookconfigurations",
    "validatingwebhookconfigurations",
    "virtualservices",
    "destinationrules",
    "gateways.networking.istio.io",
    "serviceentries",
    "sidecars",
    "envoyfilters",
    "authorizationpolicies",
    "peerauthentications",
    "requestauthentications",
];

/// Paths of a proxy's admin interface, and the files they are written to.
const ADMIN: &[(&str, &str)] = &[
    ("config_dump", "config_dump.json"),
    ("clusters", "clusters.txt"),
    ("stats", "stats.txt"),
    ("certs", "certs.json"),
];

/// Most lines of one container's log.
const LINES: &str = "--tail=5000";

/// Writes everything into `folder` (which may hold something already) and packs it into `archive`, a gzipped tar.
pub fn everything(cluster: &Cluster, folder: &Path, archive: &Path) -> anyhow::Result<()> {
    let printed = cluster.printed();
    if !printed.is_empty() {
        write(folder, "all-in-one.txt", printed.as_bytes())?;
    }
    for kind in KINDS {
        let name = format!("objects/{kind}.yaml");
        keep(cluster, folder, &name, &["get", kind, "-A", "-o", "yaml"])?;
    }
    // Without pods there are no logs; why, stands in the folder.
    let pods = cluster.get(&["pods", "-A"]).unwrap_or_default();
    for pod in pods["items"].as_array().into_iter().flatten() {
        of_pod(cluster, folder, pod)?;
    }
    pack(folder, archive).with_context(|| format!("writing {}", archive.display()))
}

fn of_pod(cluster: &Cluster, folder: &Path, pod: &Value) -> anyhow::Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (namespace, name) = (
        text(&pod["metadata"]["namespace"]),
        text(&pod["metadata"]["name"]),
    );
    let place = format!("pods/{namespace}/{name}");
    for list in ["initContainerStatuses", "containerStatuses"] {
        for status in pod["status"][list].as_array().into_iter().flatten() {
            let container = text(&status["name"]);
            let logs = ["logs", &name, "-n", &namespace, "-c", &container, LINES];
            keep(cluster, folder, &format!("{place}/{container}.log"), &logs)?;
            if status["restartCount"].as_u64().unwrap_or(0) > 0 {
                let before = [&logs[..], &["--previous"]].concat();
                let file = format!("{place}/{container}.previous.log");
                keep(cluster, folder, &file, &before)?;
            }
            if container == "istio-proxy" {
                for (path, file) in ADMIN {
                    let url = format!("http://127.0.0.1:15000/{path}");
                    let ask = [
                        "exec",
                        &name,
                        "-n",
                        &namespace,
                        "-c",
                        &container,
                        "--",
                        "curl",
                        "-sS",
                        "--max-time",
                        "10",
                        &url,
                    ];
                    keep(cluster, folder, &format!("{place}/{file}"), &ask)?;
                }
            }
        }
    }
    Ok(())
}

/// What a command printed, also where it failed: why is worth keeping too.
fn keep(cluster: &Cluster, folder: &Path, file: &str, command: &[&str]) -> anyhow::Result<()> {
    let output = cluster.tool(command).stdin(Stdio::null()).output()?;
    let mut text = output.stdout;
    if !output.status.success() {
        text.extend_from_slice(&output.stderr);
    }
    write(folder, file, &text)
}

fn write(folder: &Path, file: &str, text: &[u8]) -> anyhow::Result<()> {
    let file = folder.join(file);
    if let Some(parent) = file.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
}

fn pack(folder: &Path, archive: &Path) -> anyhow::Result<()> {
    if let Some(parent) = archive.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut tar = tar::Builder::new(GzEncoder::new(File::create(archive)?, Compression::fast()));
    tar.append_dir_all("e2e-failure", folder)?;
    tar.into_inner()?.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn an_archive_holds_what_was_written() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let archive = folder.path().join("made/failure.tar.gz");
        let content = tempfile::tempdir()?;
        write(content.path(), "pods/default/a/app.log", b"line\n")?;
        pack(content.path(), &archive)?;
        let mut tar = tar::Archive::new(GzDecoder::new(File::open(archive)?));
        let mut found = Vec::new();
        for entry in tar.entries()? {
            let mut entry = entry?;
            let mut text = String::new();
            if entry.header().entry_type().is_file() {
                entry.read_to_string(&mut text)?;
                found.push((entry.path()?.display().to_string(), text));
            }
        }
        let expected = (
            "e2e-failure/pods/default/a/app.log".to_owned(),
            "line\n".to_owned(),
        );
        assert_eq!(found, [expected]);
        Ok(())
    }
}
