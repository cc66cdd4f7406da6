//! What installations own, by their label.

use std::collections::BTreeSet;

use serde_json::Value;

use super::objects::{self, Session, label};
use super::tags::label_of;
use crate::cluster::query;
use crate::install::webhooks::TAG;
use crate::install::{COMPONENT, DEFAULT_REVISION, MANAGED_BY, OWNER, Plan};

/// Kinds of which an installation has objects, in the order in which they are removed: first what calls the mesh, then what runs, then the rest.
/// Namespaces and resource kinds are shared by all installations, and not among them.
const KINDS: [(&str, &str); 13] = [
    (
        "admissionregistration.k8s.io/v1",
        "MutatingWebhookConfiguration",
    ),
    (
        "admissionregistration.k8s.io/v1",
        "ValidatingWebhookConfiguration",
    ),
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("policy/v1", "PodDisruptionBudget"),
    ("apps/v1", "Deployment"),
    ("v1", "Service"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
    ("v1", "ConfigMap"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
    ("rbac.authorization.k8s.io/v1", "ClusterRole"),
    ("v1", "ServiceAccount"),
];

/// All objects that the installation of an owner has; of all installations where there is none. With their paths.
pub(crate) async fn list(
    session: &Session<'_>,
    owner: Option<&str>,
) -> anyhow::Result<Vec<(String, Value)>> {
    let ours = format!("{}={}", MANAGED_BY.0, MANAGED_BY.1);
    let selector = match owner {
        Some(owner) => format!("{OWNER}={owner},{ours}"),
        None => format!("{OWNER},{ours}"),
    };
    let mut found = Vec::new();
    for (version, kind) in KINDS {
        found.extend(of_kind(session, version, kind, &selector).await?);
    }
    Ok(found)
}

/// The webhook configurations of tags that stand for a revision, or of all tags, as far as this program made them and no installation owns
/// them. With their paths.
pub(crate) async fn tags(
    session: &Session<'_>,
    revision: Option<&str>,
) -> anyhow::Result<Vec<(String, Value)>> {
    let all = super::tags::list(session.cluster).await?;
    let of = all.into_iter().filter(|live| {
        objects::is_ours(&live.object)
            && label_of(&live.object, OWNER).is_empty()
            && revision.is_none_or(|revision| live.revision == revision)
    });
    Ok(of.map(|live| (live.path, live.object)).collect())
}

/// Namespaces and kinds that installations share and made: kinds first.
pub(crate) async fn shared(session: &Session<'_>) -> anyhow::Result<Vec<(String, Value)>> {
    let selector = format!("{COMPONENT}=Base,{}={}", MANAGED_BY.0, MANAGED_BY.1);
    let version = "apiextensions.k8s.io/v1";
    let mut found = of_kind(session, version, "CustomResourceDefinition", &selector).await?;
    found.extend(of_kind(session, "v1", "Namespace", &selector).await?);
    Ok(found)
}

/// Resource kinds that a Helm release brought, of this program's chart: they are its own.
pub(crate) async fn kinds_of_helm(session: &Session<'_>) -> anyhow::Result<Vec<Value>> {
    let selector = format!("{COMPONENT}=Base,{}={}", MANAGED_BY.0, objects::HELM);
    let version = "apiextensions.k8s.io/v1";
    let found = of_kind(session, version, "CustomResourceDefinition", &selector).await?;
    Ok(found.into_iter().map(|(_, kind)| kind).collect())
}

async fn of_kind(
    session: &Session<'_>,
    version: &str,
    kind: &str,
    selector: &str,
) -> anyhow::Result<Vec<(String, Value)>> {
    let mut sample = serde_json::json!({ "apiVersion": version, "kind": kind });
    let Some(resource) = session.kind(&sample) else {
        return Ok(Vec::new());
    };
    let path = format!("{}?labelSelector={}", resource.path(None), query(selector));
    let mut list = session.cluster.read(&path).await?;
    let mut found = Vec::new();
    for item in list["items"].as_array_mut().into_iter().flatten() {
        // Items of a list don't say what they are; and slices that Kubernetes made have their Service's labels.
        let by = &item["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"];
        if kind == "EndpointSlice" && by != "mesh" {
            continue;
        }
        sample["metadata"] = item["metadata"].take();
        found.push((session.path(&sample)?, sample.clone()));
    }
    Ok(found)
}

/// What the last installation of this revision had and the plan has not: path and name.
pub(crate) async fn superfluous(
    session: &Session<'_>,
    plan: &Plan,
) -> anyhow::Result<Vec<(String, String)>> {
    let mut wanted = BTreeSet::new();
    for object in plan.objects() {
        wanted.insert(session.path(object)?);
    }
    wanted.insert(super::record::path(&plan.namespace, &plan.revision));
    let there = list(session, Some(&plan.owner())).await?;
    let rest = there.into_iter().filter(|(path, _)| !wanted.contains(path));
    Ok(rest.map(|(path, object)| (path, label(&object))).collect())
}

/// Whether the tag `default` is among it.
pub(super) async fn loses_default_tag(session: &Session<'_>, plan: &Plan) -> anyhow::Result<bool> {
    let there = list(session, Some(&plan.owner())).await?;
    Ok(there
        .iter()
        .any(|(_, object)| label_of(object, TAG) == DEFAULT_REVISION))
}

/// Removes it; the names of what went.
pub(super) async fn prune(session: &Session<'_>, plan: &Plan) -> anyhow::Result<Vec<String>> {
    let mut gone = Vec::new();
    for (path, label) in superfluous(session, plan).await? {
        if objects::delete(session.cluster, &path).await? {
            gone.push(label);
        }
    }
    Ok(gone)
}
