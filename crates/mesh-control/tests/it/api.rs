//! As much of a Kubernetes API as the control plane uses: list, watch, get, create, replace, merge and JSON patch.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::watch;

/// Plural, namespace, name.
type Key = (String, String, String);

#[derive(Clone)]
pub struct Api {
    table: Arc<Mutex<Table>>,
    revision: watch::Sender<u64>,
}

#[derive(Default)]
struct Table {
    objects: BTreeMap<Key, Value>,
    log: Vec<(u64, &'static str, String, Value)>,
    missing: BTreeSet<String>,
}

impl Api {
    pub fn new() -> Self {
        Self {
            table: Arc::default(),
            revision: watch::Sender::new(1),
        }
    }

    pub fn client(&self) -> kube::Client {
        let router = Router::new().fallback(handle).with_state(self.clone());
        kube::Client::new(router, "default")
    }

    /// Makes the cluster lack a kind, as before its CRD is applied.
    pub fn without(self, plural: &str) -> Self {
        self.table.lock().unwrap().missing.insert(plural.to_owned());
        self
    }

    /// Applies the CRD, as it were.
    pub fn add_kind(&self, plural: &str) {
        self.table.lock().unwrap().missing.remove(plural);
    }

    /// Creates or replaces an object.
    pub fn apply(&self, plural: &str, mut object: Value) {
        let key = key_of(plural, &object);
        let before = self.get(plural, &key.1, &key.2);
        let generation = before.as_ref().map_or(1, |old| {
            let old_generation = old["metadata"]["generation"].as_i64().unwrap_or(1);
            old_generation + i64::from(old["spec"] != object["spec"])
        });
        object["metadata"]["generation"] = json!(generation);
        if let Some(status) = before.as_ref().and_then(|old| old.get("status"))
            && object.get("status").is_none()
        {
            object["status"] = status.clone();
        }
        let kind = if before.is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        self.write(kind, key, object);
    }

    pub fn delete(&self, plural: &str, namespace: &str, name: &str) {
        let object = self.get(plural, namespace, name).unwrap();
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        self.write("DELETED", key, object);
    }

    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        self.table.lock().unwrap().objects.get(&key).cloned()
    }

    fn write(&self, kind: &'static str, key: Key, mut object: Value) {
        let mut table = self.table.lock().unwrap();
        let revision = *self.revision.borrow() + 1;
        object["metadata"]["resourceVersion"] = json!(revision.to_string());
        table
            .log
            .push((revision, kind, key.0.clone(), object.clone()));
        if kind == "DELETED" {
            table.objects.remove(&key);
        } else {
            table.objects.insert(key, object);
        }
        self.revision.send_replace(revision);
    }
}

