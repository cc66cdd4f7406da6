//! StatefulSets, DaemonSets, Jobs, CronJobs, budgets and autoscalers.

use std::collections::BTreeSet;

use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, EvictParams, Patch, PatchParams};
use serde_json::{Value, json};

use super::{Cluster, eventually};

fn names(pods: &[Pod]) -> Vec<String> {
    pods.iter().map(|pod| pod.name_any()).collect()
}

fn images(pods: &[Pod]) -> Vec<String> {
    pods.iter()
        .map(|pod| {
            pod.spec.as_ref().unwrap().containers[0]
                .image
                .clone()
                .unwrap()
        })
        .collect()
}

fn spec(app: &str, image: &str, extra: Value) -> Value {
    let mut spec = json!({
        "selector": { "matchLabels": { "app": app } },
        "template": { "metadata": { "labels": { "app": app } },
                      "spec": { "containers": [{ "name": "c", "image": image }] } },
    });
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec
}

fn image_patch(image: &str) -> Value {
    json!({ "spec": { "template": { "spec": { "containers": [{ "name": "c", "image": image }] } } } })
}

fn meta(name: &str) -> Value {
    json!({ "name": name, "namespace": "default" })
}

async fn stateful_set(cluster: &Cluster, name: &str, extra: Value) {
    let set = json!({ "metadata": meta(name), "spec": spec(name, "one", extra) });
    cluster.create::<StatefulSet>(set).await;
}

async fn has_images(cluster: &Cluster, app: &str, expected: &[&str]) {
    eventually(&format!("{app} runs {expected:?}"), async || {
        let pods = cluster.pods(app).await;
        images(&pods) == expected && pods.iter().all(crate::controllers::pod::is_ready)
    })
    .await;
}

#[tokio::test]
async fn stateful_sets_number_their_pods_and_roll_by_partition() {
    let cluster = Cluster::start().await;
    let extra = json!({ "replicas": 3, "serviceName": "db" });
    stateful_set(&cluster, "db", extra).await;
    has_images(&cluster, "db", &["one"; 3]).await;
    let pods = cluster.pods("db").await;
    assert_eq!(names(&pods), ["db-0", "db-1", "db-2"]);
    let first = pods[1].spec.as_ref().unwrap();
    assert_eq!(first.hostname.as_deref(), Some("db-1"));
    assert_eq!(first.subdomain.as_deref(), Some("db"));
    assert_eq!(pods[1].labels()["apps.kubernetes.io/pod-index"], "1");
    assert_eq!(
        pods[1].labels()["statefulset.kubernetes.io/pod-name"],
        "db-1"
    );
    // In order: none was created before the one before it.
    let created: Vec<u64> = pods
        .iter()
        .map(|pod| {
            pod.metadata
                .creation_timestamp
                .as_ref()
                .unwrap()
                .0
                .as_second() as u64
        })
        .collect();
    assert!(created.is_sorted());

    let partition = |number: i32| json!({ "spec": { "updateStrategy": { "rollingUpdate": { "partition": number } } } });
    cluster.patch::<StatefulSet>("db", partition(2)).await;
    cluster.patch::<StatefulSet>("db", image_patch("two")).await;
    has_images(&cluster, "db", &["one", "one", "two"]).await;
    // A pod below the partition comes back with its old template.
    let gone = cluster.pods("db").await[0].uid();
    let api = cluster.api::<Pod>();
    api.delete("db-0", &DeleteParams::default()).await.unwrap();
    eventually("db-0 is another", async || {
        let found = api.get_opt("db-0").await.unwrap();
        found.is_some_and(|pod| pod.uid() != gone)
    })
    .await;
    has_images(&cluster, "db", &["one", "one", "two"]).await;
    cluster.patch::<StatefulSet>("db", partition(0)).await;
    has_images(&cluster, "db", &["two"; 3]).await;
    eventually("the rollout is complete", async || {
        let set = cluster.api::<StatefulSet>().get("db").await.unwrap();
        let status = set.status.unwrap();
        status.current_revision == status.update_revision
            && status.updated_replicas == Some(3)
            && status.observed_generation == set.metadata.generation
    })
    .await;

    // What `kubectl rollout undo` sends.
    let revisions = cluster
        .api::<ControllerRevision>()
        .list(&kube::api::ListParams::default().labels("app=db"))
        .await
        .unwrap()
        .items;
    assert_eq!(revisions.len(), 2);
    let old = revisions.iter().find(|r| r.revision == Some(1)).unwrap();
    cluster.patch::<StatefulSet>("db", old.data.0.clone()).await;
    has_images(&cluster, "db", &["one"; 3]).await;
    eventually("the old revision is the newest", async || {
        let renewed = cluster
            .api::<ControllerRevision>()
            .get(&old.name_any())
            .await;
        renewed.unwrap().revision == Some(3)
    })
    .await;

    cluster
        .patch::<StatefulSet>("db", json!({ "spec": { "replicas": 1 } }))
        .await;
    eventually("db-0 is left", async || {
        names(&cluster.pods("db").await) == ["db-0"]
    })
    .await;
    let api = cluster.api::<StatefulSet>();
    api.delete("db", &DeleteParams::background()).await.unwrap();
    eventually("pods and revisions go with the set", async || {
        let params = kube::api::ListParams::default();
        let revisions = cluster.api::<ControllerRevision>().list(&params).await;
        cluster.pods("db").await.is_empty() && revisions.unwrap().items.is_empty()
    })
    .await;
}

