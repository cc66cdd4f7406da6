//! As much of a Kubernetes API as a pod's worker needs: reads find what the test put in, writes are recorded.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::watch;

/// The fake API.
#[derive(Clone)]
pub struct Api {
    objects: Arc<Mutex<Vec<(String, Value)>>>,
    statuses: watch::Sender<Value>,
    events: Arc<Mutex<Vec<Value>>>,
    deleted: watch::Sender<bool>,
    tokens: Arc<AtomicU64>,
}

impl Api {
    pub fn new() -> Self {
        Self {
            objects: Arc::default(),
            statuses: watch::Sender::new(Value::Null),
            events: Arc::default(),
            deleted: watch::Sender::new(false),
            tokens: Arc::default(),
        }
    }

    pub fn put(&self, path: &str, object: Value) {
        self.objects.lock().unwrap().push((path.to_owned(), object));
    }

    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        let handler = move |method: Method, uri: Uri, body: Bytes| {
            let api = api.clone();
            async move { api.answer(&method, uri.path(), &body) }
        };
        kube::Client::new(Router::new().fallback(handler), "default")
    }

    fn answer(&self, method: &Method, path: &str, body: &[u8]) -> Response {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        match *method {
            Method::GET => {
                let found = self
                    .objects
                    .lock()
                    .unwrap()
                    .iter()
                    .find(|(p, _)| p == path)
                    .map(|(_, o)| o.clone());
                match found {
                    Some(object) => axum::Json(object).into_response(),
                    None if path.split('/').count() == 6 => axum::Json(
                        json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": []}),
                    )
                    .into_response(),
                    None => {
                        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "not found", "reason": "NotFound", "code": 404});
                        (StatusCode::NOT_FOUND, axum::Json(status)).into_response()
                    }
                }
            }
            Method::PATCH if path.ends_with("/status") => {
                self.statuses.send_replace(body["status"].clone());
                axum::Json(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}))
                    .into_response()
            }
            Method::POST if path.ends_with("/events") => {
                self.events.lock().unwrap().push(body.clone());
                axum::Json(body).into_response()
            }
            Method::POST if path.ends_with("/token") => {
                let mut body = body;
                let token = match self.tokens.fetch_add(1, Ordering::Relaxed) {
                    0 => "a-token".to_owned(),
                    number => format!("token-{number}"),
                };
                body["status"] =
                    json!({"token": token, "expirationTimestamp": "2999-01-01T00:00:00Z"});
                axum::Json(body).into_response()
            }
            Method::DELETE => {
                self.deleted.send_replace(true);
                axum::Json(json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})).into_response()
            }
            _ => axum::Json(body).into_response(),
        }
    }

    /// Waits until the last status written fulfils `wanted`; panics with that status after 20 s.
    pub async fn wait(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut updates = self.statuses.subscribe();
        let found = tokio::time::timeout(
            std::time::Duration::from_secs(20),
            updates.wait_for(|s| wanted(s)),
        )
        .await;
        match found {
            Ok(status) => status.expect("the API lives").clone(),
            Err(_) => panic!(
                "waited for {what}; status {:#}; events {:#?}",
                *self.statuses.borrow(),
                self.reasons()
            ),
        }
    }

    pub async fn wait_deleted(&self) {
        self.deleted
            .subscribe()
            .wait_for(|d| *d)
            .await
            .expect("the API lives");
    }

    /// The last status written.
    pub fn last(&self) -> Value {
        self.statuses.borrow().clone()
    }

    /// Waits for an Event with all of these words; panics after 20 s. Events come behind the status that they explain.
    pub async fn told(&self, words: &[&str]) {
        let fits = |event: &String| words.iter().all(|word| event.contains(word));
        for _ in 0..2000 {
            if self.reasons().iter().any(fits) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("no Event has {words:?}: {:#?}", self.reasons());
    }

    /// `reason: message` of all Events so far.
    pub fn reasons(&self) -> Vec<String> {
        let text = |e: &Value| {
            format!(
                "{}: {}",
                e["reason"].as_str().unwrap_or_default(),
                e["message"].as_str().unwrap_or_default()
            )
        };
        self.events.lock().unwrap().iter().map(text).collect()
    }
}