fn key_of(plural: &str, object: &Value) -> Key {
    let text = |field: &str| {
        object["metadata"][field]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    (plural.to_owned(), text("namespace"), text("name"))
}

/// A request's path in parts: plural, namespace, name, subresource.
fn parts(path: &str) -> (String, String, String) {
    let mut rest: Vec<&str> = path.trim_matches('/').split('/').collect();
    rest.drain(..if rest[0] == "api" { 2 } else { 3 });
    let mut namespace = "";
    if rest.first() == Some(&"namespaces") && rest.len() > 2 {
        namespace = rest[1];
        rest.drain(..2);
    }
    let at = |index: usize| rest.get(index).copied().unwrap_or_default().to_owned();
    (at(0), namespace.to_owned(), at(1))
}

async fn handle(
    State(api): State<Api>,
    method: Method,
    uri: Uri,
    headers: axum::http::HeaderMap,
    body: Bytes,
) -> Response {
    let (plural, namespace, name) = parts(uri.path());
    let query = uri.query().unwrap_or_default();
    if api.table.lock().unwrap().missing.contains(&plural) {
        return failure(StatusCode::NOT_FOUND, "NotFound");
    }
    if query.contains("watch=true") {
        return watched(&api, plural, query);
    }
    match method {
        Method::GET if name.is_empty() => listed(&api, &plural, &namespace),
        Method::GET => match api.get(&plural, &namespace, &name) {
            Some(object) => json_response(&object),
            None => failure(StatusCode::NOT_FOUND, "NotFound"),
        },
        Method::POST if plural == "tokenreviews" => {
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            let token = review["spec"]["token"].as_str().unwrap_or_default();
            let known = api.get("tokens", "", token);
            review["status"] =
                known.map_or(json!({"authenticated": false}), |t| t["status"].clone());
            json_response(&review)
        }
        // Everybody may do everything, but for those who are denied.
        Method::POST if plural == "subjectaccessreviews" => {
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            let user = review["spec"]["user"].as_str().unwrap_or_default();
            let denied = api.get("denials", "", user).is_some();
            review["status"] = json!({"allowed": !denied});
            json_response(&review)
        }
        Method::POST => {
            let object: Value = serde_json::from_slice(&body).unwrap();
            let (_, namespace, name) = key_of(&plural, &object);
            if api.get(&plural, &namespace, &name).is_some() {
                return failure(StatusCode::CONFLICT, "AlreadyExists");
            }
            api.apply(&plural, object);
            json_response(&api.get(&plural, &namespace, &name).unwrap())
        }
        Method::PUT => {
            let object: Value = serde_json::from_slice(&body).unwrap();
            let present = api.get(&plural, &namespace, &name);
            let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
            match present {
                None => failure(StatusCode::NOT_FOUND, "NotFound"),
                Some(present) if version(&present) != version(&object) => {
                    failure(StatusCode::CONFLICT, "Conflict")
                }
                Some(_) => {
                    api.apply(&plural, object);
                    json_response(&api.get(&plural, &namespace, &name).unwrap())
                }
            }
        }
        Method::PATCH => {
            let Some(mut object) = api.get(&plural, &namespace, &name) else {
                return failure(StatusCode::NOT_FOUND, "NotFound");
            };
            let patch: Value = serde_json::from_slice(&body).unwrap();
            if headers[header::CONTENT_TYPE] == "application/json-patch+json" {
                let patch: json_patch::Patch = serde_json::from_value(patch).unwrap();
                if json_patch::patch(&mut object, &patch).is_err() {
                    return failure(StatusCode::UNPROCESSABLE_ENTITY, "Invalid");
                }
            } else {
                json_patch::merge(&mut object, &patch);
            }
            api.apply(&plural, object);
            json_response(&api.get(&plural, &namespace, &name).unwrap())
        }
        _ => failure(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
    }
}

fn listed(api: &Api, plural: &str, namespace: &str) -> Response {
    let table = api.table.lock().unwrap();
    let items: Vec<&Value> = table
        .objects
        .iter()
        .filter(|(key, _)| key.0 == plural && (namespace.is_empty() || key.1 == namespace))
        .map(|(_, object)| object)
        .collect();
    json_response(&json!({
        "apiVersion": "v1",
        "kind": "List",
        "metadata": {"resourceVersion": api.revision.borrow().to_string()},
        "items": items,
    }))
}

fn watched(api: &Api, plural: String, query: &str) -> Response {
    let since = query
        .split('&')
        .find_map(|part| part.strip_prefix("resourceVersion="))
        .and_then(|text| text.parse::<u64>().ok())
        .unwrap_or_default();
    let state = (api.clone(), api.revision.subscribe(), plural, since);
    let events = stream::unfold(
        state,
        |(api, mut revisions, plural, mut since)| async move {
            loop {
                let now = *revisions.borrow_and_update();
                let lines: String = api
                    .table
                    .lock()
                    .unwrap()
                    .log
                    .iter()
                    .filter(|(revision, _, of, _)| {
                        *revision > since && *revision <= now && *of == plural
                    })
                    .map(|(_, kind, _, object)| {
                        format!("{}\n", json!({"type": kind, "object": object}))
                    })
                    .collect();
                since = now;
                if !lines.is_empty() {
                    let item = Ok::<_, std::convert::Infallible>(Bytes::from(lines));
                    return Some((item, (api, revisions, plural, since)));
                }
                revisions.changed().await.ok()?;
            }
        },
    );
    Response::builder()
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from_stream(events))
        .unwrap()
}

fn json_response(value: &Value) -> Response {
    axum::Json(value.clone()).into_response()
}

fn failure(code: StatusCode, reason: &str) -> Response {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "message": reason, "reason": reason, "code": code.as_u16(),
    });
    (code, axum::Json(status)).into_response()
}