#[tokio::test]
async fn stateful_sets_on_delete_wait_for_the_user_and_parallel_ones_for_nobody() {
    let cluster = Cluster::start().await;
    let extra = json!({
        "replicas": 2, "podManagementPolicy": "Parallel", "updateStrategy": { "type": "OnDelete" },
        "ordinals": { "start": 5 },
    });
    stateful_set(&cluster, "par", extra).await;
    has_images(&cluster, "par", &["one"; 2]).await;
    assert_eq!(names(&cluster.pods("par").await), ["par-5", "par-6"]);
    cluster
        .patch::<StatefulSet>("par", image_patch("two"))
        .await;
    eventually("the new template is known", async || {
        let set = cluster.api::<StatefulSet>().get("par").await.unwrap();
        let status = set.status.unwrap();
        status.observed_generation == set.metadata.generation
            && status.current_revision != status.update_revision
    })
    .await;
    assert_eq!(images(&cluster.pods("par").await), ["one", "one"]);
    let api = cluster.api::<Pod>();
    api.delete("par-5", &DeleteParams::default()).await.unwrap();
    has_images(&cluster, "par", &["two", "one"]).await;
}

#[tokio::test]
async fn daemon_sets_run_on_every_node_that_suits() {
    let cluster = Cluster::start().await;
    let set = json!({ "metadata": meta("log"), "spec": spec("log", "one", json!({})) });
    cluster.create::<DaemonSet>(set).await;
    has_images(&cluster, "log", &["one"]).await;
    cluster
        .create::<Node>(
            json!({ "metadata": { "name": "other" }, "spec": { "unschedulable": true } }),
        )
        .await;
    has_images(&cluster, "log", &["one"; 2]).await;
    let pods = cluster.pods("log").await;
    let nodes: BTreeSet<_> = pods
        .iter()
        .map(|pod| pod.spec.as_ref().unwrap().node_name.clone().unwrap())
        .collect();
    assert_eq!(nodes, BTreeSet::from(["mesh-node".into(), "other".into()]));

    cluster.patch::<DaemonSet>("log", image_patch("two")).await;
    has_images(&cluster, "log", &["two"; 2]).await;
    eventually("the status says so", async || {
        let set = cluster.api::<DaemonSet>().get("log").await.unwrap();
        let status = set.status.unwrap();
        status.desired_number_scheduled == 2
            && status.updated_number_scheduled == Some(2)
            && status.number_available == Some(2)
            && status.number_unavailable.is_none()
            && status.observed_generation == set.metadata.generation
    })
    .await;
    let picky =
        json!({ "spec": { "template": { "spec": { "nodeSelector": { "disk": "ssd" } } } } });
    cluster.patch::<DaemonSet>("log", picky).await;
    eventually("only the node with the label keeps one", async || {
        let pods = cluster.pods("log").await;
        pods.len() == 1 && pods[0].spec.as_ref().unwrap().node_name.as_deref() == Some("mesh-node")
    })
    .await;
}

async fn job(cluster: &Cluster, name: &str, image: &str, extra: Value) {
    let mut spec = json!({ "template": { "metadata": { "labels": { "app": name } }, "spec": {
        "restartPolicy": "Never", "containers": [{ "name": "c", "image": image }] } } });
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    cluster
        .create::<Job>(json!({ "metadata": meta(name), "spec": spec }))
        .await;
}

async fn ended(cluster: &Cluster, name: &str, condition: &str, reason: &str) -> Job {
    eventually(&format!("{name} is {condition}: {reason}"), async || {
        let job = cluster.api::<Job>().get(name).await.unwrap();
        let conditions = job
            .status
            .unwrap_or_default()
            .conditions
            .unwrap_or_default();
        conditions
            .iter()
            .any(|c| c.type_ == condition && c.reason.as_deref() == Some(reason))
    })
    .await;
    cluster.api::<Job>().get(name).await.unwrap()
}

