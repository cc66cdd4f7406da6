//! Custom resources.

use serde_json::{Value, json};

use crate::support::Api;

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const WIDGETS: &str = "/apis/example.com/v1/namespaces/default/widgets";

fn definition() -> Value {
    let schema = json!({ "openAPIV3Schema": { "type": "object", "properties": {
        "spec": {
            "type": "object", "required": ["size"],
            "properties": {
                "size": { "type": "integer", "minimum": 1, "maximum": 10 },
                "mode": { "type": "string", "enum": ["FAST", "SLOW"], "default": "FAST" },
                "name": { "type": "string", "pattern": "^[a-z]+$" },
                "extra": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
                "parts": {
                    "type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["id"],
                    "items": { "type": "object", "required": ["id"],
                        "properties": { "id": { "type": "string" }, "n": { "type": "integer" } } },
                },
            },
            "oneOf": [{ "not": { "anyOf": [{ "required": ["name"] }] } }, { "required": ["name"] }],
        },
        "status": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
    } } });
    let version = |name: &str, storage: bool| {
        json!({
            "name": name, "served": true, "storage": storage, "schema": schema, "subresources": { "status": {} },
            "additionalPrinterColumns": [
                { "name": "Size", "type": "integer", "jsonPath": ".spec.size" },
                { "name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Ready\")].status" },
            ],
        })
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": "widgets.example.com" },
        "spec": {
            "group": "example.com", "scope": "Namespaced",
            "names": { "plural": "widgets", "kind": "Widget", "shortNames": ["wd"], "categories": ["all"] },
            "versions": [version("v1", true), version("v1beta1", false)],
        },
    })
}

fn widget(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "example.com/v1", "kind": "Widget", "metadata": { "name": name }, "spec": spec })
}

#[tokio::test]
async fn a_custom_kind_is_served_at_once() {
    let api = Api::new();
    api.get(WIDGETS).await.fails(404);
    let created = api.post(CRDS, &definition()).await.ok();
    assert!(
        created["status"]["conditions"]
            .as_array()
            .unwrap()
            .iter()
            .any(|c| c["type"] == "Established" && c["status"] == "True")
    );
    let made = api
        .post(
            WIDGETS,
            &widget(
                "a",
                json!({ "size": 3, "junk": 1, "extra": { "any": [1] } }),
            ),
        )
        .await
        .ok();
    assert_eq!(
        made["spec"],
        json!({ "size": 3, "extra": { "any": [1] }, "mode": "FAST" })
    );

    let beta = api
        .get("/apis/example.com/v1beta1/namespaces/default/widgets/a")
        .await
        .ok();
    assert_eq!(
        (&beta["apiVersion"], &beta["spec"]["size"]),
        (&json!("example.com/v1beta1"), &json!(3))
    );

    let status = json!({ "spec": { "size": 9 }, "status": { "conditions": [{ "type": "Ready", "status": "True" }] } });
    let updated = api
        .patch(&format!("{WIDGETS}/a/status"), "merge-patch", &status)
        .await
        .ok();
    assert_eq!(
        (&updated["spec"]["size"], &updated["metadata"]["generation"]),
        (&json!(3), &json!(1))
    );
    let table = api.table(WIDGETS).await;
    assert_eq!(table["rows"][0]["cells"], json!(["a", 3, "True"]));

    let list = api.get("/apis/example.com/v1").await.ok();
    assert_eq!(list["resources"][0]["shortNames"], json!(["wd"]));
    assert_eq!(list["resources"][1]["name"], "widgets/status");
    let beta = api.get("/openapi/v3/apis/example.com/v1").await.ok();
    assert!(
        beta["components"]["schemas"].to_string().contains("FAST"),
        "{beta}"
    );

    api.delete(&format!("{CRDS}/widgets.example.com"))
        .await
        .ok();
    api.get(WIDGETS).await.fails(404);
    api.post(CRDS, &definition()).await.ok();
    assert_eq!(
        api.get(WIDGETS).await.ok()["items"],
        json!([]),
        "the objects went with their definition"
    );
}

#[tokio::test]
async fn a_schema_is_law() {
    let api = Api::new();
    api.post(CRDS, &definition()).await.ok();
    for (spec, field, words) in [
        (json!({}), "spec.size", "Required value"),
        (
            json!({ "size": 11 }),
            "spec.size",
            "less than or equal to 10",
        ),
        (
            json!({ "size": "x" }),
            "spec.size",
            "must be of type integer",
        ),
        (
            json!({ "size": 1, "mode": "MEDIUM" }),
            "spec.mode",
            "supported values: \"FAST\", \"SLOW\"",
        ),
        (
            json!({ "size": 1, "name": "A" }),
            "spec.name",
            "should match '^[a-z]+$'",
        ),
        (
            json!({ "size": 1, "parts": [{ "id": "a" }, { "id": "a" }] }),
            "spec.parts[1].id",
            "Duplicate value",
        ),
    ] {
        let error = api
            .post(WIDGETS, &widget("bad", spec.clone()))
            .await
            .fails(422);
        let causes = error["details"]["causes"].as_array().unwrap();
        let found = causes
            .iter()
            .any(|c| c["field"] == field && c["message"].as_str().unwrap().contains(words));
        assert!(found, "{spec}: {error}");
    }
    // Strategic merge is for built-in kinds; server-side apply follows the schema's list type.
    api.post(
        WIDGETS,
        &widget("w", json!({ "size": 1, "parts": [{ "id": "a", "n": 1 }] })),
    )
    .await
    .ok();
    api.patch(&format!("{WIDGETS}/w"), "strategic-merge-patch", &json!({}))
        .await
        .fails(415);
    let other = widget("w", json!({ "size": 1, "parts": [{ "id": "b", "n": 2 }] }));
    let merged = api
        .patch(&format!("{WIDGETS}/w?fieldManager=x"), "apply", &other)
        .await
        .ok();
    assert_eq!(
        merged["spec"]["parts"],
        json!([{ "id": "a", "n": 1 }, { "id": "b", "n": 2 }])
    );
}

#[tokio::test]
async fn bad_definitions_are_refused() {
    let api = Api::new();
    let mut misnamed = definition();
    misnamed["metadata"]["name"] = "things.example.com".into();
    let mut two = definition();
    two["spec"]["versions"][1]["storage"] = true.into();
    let mut bare = definition();
    bare["spec"]["versions"][0]["schema"] = json!({});
    let mut webhook = definition();
    webhook["spec"]["conversion"] = json!({ "strategy": "Webhook" });
    for (crd, field) in [
        (misnamed, "metadata.name"),
        (two, "spec.versions"),
        (bare, "spec.versions[0].schema.openAPIV3Schema"),
        (webhook, "spec.conversion.strategy"),
    ] {
        let error = api.post(CRDS, &crd).await.fails(422);
        assert!(
            error["details"]["causes"]
                .as_array()
                .unwrap()
                .iter()
                .any(|c| c["field"] == field),
            "{error}"
        );
    }
}
