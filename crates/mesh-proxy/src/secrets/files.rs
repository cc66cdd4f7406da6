//! Secrets in files: `file-cert:CHAIN~KEY`, `file-root:AUTHORITIES`, `file-crl:LISTS`. Read when the configuration names them, and again
//! when they have changed.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_routing::tls::Source;
use zeroize::Zeroizing;

use super::Secret;
use crate::agent::AGENT;
use crate::shared::Shared;

/// How often files are looked at.
const EVERY: Duration = Duration::from_secs(1);
/// Longer files are no certificates.
const LONGEST: u64 = 4 << 20;
/// Where systems keep the authorities that they trust (Debian, Alpine; Fedora; openSUSE; old ones).
const SYSTEM: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// What tells that a file is another one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mark(u64, u64, i64, i64);

/// Files that were read.
#[derive(Debug, Default)]
struct Watched {
    /// By the secret's name; an error is told once.
    seen: BTreeMap<Arc<str>, Result<Vec<Mark>, String>>,
}

/// Reads files that the configuration names for as long as the proxy runs.
pub async fn watch(shared: Arc<Shared>) {
    let mut watched = Watched::default();
    let mut changes = shared.changes();
    loop {
        watched.look(&shared);
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

impl Watched {
    fn look(&mut self, shared: &Shared) {
        let wanted = shared.snapshot().secrets();
        let wanted = || wanted.iter().filter(|name| name.source == Source::Files);
        self.seen.retain(|name, _| {
            let kept = wanted().any(|wanted| wanted.name == *name);
            if !kept {
                shared.secrets.remove(name);
            }
            kept
        });
        for name in wanted() {
            let name = &name.name;
            let paths = paths(name);
            let marks = marks(&paths);
            let known = self.seen.get(name);
            if marks.is_ok() && known == Some(&marks) {
                continue;
            }
            let done = marks.and_then(|marks| {
                let secret = read(name, &paths)?;
                let set = shared.secrets.set(name, secret);
                set.map(|()| marks).map_err(|error| error.to_string())
            });
            match &done {
                Ok(_) => tracing::info!(target: AGENT, %name, "read a secret from its files"),
                Err(error) if known != Some(&done) => {
                    tracing::warn!(%name, error, "reading a secret from its files; the one before stays");
                }
                Err(_) => {}
            }
            self.seen.insert(name.clone(), done);
        }
    }
}

fn paths(name: &str) -> Vec<&str> {
    match name.split_once(':') {
        Some(("file-root", "system")) => {
            let found = SYSTEM.into_iter().find(|path| Path::new(path).exists());
            vec![found.unwrap_or(SYSTEM[0])]
        }
        Some((_, rest)) => rest.split('~').collect(),
        None => Vec::new(),
    }
}

fn marks(paths: &[&str]) -> Result<Vec<Mark>, String> {
    let mark = |path: &&str| {
        let found = std::fs::metadata(path).map_err(|error| format!("{path}: {error}"))?;
        if found.len() > LONGEST {
            return Err(format!("{path}: is longer than 4 MiB"));
        }
        Ok(Mark(
            found.ino(),
            found.len(),
            found.mtime(),
            found.mtime_nsec(),
        ))
    };
    paths.iter().map(mark).collect()
}

fn read(name: &str, paths: &[&str]) -> Result<Secret, String> {
    let text = |path: &str| -> Result<String, String> {
        let read: io::Result<String> = std::fs::read_to_string(path);
        read.map_err(|error| format!("{path}: {error}"))
    };
    match (name.split_once(':').map(|(kind, _)| kind), paths) {
        (Some("file-cert"), [chain, key]) => Ok(Secret::Certificate {
            chain_pem: text(chain)?,
            key_pem: Zeroizing::new(text(key)?),
        }),
        (Some("file-root"), [roots]) => Ok(Secret::trust(text(roots)?)),
        (Some("file-crl"), [lists]) => Ok(Secret::Revoked {
            crl_pem: text(lists)?,
        }),
        _ => Err(
            "a name of files is file-cert:CHAIN~KEY, file-root:AUTHORITIES or file-crl:LISTS"
                .to_owned(),
        ),
    }
}
