//! PodDisruptionBudget: counts how many of the selected pods may be evicted now. The API server spends the number.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::{
    PodDisruptionBudget, PodDisruptionBudgetSpec, PodDisruptionBudgetStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use serde_json::json;

use super::control::{self, resolve};
use super::events::now;
use super::pod;
use super::queue::{Key, Queue};
use super::{Context, Outcome};

/// Time that an evicted pod has to begin its end; after it the eviction counts as failed (as in Kubernetes).
const EVICTION: Duration = Duration::from_secs(120);

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("disruption");
    let own = queue.clone();
    context.budgets.subscribe(move |_, new| {
        if let Some(budget) = new {
            own.add(Key::of(&**budget));
        }
    });
    let (own, budgets) = (queue.clone(), context.budgets.clone());
    context.pods.subscribe(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            for budget in budgets.in_namespace(&pod.namespace().unwrap_or_default()) {
                if selects(&budget, pod) {
                    own.add(Key::of(&*budget));
                }
            }
        }
    });
    queue
}

fn selects(budget: &PodDisruptionBudget, pod: &Pod) -> bool {
    let selector = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| pod::selects(selector, &pod.metadata))
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(budget) = context.budgets.get(&key) else {
        return Ok(None);
    };
    let Some(spec) = &budget.spec else {
        return Ok(None);
    };
    let mut pods = context.pods.in_namespace(&key.namespace);
    pods.retain(|pod| selects(&budget, pod) && !pod::is_finished(pod));
    let sizes = |pod: &Pod| size(&context, pod);
    let (status, again) = status(&budget, spec, &pods, &sizes, &now());
    if budget.status.as_ref() != Some(&status) {
        // A map's keys are merged: those that are over need an explicit null.
        let known = budget
            .status
            .as_ref()
            .and_then(|s| s.disrupted_pods.clone());
        let mut disrupted: BTreeMap<String, Option<Time>> = known
            .unwrap_or_default()
            .into_keys()
            .map(|name| (name, None))
            .collect();
        for (name, time) in status.disrupted_pods.clone().unwrap_or_default() {
            disrupted.insert(name, Some(time));
        }
        let fields = json!({
            "currentHealthy": status.current_healthy,
            "desiredHealthy": status.desired_healthy,
            "disruptionsAllowed": status.disruptions_allowed,
            "expectedPods": status.expected_pods,
            "disruptedPods": disrupted,
            "observedGeneration": status.observed_generation,
            "conditions": status.conditions,
        });
        control::write_status(&context, &context.budgets, &*budget, fields).await?;
    }
    Ok(again)
}

/// Uid and number of pods of the workload that the pod belongs to; `None` where nothing says how many there should be.
fn size(context: &Context, pod: &Pod) -> Option<(String, i32)> {
    let namespace = pod.namespace()?;
    let owner = pod::controller(&pod.metadata)?;
    let key = Key::new(namespace.clone(), owner.name.clone());
    match owner.kind.as_str() {
        "StatefulSet" => {
            let set = context.stateful_sets.get(&key)?;
            Some((set.uid()?, set.spec.replicas.unwrap_or(1)))
        }
        "ReplicaSet" => {
            let set = context.replica_sets.get(&key)?;
            let above = pod::controller(&set.metadata).filter(|above| above.kind == "Deployment");
            let Some(above) = above else {
                return Some((set.uid()?, set.spec.replicas.unwrap_or(1)));
            };
            let deployment = context
                .deployments
                .get(&Key::new(namespace, above.name.clone()))?;
            Some((deployment.uid()?, deployment.spec.replicas.unwrap_or(1)))
        }
        _ => None,
    }
}

fn status(
    budget: &PodDisruptionBudget,
    spec: &PodDisruptionBudgetSpec,
    pods: &[Arc<Pod>],
    size: &dyn Fn(&Pod) -> Option<(String, i32)>,
    now: &Time,
) -> (PodDisruptionBudgetStatus, Option<Duration>) {
    let known = budget.status.clone().unwrap_or_default();
    let (disrupted, again) = still_disrupted(known.disrupted_pods.unwrap_or_default(), pods, now);
    let healthy = pods.iter().filter(|pod| {
        pod::is_ready(pod)
            && pod.metadata.deletion_timestamp.is_none()
            && !disrupted.contains_key(&pod.name_any())
    });
    let healthy = i32::try_from(healthy.count()).unwrap_or(i32::MAX);
    let (expected, desired, failed) = match expectation(spec, pods, size) {
        Ok((expected, desired)) => (expected, desired, None),
        Err(message) => (0, 0, Some(message)),
    };
    let allowed = if expected > 0 {
        (healthy - desired).max(0)
    } else {
        0
    };
    let (reason, message) = match (&failed, allowed > 0) {
        (Some(message), _) => ("SyncFailed", message.as_str()),
        (None, true) => ("SufficientPods", ""),
        (None, false) => ("InsufficientPods", ""),
    };
    let text = if allowed > 0 { "True" } else { "False" };
    let before = known.conditions.iter().flatten().next();
    let same = before.filter(|before| before.status == text);
    let condition = Condition {
        type_: "DisruptionAllowed".into(),
        status: text.into(),
        reason: reason.into(),
        message: message.into(),
        observed_generation: budget.metadata.generation,
        last_transition_time: same
            .map_or_else(|| now.clone(), |before| before.last_transition_time.clone()),
    };
    let status = PodDisruptionBudgetStatus {
        current_healthy: Some(healthy),
        desired_healthy: Some(desired),
        disruptions_allowed: Some(allowed),
        expected_pods: Some(expected),
        disrupted_pods: Some(disrupted).filter(|map| !map.is_empty()),
        observed_generation: budget.metadata.generation,
        conditions: Some(vec![condition]),
    };
    (status, again)
}

