//! Installing, changing and removing, against the API server, with somebody who does what a cluster's controllers and the control plane would do.

use std::collections::BTreeMap;
use std::time::Duration;

use kube::Client;
use serde_json::{Value, json};

use super::webhooks::{Mood, bundle};
use super::world::World;

/// How the Deployments of the cluster fare.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Ready,
    /// Their image is nowhere.
    NoImage,
    /// They are ready, and their control plane's certificate is not the one that it tells.
    Untrusted,
}

pub(super) async fn client(world: &World) -> Client {
    let file = kube::config::Kubeconfig::read_from(world.kubeconfig()).expect("kubeconfig");
    let config = kube::Config::from_custom_kubeconfig(file, &Default::default())
        .await
        .expect("configuration");
    Client::try_from(config).expect("client")
}

pub(super) async fn send(client: &Client, method: &str, path: &str, body: &Value) -> Option<Value> {
    let kind = match body {
        Value::Array(_) => "application/json-patch+json",
        _ if method == "PATCH" => "application/merge-patch+json",
        _ => "application/json",
    };
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", kind)
        .body(body.to_string().into_bytes())
        .expect("request");
    client.request(request).await.ok()
}

pub(super) async fn get(client: &Client, path: &str) -> Option<Value> {
    send(client, "GET", path, &Value::Null).await
}

fn items(list: Option<Value>) -> Vec<Value> {
    let list = list.unwrap_or_default();
    list["items"].as_array().cloned().unwrap_or_default()
}

