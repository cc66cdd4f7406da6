//! The templates that a StatefulSet or DaemonSet has had, as ControllerRevisions; `kubectl rollout history` and `undo` read these.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt as _};
use serde_json::json;

use super::control::Owner;
use super::deployment::{fnv32a, safe_encode};
use super::pod::{self, Claim};
use super::queue::Key;
use super::{Doing as _, Error};

/// On the pods: the revision that they were made of.
pub(super) const REVISION_LABEL: &str = "controller-revision-hash";
/// On the revisions: the hash in their names.
const HASH_LABEL: &str = "controller.kubernetes.io/hash";
/// Names that are tried when hashes collide.
const ATTEMPTS: u32 = 8;

/// The revisions of one workload, oldest first, the present template's among them.
pub(super) struct History {
    pub(super) revisions: Vec<Arc<ControllerRevision>>,
    /// The one of the present template.
    pub(super) update: Arc<ControllerRevision>,
}

impl History {
    /// Reads the revisions and makes (or brings up again) that of the present template.
    pub(super) async fn sync<K>(
        owner: &Owner<'_, K>,
        template: &PodTemplateSpec,
    ) -> Result<Self, Error>
    where
        K: Resource<DynamicType = ()>,
    {
        let mut revisions = claimed(owner).await?;
        let next = revisions.last().map_or(1, |newest| number(newest) + 1);
        let equal = revisions
            .iter()
            .rposition(|revision| self::template(revision).as_ref() == Some(template));
        let update = match equal {
            Some(at) if at + 1 == revisions.len() => revisions[at].clone(),
            Some(at) => {
                // An old template comes back (rollout undo): it is the newest again.
                let old = revisions.remove(at);
                let patch = json!({ "revision": next });
                let renewed = api(owner)
                    .patch(
                        &old.name_any(),
                        &PatchParams::default(),
                        &Patch::Merge(patch),
                    )
                    .await;
                let renewed =
                    renewed.doing(|| format!("renewing ControllerRevision {}", Key::of(&*old)))?;
                keep(owner, renewed)
            }
            None => create(owner, template, next).await?,
        };
        if revisions.last().map(|last| last.uid()) != Some(update.uid()) {
            revisions.push(update.clone());
        }
        Ok(Self { revisions, update })
    }

    /// The revision of that name.
    pub(super) fn find(&self, name: &str) -> Option<&Arc<ControllerRevision>> {
        self.revisions
            .iter()
            .find(|revision| revision.metadata.name.as_deref() == Some(name))
    }

    /// Deletes the oldest revisions beyond `limit`, not counting those that `is_live` says are in use.
    pub(super) async fn truncate<K>(
        &self,
        owner: &Owner<'_, K>,
        limit: Option<i32>,
        is_live: impl Fn(&ControllerRevision) -> bool,
    ) -> Result<(), Error>
    where
        K: Resource<DynamicType = ()>,
    {
        let unused: Vec<_> = self
            .revisions
            .iter()
            .filter(|revision| revision.uid() != self.update.uid() && !is_live(revision))
            .collect();
        let limit = usize::try_from(limit.unwrap_or(10)).unwrap_or(0);
        for revision in &unused[..unused.len().saturating_sub(limit)] {
            let name = revision.name_any();
            match api(owner).delete(&name, &DeleteParams::default()).await {
                Ok(_) => owner.context.revisions.forget(revision),
                Err(error) if super::is_not_found(&error) => {}
                Err(error) => {
                    return Err(error).doing(|| format!("deleting ControllerRevision {name}"));
                }
            }
        }
        Ok(())
    }
}

/// The template that a revision keeps.
pub(super) fn template(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let mut template = revision.data.0.pointer("/spec/template")?.clone();
    template.as_object_mut()?.remove("$patch");
    serde_json::from_value(template).ok()
}

fn number(revision: &ControllerRevision) -> i64 {
    revision.revision.unwrap_or(0)
}

/// The hash in the revision's name.
pub(super) fn hash(revision: &ControllerRevision) -> &str {
    revision.labels().get(HASH_LABEL).map_or("", String::as_str)
}

fn api<K: Resource<DynamicType = ()>>(owner: &Owner<'_, K>) -> Api<ControllerRevision> {
    let namespace = owner.object.namespace().unwrap_or_default();
    Api::namespaced(owner.context.client.clone(), &namespace)
}

fn keep<K>(owner: &Owner<'_, K>, revision: ControllerRevision) -> Arc<ControllerRevision> {
    owner.context.revisions.observe(revision.clone());
    Arc::new(revision)
}

