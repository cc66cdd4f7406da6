//! The proxy subresources, with a stand-in for the pods.

use std::sync::Arc;

use axum::extract::Request;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use mesh_apiserver::node::{
    Duplex, ExecRequest, ExecSession, LogRequest, NoNode, NodeBackend, NodeError, NodeErrorKind,
};
use serde_json::{Value, json};

use crate::support::{Api, PODS, options, pod};

/// Pods whose port 8080 answers HTTP by what was asked.
struct Pods;

impl NodeBackend for Pods {
    fn logs(
        &self,
        request: LogRequest,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Bytes>, NodeError>> {
        NoNode.logs(request)
    }

    fn exec(&self, request: ExecRequest) -> BoxFuture<'static, Result<ExecSession, NodeError>> {
        NoNode.exec(request)
    }

    fn port_forward(
        &self,
        namespace: String,
        pod: String,
        port: u16,
    ) -> BoxFuture<'static, Result<Box<dyn Duplex>, NodeError>> {
        Box::pin(async move {
            if port != 8080 {
                return Err(NodeError::new(
                    NodeErrorKind::BadRequest,
                    "connection refused",
                ));
            }
            let (near, far) = tokio::io::duplex(4096);
            let answer = move |request: Request| {
                let (namespace, pod) = (namespace.clone(), pod.clone());
                async move {
                    let credentials = ["authorization", "impersonate-user", "impersonate-group"]
                        .iter()
                        .any(|name| request.headers().contains_key(*name));
                    let host = request.headers()["host"].to_str().unwrap().to_owned();
                    axum::Json(
                        json!({ "pod": format!("{namespace}/{pod}"), "host": host, "credentials": credentials,
                        "method": request.method().as_str(), "uri": request.uri().to_string() }),
                    )
                }
            };
            let service =
                hyper_util::service::TowerToHyperService::new(axum::Router::new().fallback(answer));
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(far), service),
            );
            Ok(Box::new(near) as Box<dyn Duplex>)
        })
    }
}

fn server() -> Api {
    let mut options = options(None);
    options.node = Arc::new(Pods);
    Api::open(options)
}

#[tokio::test]
async fn requests_reach_pods_by_number_name_or_first_port() {
    let api = server();
    let mut web = pod("web");
    web["spec"]["containers"][0]["ports"] = json!([{ "name": "http", "containerPort": 8080 }]);
    api.post(PODS, &web).await.ok();
    for name in ["web:8080", "web:http", "web", "http:web:8080"] {
        let answer = api
            .send(
                "GET",
                &format!("{PODS}/{name}/proxy/a//b/?x=1&y=%2F"),
                &[
                    ("authorization", "Bearer secret"),
                    ("impersonate-user", "somebody"),
                    ("impersonate-group", "system:masters"),
                ],
                "",
            )
            .await
            .ok();
        assert_eq!(
            answer,
            json!({ "pod": "default/web", "host": "web.default", "credentials": false, "method": "GET", "uri": "/a//b/?x=1&y=%2F" }),
            "{name}"
        );
    }
    let posted = api
        .post(&format!("{PODS}/web/proxy"), &json!({}))
        .await
        .ok();
    assert_eq!(
        (&posted["method"], &posted["uri"]),
        (&json!("POST"), &json!("/"))
    );
    api.get(&format!("{PODS}/web:metrics/proxy"))
        .await
        .fails(400);
    api.get(&format!("{PODS}/nobody:1/proxy")).await.fails(404);
    let refused = api.get(&format!("{PODS}/web:1/proxy")).await.fails(503);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("connection refused")
    );
    let upgrade = api
        .send(
            "GET",
            &format!("{PODS}/web/proxy"),
            &[("upgrade", "websocket")],
            "",
        )
        .await;
    upgrade.fails(400);
}

#[tokio::test]
async fn requests_reach_a_ready_pod_of_a_service() {
    let api = server();
    let services = "/api/v1/namespaces/default/services";
    let service = json!({ "metadata": { "name": "web" }, "spec": { "ports": [{ "name": "http", "port": 80 }] } });
    api.post(services, &service).await.ok();
    api.get(&format!("{services}/web/proxy/")).await.fails(503);
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
    let endpoint = |name: &str, ready: bool| json!({ "addresses": ["10.244.0.9"], "conditions": { "ready": ready }, "targetRef": { "kind": "Pod", "name": name } });
    let slice = json!({ "metadata": { "name": "web-1", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080 }],
        "endpoints": [endpoint("late", false), endpoint("web-7", true)] });
    api.post(slices, &slice).await.ok();
    for name in ["web", "web:80", "web:http"] {
        let answer: Value = api
            .get(&format!("{services}/{name}/proxy/status"))
            .await
            .ok();
        assert_eq!(
            (&answer["pod"], &answer["uri"]),
            (&json!("default/web-7"), &json!("/status"))
        );
    }
    api.get(&format!("{services}/web:https/proxy/"))
        .await
        .fails(400);
}
