//! What a StatefulSet does next, by its pods alone (Kubernetes' rules: `stateful_set_control.go`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::StatefulSetSpec;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::super::control::{BURST, resolve};
use super::super::history::REVISION_LABEL;
use super::super::pod;
use super::{INDEX_LABEL, NAME_LABEL};

/// A set and its pods at one moment.
pub(super) struct View<'a> {
    pub(super) name: &'a str,
    pub(super) spec: &'a StatefulSetSpec,
    pub(super) pods: &'a [Arc<Pod>],
    /// Name of the revision of the present template.
    pub(super) update: &'a str,
    pub(super) now: jiff::Timestamp,
}

/// One change.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    /// Make the pod of this number.
    Create(i32),
    Delete(Arc<Pod>),
    /// Give the pod the labels of its number.
    Name(Arc<Pod>, i32),
}

/// What to do now, and when to look again should nothing change.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    pub(super) again: Option<Duration>,
}

/// The number in the name of a pod of the set `name`.
pub(super) fn ordinal(name: &str, pod: &Pod) -> Option<i32> {
    let number = pod
        .metadata
        .name
        .as_deref()?
        .strip_prefix(name)?
        .strip_prefix('-')?;
    let parsed: i32 = number.parse().ok()?;
    (parsed >= 0 && parsed.to_string() == number).then_some(parsed)
}

/// Whether the pod runs and is ready.
pub(super) fn is_serving(pod: &Pod) -> bool {
    pod::phase(pod) == "Running" && pod::is_ready(pod)
}

/// Whether a changed template is rolled out by the controller.
pub(super) fn rolls(spec: &StatefulSetSpec) -> bool {
    let strategy = spec.update_strategy.as_ref();
    strategy.and_then(|strategy| strategy.type_.as_deref()) != Some("OnDelete")
}

/// Whether the pod of that number stays with the template before the present one.
pub(super) fn keeps_template(spec: &StatefulSetSpec, ordinal: i32) -> bool {
    rolls(spec) && ordinal < first(spec).saturating_add(partition(spec))
}

fn partition(spec: &StatefulSetSpec) -> i32 {
    let rolling = spec
        .update_strategy
        .as_ref()
        .and_then(|s| s.rolling_update.as_ref());
    rolling.and_then(|rolling| rolling.partition).unwrap_or(0)
}

fn first(spec: &StatefulSetSpec) -> i32 {
    spec.ordinals
        .as_ref()
        .and_then(|ordinals| ordinals.start)
        .unwrap_or(0)
}