/// The workload's revisions, after adopting those that were left by one of its name, oldest first.
async fn claimed<K>(owner: &Owner<'_, K>) -> Result<Vec<Arc<ControllerRevision>>, Error>
where
    K: Resource<DynamicType = ()>,
{
    let uid = owner.object.uid().unwrap_or_default();
    let namespace = owner.object.namespace().unwrap_or_default();
    let mut revisions = Vec::new();
    for revision in owner.context.revisions.in_namespace(&namespace) {
        match pod::claim(&uid, owner.ends(), owner.selector, &revision.metadata) {
            Claim::Owned => revisions.push(revision),
            Claim::Adopt if revision.name_any().starts_with(&owner.object.name_any()) => {
                let owners = json!([pod::controlled_by(owner.object)]);
                let patch =
                    json!({ "metadata": { "uid": revision.uid(), "ownerReferences": owners } });
                let (name, params) = (revision.name_any(), PatchParams::default());
                let adopted = api(owner).patch(&name, &params, &Patch::Merge(patch)).await;
                let adopted = adopted.doing(|| format!("adopting ControllerRevision {name}"))?;
                revisions.push(keep(owner, adopted));
            }
            Claim::Adopt | Claim::Release | Claim::Foreign => {}
        }
    }
    revisions.sort_by_key(|revision| (number(revision), revision.name_any()));
    Ok(revisions)
}

async fn create<K>(
    owner: &Owner<'_, K>,
    template: &PodTemplateSpec,
    number: i64,
) -> Result<Arc<ControllerRevision>, Error>
where
    K: Resource<DynamicType = ()>,
{
    let mut collisions = 0;
    loop {
        let revision = revision(owner.object, template, number, collisions);
        match api(owner).create(&PostParams::default(), &revision).await {
            Ok(revision) => return Ok(keep(owner, revision)),
            Err(kube::Error::Api(status)) if status.code == 409 && collisions < ATTEMPTS => {
                let name = revision.name_any();
                let found = api(owner).get(&name).await;
                let found = found.doing(|| format!("reading ControllerRevision {name}"))?;
                let own = pod::controller(&found.metadata).map(|owner| owner.uid.clone());
                if own == owner.object.uid() && self::template(&found).as_ref() == Some(template) {
                    return Ok(keep(owner, found));
                }
                collisions += 1;
            }
            Err(error) => {
                let name = revision.name_any();
                return Err(error).doing(|| format!("creating ControllerRevision {name}"));
            }
        }
    }
}

fn revision<K>(
    owner: &K,
    template: &PodTemplateSpec,
    number: i64,
    collisions: u32,
) -> ControllerRevision
where
    K: Resource<DynamicType = ()>,
{
    let mut kept = json!(template);
    let hash = safe_encode(&fnv32a(format!("{kept}{collisions}").as_bytes()).to_string());
    kept["$patch"] = "replace".into();
    let mut labels = template
        .metadata
        .as_ref()
        .and_then(|meta| meta.labels.clone())
        .unwrap_or_default();
    labels.insert(HASH_LABEL.into(), hash.clone());
    labels.insert(REVISION_LABEL.into(), hash.clone());
    let mut annotations = owner.annotations().clone();
    annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    ControllerRevision {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", owner.name_any())),
            namespace: owner.namespace(),
            labels: Some(labels),
            annotations: Some(annotations).filter(|map| !map.is_empty()),
            owner_references: Some(vec![pod::controlled_by(owner)]),
            ..ObjectMeta::default()
        },
        data: RawExtension(json!({ "spec": { "template": kept } })),
        revision: Some(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::apps::v1::StatefulSet;

    #[test]
    fn a_revision_gives_its_template_back() {
        let set: StatefulSet = serde_json::from_value(json!({
            "metadata": { "name": "web", "namespace": "a", "uid": "u",
                          "annotations": { "kubernetes.io/change-cause": "why" } },
            "spec": { "selector": {}, "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "containers": [{ "name": "c", "image": "i" }] } } },
        }))
        .unwrap();
        let template = set.spec.template.clone();
        let first = revision(&set, &template, 1, 0);
        assert_eq!(self::template(&first), Some(template.clone()));
        assert_eq!(first.name_any(), format!("web-{}", hash(&first)));
        assert_eq!(first.labels()["app"], "web");
        assert_eq!(first.annotations()["kubernetes.io/change-cause"], "why");
        assert_ne!(
            first.name_any(),
            revision(&set, &template, 1, 1).name_any(),
            "a collision gives another name"
        );
        let data = first.data.0;
        assert_eq!(data["spec"]["template"]["$patch"], "replace");
    }
}
