//! Reading and applying single objects.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::apply::{Change, change};
use crate::cluster::Cluster;
use crate::install::MANAGED_BY;
use crate::resources::{Resource, Resources};

/// Who owns the fields that are applied.
pub(crate) const FIELD_MANAGER: &str = "mesh-install";

/// How Helm labels what it installs (with the key of our own label).
pub(crate) const HELM: &str = "Helm";

/// A cluster whose kinds are known.
pub(crate) struct Session<'a> {
    pub(crate) cluster: &'a Cluster,
    resources: Resources,
    /// Namespaces that were looked for.
    namespaces: BTreeMap<String, bool>,
    /// Another mesh is here: kinds that are its own are left as they are.
    pub(crate) other_mesh: bool,
    /// What belongs to a Helm release is taken over, even where it is not what this version needs.
    pub(crate) force: bool,
    /// There is a tag `default`: the webhooks of the revision of this name stand back.
    pub(crate) default_tag: bool,
}

/// What became of an object.
pub(crate) struct Applied {
    pub(crate) change: Change,
    pub(crate) before: Option<Value>,
    pub(crate) after: Value,
}

impl<'a> Session<'a> {
    pub(crate) async fn new(cluster: &'a Cluster) -> anyhow::Result<Self> {
        Ok(Self {
            cluster,
            resources: Resources::discover(cluster).await?,
            namespaces: BTreeMap::new(),
            other_mesh: false,
            force: false,
            default_tag: false,
        })
    }

    /// The kind of an object; `None` if the cluster does not have it.
    pub(crate) fn kind(&self, object: &Value) -> Option<&Resource> {
        let text = |field: &str| object[field].as_str().unwrap_or_default();
        self.resources.of(text("apiVersion"), text("kind"))
    }

    /// Path of an object.
    pub(crate) fn path(&self, object: &Value) -> anyhow::Result<String> {
        let kind = self.kind(object).with_context(|| {
            format!(
                "{}: the cluster does not serve {}",
                label(object),
                object["apiVersion"]
            )
        })?;
        let metadata = &object["metadata"];
        let text = |field: &str| metadata[field].as_str().unwrap_or_default();
        Ok(kind.object(text("namespace"), text("name")))
    }

    /// The object as it is in the cluster.
    pub(crate) async fn live(&self, object: &Value) -> anyhow::Result<Option<Value>> {
        self.cluster.read_optional(&self.path(object)?).await
    }

    /// Makes an object what it should be; in a dry run, only looks what that would be.
    ///
    /// # Errors
    /// The server refuses it; a kind that belongs to a Helm release and is another than this version's.
    pub(crate) async fn apply(&self, object: &Value, dry: bool) -> anyhow::Result<Applied> {
        let path = self.path(object)?;
        let before = self.cluster.read_optional(&path).await?;
        if let Some(kept) = before.as_ref().filter(|live| self.is_kept(live)) {
            return Ok(Applied {
                change: Change::Unchanged,
                before: None,
                after: kept.clone(),
            });
        }
        let mut object = adapted(object, before.as_ref());
        if self.default_tag {
            super::tags::stand_back(&mut object);
        }
        let helms = before.as_ref().filter(|_| !self.force).and_then(kind_of);
        let after = self.send(&path, &object, dry || helms.is_some()).await?;
        if let (Some(release), Some(live)) = (helms, &before) {
            // What it has beside what this version needs is no matter.
            if after["spec"] != live["spec"] {
                bail!(
                    "{} belongs to {release} and is not what this version needs: upgrade the release to it, or take the kind over with `mesh install --force`",
                    label(live)
                );
            }
            return Ok(Applied {
                change: Change::Unchanged,
                before: None,
                after: live.clone(),
            });
        }
        Ok(Applied {
            change: change(before.as_ref(), &after),
            before,
            after,
        })
    }

    async fn send(&self, path: &str, object: &Value, dry: bool) -> anyhow::Result<Value> {
        let mode = if dry { "&dryRun=All" } else { "" };
        let url =
            format!("{path}?fieldManager={FIELD_MANAGER}&force=true&fieldValidation=Strict{mode}");
        let headers = [
            ("content-type", "application/apply-patch+yaml"),
            ("accept", "application/json"),
        ];
        self.cluster
            .request("PATCH", &url, &headers, serde_json::to_vec(object)?)
            .await
            .with_context(|| format!("applying {}", label(object)))
    }

