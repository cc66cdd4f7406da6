//! HorizontalPodAutoscaler: keeps the size of a workload within its bounds.
//!
//! The local cluster measures no load, so that only `minReplicas` and `maxReplicas` act; the status says so, as that of a
//! Kubernetes cluster without a metrics server does.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::autoscaling::v2::{
    HorizontalPodAutoscaler, HorizontalPodAutoscalerCondition, HorizontalPodAutoscalerSpec,
    HorizontalPodAutoscalerStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Api, Resource, ResourceExt as _};
use serde_json::json;

use super::control::{self, api_message};
use super::events::{Level, now};
use super::queue::{Key, Queue};
use super::{Context, Outcome};

const COMPONENT: &str = "horizontal-pod-autoscaler";
/// Time between two looks at targets of kinds that nobody watches here (as in Kubernetes).
const PERIOD: Duration = Duration::from_secs(15);

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("horizontalpodautoscaler");
    let own = queue.clone();
    context.autoscalers.subscribe(move |_, new| {
        if let Some(autoscaler) = new {
            own.add(Key::of(&**autoscaler));
        }
    });
    context
        .deployments
        .subscribe(follow(context, &queue, "Deployment"));
    context
        .replica_sets
        .subscribe(follow(context, &queue, "ReplicaSet"));
    context
        .stateful_sets
        .subscribe(follow(context, &queue, "StatefulSet"));
    queue
}

/// Asks for the autoscalers of a changed workload of that kind.
fn follow<K: Resource>(
    context: &Context,
    queue: &Arc<Queue>,
    kind: &'static str,
) -> impl Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync + 'static {
    let (own, autoscalers) = (queue.clone(), context.autoscalers.clone());
    move |_, new| {
        let Some(target) = new else { return };
        for autoscaler in autoscalers.in_namespace(&target.namespace().unwrap_or_default()) {
            let reference = &autoscaler.spec.scale_target_ref;
            if reference.kind == kind && reference.name == target.name_any() {
                own.add(Key::of(&*autoscaler));
            }
        }
    }
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(autoscaler) = context.autoscalers.get(&key) else {
        return Ok(None);
    };
    let spec = &autoscaler.spec;
    if autoscaler.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let found = match target(&context, &key, spec).await {
        Ok(target) => scale(&context, &autoscaler, spec, &target).await,
        Err(error) => Err(("FailedGetScale", error)),
    };
    if let Err((reason, message)) = &found {
        let events = &context.events;
        events.publish(
            COMPONENT,
            &*autoscaler,
            Level::Warning,
            reason,
            message.clone(),
        );
    }
    let status = status(&autoscaler, found, &now());
    if autoscaler.status.as_ref() != Some(&status) {
        let fields = json!({
            "currentReplicas": status.current_replicas,
            "desiredReplicas": status.desired_replicas,
            "lastScaleTime": status.last_scale_time,
            "conditions": status.conditions,
        });
        control::write_status(&context, &context.autoscalers, &*autoscaler, fields).await?;
    }
    Ok(Some(PERIOD))
}

/// The workload's size before and after.
struct Sizes {
    current: i32,
    desired: i32,
}

/// What is scaled.
struct Target {
    api: Api<DynamicObject>,
    name: String,
}

async fn target(
    context: &Context,
    key: &Key,
    spec: &HorizontalPodAutoscalerSpec,
) -> Result<Target, String> {
    let reference = &spec.scale_target_ref;
    let api_version = reference.api_version.as_deref().unwrap_or("v1");
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let kind = GroupVersionKind::gvk(group, version, &reference.kind);
    let (resource, _) = kube::discovery::pinned_kind(&context.client, &kind)
        .await
        .map_err(|error| {
            format!(
                "no matches for kind {:?} in version {api_version:?}: {}",
                reference.kind,
                api_message(&error)
            )
        })?;
    Ok(Target {
        api: Api::namespaced_with(context.client.clone(), &key.namespace, &resource),
        name: reference.name.clone(),
    })
}

