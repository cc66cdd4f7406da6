//! Probes of every kind, hooks, the order in which a pod ends, the host's network, tokens.

use std::path::Path;

use serde_json::{Value, json};

use crate::api::Api;
use crate::pods::{ready, start};
use crate::server::{HTTP, HTTPS};

pub async fn all(run: &Path) {
    every_kind_of_probe(run).await;
    probes_that_fail(run).await;
    the_order_of_the_end(run).await;
    the_end_of_patience(run).await;
    a_job_with_a_sidecar(run).await;
    the_nodes_network(run).await;
    tokens_are_renewed(run).await;
}

fn probed(name: &str, more: &Value) -> Value {
    let mut container = json!({"name": name, "image": "x", "command": ["mesh", "probed"],
        "ports": [{"name": "web", "containerPort": HTTP}]});
    for (field, value) in more.as_object().unwrap() {
        container[field] = value.clone();
    }
    container
}

fn shell(name: &str, script: &str) -> Value {
    json!({"name": name, "image": "x", "command": ["/bin/sh", "-c", script],
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]})
}

async fn every_kind_of_probe(run: &Path) {
    for probe in [
        json!({"httpGet": {"port": "web", "path": "/ok", "httpHeaders": [{"name": "Host", "value": "me"}]}}),
        json!({"httpGet": {"port": HTTPS, "path": "/ok", "scheme": "HTTPS"}}),
        json!({"tcpSocket": {"port": HTTP}}),
        json!({"grpc": {"port": HTTP, "service": "ready"}}),
        json!({"exec": {"command": ["/bin/true"]}}),
    ] {
        let all = json!({"startupProbe": probe, "readinessProbe": probe, "livenessProbe": probe});
        let pod = start(
            run,
            Api::new(),
            json!({"containers": [probed("app", &all)]}),
        );
        let status = pod.api.wait("the pod to be ready", ready).await;
        assert_eq!(status["containerStatuses"][0]["started"], true);
        pod.delete().await;
    }
}

async fn probes_that_fail(run: &Path) {
    let often = |probe: Value| {
        let mut probe = probe;
        probe["periodSeconds"] = json!(1);
        probe["failureThreshold"] = json!(1);
        probe
    };
    let wrong = [
        (
            json!({"httpGet": {"port": HTTP, "path": "/bad"}}),
            "HTTP probe failed with statuscode: 503",
        ),
        (
            json!({"httpGet": {"port": HTTPS, "path": "/bad", "scheme": "HTTPS"}}),
            "HTTP probe failed with statuscode: 503",
        ),
        (json!({"tcpSocket": {"port": 1}}), "dial tcp"),
        (
            json!({"grpc": {"port": HTTP, "service": "other"}}),
            "not serving",
        ),
        (
            json!({"exec": {"command": ["/bin/sh", "-c", "echo broken; exit 1"]}}),
            "broken",
        ),
    ];
    for (probe, message) in wrong {
        // Ready first, so that the liveness probe meets a server that is up.
        let probes =
            json!({"startupProbe": {"tcpSocket": {"port": HTTP}}, "livenessProbe": often(probe)});
        let pod = start(
            run,
            Api::new(),
            json!({"terminationGracePeriodSeconds": 1, "containers": [probed("app", &probes)]}),
        );
        let restarted = |s: &Value| s["containerStatuses"][0]["restartCount"] == 1;
        pod.api
            .wait("the container to be restarted", restarted)
            .await;
        let api = pod.delete().await;
        api.told(&["Unhealthy: Liveness", message]).await;
    }
}