#[tokio::test]
async fn jobs_run_to_completion_and_count_every_end_once() {
    let cluster = Cluster::start().await;
    job(
        &cluster,
        "sum",
        "succeeds",
        json!({ "completions": 5, "parallelism": 2 }),
    )
    .await;
    let done = ended(&cluster, "sum", "Complete", "CompletionsReached").await;
    let status = done.status.unwrap();
    assert_eq!((status.succeeded, status.failed), (Some(5), None));
    assert!(status.completion_time.is_some());
    let pods = cluster.pods("sum").await;
    assert_eq!(pods.len(), 5);
    assert!(pods.iter().all(|pod| pod.finalizers().is_empty()));
    cluster.has_event("Completed", "Job completed").await;

    let indexed = json!({ "completions": 3, "parallelism": 3, "completionMode": "Indexed" });
    job(&cluster, "idx", "succeeds", indexed).await;
    let done = ended(&cluster, "idx", "Complete", "CompletionsReached").await;
    assert_eq!(
        done.status.unwrap().completed_indexes.as_deref(),
        Some("0-2")
    );
    let mut hosts: Vec<_> = cluster
        .pods("idx")
        .await
        .iter()
        .map(|pod| pod.spec.as_ref().unwrap().hostname.clone().unwrap())
        .collect();
    hosts.sort();
    assert_eq!(hosts, ["idx-0", "idx-1", "idx-2"]);

    job(
        &cluster,
        "brief",
        "succeeds",
        json!({ "ttlSecondsAfterFinished": 0 }),
    )
    .await;
    eventually(
        "a finished job goes after its time, with its pods",
        async || {
            let job = cluster.api::<Job>().get_opt("brief").await.unwrap();
            job.is_none() && cluster.pods("brief").await.is_empty()
        },
    )
    .await;
}

#[tokio::test]
async fn jobs_fail_by_limit_and_deadline_and_can_be_suspended() {
    let cluster = Cluster::start().await;
    job(&cluster, "bad", "fails", json!({ "backoffLimit": 0 })).await;
    let failed = ended(&cluster, "bad", "Failed", "BackoffLimitExceeded").await;
    assert_eq!(failed.status.unwrap().failed, Some(1));

    job(
        &cluster,
        "slow",
        "runs",
        json!({ "activeDeadlineSeconds": 1 }),
    )
    .await;
    ended(&cluster, "slow", "Failed", "DeadlineExceeded").await;
    eventually("its pod is gone", async || {
        cluster.pods("slow").await.is_empty()
    })
    .await;

    job(&cluster, "rest", "runs", json!({})).await;
    eventually("it runs", async || cluster.pods("rest").await.len() == 1).await;
    let suspend = |on: bool| json!({ "spec": { "suspend": on } });
    cluster.patch::<Job>("rest", suspend(true)).await;
    ended(&cluster, "rest", "Suspended", "JobSuspended").await;
    eventually("no pod is left", async || {
        cluster.pods("rest").await.is_empty()
    })
    .await;
    cluster.patch::<Job>("rest", suspend(false)).await;
    ended(&cluster, "rest", "Suspended", "JobResumed").await;
    eventually("it runs again", async || {
        cluster.pods("rest").await.len() == 1
    })
    .await;
    // Deleting a job under way leaves nothing behind.
    let api = cluster.api::<Job>();
    api.delete("rest", &DeleteParams::background())
        .await
        .unwrap();
    eventually("job and pod are gone", async || {
        cluster.pods("rest").await.is_empty()
    })
    .await;
}

