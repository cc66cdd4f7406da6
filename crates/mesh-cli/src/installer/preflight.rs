//! What is looked at before anything is changed: the cluster, the rights, other meshes, and what the server says to every object.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use serde_json::{Value, json};

use super::How;
use super::objects::{Session, is_ours, kind_of, label};
use super::record::{self, Phase};
use super::tags::{self, Live, label_of};
use crate::cluster::Cluster;
use crate::install::webhooks::TAG;
use crate::install::{DEFAULT_REVISION, Plan};

/// Requests at a time.
const PARALLEL: usize = 8;
/// Oldest minor version of Kubernetes that is supported.
const OLDEST: u32 = 28;
/// What an installation does with its objects.
const VERBS: [&str; 5] = ["get", "list", "create", "patch", "delete"];

/// Looks whether this may be done here at all.
///
/// # Errors
/// An old version of Kubernetes, rights that are missing.
pub(super) async fn admit<'a>(
    cluster: &'a Cluster,
    plan: &Plan,
    force: bool,
) -> anyhow::Result<Session<'a>> {
    version(cluster, force).await?;
    let session = Session::new(cluster).await?;
    rights(&session, plan).await?;
    Ok(session)
}

/// Looks at everything else.
///
/// # Errors
/// Whatever would make the installation fail half way.
pub(super) async fn look(
    session: &mut Session<'_>,
    plan: &mut Plan,
    how: &How,
) -> anyhow::Result<()> {
    session.force = how.force;
    others(session, plan, how.force).await?;
    tags(session, plan, how.force).await?;
    // From here on it is as it will be applied.
    let plan = &*plan;
    if let Some(found) = record::read(session, &plan.namespace, &plan.revision).await?
        && found.phase == Phase::Installing
    {
        eprintln!(
            "An installation of version {} (profile {:?}) did not finish: this one goes on from there.",
            found.version, found.profile
        );
    }
    let mut releases = BTreeSet::new();
    for object in plan.objects() {
        // To kinds that are new, or our own, the server has nothing to say that does not depend on the kinds alone.
        let mut tried = object["kind"] != "CustomResourceDefinition";
        if !tried && let Some(live) = session.live(object).await? {
            tried = !is_ours(&live);
            releases.extend(kind_of(&live));
        }
        if tried && !session.awaits_something(object).await? {
            session
                .apply(object, true)
                .await
                .context("trying the installation on the server: nothing was changed")?;
        }
    }
    for release in releases.iter().filter(|_| !session.other_mesh) {
        match how.force {
            true => {
                eprintln!("Warning: the resource kinds of {release} become this installation's.")
            }
            false => eprintln!("Resource kinds belong to {release}: they are left as they are."),
        }
    }
    Ok(())
}

/// Who answers to tags, and where no revision is named.
async fn tags(session: &mut Session<'_>, plan: &mut Plan, force: bool) -> anyhow::Result<()> {
    let cluster = session.cluster;
    let live = tags::list(cluster).await?;
    let other = |object: &Value| {
        let tag = label_of(object, TAG);
        let of_tag = |live: &&Live| live.tag == tag && live.revision != plan.revision;
        let found = live.iter().filter(|_| !tag.is_empty()).find(of_tag)?;
        Some((found.tag.clone(), found.revision.clone()))
    };
    if let Some((tag, revision)) = plan.objects().find_map(other).filter(|_| !force) {
        bail!(
            "tag {tag:?} stands for revision {revision:?}: nothing was changed; move it with `mesh tag set {tag} --revision {} --overwrite` once this revision is installed, or give --force",
            plan.revision
        );
    }
    if tags::first_is_default(cluster, plan).await? {
        eprintln!(
            "This is the cluster's first control plane: it gets the tag \"default\", so that it answers where no revision is named."
        );
    }
    let default = live.iter().find(|live| live.tag == DEFAULT_REVISION);
    session.default_tag = default.is_some();
    if let Some(default) = default.filter(|_| plan.revision == DEFAULT_REVISION) {
        eprintln!(
            "Tag \"default\" stands for revision {:?}, which answers where no revision is named; `mesh tag remove default` gives that back to this one.",
            default.revision
        );
    }
    Ok(())
}

