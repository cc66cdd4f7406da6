//! ReplicaSet: keeps the asked number of pods of one template.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde_json::json;

use super::control::{self, BURST, Owner, api_message, count};
use super::events::now;
use super::pod;
use super::queue::{Key, Queue};
use super::{Context, Error, Outcome};

const COMPONENT: &str = "replicaset-controller";

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("replicaset");
    let own = queue.clone();
    context.replica_sets.subscribe(move |_, new| {
        if let Some(set) = new {
            own.add(Key::of(&**set));
        }
    });
    control::follow_pods(
        context,
        &queue,
        &context.replica_sets,
        |set: &ReplicaSet| Some(&set.spec.selector),
    );
    queue
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(set) = context.replica_sets.get(&key) else {
        return Ok(None);
    };
    let owner = Owner {
        context: &context,
        object: &*set,
        component: COMPONENT,
        selector: &set.spec.selector,
    };
    let pods = owner.claimed(|_| true).await?;
    let active: Vec<_> = pods.into_iter().filter(|pod| pod::is_active(pod)).collect();
    let wanted = usize::try_from(set.spec.replicas.unwrap_or(1)).unwrap_or(0);
    let scaled = if owner.ends() {
        Ok(())
    } else {
        scale(&owner, &active, wanted).await
    };
    // What the scaling changed is in the cache by now.
    let mut pods = owner.owned();
    pods.retain(|pod| pod::is_active(pod));
    let (status, again) = status(&set, &pods, scaled.as_ref().err(), jiff::Timestamp::now());
    write_status(&context, &set, status).await?;
    scaled.map(|()| again)
}

async fn scale(
    owner: &Owner<'_, ReplicaSet>,
    active: &[Arc<Pod>],
    wanted: usize,
) -> Result<(), Error> {
    if active.len() < wanted {
        let template = owner.object.spec.template.clone().unwrap_or_default();
        let count = (wanted - active.len()).min(BURST);
        owner.create_all(&vec![owner.pod(&template); count]).await
    } else {
        let surplus = surplus(active, (active.len() - wanted).min(BURST));
        owner.delete_all(&surplus).await
    }
}

/// The `count` pods to delete first, as Kubernetes ranks them: not bound to a node, pending, not ready, cheap by
/// annotation, ready for a shorter time, restarted more often, younger.
pub(super) fn surplus(active: &[Arc<Pod>], count: usize) -> Vec<Arc<Pod>> {
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

async fn write_status(
    context: &Context,
    set: &ReplicaSet,
    status: ReplicaSetStatus,
) -> Result<(), Error> {
    if set.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let fields = json!({
        "replicas": status.replicas,
        "fullyLabeledReplicas": status.fully_labeled_replicas,
        "readyReplicas": status.ready_replicas,
        "availableReplicas": status.available_replicas,
        "observedGeneration": status.observed_generation,
        "conditions": status.conditions,
    });
    control::write_status(context, &context.replica_sets, set, fields).await
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
}
