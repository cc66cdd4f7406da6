//! Admission webhooks, answered by a TLS server in this process.

use std::sync::{Arc, Mutex};

use axum::Json;
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};

use crate::support::{Api, CONFIG_MAPS, config_map, options};

const HOOKS: &str = "/apis/admissionregistration.k8s.io/v1";

/// A webhook server and an API server that reaches it as service `hook` in `default`.
struct Bench {
    api: Api,
    bundle: String,
    seen: Arc<Mutex<Vec<Value>>>,
}

type Behaviour = fn(&Value) -> Value;

async fn bench(behaviour: Behaviour) -> Bench {
    let authority =
        mesh_identity::ca::Authority::generate("test", "test CA", 1_700_000_000, 2_000_000_000)
            .unwrap();
    let leaf = authority
        .issue_server(&["hook.default.svc"], &[], 1_700_000_000, 2_000_000_000)
        .unwrap();
    let tls = mesh_identity::tls::server_config(&leaf, &["http/1.1"]).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen: Arc<Mutex<Vec<Value>>> = Arc::default();
    let log = seen.clone();
    let answer = move |Json(review): Json<Value>| async move {
        let request = review["request"].clone();
        let mut response = behaviour(&request);
        response["uid"] = request["uid"].clone();
        log.lock().unwrap().push(request);
        Json(
            json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }),
        )
    };
    let router = axum::Router::new().route("/review", post(answer));
    tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(tls);
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(stream) = acceptor.accept(stream).await else {
                continue;
            };
            let service = TowerToHyperService::new(router.clone());
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    let mut options = options(None);
    options.service_dialer = Arc::new(move |_| {
        Box::pin(async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            Ok(Box::new(stream) as Box<dyn mesh_apiserver::node::Duplex>)
        })
    });
    let api = Api::open(options);
    let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "hook" }, "spec": { "ports": [{ "port": 443 }] } });
    api.post("/api/v1/namespaces/default/services", &service)
        .await
        .ok();
    Bench {
        api,
        bundle: STANDARD.encode(authority.certificate_pem()),
        seen,
    }
}

impl Bench {
    async fn register(&self, kind: &str, change: impl Fn(&mut Value)) {
        let mut webhook = json!({
            "name": "check.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "clientConfig": { "caBundle": self.bundle, "service": { "name": "hook", "namespace": "default", "path": "/review" } },
            "rules": [{ "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE", "DELETE"], "resources": ["configmaps"] }],
        });
        change(&mut webhook);
        let body = json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": format!("{kind}WebhookConfiguration"),
            "metadata": { "name": kind.to_lowercase() }, "webhooks": [webhook],
        });
        self.api
            .post(
                &format!("{HOOKS}/{}webhookconfigurations", kind.to_lowercase()),
                &body,
            )
            .await
            .ok();
    }
}

fn add_data(_: &Value) -> Value {
    let patch = json!([{ "op": "add", "path": "/data/injected", "value": "yes" }]);
    json!({ "allowed": true, "patchType": "JSONPatch", "patch": STANDARD.encode(patch.to_string()), "warnings": ["mind the gap"] })
}

fn deny(_: &Value) -> Value {
    json!({ "allowed": false, "status": { "code": 403, "message": "not today" } })
}

#[tokio::test]
async fn a_mutating_webhook_changes_objects() {
    let bench = bench(add_data).await;
    bench
        .register("Mutating", |hook| {
            hook["namespaceSelector"] = json!({ "matchLabels": { "inject": "on" } })
        })
        .await;
    let plain = bench
        .api
        .post(CONFIG_MAPS, &config_map("plain", json!({ "a": "b" })))
        .await
        .ok();
    assert!(
        plain["data"].get("injected").is_none(),
        "the namespace does not match"
    );
    let label = json!({ "metadata": { "labels": { "inject": "on" } } });
    bench
        .api
        .patch("/api/v1/namespaces/default", "merge-patch", &label)
        .await
        .ok();
    let answer = bench
        .api
        .post(CONFIG_MAPS, &config_map("x", json!({ "a": "b" })))
        .await;
    assert!(
        answer.headers["warning"]
            .to_str()
            .unwrap()
            .contains("mind the gap")
    );
    assert_eq!(answer.ok()["data"], json!({ "a": "b", "injected": "yes" }));
    let seen = bench.seen.lock().unwrap().clone();
    assert_eq!(seen.len(), 1);
    assert_eq!(
        (
            &seen[0]["operation"],
            &seen[0]["namespace"],
            &seen[0]["name"]
        ),
        (&json!("CREATE"), &json!("default"), &json!("x"))
    );
    assert_eq!(
        seen[0]["kind"],
        json!({ "group": "", "version": "v1", "kind": "ConfigMap" })
    );
    assert_eq!(seen[0]["userInfo"]["username"], "kubernetes-admin");
}

