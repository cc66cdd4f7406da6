//! Deployment: a ReplicaSet for each template, scaled against each other while a new template rolls out.

mod plan;
mod status;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::events::{Level, now};
use super::pod::{self, Claim};
use super::queue::{Key, Queue};
use super::{Context, Doing as _, Error, Outcome};
use plan::Counts;

const COMPONENT: &str = "deployment-controller";
const HASH_LABEL: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";
/// Annotations of the Deployment that say nothing about its ReplicaSets.
const NOT_COPIED: &[&str] = &[
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MAXIMUM,
];

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("deployment");
    let own = queue.clone();
    context.deployments.subscribe(move |_, new| {
        if let Some(deployment) = new {
            own.add(Key::of(&**deployment));
        }
    });
    let (own, deployments) = (queue.clone(), context.deployments.clone());
    context.replica_sets.subscribe(move |old, new| {
        for set in [old, new].into_iter().flatten() {
            let namespace = set.namespace().unwrap_or_default();
            match pod::controller(&set.metadata) {
                Some(owner) if owner.kind == "Deployment" => {
                    own.add(Key::new(namespace, owner.name.clone()))
                }
                Some(_) => {}
                None => {
                    for deployment in deployments.in_namespace(&namespace) {
                        own.add(Key::of(&*deployment));
                    }
                }
            }
        }
    });
    // The Recreate strategy waits for the old pods to be gone.
    let (own, sets) = (queue.clone(), context.replica_sets.clone());
    context.pods.subscribe(move |old, new| {
        if let (Some(pod), None) = (old, new)
            && let Some(owner) = pod::controller(&pod.metadata)
            && let Some(set) = sets.get(&Key::new(
                pod.namespace().unwrap_or_default(),
                owner.name.clone(),
            ))
            && let Some(owner) = pod::controller(&set.metadata)
        {
            own.add(Key::new(
                set.namespace().unwrap_or_default(),
                owner.name.clone(),
            ));
        }
    });
    queue
}

/// One Deployment with its ReplicaSets as they are while it is worked on.
struct Rollout<'a> {
    context: &'a Context,
    deployment: Arc<Deployment>,
    api: Api<ReplicaSet>,
    /// The set of the present template.
    new: Option<Arc<ReplicaSet>>,
    /// All others, oldest first.
    old: Vec<Arc<ReplicaSet>>,
    /// What happened to the new set, for the Progressing condition.
    found: Option<status::Found>,
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(deployment) = context.deployments.get(&key) else {
        return Ok(None);
    };
    let sets = claimed(&context, &deployment).await?;
    let (new, old) = split(&deployment, sets);
    let mut rollout = Rollout {
        api: Api::namespaced(context.client.clone(), &key.namespace),
        context: &context,
        deployment,
        new,
        old,
        found: None,
    };
    if rollout.deployment.metadata.deletion_timestamp.is_none() {
        rollout.advance().await?;
    }
    rollout.write_status().await
}

/// The ReplicaSets that the Deployment manages, after adopting and letting go, oldest first.
async fn claimed(
    context: &Context,
    deployment: &Deployment,
) -> Result<Vec<Arc<ReplicaSet>>, Error> {
    let namespace = deployment.namespace().unwrap_or_default();
    let ends = deployment.metadata.deletion_timestamp.is_some();
    let api: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &namespace);
    let mut sets = Vec::new();
    for set in context.replica_sets.in_namespace(&namespace) {
        let claim = pod::claim(
            &deployment.uid().unwrap_or_default(),
            ends,
            &deployment.spec.selector,
            &set.metadata,
        );
        let others = || {
            set.owner_references()
                .iter()
                .filter(|owner| owner.controller != Some(true))
                .cloned()
        };
        let owners: Vec<_> = match claim {
            Claim::Owned => {
                sets.push(set);
                continue;
            }
            Claim::Adopt => others().chain([pod::controlled_by(deployment)]).collect(),
            Claim::Release => others().collect(),
            Claim::Foreign => continue,
        };
        let patch = json!({ "metadata": { "uid": set.uid(), "ownerReferences": owners } });
        let changed = api
            .patch(
                &set.name_any(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            )
            .await;
        let changed =
            changed.doing(|| format!("changing the owner of ReplicaSet {}", Key::of(&*set)))?;
        context.replica_sets.observe(changed.clone());
        if claim == Claim::Adopt {
            sets.push(Arc::new(changed));
        }
    }
    sets.sort_by_key(|set| {
        (
            set.metadata.creation_timestamp.as_ref().map(|time| time.0),
            set.name_any(),
        )
    });
    Ok(sets)
}

