//! `mesh apply`: makes objects what the manifests say (server-side apply).

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::Value;

use crate::Global;
use crate::cluster::Cluster;
use crate::files::{self, Manifest};
use crate::resources::Resources;

/// Who owns the fields that are applied.
const FIELD_MANAGER: &str = "mesh";

/// Create or change objects from manifests
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// File, directory or `-` for standard input; may be repeated
    #[arg(short, long, required = true, value_name = "FILE")]
    pub filename: Vec<PathBuf>,
    /// Read directories below directories too
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// Let the server check everything, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// What became of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Created,
    Configured,
    Unchanged,
}

impl Change {
    /// The word for it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
        }
    }
}

/// Runs the command: every manifest is read and checked before the first one is applied; then in order, until one fails.
///
/// # Errors
/// A manifest that can't be read or that the server refuses; the message says what was applied before.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let manifests = files::read(&args.filename, args.recursive)?;
    check(&manifests)?;
    let cluster = global.cluster().await?;
    let mut resources = Resources::discover(&cluster).await?;
    let suffix = if args.dry_run {
        " (server dry run)"
    } else {
        ""
    };
    for (done, manifest) in manifests.iter().enumerate() {
        let result = apply(&cluster, &mut resources, manifest, global, args.dry_run).await;
        let (label, change) =
            result.with_context(|| failure(manifest, done, manifests.len(), args.dry_run))?;
        global
            .out
            .line(format_args!("{label} {}{suffix}", change.word()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is known about Istio's kinds is checked before the cluster is touched.
fn check(manifests: &[Manifest]) -> anyhow::Result<()> {
    for manifest in manifests {
        let group = manifest
            .api_version
            .split_once('/')
            .map_or("", |(group, _)| group);
        if mesh_api::registry::lookup(group, &manifest.kind).is_none() {
            continue;
        }
        let object = mesh_api::parse(&manifest.object)
            .with_context(|| format!("{}; nothing was applied", manifest.describe()))?;
        let findings = mesh_api::validate(&object);
        let errors: Vec<String> = findings
            .iter()
            .filter(|finding| finding.severity == mesh_api::Severity::Error)
            .map(ToString::to_string)
            .collect();
        for warning in findings
            .iter()
            .filter(|finding| finding.severity == mesh_api::Severity::Warning)
        {
            eprintln!("Warning: {}: {warning}", manifest.describe());
        }
        if !errors.is_empty() {
            anyhow::bail!(
                "{}: {}; nothing was applied",
                manifest.describe(),
                errors.join("; ")
            );
        }
    }
    Ok(())
}

fn failure(manifest: &Manifest, done: usize, all: usize, dry_run: bool) -> String {
    let applied = match (dry_run, done) {
        (true, _) => "nothing was changed".to_owned(),
        (false, 0) => "nothing was applied".to_owned(),
        (false, done) => format!(
            "the {done} before it of {all} are applied, the rest is not; correct it and apply again"
        ),
    };
    format!("applying {}: {applied}", manifest.describe())
}

async fn apply(
    cluster: &Cluster,
    resources: &mut Resources,
    manifest: &Manifest,
    global: &Global,
    dry_run: bool,
) -> anyhow::Result<(String, Change)> {
    // The kind may have come with a CRD that was applied a moment ago.
    if resources
        .of(&manifest.api_version, &manifest.kind)
        .is_none()
    {
        *resources = Resources::discover(cluster).await?;
    }
    let resource = resources.of(&manifest.api_version, &manifest.kind).with_context(|| {
        format!("the cluster has no kind {} in {}; install its CRD first, or correct apiVersion and kind", manifest.kind, manifest.api_version)
    })?;
    let namespace = manifest.namespace(global.namespace.as_deref(), &cluster.namespace)?;
    let mut object = manifest.object.clone();
    if resource.namespaced {
        object["metadata"]["namespace"] = namespace.into();
    }
    let path = resource.object(namespace, &manifest.name);
    let before = cluster.read_optional(&path).await?;
    let mode = if dry_run { "&dryRun=All" } else { "" };
    let url =
        format!("{path}?fieldManager={FIELD_MANAGER}&force=true&fieldValidation=Strict{mode}");
    let headers = [
        ("content-type", "application/apply-patch+yaml"),
        ("accept", "application/json"),
    ];
    let after = cluster
        .request("PATCH", &url, &headers, serde_json::to_vec(&object)?)
        .await?;
    Ok((
        resource.label(&manifest.name),
        change(before.as_ref(), &after),
    ))
}

/// A dry run leaves the version as it is, so the content decides.
pub(crate) fn change(before: Option<&Value>, after: &Value) -> Change {
    let content = |object: &Value| {
        let mut object = object.clone();
        if let Some(metadata) = object["metadata"].as_object_mut() {
            for bookkeeping in ["managedFields", "resourceVersion", "generation"] {
                metadata.remove(bookkeeping);
            }
        }
        object
    };
    let version = |object: &Value| object.pointer("/metadata/resourceVersion").cloned();
    match before {
        None => Change::Created,
        Some(before) if version(before) == version(after) && content(before) == content(after) => {
            Change::Unchanged
        }
        Some(_) => Change::Configured,
    }
}
