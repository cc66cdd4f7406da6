//! ReplicaSet: keeps the asked number of pods of one template.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::events::{Level, now};
use super::pod::{self, Claim};
use super::queue::{Key, Queue};
use super::{Context, Doing as _, Error, Outcome};

const COMPONENT: &str = "replicaset-controller";
/// Pods that one pass creates or deletes at most.
const BURST: usize = 500;

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("replicaset");
    let own = queue.clone();
    context.replica_sets.subscribe(move |_, new| {
        if let Some(set) = new {
            own.add(Key::of(&**set));
        }
    });
    let (own, sets) = (queue.clone(), context.replica_sets.clone());
    context.pods.subscribe(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            let namespace = pod.namespace().unwrap_or_default();
            match pod::controller(&pod.metadata) {
                Some(owner) if owner.kind == "ReplicaSet" => {
                    own.add(Key::new(namespace, owner.name.clone()))
                }
                Some(_) => {}
                // Nobody's pod: any set that selects it may adopt it.
                None => {
                    for set in sets.in_namespace(&namespace) {
                        if pod::selects(&set.spec.selector, &pod.metadata) {
                            own.add(Key::of(&*set));
                        }
                    }
                }
            }
        }
    });
    queue
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(set) = context.replica_sets.get(&key) else {
        return Ok(None);
    };
    let pods = claimed(&context, &set).await?;
    let active: Vec<_> = pods
        .iter()
        .filter(|pod| pod::is_active(pod))
        .cloned()
        .collect();
    let wanted = usize::try_from(set.spec.replicas.unwrap_or(1)).unwrap_or(0);
    let ends = set.metadata.deletion_timestamp.is_some();
    let scaled = if ends {
        Ok(())
    } else {
        scale(&context, &set, &active, wanted).await
    };
    // What the scaling changed is in the cache by now.
    let pods: Vec<_> = owned(&context, &set)
        .into_iter()
        .filter(|pod| pod::is_active(pod))
        .collect();
    let (status, again) = status(&set, &pods, scaled.as_ref().err(), jiff::Timestamp::now());
    write_status(&context, &set, status).await?;
    scaled.map(|()| again)
}

/// The pods that the set manages, by the cache alone.
fn owned(context: &Context, set: &ReplicaSet) -> Vec<Arc<Pod>> {
    let uid = set.uid().unwrap_or_default();
    let mut pods = context
        .pods
        .in_namespace(&set.namespace().unwrap_or_default());
    pods.retain(|pod| pod::controller(&pod.metadata).is_some_and(|owner| owner.uid == uid));
    pods
}

/// The pods that the set manages, after adopting and letting go.
async fn claimed(context: &Context, set: &ReplicaSet) -> Result<Vec<Arc<Pod>>, Error> {
    let namespace = set.namespace().unwrap_or_default();
    let ends = set.metadata.deletion_timestamp.is_some();
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    let mut pods = Vec::new();
    for pod in context.pods.in_namespace(&namespace) {
        let claim = pod::claim(
            &set.uid().unwrap_or_default(),
            ends,
            &set.spec.selector,
            &pod.metadata,
        );
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
            Claim::Adopt if pod::is_active(&pod) => {
                others().chain([pod::controlled_by(set)]).collect()
            }
            Claim::Release => others().collect(),
            Claim::Adopt | Claim::Foreign => continue,
        };
        let patch = json!({ "metadata": { "uid": pod.uid(), "ownerReferences": owners } });
        match api
            .patch(
                &pod.name_any(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            )
            .await
        {
            Ok(pod) => {
                context.pods.observe(pod.clone());
                if claim == Claim::Adopt {
                    pods.push(Arc::new(pod));
                }
            }
            Err(error) if super::is_not_found(&error) => {}
            Err(error) => {
                return Err(error)
                    .doing(|| format!("changing the owner of pod {}", pod.name_any()));
            }
        }
    }
    Ok(pods)
}

async fn scale(
    context: &Context,
    set: &ReplicaSet,
    active: &[Arc<Pod>],
    wanted: usize,
) -> Result<(), Error> {
    if active.len() < wanted {
        create(context, set, (wanted - active.len()).min(BURST)).await
    } else {
        let surplus = surplus(active, (active.len() - wanted).min(BURST));
        let results = join_all(surplus.iter().map(|pod| delete(context, set, pod))).await;
        results.into_iter().collect()
    }
}