/// Each process ends with 0 only when what must come before it has come.
async fn the_order_of_the_end(run: &Path) {
    let ends_after = |own: &str, before: &str| {
        format!(
            "trap 'test -e /shared/{before} && touch /shared/{own} && exit 0; exit 9' TERM; while :; do sleep 0.05; done"
        )
    };
    let mut first = shell("first", &ends_after("first", "second"));
    let mut second = shell("second", &ends_after("second", "app"));
    first["restartPolicy"] = json!("Always");
    second["restartPolicy"] = json!("Always");
    let mut app = shell("app", &ends_after("app", "stopping"));
    app["readinessProbe"] = json!({"exec": {"command": ["/bin/test", "-e", "/shared/begun"]}});
    app["lifecycle"] = json!({
        "postStart": {"exec": {"command": ["/bin/touch", "/shared/begun"]}},
        "preStop": {"exec": {"command": ["/bin/sh", "-c", "sleep 0.3; touch /shared/stopping"]}},
    });
    let volumes = json!([{"name": "shared", "emptyDir": {}}]);
    let pod = start(
        run,
        Api::new(),
        json!({"volumes": volumes, "initContainers": [first, second], "containers": [app]}),
    );
    pod.api.wait("the hook after the start", ready).await;
    let last = pod.delete().await.last();
    let code =
        |list: &str, index: usize| last[list][index]["state"]["terminated"]["exitCode"].clone();
    assert_eq!(code("containerStatuses", 0), 0, "hook, then app: {last:#}");
    assert_eq!(
        code("initContainerStatuses", 1),
        0,
        "then the later sidecar: {last:#}"
    );
    assert_eq!(
        code("initContainerStatuses", 0),
        0,
        "then the earlier one: {last:#}"
    );
    let ready = last["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["type"] == "Ready");
    assert_eq!(ready.unwrap()["status"], "False");
}

/// A hook that never ends, and a program that does not care for SIGTERM.
async fn the_end_of_patience(run: &Path) {
    let mut app = shell(
        "app",
        "trap 'echo asked' TERM; while :; do sleep 0.05; done",
    );
    app["lifecycle"] = json!({"preStop": {"exec": {"command": ["/bin/sleep", "1000"]}}});
    let pod = start(
        run,
        Api::new(),
        json!({"volumes": [{"name": "shared", "emptyDir": {}}], "containers": [app]}),
    );
    pod.api.wait("the pod to be ready", ready).await;
    let api = pod.delete_within(1).await;
    let ended = &api.last()["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["exitCode"], 137);
    api.told(&["FailedPreStopHook: "]).await;
}

async fn a_job_with_a_sidecar(run: &Path) {
    let mut side = shell("side", "trap 'exit 0' TERM; while :; do sleep 0.05; done");
    side["restartPolicy"] = json!("Always");
    let app = shell(
        "app",
        "test -e /shared/again && exit 0; touch /shared/again; exit 1",
    );
    let pod = start(
        run,
        Api::new(),
        json!({"restartPolicy": "OnFailure", "volumes": [{"name": "shared", "emptyDir": {}}],
            "initContainers": [side], "containers": [app]}),
    );
    let done = |s: &Value| s["phase"] == "Succeeded";
    let status = pod.api.wait("the pod to be done", done).await;
    assert_eq!(status["containerStatuses"][0]["restartCount"], 1);
    let side = &status["initContainerStatuses"][0]["state"];
    assert!(side["terminated"].is_object(), "the sidecar ended: {side}");
    pod.delete().await;
}

async fn the_nodes_network(run: &Path) {
    let pod = start(
        run,
        Api::new(),
        json!({"hostNetwork": true, "containers": [probed("app", &json!({"readinessProbe": {"httpGet": {"port": HTTP, "path": "/ok"}}}))]}),
    );
    let status = pod.api.wait("the pod to be ready", ready).await;
    assert_eq!(status["podIP"], "10.244.0.1");
    let (links, _) = pod.exec("app", "cat /proc/net/dev", false).await;
    assert!(links.contains("cni0"), "{links}");
    assert_eq!(
        pod.exec("app", "cat /etc/hostname", false).await.0,
        "mesh-node"
    );
    pod.delete().await;
}

async fn tokens_are_renewed(run: &Path) {
    // The API would not give a token for one second; the node does as it is told.
    let source = json!({"serviceAccountToken": {"path": "token", "expirationSeconds": 1}});
    let script = "first=$(cat /token/token); while test \"$(cat /token/token)\" = \"$first\"; do sleep 0.05; done";
    let mut app = shell("app", script);
    app["volumeMounts"] = json!([{"name": "token", "mountPath": "/token"}]);
    let pod = start(
        run,
        Api::new(),
        json!({"restartPolicy": "Never", "volumes": [{"name": "token", "projected": {"sources": [source]}}], "containers": [app]}),
    );
    let done = |s: &Value| s["phase"] == "Succeeded";
    pod.api.wait("another token", done).await;
    pod.delete().await;
}
