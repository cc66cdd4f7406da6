//! One installation at a time: whoever changes what is installed holds a Lease, so that two don't undo each other's work.
//!
//! It is in the namespace `default`, which a cluster has from its first moment to its last: the mesh's own comes and goes with the mesh, most of what is
//! installed (kinds, webhooks, roles) belongs to no namespace, and of `kube-system` some providers let nobody use anything.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::objects::delete_exactly;
use crate::cluster::Cluster;
use crate::install::MANAGED_BY;

const PLACE: &str = "/apis/coordination.k8s.io/v1/namespaces/default/leases";
const NAME: &str = "mesh-install";
/// What is done with it.
pub(super) const VERBS: [&str; 4] = ["get", "create", "update", "delete"];
/// A holder that gave no sign for so long is dead.
const DURATION: Duration = Duration::from_secs(30);
/// Time from one sign to the next.
const RENEW: Duration = Duration::from_secs(5);
/// Times that the Lease is tried, when others change it meanwhile.
const ATTEMPTS: usize = 5;
/// Longest wait for the removal of the Lease.
const RELEASE: Duration = Duration::from_secs(5);

/// Does `work`, a command such as `mesh install`, while no other does such a thing in this cluster. SIGINT and SIGTERM end it. The Lease goes with it,
/// however it ends; after a program that was killed it counts for 30 s more.
///
/// # Errors
/// Somebody else holds it (`force` takes it away from them), or takes it away; the signals; those of `work`.
pub(crate) async fn alone<T>(
    cluster: &Cluster,
    command: &str,
    force: bool,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let own = identity(command);
    let result = tokio::select! {
        result = held(cluster, &own, force, work) => result,
        () = interrupted() => Err(anyhow!(
            "interrupted: what was done so far stays; do it again, or `mesh uninstall`"
        )),
    };
    let released = timeout(RELEASE, release(cluster, &own)).await;
    if let Ok(Err(error)) = released {
        eprintln!(
            "Warning: Lease default/{NAME} is still there, and counts for {} s: {error:#}",
            DURATION.as_secs()
        );
    }
    result
}

async fn held<T>(
    cluster: &Cluster,
    own: &str,
    force: bool,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    take(cluster, own, force).await?;
    tokio::select! {
        result = work => result,
        error = keep(cluster, own) => Err(error),
    }
}

/// SIGINT or SIGTERM.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Who asks, for people, and a number that nobody else has.
fn identity(command: &str) -> String {
    use std::hash::{BuildHasher as _, RandomState};
    let user = nix::unistd::User::from_uid(nix::unistd::getuid());
    let user = match user {
        Ok(Some(user)) => user.name,
        _ => format!("user {}", nix::unistd::getuid()),
    };
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let number = RandomState::new().hash_one(command);
    format!(
        "{command} of {user}@{}, process {} ({number:016x})",
        host.trim(),
        std::process::id()
    )
}

fn path() -> String {
    format!("{PLACE}/{NAME}")
}

fn holder(lease: &Value) -> &str {
    lease["spec"]["holderIdentity"].as_str().unwrap_or_default()
}

async fn read(cluster: &Cluster) -> anyhow::Result<Option<Value>> {
    cluster
        .read_optional(&path())
        .await
        .context("looking whether another installation is under way: nothing was changed")
}

async fn take(cluster: &Cluster, own: &str, force: bool) -> anyhow::Result<()> {
    for _ in 0..ATTEMPTS {
        let now = now();
        let mut lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": { "name": NAME, "namespace": "default", "labels": { MANAGED_BY.0: MANAGED_BY.1 } },
            "spec": { "holderIdentity": own, "leaseDurationSeconds": DURATION.as_secs(), "acquireTime": now, "renewTime": now },
        });
        let (method, path) = match read(cluster).await? {
            None => ("POST", PLACE.to_owned()),
            // A request that was repeated may have been heard twice.
            Some(found) if holder(&found) == own => return Ok(()),
            Some(found) => {
                if !force && !is_dead(cluster, &found).await? {
                    bail!(occupied(&found));
                }
                lease["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"].clone();
                ("PUT", path())
            }
        };
        let written = cluster.unless_conflict(method, &path, &lease).await;
        let written = written.with_context(|| {
            format!("making Lease default/{NAME}, so that nobody else installs meanwhile: nothing was changed")
        })?;
        if written {
            return Ok(());
        }
    }
    bail!("others change Lease default/{NAME} all the time: nothing was changed; try again")
}

