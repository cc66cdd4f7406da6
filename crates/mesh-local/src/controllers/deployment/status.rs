//! A Deployment's status and conditions, with the texts that `kubectl rollout status` and people know. Pure.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::plan::Limits;

/// How the new set came to be in this pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Created,
    Existing,
}

/// What a status is made from.
pub(super) struct View<'a> {
    pub(super) deployment: &'a Deployment,
    pub(super) new: Option<&'a ReplicaSet>,
    pub(super) old: &'a [Arc<ReplicaSet>],
    pub(super) found: Option<Found>,
    pub(super) limits: Limits,
    pub(super) complete: bool,
}

/// The status, and when to look again (a rollout may run into its deadline).
pub(super) fn status(view: &View<'_>, now: Time) -> (DeploymentStatus, Option<Duration>) {
    let sets = || view.old.iter().map(|set| &**set).chain(view.new);
    let sum = |count: fn(&ReplicaSet) -> i32| sets().map(count).sum::<i32>();
    let actual = |set: &ReplicaSet| set.status.as_ref().map_or(0, |status| status.replicas);
    let total = sum(|set| set.status.as_ref().map_or(0, |status| status.replicas));
    let ready = sum(|set| {
        set.status
            .as_ref()
            .and_then(|status| status.ready_replicas)
            .unwrap_or(0)
    });
    let available = sum(|set| {
        set.status
            .as_ref()
            .and_then(|status| status.available_replicas)
            .unwrap_or(0)
    });
    let asked = sum(super::replicas);
    let known = view.deployment.status.clone().unwrap_or_default();
    let counts = DeploymentStatus {
        observed_generation: view.deployment.metadata.generation,
        replicas: some(total),
        updated_replicas: some(view.new.map_or(0, actual)),
        ready_replicas: some(ready),
        available_replicas: some(available),
        unavailable_replicas: some((asked - available).max(0)),
        collision_count: known.collision_count,
        ..DeploymentStatus::default()
    };
    let mut conditions = vec![availability(view, available)];
    let (progress, again) = progress(view, &known, &counts, &now);
    conditions.extend(progress);
    conditions.extend(failure(view));
    for condition in &mut conditions {
        stamp(condition, &known, &now);
    }
    // In the order in which they stand already, so that nothing changes without a reason.
    let position = |condition: &DeploymentCondition| {
        known
            .conditions
            .iter()
            .flatten()
            .position(|known| known.type_ == condition.type_)
            .unwrap_or(usize::MAX)
    };
    conditions.sort_by_key(position);
    (
        DeploymentStatus {
            conditions: Some(conditions),
            ..counts
        },
        again,
    )
}

/// As Kubernetes writes counts in a status: nothing for zero.
fn some(count: i32) -> Option<i32> {
    (count != 0).then_some(count)
}

fn condition(type_: &str, holds: bool, reason: &str, message: String) -> DeploymentCondition {
    DeploymentCondition {
        type_: Some(type_.into()),
        status: Some(if holds { "True" } else { "False" }.into()),
        reason: Some(reason.into()),
        message: Some(message),
        ..DeploymentCondition::default()
    }
}

fn availability(view: &View<'_>, available: i32) -> DeploymentCondition {
    let wanted = view.deployment.spec.replicas.unwrap_or(1);
    if available >= wanted - view.limits.unavailable {
        let message = "Deployment has minimum availability.".into();
        condition("Available", true, "MinimumReplicasAvailable", message)
    } else {
        let message = "Deployment does not have minimum availability.".into();
        condition("Available", false, "MinimumReplicasUnavailable", message)
    }
}