/// Plays the cluster's controllers and the control plane.
async fn play(client: Client, fate: Fate) {
    loop {
        for deployment in items(get(&client, "/apis/apps/v1/deployments").await) {
            let text = |field: &str| {
                deployment["metadata"][field]
                    .as_str()
                    .expect("text")
                    .to_owned()
            };
            let (namespace, name) = (text("namespace"), text("name"));
            if fate == Fate::NoImage {
                no_image(&client, &namespace, &name, &deployment).await;
                continue;
            }
            let replicas = &deployment["spec"]["replicas"];
            let status = json!({
                "observedGeneration": deployment["metadata"]["generation"], "replicas": replicas,
                "updatedReplicas": replicas, "readyReplicas": replicas, "availableReplicas": replicas,
            });
            if deployment["status"]["observedGeneration"] != status["observedGeneration"] {
                let path =
                    format!("/apis/apps/v1/namespaces/{namespace}/deployments/{name}/status");
                send(&client, "PATCH", &path, &json!({ "status": status })).await;
            }
        }
        for kind in ["mutating", "validating"] {
            let all = format!("/apis/admissionregistration.k8s.io/v1/{kind}webhookconfigurations");
            for configuration in items(get(&client, &all).await) {
                take_over(&client, &all, &configuration, fate).await;
            }
        }
        for mut namespace in items(get(&client, "/api/v1/namespaces").await) {
            if !namespace["metadata"]["deletionTimestamp"].is_null() {
                namespace["spec"]["finalizers"] = json!([]);
                let name = namespace["metadata"]["name"].as_str().expect("name");
                let path = format!("/api/v1/namespaces/{name}/finalize");
                send(&client, "PUT", &path, &namespace).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What the control plane does once it serves its webhooks.
async fn take_over(client: &Client, all: &str, configuration: &Value, fate: Fate) {
    let mut patch = Vec::new();
    for (index, webhook) in configuration["webhooks"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        if webhook["clientConfig"]["caBundle"].is_null() {
            patch.push(json!({ "op": "add", "path": format!("/webhooks/{index}/clientConfig/caBundle"), "value": bundle(if fate == Fate::Untrusted { Mood::Untrusted } else { Mood::Answers }) }));
        }
        if webhook["failurePolicy"] == "Ignore" {
            patch.push(json!({ "op": "replace", "path": format!("/webhooks/{index}/failurePolicy"), "value": "Fail" }));
        }
    }
    if !patch.is_empty() {
        let name = configuration["metadata"]["name"].as_str().expect("name");
        send(client, "PATCH", &format!("{all}/{name}"), &patch.into()).await;
    }
}

async fn no_image(client: &Client, namespace: &str, name: &str, deployment: &Value) {
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": format!("{name}-0"), "labels": deployment["spec"]["template"]["metadata"]["labels"] },
        "spec": { "containers": [{ "name": "discovery", "image": "mesh:none" }] },
    });
    if send(client, "POST", &pods, &pod).await.is_some() {
        let waiting = json!({ "reason": "ImagePullBackOff", "message": "Back-off pulling image" });
        let status = json!({ "status": { "phase": "Pending", "containerStatuses": [{
            "name": "discovery", "image": "mesh:none", "imageID": "", "ready": false, "restartCount": 0, "state": { "waiting": waiting },
        }] } });
        send(client, "PATCH", &format!("{pods}/{name}-0/status"), &status).await;
    }
}

/// A cluster in which somebody plays.
pub(super) async fn played(fate: Fate) -> (World, Client, tokio::task::JoinHandle<()>) {
    let world = World::start().await;
    let client = client(&world).await;
    let player = tokio::spawn(play(client.clone(), fate));
    (world, client, player)
}

const KINDS: [&str; 16] = [
    "/api/v1/namespaces",
    "/api/v1/configmaps",
    "/api/v1/secrets",
    "/api/v1/services",
    "/api/v1/serviceaccounts",
    "/apis/apps/v1/deployments",
    "/apis/autoscaling/v2/horizontalpodautoscalers",
    "/apis/policy/v1/poddisruptionbudgets",
    "/apis/coordination.k8s.io/v1/leases",
    "/apis/rbac.authorization.k8s.io/v1/roles",
    "/apis/rbac.authorization.k8s.io/v1/rolebindings",
    "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
    "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
    "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
];

/// Every object of every kind that an installation touches, without what only counts writes.
pub(super) async fn everything(client: &Client) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    for kind in KINDS {
        for mut item in items(get(client, kind).await) {
            let metadata = item["metadata"].as_object_mut().expect("metadata");
            let text = |field: &str| {
                metadata
                    .get(field)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
            };
            let key = format!("{kind} {}/{}", text("namespace"), text("name"));
            for field in ["managedFields", "resourceVersion"] {
                metadata.remove(field);
            }
            all.insert(key, item);
        }
    }
    all
}

#[tokio::test]
async fn an_installation_comes_and_goes() {
    let (world, client, player) = played(Fate::Ready).await;
    let before = everything(&client).await;
    let out = world.mesh("install -y --set profile=demo").await.ok();
    for line in [
        "✔ Resource kinds installed (16 objects: 16 created, 0 configured, 0 unchanged)",
        "✔ Control plane installed",
        "✔ Ingress gateways installed",
        "✔ Egress gateways installed",
        "! Service istio-system/istio-ingressgateway has no address yet",
        "✔ Installation complete",
    ] {
        assert!(out.contains(line), "{line}\n{out}");
    }
    let installed = everything(&client).await;
    let again = world.mesh("install -y --set profile=demo").await.ok();
    assert!(
        !again.contains(" 1 configured") && !again.contains("created, 0 configured, 0 unchanged"),
        "{again}"
    );
    assert_eq!(
        everything(&client).await,
        installed,
        "installing again changes nothing"
    );
    let verified = world.mesh("verify-install").await.ok();
    assert!(
        verified.contains("objects of revision \"default\" are as they should be"),
        "{verified}"
    );
    // Somebody meddles.
    let path = "/apis/apps/v1/namespaces/istio-system/deployments/istiod";
    send(
        &client,
        "PATCH",
        path,
        &json!({ "spec": { "template": { "spec": { "serviceAccountName": "x" } } } }),
    )
    .await
    .expect("patched");
    send(
        &client,
        "DELETE",
        "/api/v1/namespaces/istio-system/services/istiod",
        &Value::Null,
    )
    .await
    .expect("deleted");
    let ran = world.mesh("verify-install").await;
    assert!(
        ran.out
            .contains("✘ Deployment istio-system/istiod: it was changed"),
        "{}",
        ran.out
    );
    assert!(
        ran.out
            .contains("✘ Service istio-system/istiod: it is missing"),
        "{}",
        ran.out
    );
    let repaired = world.mesh("install -y --set profile=demo").await.ok();
    assert!(repaired.contains("1 created, 1 configured"), "{repaired}");
    world.mesh("verify-install").await.ok();
    world.mesh("uninstall -y --purge").await.ok();
    player.abort();
    assert_eq!(
        everything(&client).await.keys().collect::<Vec<_>>(),
        before.keys().collect::<Vec<_>>()
    );
    let error = world.mesh("uninstall -y --purge").await.error();
    assert!(error.contains("nothing to remove"), "{error}");
    let error = world.mesh("verify-install").await.error();
    assert!(
        error.contains("there is no installation of revision \"default\""),
        "{error}"
    );
}

#[tokio::test]
async fn what_is_no_longer_wanted_goes() {
    let (world, client, player) = played(Fate::Ready).await;
    world.mesh("install -y --set profile=demo").await.ok();
    world
        .mesh("install -y --set profile=minimal -r canary")
        .await
        .ok();
    let dry = world.mesh("install --dry-run --set profile=minimal --set values.pilot.autoscaleEnabled=false --set components.pilot.k8s.replicaCount=2").await.ok();
    assert!(
        dry.contains("Deployment istio-system/istio-egressgateway would be removed"),
        "{dry}"
    );
    assert!(dry.contains("-  replicas: 1\n+  replicas: 2\n"), "{dry}");
    let before = everything(&client).await;
    let out = world.mesh("install -y --set profile=minimal").await.ok();
    assert!(
        out.contains("✔ Removed what is no longer part of it"),
        "{out}"
    );
    let after = everything(&client).await;
    let gone: Vec<&String> = before
        .keys()
        .filter(|key| !after.contains_key(*key))
        .collect();
    // Deployment, Service, PodDisruptionBudget, ServiceAccount, Role and RoleBinding of each gateway.
    assert_eq!(gone.len(), 12, "{gone:?}");
    assert!(gone.iter().all(|key| key.contains("gateway")), "{gone:?}");
    // The other revision is untouched, and stays when this one goes.
    let of_canary = |all: &BTreeMap<String, Value>| -> Vec<Value> {
        all.iter()
            .filter(|(key, _)| key.contains("canary"))
            .map(|(_, value)| value.clone())
            .collect()
    };
    assert!(!of_canary(&before).is_empty());
    assert_eq!(of_canary(&before), of_canary(&after));
    world.mesh("uninstall -y").await.ok();
    let rest = everything(&client).await;
    assert_eq!(of_canary(&before), of_canary(&rest));
    assert!(!rest.contains_key("/apis/apps/v1/deployments istio-system/istiod"));
    assert!(rest.contains_key("/api/v1/namespaces /istio-system"));
    let verified = world.mesh("verify-install -r canary").await.ok();
    assert!(verified.contains("\"canary\""), "{verified}");
    player.abort();
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let world = World::start().await;
    let client = client(&world).await;
    let before = everything(&client).await;
    let out = world.mesh("install --dry-run").await.ok();
    assert!(
        out.contains("Deployment istio-system/istiod would be created"),
        "{out}"
    );
    assert!(out.ends_with("Dry run: nothing was changed\n"), "{out}");
    assert_eq!(everything(&client).await, before);
}

#[tokio::test]
async fn an_upgrade_keeps_what_was_asked_for() {
    let (world, client, player) = played(Fate::Ready).await;
    let error = world.mesh("upgrade -y").await.error();
    assert!(
        error.contains("there is no installation of revision \"default\""),
        "{error}"
    );
    let settings = "--set profile=minimal --set components.base.enabled=false --set components.pilot.k8s.nodeSelector.disk=ssd";
    world.mesh(&format!("install -y {settings}")).await.ok();
    let record = "/api/v1/namespaces/istio-system/configmaps/mesh-installed-state";
    let newer = json!({ "data": { "version": "999.0.0" } });
    send(&client, "PATCH", record, &newer)
        .await
        .expect("patched");
    let error = world.mesh("upgrade -y").await.error();
    assert!(error.contains("version 999.0.0 is installed"), "{error}");
    let spec = get(&client, record).await.expect("record")["data"]["spec"]
        .as_str()
        .expect("spec")
        .to_owned();
    let version = env!("CARGO_PKG_VERSION");
    let older = json!({ "data": { "version": "0.0.9", "spec": spec.replace(&format!("tag: {version}"), "tag: 0.0.9") } });
    send(&client, "PATCH", record, &older)
        .await
        .expect("patched");
    world.mesh("upgrade -y").await.ok();
    let deployment = get(
        &client,
        "/apis/apps/v1/namespaces/istio-system/deployments/istiod",
    )
    .await
    .expect("istiod");
    let pod = &deployment["spec"]["template"]["spec"];
    assert_eq!(pod["nodeSelector"]["disk"], "ssd");
    assert_eq!(pod["containers"][0]["image"], format!("mesh:{version}"));
    player.abort();
}

#[tokio::test]
async fn what_it_waits_for_is_named() {
    let (world, client, player) = played(Fate::NoImage).await;
    let error = world
        .mesh("install -y --readiness-timeout 1s")
        .await
        .error();
    for part in [
        "Deployment istio-system/istiod is not ready in time",
        "pod istiod-0, container discovery: ImagePullBackOff (Back-off pulling image)",
        "the node has no image mesh:none: load it",
    ] {
        assert!(error.contains(part), "{error}");
    }
    player.abort();
    let ran = world.mesh("verify-install").await;
    assert!(
        ran.out
            .contains("✘ Deployment istio-system/istiod: pod istiod-0"),
        "{}",
        ran.out
    );
    // The next one goes on from there.
    let player = tokio::spawn(play(client, Fate::Ready));
    world.mesh("install -y").await.ok();
    player.abort();
}

/// Only an answer counts, whatever else comes back.
#[tokio::test]
async fn a_webhook_that_nobody_answers_is_named() {
    for (fate, mood, part) in [
        (Fate::Ready, Mood::Refuses, "connection refused"),
        (Fate::Ready, Mood::Fails, "503 Service Unavailable: not yet"),
        (Fate::Untrusted, Mood::Answers, "caBundle trusts"),
    ] {
        let (world, client, player) = played(fate).await;
        world.webhooks.behave(mood);
        let install = "install -y --set profile=minimal --readiness-timeout 5s";
        let error = world.mesh(install).await.error();
        let expected =
            "the API server gets no answer from the control plane's webhook validation.istio.io";
        assert!(error.contains(expected) && error.contains(part), "{error}");
        if mood == Mood::Refuses {
            // The injector alone is looked at too.
            let alone = world
                .mesh(&format!(
                    "{install} --set values.global.configValidation=false"
                ))
                .await
                .error();
            assert!(
                alone.contains("webhook sidecar-injector.istio.io") && alone.contains(part),
                "{alone}"
            );
            // Once it answers, the next one goes on from there.
            world.webhooks.behave(Mood::Answers);
            world.mesh(install).await.ok();
            assert!(
                everything(&client)
                    .await
                    .keys()
                    .all(|key| !key.contains("probe"))
            );
        }
        player.abort();
    }
}

/// A server that is busy for a moment stops nothing.
#[tokio::test]
async fn a_busy_server_is_waited_for() {
    let (world, _, player) = played(Fate::Ready).await;
    let busy = std::sync::Arc::clone(&world.busy);
    let again = tokio::spawn(async move {
        loop {
            busy.store(3, std::sync::atomic::Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
    });
    world.mesh("install -y --set profile=minimal").await.ok();
    world.mesh("verify-install").await.ok();
    world.mesh("uninstall -y --purge").await.ok();
    again.abort();
    player.abort();
}

/// A program that is built anew makes new pods, though its images have the same tag.
#[tokio::test]
async fn another_build_rolls_out() {
    let (world, client, player) = played(Fate::Ready).await;
    world.mesh("install -y --set profile=minimal").await.ok();
    let path = "/apis/apps/v1/namespaces/istio-system/deployments/istiod";
    let template = "/spec/template/metadata/annotations/install.mesh~1build";
    let build = |live: Option<Value>| live.expect("istiod").pointer(template).cloned();
    let ours = build(get(&client, path).await).expect("a build");
    let other = json!([{ "op": "replace", "path": template, "value": "0123456789abcdef" }]);
    send(&client, "PATCH", path, &other).await.expect("patched");
    // It is as whoever installed it left it.
    world.mesh("verify-install").await.ok();
    let out = world.mesh("install -y --set profile=minimal").await.ok();
    assert!(out.contains("0 created, 1 configured"), "{out}");
    assert_eq!(build(get(&client, path).await), Some(ours.clone()));
    let text = world
        .mesh("manifest generate --set profile=minimal")
        .await
        .ok();
    assert!(text.contains(&format!(
        "install.mesh/build: {}",
        ours.as_str().expect("text")
    )));
    player.abort();
}

#[tokio::test]
async fn a_kubeconfig_that_is_not_there_is_named_once() {
    let world = World::start().await;
    std::fs::remove_file(world.kubeconfig()).expect("kubeconfig");
    let error = world.mesh("install -y").await.error();
    assert_eq!(error.matches("No such file").count(), 1, "{error}");
    assert!(error.starts_with("reading the kubeconfig: /"), "{error}");
}

#[tokio::test]
async fn another_mesh_is_left_alone() {
    let (world, client, player) = played(Fate::Ready).await;
    let pod = json!({ "metadata": { "labels": { "app": "istiod" } }, "spec": { "containers": [{ "name": "discovery", "image": "pilot" }] } });
    let theirs = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": "istiod", "namespace": "istio-system", "labels": { "app": "istiod", "istio.io/rev": "default" } },
        "spec": { "selector": { "matchLabels": { "app": "istiod" } }, "template": pod },
    });
    let namespace =
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "istio-system" } });
    send(&client, "POST", "/api/v1/namespaces", &namespace)
        .await
        .expect("namespace");
    send(
        &client,
        "POST",
        "/apis/apps/v1/namespaces/istio-system/deployments",
        &theirs,
    )
    .await
    .expect("deployment");
    let keys = everything(&client).await.into_keys().collect::<Vec<_>>();
    let error = world.mesh("install -y").await.error();
    assert!(error.contains("another mesh is here: control plane istio-system/istiod of revision \"default\": nothing was changed"), "{error}");
    assert_eq!(
        everything(&client).await.into_keys().collect::<Vec<_>>(),
        keys
    );
    // Beside it there is room; its namespace stays when ours goes.
    world
        .mesh("install -y -r ours --set profile=minimal")
        .await
        .ok();
    world.mesh("uninstall -y --purge").await.ok();
    let rest = everything(&client).await;
    assert!(rest.contains_key("/apis/apps/v1/deployments istio-system/istiod"));
    assert!(rest.contains_key("/api/v1/namespaces /istio-system"));
    assert!(
        !rest.keys().any(|key| key.contains("ours")),
        "{:?}",
        rest.keys()
    );
    player.abort();
}

