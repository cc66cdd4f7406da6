//! DaemonSet: one pod on every node that suits.

mod plan;

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetSpec, DaemonSetStatus};
use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, PodTemplateSpec,
    Toleration,
};
use kube::ResourceExt as _;
use serde_json::json;

use super::control::{self, Owner, count};
use super::history::{self, History, REVISION_LABEL};
use super::pod;
use super::queue::{Key, Queue};
use super::scheduler::{is_selected, untolerated};
use super::{Context, Error, Outcome};
use plan::{Place, Wish};

const COMPONENT: &str = "daemonset-controller";
/// What the pods of every DaemonSet tolerate, with the effect, beside what their template says.
const TOLERATED: [(&str, &str); 6] = [
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
];

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("daemonset");
    let own = queue.clone();
    context.daemon_sets.subscribe(move |_, new| {
        if let Some(set) = new {
            own.add(Key::of(&**set));
        }
    });
    control::follow_pods(context, &queue, &context.daemon_sets, |set| {
        Some(&set.spec.selector)
    });
    let (own, sets) = (queue.clone(), context.daemon_sets.clone());
    context.nodes.subscribe(move |old, new| {
        // A node's sign of life changes nothing here.
        let matters = |node: &Arc<Node>| (node.labels().clone(), node.spec.clone());
        if old.map(matters) != new.map(matters) {
            for set in sets.all() {
                own.add(Key::of(&*set));
            }
        }
    });
    queue
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(set) = context.daemon_sets.get(&key) else {
        return Ok(None);
    };
    let spec = &set.spec;
    let owner = Owner {
        context: &context,
        object: &*set,
        component: COMPONENT,
        selector: &spec.selector,
    };
    let pods = owner.claimed(|_| true).await?;
    if owner.ends() {
        return Ok(None);
    }
    let history = History::sync(&owner, &spec.template).await?;
    let hash = history::hash(&history.update).to_owned();
    let places = places(&context, spec, pods, &hash);
    let steps = plan::steps(&places, &plan::Limits::of(spec, &places));
    let new: Vec<_> = steps
        .create
        .iter()
        .map(|node| daemon(&owner, &spec.template, node, &hash))
        .collect();
    let deleted = owner.delete_all(&steps.delete).await;
    let done = match deleted {
        Ok(()) => owner.create_all(&new).await,
        failed => failed,
    };
    let now_places = self::places(&context, spec, owner.owned(), &hash);
    let (status, again) = status(&set, &now_places);
    if set.status.as_ref() != Some(&status) {
        write_status(&context, &set, &status).await?;
    }
    done?;
    let pods = owner.owned();
    history
        .truncate(&owner, spec.revision_history_limit, |revision| {
            let hash = history::hash(revision);
            pods.iter().any(|pod| {
                pod.labels()
                    .get(REVISION_LABEL)
                    .is_some_and(|found| found == hash)
            })
        })
        .await?;
    Ok(again)
}

/// Every node with the set's pods on it; pods on nodes that are no more come last.
fn places(
    context: &Context,
    spec: &DaemonSetSpec,
    mut pods: Vec<Arc<Pod>>,
    hash: &str,
) -> Vec<Place> {
    let now = jiff::Timestamp::now();
    let seconds = spec.min_ready_seconds.unwrap_or(0);
    let mut pod_spec = spec.template.spec.clone().unwrap_or_default();
    tolerate(&mut pod_spec);
    let resident = |pod: Arc<Pod>| plan::Resident {
        is_new: pod
            .labels()
            .get(REVISION_LABEL)
            .is_some_and(|found| found == hash),
        available_in: pod::available_in(&pod, seconds, now)
            .filter(|_| pod.metadata.deletion_timestamp.is_none()),
        pod,
    };
    let mut places = Vec::new();
    for node in context.nodes.all() {
        let name = node.name_any();
        let (here, elsewhere) = pods
            .into_iter()
            .partition(|pod| target(pod).is_some_and(|target| target == name));
        pods = elsewhere;
        let here: Vec<Arc<Pod>> = here;
        let fits = is_selected(&pod_spec, &node);
        let wish = match (
            untolerated(&pod_spec, &node, &["NoExecute"]),
            untolerated(&pod_spec, &node, &["NoSchedule"]),
        ) {
            _ if !fits => Wish::Never,
            (Some(_), _) => Wish::Never,
            (None, Some(_)) => Wish::Stay,
            (None, None) => Wish::Run,
        };
        places.push(Place {
            node: name,
            wish,
            pods: here.into_iter().map(resident).collect(),
        });
    }
    if !pods.is_empty() {
        places.push(Place {
            node: String::new(),
            wish: Wish::Never,
            pods: pods.into_iter().map(resident).collect(),
        });
    }
    places
}