#[tokio::test]
async fn cron_jobs_start_jobs_and_keep_few_of_them() {
    let cluster = Cluster::start().await;
    let template = json!({ "metadata": { "labels": { "from": "cron" } }, "spec": { "template": { "spec": {
        "restartPolicy": "Never", "containers": [{ "name": "c", "image": "succeeds" }] } } } });
    let cron = json!({ "metadata": meta("tick"), "spec": {
        "schedule": "@every 1s", "successfulJobsHistoryLimit": 1, "jobTemplate": template } });
    let made: CronJob = cluster.create(cron).await;
    eventually("a job was started and succeeded", async || {
        let cron = cluster.api::<CronJob>().get("tick").await.unwrap();
        let status = cron.status.unwrap_or_default();
        status.last_schedule_time.is_some() && status.last_successful_time.is_some()
    })
    .await;
    let params = kube::api::ListParams::default().labels("from=cron");
    let jobs = cluster.api::<Job>().list(&params).await.unwrap().items;
    assert!(jobs[0].name_any().starts_with("tick-"));
    assert_eq!(jobs[0].owner_references()[0].uid, made.uid().unwrap());
    cluster
        .patch::<CronJob>(
            "tick",
            json!({ "spec": { "suspend": true, "successfulJobsHistoryLimit": 0 } }),
        )
        .await;
    eventually("no finished job is kept", async || {
        let jobs = cluster.api::<Job>().list(&params).await.unwrap().items;
        let cron = cluster.api::<CronJob>().get("tick").await.unwrap();
        jobs.is_empty() && cron.status.unwrap_or_default().active.is_none()
    })
    .await;
    cluster
        .has_event("SuccessfulCreate", "Created job tick-")
        .await;
}

#[tokio::test]
async fn budgets_hold_evictions_back() {
    let cluster = Cluster::start().await;
    cluster.deploy("web", 2, json!({})).await;
    cluster.rolled_out("web", 2, "one").await;
    let budget = json!({ "metadata": meta("web"), "spec": {
        "maxUnavailable": 1, "selector": { "matchLabels": { "app": "web" } } } });
    cluster.create::<PodDisruptionBudget>(budget).await;
    let allowed = async |number: i32| {
        eventually(&format!("{number} disruptions are allowed"), async || {
            let budget = cluster
                .api::<PodDisruptionBudget>()
                .get("web")
                .await
                .unwrap();
            budget.status.unwrap_or_default().disruptions_allowed == Some(number)
        })
        .await;
    };
    allowed(1).await;
    // No replacement comes, so that the second eviction finds the budget spent.
    let cordon = Patch::Merge(json!({ "spec": { "unschedulable": true } }));
    let nodes = cluster.all::<Node>();
    nodes
        .patch("mesh-node", &PatchParams::default(), &cordon)
        .await
        .unwrap();
    let pods = cluster.pods("web").await;
    let api = cluster.api::<Pod>();
    let evict = EvictParams::default();
    api.evict(&pods[0].name_any(), &evict).await.unwrap();
    allowed(0).await;
    let refused = api.evict(&pods[1].name_any(), &evict).await.unwrap_err();
    assert!(
        matches!(&refused, kube::Error::Api(status) if status.code == 429
            && status.message.contains("violate the pod's disruption budget")),
        "{refused}"
    );
}

#[tokio::test]
async fn autoscalers_keep_sizes_within_bounds() {
    let cluster = Cluster::start().await;
    cluster.deploy("web", 1, json!({})).await;
    let autoscaler = json!({ "metadata": meta("web"), "spec": {
        "minReplicas": 2, "maxReplicas": 3,
        "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "web" } } });
    cluster.create::<HorizontalPodAutoscaler>(autoscaler).await;
    cluster.rolled_out("web", 2, "one").await;
    cluster
        .patch::<Deployment>("web", json!({ "spec": { "replicas": 5 } }))
        .await;
    cluster.rolled_out("web", 3, "one").await;
    eventually("the status says that nothing is measured", async || {
        let found = cluster
            .api::<HorizontalPodAutoscaler>()
            .get("web")
            .await
            .unwrap();
        let conditions = found
            .status
            .unwrap_or_default()
            .conditions
            .unwrap_or_default();
        conditions.iter().any(|c| {
            c.type_ == "ScalingActive"
                && c.status == "False"
                && c.message
                    .as_deref()
                    .unwrap_or_default()
                    .contains("no metrics API")
        })
    })
    .await;
    let lost = json!({ "metadata": meta("lost"), "spec": { "maxReplicas": 3,
        "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "nobody" } } });
    cluster.create::<HorizontalPodAutoscaler>(lost).await;
    cluster.has_event("FailedGetScale", "nobody").await;
}

#[tokio::test]
async fn suspended_jobs_take_another_template_before_they_start() {
    let cluster = Cluster::start().await;
    job(&cluster, "later", "runs", json!({ "suspend": true })).await;
    let api = cluster.api::<Job>();
    let params = PatchParams::default();
    api.patch("later", &params, &Patch::Strategic(image_patch("succeeds")))
        .await
        .unwrap();
    cluster
        .patch::<Job>("later", json!({ "spec": { "suspend": false } }))
        .await;
    ended(&cluster, "later", "Complete", "CompletionsReached").await;
    let refused = api
        .patch("later", &params, &Patch::Strategic(image_patch("other")))
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("immutable"), "{refused}");
}
