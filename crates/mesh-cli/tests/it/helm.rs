//! Beside a release of our own chart: what Helm owns stays Helm's.

use serde_json::{Value, json};

use super::installing::{Fate, get, played, send};

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// The chart's kinds, as a release brings them.
async fn release(client: &kube::Client) {
    let files = mesh_cli::chart::files().expect("a chart");
    let (_, text) = files
        .iter()
        .find(|(path, _)| path == "files/kinds.yaml")
        .expect("kinds");
    for mut kind in mesh_api::yaml::documents(text, "kinds").expect("YAML") {
        kind["metadata"]["labels"]["app.kubernetes.io/managed-by"] = json!("Helm");
        let annotations = &mut kind["metadata"]["annotations"];
        annotations["meta.helm.sh/release-name"] = json!("one");
        annotations["meta.helm.sh/release-namespace"] = json!("istio-system");
        send(client, "POST", CRDS, &kind).await.expect("a kind");
    }
}

async fn kinds(client: &kube::Client) -> Vec<Value> {
    let mut list = get(client, CRDS).await.expect("kinds");
    let items = list["items"].as_array_mut().expect("a list");
    for kind in items.iter_mut() {
        kind["metadata"]
            .as_object_mut()
            .expect("metadata")
            .remove("managedFields");
    }
    items.clone()
}

#[tokio::test]
async fn kinds_of_a_release_stay_its_own() {
    let (world, client, player) = played(Fate::Ready).await;
    release(&client).await;
    let before = kinds(&client).await;
    let out = world.mesh("install -y --set profile=minimal").await.ok();
    assert!(
        out.contains(
            "Resource kinds installed (16 objects: 1 created, 0 configured, 15 unchanged)"
        ),
        "{out}"
    );
    assert_eq!(kinds(&client).await, before);
    world.mesh("verify-install").await.ok();
    world.mesh("uninstall -y --purge").await.ok();
    assert_eq!(kinds(&client).await, before, "they go with the release");
    player.abort();
}

#[tokio::test]
async fn a_kind_of_a_release_of_another_version_stops_it() {
    let (world, client, player) = played(Fate::Ready).await;
    release(&client).await;
    let name = "sidecars.networking.istio.io";
    let path = format!("{CRDS}/{name}");
    let other = json!({ "spec": { "names": { "categories": ["old"] } } });
    send(&client, "PATCH", &path, &other)
        .await
        .expect("patched");
    let before = kinds(&client).await;
    let error = world.mesh("install -y --set profile=minimal").await.error();
    for part in [
        "nothing was changed",
        name,
        "Helm release \"one\" of namespace istio-system",
        "--force",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(kinds(&client).await, before);
    assert!(
        get(&client, "/api/v1/namespaces/istio-system")
            .await
            .is_none()
    );
    world
        .mesh("install -y --set profile=minimal --force")
        .await
        .ok();
    let now = get(&client, &path).await.expect("the kind");
    assert_eq!(
        now["metadata"]["labels"]["app.kubernetes.io/managed-by"],
        "mesh"
    );
    assert_ne!(now["spec"]["names"]["categories"], json!(["old"]));
    player.abort();
}
