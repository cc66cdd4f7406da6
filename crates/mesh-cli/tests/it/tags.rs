//! Tags, and control planes side by side.

use std::collections::BTreeSet;

use kube::Client;
use serde_json::{Value, json};

use super::installing::{Fate, everything, get, played, send};

async fn namespace(client: &Client, name: &str, label: &str, value: &str) {
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": { label: value } } });
    send(client, "POST", "/api/v1/namespaces", &namespace)
        .await
        .expect("namespace");
}

/// The control planes that are asked to inject a new pod of a namespace, by their Services.
async fn injectors(client: &Client, namespace: &str) -> BTreeSet<String> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "try", "namespace": namespace, "annotations": { "kept": "x" } },
        "spec": { "containers": [{ "name": "app", "image": "app" }] },
    });
    let path = format!("/api/v1/namespaces/{namespace}/pods?dryRun=All");
    let pod = send(client, "POST", &path, &pod).await.expect("a pod");
    let all = pod["metadata"]["annotations"]
        .as_object()
        .expect("annotations");
    all.keys()
        .filter(|key| key.starts_with("istiod"))
        .cloned()
        .collect()
}

fn only(service: &str) -> BTreeSet<String> {
    BTreeSet::from([service.to_owned()])
}

const MUTATING: &str = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";
const VALIDATING: &str = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";

#[tokio::test]
async fn a_tag_chooses_the_control_plane() {
    let (world, client, player) = played(Fate::Ready).await;
    let error = world.mesh("tag set prod --revision default").await.error();
    assert!(
        error.contains(
            "no control plane of revision \"default\" in namespace istio-system; none is installed"
        ),
        "{error}"
    );
    world.mesh("install -y --set profile=minimal").await.ok();
    world
        .mesh("install -y --set profile=minimal -r canary")
        .await
        .ok();
    namespace(&client, "shop", "istio.io/rev", "prod").await;
    assert_eq!(injectors(&client, "shop").await, BTreeSet::new());
    world.mesh("tag set prod --revision default").await.ok();
    assert_eq!(injectors(&client, "shop").await, only("istiod"));

    let error = world.mesh("tag set prod --revision canary").await.error();
    assert!(
        error.contains("tag \"prod\" stands for revision \"default\": --overwrite"),
        "{error}"
    );
    let error = world.mesh("tag set prod -r nope --overwrite").await.error();
    assert!(error.contains("there are canary, default"), "{error}");
    let error = world.mesh("tag set canary -r default").await.error();
    assert!(error.contains("\"canary\" is a revision"), "{error}");
    let error = world
        .mesh("tag set x -r default --auto-inject-namespaces")
        .await
        .error();
    assert!(error.contains("those of the tag default"), "{error}");

    let text = world
        .mesh("tag generate prod -r canary --overwrite")
        .await
        .ok();
    let objects = mesh_api::yaml::documents(&text, "out").expect("YAML");
    assert_eq!(objects.len(), 1);
    assert_eq!(objects[0]["metadata"]["name"], "istio-revision-tag-prod");
    assert_eq!(objects[0]["metadata"]["labels"]["istio.io/tag"], "prod");
    assert_eq!(objects[0]["metadata"]["labels"]["istio.io/rev"], "canary");
    assert_eq!(
        injectors(&client, "shop").await,
        only("istiod"),
        "printed only"
    );

    world
        .mesh("tag set prod --revision canary --overwrite")
        .await
        .ok();
    assert_eq!(injectors(&client, "shop").await, only("istiod-canary"));
    let list = world.mesh("tag list").await.ok();
    assert_eq!(
        list.split_whitespace().collect::<Vec<_>>(),
        ["TAG", "REVISION", "NAMESPACES", "prod", "canary", "shop"],
        "{list}"
    );
    let list = world.mesh("tag show -o json").await.ok();
    let list: Value = serde_json::from_str(&list).expect("JSON");
    assert_eq!(
        list,
        json!([{ "tag": "prod", "revision": "canary", "namespaces": ["shop"] }])
    );
    world.mesh("tag remove prod -y").await.ok();
    assert_eq!(injectors(&client, "shop").await, BTreeSet::new());
    let error = world.mesh("tag remove prod -y").await.error();
    assert!(
        error.contains("there is no tag \"prod\"; there are no tags"),
        "{error}"
    );
    player.abort();
}

