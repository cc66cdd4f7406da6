//! Two installations of one cluster at the same time.

use std::time::Duration;

use serde_json::{Value, json};

use super::installing::{Fate, client, everything, get, played, send};
use super::world::World;

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/default/leases";

async fn lease(client: &kube::Client) -> Option<Value> {
    get(client, &format!("{LEASES}/mesh-install")).await
}

/// An installation that has begun, and waits for its pods.
async fn waiting(client: &kube::Client) {
    for _ in 0..600 {
        let istiod = "/apis/apps/v1/namespaces/istio-system/deployments/istiod";
        if get(client, istiod).await.is_some() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the installation does not begin");
}

#[tokio::test]
async fn the_second_is_told_of_the_first() {
    let (world, client, player) = played(Fate::NoImage).await;
    let first = async {
        let ran = world.mesh("install -y --readiness-timeout 600s").await;
        ran.error()
    };
    let second = async {
        waiting(&client).await;
        let held = lease(&client).await.expect("a Lease");
        let holder = held["spec"]["holderIdentity"].as_str().expect("a holder");
        assert!(holder.starts_with("mesh install of "), "{holder}");
        let keys = async || everything(&client).await.into_keys().collect::<Vec<_>>();
        let before = keys().await;
        for command in ["install -y", "upgrade -y", "uninstall -y --purge"] {
            let error = world.mesh(command).await.error();
            for part in [
                holder,
                "is under way",
                "nothing was changed",
                "--force-lock",
            ] {
                assert!(error.contains(part), "{command}: {part}: {error}");
            }
        }
        // Who only looks is let in.
        world.mesh("uninstall --purge --dry-run").await.ok();
        world.mesh("install --dry-run").await.ok();
        assert_eq!(keys().await, before);
        let ran = world.mesh("install -y --force-lock --readiness-timeout 1s");
        let error = ran.await.error();
        assert!(error.contains("not ready in time"), "{error}");
    };
    let first = tokio::time::timeout(Duration::from_secs(120), first);
    let (error, ()) = tokio::join!(first, second);
    let error = error.expect("the first notices");
    assert!(error.contains("over: stopped half way"), "{error}");
    assert!(lease(&client).await.is_none());
    player.abort();
}

#[tokio::test]
async fn a_failure_leaves_no_lock() {
    let (world, client, player) = played(Fate::NoImage).await;
    let error = world
        .mesh("install -y --readiness-timeout 1s")
        .await
        .error();
    assert!(error.contains("not ready in time"), "{error}");
    assert!(lease(&client).await.is_none());
    player.abort();
}

fn of_another(renewed: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": { "name": "mesh-install", "namespace": "default" },
        "spec": { "holderIdentity": "somebody", "leaseDurationSeconds": 30, "acquireTime": renewed, "renewTime": renewed },
    })
}

#[tokio::test]
async fn who_was_killed_is_forgotten() {
    let (world, client, player) = played(Fate::Ready).await;
    let dead = of_another("2026-01-02T03:04:05.000000Z");
    send(&client, "POST", LEASES, &dead).await.expect("a Lease");
    world.mesh("install -y --set profile=minimal").await.ok();
    assert!(lease(&client).await.is_none());
    player.abort();
}

#[tokio::test]
async fn who_lives_is_not() {
    let world = World::start().await;
    let client = client(&world).await;
    // Its clock is wrong, but it renews.
    let before = of_another("2026-01-02T03:04:05.000000Z");
    send(&client, "POST", LEASES, &before)
        .await
        .expect("a Lease");
    let renewing = async {
        for round in 0..600 {
            let time = format!("2026-01-02T04:{:02}:{:02}.000000Z", round / 60, round % 60);
            let renewed = json!({ "spec": { "renewTime": time } });
            let path = format!("{LEASES}/mesh-install");
            send(&client, "PATCH", &path, &renewed).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let error = tokio::select! {
        ran = world.mesh("install -y") => ran.error(),
        () = renewing => panic!("too late"),
    };
    assert!(error.contains("`somebody`, begun at"), "{error}");
    let left = lease(&client).await.expect("it stays");
    assert_eq!(left["spec"]["holderIdentity"], "somebody");
}
