//! StatefulSet: pods with numbers and stable names, started, replaced and ended in order.

mod plan;

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use kube::ResourceExt as _;
use serde_json::json;

use super::control::{self, Owner, count};
use super::history::{self, History, REVISION_LABEL};
use super::pod;
use super::queue::{Key, Queue};
use super::{Context, Error, Outcome};
use plan::{Step, View};

const COMPONENT: &str = "statefulset-controller";
const NAME_LABEL: &str = "statefulset.kubernetes.io/pod-name";
const INDEX_LABEL: &str = "apps.kubernetes.io/pod-index";

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("statefulset");
    let own = queue.clone();
    context.stateful_sets.subscribe(move |_, new| {
        if let Some(set) = new {
            own.add(Key::of(&**set));
        }
    });
    control::follow_pods(context, &queue, &context.stateful_sets, |set| {
        Some(&set.spec.selector)
    });
    queue
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(set) = context.stateful_sets.get(&key) else {
        return Ok(None);
    };
    let spec = &set.spec;
    let owner = Owner {
        context: &context,
        object: &*set,
        component: COMPONENT,
        selector: &spec.selector,
    };
    // Only a pod with one of the set's names can be a member.
    let pods = owner
        .claimed(|pod| plan::ordinal(&set.name_any(), pod).is_some())
        .await?;
    if owner.ends() {
        return Ok(None);
    }
    let history = History::sync(&owner, &spec.template).await?;
    let update = history.update.name_any();
    let known = set.status.clone().unwrap_or_default();
    let current = known
        .current_revision
        .filter(|name| history.find(name).is_some())
        .unwrap_or_else(|| update.clone());
    let name = set.name_any();
    let view = View {
        name: &name,
        spec,
        pods: &pods,
        update: &update,
        now: jiff::Timestamp::now(),
    };
    let plan = plan::plan(&view);
    let done = take(&owner, spec, &history, &current, plan.steps).await;
    let pods = owner.owned();
    let status = status(&set, spec, &pods, &current, &update, view.now);
    if set.status.as_ref() != Some(&status) {
        write_status(&context, &set, &status).await?;
    }
    done?;
    let live = [status.current_revision, status.update_revision];
    history
        .truncate(&owner, spec.revision_history_limit, |revision| {
            let name = revision.metadata.name.as_ref();
            live.iter().any(|live| live.as_ref() == name)
                || pods
                    .iter()
                    .any(|pod| pod.labels().get(REVISION_LABEL) == name)
        })
        .await?;
    Ok(plan.again)
}

async fn take(
    owner: &Owner<'_, StatefulSet>,
    spec: &StatefulSetSpec,
    history: &History,
    current: &str,
    steps: Vec<Step>,
) -> Result<(), Error> {
    let mut new = Vec::new();
    for step in steps {
        match step {
            Step::Create(ordinal) => {
                // Below the partition a pod comes back with the template that it had.
                let old = history
                    .find(current)
                    .filter(|_| plan::keeps_template(spec, ordinal));
                let revision = old.unwrap_or(&history.update);
                let template = history::template(revision).unwrap_or(spec.template.clone());
                new.push(numbered(
                    owner,
                    spec,
                    &template,
                    ordinal,
                    &revision.name_any(),
                ));
            }
            Step::Delete(pod) => owner.delete(&pod).await?,
            Step::Name(pod, ordinal) => {
                let labels =
                    json!({ NAME_LABEL: pod.name_any(), INDEX_LABEL: ordinal.to_string() });
                owner
                    .patch(&pod, json!({ "metadata": { "labels": labels } }))
                    .await?;
            }
        }
    }
    owner.create_all(&new).await
}

/// The pod of that number.
fn numbered(
    owner: &Owner<'_, StatefulSet>,
    spec: &StatefulSetSpec,
    template: &PodTemplateSpec,
    ordinal: i32,
    revision: &str,
) -> Pod {
    let mut pod = owner.pod(template);
    let name = format!("{}-{ordinal}", owner.object.name_any());
    pod.metadata.generate_name = None;
    pod.metadata.name = Some(name.clone());
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(NAME_LABEL.into(), name.clone());
    labels.insert(INDEX_LABEL.into(), ordinal.to_string());
    labels.insert(REVISION_LABEL.into(), revision.into());
    let pod_spec = pod.spec.get_or_insert_default();
    pod_spec.hostname = Some(name);
    pod_spec.subdomain = spec.service_name.clone().filter(|name| !name.is_empty());
    pod
}

fn status(
    set: &StatefulSet,
    spec: &StatefulSetSpec,
    pods: &[Arc<Pod>],
    current: &str,
    update: &str,
    now: jiff::Timestamp,
) -> StatefulSetStatus {
    let of = |revision: &str| {
        let alive = pods.iter().filter(|pod| {
            pod.metadata.deletion_timestamp.is_none()
                && pod
                    .labels()
                    .get(REVISION_LABEL)
                    .is_some_and(|found| found == revision)
        });
        alive.count()
    };
    let ready: Vec<_> = pods.iter().filter(|pod| plan::is_serving(pod)).collect();
    let seconds = spec.min_ready_seconds.unwrap_or(0);
    let available = ready
        .iter()
        .filter(|pod| pod::available_in(pod, seconds, now).is_some_and(|wait| wait.is_zero()));
    let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    // A rollout that has reached every pod makes the new template the current one.
    let complete =
        of(update) == wanted && ready.len() == wanted && pods.len() == wanted && plan::rolls(spec);
    let current = if complete { update } else { current };
    StatefulSetStatus {
        replicas: i32::try_from(pods.len()).unwrap_or(i32::MAX),
        ready_replicas: count(ready.len()),
        available_replicas: Some(i32::try_from(available.count()).unwrap_or(i32::MAX)),
        current_replicas: count(of(current)),
        updated_replicas: count(of(update)),
        current_revision: Some(current.to_owned()),
        update_revision: Some(update.to_owned()),
        observed_generation: set.metadata.generation,
        collision_count: set.status.as_ref().and_then(|known| known.collision_count),
        conditions: set
            .status
            .as_ref()
            .and_then(|known| known.conditions.clone()),
    }
}

async fn write_status(
    context: &Context,
    set: &StatefulSet,
    status: &StatefulSetStatus,
) -> Result<(), Error> {
    let fields = json!({
        "replicas": status.replicas,
        "readyReplicas": status.ready_replicas,
        "availableReplicas": status.available_replicas,
        "currentReplicas": status.current_replicas,
        "updatedReplicas": status.updated_replicas,
        "currentRevision": status.current_revision,
        "updateRevision": status.update_revision,
        "observedGeneration": status.observed_generation,
    });
    control::write_status(context, &context.stateful_sets, set, fields).await
}