/// The node that the pod is on, or is meant for.
fn target(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    if spec.node_name.is_some() {
        return spec.node_name.clone();
    }
    let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = affinity
        .required_during_scheduling_ignored_during_execution
        .as_ref()?;
    let fields = required
        .node_selector_terms
        .first()?
        .match_fields
        .as_ref()?;
    fields
        .iter()
        .find(|field| field.key == "metadata.name")?
        .values
        .as_ref()?
        .first()
        .cloned()
}

fn tolerate(spec: &mut PodSpec) {
    let host_network = (spec.host_network == Some(true))
        .then_some(("node.kubernetes.io/network-unavailable", "NoSchedule"));
    let list = spec.tolerations.get_or_insert_default();
    for (key, effect) in TOLERATED.into_iter().chain(host_network) {
        let toleration = Toleration {
            key: Some(key.into()),
            operator: Some("Exists".into()),
            effect: Some(effect.into()),
            ..Toleration::default()
        };
        if !list.contains(&toleration) {
            list.push(toleration);
        }
    }
}

/// The pod for one node: the scheduler binds it there, as it would any other.
fn daemon(owner: &Owner<'_, DaemonSet>, template: &PodTemplateSpec, node: &str, hash: &str) -> Pod {
    let mut pod = owner.pod(template);
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(REVISION_LABEL.into(), hash.into());
    let spec = pod.spec.get_or_insert_default();
    tolerate(spec);
    let here = NodeSelectorRequirement {
        key: "metadata.name".into(),
        operator: "In".into(),
        values: Some(vec![node.into()]),
    };
    let affinity = spec.affinity.get_or_insert_default();
    let node_affinity = affinity.node_affinity.get_or_insert_default();
    let required = node_affinity
        .required_during_scheduling_ignored_during_execution
        .get_or_insert_default();
    // Each of the template's terms was found to hold here; the node's name says the rest.
    *required = NodeSelector {
        node_selector_terms: vec![NodeSelectorTerm {
            match_expressions: None,
            match_fields: Some(vec![here]),
        }],
    };
    pod
}

fn status(set: &DaemonSet, places: &[Place]) -> (DaemonSetStatus, Option<std::time::Duration>) {
    let wanted: Vec<_> = places
        .iter()
        .filter(|place| place.wish == Wish::Run)
        .collect();
    let with = |holds: &dyn Fn(&plan::Resident) -> bool| {
        let number = wanted
            .iter()
            .filter(|place| place.pods.iter().any(holds))
            .count();
        i32::try_from(number).unwrap_or(i32::MAX)
    };
    let desired = i32::try_from(wanted.len()).unwrap_or(i32::MAX);
    let misplaced = places
        .iter()
        .filter(|place| place.wish != Wish::Run && !place.pods.is_empty());
    let available = with(&plan::Resident::is_available);
    let known = set.status.clone().unwrap_or_default();
    let status = DaemonSetStatus {
        desired_number_scheduled: desired,
        current_number_scheduled: with(&|_| true),
        number_misscheduled: i32::try_from(misplaced.count()).unwrap_or(i32::MAX),
        number_ready: with(&|resident| resident.available_in.is_some()),
        updated_number_scheduled: Some(with(&|resident| resident.is_new)).filter(|n| *n > 0),
        number_available: Some(available).filter(|number| *number > 0),
        number_unavailable: count(usize::try_from(desired - available).unwrap_or(0)),
        observed_generation: set.metadata.generation,
        collision_count: known.collision_count,
        conditions: known.conditions,
    };
    let waits = places
        .iter()
        .flat_map(|place| &place.pods)
        .filter_map(|resident| resident.available_in);
    (status, waits.filter(|wait| !wait.is_zero()).min())
}

async fn write_status(
    context: &Context,
    set: &DaemonSet,
    status: &DaemonSetStatus,
) -> Result<(), Error> {
    let fields = json!({
        "desiredNumberScheduled": status.desired_number_scheduled,
        "currentNumberScheduled": status.current_number_scheduled,
        "numberMisscheduled": status.number_misscheduled,
        "numberReady": status.number_ready,
        "updatedNumberScheduled": status.updated_number_scheduled,
        "numberAvailable": status.number_available,
        "numberUnavailable": status.number_unavailable,
        "observedGeneration": status.observed_generation,
    });
    control::write_status(context, &context.daemon_sets, set, fields).await
}
