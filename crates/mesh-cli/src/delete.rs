//! `mesh delete`: removes objects.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::Global;
use crate::cluster::{Cluster, query};
use crate::files;
use crate::resources::{self, Resource, Resources};

/// Remove objects by name, by label or by manifest
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// TYPE NAME..., TYPE/NAME..., or TYPE with -l or --all
    #[arg(value_name = "TYPE NAME")]
    pub targets: Vec<String>,
    /// File, directory or `-` for standard input, with the objects to remove; may be repeated
    #[arg(short, long, value_name = "FILE", conflicts_with = "targets")]
    pub filename: Vec<PathBuf>,
    /// Read directories below directories too
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// Remove objects with these labels
    #[arg(short = 'l', long, value_name = "LABELS")]
    pub selector: Option<String>,
    /// Remove all objects of the type in the namespace
    #[arg(long)]
    pub all: bool,
    /// An object that is not there is no error
    #[arg(long)]
    pub ignore_not_found: bool,
    /// Seconds that a pod may take to end; 0 with --force ends it at once
    #[arg(long, value_name = "SECONDS")]
    pub grace_period: Option<u32>,
    /// Remove at once, without waiting for a graceful end
    #[arg(long)]
    pub force: bool,
    /// Wait until the objects are gone
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub wait: bool,
    /// Longest wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub timeout: u64,
}

/// An object to remove.
struct Target {
    resource: Resource,
    namespace: String,
    name: String,
}

/// Runs the command: everything is asked to go first, then waited for.
///
/// # Errors
/// An unknown type, an object that is not there (all others are removed), an object that is still there when the time is over.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    if args.targets.is_empty() && args.filename.is_empty() {
        anyhow::bail!("nothing to delete: give TYPE NAME, TYPE/NAME or -f FILE");
    }
    let cluster = global.cluster().await?;
    let resources = Resources::discover(&cluster).await?;
    let mut missing = Vec::new();
    let mut going = Vec::new();
    for target in targets(&args, global, &cluster, &resources).await? {
        match delete(&cluster, &target, &args).await? {
            Some(uid) => {
                global.out.line(format_args!(
                    "{} {:?} deleted",
                    target.resource.singular_label(),
                    target.name
                ))?;
                going.push((target, uid));
            }
            None if args.ignore_not_found => {}
            None => missing.push(format!(
                "{} {:?} not found",
                target.resource.plural, target.name
            )),
        }
    }
    if args.wait && !args.force {
        wait(&cluster, &going, Duration::from_secs(args.timeout)).await?;
    }
    match missing.as_slice() {
        [] => Ok(ExitCode::SUCCESS),
        missing => anyhow::bail!("Error from server (NotFound): {}", missing.join("; ")),
    }
}

async fn targets(
    args: &Args,
    global: &Global,
    cluster: &Cluster,
    resources: &Resources,
) -> anyhow::Result<Vec<Target>> {
    let mut found = Vec::new();
    if !args.filename.is_empty() {
        for manifest in files::read(&args.filename, args.recursive)? {
            let resource = resources.of(&manifest.api_version, &manifest.kind);
            // A kind that the cluster no longer has took its objects with it.
            let Some(resource) = resource else {
                eprintln!(
                    "Warning: {}: the cluster has no such kind, so there is nothing to delete",
                    manifest.describe()
                );
                continue;
            };
            let namespace = manifest
                .namespace(global.namespace.as_deref(), &cluster.namespace)?
                .to_owned();
            found.push(Target {
                resource: resource.clone(),
                namespace,
                name: manifest.name,
            });
        }
        return Ok(found);
    }
    for (kind, names) in resources::targets(&args.targets)? {
        for resource in resources.named(&kind)? {
            let target = |name: String| Target {
                resource: resource.clone(),
                namespace: cluster.namespace.clone(),
                name,
            };
            if !names.is_empty() {
                found.extend(names.iter().cloned().map(target));
            } else if args.all || args.selector.is_some() {
                let selector = args
                    .selector
                    .as_deref()
                    .map(|labels| format!("?labelSelector={}", query(labels)))
                    .unwrap_or_default();
                let list = cluster
                    .read(&format!(
                        "{}{selector}",
                        resource.path(Some(&cluster.namespace))
                    ))
                    .await?;
                let names = list["items"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|item| item["metadata"]["name"].as_str().map(str::to_owned));
                found.extend(names.map(target));
            } else {
                anyhow::bail!(
                    "deleting {}: name the objects, or give -l LABELS or --all",
                    resource.plural
                );
            }
        }
    }
    if found.is_empty() {
        eprintln!("No resources found");
    }
    Ok(found)
}

/// Asks for an object's removal; its uid comes back, or nothing if it is not there.
async fn delete(cluster: &Cluster, target: &Target, args: &Args) -> anyhow::Result<Option<String>> {
    let path = target.resource.object(&target.namespace, &target.name);
    let Some(object) = cluster.read_optional(&path).await? else {
        return Ok(None);
    };
    let mut options =
        json!({ "kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background" });
    if let Some(seconds) = args.grace_period.or(args.force.then_some(0)) {
        options["gracePeriodSeconds"] = json!(seconds);
    }
    let headers = [("content-type", "application/json")];
    // Somebody else may have removed it since it was read.
    let asked = cluster
        .delete_optional(&path, &headers, serde_json::to_vec(&options)?)
        .await
        .with_context(|| format!("deleting {}", target.resource.label(&target.name)))?;
    Ok(asked.then(|| {
        object
            .pointer("/metadata/uid")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    }))
}

/// Waits until objects are gone, or others have their names.
async fn wait(
    cluster: &Cluster,
    going: &[(Target, String)],
    timeout: Duration,
) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + timeout;
    for (target, uid) in going {
        let path = target.resource.object(&target.namespace, &target.name);
        while let Some(object) = cluster.read_optional(&path).await? {
            if object.pointer("/metadata/uid").and_then(Value::as_str) != Some(uid) {
                break;
            }
            if tokio::time::Instant::now() >= deadline {
                anyhow::bail!(
                    "{} is still there after {} s; it will go when its finalizers or containers are done",
                    target.resource.label(&target.name),
                    timeout.as_secs()
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}
