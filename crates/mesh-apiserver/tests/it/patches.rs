//! The four kinds of patch.

use serde_json::{Value, json};

use crate::support::{Answer, Api, CONFIG_MAPS, DEPLOYMENTS, config_map, deployment};

#[tokio::test]
async fn json_and_merge_patches() {
    let api = Api::new();
    let at = format!("{CONFIG_MAPS}/a");
    api.post(CONFIG_MAPS, &config_map("a", json!({ "k": "1", "l": "2" })))
        .await
        .ok();
    let patch = json!([{ "op": "test", "path": "/data/k", "value": "1" }, { "op": "remove", "path": "/data/l" }]);
    assert_eq!(
        api.patch(&at, "json-patch", &patch).await.ok()["data"],
        json!({ "k": "1" })
    );
    api.patch(&at, "json-patch", &patch).await.fails(422);
    let merged = api
        .patch(
            &at,
            "merge-patch",
            &json!({ "data": { "k": null, "m": "3" } }),
        )
        .await
        .ok();
    assert_eq!(merged["data"], json!({ "m": "3" }));
    let stale = json!({ "metadata": { "resourceVersion": "1" }, "data": { "m": "4" } });
    api.patch(&at, "merge-patch", &stale).await.fails(409);
    api.patch(&at, "merge-patch", &json!([])).await.fails(400);
    api.patch(&at, "unheard-of", &json!({})).await.fails(415);
    api.patch(&format!("{CONFIG_MAPS}/none"), "merge-patch", &json!({}))
        .await
        .fails(404);
}

/// Name, the pod template's spec before, the patch to it, the part to look at, what it must be.
type Case = (&'static str, Value, Value, &'static str, Value);

#[tokio::test]
async fn strategic_merge_patches() {
    let two =
        json!({ "containers": [{ "name": "a", "image": "a:1" }, { "name": "b", "image": "b:1" }] });
    let cases: Vec<Case> = vec![
        (
            "a keyed item is merged",
            two.clone(),
            json!({ "containers": [{ "name": "b", "image": "b:2" }] }),
            "/containers/1/image",
            json!("b:2"),
        ),
        (
            "the others stay",
            two.clone(),
            json!({ "containers": [{ "name": "b", "image": "b:2" }] }),
            "/containers/0/image",
            json!("a:1"),
        ),
        (
            "an item is deleted",
            two.clone(),
            json!({ "containers": [{ "name": "a", "$patch": "delete" }] }),
            "/containers/0/name",
            json!("b"),
        ),
        (
            "a list is replaced",
            two.clone(),
            json!({ "containers": [{ "$patch": "replace" }, { "name": "c", "image": "c:1" }] }),
            "/containers/0/name",
            json!("c"),
        ),
        (
            "the order is set",
            two.clone(),
            json!({ "$setElementOrder/containers": [{ "name": "b" }, { "name": "a" }], "containers": [{ "name": "b", "tty": true }] }),
            "/containers/0/name",
            json!("b"),
        ),
        (
            "a new item goes to its place",
            two.clone(),
            json!({ "$setElementOrder/containers": [{ "name": "c" }, { "name": "a" }, { "name": "b" }],
                    "containers": [{ "name": "c", "image": "c:1" }] }),
            "/containers/0/name",
            json!("c"),
        ),
        (
            "null removes a field",
            json!({ "containers": [{ "name": "a", "image": "a:1", "tty": true }] }),
            json!({ "containers": [{ "name": "a", "tty": null }] }),
            "/containers/0/tty",
            Value::Null,
        ),
        (
            "an atomic list is replaced",
            json!({ "containers": [{ "name": "a", "image": "a:1", "command": ["x", "y"] }] }),
            json!({ "containers": [{ "name": "a", "command": ["z"] }] }),
            "/containers/0/command",
            json!(["z"]),
        ),
        (
            "retainKeys clears the rest",
            json!({ "containers": [{ "name": "a", "image": "a:1" }], "volumes": [{ "name": "v", "hostPath": { "path": "/x" } }] }),
            json!({ "volumes": [{ "name": "v", "$retainKeys": ["name", "configMap"], "configMap": { "name": "c" } }] }),
            "/volumes/0/hostPath",
            Value::Null,
        ),
        (
            "a map is replaced",
            json!({ "containers": [{ "name": "a", "image": "a:1" }], "nodeSelector": { "a": "b" } }),
            json!({ "nodeSelector": { "$patch": "replace", "c": "d" } }),
            "/nodeSelector",
            json!({ "c": "d" }),
        ),
    ];
    for (name, before, patch, pointer, expected) in cases {
        let api = Api::new();
        let mut object = deployment("d");
        object["spec"]["template"]["spec"] = before;
        api.post(DEPLOYMENTS, &object).await.ok();
        let patch = json!({ "spec": { "template": { "spec": patch } } });
        let answer = api
            .patch(&format!("{DEPLOYMENTS}/d"), "strategic-merge-patch", &patch)
            .await
            .ok();
        let found = answer["spec"]["template"]["spec"]
            .pointer(pointer)
            .cloned()
            .unwrap_or_default();
        assert_eq!(found, expected, "{name}");
    }
}

