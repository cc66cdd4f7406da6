//! `mesh install`: puts the mesh into a cluster, or makes the one that is there what the settings say.
//!
//! One at a time in a cluster (`lock.rs`). Look first (`preflight.rs`), then apply part by part (`objects.rs`), waiting for each (`ready.rs`); then remove what the last installation
//! of this revision owned and this one has not (`owned.rs`). What was asked for is kept in the cluster (`record.rs`).

mod answer;
pub(crate) mod build;
pub(crate) mod lock;
pub(crate) mod objects;
pub(crate) mod owned;
mod preflight;
pub(crate) mod ready;
pub(crate) mod record;
pub(crate) mod tags;

use std::io::{BufRead as _, IsTerminal as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::Global;
use crate::apply::Change;
use crate::cluster::Cluster;
use crate::install::webhooks::TAG;
use crate::install::{Component, DEFAULT_REVISION, NAMESPACE, Plan, Settings};
use crate::version::VERSION;

use objects::Session;
use record::Phase;

/// Install the mesh into a cluster, or change an installation
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What is asked for.
    #[command(flatten)]
    pub settings: Settings,
    /// How it is done.
    #[command(flatten)]
    pub how: How,
}

/// How an installation is done.
#[derive(Debug, Clone, clap::Args)]
pub struct How {
    /// Don't ask
    #[arg(short = 'y', long)]
    pub skip_confirmation: bool,
    /// Show what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Install although another mesh, or an unsupported version of Kubernetes, was found
    #[arg(long)]
    pub force: bool,
    /// Go on although another installation seems to be under way: it is stopped where it is, if it still runs
    #[arg(long)]
    pub force_lock: bool,
    /// Longest wait for each part, such as 300s or 5m
    #[arg(long, value_name = "TIME", default_value = "300s", value_parser = crate::wait::duration)]
    pub readiness_timeout: Duration,
}

/// Runs the command: nothing is changed before everything was looked at; then part by part, each waited for.
///
/// # Errors
/// Settings that can't be taken; a cluster that can't be reached, that refuses, or that has another mesh; a part that does not become ready.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let spec = args.settings.spec(namespace(global))?;
    carry_out("mesh install", &spec, &args.how, global).await
}

/// Installs what a spec asks for, as a command of this name.
pub(crate) async fn carry_out(
    command: &str,
    spec: &Value,
    how: &How,
    global: &Global,
) -> anyhow::Result<ExitCode> {
    let mut plan = Plan::new(spec)?;
    build::mark(&mut plan);
    for warning in &plan.warnings {
        eprintln!("Warning: {warning}");
    }
    if plan.components.is_empty() {
        bail!(
            "profile {:?} with these settings installs nothing: switch components on, or take another profile",
            plan.profile
        );
    }
    let cluster = global.cluster().await?;
    let mut session = preflight::admit(&cluster, &plan, how.force).await?;
    if how.dry_run {
        preflight::look(&mut session, &mut plan, how).await?;
        return dry_run(&mut session, &plan, global).await;
    }
    // Before anything is looked at: what is seen should still be so when it is changed.
    let work = make(session, plan, spec, how, global);
    lock::alone(&cluster, command, how.force_lock, work).await?;
    Ok(ExitCode::SUCCESS)
}

/// Makes the cluster what the plan says.
async fn make(
    mut session: Session<'_>,
    mut plan: Plan,
    spec: &Value,
    how: &How,
    global: &Global,
) -> anyhow::Result<()> {
    let cluster = session.cluster;
    preflight::look(&mut session, &mut plan, how).await?;
    let question = format!(
        "This installs mesh {VERSION}, profile {:?}, revision {:?}, into namespace {} of {}.",
        plan.profile, plan.revision, plan.namespace, cluster.server
    );
    confirm(&question, how.skip_confirmation).await?;
    for component in &plan.components {
        install(&session, &plan, component, how, global).await?;
        // The record needs its namespace.
        if component.name == "Base" {
            record::write(&session, &plan, spec, Phase::Installing).await?;
        }
        if component.name == "Pilot" && has_default_tag(&plan) {
            tags::switch_default(cluster, false).await?;
        }
    }
    if session.default_tag
        && !has_default_tag(&plan)
        && owned::loses_default_tag(&session, &plan).await?
    {
        tags::switch_default(cluster, true).await?;
    }
    let gone = owned::prune(&session, &plan).await?;
    if !gone.is_empty() {
        global.out.line(format_args!(
            "✔ Removed what is no longer part of it: {}",
            gone.join(", ")
        ))?;
    }
    record::write(&session, &plan, spec, Phase::Installed).await?;
    for note in ready::pending(&session, &plan).await? {
        global.out.line(format_args!("! {note}"))?;
    }
    global.out.line("✔ Installation complete")
}

