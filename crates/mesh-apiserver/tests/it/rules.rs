//! CEL rules of custom kinds, and the end of a definition.

use serde_json::{Value, json};

use crate::support::Api;

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const GADGETS: &str = "/apis/example.com/v1/namespaces/default/gadgets";

fn definition(spec: Value) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": "gadgets.example.com" },
        "spec": {
            "group": "example.com", "scope": "Namespaced", "names": { "plural": "gadgets", "kind": "Gadget" },
            "versions": [{ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": {
                "type": "object", "properties": { "spec": spec },
            } } }],
        },
    })
}

fn rules(list: Value) -> Value {
    json!({
        "type": "object", "x-kubernetes-validations": list,
        "properties": {
            "min": { "type": "integer" }, "max": { "type": "integer" }, "mode": { "type": "string" },
            "until": { "type": "string", "format": "date-time" }, "wait": { "type": "string", "format": "duration" },
            "name-it": { "type": "string" },
            "parts": { "type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["id"],
                "items": { "type": "object", "required": ["id"],
                    "x-kubernetes-validations": [{ "rule": "self.n >= oldSelf.n", "message": "n may only grow" }],
                    "properties": { "id": { "type": "string" }, "n": { "type": "integer", "default": 0 } } } },
            "labels": { "type": "object", "additionalProperties": { "type": "string",
                "x-kubernetes-validations": [{ "rule": "self.size() < 5" }] } },
        },
    })
}

fn gadget(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "example.com/v1", "kind": "Gadget", "metadata": { "name": name }, "spec": spec })
}

async fn with_rules(list: Value) -> Api {
    let api = Api::new();
    api.post(CRDS, &definition(rules(list))).await.ok();
    api
}

#[tokio::test]
async fn rules_of_a_custom_kind_are_enforced() {
    let api = with_rules(json!([
        { "rule": "!has(self.min) || !has(self.max) || self.min <= self.max",
          "messageExpression": "'min ' + string(self.min) + ' is above ' + string(self.max)", "fieldPath": ".min" },
        { "rule": "!has(self.until) || self.until > timestamp('2026-01-01T00:00:00Z')", "message": "too early",
          "reason": "FieldValueForbidden" },
        { "rule": "!has(self.wait) || self.wait >= duration('1m')" },
        { "rule": "!has(self.name__dash__it) || self.name__dash__it.matches('^[a-z]+$')" },
    ]))
    .await;
    api.post(
        GADGETS,
        &gadget(
            "good",
            json!({ "min": 1, "max": 2, "wait": "90s", "until": "2026-06-01T00:00:00Z" }),
        ),
    )
    .await
    .ok();
    for (name, spec, field, text) in [
        (
            "a",
            json!({ "min": 3, "max": 2 }),
            "spec.min",
            "min 3 is above 2",
        ),
        (
            "b",
            json!({ "until": "2025-01-01T00:00:00Z" }),
            "spec",
            "Forbidden: too early",
        ),
        (
            "c",
            json!({ "wait": "10s" }),
            "spec",
            "failed rule: !has(self.wait)",
        ),
        (
            "d",
            json!({ "name-it": "A" }),
            "spec",
            "failed rule: !has(self.name__dash__it)",
        ),
        (
            "e",
            json!({ "labels": { "k": "toolong" } }),
            "spec.labels[k]",
            "self.size() < 5",
        ),
    ] {
        let status = api.post(GADGETS, &gadget(name, spec)).await.fails(422);
        let cause = &status["details"]["causes"][0];
        assert_eq!(cause["field"], field, "{status}");
        let message = status["message"].as_str().unwrap();
        assert!(message.contains(text), "{message}");
    }
}

#[tokio::test]
async fn transition_rules_see_the_object_before() {
    let api = with_rules(json!([
        { "rule": "self.mode == oldSelf.mode", "message": "mode is immutable" },
        { "rule": "oldSelf.hasValue() || self.max < 10", "optionalOldSelf": true, "message": "starts small" },
    ]))
    .await;
    let first = gadget(
        "t",
        json!({ "mode": "x", "max": 1, "parts": [{ "id": "p", "n": 5 }] }),
    );
    api.post(GADGETS, &gadget("big", json!({ "mode": "x", "max": 11 })))
        .await
        .fails(422);
    api.post(GADGETS, &first).await.ok();
    let path = format!("{GADGETS}/t");
    let change = async |spec: Value| {
        api.patch(&path, "merge-patch", &json!({ "spec": spec }))
            .await
    };
    change(json!({ "max": 20 })).await.ok();
    let status = change(json!({ "mode": "y" })).await.fails(422);
    assert!(
        status["message"]
            .as_str()
            .unwrap()
            .contains("mode is immutable")
    );
    // Items are told apart by their keys; a new one has no past.
    change(json!({ "parts": [{ "id": "new", "n": 0 }, { "id": "p", "n": 6 }] }))
        .await
        .ok();
    let status = change(json!({ "parts": [{ "id": "p", "n": 2 }] }))
        .await
        .fails(422);
    assert_eq!(status["details"]["causes"][0]["field"], "spec.parts[0]");
}