#[tokio::test]
async fn strategic_primitive_lists_and_mistakes() {
    let api = Api::new();
    let mut object = config_map("a", json!({}));
    object["metadata"]["finalizers"] = json!(["x/a", "x/b"]);
    api.post(CONFIG_MAPS, &object).await.ok();
    let at = format!("{CONFIG_MAPS}/a");
    let patch = json!({ "metadata": { "$deleteFromPrimitiveList/finalizers": ["x/a"], "finalizers": ["x/c"] } });
    let answer = api.patch(&at, "strategic-merge-patch", &patch).await.ok();
    assert_eq!(answer["metadata"]["finalizers"], json!(["x/b", "x/c"]));
    api.patch(
        &at,
        "strategic-merge-patch",
        &json!({ "data": { "$patch": "explode" } }),
    )
    .await
    .fails(400);
    api.post(DEPLOYMENTS, &deployment("d")).await.ok();
    let keyless =
        json!({ "spec": { "template": { "spec": { "containers": [{ "image": "x" }] } } } });
    let error = api
        .patch(
            &format!("{DEPLOYMENTS}/d"),
            "strategic-merge-patch",
            &keyless,
        )
        .await
        .fails(400);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("does not contain declared merge key: name"),
        "{error}"
    );
}

async fn apply(api: &Api, manager: &str, force: bool, body: &Value) -> Answer {
    let name = body["metadata"]["name"].as_str().unwrap();
    let base = if body["kind"] == "Deployment" {
        DEPLOYMENTS
    } else {
        CONFIG_MAPS
    };
    api.patch(
        &format!("{base}/{name}?fieldManager={manager}&force={force}"),
        "apply",
        body,
    )
    .await
}

#[tokio::test]
async fn apply_owns_conflicts_and_lets_go() {
    let api = Api::new();
    let created = apply(
        &api,
        "one",
        false,
        &config_map("a", json!({ "x": "1", "y": "1" })),
    )
    .await;
    assert_eq!(created.code, 201);
    let fields = &created.ok()["metadata"]["managedFields"][0];
    assert_eq!(
        (&fields["manager"], &fields["operation"]),
        (&json!("one"), &json!("Apply"))
    );
    assert_eq!(
        fields["fieldsV1"],
        json!({ "f:data": { "f:x": {}, "f:y": {} } })
    );

    let conflict = apply(&api, "two", false, &config_map("a", json!({ "x": "2" })))
        .await
        .fails(409);
    assert_eq!(
        conflict["message"],
        "Apply failed with 1 conflict: conflict with \"one\": .data.x"
    );
    assert_eq!(
        conflict["details"]["causes"][0]["reason"],
        "FieldManagerConflict"
    );
    assert_eq!(conflict["details"]["causes"][0]["field"], ".data.x");
    // The same value is no conflict: both own it.
    apply(&api, "two", false, &config_map("a", json!({ "y": "1" })))
        .await
        .ok();
    apply(
        &api,
        "two",
        true,
        &config_map("a", json!({ "x": "2", "y": "1" })),
    )
    .await
    .ok();

    // What one no longer names goes, unless two owns it too.
    let less = apply(&api, "one", false, &config_map("a", json!({ "z": "1" })))
        .await
        .ok();
    assert_eq!(less["data"], json!({ "x": "2", "y": "1", "z": "1" }));
    let less = apply(&api, "two", false, &config_map("a", json!({})))
        .await
        .ok();
    assert_eq!(less["data"], json!({ "z": "1" }));
    let again = apply(&api, "one", false, &config_map("a", json!({ "z": "1" })))
        .await
        .ok();
    assert_eq!(
        again["metadata"]["resourceVersion"], less["metadata"]["resourceVersion"],
        "a no-op apply is not written"
    );

    api.patch(
        &format!("{CONFIG_MAPS}/a"),
        "apply",
        &config_map("a", json!({})),
    )
    .await
    .fails(422);
}