fn is_ending(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Decides.
pub(super) fn plan(view: &View<'_>) -> Plan {
    let spec = view.spec;
    let range = first(spec)..first(spec).saturating_add(spec.replicas.unwrap_or(1));
    let mut members = BTreeMap::new();
    let mut surplus = BTreeMap::new();
    for pod in view.pods {
        match ordinal(view.name, pod) {
            Some(number) if range.contains(&number) => members.insert(number, pod),
            Some(number) => surplus.insert(number, pod),
            None => continue,
        };
    }
    let mut plan = Plan::default();
    let whole = fill(view, range, &members, &mut plan)
        && shrink(view, &surplus, &mut plan)
        && plan.steps.is_empty();
    if whole && rolls(spec) {
        update(view, &members, &mut plan);
    }
    plan
}

fn in_order(view: &View<'_>) -> bool {
    view.spec.pod_management_policy.as_deref() != Some("Parallel")
}

/// Zero when the pod is available, the time until then while it only has to stay ready, none while it is not ready.
fn available_in(view: &View<'_>, pod: &Pod) -> Option<Duration> {
    if is_ending(pod) || !is_serving(pod) {
        return None;
    }
    pod::available_in(pod, view.spec.min_ready_seconds.unwrap_or(0), view.now)
}

/// Makes what is missing, as much of it as one round may; false when the next number has to wait for one before it.
fn fill(
    view: &View<'_>,
    range: std::ops::Range<i32>,
    members: &BTreeMap<i32, &Arc<Pod>>,
    plan: &mut Plan,
) -> bool {
    let mut created = 0;
    for number in range {
        let Some(pod) = members.get(&number) else {
            plan.steps.push(Step::Create(number));
            if in_order(view) {
                return false;
            }
            created += 1;
            if created == BURST {
                // The new pods bring the next round.
                break;
            }
            continue;
        };
        if pod::is_finished(pod) {
            // It comes back under its name once it is gone.
            if !is_ending(pod) {
                plan.steps.push(Step::Delete(Arc::clone(pod)));
            }
            if in_order(view) {
                return false;
            }
            continue;
        }
        let label = |key: &str| pod.labels().get(key).map(String::as_str);
        if label(NAME_LABEL) != pod.metadata.name.as_deref()
            || label(INDEX_LABEL) != Some(number.to_string().as_str())
        {
            plan.steps.push(Step::Name(Arc::clone(pod), number));
        }
        match available_in(view, pod) {
            Some(Duration::ZERO) => {}
            wait => {
                plan.again = [plan.again, wait].into_iter().flatten().min();
                if in_order(view) {
                    return false;
                }
            }
        }
    }
    true
}

/// Ends what is too much, the highest number first; false when the next has to wait for one above it.
fn shrink(view: &View<'_>, surplus: &BTreeMap<i32, &Arc<Pod>>, plan: &mut Plan) -> bool {
    let healthy = |pod: &Pod| available_in(view, pod) == Some(Duration::ZERO);
    let first_unhealthy = surplus.values().find(|pod| !healthy(pod));
    for pod in surplus.values().rev() {
        if is_ending(pod) {
            if in_order(view) {
                return false;
            }
            continue;
        }
        if in_order(view)
            && !healthy(pod)
            && first_unhealthy.is_some_and(|first| first.name_any() != pod.name_any())
        {
            return false;
        }
        plan.steps.push(Step::Delete(Arc::clone(pod)));
        if in_order(view) {
            return false;
        }
    }
    true
}

/// Replaces pods of older templates, the highest number first, so many at a time as may be missing.
fn update(view: &View<'_>, members: &BTreeMap<i32, &Arc<Pod>>, plan: &mut Plan) {
    let spec = view.spec;
    let rolling = spec
        .update_strategy
        .as_ref()
        .and_then(|strategy| strategy.rolling_update.as_ref());
    let allowed = rolling
        .and_then(|rolling| rolling.max_unavailable.as_ref())
        .map(|allowed| resolve(allowed, spec.replicas.unwrap_or(1), true));
    let mut left = allowed.unwrap_or(1).max(1);
    for (number, pod) in members.iter().rev() {
        if left == 0 || keeps_template(spec, *number) {
            return;
        }
        let updated = pod
            .labels()
            .get(REVISION_LABEL)
            .is_some_and(|found| found == view.update);
        if !updated && !is_ending(pod) {
            plan.steps.push(Step::Delete(Arc::clone(pod)));
            left -= 1;
        } else if available_in(view, pod) != Some(Duration::ZERO) {
            left -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(extra: Value) -> StatefulSetSpec {
        let mut spec = json!({ "replicas": 3, "selector": {}, "template": {} });
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        serde_json::from_value(spec).unwrap()
    }

    /// `web-0 new ready`: name, revision, state.
    fn pods(texts: &[&str]) -> Vec<Arc<Pod>> {
        let pod = |text: &&str| {
            let words: Vec<_> = text.split(' ').collect();
            let number = words[0].rsplit('-').next().unwrap();
            let ready = if words[2] == "unready" {
                "False"
            } else {
                "True"
            };
            let phase = if words[2] == "failed" {
                "Failed"
            } else {
                "Running"
            };
            let ends = (words[2] == "ending").then_some("2026-01-01T00:00:00Z");
            Arc::new(
                serde_json::from_value(json!({
                    "metadata": { "name": words[0], "deletionTimestamp": ends, "labels": {
                        NAME_LABEL: words[0], INDEX_LABEL: number, REVISION_LABEL: words[1] } },
                    "status": { "phase": phase, "conditions": [
                        { "type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:00Z" }] },
                }))
                .unwrap(),
            )
        };
        texts.iter().map(pod).collect()
    }

    fn steps(spec: &StatefulSetSpec, texts: &[&str]) -> Vec<String> {
        let pods = pods(texts);
        let view = View {
            name: "web",
            spec,
            pods: &pods,
            update: "new",
            now: "2026-01-01T00:00:05Z".parse().unwrap(),
        };
        let text = |step: &Step| match step {
            Step::Create(number) => format!("+{number}"),
            Step::Delete(pod) => format!("-{}", ordinal("web", pod).unwrap()),
            Step::Name(_, number) => format!("={number}"),
        };
        plan(&view).steps.iter().map(text).collect()
    }

    #[test]
    fn pods_come_and_go_one_after_the_other() {
        let ordered = spec(json!({}));
        for (pods, expected) in [
            (&[][..], &["+0"][..]),
            (&["web-0 new unready"], &[]),
            (&["web-0 new ready"], &["+1"]),
            (&["web-0 new ready", "web-2 new ready"], &["+1"]),
            (&["web-0 new ending", "web-1 new ready"], &[]),
            (&["web-0 new failed", "web-1 new ready"], &["-0"]),
            (
                &[
                    "web-0 new ready",
                    "web-1 new ready",
                    "web-2 new ready",
                    "web-3 new ready",
                    "web-4 new ready",
                ],
                &["-4"],
            ),
            (
                &[
                    "web-0 new ready",
                    "web-1 new unready",
                    "web-2 new ready",
                    "web-3 new ready",
                ],
                &[],
            ),
            (
                &[
                    "web-0 new ready",
                    "web-1 new ready",
                    "web-2 new ready",
                    "web-3 new ready",
                    "web-4 new ending",
                ],
                &[],
            ),
        ] {
            assert_eq!(steps(&ordered, pods), expected, "{pods:?}");
        }
    }

    #[test]
    fn a_round_makes_no_more_than_a_burst() {
        let huge = spec(json!({ "podManagementPolicy": "Parallel", "replicas": i32::MAX }));
        let steps = steps(&huge, &["web-1 new ready"]);
        assert_eq!(steps.len(), BURST);
        assert_eq!(steps[..2], ["+0", "+2"]);
    }

    #[test]
    fn parallel_sets_wait_for_nobody() {
        let parallel = spec(json!({ "podManagementPolicy": "Parallel" }));
        assert_eq!(steps(&parallel, &[]), ["+0", "+1", "+2"]);
        assert_eq!(
            steps(
                &parallel,
                &["web-0 new unready", "web-7 new ready", "web-9 new unready"]
            ),
            ["+1", "+2", "-9", "-7"]
        );
    }

    #[test]
    fn templates_roll_from_the_top_down_to_the_partition() {
        let all = ["web-0 old ready", "web-1 old ready", "web-2 old ready"];
        let rolling = |extra: Value| {
            spec(json!({ "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": extra } }))
        };
        assert_eq!(steps(&rolling(json!({})), &all), ["-2"]);
        assert_eq!(steps(&rolling(json!({ "partition": 3 })), &all), [""; 0]);
        assert_eq!(
            steps(
                &rolling(json!({ "partition": 1 })),
                &["web-0 old ready", "web-1 old ready", "web-2 new ready"]
            ),
            ["-1"]
        );
        assert_eq!(
            steps(&rolling(json!({ "maxUnavailable": 2 })), &all),
            ["-2", "-1"]
        );
        assert_eq!(
            steps(
                &rolling(json!({})),
                &["web-0 old ready", "web-1 old ready", "web-2 new unready"]
            ),
            [""; 0],
            "the one before must serve first"
        );
        let by_hand = spec(json!({ "updateStrategy": { "type": "OnDelete" } }));
        assert_eq!(steps(&by_hand, &all), [""; 0]);
        assert!(!keeps_template(&by_hand, 0));
        assert!(keeps_template(&rolling(json!({ "partition": 1 })), 0));
    }

    #[test]
    fn numbers_may_start_elsewhere_and_availability_takes_its_time() {
        let from_five = spec(json!({ "ordinals": { "start": 5 }, "replicas": 1 }));
        assert_eq!(steps(&from_five, &["web-0 new ready"]), ["+5"]);
        let slow = spec(json!({ "minReadySeconds": 10 }));
        let view = View {
            name: "web",
            spec: &slow,
            pods: &pods(&["web-0 new ready"]),
            update: "new",
            now: "2026-01-01T00:00:04Z".parse().unwrap(),
        };
        let plan = plan(&view);
        assert_eq!(
            (plan.steps.len(), plan.again),
            (0, Some(Duration::from_secs(6)))
        );
        assert_eq!(ordinal("web", &pods(&["web-01 new ready"])[0]), None);
    }
}
