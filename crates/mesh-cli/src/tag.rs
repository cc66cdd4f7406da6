//! `mesh tag`: names for revisions. Namespaces that ask for a name get the revision that it stands for, now this one and then that one,
//! without being labelled anew.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::Global;
use crate::cluster::Cluster;
use crate::get::Output;
use crate::install::webhooks::Tag;
use crate::install::{DEFAULT_REVISION, check_name};
use crate::installer::objects::{self, Session, label};
use crate::installer::tags::{self, Live, label_of};
use crate::installer::{confirm, session};
use crate::table::Table;

/// Longest wait for a control plane to take a tag's webhooks over.
const SOON: Duration = Duration::from_secs(30);

/// Give revisions names by which namespaces choose their control plane
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Make a tag, or let it stand for another revision
    Set(Set),
    /// Print the webhook configurations that `set` applies
    Generate(Set),
    /// Show the tags, what they stand for and who uses them
    #[command(visible_alias = "show")]
    List {
        /// Form of the output: json or yaml, else a table
        #[arg(short, long, value_name = "FORM", value_parser = crate::version::form)]
        output: Option<Output>,
    },
    /// Remove a tag
    #[command(visible_alias = "delete")]
    Remove {
        /// Its name
        name: String,
        /// Don't ask, even where namespaces use it
        #[arg(short = 'y', long)]
        skip_confirmation: bool,
    },
}

#[derive(Debug, Clone, clap::Args)]
struct Set {
    /// Name of the tag, such as prod; `default` answers where no revision is named
    name: String,
    /// Revision that it stands for
    #[arg(short, long, value_name = "NAME")]
    revision: String,
    /// Let a tag that is there stand for this revision
    #[arg(long)]
    overwrite: bool,
    /// With the tag default: inject namespaces that say nothing too
    #[arg(long)]
    auto_inject_namespaces: bool,
    /// Name of the webhook configuration [default: istio-revision-tag-NAME]
    #[arg(long, value_name = "NAME")]
    webhook_name: Option<String>,
    /// Accepted for scripts: nothing is asked here
    #[arg(short = 'y', long, hide = true)]
    skip_confirmation: bool,
}

/// Runs the command.
///
/// # Errors
/// A revision or tag that there is not, a tag that is there, a server that can't be reached or refuses.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    match args.command {
        Command::Set(args) => set(&cluster, &args, global).await?,
        Command::Generate(args) => {
            let objects = wanted(&cluster, &args, global).await?;
            let text = mesh_api::yaml::to_string_all(&objects);
            global.out.print(&text)?;
        }
        Command::List { output } => list(&cluster, output, global).await?,
        Command::Remove {
            name,
            skip_confirmation,
        } => remove(&cluster, &name, skip_confirmation, global).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn set(cluster: &Cluster, args: &Set, global: &Global) -> anyhow::Result<()> {
    let wanted = wanted(cluster, args, global).await?;
    let session = session(cluster).await?;
    for object in &wanted {
        session.apply(object, false).await?;
    }
    // Between the two both answer, and the second finds the pod injected.
    if args.name == DEFAULT_REVISION {
        tags::switch_default(cluster, false).await?;
    }
    for object in &wanted {
        taken_over(&session, object, &args.revision).await?;
    }
    let asks = match args.name.as_str() {
        DEFAULT_REVISION => "istio-injection=enabled".to_owned(),
        name => format!("istio.io/rev={name}"),
    };
    global.out.line(format_args!(
        "Tag {:?} stands for revision {:?}. Namespaces ask for it by the label {asks}; pods that run keep their proxies until they are made anew.",
        args.name, args.revision
    ))
}