fn progress(
    view: &View<'_>,
    known: &DeploymentStatus,
    counts: &DeploymentStatus,
    now: &Time,
) -> (Option<DeploymentCondition>, Option<Duration>) {
    let spec = view.deployment.spec.clone();
    let before = find(known, "Progressing");
    if spec.paused == Some(true) {
        let message = "Deployment is paused".into();
        return (
            Some(unknown(condition(
                "Progressing",
                false,
                "DeploymentPaused",
                message,
            ))),
            None,
        );
    }
    let deadline = spec.progress_deadline_seconds.unwrap_or(600);
    if deadline == i32::MAX {
        return (None, None);
    }
    let Some(new) = view.new else {
        return (before.cloned(), None);
    };
    let name = new.name_any();
    if view.complete {
        let message = format!("ReplicaSet \"{name}\" has successfully progressed.");
        return (
            Some(condition(
                "Progressing",
                true,
                "NewReplicaSetAvailable",
                message,
            )),
            None,
        );
    }
    let is_reason =
        |reason: &str| before.is_some_and(|before| before.reason.as_deref() == Some(reason));
    if view.found == Some(Found::Created) {
        let message = format!("Created new replica set \"{name}\"");
        return (
            Some(condition(
                "Progressing",
                true,
                "NewReplicaSetCreated",
                message,
            )),
            Some(seconds(deadline)),
        );
    }
    // A finished rollout that lost pods is not progressing again: only another template or size is.
    if is_reason("NewReplicaSetAvailable")
        && known.observed_generation == view.deployment.metadata.generation
    {
        return (before.cloned(), None);
    }
    if before.is_none() || is_reason("DeploymentPaused") {
        let message = format!("Found existing new replica set \"{name}\"");
        return (
            Some(condition(
                "Progressing",
                true,
                "FoundNewReplicaSet",
                message,
            )),
            Some(seconds(deadline)),
        );
    }
    if has_progressed(known, counts) || is_reason("NewReplicaSetAvailable") {
        let mut condition = condition(
            "Progressing",
            true,
            "ReplicaSetUpdated",
            format!("ReplicaSet \"{name}\" is progressing."),
        );
        condition.last_update_time = Some(now.clone());
        return (Some(condition), Some(seconds(deadline)));
    }
    let since = before
        .and_then(|before| before.last_update_time.as_ref())
        .map_or(now.0.as_second(), |time| time.0.as_second());
    let left = since + i64::from(deadline) - now.0.as_second();
    if left <= 0 {
        let message = format!("ReplicaSet \"{name}\" has timed out progressing.");
        return (
            Some(condition(
                "Progressing",
                false,
                "ProgressDeadlineExceeded",
                message,
            )),
            None,
        );
    }
    (
        before.cloned(),
        Some(Duration::from_secs(left.unsigned_abs())),
    )
}

fn seconds(number: i32) -> Duration {
    Duration::from_secs(u64::try_from(number).unwrap_or(0))
}

fn unknown(mut condition: DeploymentCondition) -> DeploymentCondition {
    condition.status = Some("Unknown".into());
    condition
}

/// Whether the rollout came nearer to its end since the last status.
fn has_progressed(known: &DeploymentStatus, counts: &DeploymentStatus) -> bool {
    let old = |status: &DeploymentStatus| {
        status.replicas.unwrap_or(0) - status.updated_replicas.unwrap_or(0)
    };
    counts.updated_replicas.unwrap_or(0) > known.updated_replicas.unwrap_or(0)
        || old(counts) < old(known)
        || counts.ready_replicas.unwrap_or(0) > known.ready_replicas.unwrap_or(0)
        || counts.available_replicas.unwrap_or(0) > known.available_replicas.unwrap_or(0)
}

/// The new set's failure to create pods, shown on the Deployment too.
fn failure(view: &View<'_>) -> Option<DeploymentCondition> {
    let status = view.new?.status.as_ref()?;
    let failed = status
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| condition.type_.as_deref() == Some("ReplicaFailure"))?;
    let (reason, message) = (
        failed.reason.clone().unwrap_or_default(),
        failed.message.clone().unwrap_or_default(),
    );
    Some(condition(
        "ReplicaFailure",
        failed.status.as_deref() == Some("True"),
        &reason,
        message,
    ))
}

fn find<'a>(status: &'a DeploymentStatus, type_: &str) -> Option<&'a DeploymentCondition> {
    status
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| condition.type_.as_deref() == Some(type_))
}

