//! Job: runs pods until enough of them have succeeded, or too many have failed.
//!
//! Each pod carries a finalizer until its end is counted in the job's status, so that no end is lost or counted twice,
//! whoever deletes the pod and whenever this process stops.

mod indexes;
mod plan;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::batch::v1::{Job, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::{EnvVar, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::control::{self, Owner};
use super::pod;
use super::queue::{Key, Queue};
use super::{Context, Doing as _, Error, Outcome};

const COMPONENT: &str = "job-controller";
/// Keeps a pod until it is counted.
const TRACKING: &str = "batch.kubernetes.io/job-tracking";
/// Label and annotation with a pod's number in an indexed job.
const INDEX: &str = "batch.kubernetes.io/job-completion-index";

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("job");
    let own = queue.clone();
    context.jobs.subscribe(move |old, new| {
        if let Some(job) = new.or(old) {
            own.add(Key::of(&**job));
        }
    });
    control::follow_pods(context, &queue, &context.jobs, |job| {
        job.spec.as_ref()?.selector.as_ref()
    });
    queue
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(job) = context.jobs.get(&key) else {
        release_all(&context, &key).await?;
        return Ok(None);
    };
    let Some(spec) = &job.spec else {
        return Ok(None);
    };
    if job.metadata.deletion_timestamp.is_some() || plan::is_finished(&job) {
        release_all(&context, &key).await?;
        return expire(&context, &job, spec).await;
    }
    let nothing = LabelSelector::default();
    let owner = Owner {
        context: &context,
        object: &*job,
        component: COMPONENT,
        selector: spec.selector.as_ref().unwrap_or(&nothing),
    };
    let pods = owner.claimed(|_| true).await?;
    let next = plan::next(&job, spec, &pods, super::events::now());
    // The counts are safe before a pod that they are about may go.
    if job.status.as_ref() != Some(&next.status) {
        write_status(&context, &job, &next.status).await?;
        for note in next.notes {
            owner.report(note.level, note.reason, note.message);
        }
    }
    for pod in &next.release {
        release(&owner, pod).await?;
    }
    owner.delete_all(&next.delete).await?;
    let new: Vec<_> = next
        .create
        .iter()
        .map(|index| worker(&owner, spec, *index))
        .collect();
    owner.create_all(&new).await?;
    Ok(next.again)
}

/// Lets the pods go that nobody counts any more.
async fn release_all(context: &Context, key: &Key) -> Result<(), Error> {
    let nothing = LabelSelector::default();
    let nobody = Job {
        metadata: ObjectMeta {
            namespace: Some(key.namespace.clone()),
            name: Some(key.name.clone()),
            ..ObjectMeta::default()
        },
        ..Job::default()
    };
    let owner = Owner {
        context,
        object: &nobody,
        component: COMPONENT,
        selector: &nothing,
    };
    for pod in context.pods.in_namespace(&key.namespace) {
        let controller = pod::controller(&pod.metadata);
        if controller.is_none_or(|owner| owner.kind == "Job" && owner.name == key.name) {
            release(&owner, &pod).await?;
        }
    }
    Ok(())
}

async fn release(owner: &Owner<'_, Job>, pod: &Pod) -> Result<(), Error> {
    if !plan::is_tracked(pod) {
        return Ok(());
    }
    let rest: Vec<_> = pod
        .finalizers()
        .iter()
        .filter(|name| *name != TRACKING)
        .collect();
    let patch = json!({ "metadata": { "uid": pod.uid(), "finalizers": rest } });
    if owner.patch(pod, patch).await?.is_none() {
        owner.context.pods.forget(pod);
    }
    Ok(())
}

/// Deletes a finished job when its time is over.
async fn expire(context: &Context, job: &Job, spec: &JobSpec) -> Outcome {
    let (Some(seconds), Some(end)) = (spec.ttl_seconds_after_finished, plan::end(job)) else {
        return Ok(None);
    };
    if job.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let left = end.as_second() + i64::from(seconds) - jiff::Timestamp::now().as_second();
    if let Ok(left @ 1..) = u64::try_from(left) {
        return Ok(Some(Duration::from_secs(left)));
    }
    let key = Key::of(job);
    let api: Api<Job> = Api::namespaced(context.client.clone(), &key.namespace);
    let params = DeleteParams {
        preconditions: Some(Preconditions {
            uid: job.uid(),
            resource_version: None,
        }),
        ..DeleteParams::foreground()
    };
    match api.delete(&key.name, &params).await {
        Ok(_) => Ok(None),
        Err(error) if super::is_not_found(&error) => Ok(None),
        Err(error) => Err(error).doing(|| format!("deleting the finished Job {key}")),
    }
}

/// A pod of the job, with its number where the job is indexed.
fn worker(owner: &Owner<'_, Job>, spec: &JobSpec, index: Option<i32>) -> Pod {
    let mut pod = owner.pod(&spec.template);
    pod.metadata
        .finalizers
        .get_or_insert_default()
        .push(TRACKING.into());
    let Some(index) = index else { return pod };
    let name = format!("{}-{index}", owner.object.name_any());
    pod.metadata.generate_name = Some(format!("{name}-"));
    for map in [&mut pod.metadata.labels, &mut pod.metadata.annotations] {
        map.get_or_insert_default()
            .insert(INDEX.into(), index.to_string());
    }
    let pod_spec = pod.spec.get_or_insert_default();
    pod_spec.hostname = Some(name);
    let init = pod_spec.init_containers.iter_mut().flatten();
    for container in init.chain(&mut pod_spec.containers) {
        let variables = container.env.get_or_insert_default();
        if !variables
            .iter()
            .any(|variable| variable.name == "JOB_COMPLETION_INDEX")
        {
            variables.push(EnvVar {
                name: "JOB_COMPLETION_INDEX".into(),
                value: Some(index.to_string()),
                value_from: None,
            });
        }
    }
    pod
}

async fn write_status(context: &Context, job: &Job, status: &JobStatus) -> Result<(), Error> {
    let uncounted = status.uncounted_terminated_pods.as_ref();
    let uncounted = json!({
        "succeeded": uncounted.and_then(|pods| pods.succeeded.as_ref()),
        "failed": uncounted.and_then(|pods| pods.failed.as_ref()),
    });
    let fields = json!({
        "active": status.active,
        "ready": status.ready,
        "terminating": status.terminating,
        "succeeded": status.succeeded,
        "failed": status.failed,
        "completedIndexes": status.completed_indexes,
        "startTime": status.start_time,
        "completionTime": status.completion_time,
        "conditions": status.conditions,
        "uncountedTerminatedPods": uncounted,
    });
    control::write_status(context, &context.jobs, job, fields).await
}