/// Whether an installation makes its revision the one that answers where none is named.
fn has_default_tag(plan: &Plan) -> bool {
    let mut all = plan.objects();
    all.any(|object| tags::label_of(object, TAG) == DEFAULT_REVISION)
}

/// The namespace of the mesh's own parts, where the command line names one.
pub(crate) fn namespace(global: &Global) -> Option<&str> {
    Some(global.istio_namespace.as_str()).filter(|namespace| *namespace != NAMESPACE)
}

/// Asks a person to go on.
///
/// # Errors
/// Any answer but yes.
pub(crate) async fn confirm(what: &str, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    eprint!("{what} Proceed? (y/N) ");
    // On a thread that nobody waits for: meanwhile Ctrl-C is heard, and the lock kept.
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut answer = String::new();
        let read = std::io::stdin().lock().read_line(&mut answer);
        // Whoever asked may have gone.
        let _ = sender.send(read.map(|_| answer));
    });
    let answer = receiver.await.context("reading the answer")?;
    let answer = answer.context("reading the answer")?;
    if !std::io::stdin().is_terminal() {
        eprintln!();
    }
    if !["y", "yes"].contains(&answer.trim().to_lowercase().as_str()) {
        bail!("not confirmed, nothing was changed; answer y, or give -y");
    }
    Ok(())
}

/// What people call a component.
pub(crate) fn title(component: &str) -> &str {
    match component {
        "Base" => "Resource kinds",
        "Pilot" => "Control plane",
        "IstiodRemote" => "Webhooks of the remote control plane",
        "IngressGateways" => "Ingress gateways",
        "EgressGateways" => "Egress gateways",
        other => other,
    }
}

async fn install(
    session: &Session<'_>,
    plan: &Plan,
    component: &Component,
    how: &How,
    global: &Global,
) -> anyhow::Result<()> {
    let title = title(component.name);
    let (mut created, mut configured) = (0, 0);
    for object in &component.objects {
        match session
            .apply(object, false)
            .await
            .with_context(|| half(title))?
            .change
        {
            Change::Created => created += 1,
            Change::Configured => configured += 1,
            Change::Unchanged => {}
        }
    }
    ready::wait(session, plan, component, how)
        .await
        .with_context(|| half(title))?;
    let all = component.objects.len();
    global.out.line(format_args!(
        "✔ {title} installed ({all} objects: {created} created, {configured} configured, {} unchanged)",
        all - created - configured
    ))
}

fn half(title: &str) -> String {
    format!(
        "installing: {title} (what was applied stays; correct it and install again, or `mesh uninstall`)"
    )
}

/// Shows the differences.
async fn dry_run(
    session: &mut Session<'_>,
    plan: &Plan,
    global: &Global,
) -> anyhow::Result<ExitCode> {
    let out = &global.out;
    for object in plan.objects() {
        let label = objects::label(object);
        if session.awaits_something(object).await? {
            out.line(format_args!("{label} would be created"))?;
            continue;
        }
        let applied = session.apply(object, true).await?;
        match applied.change {
            Change::Unchanged => {}
            Change::Created => out.line(format_args!("{label} would be created"))?,
            Change::Configured => {
                out.line(format_args!("{label} would be configured"))?;
                let before = applied.before.unwrap_or_default();
                out.print(&difference(&label, &before, &applied.after))?;
            }
        }
    }
    for (_, label) in owned::superfluous(session, plan).await? {
        out.line(format_args!("{label} would be removed"))?;
    }
    out.line("Dry run: nothing was changed")?;
    Ok(ExitCode::SUCCESS)
}

/// What changes in an object, in the form of diff.
fn difference(label: &str, before: &Value, after: &Value) -> String {
    let text = |object: &Value| {
        let mut object = object.clone();
        if let Some(metadata) = object["metadata"].as_object_mut() {
            for bookkeeping in ["managedFields", "resourceVersion", "generation"] {
                metadata.remove(bookkeeping);
            }
        }
        mesh_api::yaml::to_string(&object)
    };
    let (before, after) = (text(before), text(after));
    similar::TextDiff::from_lines(&before, &after)
        .unified_diff()
        .header(&format!("{label} as it is"), &format!("{label} after"))
        .to_string()
}

/// A cluster to work with.
///
/// # Errors
/// One that can't be reached.
pub(crate) async fn session(cluster: &Cluster) -> anyhow::Result<Session<'_>> {
    Session::new(cluster).await
}
