//! `mesh uninstall`: removes an installation, or everything that this program ever installed.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::Global;
use crate::cluster::{Cluster, query};
use crate::install::webhooks::TAG;
use crate::install::{COMPONENT, DEFAULT_REVISION};
use crate::installer::objects::{self, Session, label};
use crate::installer::tags::{self, label_of};
use crate::installer::{build, confirm, lock, owned, record};

/// Remove an installation from a cluster
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Everything: all revisions, namespaces that were made for them, and the resource kinds, with all objects of these kinds
    #[arg(long, conflicts_with = "revision")]
    pub purge: bool,
    /// The installation of this revision alone
    #[arg(short, long, value_name = "NAME", default_value = "default")]
    pub revision: String,
    /// Don't ask
    #[arg(short = 'y', long)]
    pub skip_confirmation: bool,
    /// Show what would be removed, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Go on although an installation seems to be under way: it is stopped where it is, if it still runs
    #[arg(long)]
    pub force_lock: bool,
    /// Longest wait until all is gone, such as 300s or 5m
    #[arg(long, value_name = "TIME", default_value = "300s", value_parser = crate::wait::duration)]
    pub timeout: Duration,
}

/// What the control plane makes while it runs: ConfigMaps with the mesh's root in every namespace, and in its own its authority and election.
const ROOTS: &str = "istio-ca-root-cert";
const OF_CONTROL_PLANE: [(&str, &str); 4] = [
    ("/api/v1", "secrets/istio-ca-secret"),
    ("/api/v1", "configmaps/istio-ca-rotation"),
    ("/api/v1", "configmaps/istio-ca-root-cert"),
    ("/apis/coordination.k8s.io/v1", "leases/istio-status-leader"),
];

/// Runs the command: webhooks first, so that nothing is asked of a control plane that ends; then what runs; then the rest.
///
/// # Errors
/// Nothing to remove, a server that refuses, something that is still there when the time is over.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    if args.dry_run {
        return remove_all(&cluster, &args, global).await;
    }
    let work = remove_all(&cluster, &args, global);
    lock::alone(&cluster, "mesh uninstall", args.force_lock, work).await
}

async fn remove_all(cluster: &Cluster, args: &Args, global: &Global) -> anyhow::Result<ExitCode> {
    let mut session = crate::installer::session(cluster).await?;
    let owner = crate::install::owner(&args.revision);
    let one = (!args.purge).then_some(&args.revision);
    let mut objects = owned::list(&session, one.map(|_| owner.as_str())).await?;
    if args.purge || !objects.is_empty() {
        // First, as everything that calls a control plane.
        let tags = owned::tags(&session, one.map(String::as_str)).await?;
        objects.splice(0..0, tags);
    }
    let returned = match one {
        Some(revision) => give_back(&session, revision, &mut objects, global).await?,
        None => Vec::new(),
    };
    let mut shared = Vec::new();
    if args.purge {
        shared = owned::shared(&session).await?;
        keep_for_another(&mut session, &mut shared).await?;
        let helms = owned::kinds_of_helm(&session).await?;
        if let Some(release) = helms.first().and_then(objects::kind_of) {
            eprintln!(
                "{} resource kinds belong to {release} and stay; `kubectl delete crd -l {COMPONENT}=Base` removes them, with all objects of these kinds.",
                helms.len()
            );
        }
    }
    if objects.is_empty() && shared.is_empty() {
        bail!("nothing to remove: {}", nothing(args));
    }
    for (_, object) in objects.iter().chain(&shared) {
        global
            .out
            .line(format_args!("{} is to be removed", label(object)))?;
    }
    for object in &returned {
        global.out.line(format_args!(
            "{} is to be given back to revision {:?}",
            label(object),
            label_of(object, "istio.io/rev")
        ))?;
    }
    if args.dry_run {
        global.out.line("Dry run: nothing was removed")?;
        return Ok(ExitCode::SUCCESS);
    }
    warn(&session, args, &objects, &shared).await?;
    let question = format!(
        "This removes {} objects from {}.",
        objects.len() + shared.len(),
        cluster.server
    );
    confirm(&question, args.skip_confirmation).await?;
    let deadline = Instant::now() + args.timeout;
    let namespaces = control_planes(&objects);
    for object in &returned {
        session.apply(object, false).await?;
    }
    let is_default = |(_, object): &(String, Value)| label_of(object, TAG) == DEFAULT_REVISION;
    if !args.purge && objects.iter().any(is_default) {
        // Before the tag goes, so that somebody always answers.
        tags::switch_default(cluster, true).await?;
    }
    remove(&session, &objects, deadline).await?;
    if args.purge {
        // A control plane that still runs would make them again.
        ended(&session, &namespaces, deadline).await?;
        if !session.other_mesh {
            traces(&session, &namespaces).await?;
        }
        remove(&session, &shared, deadline).await?;
    }
    global.out.line("✔ Uninstall complete")?;
    Ok(ExitCode::SUCCESS)
}