async fn version(cluster: &Cluster, force: bool) -> anyhow::Result<()> {
    let version = cluster
        .read("/version")
        .await
        .context("looking at the cluster: nothing was changed")?;
    let number = |field: &str| {
        let text = version[field].as_str().unwrap_or_default();
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        digits.parse::<u32>().ok()
    };
    if let (Some(1), Some(minor)) = (number("major"), number("minor"))
        && minor < OLDEST
        && !force
    {
        bail!(
            "the cluster runs Kubernetes {}; this mesh needs 1.{OLDEST} or newer (--force tries it all the same)",
            version["gitVersion"].as_str().unwrap_or_default()
        );
    }
    Ok(())
}

/// Asks whether the caller may do what will be done.
async fn rights(session: &Session<'_>, plan: &Plan) -> anyhow::Result<()> {
    let mut wanted = BTreeSet::new();
    for verb in super::lock::VERBS {
        let lease = ["coordination.k8s.io", "leases", "default"].map(str::to_owned);
        let [group, plural, namespace] = lease;
        wanted.insert((group, plural, namespace, verb));
    }
    for object in plan.objects() {
        let kind = session.kind(object).with_context(|| {
            format!(
                "{}: the cluster does not serve {}: nothing was changed",
                label(object),
                object["apiVersion"]
            )
        })?;
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        for verb in VERBS {
            wanted.insert((
                kind.group.clone(),
                kind.plural.clone(),
                namespace.to_owned(),
                verb,
            ));
        }
    }
    let asked = wanted.iter().map(|(group, resource, namespace, verb)| async move {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "spec": { "resourceAttributes": { "group": group, "resource": resource, "namespace": namespace, "verb": verb } },
        });
        let headers = [("content-type", "application/json")];
        let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
        let answer = session
            .cluster
            .request("POST", path, &headers, serde_json::to_vec(&review)?)
            .await?;
        let name = match group.as_str() {
            "" => resource.clone(),
            group => format!("{resource}.{group}"),
        };
        let denied = answer["status"]["allowed"] != Value::Bool(true);
        anyhow::Ok(denied.then(|| format!("{verb} {name}")))
    });
    let answers: Vec<_> = futures::stream::iter(asked)
        .buffered(PARALLEL)
        .collect()
        .await;
    let mut denied = Vec::new();
    for answer in answers {
        denied
            .extend(answer.context("asking for the rights that are needed: nothing was changed")?);
    }
    denied.dedup();
    if denied.is_empty() {
        return Ok(());
    }
    let shown = match denied.len() {
        0..=6 => denied.join(", "),
        more => format!("{} and {} more", denied[..6].join(", "), more - 6),
    };
    bail!(
        "you may not {shown} in this cluster: nothing was changed; an installation needs the rights of cluster-admin"
    );
}

/// Finds objects of the same names, and control planes, that are not of this program's making.
async fn others(session: &mut Session<'_>, plan: &Plan, force: bool) -> anyhow::Result<()> {
    let list = session
        .cluster
        .read("/apis/apps/v1/deployments?labelSelector=app%3Distiod")
        .await?;
    let planes: Vec<&Value> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|live| !is_ours(live))
        .collect();
    session.other_mesh = !planes.is_empty();
    if force {
        return Ok(());
    }
    let rivals = planes.iter().filter(|live| {
        let revision = live["metadata"]["labels"]["istio.io/rev"].as_str();
        revision.unwrap_or("default") == plan.revision
    });
    let place = |live: &&&Value| {
        let metadata = &live["metadata"];
        let text = |field: &str| metadata[field].as_str().unwrap_or_default();
        format!("{}/{}", text("namespace"), text("name"))
    };
    let rivals: Vec<String> = rivals.map(|live| place(&live)).collect();
    let advice = "nothing was changed; remove it first, install beside it with --revision NAME, or give --force to take over";
    if !rivals.is_empty() {
        bail!(
            "another mesh is here: control plane {} of revision {:?}: {advice}",
            rivals.join(", "),
            plan.revision
        );
    }
    let mut strangers = Vec::new();
    for object in plan.objects() {
        let shared = ["Namespace", "CustomResourceDefinition"];
        if shared.contains(&object["kind"].as_str().unwrap_or_default()) {
            continue;
        }
        if session
            .live(object)
            .await?
            .is_some_and(|live| !is_ours(&live))
        {
            strangers.push(label(object));
        }
    }
    if !strangers.is_empty() {
        bail!(
            "{} belongs to somebody else, another mesh perhaps: {advice}",
            strangers.join(", ")
        );
    }
    if session.other_mesh {
        eprintln!("Another mesh is in this cluster: its resource kinds are left as they are.");
    }
    Ok(())
}