/// The set whose template is the Deployment's (the oldest, should there be two), and the others.
fn split(
    deployment: &Deployment,
    mut sets: Vec<Arc<ReplicaSet>>,
) -> (Option<Arc<ReplicaSet>>, Vec<Arc<ReplicaSet>>) {
    let template = &deployment.spec.template;
    let position = sets.iter().position(|set| {
        let own = set.spec.template.clone().unwrap_or_default();
        without_hash(own) == *template
    });
    let new = position.map(|position| sets.remove(position));
    (new, sets)
}

fn without_hash(mut template: PodTemplateSpec) -> PodTemplateSpec {
    if let Some(labels) = template
        .metadata
        .as_mut()
        .and_then(|meta| meta.labels.as_mut())
    {
        labels.remove(HASH_LABEL);
    }
    template
}

fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.replicas.unwrap_or(1)
}

fn counts(set: &ReplicaSet) -> Counts {
    let status = set.status.clone().unwrap_or_default();
    Counts {
        wanted: replicas(set),
        actual: status.replicas,
        available: status.available_replicas.unwrap_or(0),
    }
}

fn revision(meta: &ObjectMeta) -> i64 {
    meta.annotations
        .iter()
        .flatten()
        .find(|(key, _)| *key == REVISION)
        .and_then(|(_, text)| text.parse().ok())
        .unwrap_or(0)
}