/// The evictions that have been granted and not yet begun.
fn still_disrupted(
    known: BTreeMap<String, Time>,
    pods: &[Arc<Pod>],
    now: &Time,
) -> (BTreeMap<String, Time>, Option<Duration>) {
    let alive: BTreeSet<String> = pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .map(|pod| pod.name_any())
        .collect();
    let mut again: Option<Duration> = None;
    let mut kept = known;
    kept.retain(|name, since| {
        let age = u64::try_from(now.0.as_second() - since.0.as_second()).unwrap_or(0);
        let left = EVICTION.checked_sub(Duration::from_secs(age));
        let left = left.filter(|left| alive.contains(name) && !left.is_zero());
        again = [again, left].into_iter().flatten().min();
        left.is_some()
    });
    (kept, again)
}

/// How many pods there should be, and how many of them must be healthy.
fn expectation(
    spec: &PodDisruptionBudgetSpec,
    pods: &[Arc<Pod>],
    size: &dyn Fn(&Pod) -> Option<(String, i32)>,
) -> Result<(i32, i32), String> {
    let present = i32::try_from(pods.len()).unwrap_or(i32::MAX);
    if let (None, Some(IntOrString::Int(number))) = (&spec.max_unavailable, &spec.min_available) {
        return Ok((present, *number));
    }
    // A share needs the whole, which the workloads know.
    let mut sizes = BTreeMap::new();
    for pod in pods {
        let (uid, replicas) = size(pod).ok_or_else(|| {
            format!(
                "pod {} belongs to no Deployment, ReplicaSet or StatefulSet, whose size the budget needs; use minAvailable with a number",
                pod.name_any()
            )
        })?;
        sizes.insert(uid, replicas);
    }
    let expected: i32 = sizes.values().sum();
    let desired = match (&spec.max_unavailable, &spec.min_available) {
        (Some(unavailable), _) => (expected - resolve(unavailable, expected, true)).max(0),
        (None, Some(available)) => resolve(available, expected, true),
        // Neither is set: one pod at least stays.
        (None, None) => 1,
    };
    Ok((expected, desired))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn pods(count: usize, ready: usize) -> Vec<Arc<Pod>> {
        let pod = |number: usize| {
            let ready = if number < ready { "True" } else { "False" };
            Arc::new(
                serde_json::from_value(json!({
                    "metadata": { "name": format!("p{number}") },
                    "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": ready }] },
                }))
                .unwrap(),
            )
        };
        (0..count).map(pod).collect()
    }

    fn numbers(spec: Value, pods: &[Arc<Pod>], status: Value) -> (i32, i32, i32, String) {
        let budget: PodDisruptionBudget =
            serde_json::from_value(json!({ "spec": spec, "status": status })).unwrap();
        let now = Time("2026-01-01T00:00:10Z".parse().unwrap());
        let size = |_: &Pod| Some(("d".to_owned(), 4));
        let (status, _) = self::status(&budget, budget.spec.as_ref().unwrap(), pods, &size, &now);
        (
            status.current_healthy.unwrap(),
            status.desired_healthy.unwrap(),
            status.disruptions_allowed.unwrap(),
            status.conditions.unwrap()[0].reason.clone(),
        )
    }

    #[test]
    fn budgets_allow_what_is_beyond_the_wanted_number() {
        for (spec, ready, expected) in [
            (json!({ "minAvailable": 2 }), 4, (4, 2, 2, "SufficientPods")),
            (
                json!({ "minAvailable": "50%" }),
                3,
                (3, 2, 1, "SufficientPods"),
            ),
            (
                json!({ "maxUnavailable": 1 }),
                4,
                (4, 3, 1, "SufficientPods"),
            ),
            (
                json!({ "maxUnavailable": 1 }),
                3,
                (3, 3, 0, "InsufficientPods"),
            ),
            (
                json!({ "maxUnavailable": "25%" }),
                4,
                (4, 3, 1, "SufficientPods"),
            ),
        ] {
            let found = numbers(spec.clone(), &pods(4, ready), json!(null));
            let found = (found.0, found.1, found.2, found.3.as_str());
            assert_eq!(found, expected, "{spec}");
        }
    }

    #[test]
    fn an_evicted_pod_counts_as_gone_until_its_time_is_over() {
        let status = |time: &str| {
            json!({ "currentHealthy": 4, "desiredHealthy": 2, "disruptionsAllowed": 1, "expectedPods": 4,
                    "disruptedPods": { "p0": time, "gone": time } })
        };
        let spec = json!({ "minAvailable": 2 });
        let fresh = numbers(spec.clone(), &pods(4, 4), status("2026-01-01T00:00:00Z"));
        assert_eq!((fresh.0, fresh.2), (3, 1));
        let stale = numbers(spec, &pods(4, 4), status("2025-12-31T23:58:00Z"));
        assert_eq!((stale.0, stale.2), (4, 2));
    }

    #[test]
    fn a_share_of_pods_that_belong_to_nothing_is_told() {
        let budget = PodDisruptionBudget::default();
        let spec = PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            ..PodDisruptionBudgetSpec::default()
        };
        let (status, _) = status(&budget, &spec, &pods(1, 1), &|_| None, &now());
        assert_eq!(status.conditions.unwrap()[0].reason, "SyncFailed");
    }
}