/// Creates `count` pods: one first, then twice as many at a time, so that a refusal costs one request and not `count`.
async fn create(context: &Context, set: &ReplicaSet, count: usize) -> Result<(), Error> {
    let namespace = set.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    let pod = new_pod(set);
    let (mut left, mut batch) = (count, 1);
    while left > 0 {
        batch = batch.min(left);
        let params = PostParams::default();
        let results = join_all((0..batch).map(|_| api.create(&params, &pod))).await;
        for result in results {
            match result {
                Ok(pod) => {
                    let message = format!("Created pod: {}", pod.name_any());
                    context.events.publish(
                        COMPONENT,
                        set,
                        Level::Normal,
                        "SuccessfulCreate",
                        message,
                    );
                    context.pods.observe(pod);
                }
                Err(error) => {
                    let message = format!("Error creating: {}", api_message(&error));
                    context
                        .events
                        .publish(COMPONENT, set, Level::Warning, "FailedCreate", message);
                    return Err(error)
                        .doing(|| format!("creating a pod of ReplicaSet {}", Key::of(set)));
                }
            }
        }
        left -= batch;
        batch *= 2;
    }
    Ok(())
}

/// What the API said, without the client's wrapping.
fn api_message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

async fn delete(context: &Context, set: &ReplicaSet, pod: &Pod) -> Result<(), Error> {
    let api: Api<Pod> =
        Api::namespaced(context.client.clone(), &pod.namespace().unwrap_or_default());
    let params = DeleteParams {
        preconditions: Some(Preconditions {
            uid: pod.uid(),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    match api.delete(&pod.name_any(), &params).await {
        Ok(either) => {
            match either.left() {
                Some(ending) if ending.metadata.deletion_timestamp.is_some() => {
                    context.pods.observe(ending)
                }
                _ => context.pods.forget(pod),
            }
            let message = format!("Deleted pod: {}", pod.name_any());
            context
                .events
                .publish(COMPONENT, set, Level::Normal, "SuccessfulDelete", message);
            Ok(())
        }
        Err(error) if super::is_not_found(&error) => Ok(()),
        Err(error) => Err(error).doing(|| format!("deleting pod {}", Key::of(pod))),
    }
}

/// A pod of the set's template.
fn new_pod(set: &ReplicaSet) -> Pod {
    let template = set.spec.template.clone().unwrap_or_default();
    let meta = template.metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", set.name_any())),
            namespace: set.namespace(),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![pod::controlled_by(set)]),
            ..ObjectMeta::default()
        },
        spec: Some(template.spec.unwrap_or_default()),
        status: None,
    }
}

/// The `count` pods to delete first, as Kubernetes ranks them: not bound to a node, pending, not ready, cheap by
/// annotation, ready for a shorter time, restarted more often, younger.
fn surplus(active: &[Arc<Pod>], count: usize) -> Vec<Arc<Pod>> {
    let mut ranked = active.to_vec();
    ranked.sort_by_cached_key(|pod| {
        let bound = pod
            .spec
            .as_ref()
            .is_some_and(|spec| spec.node_name.is_some());
        let phase = match pod::phase(pod) {
            "Pending" => 0,
            "Unknown" => 1,
            _ => 2,
        };
        let ready = pod::is_ready(pod);
        let cost: i32 = pod
            .annotations()
            .get("controller.kubernetes.io/pod-deletion-cost")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let since = Reverse(pod::ready_since(pod).filter(|_| ready));
        (
            bound,
            phase,
            ready,
            cost,
            since,
            Reverse(restarts(pod)),
            Reverse(created(pod)),
        )
    });
    ranked.truncate(count);
    ranked
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    statuses
        .into_iter()
        .flatten()
        .map(|status| status.restart_count)
        .max()
        .unwrap_or(0)
}

fn created(pod: &Pod) -> Option<jiff::Timestamp> {
    pod.metadata.creation_timestamp.as_ref().map(|time| time.0)
}

/// The status by the active pods, and when one of them becomes available by the mere passing of time.
fn status(
    set: &ReplicaSet,
    active: &[Arc<Pod>],
    failure: Option<&Error>,
    at: jiff::Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let spec = set.spec.clone();
    let labels = spec
        .template
        .and_then(|template| template.metadata)
        .and_then(|meta| meta.labels)
        .unwrap_or_default();
    let waits: Vec<_> = active
        .iter()
        .filter_map(|pod| pod::available_in(pod, spec.min_ready_seconds.unwrap_or(0), at))
        .collect();
    let labelled = active.iter().filter(|pod| {
        labels
            .iter()
            .all(|(key, value)| pod.labels().get(key) == Some(value))
    });
    let status = ReplicaSetStatus {
        replicas: count(active.len()).unwrap_or(0),
        fully_labeled_replicas: count(labelled.count()),
        ready_replicas: count(active.iter().filter(|pod| pod::is_ready(pod)).count()),
        available_replicas: count(waits.iter().filter(|wait| wait.is_zero()).count()),
        observed_generation: set.metadata.generation,
        conditions: failure.map(|error| vec![failure_condition(set, error)]),
        ..ReplicaSetStatus::default()
    };
    (
        status,
        waits.into_iter().filter(|wait| !wait.is_zero()).min(),
    )
}