/// Waits until the control plane has written its authority's certificate into a webhook configuration.
async fn taken_over(session: &Session<'_>, object: &Value, revision: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let live = session.live(object).await?.unwrap_or_default();
        let mut all = live["webhooks"].as_array().into_iter().flatten();
        let trusted = |webhook: &Value| {
            let config = &webhook["clientConfig"];
            config["url"].is_string() || config["caBundle"].as_str().is_some_and(|b| !b.is_empty())
        };
        if all.all(trusted) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(
                "{} has no caBundle after {} s, so that pods that ask for it can't be made: the control plane of revision {revision:?} should have written it; see whether it runs, or remove the tag",
                label(object),
                SOON.as_secs()
            );
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// The configurations that a tag is made of.
async fn wanted(cluster: &Cluster, args: &Set, global: &Global) -> anyhow::Result<Vec<Value>> {
    let Set { name, revision, .. } = args;
    check_name("the tag", name)?;
    if args.auto_inject_namespaces && name != DEFAULT_REVISION {
        bail!(
            "--auto-inject-namespaces: namespaces that say nothing are those of the tag default; leave it out for {name:?}"
        );
    }
    let injectors = tags::injectors(cluster).await?;
    let own = |revision: &str| {
        let of = |live: &&Value| label_of(live, "istio.io/rev") == revision;
        let here = |live: &&Value| {
            let service = &live["webhooks"][0]["clientConfig"]["service"];
            service.is_null() || service["namespace"] == global.istio_namespace.as_str()
        };
        injectors.iter().filter(of).find(here)
    };
    if let Some(release) = own(revision).and_then(objects::release) {
        eprintln!(
            "Warning: the control plane of revision {revision:?} belongs to {release}, which knows nothing of tag {name:?}: `mesh tag remove {name}` before `helm uninstall`, else pods that ask for the tag can't be made afterwards"
        );
    }
    let Some(injector) = own(revision).and_then(tags::injector) else {
        let mut known: Vec<&str> = injectors
            .iter()
            .map(|live| label_of(live, "istio.io/rev"))
            .collect();
        known.sort_unstable();
        let known = match known.as_slice() {
            [] => "none is installed".to_owned(),
            known => format!("there are {}", known.join(", ")),
        };
        bail!(
            "there is no control plane of revision {revision:?} in namespace {}; {known}",
            global.istio_namespace
        );
    };
    if name != DEFAULT_REVISION && own(name).is_some() {
        bail!("{name:?} is a revision: a tag needs a name of its own");
    }
    let all = tags::list(cluster).await?;
    let there = all.iter().find(|live| live.injects() && live.tag == *name);
    if let Some(live) = there.filter(|live| !args.overwrite && live.revision != *revision) {
        bail!(
            "tag {name:?} stands for revision {:?}: --overwrite lets it stand for {revision:?}",
            live.revision
        );
    }
    let injector = crate::install::webhooks::Injector {
        auto: name == DEFAULT_REVISION && (args.auto_inject_namespaces || injector.auto),
        ..injector
    };
    let tag = Tag {
        name,
        revision,
        namespace: &global.istio_namespace,
    };
    let mut objects = tags::made_by_hand(&tag, &injector);
    // A tag keeps the name that its configuration was given.
    let kept = there.map(|live| live.object["metadata"]["name"].clone());
    let chosen = args.webhook_name.as_ref().map(|name| json!(name));
    match (chosen, kept) {
        (Some(chosen), Some(kept)) if chosen != kept => {
            bail!(
                "tag {name:?} is the webhook configuration {kept}: remove it before it is made as {chosen}"
            )
        }
        (Some(chosen), _) => objects[0]["metadata"]["name"] = chosen,
        (None, Some(kept)) => objects[0]["metadata"]["name"] = kept,
        (None, None) => {}
    }
    Ok(objects)
}

async fn list(cluster: &Cluster, output: Option<Output>, global: &Global) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for live in tags::list(cluster).await?.iter().filter(|l| l.injects()) {
        let users = tags::users(cluster, &live.tag).await?;
        rows.push((live.tag.clone(), live.revision.clone(), users));
    }
    rows.sort();
    let tree = || {
        let one = |(tag, revision, namespaces): &(String, String, Vec<String>)| json!({ "tag": tag, "revision": revision, "namespaces": namespaces });
        rows.iter().map(one).collect::<Value>()
    };
    match output {
        Some(Output::Json) => {
            let text = serde_json::to_string_pretty(&tree())?;
            global.out.line(text)
        }
        Some(_) => global.out.print(&mesh_api::yaml::to_string(&tree())),
        None if rows.is_empty() => {
            eprintln!("There are no tags; `mesh tag set NAME --revision REVISION` makes one.");
            Ok(())
        }
        None => {
            let cells = rows.iter().map(|(tag, revision, namespaces)| {
                vec![tag.clone(), revision.clone(), namespaces.join(",")]
            });
            let table = Table::new(&["TAG", "REVISION", "NAMESPACES"], cells.collect());
            global.out.print(&table.render(&table.widths(), true))
        }
    }
}

async fn remove(cluster: &Cluster, name: &str, yes: bool, global: &Global) -> anyhow::Result<()> {
    let all = tags::list(cluster).await?;
    let parts: Vec<&Live> = all.iter().filter(|live| live.tag == name).collect();
    if parts.is_empty() {
        let mut known: Vec<&str> = all.iter().map(|live| live.tag.as_str()).collect();
        known.sort_unstable();
        known.dedup();
        let known = match known.as_slice() {
            [] => "there are no tags".to_owned(),
            known => format!("there are {}", known.join(", ")),
        };
        bail!("there is no tag {name:?}; {known}");
    }
    let users = tags::users(cluster, name).await?;
    let goes_on = name == DEFAULT_REVISION && default_is_there(cluster).await?;
    if !users.is_empty() && !goes_on {
        let question = format!(
            "{} namespaces ask for tag {name:?}, and their new pods will get no sidecar: {}.",
            users.len(),
            users.join(", ")
        );
        if yes {
            eprintln!("Warning: {question}");
        }
        confirm(&question, yes).await?;
    }
    if name == DEFAULT_REVISION {
        tags::switch_default(cluster, true).await?;
    }
    for live in parts {
        objects::delete(cluster, &live.path)
            .await
            .with_context(|| format!("removing tag {name:?}"))?;
    }
    global.out.line(format_args!("Tag {name:?} is removed."))
}

/// Whether the revision `default` answers once there is no such tag.
async fn default_is_there(cluster: &Cluster) -> anyhow::Result<bool> {
    let all = tags::injectors(cluster).await?;
    Ok(all
        .iter()
        .any(|live| label_of(live, "istio.io/rev") == DEFAULT_REVISION))
}