/// What another installation had before this one took it over (gateways have one name in all revisions) is not removed: these are the objects
/// as that one wants them.
async fn give_back(
    session: &Session<'_>,
    revision: &str,
    objects: &mut Vec<(String, Value)>,
    global: &Global,
) -> anyhow::Result<Vec<Value>> {
    let mut returned = Vec::new();
    if objects.is_empty() {
        return Ok(returned);
    }
    for mut plan in record::other_plans(session, &global.istio_namespace, revision).await? {
        build::mark(&mut plan);
        for object in plan.objects() {
            if session.kind(object).is_none() {
                continue;
            }
            let path = session.path(object)?;
            let before = objects.len();
            objects.retain(|(known, _)| *known != path);
            if objects.len() < before {
                returned.push(object.clone());
            }
        }
    }
    Ok(returned)
}

fn nothing(args: &Args) -> String {
    match args.purge {
        true => "this program installed nothing here".to_owned(),
        false => format!(
            "there is no installation of revision {:?}; --purge removes all revisions and what they share",
            args.revision
        ),
    }
}

/// Another mesh needs the kinds, and the namespace that it is in.
async fn keep_for_another(
    session: &mut Session<'_>,
    shared: &mut Vec<(String, Value)>,
) -> anyhow::Result<()> {
    let list = session
        .cluster
        .read("/apis/apps/v1/deployments?labelSelector=app%3Distiod")
        .await?;
    let others: Vec<&str> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|live| !objects::is_ours(live))
        .filter_map(|live| live["metadata"]["namespace"].as_str())
        .collect();
    if others.is_empty() {
        return Ok(());
    }
    session.other_mesh = true;
    eprintln!(
        "Another mesh is in this cluster: the resource kinds and its namespace are left to it."
    );
    shared.retain(|(_, object)| {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        object["kind"] == "Namespace" && !others.contains(&name)
    });
    Ok(())
}

/// What goes with it, and who will miss it.
async fn warn(
    session: &Session<'_>,
    args: &Args,
    objects: &[(String, Value)],
    shared: &[(String, Value)],
) -> anyhow::Result<()> {
    let tags = objects.iter().filter(|(_, object)| {
        object["kind"] == "MutatingWebhookConfiguration" && !label_of(object, TAG).is_empty()
    });
    for (_, object) in tags {
        let tag = label_of(object, TAG);
        let users = tags::users(session.cluster, tag).await?;
        if !users.is_empty() {
            eprintln!(
                "Warning: tag {tag:?} goes with its revision, and these namespaces ask for it: {}; `mesh tag set {tag} --revision OTHER --overwrite` moves it before",
                users.join(", ")
            );
        }
    }
    gateways(session, args, objects).await?;
    let pods = session.cluster.read("/api/v1/pods").await?;
    let injected = |pod: &&Value| {
        let annotations = &pod["metadata"]["annotations"];
        let revision = annotations["istio.io/rev"].as_str();
        // Gateways are removed themselves.
        let gateway = annotations["inject.istio.io/templates"] == "gateway";
        !gateway && revision.is_some_and(|revision| args.purge || revision == args.revision)
    };
    let count = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(injected)
        .count();
    if count > 0 {
        eprintln!(
            "Warning: {count} pods have proxies of this control plane: they go on with what they have, without new configuration and certificates, until they are made anew"
        );
    }
    let mut kept = 0;
    for (_, kind) in shared {
        let Some((plural, group)) = kind["metadata"]["name"]
            .as_str()
            .filter(|_| kind["kind"] == "CustomResourceDefinition")
            .and_then(|name| name.split_once('.'))
        else {
            continue;
        };
        for version in ["v1", "v1beta1", "v1alpha3", "v1alpha1"] {
            let path = format!("/apis/{group}/{version}/{plural}");
            if let Some(list) = session.cluster.read_optional(&path).await? {
                kept += list["items"].as_array().map_or(0, Vec::len);
                break;
            }
        }
    }
    if kept > 0 {
        eprintln!(
            "Warning: {kept} objects of the mesh's kinds (VirtualServices and the like) are removed with their kinds"
        );
    }
    Ok(())
}