#[tokio::test]
async fn what_was_wrong_before_and_stays_is_tolerated() {
    let api = Api::new();
    let crd = definition(rules(json!([])));
    api.post(CRDS, &crd).await.ok();
    api.post(GADGETS, &gadget("old", json!({ "mode": "bad" })))
        .await
        .ok();
    let stricter = definition(rules(json!([{ "rule": "self.mode != 'bad'" }])));
    api.patch(
        &format!("{CRDS}/gadgets.example.com"),
        "merge-patch",
        &json!({ "spec": stricter["spec"] }),
    )
    .await
    .ok();
    let path = format!("{GADGETS}/old");
    let label = json!({ "metadata": { "labels": { "a": "b" } } });
    api.patch(&path, "merge-patch", &label).await.ok();
    api.patch(&path, "merge-patch", &json!({ "spec": { "max": 1 } }))
        .await
        .fails(422);
}

#[tokio::test]
async fn rules_that_cannot_be_enforced_are_refused() {
    let api = Api::new();
    for (rule, text) in [
        (json!({ "rule": "self.min <" }), "compilation failed"),
        (
            json!({ "rule": "quantity(self.mode).isGreaterThan(quantity('1'))" }),
            "'quantity'",
        ),
        (
            json!({ "rule": "self.min < other" }),
            "undeclared reference to 'other'",
        ),
        (json!({ "rule": "" }), "Required value"),
        (
            json!({ "rule": "true", "reason": "Whim" }),
            "FieldValueInvalid",
        ),
        (
            json!({ "rule": "true", "optionalOldSelf": true }),
            "optionalOldSelf",
        ),
        (
            json!({ "rule": "true", "messageExpression": "nobody()" }),
            "'nobody'",
        ),
    ] {
        let mut list = vec![rule.clone()];
        if let Some(first) = list.first_mut()
            && first["rule"] != ""
        {
            first["message"] = "m".into();
        }
        let status = api
            .post(CRDS, &definition(rules(list.into())))
            .await
            .fails(422);
        let message = status["message"].as_str().unwrap();
        assert!(message.contains(text), "{rule}: {message}");
    }
    let mut loose = rules(json!([]));
    loose["properties"]["parts"]["x-kubernetes-list-type"] = "atomic".into();
    let status = api.post(CRDS, &definition(loose)).await.fails(422);
    assert!(
        status["message"]
            .as_str()
            .unwrap()
            .contains("uncorrelatable")
    );
}

#[tokio::test]
async fn the_functions_that_are_promised_work() {
    for rule in [
        "[1, 2, 2].isSorted() && [1, 2].sum() == 3 && [3, 1].min() == 1 && [3, 1].max() == 3",
        "'abc123'.find('[0-9]+') == '123' && 'a1b2'.findAll('[0-9]') == ['1', '2']",
        "'aBc'.lowerAscii() == 'abc' && ' x '.trim() == 'x' && 'a,b'.split(',').size() == 2",
        "[3, 1, 2].sort() == [1, 2, 3] && [1, 1].distinct() == [1] && math.greatest(1, 2) == 2",
        "self.?mode.orValue('none') == 'none' && optional.none().hasValue() == false",
        "[1, 2].all(x, x > 0) && [1, 2].exists_one(x, x == 2) && [1, 2].map(x, x * 2) == [2, 4]",
        "timestamp('2026-01-02T03:04:05Z').getFullYear() == 2026 && duration('90s') == duration('1m30s')",
        "size('abc') == 3 && 'abc'.contains('b') && int('7') == 7 && type(1) == int",
    ] {
        let api = with_rules(json!([{ "rule": rule }])).await;
        api.post(GADGETS, &gadget("a", json!({ "max": 1 })))
            .await
            .ok();
    }
}

