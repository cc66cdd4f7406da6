//! What all loops do with the pods of a workload: find, adopt, create, delete; and how a status is written.

use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::cache::Cache;
use super::events::Level;
use super::pod::{self, Claim};
use super::queue::{Key, Queue};
use super::{Context, Doing as _, Error};

/// Pods that one pass creates or deletes at most.
pub(super) const BURST: usize = 500;

/// A workload that manages pods.
pub(super) struct Owner<'a, K> {
    pub(super) context: &'a Context,
    pub(super) object: &'a K,
    /// The loop's name in events.
    pub(super) component: &'static str,
    pub(super) selector: &'a LabelSelector,
}

/// Puts the workloads into `queue` whose pods change, or that may adopt a pod of nobody.
pub(super) fn follow_pods<K>(
    context: &Context,
    queue: &Arc<Queue>,
    owners: &Arc<Cache<K>>,
    selector: fn(&K) -> Option<&LabelSelector>,
) where
    K: Resource<DynamicType = ()>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug
        + Send
        + Sync
        + 'static,
{
    let (own, owners) = (queue.clone(), owners.clone());
    context.pods.subscribe(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            let namespace = pod.namespace().unwrap_or_default();
            match pod::controller(&pod.metadata) {
                Some(owner) if owner.kind == K::kind(&()) => {
                    own.add(Key::new(namespace, owner.name.clone()))
                }
                Some(_) => {}
                None => {
                    for owner in owners.in_namespace(&namespace) {
                        if selector(&owner)
                            .is_some_and(|selector| pod::selects(selector, &pod.metadata))
                        {
                            own.add(Key::of(&*owner));
                        }
                    }
                }
            }
        }
    });
}

