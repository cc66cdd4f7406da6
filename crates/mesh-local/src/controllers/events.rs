//! Events for people, written beside the loops so that they never wait for them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Events that may wait; more are dropped, since they only describe.
const WAITING: usize = 1024;
/// Repeated events that are remembered, so that they count up instead of piling up.
const REMEMBERED: usize = 4096;

/// Kind of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Level {
    Normal,
    Warning,
}

struct Note {
    component: &'static str,
    about: ObjectReference,
    level: Level,
    reason: &'static str,
    message: String,
}

/// Takes events; cheap to clone.
#[derive(Clone)]
pub(super) struct Recorder {
    sender: mpsc::Sender<Note>,
}

impl Recorder {
    /// A recorder whose events are written by a task of its own until `shutdown`.
    pub(super) fn start(client: Client, shutdown: CancellationToken) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = write_all(client, receiver) => {}
            }
        });
        Self { sender }
    }

    /// Records that `component` did or met something with the object `about`.
    pub(super) fn publish<K: Resource<DynamicType = ()>>(
        &self,
        component: &'static str,
        about: &K,
        level: Level,
        reason: &'static str,
        message: String,
    ) {
        let note = Note {
            component,
            about: reference(about),
            level,
            reason,
            message,
        };
        if self.sender.try_send(note).is_err() {
            tracing::debug!(component, reason, "too many events wait; dropped one");
        }
    }
}

/// A reference that names `object` fully.
pub(super) fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        namespace: object.namespace(),
        name: Some(object.name_any()),
        uid: object.uid(),
        resource_version: object.resource_version(),
        field_path: None,
    }
}

/// What makes two events the same.
type Same = (Option<String>, Level, &'static str, String);

async fn write_all(client: Client, mut receiver: mpsc::Receiver<Note>) {
    let mut written: HashMap<Same, (String, i32)> = HashMap::new();
    while let Some(note) = receiver.recv().await {
        let same = (
            note.about.uid.clone(),
            note.level,
            note.reason,
            note.message.clone(),
        );
        let namespace = note
            .about
            .namespace
            .clone()
            .unwrap_or_else(|| "default".into());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        if let Some((name, count)) = written.get_mut(&same) {
            *count += 1;
            let patch = json!({ "count": *count, "lastTimestamp": now() });
            if api
                .patch(name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .is_ok()
            {
                continue;
            }
        }
        let event = event(note, &namespace);
        let name = event.name_any();
        match api.create(&PostParams::default(), &event).await {
            Ok(_) => {
                if written.len() >= REMEMBERED {
                    written.clear();
                }
                written.insert(same, (name, 1));
            }
            Err(error) => tracing::debug!(%error, "writing an event failed"),
        }
    }
}

fn event(note: Note, namespace: &str) -> Event {
    let about = note.about.name.clone().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            name: Some(unique_name(&about)),
            namespace: Some(namespace.into()),
            ..Default::default()
        },
        involved_object: note.about,
        type_: Some(match note.level {
            Level::Normal => "Normal".into(),
            Level::Warning => "Warning".into(),
        }),
        reason: Some(note.reason.into()),
        message: Some(note.message),
        source: Some(EventSource {
            component: Some(note.component.into()),
            host: None,
        }),
        reporting_component: Some(note.component.into()),
        first_timestamp: Some(now()),
        last_timestamp: Some(now()),
        count: Some(1),
        ..Default::default()
    }
}

/// A name for an event about the object `about`: with the time in nanoseconds as Kubernetes does, so that events of one object are listed
/// in their order. No two are equal.
pub(crate) fn unique_name(about: &str) -> String {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = u64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or_default();
    let last = LAST.fetch_max(now, Ordering::Relaxed);
    let unique = if now > last {
        now
    } else {
        LAST.fetch_add(1, Ordering::Relaxed) + 1
    };
    format!("{about}.{unique:016x}")
}

/// The present time as the API writes it, in whole seconds.
pub(super) fn now() -> Time {
    let now = jiff::Timestamp::now();
    Time(jiff::Timestamp::from_second(now.as_second()).unwrap_or(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_order_of_time() {
        let names: Vec<_> = (0..1000).map(|_| unique_name("pod")).collect();
        assert!(names.is_sorted_by(|a, b| a < b));
    }
}
