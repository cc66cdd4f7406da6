//! The workload kinds: defaults, validation, tables, versions, subresources.

use serde_json::{Value, json};

use crate::support::{Api, PODS};

fn apps(plural: &str) -> String {
    format!("/apis/apps/v1/namespaces/default/{plural}")
}

fn batch(plural: &str) -> String {
    format!("/apis/batch/v1/namespaces/default/{plural}")
}

fn template(extra: Value) -> Value {
    let mut spec = json!({ "containers": [{ "name": "main", "image": "app:1" }] });
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    json!({ "metadata": { "labels": { "app": "a" } }, "spec": spec })
}

fn workload(kind: &str, extra: Value) -> Value {
    let mut spec =
        json!({ "selector": { "matchLabels": { "app": "a" } }, "template": template(json!({})) });
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    json!({ "apiVersion": "apps/v1", "kind": kind, "metadata": { "name": "a" }, "spec": spec })
}

fn job(extra: Value) -> Value {
    let mut spec =
        json!({ "template": { "spec": template(json!({ "restartPolicy": "Never" }))["spec"] } });
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    json!({ "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": "j" }, "spec": spec })
}

fn columns(table: &Value) -> Vec<String> {
    let all = table["columnDefinitions"].as_array().unwrap().iter();
    all.filter(|c| c["priority"] == 0)
        .map(|c| c["name"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn stateful_and_daemon_sets_have_their_defaults_and_limits() {
    let api = Api::new();
    let sets = apps("statefulsets");
    let made = api
        .post(
            &sets,
            &workload("StatefulSet", json!({ "serviceName": "a" })),
        )
        .await
        .ok();
    let spec = &made["spec"];
    assert_eq!(spec["podManagementPolicy"], "OrderedReady");
    assert_eq!(
        spec["updateStrategy"],
        json!({ "type": "RollingUpdate", "rollingUpdate": { "partition": 0 } })
    );
    assert_eq!(
        (&spec["replicas"], &spec["revisionHistoryLimit"]),
        (&json!(1), &json!(10))
    );
    assert_eq!(made["metadata"]["generation"], 1);
    let path = format!("{sets}/a");
    let status = api
        .patch(
            &path,
            "merge-patch",
            &json!({ "spec": { "serviceName": "b" } }),
        )
        .await
        .fails(422);
    assert!(
        status["message"]
            .as_str()
            .unwrap()
            .contains("'serviceName'")
    );
    let claims =
        json!({ "volumeClaimTemplates": [{ "metadata": { "name": "data" }, "spec": {} }] });
    let mut claiming = workload("StatefulSet", claims);
    claiming["metadata"]["name"] = "b".into();
    let status = api.post(&sets, &claiming).await.fails(422);
    assert_eq!(
        status["details"]["causes"][0]["field"],
        "spec.volumeClaimTemplates"
    );
    let scale = json!({ "spec": { "replicas": 4 } });
    let scaled = api
        .patch(&format!("{path}/scale"), "merge-patch", &scale)
        .await
        .ok();
    assert_eq!(scaled["spec"]["replicas"], 4);
    let table = api.table(&sets).await;
    assert_eq!(columns(&table), ["Name", "Ready", "Age"]);
    assert_eq!(table["rows"][0]["cells"][1], "0/4");

    let sets = apps("daemonsets");
    let made = api
        .post(&sets, &workload("DaemonSet", json!({})))
        .await
        .ok();
    assert_eq!(
        made["spec"]["updateStrategy"]["rollingUpdate"],
        json!({ "maxUnavailable": 1, "maxSurge": 0 })
    );
    let both = json!({ "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 1 } } });
    let mut bad = workload("DaemonSet", both);
    bad["metadata"]["name"] = "bad".into();
    api.post(&sets, &bad).await.fails(422);
    let manual = json!({ "updateStrategy": { "type": "OnDelete", "rollingUpdate": {} } });
    let mut bad = workload("DaemonSet", manual);
    bad["metadata"]["name"] = "bad".into();
    api.post(&sets, &bad).await.fails(422);
    assert_eq!(columns(&api.table(&sets).await).len(), 8);
}

#[tokio::test]
async fn jobs_get_selector_and_labels_and_keep_them() {
    let api = Api::new();
    let jobs = batch("jobs");
    let made = api.post(&jobs, &job(json!({}))).await.ok();
    let (uid, spec) = (&made["metadata"]["uid"], &made["spec"]);
    let labels = &spec["template"]["metadata"]["labels"];
    assert_eq!(&labels["batch.kubernetes.io/controller-uid"], uid);
    assert_eq!(labels["job-name"], "j");
    assert_eq!(
        &spec["selector"]["matchLabels"]["batch.kubernetes.io/controller-uid"],
        uid
    );
    for (field, value) in [
        ("completions", json!(1)),
        ("parallelism", json!(1)),
        ("backoffLimit", json!(6)),
        ("completionMode", json!("NonIndexed")),
        ("suspend", json!(false)),
        ("podReplacementPolicy", json!("TerminatingOrFailed")),
    ] {
        assert_eq!(spec[field], value, "{field}");
    }
    let mut queue = job(json!({ "parallelism": 3 }));
    queue["metadata"]["name"] = "queue".into();
    let queue = api.post(&jobs, &queue).await.ok();
    assert!(queue["spec"].get("completions").is_none());
    for (extra, field) in [
        (
            json!({ "podFailurePolicy": { "rules": [] } }),
            "spec.podFailurePolicy",
        ),
        (
            json!({ "backoffLimitPerIndex": 1 }),
            "spec.backoffLimitPerIndex",
        ),
        (
            json!({ "completionMode": "Indexed", "parallelism": 1 }),
            "spec.completions",
        ),
        (json!({ "parallelism": -1 }), "spec.parallelism"),
        (
            json!({ "managedBy": "example.com/other" }),
            "spec.managedBy",
        ),
        (
            json!({ "template": template(json!({})) }),
            "spec.template.spec.restartPolicy",
        ),
    ] {
        let mut bad = job(extra);
        bad["metadata"]["name"] = "bad".into();
        let status = api.post(&jobs, &bad).await.fails(422);
        assert_eq!(status["details"]["causes"][0]["field"], field, "{status}");
    }
    let path = format!("{jobs}/j");
    api.patch(
        &path,
        "merge-patch",
        &json!({ "spec": { "parallelism": 2 } }),
    )
    .await
    .ok();
    let status = api
        .patch(
            &path,
            "merge-patch",
            &json!({ "spec": { "completions": 2 } }),
        )
        .await
        .fails(422);
    assert!(status["message"].as_str().unwrap().contains("immutable"));
    let table = api.table(&jobs).await;
    assert_eq!(
        columns(&table),
        ["Name", "Status", "Completions", "Duration", "Age"]
    );
    assert_eq!(table["rows"][0]["cells"][1], "Running");
    assert_eq!(table["rows"][0]["cells"][2], "0/1");
}

#[tokio::test]
async fn cron_jobs_are_checked_before_they_run() {
    let api = Api::new();
    let cron = |schedule: &str, extra: Value| {
        let mut spec =
            json!({ "schedule": schedule, "jobTemplate": { "spec": job(json!({}))["spec"] } });
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        json!({ "apiVersion": "batch/v1", "kind": "CronJob", "metadata": { "name": "c" }, "spec": spec })
    };
    let crons = batch("cronjobs");
    for (object, field) in [
        (cron("61 * * * *", json!({})), "spec.schedule"),
        (cron("TZ=UTC * * * * *", json!({})), "spec.schedule"),
        (
            cron("* * * * *", json!({ "timeZone": "Mars/Base" })),
            "spec.timeZone",
        ),
        (
            cron("* * * * *", json!({ "concurrencyPolicy": "Maybe" })),
            "spec.concurrencyPolicy",
        ),
        (
            cron("* * * * *", json!({ "failedJobsHistoryLimit": -1 })),
            "spec.failedJobsHistoryLimit",
        ),
    ] {
        let status = api.post(&crons, &object).await.fails(422);
        assert_eq!(status["details"]["causes"][0]["field"], field, "{status}");
    }
    let made = api
        .post(&crons, &cron("*/5 * * * *", json!({ "timeZone": "UTC" })))
        .await
        .ok();
    assert_eq!(made["spec"]["concurrencyPolicy"], "Allow");
    assert_eq!(made["spec"]["jobTemplate"]["spec"]["completions"], 1);
    let table = api.table(&crons).await;
    assert_eq!(
        columns(&table),
        [
            "Name",
            "Schedule",
            "Timezone",
            "Suspend",
            "Active",
            "Last Schedule",
            "Age"
        ]
    );
    assert_eq!(table["rows"][0]["cells"][1], "*/5 * * * *");
}

#[tokio::test]
async fn autoscalers_are_one_object_in_two_versions() {
    let api = Api::new();
    let at = |version: &str| {
        format!("/apis/autoscaling/{version}/namespaces/default/horizontalpodautoscalers")
    };
    let target = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "name": "web" });
    let old = json!({ "apiVersion": "autoscaling/v1", "kind": "HorizontalPodAutoscaler", "metadata": { "name": "web" },
        "spec": { "maxReplicas": 3, "targetCPUUtilizationPercentage": 80, "scaleTargetRef": target } });
    api.post(&at("v1"), &old).await.ok();
    let new = api.get(&format!("{}/web", at("v2"))).await.ok();
    assert_eq!(new["apiVersion"], "autoscaling/v2");
    assert_eq!(
        new["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"],
        80
    );
    let memory = json!({ "type": "Resource", "resource": { "name": "memory", "target": { "type": "Utilization", "averageUtilization": 50 } } });
    let metrics = json!({ "spec": { "metrics": [memory] } });
    api.patch(&format!("{}/web", at("v2")), "merge-patch", &metrics)
        .await
        .ok();
    // A write in the old version keeps what that version can't say.
    let path = format!("{}/web", at("v1"));
    api.patch(
        &path,
        "merge-patch",
        &json!({ "spec": { "maxReplicas": 5 } }),
    )
    .await
    .ok();
    let new = api.get(&format!("{}/web", at("v2"))).await.ok();
    assert_eq!(new["spec"]["maxReplicas"], 5);
    assert_eq!(new["spec"]["metrics"][0]["resource"]["name"], "memory");
    let table = api.table(&at("v2")).await;
    assert_eq!(table["rows"][0]["cells"][2], "memory: <unknown>/50%");
    let mut bad = old.clone();
    bad["spec"]["minReplicas"] = 9.into();
    bad["metadata"]["name"] = "bad".into();
    api.post(&at("v1"), &bad).await.fails(422);
    // A metric that typed clients could not read is refused and not stored.
    let wrong = json!({ "spec": { "metrics": [{ "type": "Resource", "resource": "cpu" }] } });
    api.patch(&format!("{}/web", at("v2")), "merge-patch", &wrong)
        .await
        .fails(400);
}

#[tokio::test]
async fn evictions_ask_the_budget() {
    let api = Api::new();
    let mut pod = crate::support::pod("p");
    pod["spec"]["nodeName"] = "n".into();
    api.post(PODS, &pod).await.ok();
    let running = json!({ "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] } });
    api.patch(&format!("{PODS}/p/status"), "merge-patch", &running)
        .await
        .ok();
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    let budget = json!({ "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "b" },
        "spec": { "minAvailable": 1, "selector": { "matchLabels": { "app": "p" } } } });
    api.post(budgets, &budget).await.ok();
    let eviction =
        json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": "p" } });
    let evict = async || api.post(&format!("{PODS}/p/eviction"), &eviction).await;
    // Nobody has counted the budget yet.
    let status = evict().await.fails(429);
    assert_eq!(status["details"]["retryAfterSeconds"], 10);
    let count = async |allowed: i64| {
        let status = json!({ "status": { "observedGeneration": 1, "disruptionsAllowed": allowed, "expectedPods": 2,
            "currentHealthy": 1 + allowed, "desiredHealthy": 1 } });
        api.patch(&format!("{budgets}/b/status"), "merge-patch", &status)
            .await
            .ok();
    };
    count(0).await;
    let status = evict().await.fails(429);
    assert_eq!(status["details"]["causes"][0]["reason"], "DisruptionBudget");
    count(1).await;
    evict().await.ok();
    let budget = api.get(&format!("{budgets}/b")).await.ok();
    assert_eq!(budget["status"]["disruptionsAllowed"], 0);
    assert!(budget["status"]["disruptedPods"]["p"].is_string());
    let mut two = json!({ "minAvailable": 1, "maxUnavailable": 1 });
    two["selector"] = json!({});
    let bad = json!({ "metadata": { "name": "two" }, "spec": two });
    api.post(budgets, &bad).await.fails(422);
}