impl<K> Owner<'_, K>
where
    K: Resource<DynamicType = ()>,
{
    fn kind(&self) -> String {
        K::kind(&()).into_owned()
    }

    /// Whether the workload is being deleted.
    pub(super) fn ends(&self) -> bool {
        self.object.meta().deletion_timestamp.is_some()
    }

    fn api(&self) -> Api<Pod> {
        let namespace = self.object.namespace().unwrap_or_default();
        Api::namespaced(self.context.client.clone(), &namespace)
    }

    /// The pods that the workload manages, by the cache alone.
    pub(super) fn owned(&self) -> Vec<Arc<Pod>> {
        let uid = self.object.uid().unwrap_or_default();
        let namespace = self.object.namespace().unwrap_or_default();
        let mut pods = self.context.pods.in_namespace(&namespace);
        pods.retain(|pod| pod::controller(&pod.metadata).is_some_and(|owner| owner.uid == uid));
        pods
    }

    /// The pods that the workload manages, after adopting (where `may_adopt` agrees) and letting go.
    pub(super) async fn claimed(
        &self,
        may_adopt: impl Fn(&Pod) -> bool,
    ) -> Result<Vec<Arc<Pod>>, Error> {
        let uid = self.object.uid().unwrap_or_default();
        let mut pods = Vec::new();
        for pod in self
            .context
            .pods
            .in_namespace(&self.object.namespace().unwrap_or_default())
        {
            let claim = pod::claim(&uid, self.ends(), self.selector, &pod.metadata);
            let others = || {
                pod.owner_references()
                    .iter()
                    .filter(|owner| owner.controller != Some(true))
                    .cloned()
            };
            let owners: Vec<_> = match claim {
                Claim::Owned => {
                    pods.push(pod);
                    continue;
                }
                Claim::Adopt if pod::is_active(&pod) && may_adopt(&pod) => {
                    others().chain([pod::controlled_by(self.object)]).collect()
                }
                Claim::Release => others().collect(),
                Claim::Adopt | Claim::Foreign => continue,
            };
            let patch = json!({ "metadata": { "uid": pod.uid(), "ownerReferences": owners } });
            if let Some(changed) = self.patch(&pod, patch).await?
                && claim == Claim::Adopt
            {
                pods.push(changed);
            }
        }
        Ok(pods)
    }

    /// Changes a pod by a merge patch; `None` where it has gone.
    pub(super) async fn patch(&self, pod: &Pod, patch: Value) -> Result<Option<Arc<Pod>>, Error> {
        let name = pod.name_any();
        let params = PatchParams::default();
        match self.api().patch(&name, &params, &Patch::Merge(patch)).await {
            Ok(pod) => {
                self.context.pods.observe(pod.clone());
                Ok(Some(Arc::new(pod)))
            }
            Err(error) if super::is_not_found(&error) => Ok(None),
            Err(error) => Err(error).doing(|| format!("changing pod {}", Key::of(pod))),
        }
    }

    /// A pod of this template; the API completes its name.
    pub(super) fn pod(&self, template: &PodTemplateSpec) -> Pod {
        let template = template.clone();
        let meta = template.metadata.unwrap_or_default();
        Pod {
            metadata: ObjectMeta {
                generate_name: Some(format!("{}-", self.object.name_any())),
                namespace: self.object.namespace(),
                labels: meta.labels,
                annotations: meta.annotations,
                finalizers: meta.finalizers,
                owner_references: Some(vec![pod::controlled_by(self.object)]),
                ..ObjectMeta::default()
            },
            spec: Some(template.spec.unwrap_or_default()),
            status: None,
        }
    }

    /// Creates the pods: one first, then twice as many at a time, so that a refusal costs one request and not all.
    pub(super) async fn create_all(&self, pods: &[Pod]) -> Result<(), Error> {
        let (mut rest, mut batch) = (pods, 1);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(batch.min(rest.len()));
            let results = join_all(now.iter().map(|pod| self.create(pod))).await;
            results.into_iter().collect::<Result<(), _>>()?;
            rest = later;
            batch = (batch * 2).min(BURST);
        }
        Ok(())
    }

    /// Creates one pod and says so in an event.
    pub(super) async fn create(&self, pod: &Pod) -> Result<(), Error> {
        match self.api().create(&PostParams::default(), pod).await {
            Ok(pod) => {
                let message = format!("Created pod: {}", pod.name_any());
                self.report(Level::Normal, "SuccessfulCreate", message);
                self.context.pods.observe(pod);
                Ok(())
            }
            Err(error) => {
                let message = format!("Error creating: {}", api_message(&error));
                self.report(Level::Warning, "FailedCreate", message);
                Err(error).doing(|| {
                    let (kind, key) = (self.kind(), Key::of(self.object));
                    format!("creating a pod of {kind} {key}")
                })
            }
        }
    }

    /// Deletes one pod gracefully and says so in an event; one that has gone is fine.
    pub(super) async fn delete(&self, pod: &Pod) -> Result<(), Error> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: pod.uid(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match self.api().delete(&pod.name_any(), &params).await {
            Ok(either) => {
                match either.left() {
                    Some(ending) if ending.metadata.deletion_timestamp.is_some() => {
                        self.context.pods.observe(ending)
                    }
                    _ => self.context.pods.forget(pod),
                }
                let message = format!("Deleted pod: {}", pod.name_any());
                self.report(Level::Normal, "SuccessfulDelete", message);
                Ok(())
            }
            Err(error) if super::is_not_found(&error) => Ok(()),
            Err(error) => Err(error).doing(|| format!("deleting pod {}", Key::of(pod))),
        }
    }

    /// Deletes all of `pods`, at the same time.
    pub(super) async fn delete_all(&self, pods: &[Arc<Pod>]) -> Result<(), Error> {
        let results = join_all(pods.iter().map(|pod| self.delete(pod))).await;
        results.into_iter().collect()
    }

    /// An event about the workload.
    pub(super) fn report(&self, level: Level, reason: &'static str, message: String) {
        let events = &self.context.events;
        events.publish(self.component, self.object, level, reason, message);
    }
}

/// What the API said, without the client's wrapping.
pub(super) fn api_message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// As Kubernetes writes counts in a status: nothing for zero.
pub(super) fn count(number: usize) -> Option<i32> {
    i32::try_from(number).ok().filter(|number| *number > 0)
}

/// Writes `status` (every field of it, with explicit nulls for those that are to go) and takes the answer into `cache`.
pub(super) async fn write_status<K>(
    context: &Context,
    cache: &Cache<K>,
    object: &K,
    status: Value,
) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug
        + Send
        + Sync
        + 'static,
{
    let key = Key::of(object);
    let api: Api<K> = Api::namespaced(context.client.clone(), &key.namespace);
    let patch = Patch::Merge(json!({ "status": status }));
    match api
        .patch_status(&key.name, &PatchParams::default(), &patch)
        .await
    {
        Ok(object) => cache.observe(object),
        Err(error) if super::is_not_found(&error) => {}
        Err(error) => {
            return Err(error).doing(|| format!("writing the status of {} {key}", K::kind(&())));
        }
    }
    Ok(())
}

/// A number of pods from a count or a percentage of `replicas`, rounded up or down.
pub(super) fn resolve(value: &IntOrString, replicas: i32, up: bool) -> i32 {
    match value {
        IntOrString::Int(number) => (*number).max(0),
        IntOrString::String(text) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let product = percent.max(0) * i64::from(replicas);
            let number = if up {
                (product + 99) / 100
            } else {
                product / 100
            };
            i32::try_from(number).unwrap_or(i32::MAX)
        }
    }
}
