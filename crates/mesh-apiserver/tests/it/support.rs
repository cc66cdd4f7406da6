//! A server in this process and short ways to ask it.

use std::path::Path;
use std::sync::Arc;

use axum::body::Body;
use futures::StreamExt;
use http_body_util::BodyExt;
use mesh_apiserver::node::NoNode;
use mesh_apiserver::{ApiServer, Auth, Identity, Options};
use mesh_identity::token::TokenKeys;
use mesh_store::Store;
use serde_json::{Value, json};
use tower::ServiceExt;

pub const ADMIN_TOKEN: &str = "an-admin-token-of-some-length";

/// A server and its router.
pub struct Api {
    pub server: ApiServer,
    pub router: axum::Router,
}

/// Status code and body of an answer.
pub struct Answer {
    pub code: u16,
    pub body: Value,
    pub headers: http::HeaderMap,
}

pub fn options(dir: Option<&Path>) -> Options {
    let (store, _) = Store::open(dir).unwrap();
    let tokens = Arc::new(TokenKeys::generate("https://kubernetes.default.svc").unwrap());
    Options::new(
        store,
        Auth {
            admin_tokens: vec![ADMIN_TOKEN.to_owned()],
            tokens,
        },
        Arc::new(NoNode),
    )
}

impl Api {
    pub fn new() -> Api {
        Api::open(options(None))
    }

    pub fn open(options: Options) -> Api {
        let server = ApiServer::open(options).unwrap();
        let router = server.router_as(Identity::admin());
        Api { server, router }
    }

    pub fn in_dir(dir: &Path) -> Api {
        Api::open(options(Some(dir)))
    }

    /// Asks until the answer is as wanted, at most ten seconds.
    pub async fn until(&self, path: &str, wanted: impl Fn(&Answer) -> bool) {
        for _ in 0..1000 {
            if wanted(&self.get(path).await) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("not within ten seconds: {path}");
    }

    pub fn client(&self) -> kube::Client {
        kube::Client::new(self.router.clone(), "default")
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Answer {
        let mut request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("user-agent", "tester/1.0");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self
            .router
            .clone()
            .oneshot(request.body(body.into()).unwrap())
            .await
            .unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into_owned().into());
        Answer {
            code: parts.status.as_u16(),
            body,
            headers: parts.headers,
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], Body::empty()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(
            "POST",
            path,
            &[("content-type", "application/json")],
            body.to_string(),
        )
        .await
    }

    pub async fn put(&self, path: &str, body: &Value) -> Answer {
        self.send(
            "PUT",
            path,
            &[("content-type", "application/json")],
            body.to_string(),
        )
        .await
    }

    pub async fn patch(&self, path: &str, kind: &str, body: &Value) -> Answer {
        let media = match kind {
            "apply" => "application/apply-patch+yaml".to_owned(),
            kind => format!("application/{kind}+json"),
        };
        self.send("PATCH", path, &[("content-type", &media)], body.to_string())
            .await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, &[], Body::empty()).await
    }

    pub async fn table(&self, path: &str) -> Value {
        let accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        self.send("GET", path, &[("accept", accept)], Body::empty())
            .await
            .ok()
    }

    /// Opens a watch; lines come one by one.
    pub async fn watch(&self, path: &str) -> Lines {
        let request = http::Request::get(path).body(Body::empty()).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200);
        Lines {
            stream: response.into_body().into_data_stream(),
            buffer: Vec::new(),
        }
    }
}

impl Answer {
    /// The body of a success.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(self.code < 300, "{} {}", self.code, self.body);
        self.body
    }

    /// The body of a failure with this code.
    #[track_caller]
    pub fn fails(self, code: u16) -> Value {
        assert_eq!(self.code, code, "{}", self.body);
        assert_eq!(self.body["kind"], "Status");
        assert_eq!(self.body["code"], code);
        self.body
    }
}

/// Events of a watch.
pub struct Lines {
    stream: axum::body::BodyDataStream,
    buffer: Vec<u8>,
}

impl Lines {
    /// The next event, or `None` at the end of the stream.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            self.buffer
                .extend_from_slice(&self.stream.next().await?.unwrap());
        }
    }

    /// Type and name of the next event.
    pub async fn short(&mut self) -> String {
        let event = self.next().await.expect("the watch ended");
        let name = event["object"]["metadata"]["name"]
            .as_str()
            .unwrap_or("-")
            .to_owned();
        format!("{} {name}", event["type"].as_str().unwrap())
    }
}

pub fn config_map(name: &str, data: Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name }, "data": data })
}

pub fn deployment(name: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": name, "labels": { "app": name } },
        "spec": {
            "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name } },
                "spec": { "containers": [{ "name": "main", "image": "app:1", "ports": [{ "containerPort": 8080 }] }] },
            },
        },
    })
}

pub fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": name } },
        "spec": { "containers": [{ "name": "main", "image": "docker.io/library/app" }] },
    })
}

pub const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";
pub const PODS: &str = "/api/v1/namespaces/default/pods";
pub const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
