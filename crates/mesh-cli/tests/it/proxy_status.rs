//! Proxies and their control planes, of which a node tells.

use std::process::ExitCode;

use serde_json::json;

use super::installing::{client, send};
use super::world::World;

/// A cluster with a control plane and two pods.
async fn world() -> World {
    let world = World::start().await;
    let client = client(&world).await;
    let namespace =
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "istio-system" } });
    send(&client, "POST", "/api/v1/namespaces", &namespace)
        .await
        .expect("a namespace");
    for (namespace, name, labels) in [
        (
            "istio-system",
            "istiod-0",
            json!({ "app": "istiod", "istio.io/rev": "default" }),
        ),
        ("default", "one", json!({})),
        ("default", "two", json!({})),
        ("default", "three", json!({})),
    ] {
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": labels },
            "spec": { "nodeName": "mesh-node", "containers": [{ "name": "a", "image": "a:1" }] },
        });
        send(&client, "POST", &path, &pod).await.expect("a pod");
        let running = json!({ "status": { "phase": "Running" } });
        send(&client, "PATCH", &format!("{path}/{name}/status"), &running)
            .await
            .expect("a status");
    }
    world
}

#[tokio::test]
async fn proxies_are_listed() {
    let world = world().await;
    let out = world.mesh("proxy-status").await.ok();
    assert_eq!(
        out,
        "NAME          CLUSTER      ISTIOD     VERSION   SUBSCRIBED TYPES\n\
         one.default   Kubernetes   istiod-0   1.2.3     2 (CDS,LDS)\n\
         two.default   Kubernetes   istiod-0   1.2.3     0 ()\n"
    );
    let out = world.mesh("proxy-status -v 1 -r default").await.ok();
    let first = out.lines().nth(1).expect("a row");
    let words: Vec<&str> = first.split_whitespace().collect();
    assert!(words.join(" ").contains("SYNCED NACK NOT SENT"), "{out}");
    let out = world.mesh("proxy-status -o json").await.ok();
    let all: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(all[0]["types"]["LDS"], "NACK");
    let error = world.mesh("proxy-status -r canary").await.error();
    assert!(
        error.contains("no control plane of revision \"canary\" runs in namespace istio-system"),
        "{error}"
    );
}

#[tokio::test]
async fn one_proxy_is_compared() {
    let world = world().await;
    let out = world.mesh("proxy-status one").await.ok();
    assert!(
        out.starts_with("Clusters Match\nListeners Match\n"),
        "{out}"
    );
    let ran = world.mesh("proxy-status two.default").await;
    let code = ran.result.expect("an answer");
    assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::FAILURE));
    for part in [
        "Clusters Don't Match\n--- Control plane Clusters\n+++ Proxy Clusters\n",
        "-  connect_timeout: 20s\n+  connect_timeout: 10s\n",
        "Routes Match\n",
    ] {
        assert!(ran.out.contains(part), "{}", ran.out);
    }
    let error = world.mesh("proxy-status three").await.error();
    assert!(error.contains("three.default is not connected"), "{error}");
}
