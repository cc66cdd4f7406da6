//! What the loops ask a pod.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use kube::core::{Selector, SelectorExt as _};
use kube::{Resource, ResourceExt as _};

/// The condition `type_` of the pod's status.
pub(super) fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| condition.type_ == type_)
}

/// Whether the pod takes requests.
pub(super) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|ready| ready.status == "True")
}

/// When the pod became (or ceased to be) ready.
pub(super) fn ready_since(pod: &Pod) -> Option<jiff::Timestamp> {
    condition(pod, "Ready")?
        .last_transition_time
        .as_ref()
        .map(|time| time.0)
}

/// Time until the ready pod counts as available; `None` where it is not ready, zero where it is available already.
pub(super) fn available_in(
    pod: &Pod,
    min_ready_seconds: i32,
    now: jiff::Timestamp,
) -> Option<Duration> {
    if !is_ready(pod) {
        return None;
    }
    if min_ready_seconds <= 0 {
        return Some(Duration::ZERO);
    }
    let since = ready_since(pod)?;
    let available = since.as_second() + i64::from(min_ready_seconds);
    Some(Duration::from_secs(
        u64::try_from(available - now.as_second()).unwrap_or(0),
    ))
}

/// The pod's phase, "Pending" where none is set.
pub(super) fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or("Pending")
}

/// Whether all containers have ended for good.
pub(super) fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Whether the pod runs or is going to, and nobody has asked to end it.
pub(super) fn is_active(pod: &Pod) -> bool {
    !is_finished(pod) && pod.metadata.deletion_timestamp.is_none()
}

/// The owner that manages the object.
pub(super) fn controller(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references
        .as_ref()?
        .iter()
        .find(|owner| owner.controller == Some(true))
}

/// A reference that makes `owner` the manager of another object.
pub(super) fn controlled_by<K: Resource<DynamicType = ()>>(owner: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: owner.name_any(),
        uid: owner.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Whether `selector` selects an object with these labels. A selector that is none (the API refuses those) selects nothing.
pub(super) fn selects(selector: &LabelSelector, meta: &ObjectMeta) -> bool {
    let Ok(selector) = Selector::try_from(selector.clone()) else {
        return false;
    };
    let empty = std::collections::BTreeMap::new();
    selector.matches(meta.labels.as_ref().unwrap_or(&empty))
}

/// What a loop may do with an object that could be its own (Kubernetes' rules of adoption).
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is managed by the owner and selected.
    Owned,
    /// Nobody manages it and it is selected: take it.
    Adopt,
    /// It is managed by the owner but no longer selected: let it go.
    Release,
    /// Not ours.
    Foreign,
}

/// Decides about `object` for the owner with `owner_uid`; `owner_ends` while that is being deleted.
pub(super) fn claim(
    owner_uid: &str,
    owner_ends: bool,
    selector: &LabelSelector,
    object: &ObjectMeta,
) -> Claim {
    match controller(object) {
        Some(owner) if owner.uid != owner_uid => Claim::Foreign,
        Some(_) if selects(selector, object) => Claim::Owned,
        Some(_) if owner_ends => Claim::Foreign,
        Some(_) => Claim::Release,
        None if owner_ends || object.deletion_timestamp.is_some() || !selects(selector, object) => {
            Claim::Foreign
        }
        None => Claim::Adopt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn meta(value: serde_json::Value) -> ObjectMeta {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn objects_are_claimed_by_controller_and_labels() {
        let selector: LabelSelector =
            serde_json::from_value(json!({ "matchLabels": { "app": "x" } })).unwrap();
        let owner = |uid: &str| json!([{ "apiVersion": "v1", "kind": "K", "name": "n", "uid": uid, "controller": true }]);
        let cases = [
            (
                json!({ "labels": { "app": "x" }, "ownerReferences": owner("1") }),
                false,
                Claim::Owned,
            ),
            (
                json!({ "labels": { "app": "y" }, "ownerReferences": owner("1") }),
                false,
                Claim::Release,
            ),
            (
                json!({ "labels": { "app": "y" }, "ownerReferences": owner("1") }),
                true,
                Claim::Foreign,
            ),
            (
                json!({ "labels": { "app": "x" }, "ownerReferences": owner("2") }),
                false,
                Claim::Foreign,
            ),
            (json!({ "labels": { "app": "x" } }), false, Claim::Adopt),
            (json!({ "labels": { "app": "x" } }), true, Claim::Foreign),
            (
                json!({ "labels": { "app": "x" }, "deletionTimestamp": "2026-01-01T00:00:00Z" }),
                false,
                Claim::Foreign,
            ),
            (json!({}), false, Claim::Foreign),
        ];
        for (object, ends, expected) in cases {
            assert_eq!(
                claim("1", ends, &selector, &meta(object.clone())),
                expected,
                "{object} {ends}"
            );
        }
    }

    #[test]
    fn availability_waits_for_min_ready_seconds() {
        let pod: Pod = serde_json::from_value(json!({ "status": { "conditions": [
            { "type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:10Z" }
        ] } }))
        .unwrap();
        let at = |text: &str| text.parse::<jiff::Timestamp>().unwrap();
        assert_eq!(
            available_in(&pod, 0, at("2026-01-01T00:00:10Z")),
            Some(Duration::ZERO)
        );
        assert_eq!(
            available_in(&pod, 5, at("2026-01-01T00:00:12Z")),
            Some(Duration::from_secs(3))
        );
        assert_eq!(
            available_in(&pod, 5, at("2026-01-01T00:01:00Z")),
            Some(Duration::ZERO)
        );
        assert_eq!(
            available_in(&Pod::default(), 0, at("2026-01-01T00:00:00Z")),
            None
        );
    }
}