#[tokio::test]
async fn apply_meets_updates() {
    let api = Api::new();
    apply(&api, "ctl", false, &deployment("d")).await.ok();
    let at = format!("{DEPLOYMENTS}/d");
    // Somebody scales: replicas belong to the updater, an apply that does not name them leaves them alone.
    api.patch(&at, "merge-patch", &json!({ "spec": { "replicas": 4 } }))
        .await
        .ok();
    let applied = apply(&api, "ctl", false, &deployment("d")).await.ok();
    assert_eq!(applied["spec"]["replicas"], 4);
    let mut wanted = deployment("d");
    wanted["spec"]["replicas"] = 2.into();
    let conflict = apply(&api, "ctl", false, &wanted).await.fails(409);
    let message = conflict["message"].as_str().unwrap();
    assert_eq!(
        message,
        "Apply failed with 1 conflict: conflict with \"tester\" using apps/v1: .spec.replicas"
    );
    assert_eq!(
        apply(&api, "ctl", true, &wanted).await.ok()["spec"]["replicas"],
        2
    );

    // Lists keyed by fields merge item by item; defaulted keys count.
    wanted["spec"]["template"]["spec"]["containers"][0]["image"] = "app:2".into();
    let changed = apply(&api, "ctl", false, &wanted).await.ok();
    assert_eq!(
        changed["spec"]["template"]["spec"]["containers"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        changed["spec"]["template"]["spec"]["containers"][0]["ports"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let sidecar = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "d" }, "spec": { "template": { "spec": {
        "containers": [{ "name": "extra", "image": "x:1" }] } } } });
    let both = apply(&api, "other", false, &sidecar).await.ok();
    assert_eq!(
        both["spec"]["template"]["spec"]["containers"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let without =
        json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "d" } });
    let one = apply(&api, "other", false, &without).await.ok();
    assert_eq!(
        one["spec"]["template"]["spec"]["containers"]
            .as_array()
            .unwrap()
            .len(),
        1
    );

    // An update takes fields from an applier.
    let image = json!({ "spec": { "template": { "spec": { "containers": [{ "name": "main", "image": "app:3" }] } } } });
    api.patch(&at, "strategic-merge-patch", &image).await.ok();
    let conflict = apply(&api, "ctl", false, &wanted).await.fails(409);
    let field = "spec.template.spec.containers[name=\"main\"].image";
    assert_eq!(
        conflict["details"]["causes"][0]["field"],
        format!(".{field}")
    );
}

/// `k` doubles its own size with every operation: 66 KB of patch would make 2^1000 bytes.
#[tokio::test]
async fn a_short_patch_makes_no_large_object() {
    let api = Api::new();
    let at = format!("{CONFIG_MAPS}/a");
    api.post(CONFIG_MAPS, &config_map("a", json!({ "k": "1" })))
        .await
        .ok();
    let copy = |from: &str, path: &str| json!({ "op": "copy", "from": from, "path": path });
    let deeper: Vec<_> = (0..1000).map(|_| copy("/data", "/data/k")).collect();
    let error = api
        .patch(&at, "json-patch", &json!(deeper))
        .await
        .fails(400);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("nested more than 100 levels"), "{message}");

    let wider: Vec<_> = (0..1000)
        .map(|n| copy("/data", &format!("/metadata/k{n}")))
        .chain((0..1000).map(|n| copy("/metadata", &format!("/data/k{n}"))))
        .flat_map(|operation| [operation.clone(), operation])
        .collect();
    let error = api.patch(&at, "json-patch", &json!(wider)).await.fails(413);
    assert_eq!(error["reason"], "RequestEntityTooLarge");

    let long = format!("/data{}", "/a".repeat(200_000));
    let operation = json!([{ "op": "add", "path": long, "value": "x" }]);
    api.patch(&at, "json-patch", &operation).await.fails(400);
    let many = vec![json!({ "op": "test", "path": "/data/k", "value": "1" }); 10_001];
    api.patch(&at, "json-patch", &json!(many)).await.fails(413);
    assert_eq!(api.get(&at).await.ok()["data"], json!({ "k": "1" }));
}