#[tokio::test]
async fn a_definition_ends_after_its_objects() {
    let api = Api::new();
    api.post(CRDS, &definition(rules(json!([])))).await.ok();
    let mut held = gadget("held", json!({}));
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    api.post(GADGETS, &held).await.ok();
    api.post(GADGETS, &gadget("free", json!({}))).await.ok();
    let crd = format!("{CRDS}/gadgets.example.com");
    let ending = api.delete(&crd).await.ok();
    assert_eq!(
        ending["metadata"]["finalizers"],
        json!(["customresourcecleanup.apiextensions.k8s.io"])
    );
    let terminating = |object: &Value| {
        let conditions = object["status"]["conditions"].as_array().unwrap();
        conditions
            .iter()
            .any(|c| c["type"] == "Terminating" && c["status"] == "True")
    };
    assert!(terminating(&ending), "{ending}");
    api.post(GADGETS, &gadget("late", json!({})))
        .await
        .fails(405);
    api.until(&format!("{GADGETS}/free"), |answer| answer.code == 404)
        .await;
    let still = api.get(&format!("{GADGETS}/held")).await.ok();
    assert!(!still["metadata"]["deletionTimestamp"].is_null());
    // An update of the ending definition keeps saying that it ends.
    let label = json!({ "metadata": { "labels": { "a": "b" } } });
    assert!(terminating(
        &api.patch(&crd, "merge-patch", &label).await.ok()
    ));
    let release = json!({ "metadata": { "finalizers": [] } });
    api.patch(&format!("{GADGETS}/held"), "merge-patch", &release)
        .await
        .ok();
    api.until(&crd, |answer| answer.code == 404).await;
    api.get(GADGETS).await.fails(404);
}

#[tokio::test]
async fn an_ending_definition_goes_on_ending_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let crd = format!("{CRDS}/gadgets.example.com");
    {
        let api = Api::in_dir(dir.path());
        api.post(CRDS, &definition(rules(json!([])))).await.ok();
        let mut held = gadget("held", json!({}));
        held["metadata"]["finalizers"] = json!(["example.com/hold"]);
        api.post(GADGETS, &held).await.ok();
        api.delete(&crd).await.ok();
        api.server.close();
        // The cleaning task lets go of the store when it is told to end.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let api = Api::in_dir(dir.path());
    let release = json!({ "metadata": { "finalizers": [] } });
    api.patch(&format!("{GADGETS}/held"), "merge-patch", &release)
        .await
        .ok();
    api.until(&crd, |answer| answer.code == 404).await;
}

#[tokio::test]
async fn rules_that_would_exhaust_the_server_are_refused() {
    let api = Api::new();
    let chain = format!("self{} == 1", ".a".repeat(7_500));
    let brackets = format!("{}1{} == 1", "(".repeat(7_000), ")".repeat(7_000));
    let not = format!("{}true", "!".repeat(16_000));
    let nested =
        "self.parts.all(a, self.parts.all(b, self.parts.all(c, self.parts.all(d, a == d))))";
    let levels = format!("self{} == 1", ".a".repeat(700));
    for (rule, reason) in [
        (chain.as_str(), "too complex"),
        (&brackets, "too complex"),
        (&not, "too complex"),
        (nested, "4 comprehensions"),
        (&levels, "recursion limit"),
    ] {
        let spec = rules(json!([{ "rule": rule }]));
        let error = api.post(CRDS, &definition(spec)).await.fails(422);
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(reason), "{reason}: {message:.300}");
    }
    // The deepest that is allowed is parsed and evaluated on a stack that is deep enough.
    let sum = format!("1{} > 1", " + 1".repeat(200));
    let depth = format!("{}true{}", "(".repeat(60), ")".repeat(60));
    let spec = rules(json!([{ "rule": sum }, { "rule": depth }]));
    api.post(CRDS, &definition(spec)).await.ok();
    api.post(GADGETS, &gadget("a", json!({}))).await.ok();
}

#[tokio::test]
async fn rules_that_would_cost_too_much_are_not_evaluated() {
    let growing = format!(
        "self.mode{} != ''",
        ".replace('a', 'aaaaaaaaaa')".repeat(12)
    );
    for (rule, spec) in [
        (growing.as_str(), json!({ "mode": "aaaaaaaaaa" })),
        ("lists.range(4000000000).size() > 0", json!({})),
        (
            "self.parts.all(a, self.parts.all(b, self.parts.exists(c, c.id == a.id + b.id)))",
            json!({ "parts": (0..2000).map(|n| json!({ "id": n.to_string() })).collect::<Vec<_>>() }),
        ),
    ] {
        let api = with_rules(json!([{ "rule": rule }])).await;
        let error = api.post(GADGETS, &gadget("a", spec)).await.fails(422);
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains("budget for validation rules"),
            "{rule}: {message:.300}"
        );
    }
    // A sensible rule over a sensible list is well within.
    let api = with_rules(json!([
        { "rule": "self.parts.all(a, self.parts.exists_one(b, a.id == b.id))" },
        { "rule": "self.parts.map(p, p.id).join(',').matches('^[0-9,]*$')" },
    ]))
    .await;
    let parts: Vec<_> = (0..64).map(|n| json!({ "id": n.to_string() })).collect();
    api.post(GADGETS, &gadget("a", json!({ "parts": parts })))
        .await
        .ok();
}