fn occupied(lease: &Value) -> String {
    let since = lease["spec"]["acquireTime"].as_str().unwrap_or_default();
    let since = since.split('.').next().unwrap_or_default();
    format!(
        "`{}`, begun at {since}Z, is under way in this cluster: nothing was changed; wait for its end (of a program that was killed, {} s), or give --force-lock",
        holder(lease),
        DURATION.as_secs()
    )
}

/// Whether the holder has given no sign for longer than it may. Clocks of other machines are trusted to say that it lives, not that it is dead.
async fn is_dead(cluster: &Cluster, lease: &Value) -> anyhow::Result<bool> {
    if holder(lease).is_empty() {
        return Ok(true);
    }
    let renewed = lease["spec"]["renewTime"].as_str().unwrap_or_default();
    if let Ok(renewed) = renewed.parse::<jiff::Timestamp>() {
        let age = jiff::Timestamp::now()
            .duration_since(renewed)
            .unsigned_abs();
        if age < DURATION {
            return Ok(false);
        }
    }
    eprintln!(
        "`{}` has not finished, and gives no sign: waiting {} s for one.",
        holder(lease),
        RENEW.as_secs() + 1
    );
    sleep(RENEW + Duration::from_secs(1)).await;
    let again = read(cluster).await?;
    Ok(again.is_none_or(|again| again["spec"] == lease["spec"]))
}

/// Renews it until it is lost; gives why.
async fn keep(cluster: &Cluster, own: &str) -> anyhow::Error {
    let mut renewed = Instant::now();
    loop {
        sleep(RENEW).await;
        match renew(cluster, own).await {
            Ok(()) => renewed = Instant::now(),
            Err(error) if error.is::<Lost>() => return error,
            Err(_) if renewed.elapsed() < DURATION => {}
            Err(error) => {
                return error.context(format!(
                    "renewing Lease default/{NAME}: stopped half way, since somebody else may install now"
                ));
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error(
    "{0} took Lease default/mesh-install over: stopped half way; see what they make of it, then do it again"
)]
struct Lost(String);

async fn renew(cluster: &Cluster, own: &str) -> anyhow::Result<()> {
    for _ in 0..ATTEMPTS {
        let Some(mut lease) = cluster.read_optional(&path()).await? else {
            return Err(Lost("Somebody".to_owned()).into());
        };
        if holder(&lease) != own {
            return Err(Lost(format!("`{}`", holder(&lease))).into());
        }
        lease["spec"]["renewTime"] = json!(now());
        if cluster.unless_conflict("PUT", &path(), &lease).await? {
            return Ok(());
        }
    }
    bail!("others change it all the time")
}

/// Removes it where it is ours.
async fn release(cluster: &Cluster, own: &str) -> anyhow::Result<()> {
    if let Some(lease) = cluster.read_optional(&path()).await?
        && holder(&lease) == own
    {
        delete_exactly(cluster, &path(), &lease).await?;
    }
    Ok(())
}

/// MicroTime: six digits of fraction, always.
fn now() -> String {
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ");
    now.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_in_the_way_is_named() {
        let lease = json!({ "spec": { "holderIdentity": identity("mesh install"), "acquireTime": "2026-01-02T03:04:05.000006Z" } });
        let said = occupied(&lease);
        for part in [
            "`mesh install of ",
            "begun at 2026-01-02T03:04:05Z",
            "--force-lock",
        ] {
            assert!(said.contains(part), "{said}");
        }
        assert_ne!(identity("a"), identity("a"), "each has its own number");
    }
}