/// Warns where gateways go while the control plane of another revision stays: it may look as if that one had them.
async fn gateways(
    session: &Session<'_>,
    args: &Args,
    objects: &[(String, Value)],
) -> anyhow::Result<()> {
    let is_gateway = |object: &&Value| {
        let component = label_of(object, COMPONENT);
        object["kind"] == "Deployment" && ["IngressGateways", "EgressGateways"].contains(&component)
    };
    let all = objects.iter().map(|(_, object)| object);
    let going: Vec<String> = all.filter(is_gateway).map(label).collect();
    if args.purge || going.is_empty() {
        return Ok(());
    }
    let planes = session
        .cluster
        .read("/apis/apps/v1/deployments?labelSelector=app%3Distiod")
        .await?;
    let revisions = planes["items"].as_array().into_iter().flatten();
    let mut staying: Vec<&str> = revisions
        .map(|live| label_of(live, "istio.io/rev"))
        .filter(|revision| *revision != args.revision)
        .collect();
    staying.sort_unstable();
    staying.dedup();
    if let [first, ..] = staying[..] {
        eprintln!(
            "Warning: {} goes with revision {:?}, and revision {} has none of its own: `mesh install --revision {first}` with a profile that has gateways takes it over before",
            going.join(", "),
            args.revision,
            staying.join(", ")
        );
    }
    Ok(())
}

/// Namespaces of the control planes among objects.
fn control_planes(objects: &[(String, Value)]) -> Vec<String> {
    let mut found: Vec<String> = objects
        .iter()
        .filter_map(|(_, object)| object["metadata"]["namespace"].as_str().map(str::to_owned))
        .collect();
    found.sort();
    found.dedup();
    found
}

async fn remove(
    session: &Session<'_>,
    objects: &[(String, Value)],
    deadline: Instant,
) -> anyhow::Result<()> {
    for (path, _) in objects {
        objects::delete(session.cluster, path).await?;
    }
    for (path, object) in objects {
        while session.cluster.read_optional(path).await?.is_some() {
            if Instant::now() >= deadline {
                bail!(
                    "{} is still there: it goes when its finalizers are done and what is in it is gone; the rest of the installation is removed as far as it came",
                    label(object)
                );
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

/// Waits for the end of the control plane's pods.
async fn ended(
    session: &Session<'_>,
    namespaces: &[String],
    deadline: Instant,
) -> anyhow::Result<()> {
    for namespace in namespaces {
        let path = format!(
            "/api/v1/namespaces/{namespace}/pods?labelSelector={}",
            query("app=istiod,istio=pilot")
        );
        loop {
            let pods = session.cluster.read(&path).await?;
            if pods["items"].as_array().is_none_or(Vec::is_empty) {
                break;
            }
            if Instant::now() >= deadline {
                bail!(
                    "pods of the control plane in {namespace} are still there: remove the installation again when they have ended"
                );
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

/// Removes what control planes left.
async fn traces(session: &Session<'_>, namespaces: &[String]) -> anyhow::Result<()> {
    for namespace in namespaces {
        for (root, name) in OF_CONTROL_PLANE {
            let path = match name.split_once('/') {
                Some((plural, name)) => format!("{root}/namespaces/{namespace}/{plural}/{name}"),
                None => continue,
            };
            objects::delete(session.cluster, &path).await?;
        }
    }
    let maps = session
        .cluster
        .read(&format!(
            "/api/v1/configmaps?fieldSelector={}",
            query(&format!("metadata.name={ROOTS}"))
        ))
        .await?;
    for map in maps["items"].as_array().into_iter().flatten() {
        if let Some(namespace) = map["metadata"]["namespace"].as_str() {
            let path = format!("/api/v1/namespaces/{namespace}/configmaps/{ROOTS}");
            objects::delete(session.cluster, &path).await?;
        }
    }
    Ok(())
}