fn failure_condition(set: &ReplicaSet, error: &Error) -> ReplicaSetCondition {
    let message = api_message(&error.source);
    let known = set
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref())
        .into_iter()
        .flatten();
    let same = known.into_iter().find(|known| {
        known.type_.as_deref() == Some("ReplicaFailure") && known.message.as_ref() == Some(&message)
    });
    ReplicaSetCondition {
        type_: Some("ReplicaFailure".into()),
        status: Some("True".into()),
        reason: Some("FailedCreate".into()),
        last_transition_time: same
            .map_or_else(|| Some(now()), |known| known.last_transition_time.clone()),
        message: Some(message),
    }
}

/// As Kubernetes writes counts in a status: nothing for zero.
fn count(number: usize) -> Option<i32> {
    i32::try_from(number).ok().filter(|number| *number > 0)
}

async fn write_status(
    context: &Context,
    set: &ReplicaSet,
    status: ReplicaSetStatus,
) -> Result<(), Error> {
    if set.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let api: Api<ReplicaSet> =
        Api::namespaced(context.client.clone(), &set.namespace().unwrap_or_default());
    // A merge patch of whole fields: explicit nulls take away what this status lacks.
    let patch = json!({ "status": {
        "replicas": status.replicas,
        "fullyLabeledReplicas": status.fully_labeled_replicas,
        "readyReplicas": status.ready_replicas,
        "availableReplicas": status.available_replicas,
        "observedGeneration": status.observed_generation,
        "conditions": status.conditions,
    } });
    match api
        .patch_status(
            &set.name_any(),
            &PatchParams::default(),
            &Patch::Merge(patch),
        )
        .await
    {
        Ok(set) => context.replica_sets.observe(set),
        Err(error) if super::is_not_found(&error) => {}
        Err(error) => {
            return Err(error)
                .doing(|| format!("writing the status of ReplicaSet {}", Key::of(set)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, node: Option<&str>, phase: &str, ready_since: Option<&str>) -> Arc<Pod> {
        let ready = json!([{ "type": "Ready", "status": if ready_since.is_some() { "True" } else { "False" },
                             "lastTransitionTime": ready_since }]);
        let pod = json!({
            "metadata": { "name": name, "labels": { "app": "x" }, "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "nodeName": node, "containers": [] },
            "status": { "phase": phase, "conditions": ready },
        });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<String> {
        pods.iter().map(|pod| pod.name_any()).collect()
    }

    #[test]
    fn pods_that_serve_go_last() {
        let pods = [
            pod("old", Some("n"), "Running", Some("2026-01-01T00:00:01Z")),
            pod("young", Some("n"), "Running", Some("2026-01-01T00:00:09Z")),
            pod("unready", Some("n"), "Running", None),
            pod("pending", Some("n"), "Pending", None),
            pod("unbound", None, "Pending", None),
        ];
        assert_eq!(
            names(&surplus(&pods, 5)),
            ["unbound", "pending", "unready", "young", "old"]
        );
        assert_eq!(names(&surplus(&pods, 2)), ["unbound", "pending"]);
    }

    #[test]
    fn status_counts_ready_and_available_pods() {
        let set: ReplicaSet = serde_json::from_value(json!({
            "metadata": { "name": "s", "namespace": "a", "generation": 3 },
            "spec": { "minReadySeconds": 10, "selector": {}, "template": { "metadata": { "labels": { "app": "x" } } } },
        }))
        .unwrap();
        let pods = [
            pod("a", Some("n"), "Running", Some("2026-01-01T00:00:00Z")),
            pod("b", Some("n"), "Running", Some("2026-01-01T00:00:55Z")),
            pod("c", Some("n"), "Running", None),
        ];
        let (status, again) = status(&set, &pods, None, "2026-01-01T00:01:00Z".parse().unwrap());
        assert_eq!(
            (
                status.replicas,
                status.ready_replicas,
                status.available_replicas
            ),
            (3, Some(2), Some(1))
        );
        assert_eq!(
            (status.fully_labeled_replicas, status.observed_generation),
            (Some(3), Some(3))
        );
        assert_eq!(again, Some(Duration::from_secs(5)));
    }

    #[test]
    fn pods_carry_the_template_and_the_owner() {
        let set: ReplicaSet = serde_json::from_value(json!({
            "metadata": { "name": "s", "namespace": "a", "uid": "u" },
            "spec": { "selector": {}, "template": {
                "metadata": { "labels": { "app": "x" }, "annotations": { "k": "v" } },
                "spec": { "containers": [{ "name": "c", "image": "i" }] },
            } },
        }))
        .unwrap();
        let pod = new_pod(&set);
        assert_eq!(pod.metadata.generate_name.as_deref(), Some("s-"));
        assert_eq!(pod.labels()["app"], "x");
        assert_eq!(pod.annotations()["k"], "v");
        assert_eq!(
            pod::controller(&pod.metadata).map(|owner| owner.uid.as_str()),
            Some("u")
        );
        assert_eq!(pod.spec.unwrap().containers[0].image.as_deref(), Some("i"));
    }
}
