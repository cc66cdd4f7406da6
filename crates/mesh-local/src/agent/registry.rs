//! The running containers by name, for logs, exec and port-forward.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::attach::Streams;
use super::logs::RunLog;
use super::process::Target;
use super::sandbox::Sandbox;

/// What is known of a container from outside its worker.
#[derive(Debug, Clone, Default)]
pub struct Entry {
    /// The running process.
    pub target: Option<Target>,
    /// Its standard streams.
    pub streams: Option<Arc<Streams>>,
    /// The log of this run, or of the last one.
    pub log: Option<Arc<RunLog>>,
    /// The log of the run before.
    pub previous: Option<Arc<RunLog>>,
}

#[derive(Debug, Default)]
struct PodEntry {
    uid: String,
    sandbox: Option<Arc<Sandbox>>,
    containers: HashMap<String, Entry>,
}

/// All pods of the node.
#[derive(Debug, Default)]
pub struct Registry(Mutex<HashMap<(String, String), PodEntry>>);

impl Registry {
    fn pods(&self) -> MutexGuard<'_, HashMap<(String, String), PodEntry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a pod with its sandbox.
    pub fn add_pod(&self, namespace: &str, name: &str, uid: &str, sandbox: Arc<Sandbox>) {
        let entry = PodEntry {
            uid: uid.to_owned(),
            sandbox: Some(sandbox),
            containers: HashMap::new(),
        };
        self.pods()
            .insert((namespace.to_owned(), name.to_owned()), entry);
    }

    /// Removes a pod, unless another of the same name has taken its place.
    pub fn remove_pod(&self, namespace: &str, name: &str, uid: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        let mut pods = self.pods();
        if pods.get(&key).is_some_and(|p| p.uid == uid) {
            pods.remove(&key);
        }
    }

    /// Takes note of a new run.
    pub fn started(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        target: Target,
        streams: Arc<Streams>,
        log: Arc<RunLog>,
    ) {
        if let Some(pod) = self.pods().get_mut(&(namespace.to_owned(), pod.to_owned())) {
            let entry = pod.containers.entry(container.to_owned()).or_default();
            entry.previous = entry.log.take();
            entry.log = Some(log);
            entry.target = Some(target);
            entry.streams = Some(streams);
        }
    }

    /// Takes note of a run's end.
    pub fn ended(&self, namespace: &str, pod: &str, container: &str, pid: u32) {
        if let Some(pod) = self.pods().get_mut(&(namespace.to_owned(), pod.to_owned()))
            && let Some(entry) = pod.containers.get_mut(container)
            && entry.target.as_ref().is_some_and(|t| t.pid == pid)
        {
            entry.target = None;
            entry.streams = None;
        }
    }

    /// A pod's sandbox; `None`: no such pod runs here.
    pub fn sandbox(&self, namespace: &str, pod: &str) -> Option<Arc<Sandbox>> {
        self.pods()
            .get(&(namespace.to_owned(), pod.to_owned()))
            .and_then(|p| p.sandbox.clone())
    }

    /// A container that has been started at least once.
    pub fn container(&self, namespace: &str, pod: &str, container: &str) -> Option<Entry> {
        self.pods()
            .get(&(namespace.to_owned(), pod.to_owned()))
            .and_then(|p| p.containers.get(container).cloned())
    }
}
