//! watch: a stream of changes, one JSON object a line.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::Stream;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::ApiServer;
use crate::errors::ApiError;
use crate::read::{Filter, too_large};
use crate::request::{Form, Request};
use crate::respond;
use crate::storage::{Change, Storage, WatchRefused};

/// How often an idle watch tells its revision.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// A watch without `timeoutSeconds` ends after this.
const DEFAULT_TIMEOUT: u64 = 3600;

/// Starts a watch over a collection.
///
/// # Errors
/// 400 for bad parameters. A revision that is too old is told in the stream, as Kubernetes does.
pub fn watch(api: &ApiServer, request: &Request) -> Result<Response, ApiError> {
    start(api, request, None)
}

/// Starts a watch of one object.
///
/// # Errors
/// As [`watch`].
pub fn watch_one(api: &ApiServer, request: &Request, name: &str) -> Result<Response, ApiError> {
    start(api, request, Some(request.target.key(name)))
}

fn start(api: &ApiServer, request: &Request, key: Option<String>) -> Result<Response, ApiError> {
    let query = &request.query;
    let filter = Filter::of(request)?;
    let revision = query.number("resourceVersion")?;
    let initial = query.flag("sendInitialEvents");
    if initial && query.get("resourceVersionMatch") != Some("NotOlderThan") {
        let message = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
        return Err(ApiError::new(422, "Invalid", message));
    }
    let bookmarks = query.flag("allowWatchBookmarks");
    let timeout = query
        .number("timeoutSeconds")?
        .filter(|s| *s > 0)
        .unwrap_or(DEFAULT_TIMEOUT);
    let mut watcher = Watcher {
        request: request.clone(),
        prefix: request
            .target
            .namespace
            .as_ref()
            .map(|n| format!("{n}/"))
            .unwrap_or_default(),
        key,
        filter,
        pending: VecDeque::new(),
        receiver: None,
        revision: 0,
        bookmarks,
        end: Instant::now() + Duration::from_secs(timeout.min(24 * 3600)),
        ticker: tokio::time::interval_at(Instant::now() + BOOKMARK_EVERY, BOOKMARK_EVERY),
        stop: api.closing(),
    };
    watcher
        .ticker
        .set_missed_tick_behavior(MissedTickBehavior::Delay);
    watcher.begin(api.storage(), revision, initial)?;
    let mut response = Response::new(Body::from_stream(watcher.stream()));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

struct Watcher {
    request: Request,
    prefix: String,
    key: Option<String>,
    filter: Filter,
    pending: VecDeque<Bytes>,
    receiver: Option<Receiver<Arc<Change>>>,
    revision: u64,
    bookmarks: bool,
    end: Instant,
    ticker: Interval,
    stop: tokio_util::sync::CancellationToken,
}

impl Watcher {
    /// Queues what the client must see first and subscribes to the rest.
    fn begin(
        &mut self,
        storage: &Storage,
        revision: Option<u64>,
        initial: bool,
    ) -> Result<(), ApiError> {
        let resource = self.request.target.resource.clone();
        let from_state = initial || revision.is_none_or(|r| r == 0);
        let started = if from_state {
            let (snapshot, started) =
                storage.list_and_watch(&resource.storage, self.request.target.namespace.as_deref());
            if let Some(asked) = revision
                && asked > snapshot.revision
            {
                return Err(too_large(asked, snapshot.revision));
            }
            for (key, stored) in &snapshot.items {
                if self.key.as_ref().is_none_or(|k| k == key) && self.filter.matches(&stored.value)
                {
                    self.push("ADDED", &stored.value);
                }
            }
            self.revision = snapshot.revision;
            if initial && self.bookmarks {
                self.push_bookmark(true);
            }
            Ok(started)
        } else {
            storage.watch(&resource.storage, revision)
        };
        match started {
            Ok(started) => {
                self.revision = self.revision.max(started.revision);
                started
                    .backlog
                    .iter()
                    .for_each(|change| self.push_change(change));
                self.receiver = Some(started.receiver);
                Ok(())
            }
            Err(WatchRefused::Future(current)) => {
                Err(too_large(revision.unwrap_or_default(), current))
            }
            Err(WatchRefused::Expired(floor)) => {
                let asked = revision.unwrap_or_default();
                let error =
                    ApiError::expired(format!("too old resource version: {asked} ({floor})"));
                self.push_line(&json!({ "type": "ERROR", "object": error.status() }));
                Ok(())
            }
        }
    }

    fn push_line(&mut self, event: &Value) {
        let mut text = event.to_string();
        text.push('\n');
        self.pending.push_back(text.into());
    }

    fn push(&mut self, kind: &str, stored: &Value) {
        let object = respond::event_object(&self.request, stored);
        self.push_line(&json!({ "type": kind, "object": object }));
    }

    /// A change as the selectors make it look: an object that begins to match appears, one that ceases to disappears.
    fn push_change(&mut self, change: &Change) {
        self.revision = self.revision.max(change.revision);
        let wanted = change.key.starts_with(&self.prefix)
            && self.key.as_ref().is_none_or(|k| *k == change.key);
        if !wanted {
            return;
        }
        let before = change
            .previous
            .as_ref()
            .is_some_and(|p| self.filter.matches(&p.value));
        let now = !change.deleted && self.filter.matches(&change.object.value);
        match (before, now) {
            (false, true) => self.push("ADDED", &change.object.value),
            (true, true) => self.push("MODIFIED", &change.object.value),
            (true, false) => {
                // What is shown is the last state that matched, at the revision of the change.
                let last = change.previous.as_ref().unwrap_or(&change.object);
                let mut value = last.value.clone();
                value["metadata"]["resourceVersion"] = change.revision.to_string().into();
                self.push("DELETED", &value);
            }
            (false, false) => {}
        }
    }

    fn push_bookmark(&mut self, end_of_initial: bool) {
        let resource = self.request.target.resource.clone();
        let mut metadata = json!({ "resourceVersion": self.revision.to_string() });
        if end_of_initial {
            metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
        }
        if self.request.form == Form::Object && !resource.custom {
            metadata["creationTimestamp"] = Value::Null;
        }
        let object = match self.request.form {
            Form::Table => json!({
                "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": { "resourceVersion": metadata["resourceVersion"] },
                "columnDefinitions": [], "rows": [],
            }),
            Form::Partial => {
                json!({ "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata })
            }
            Form::Object => {
                json!({ "kind": resource.kind, "apiVersion": resource.api_version(), "metadata": metadata })
            }
        };
        self.push_line(&json!({ "type": "BOOKMARK", "object": object }));
    }

    fn stream(self) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
        futures::stream::unfold(self, |mut watcher| async move {
            let line = watcher.next().await?;
            Some((Ok(line), watcher))
        })
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(line) = self.pending.pop_front() {
                return Some(line);
            }
            let receiver = self.receiver.as_mut()?;
            tokio::select! {
                () = self.stop.cancelled() => return None,
                () = tokio::time::sleep_until(self.end) => {
                    self.receiver = None;
                    if self.bookmarks {
                        self.push_bookmark(false);
                    }
                }
                _ = self.ticker.tick() => if self.bookmarks {
                    self.push_bookmark(false);
                },
                change = receiver.recv() => match change {
                    Ok(change) => self.push_change(&change),
                    // Too slow: the client must start again from its last revision, or list.
                    Err(RecvError::Lagged(_) | RecvError::Closed) => self.receiver = None,
                },
            }
        }
    }
}
