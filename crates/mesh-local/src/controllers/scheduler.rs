//! Scheduler: gives every pod that waits for a node one that suits it.
//!
//! What decides: the node's readiness to take pods (`unschedulable`, taints), the pod's node selector and required node
//! affinity. Resource requests are not added up: all pods are processes that share one machine.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    Binding, Node, NodeSelectorRequirement, NodeSelectorTerm, ObjectReference, Pod, PodCondition,
    PodSpec, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::events::{Level, now};
use super::pod;
use super::queue::{Key, Queue};
use super::{Context, Doing as _, Error, Outcome};

const COMPONENT: &str = "default-scheduler";
/// The taint of a cordoned node.
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("scheduler");
    let own = queue.clone();
    context.pods.subscribe(move |_, new| {
        if let Some(pod) = new.filter(|pod| waits(pod)) {
            own.add(Key::of(&**pod));
        }
    });
    let (own, pods) = (queue.clone(), context.pods.clone());
    context.nodes.subscribe(move |_, _| {
        for pod in pods.all().iter().filter(|pod| waits(pod)) {
            own.add(Key::of(&**pod));
        }
    });
    queue
}

/// Whether the pod is this scheduler's to bind.
fn waits(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    spec.node_name.is_none()
        && spec.scheduler_name.as_deref().unwrap_or(COMPONENT) == COMPONENT
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
        && pod::is_active(pod)
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(pod) = context.pods.get(&key).filter(|pod| waits(pod)) else {
        return Ok(None);
    };
    let nodes = context.nodes.all();
    match choose(&pod, &nodes) {
        Ok(node) => bind(&context, &pod, &node).await?,
        Err(message) => refuse(&context, &pod, message).await?,
    }
    Ok(None)
}

/// A node that suits, or why none does, in Kubernetes' words.
fn choose(pod: &Pod, nodes: &[Arc<Node>]) -> Result<String, String> {
    if nodes.is_empty() {
        return Err("no nodes available to schedule pods".into());
    }
    let mut reasons: std::collections::BTreeMap<String, usize> = std::collections::BTreeMap::new();
    for node in nodes {
        match unsuitable(pod, node) {
            None => return Ok(node.name_any()),
            Some(reason) => *reasons.entry(reason).or_default() += 1,
        }
    }
    let reasons: Vec<_> = reasons
        .iter()
        .map(|(reason, count)| format!("{count} node(s) {reason}"))
        .collect();
    Err(format!(
        "0/{} nodes are available: {}.",
        nodes.len(),
        reasons.join(", ")
    ))
}

fn unsuitable(pod: &Pod, node: &Node) -> Option<String> {
    let pod_spec = pod.spec.as_ref()?;
    if let Some(taint) = untolerated(pod_spec, node, &["NoSchedule", "NoExecute"]) {
        if taint.key == UNSCHEDULABLE {
            return Some("were unschedulable".into());
        }
        let value = taint.value.as_deref().unwrap_or_default();
        return Some(format!("had untolerated taint {{{}: {value}}}", taint.key));
    }
    (!is_selected(pod_spec, node)).then(|| "didn't match Pod's node affinity/selector".into())
}

/// A taint of the node with one of these effects that a pod of `spec` does not tolerate. A cordoned node counts as tainted.
pub(super) fn untolerated(spec: &PodSpec, node: &Node, effects: &[&str]) -> Option<Taint> {
    let node_spec = node.spec.clone().unwrap_or_default();
    let cordon = (node_spec.unschedulable == Some(true)).then(|| Taint {
        key: UNSCHEDULABLE.into(),
        effect: "NoSchedule".into(),
        ..Taint::default()
    });
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    let taints = cordon
        .into_iter()
        .chain(node_spec.taints.into_iter().flatten());
    taints.into_iter().find(|taint| {
        effects.contains(&taint.effect.as_str())
            && !tolerations
                .iter()
                .any(|toleration| tolerates(toleration, taint))
    })
}