impl Rollout<'_> {
    fn wanted(&self) -> i32 {
        self.deployment.spec.replicas.unwrap_or(1)
    }

    fn limits(&self) -> plan::Limits {
        plan::Limits::of(&self.deployment.spec)
    }

    fn is_paused(&self) -> bool {
        self.deployment.spec.paused == Some(true)
    }

    /// Takes every step that is possible now; the changes that these cause bring the next.
    async fn advance(&mut self) -> Result<(), Error> {
        self.sync_revision().await?;
        if self.is_paused() || self.is_scaling() {
            return self.scale_in_proportion().await;
        }
        if self.limits().is_recreate {
            self.recreate().await?
        } else {
            self.roll().await?
        }
        self.clean_up().await
    }

    /// Gives the new set (if there is one) the next revision, and the Deployment the same.
    async fn sync_revision(&mut self) -> Result<(), Error> {
        let next = self
            .old
            .iter()
            .map(|set| revision(&set.metadata))
            .max()
            .unwrap_or(0)
            + 1;
        let Some(new) = self.new.clone() else {
            return Ok(());
        };
        self.found = Some(status::Found::Existing);
        let mut annotations = self.set_annotations(Some(&new), next.max(revision(&new.metadata)));
        // The number wanted stays with the scale: the difference shows that somebody scales the Deployment.
        annotations.retain(|key, _| key != DESIRED && key != MAXIMUM);
        let seconds = self.deployment.spec.min_ready_seconds;
        let stale = annotations
            .iter()
            .any(|(key, value)| new.annotations().get(key) != Some(value));
        if stale || new.spec.min_ready_seconds != seconds {
            let patch = json!({ "metadata": { "annotations": annotations }, "spec": { "minReadySeconds": seconds } });
            self.new = Some(self.patch_set(&new, patch).await?);
        }
        self.sync_own_revision().await
    }

    async fn sync_own_revision(&mut self) -> Result<(), Error> {
        let Some(new) = &self.new else { return Ok(()) };
        let revision = revision(&new.metadata).to_string();
        if self.deployment.annotations().get(REVISION) == Some(&revision) {
            return Ok(());
        }
        let key = Key::of(&*self.deployment);
        let api: Api<Deployment> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let patch = json!({ "metadata": { "annotations": { REVISION: revision } } });
        let written = api
            .patch(&key.name, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        let written = written.doing(|| format!("writing the revision of Deployment {key}"))?;
        self.context.deployments.observe(written.clone());
        self.deployment = Arc::new(written);
        Ok(())
    }

    /// Annotations of the set of the present template.
    fn set_annotations(&self, set: Option<&ReplicaSet>, number: i64) -> BTreeMap<String, String> {
        let mut annotations: BTreeMap<_, _> = self
            .deployment
            .annotations()
            .iter()
            .filter(|(key, _)| !NOT_COPIED.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let before = set.map_or(0, |set| revision(&set.metadata));
        if let Some(set) = set.filter(|_| before != 0 && before != number) {
            // A template that comes back (rollout undo) keeps the list of the revisions it has been.
            let history = set.annotations().get(REVISION_HISTORY);
            let history = history.map_or_else(
                || before.to_string(),
                |history| format!("{history},{before}"),
            );
            annotations.insert(REVISION_HISTORY.into(), history);
        }
        annotations.insert(REVISION.into(), number.to_string());
        let wanted = self.wanted();
        annotations.insert(DESIRED.into(), wanted.to_string());
        annotations.insert(MAXIMUM.into(), (wanted + self.limits().surge).to_string());
        annotations
    }

    /// Whether the number of replicas was changed since the sets were scaled last.
    fn is_scaling(&self) -> bool {
        let desired = |set: &ReplicaSet| {
            set.annotations()
                .get(DESIRED)
                .and_then(|text| text.parse::<i32>().ok())
        };
        self.sets().any(|set| {
            replicas(set) > 0 && desired(set).is_some_and(|desired| desired != self.wanted())
        })
    }

    fn sets(&self) -> impl Iterator<Item = &Arc<ReplicaSet>> {
        self.old.iter().chain(&self.new)
    }

    async fn roll(&mut self) -> Result<(), Error> {
        self.ensure_new_set().await?;
        let Some(new) = self.new.clone() else {
            return Ok(());
        };
        let total = self.sets().map(|set| replicas(set)).sum();
        let target = plan::scale_new(replicas(&new), total, self.wanted(), &self.limits());
        if target != replicas(&new) {
            let scaled = self.scale(&new, target).await?;
            self.new = Some(scaled);
            return Ok(());
        }
        let old: Vec<_> = self.old.iter().map(|set| counts(set)).collect();
        let targets = plan::scale_old(&old, counts(&new), self.wanted(), &self.limits());
        for (index, target) in targets.into_iter().enumerate() {
            let set = self.old[index].clone();
            if target != replicas(&set) {
                self.old[index] = self.scale(&set, target).await?;
            }
        }
        Ok(())
    }

    async fn recreate(&mut self) -> Result<(), Error> {
        for index in 0..self.old.len() {
            let set = self.old[index].clone();
            if replicas(&set) > 0 {
                self.old[index] = self.scale(&set, 0).await?;
            }
        }
        if self.old_pods_run() {
            return Ok(());
        }
        self.ensure_new_set().await?;
        if let Some(new) = self.new.clone()
            && replicas(&new) != self.wanted()
        {
            self.new = Some(self.scale(&new, self.wanted()).await?);
        }
        Ok(())
    }

    fn old_pods_run(&self) -> bool {
        let uids: Vec<_> = self.old.iter().filter_map(|set| set.uid()).collect();
        let runs = |pod: &Arc<Pod>| {
            !pod::is_finished(pod)
                && pod::controller(&pod.metadata).is_some_and(|owner| uids.contains(&owner.uid))
        };
        self.context
            .pods
            .in_namespace(&self.deployment.namespace().unwrap_or_default())
            .iter()
            .any(runs)
    }

    async fn ensure_new_set(&mut self) -> Result<(), Error> {
        if self.new.is_some() {
            return Ok(());
        }
        let total = self.old.iter().map(|set| replicas(set)).sum();
        let count = plan::scale_new(0, total, self.wanted(), &self.limits());
        let next = self
            .old
            .iter()
            .map(|set| revision(&set.metadata))
            .max()
            .unwrap_or(0)
            + 1;
        let set = new_set(&self.deployment, count, self.set_annotations(None, next));
        match self.api.create(&PostParams::default(), &set).await {
            Ok(set) => {
                let name = set.name_any();
                self.context.replica_sets.observe(set.clone());
                self.new = Some(Arc::new(set));
                self.found = Some(status::Found::Created);
                if count > 0 {
                    self.report_scale("up", &name, 0, count);
                }
                self.sync_own_revision().await
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                self.count_collision(&set.name_any()).await
            }
            Err(error) => {
                let message = format!(
                    "Failed to create new replica set \"{}\": {error}",
                    set.name_any()
                );
                self.context.events.publish(
                    COMPONENT,
                    &*self.deployment,
                    Level::Warning,
                    "ReplicaSetCreateError",
                    message,
                );
                Err(error).doing(|| format!("creating ReplicaSet {}", Key::of(&set)))
            }
        }
    }

    /// A set of that name exists. Where it is ours with this template, the watch is about to bring it; else the hash
    /// collides, and counting the collision gives another.
    async fn count_collision(&mut self, name: &str) -> Result<(), Error> {
        let key = Key::of(&*self.deployment);
        let existing = self
            .api
            .get(name)
            .await
            .doing(|| format!("reading ReplicaSet {name} of {}", key.namespace))?;
        let own = pod::controller(&existing.metadata).map(|owner| &owner.uid)
            == self.deployment.metadata.uid.as_ref();
        if own
            && split(&self.deployment, vec![Arc::new(existing.clone())])
                .0
                .is_some()
        {
            self.context.replica_sets.observe(existing.clone());
            self.new = Some(Arc::new(existing));
            return Ok(());
        }
        let count = self
            .deployment
            .status
            .as_ref()
            .and_then(|status| status.collision_count)
            .unwrap_or(0)
            + 1;
        let api: Api<Deployment> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let patch = json!({ "status": { "collisionCount": count } });
        let written = api
            .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        self.context
            .deployments
            .observe(written.doing(|| format!("counting a collision of Deployment {key}"))?);
        Ok(())
    }

    /// Brings all sets to a new total in proportion to their sizes (scaling in the middle of a rollout, or paused).
    async fn scale_in_proportion(&mut self) -> Result<(), Error> {
        let active: Vec<_> = self
            .sets()
            .filter(|set| replicas(set) > 0)
            .cloned()
            .collect();
        // Of several sets none serves alone: share. Else the active one (or the newest) takes it all.
        let targets = match active.as_slice() {
            [] => {
                let newest = self.new.clone().or_else(|| self.old.last().cloned());
                newest
                    .map(|set| vec![(set, self.wanted())])
                    .unwrap_or_default()
            }
            [only] => vec![(only.clone(), self.wanted())],
            _ => {
                let limits = self.limits();
                let allowed = if self.wanted() > 0 {
                    self.wanted() + limits.surge
                } else {
                    0
                };
                let sizes: Vec<_> = active.iter().map(|set| replicas(set)).collect();
                active
                    .into_iter()
                    .zip(plan::share(&sizes, allowed))
                    .collect()
            }
        };
        for (set, target) in targets {
            let scaled = self.scale(&set, target).await?;
            if self
                .new
                .as_ref()
                .is_some_and(|new| new.uid() == scaled.uid())
            {
                self.new = Some(scaled);
            } else if let Some(old) = self.old.iter_mut().find(|old| old.uid() == scaled.uid()) {
                *old = scaled;
            }
        }
        Ok(())
    }

    /// Writes the size of a set, with the annotations that say for which total.
    async fn scale(&self, set: &ReplicaSet, target: i32) -> Result<Arc<ReplicaSet>, Error> {
        let before = replicas(set);
        let wanted = self.wanted();
        let patch = json!({
            "metadata": { "annotations": {
                DESIRED: wanted.to_string(), MAXIMUM: (wanted + self.limits().surge).to_string()
            } },
            "spec": { "replicas": target },
        });
        let scaled = self.patch_set(set, patch).await?;
        if before != target {
            self.report_scale(
                if target > before { "up" } else { "down" },
                &set.name_any(),
                before,
                target,
            );
        }
        Ok(scaled)
    }

    fn report_scale(&self, direction: &str, set: &str, before: i32, after: i32) {
        let message = format!("Scaled {direction} replica set {set} from {before} to {after}");
        self.context.events.publish(
            COMPONENT,
            &*self.deployment,
            Level::Normal,
            "ScalingReplicaSet",
            message,
        );
    }

    async fn patch_set(
        &self,
        set: &ReplicaSet,
        patch: serde_json::Value,
    ) -> Result<Arc<ReplicaSet>, Error> {
        let written = self
            .api
            .patch(
                &set.name_any(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            )
            .await;
        let written = written.doing(|| format!("changing ReplicaSet {}", Key::of(set)))?;
        self.context.replica_sets.observe(written.clone());
        Ok(Arc::new(written))
    }

    /// Deletes old sets beyond the history limit, once the rollout is complete.
    async fn clean_up(&mut self) -> Result<(), Error> {
        let limit = self.deployment.spec.revision_history_limit.unwrap_or(10);
        if !self.is_complete() {
            return Ok(());
        }
        let mut unused: Vec<_> = self
            .old
            .iter()
            .filter(|set| {
                counts(set) == Counts::default() && set.metadata.deletion_timestamp.is_none()
            })
            .cloned()
            .collect();
        unused.sort_by_key(|set| revision(&set.metadata));
        let surplus = unused
            .len()
            .saturating_sub(usize::try_from(limit).unwrap_or(0));
        for set in &unused[..surplus] {
            match self
                .api
                .delete(&set.name_any(), &DeleteParams::background())
                .await
            {
                Ok(_) => self.context.replica_sets.forget(set),
                Err(error) if super::is_not_found(&error) => {}
                Err(error) => {
                    return Err(error)
                        .doing(|| format!("deleting the old ReplicaSet {}", Key::of(&**set)));
                }
            }
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        let new = self.new.as_deref().map(counts).unwrap_or_default();
        let old: i32 = self.old.iter().map(|set| counts(set).actual).sum();
        new.actual == self.wanted() && new.available >= self.wanted() && old == 0
    }

    async fn write_status(&self) -> Outcome {
        let view = status::View {
            deployment: &self.deployment,
            new: self.new.as_deref(),
            old: &self.old,
            found: self.found,
            limits: self.limits(),
            complete: self.is_complete(),
        };
        let (status, again) = status::status(&view, now());
        if self.deployment.status.as_ref() == Some(&status) {
            return Ok(again);
        }
        let key = Key::of(&*self.deployment);
        let api: Api<Deployment> = Api::namespaced(self.context.client.clone(), &key.namespace);
        // Explicit nulls take away what this status lacks.
        let patch = json!({ "status": {
            "observedGeneration": status.observed_generation,
            "replicas": status.replicas,
            "updatedReplicas": status.updated_replicas,
            "readyReplicas": status.ready_replicas,
            "availableReplicas": status.available_replicas,
            "unavailableReplicas": status.unavailable_replicas,
            "collisionCount": status.collision_count,
            "conditions": status.conditions,
        } });
        match api
            .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch))
            .await
        {
            Ok(deployment) => self.context.deployments.observe(deployment),
            Err(error) if super::is_not_found(&error) => {}
            Err(error) => {
                return Err(error).doing(|| format!("writing the status of Deployment {key}"));
            }
        }
        Ok(again)
    }
}

/// The ReplicaSet of the Deployment's present template.
fn new_set(
    deployment: &Deployment,
    count: i32,
    annotations: BTreeMap<String, String>,
) -> ReplicaSet {
    let spec = deployment.spec.clone();
    let collisions = deployment
        .status
        .as_ref()
        .and_then(|status| status.collision_count);
    let hash = template_hash(&spec.template, collisions);
    let mut template = spec.template;
    template
        .metadata
        .get_or_insert_default()
        .labels
        .get_or_insert_default()
        .insert(HASH_LABEL.into(), hash.clone());
    let mut selector = spec.selector;
    selector
        .match_labels
        .get_or_insert_default()
        .insert(HASH_LABEL.into(), hash.clone());
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", deployment.name_any())),
            namespace: deployment.namespace(),
            labels: template
                .metadata
                .as_ref()
                .and_then(|meta| meta.labels.clone()),
            annotations: Some(annotations),
            owner_references: Some(vec![pod::controlled_by(deployment)]),
            ..ObjectMeta::default()
        },
        spec: ReplicaSetSpec {
            replicas: Some(count),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        },
        status: None,
    }
}

