//! Kubernetes Events about pods: written in order by one task, repeated ones counted.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::mpsc;

use crate::controllers::events::unique_name;

/// Events that are remembered for counting; beyond that repeated ones start anew.
const MAX_REMEMBERED: usize = 4096;

struct Note {
    pod: Pod,
    container: Option<(&'static str, String)>,
    warning: bool,
    reason: &'static str,
    message: String,
}

/// Writes Events about one pod. Cheap to clone.
#[derive(Clone)]
pub struct Recorder {
    notes: mpsc::UnboundedSender<Note>,
}

impl Recorder {
    /// Starts the writing task; it ends when the last recorder is dropped.
    pub fn start(client: kube::Client) -> Self {
        let (notes, receive) = mpsc::unbounded_channel();
        tokio::spawn(write(client, receive));
        Self { notes }
    }

    /// A normal Event.
    pub fn normal(
        &self,
        pod: &Pod,
        container: Option<(&'static str, &str)>,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        self.note(pod, container, false, reason, message.into());
    }

    /// A warning.
    pub fn warning(
        &self,
        pod: &Pod,
        container: Option<(&'static str, &str)>,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        self.note(pod, container, true, reason, message.into());
    }

    fn note(
        &self,
        pod: &Pod,
        container: Option<(&'static str, &str)>,
        warning: bool,
        reason: &'static str,
        message: String,
    ) {
        let pod = Pod {
            metadata: pod.metadata.clone(),
            ..Pod::default()
        };
        let container = container.map(|(list, name)| (list, name.to_owned()));
        let _ = self.notes.send(Note {
            pod,
            container,
            warning,
            reason,
            message,
        });
    }
}

async fn write(client: kube::Client, mut notes: mpsc::UnboundedReceiver<Note>) {
    let mut known: HashMap<String, (String, u32)> = HashMap::new();
    while let Some(note) = notes.recv().await {
        let meta = &note.pod.metadata;
        let namespace = meta.namespace.as_deref().unwrap_or("default");
        let api: Api<Event> = Api::namespaced(client.clone(), namespace);
        let path = note
            .container
            .as_ref()
            .map(|(list, name)| format!("spec.{list}{{{name}}}"));
        let key = format!("{:?} {path:?} {} {}", meta.uid, note.reason, note.message);
        let now = format!("{:.0}", Timestamp::now());
        if let Some((name, count)) = known.get_mut(&key) {
            *count += 1;
            let patch = Patch::Merge(json!({"count": count, "lastTimestamp": now}));
            if api
                .patch(name, &PatchParams::default(), &patch)
                .await
                .is_ok()
            {
                continue;
            }
        }
        if known.len() >= MAX_REMEMBERED {
            known.clear();
        }
        let name = unique_name(meta.name.as_deref().unwrap_or_default());
        let event = json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", "namespace": namespace, "name": meta.name, "uid": meta.uid, "fieldPath": path},
            "type": if note.warning { "Warning" } else { "Normal" },
            "reason": note.reason, "message": note.message, "count": 1,
            "firstTimestamp": now, "lastTimestamp": now,
            "source": {"component": "kubelet", "host": super::NODE_NAME},
            "reportingComponent": "kubelet", "reportingInstance": super::NODE_NAME,
        });
        let created = match serde_json::from_value::<Event>(event) {
            Ok(event) => api
                .create(&PostParams::default(), &event)
                .await
                .map(drop)
                .map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match created {
            Ok(()) => drop(known.insert(key, (name, 1))),
            Err(error) => {
                tracing::debug!(%error, reason = note.reason, "an Event could not be written")
            }
        }
    }
}