/// Whether the node has what the pod's node selector and required node affinity ask for.
pub(super) fn is_selected(pod_spec: &PodSpec, node: &Node) -> bool {
    let selector_fits = pod_spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| node.labels().get(key) == Some(value));
    let affinity_fits = pod_spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| {
            affinity
                .required_during_scheduling_ignored_during_execution
                .as_ref()
        })
        .is_none_or(|required| {
            required
                .node_selector_terms
                .iter()
                .any(|term| term_fits(term, node))
        });
    selector_fits && affinity_fits
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration
        .effect
        .as_ref()
        .is_none_or(|effect| effect.is_empty() || *effect == taint.effect);
    let key = toleration
        .key
        .as_ref()
        .is_none_or(|key| key.is_empty() || *key == taint.key);
    let value = toleration.operator.as_deref() == Some("Exists")
        || toleration.value.as_deref().unwrap_or_default()
            == taint.value.as_deref().unwrap_or_default();
    effect && key && value
}

fn term_fits(term: &NodeSelectorTerm, node: &Node) -> bool {
    let name = node.name_any();
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    // A term without requirements selects nothing.
    !(expressions.is_empty() && fields.is_empty())
        && expressions
            .iter()
            .all(|wanted| requirement_fits(wanted, node.labels().get(&wanted.key)))
        && fields
            .iter()
            .all(|wanted| wanted.key == "metadata.name" && requirement_fits(wanted, Some(&name)))
}

fn requirement_fits(wanted: &NodeSelectorRequirement, actual: Option<&String>) -> bool {
    let values = wanted.values.as_deref().unwrap_or_default();
    let number = |text: &String| text.parse::<i64>().ok();
    let compare = |holds: fn(&i64, &i64) -> bool| match (
        actual.and_then(number),
        values.first().and_then(number),
    ) {
        (Some(actual), Some(wanted)) => holds(&actual, &wanted),
        _ => false,
    };
    match wanted.operator.as_str() {
        "In" => actual.is_some_and(|actual| values.contains(actual)),
        "NotIn" => actual.is_none_or(|actual| !values.contains(actual)),
        "Exists" => actual.is_some(),
        "DoesNotExist" => actual.is_none(),
        "Gt" => compare(i64::gt),
        "Lt" => compare(i64::lt),
        _ => false,
    }
}

async fn bind(context: &Context, pod: &Pod, node: &str) -> Result<(), Error> {
    let api: Api<Pod> =
        Api::namespaced(context.client.clone(), &pod.namespace().unwrap_or_default());
    let binding = Binding {
        metadata: ObjectMeta {
            name: Some(pod.name_any()),
            namespace: pod.namespace(),
            uid: pod.uid(),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(node.into()),
            ..ObjectReference::default()
        },
    };
    let result: Result<serde_json::Value, _> = api
        .create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding)
        .await;
    match result {
        Ok(_) => {
            let message = format!("Successfully assigned {} to {node}", Key::of(pod));
            context
                .events
                .publish(COMPONENT, pod, Level::Normal, "Scheduled", message);
            Ok(())
        }
        // Gone, or bound meanwhile.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error).doing(|| format!("binding pod {} to node {node}", Key::of(pod))),
    }
}