#[tokio::test]
async fn a_validating_webhook_refuses() {
    let bench = bench(deny).await;
    bench
        .register(
            "Validating",
            |hook| {
                hook["objectSelector"] =
                    json!({ "matchExpressions": [{ "key": "free", "operator": "DoesNotExist" }] })
            },
        )
        .await;
    let refused = bench
        .api
        .post(CONFIG_MAPS, &config_map("x", json!({})))
        .await
        .fails(403);
    assert_eq!(
        refused["message"],
        "admission webhook \"check.example.com\" denied the request: not today"
    );
    let mut free = config_map("x", json!({}));
    free["metadata"]["labels"] = json!({ "free": "" });
    bench.api.post(CONFIG_MAPS, &free).await.ok();
    bench
        .api
        .patch(
            &format!("{CONFIG_MAPS}/x"),
            "merge-patch",
            &json!({ "metadata": { "labels": null } }),
        )
        .await
        .ok();
    bench
        .api
        .delete(&format!("{CONFIG_MAPS}/x"))
        .await
        .fails(403);
}

#[tokio::test]
async fn an_absent_webhook_follows_its_policy() {
    let bench = bench(deny).await;
    bench
        .register("Validating", |hook| {
            hook["clientConfig"]["service"]["name"] = "nobody".into()
        })
        .await;
    let failed = bench
        .api
        .post(CONFIG_MAPS, &config_map("x", json!({})))
        .await
        .fails(500);
    let expected = "Internal error occurred: failed calling webhook \"check.example.com\": failed to call webhook: service \"nobody\" not found";
    assert_eq!(failed["message"], expected);
    let patch =
        json!([{ "op": "replace", "path": "/webhooks/0/failurePolicy", "value": "Ignore" }]);
    bench
        .api
        .patch(
            &format!("{HOOKS}/validatingwebhookconfigurations/validating"),
            "json-patch",
            &patch,
        )
        .await
        .ok();
    bench
        .api
        .post(CONFIG_MAPS, &config_map("x", json!({})))
        .await
        .ok();
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let bench = bench(add_data).await;
    let other = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "other" }, "spec": { "ports": [{ "port": 443 }] } });
    bench
        .api
        .post("/api/v1/namespaces/default/services", &other)
        .await
        .ok();
    bench
        .register("Mutating", |hook| {
            hook["clientConfig"]["service"]["name"] = "other".into()
        })
        .await;
    let failed = bench
        .api
        .post(CONFIG_MAPS, &config_map("x", json!({})))
        .await
        .fails(500);
    assert!(
        failed["message"]
            .as_str()
            .unwrap()
            .contains("Post \"https://other.default.svc:443/review?timeout=10s\": tls:"),
        "{failed}"
    );
}

#[tokio::test]
async fn dry_runs_spare_webhooks_with_effects() {
    let bench = bench(add_data).await;
    bench
        .register("Mutating", |hook| hook["sideEffects"] = "Some".into())
        .await;
    bench
        .api
        .post(
            &format!("{CONFIG_MAPS}?dryRun=All"),
            &config_map("x", json!({})),
        )
        .await
        .fails(400);
}

#[tokio::test]
async fn match_conditions_decide_who_is_asked() {
    let bench = bench(deny).await;
    bench
        .register("Validating", |hook| {
            hook["matchConditions"] = json!([
                { "name": "not-exempt", "expression": "!object.metadata.name.startsWith('exempt')" },
                { "name": "created", "expression": "request.operation == 'CREATE' && request.userInfo.username != ''" },
            ])
        })
        .await;
    let exempt = config_map("exempt-a", json!({ "a": "b" }));
    bench.api.post(CONFIG_MAPS, &exempt).await.ok();
    let denied = config_map("other", json!({ "a": "b" }));
    bench.api.post(CONFIG_MAPS, &denied).await.fails(403);
    assert_eq!(bench.seen.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_condition_that_fails_counts_as_the_failure_policy_says() {
    for (policy, code) in [("Fail", 403), ("Ignore", 201)] {
        let bench = bench(deny).await;
        bench
            .register("Validating", |hook| {
                hook["failurePolicy"] = policy.into();
                hook["matchConditions"] =
                    json!([{ "name": "broken", "expression": "object.data.missing == 'x'" }]);
            })
            .await;
        let answer = bench
            .api
            .post(CONFIG_MAPS, &config_map("a", json!({ "a": "b" })))
            .await;
        assert_eq!(answer.code, code, "{}", answer.body);
        assert!(bench.seen.lock().unwrap().is_empty());
    }
    let api = Api::new();
    let body = json!({ "metadata": { "name": "x" }, "webhooks": [{
        "name": "check.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None",
        "clientConfig": { "url": "https://127.0.0.1:1/" },
        "matchConditions": [{ "name": "a", "expression": "authorizer.group('').check('x').allowed()" }],
    }] });
    let path = format!("{HOOKS}/validatingwebhookconfigurations");
    let status = api.post(&path, &body).await.fails(422);
    assert!(
        status["message"]
            .as_str()
            .unwrap()
            .contains("undeclared reference")
    );
}