/// Sets the times: the transition when the status changes, the update when anything else does.
fn stamp(condition: &mut DeploymentCondition, known: &DeploymentStatus, now: &Time) {
    let before = find(known, condition.type_.as_deref().unwrap_or_default());
    let same_status = before.filter(|before| before.status == condition.status);
    condition.last_transition_time = same_status
        .and_then(|before| before.last_transition_time.clone())
        .or_else(|| Some(now.clone()));
    let same = same_status
        .filter(|before| before.reason == condition.reason && before.message == condition.message);
    condition.last_update_time = condition
        .last_update_time
        .take()
        .or_else(|| same.and_then(|before| before.last_update_time.clone()))
        .or_else(|| Some(now.clone()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn time(second: i64) -> Time {
        Time(jiff::Timestamp::from_second(1_800_000_000 + second).unwrap())
    }

    fn set(name: &str, wanted: i32, available: i32) -> ReplicaSet {
        serde_json::from_value(json!({
            "metadata": { "name": name },
            "spec": { "replicas": wanted, "selector": {} },
            "status": { "replicas": wanted, "readyReplicas": available, "availableReplicas": available },
        }))
        .unwrap()
    }

    fn deployment(status: Option<DeploymentStatus>) -> Deployment {
        let mut deployment: Deployment = serde_json::from_value(json!({
            "metadata": { "name": "web", "generation": 2 },
            "spec": { "replicas": 1, "progressDeadlineSeconds": 60, "selector": {}, "template": {} },
        }))
        .unwrap();
        deployment.status = status;
        deployment
    }

    fn reasons(status: &DeploymentStatus) -> Vec<(&str, &str)> {
        let conditions = status.conditions.iter().flatten();
        conditions
            .map(|c| (c.reason.as_deref().unwrap(), c.status.as_deref().unwrap()))
            .collect()
    }

    fn step(
        before: Option<DeploymentStatus>,
        new: &ReplicaSet,
        found: Found,
        at: i64,
    ) -> (DeploymentStatus, Option<Duration>) {
        let deployment = deployment(before);
        let available = new
            .status
            .as_ref()
            .and_then(|status| status.available_replicas)
            == Some(1);
        let view = View {
            deployment: &deployment,
            new: Some(new),
            old: &[],
            found: Some(found),
            limits: Limits {
                is_recreate: false,
                surge: 1,
                unavailable: 0,
            },
            complete: available,
        };
        status(&view, time(at))
    }

    #[test]
    fn a_rollout_goes_from_created_to_available() {
        let (created, again) = step(None, &set("web-1", 1, 0), Found::Created, 0);
        assert_eq!(
            reasons(&created),
            [
                ("MinimumReplicasUnavailable", "False"),
                ("NewReplicaSetCreated", "True")
            ]
        );
        assert_eq!(again, Some(Duration::from_secs(60)));

        let (available, again) = step(Some(created), &set("web-1", 1, 1), Found::Existing, 5);
        assert_eq!(
            reasons(&available),
            [
                ("MinimumReplicasAvailable", "True"),
                ("NewReplicaSetAvailable", "True")
            ]
        );
        assert_eq!(again, None);
        assert_eq!(
            (available.available_replicas, available.unavailable_replicas),
            (Some(1), None)
        );
        let progressing = &available.conditions.as_ref().unwrap()[1];
        assert_eq!(progressing.last_transition_time, Some(time(0)));
        assert_eq!(progressing.last_update_time, Some(time(5)));

        let (repeated, _) = step(
            Some(available.clone()),
            &set("web-1", 1, 1),
            Found::Existing,
            50,
        );
        assert_eq!(
            repeated, available,
            "nothing changed, so nothing is written"
        );
    }

    #[test]
    fn a_rollout_that_stands_still_times_out() {
        let (created, _) = step(None, &set("web-1", 1, 0), Found::Created, 0);
        let (waiting, again) = step(Some(created), &set("web-1", 1, 0), Found::Existing, 20);
        assert_eq!(again, Some(Duration::from_secs(40)));
        let (late, again) = step(Some(waiting), &set("web-1", 1, 0), Found::Existing, 60);
        assert_eq!(reasons(&late)[1], ("ProgressDeadlineExceeded", "False"));
        assert_eq!(again, None);
        let (still_late, _) = step(Some(late.clone()), &set("web-1", 1, 0), Found::Existing, 90);
        assert_eq!(still_late, late);
    }
}