async fn refuse(context: &Context, pod: &Pod, message: String) -> Result<(), Error> {
    let known = pod::condition(pod, "PodScheduled");
    if known
        .is_some_and(|known| known.status == "False" && known.message.as_ref() == Some(&message))
    {
        return Ok(());
    }
    let mut conditions: Vec<PodCondition> = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.clone())
        .unwrap_or_default();
    conditions.retain(|condition| condition.type_ != "PodScheduled");
    conditions.push(PodCondition {
        type_: "PodScheduled".into(),
        status: "False".into(),
        reason: Some("Unschedulable".into()),
        message: Some(message.clone()),
        last_transition_time: Some(now()),
        ..PodCondition::default()
    });
    context
        .events
        .publish(COMPONENT, pod, Level::Warning, "FailedScheduling", message);
    let api: Api<Pod> =
        Api::namespaced(context.client.clone(), &pod.namespace().unwrap_or_default());
    let patch = json!({ "status": { "phase": "Pending", "conditions": conditions } });
    match api
        .patch_status(
            &pod.name_any(),
            &PatchParams::default(),
            &Patch::Merge(patch),
        )
        .await
    {
        Ok(pod) => context.pods.observe(pod),
        Err(error) if super::is_not_found(&error) => {}
        Err(error) => {
            return Err(error).doing(|| format!("writing the status of pod {}", Key::of(pod)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn node(spec: Value) -> Arc<Node> {
        let node = json!({ "metadata": { "name": "n1", "labels": { "disk": "ssd", "cores": "8" } }, "spec": spec });
        Arc::new(serde_json::from_value(node).unwrap())
    }

    fn pod(mut spec: Value) -> Pod {
        spec["containers"] = json!([]);
        serde_json::from_value(json!({ "metadata": { "name": "p" }, "spec": spec })).unwrap()
    }

    fn affinity(operator: &str, key: &str, values: Value) -> Value {
        json!({ "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [
            { "matchExpressions": [{ "key": key, "operator": operator, "values": values }] }
        ] } } } })
    }

    #[test]
    fn nodes_are_chosen_by_selector_affinity_and_taints() {
        let mismatch = Err(
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
                .to_owned(),
        );
        let tainted =
            json!({ "taints": [{ "key": "only", "value": "gpu", "effect": "NoSchedule" }] });
        let here = Ok("n1".to_owned());
        let cases = [
            (json!({}), json!({}), here.clone()),
            (
                json!({ "nodeSelector": { "disk": "ssd" } }),
                json!({}),
                here.clone(),
            ),
            (
                json!({ "nodeSelector": { "disk": "hdd" } }),
                json!({}),
                mismatch.clone(),
            ),
            (
                affinity("In", "disk", json!(["ssd"])),
                json!({}),
                here.clone(),
            ),
            (
                affinity("NotIn", "disk", json!(["ssd"])),
                json!({}),
                mismatch.clone(),
            ),
            (
                affinity("Gt", "cores", json!(["4"])),
                json!({}),
                here.clone(),
            ),
            (affinity("Lt", "cores", json!(["4"])), json!({}), mismatch),
            (
                json!({}),
                json!({ "unschedulable": true }),
                Err("0/1 nodes are available: 1 node(s) were unschedulable.".into()),
            ),
            (
                json!({}),
                tainted.clone(),
                Err("0/1 nodes are available: 1 node(s) had untolerated taint {only: gpu}.".into()),
            ),
            (
                json!({ "tolerations": [{ "key": "only", "operator": "Exists" }] }),
                tainted.clone(),
                here.clone(),
            ),
            (
                json!({ "tolerations": [{ "operator": "Exists" }] }),
                tainted,
                here,
            ),
        ];
        for (pod_spec, node_spec, expected) in cases {
            assert_eq!(
                choose(&pod(pod_spec.clone()), &[node(node_spec.clone())]),
                expected,
                "{pod_spec} on {node_spec}"
            );
        }
        assert_eq!(
            choose(&pod(json!({})), &[]),
            Err("no nodes available to schedule pods".into())
        );
    }

    #[test]
    fn only_unbound_pods_of_this_scheduler_wait() {
        assert!(waits(&pod(json!({}))));
        assert!(!waits(&pod(json!({ "nodeName": "n1" }))));
        assert!(!waits(&pod(json!({ "schedulerName": "another" }))));
        assert!(!waits(&pod(
            json!({ "schedulingGates": [{ "name": "wait" }] })
        )));
    }
}