#[tokio::test]
async fn without_rights_nothing_happens() {
    let world = World::start().await;
    let client = client(&world).await;
    let before = everything(&client).await;
    let error = world.nobody("install -y").await.error();
    assert!(
        error.contains("you may not") && error.contains("nothing was changed"),
        "{error}"
    );
    assert_eq!(everything(&client).await, before);
}

#[tokio::test]
async fn a_cluster_that_is_away_is_named() {
    let world = World::start().await;
    // Privileged, and with a service that nobody has (tcpmux), so that no other test gets it.
    let free = "127.0.0.1:1";
    let text = std::fs::read_to_string(world.kubeconfig()).expect("kubeconfig");
    let server = text.split('"').nth(1).expect("server").to_owned();
    std::fs::write(
        world.kubeconfig(),
        text.replace(&server, &format!("http://{free}")),
    )
    .expect("kubeconfig");
    let error = world.mesh("install -y").await.error();
    assert!(
        error.contains("looking at the cluster: nothing was changed"),
        "{error}"
    );
    assert!(error.contains("is the cluster running?"), "{error}");
}

#[tokio::test]
async fn settings_are_checked_before_the_cluster() {
    let world = World::start().await;
    for (line, part) in [
        (
            "install -y --set profile=big",
            "there is no profile \"big\"",
        ),
        (
            "install -y --set values.global.hubb=x",
            "did you mean values.global.hub?",
        ),
        ("install -y --set profile=empty", "installs nothing"),
        ("install -y --readiness-timeout soon", "is not a time"),
    ] {
        let error = world.mesh(line).await.error();
        assert!(error.contains(part), "{line}: {error}");
    }
}