/// Brings the workload between the bounds. One of size 0 is switched off and stays so.
async fn scale(
    context: &Context,
    autoscaler: &HorizontalPodAutoscaler,
    spec: &HorizontalPodAutoscalerSpec,
    target: &Target,
) -> Result<Sizes, (&'static str, String)> {
    let known = target.api.get_scale(&target.name).await;
    let known = known.map_err(|error| ("FailedGetScale", api_message(&error)))?;
    let current = known.spec.and_then(|spec| spec.replicas).unwrap_or(0);
    let desired = bounded(spec, current);
    if desired == current {
        return Ok(Sizes { current, desired });
    }
    let patch = Patch::Merge(json!({ "spec": { "replicas": desired } }));
    let written = target
        .api
        .patch_scale(&target.name, &PatchParams::default(), &patch)
        .await;
    written.map_err(|error| ("FailedRescale", api_message(&error)))?;
    let bound = if desired > current {
        "below Spec.MinReplicas"
    } else {
        "above Spec.MaxReplicas"
    };
    let message = format!("New size: {desired}; reason: Current number of replicas {bound}");
    let events = &context.events;
    events.publish(
        COMPONENT,
        autoscaler,
        Level::Normal,
        "SuccessfulRescale",
        message,
    );
    Ok(Sizes { current, desired })
}

fn bounded(spec: &HorizontalPodAutoscalerSpec, current: i32) -> i32 {
    if current == 0 {
        return 0;
    }
    let lowest = spec.min_replicas.unwrap_or(1).max(1);
    current.clamp(lowest, spec.max_replicas.max(lowest))
}

fn status(
    autoscaler: &HorizontalPodAutoscaler,
    found: Result<Sizes, (&'static str, String)>,
    now: &Time,
) -> HorizontalPodAutoscalerStatus {
    let mut status = autoscaler.status.clone().unwrap_or_default();
    let mut set = |kind: &str, holds: bool, reason: &str, message: &str| {
        let conditions = status.conditions.get_or_insert_default();
        let text = if holds { "True" } else { "False" };
        let before = conditions.iter().find(|c| c.type_ == kind);
        let since = before
            .filter(|before| before.status == text)
            .and_then(|before| before.last_transition_time.clone());
        let condition = HorizontalPodAutoscalerCondition {
            type_: kind.to_owned(),
            status: text.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_transition_time: since.or_else(|| Some(now.clone())),
            observed_generation: None,
        };
        match conditions.iter_mut().find(|c| c.type_ == kind) {
            Some(known) => *known = condition,
            None => conditions.push(condition),
        }
    };
    match found {
        Err((reason, message)) => {
            let message = format!("the HPA controller was unable to scale the target: {message}");
            set("AbleToScale", false, reason, &message);
        }
        Ok(sizes) => {
            set(
                "AbleToScale",
                true,
                "SucceededGetScale",
                "the HPA controller was able to get the target's current scale",
            );
            if sizes.current == 0 {
                set(
                    "ScalingActive",
                    false,
                    "ScalingDisabled",
                    "scaling is disabled since the replica count of the target is zero",
                );
            } else {
                set(
                    "ScalingActive",
                    false,
                    "FailedGetResourceMetric",
                    "this cluster has no metrics API: only minReplicas and maxReplicas act",
                );
            }
            if sizes.current != sizes.desired {
                status.last_scale_time = Some(now.clone());
            }
            status.current_replicas = Some(sizes.current);
            status.desired_replicas = sizes.desired;
        }
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_stay_within_bounds_and_zero_stays_zero() {
        let spec: HorizontalPodAutoscalerSpec = serde_json::from_value(json!({
            "minReplicas": 2, "maxReplicas": 4, "scaleTargetRef": { "kind": "Deployment", "name": "web" },
        }))
        .unwrap();
        for (current, expected) in [(0, 0), (1, 2), (3, 3), (9, 4)] {
            assert_eq!(bounded(&spec, current), expected);
        }
    }

    #[test]
    fn the_status_says_that_nothing_is_measured() {
        let now = now();
        let sizes = Sizes {
            current: 1,
            desired: 2,
        };
        let first = status(&HorizontalPodAutoscaler::default(), Ok(sizes), &now);
        let reasons = |status: &HorizontalPodAutoscalerStatus| -> Vec<String> {
            let conditions = status.conditions.iter().flatten();
            conditions.map(|c| c.reason.clone().unwrap()).collect()
        };
        assert_eq!(
            reasons(&first),
            ["SucceededGetScale", "FailedGetResourceMetric"]
        );
        assert_eq!(
            (first.desired_replicas, first.last_scale_time.is_some()),
            (2, true)
        );
        let known = HorizontalPodAutoscaler {
            status: Some(first),
            ..HorizontalPodAutoscaler::default()
        };
        let failed = status(&known, Err(("FailedGetScale", "not found".into())), &now);
        assert_eq!(reasons(&failed)[0], "FailedGetScale");
        assert_eq!(failed.desired_replicas, 2, "the last known size stays");
    }
}