/// The tag `default` makes another revision answer where none is named, and gives that back when it goes.
#[tokio::test]
async fn the_default_can_be_another_revision() {
    let (world, client, player) = played(Fate::Ready).await;
    world.mesh("install -y --set profile=minimal").await.ok();
    world
        .mesh("install -y --set profile=minimal -r canary")
        .await
        .ok();
    namespace(&client, "old", "istio-injection", "enabled").await;
    assert_eq!(injectors(&client, "old").await, only("istiod"));
    world.mesh("tag set default --revision canary").await.ok();
    assert_eq!(injectors(&client, "old").await, only("istiod-canary"));
    let list = world.mesh("tag list").await.ok();
    assert!(list.contains("default") && list.contains("old"), "{list}");
    let validators = get(&client, &format!("{VALIDATING}/istiod-default-validator")).await;
    let webhook = &validators.expect("a validator")["webhooks"][0];
    assert_eq!(webhook["clientConfig"]["service"]["name"], "istiod-canary");
    assert_eq!(webhook["failurePolicy"], "Fail");
    let own = format!("{VALIDATING}/istio-validator-istio-system");
    let own = get(&client, &own).await.expect("a validator");
    assert_eq!(
        own["webhooks"][0]["objectSelector"]["matchExpressions"][0]["values"][0],
        "default"
    );

    // Neither the revision's own installation nor its check undo that.
    world.mesh("verify-install").await.ok();
    let again = world.mesh("install -y --set profile=minimal").await.ok();
    assert!(!again.contains("1 configured"), "{again}");
    assert_eq!(injectors(&client, "old").await, only("istiod-canary"));
    world.mesh("tag remove default -y").await.ok();
    assert_eq!(injectors(&client, "old").await, only("istiod"));
    world.mesh("verify-install").await.ok();
    assert!(
        get(&client, &format!("{VALIDATING}/istiod-default-validator"))
            .await
            .is_none()
    );

    // The same when its revision goes.
    world.mesh("tag set default --revision canary").await.ok();
    world.mesh("uninstall -y -r canary").await.ok();
    assert_eq!(injectors(&client, "old").await, only("istiod"));
    world.mesh("verify-install").await.ok();
    player.abort();
}

/// Whoever comes first answers where no revision is named; the installation's own tags come and go with it.
#[tokio::test]
async fn installations_have_tags() {
    let (world, client, player) = played(Fate::Ready).await;
    let install = "install -y --set profile=minimal -r 1-2-0";
    let with_tag = format!("{install} --set values.revisionTags={{stable}}");
    world.mesh(&with_tag).await.ok();
    namespace(&client, "any", "istio-injection", "enabled").await;
    namespace(&client, "careful", "istio.io/rev", "stable").await;
    assert_eq!(injectors(&client, "any").await, only("istiod-1-2-0"));
    assert_eq!(injectors(&client, "careful").await, only("istiod-1-2-0"));
    world.mesh(&with_tag).await.ok();
    assert_eq!(injectors(&client, "any").await, only("istiod-1-2-0"));
    let error = world
        .mesh("install -y --set profile=minimal --set values.revisionTags={stable}")
        .await
        .error();
    assert!(
        error.contains("tag \"stable\" stands for revision \"1-2-0\": nothing was changed"),
        "{error}"
    );
    // The default revision that comes later does not take over by itself.
    world.mesh("install -y --set profile=minimal").await.ok();
    assert_eq!(injectors(&client, "any").await, only("istiod-1-2-0"));
    world.mesh(install).await.ok();
    assert_eq!(injectors(&client, "careful").await, BTreeSet::new());
    world.mesh("uninstall -y -r 1-2-0").await.ok();
    assert_eq!(injectors(&client, "any").await, only("istiod"));
    let left = get(&client, &format!("{MUTATING}?labelSelector=istio.io/tag")).await;
    assert_eq!(left.expect("a list")["items"], json!([]));
    let error = world
        .mesh("manifest generate -r a --set values.revisionTags={a}")
        .await
        .error();
    assert!(error.contains("the revision's own name"), "{error}");
    let error = world
        .mesh("manifest generate -r a --set values.defaultRevision=b")
        .await
        .error();
    assert!(
        error.contains("mesh tag set default --revision b"),
        "{error}"
    );
    let text = world
        .mesh("manifest generate -r a --set values.defaultRevision=a")
        .await
        .ok();
    assert!(
        text.contains("name: istio-revision-tag-default\n"),
        "{text}"
    );
    player.abort();
}

/// A revision that comes and goes beside another leaves it whole: its gateways have the same names, and are given back.
#[tokio::test]
async fn a_canary_leaves_nothing_behind() {
    let (world, client, player) = played(Fate::Ready).await;
    world.mesh("install -y").await.ok();
    let before = everything(&client).await;
    world.mesh("install -y -r canary").await.ok();
    let beside = everything(&client).await;
    for name in [
        "deployments istio-system/istiod-canary",
        "configmaps istio-system/istio-canary",
        "configmaps istio-system/istio-sidecar-injector-canary",
        "mutatingwebhookconfigurations /istio-sidecar-injector-canary",
    ] {
        assert!(beside.keys().any(|key| key.ends_with(name)), "{name}");
    }
    let gateway = "/apis/apps/v1/deployments istio-system/istio-ingressgateway";
    let revision = |all: &std::collections::BTreeMap<String, Value>| {
        all[gateway]["metadata"]["labels"]["istio.io/rev"].clone()
    };
    assert_eq!(revision(&beside), "canary");
    let out = world.mesh("uninstall -y -r canary").await.ok();
    assert!(
        out.contains("Deployment istio-system/istio-ingressgateway is to be given back to revision \"default\""),
        "{out}"
    );
    let after = everything(&client).await;
    assert_eq!(
        after.keys().collect::<Vec<_>>(),
        before.keys().collect::<Vec<_>>()
    );
    assert_eq!(revision(&after), "default");
    world.mesh("verify-install").await.ok();
    player.abort();
}