    /// Somebody else's namespace is used and left as it is, and so are the kinds of another mesh.
    fn is_kept(&self, live: &Value) -> bool {
        !is_ours(live)
            && match live["kind"].as_str() {
                Some("Namespace") => true,
                Some("CustomResourceDefinition") => self.other_mesh,
                _ => false,
            }
    }

    /// True if an object can't be tried yet, since its namespace is made by this installation.
    pub(crate) async fn awaits_something(&mut self, object: &Value) -> anyhow::Result<bool> {
        let Some(namespace) = object["metadata"]["namespace"].as_str() else {
            return Ok(false);
        };
        if let Some(there) = self.namespaces.get(namespace) {
            return Ok(!there);
        }
        let path = format!("/api/v1/namespaces/{namespace}");
        let found = self.cluster.read_optional(&path).await?;
        let ending = |found: &Value| found["status"]["phase"] == "Terminating";
        if found.as_ref().is_some_and(ending) {
            bail!(
                "namespace {namespace} is being removed: wait until it is gone, then install again"
            );
        }
        self.namespaces
            .insert(namespace.to_owned(), found.is_some());
        Ok(found.is_none())
    }
}

/// Whether this program installed an object.
pub(crate) fn is_ours(live: &Value) -> bool {
    live["metadata"]["labels"][MANAGED_BY.0] == MANAGED_BY.1
}

/// The Helm release that an object belongs to, in words, if it does.
pub(crate) fn release(live: &Value) -> Option<String> {
    let metadata = &live["metadata"];
    if metadata["labels"][MANAGED_BY.0] != HELM {
        return None;
    }
    let text = |annotation: &str| metadata["annotations"][annotation].as_str();
    let name = text("meta.helm.sh/release-name")?;
    let namespace = text("meta.helm.sh/release-namespace").unwrap_or_default();
    Some(format!("Helm release {name:?} of namespace {namespace}"))
}

/// The same of a resource kind. Kinds are shared: what a release brought serves an installation as well, and Helm would not know them any more if they
/// were labelled as ours.
pub(crate) fn kind_of(live: &Value) -> Option<String> {
    release(live).filter(|_| live["kind"] == "CustomResourceDefinition")
}

/// An object as kubectl names it, with its namespace.
pub(crate) fn label(object: &Value) -> String {
    let metadata = &object["metadata"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    match metadata["namespace"].as_str() {
        Some(namespace) => format!(
            "{} {namespace}/{}",
            text(&object["kind"]),
            text(&metadata["name"])
        ),
        None => format!("{} {}", text(&object["kind"]), text(&metadata["name"])),
    }
}

/// The control plane makes validation binding once it is served: that is not undone.
fn adapted(object: &Value, live: Option<&Value>) -> Value {
    let mut object = object.clone();
    let Some(live) = live.filter(|_| object["kind"] == "ValidatingWebhookConfiguration") else {
        return object;
    };
    for webhook in object["webhooks"].as_array_mut().into_iter().flatten() {
        let mut present = live["webhooks"].as_array().into_iter().flatten();
        let bound =
            present.any(|live| live["name"] == webhook["name"] && live["failurePolicy"] == "Fail");
        if let Some(webhook) = webhook.as_object_mut().filter(|_| bound) {
            webhook.shift_remove("failurePolicy");
        }
    }
    object
}

/// Asks for the removal of what is at a path; false if there is nothing.
pub(crate) async fn delete(cluster: &Cluster, path: &str) -> anyhow::Result<bool> {
    let options =
        json!({ "kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background" });
    let headers = [("content-type", "application/json")];
    cluster
        .delete_optional(path, &headers, serde_json::to_vec(&options)?)
        .await
}

/// Asks for the removal of an object, unless it has changed since it was read.
pub(crate) async fn delete_exactly(
    cluster: &Cluster,
    path: &str,
    live: &Value,
) -> anyhow::Result<bool> {
    let version = &live["metadata"]["resourceVersion"];
    let options = json!({ "kind": "DeleteOptions", "apiVersion": "v1", "preconditions": { "resourceVersion": version } });
    let headers = [("content-type", "application/json")];
    cluster
        .delete_optional(path, &headers, serde_json::to_vec(&options)?)
        .await
}