/// A short name for a template. Stable for as long as the type's JSON is; a set is found by its template and not by this.
fn template_hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    // Serialising plain structs to a string cannot fail; an empty text would still be a valid input.
    let mut text = serde_json::to_string(template).unwrap_or_default();
    if let Some(count) = collisions {
        text.push_str(&count.to_string());
    }
    safe_encode(&fnv32a(text.as_bytes()).to_string())
}

/// The FNV-1a hash of 32 bits.
pub(super) fn fnv32a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// Spells `text` in Kubernetes' alphabet of random names: no vowels, so that no words come out.
pub(super) fn safe_encode(text: &str) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    text.bytes()
        .map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment() -> Deployment {
        serde_json::from_value(json!({
            "metadata": { "name": "web", "namespace": "a", "uid": "d" },
            "spec": { "replicas": 2, "selector": { "matchLabels": { "app": "web" } }, "template": {
                "metadata": { "labels": { "app": "web" } }, "spec": { "containers": [{ "name": "c", "image": "i" }] },
            } },
        }))
        .unwrap()
    }

    #[test]
    fn a_set_is_found_by_its_template() {
        let mut deployment = deployment();
        let set = Arc::new(new_set(&deployment, 2, BTreeMap::new()));
        assert!(set.name_any().starts_with("web-"));
        assert_eq!(set.spec.selector.match_labels.as_ref().unwrap().len(), 2);
        assert!(split(&deployment, vec![set.clone()]).0.is_some());

        deployment.spec.template.spec.as_mut().unwrap().containers[0].image = Some("other".into());
        let (new, old) = split(&deployment, vec![set.clone()]);
        assert!(new.is_none());
        assert_eq!(old.len(), 1);
        assert_ne!(
            new_set(&deployment, 2, BTreeMap::new()).name_any(),
            set.name_any()
        );
    }

    #[test]
    fn a_collision_gives_another_name() {
        let template = deployment().spec.template;
        assert_ne!(
            template_hash(&template, None),
            template_hash(&template, Some(1))
        );
        assert_eq!(fnv32a(b"a"), 0xe40c_292c);
        assert!(
            safe_encode("0123456789")
                .bytes()
                .all(|byte| !b"aeiou013".contains(&byte))
        );
    }
}
