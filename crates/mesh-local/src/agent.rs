//! The node agent: runs the pods that are bound to this node as processes.
//!
//! `worker.rs` is one pod's task: it keeps `state.rs`, asks `plan.rs` (pure) what comes next and lets `container.rs` do it; `launch.rs` and
//! `rootfs.rs` run inside the container; the rest are parts named after what they make.

pub mod attach;
pub mod backend;
pub mod cgroup;
pub mod container;
pub mod env;
pub mod etc;
pub mod events;
pub mod launch;
pub mod logs;
pub mod plan;
pub mod probe;
pub mod process;
pub mod registry;
pub mod resolve;
pub mod rootfs;
pub mod sandbox;
pub mod state;
pub mod status;
pub mod terminal;
pub mod unsupported;
pub mod volumes;
pub mod worker;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::ResourceExt;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use events::Recorder;
use registry::Registry;
use sandbox::Ipam;
pub use sandbox::NODE_IP;
use worker::Change;

/// The name of the only node.
pub const NODE_NAME: &str = "mesh-node";

/// What the workers share.
pub struct Shared {
    /// The API.
    pub client: kube::Client,
    /// The node's runtime folder (in memory).
    pub run: PathBuf,
    /// Whether the node has more than one user id.
    pub uids_mapped: bool,
    /// The pods' addresses.
    pub ipam: Ipam,
    /// The running containers.
    pub registry: Arc<Registry>,
    /// For Events.
    pub recorder: Recorder,
    /// Numbers the pods' links.
    pub counter: AtomicU64,
    /// The control group of all containers, where there is one.
    pub cgroups: Option<PathBuf>,
}

impl Shared {
    /// The agent's parts; `run` is the node's runtime folder.
    pub fn new(
        client: kube::Client,
        run: PathBuf,
        registry: Arc<Registry>,
        cgroups: Option<PathBuf>,
    ) -> Self {
        Self {
            recorder: Recorder::start(client.clone()),
            client,
            run,
            uids_mapped: uids_mapped(),
            ipam: Ipam::default(),
            registry,
            counter: AtomicU64::new(1),
            cgroups,
        }
    }
}

/// Whether more than one uid is mapped into this user namespace (user_namespaces(7)).
pub fn uids_mapped() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let count: u64 = map
        .lines()
        .filter_map(|l| l.split_whitespace().nth(2)?.parse::<u64>().ok())
        .sum();
    count > 1
}

struct Worker {
    changes: mpsc::UnboundedSender<Change>,
    /// Namespace, ConfigMaps and Secrets that the pod refers to.
    refers: (String, BTreeSet<String>, BTreeSet<String>),
}

/// Runs the agent until `shutdown`; pods keep running then until the node's namespaces end.
pub async fn run(shared: Arc<Shared>, shutdown: CancellationToken) {
    let pods: Api<Pod> = Api::all(shared.client.clone());
    let config = watcher::Config::default().fields(&format!("spec.nodeName={NODE_NAME}"));
    let mut pods = watcher(pods, config).default_backoff().boxed();
    let mut maps = watcher(
        Api::<ConfigMap>::all(shared.client.clone()),
        watcher::Config::default(),
    )
    .default_backoff()
    .boxed();
    let mut secrets = watcher(
        Api::<Secret>::all(shared.client.clone()),
        watcher::Config::default(),
    )
    .default_backoff()
    .boxed();
    let mut workers: HashMap<String, Worker> = HashMap::new();
    let mut listed: Option<BTreeSet<String>> = None;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(event) = pods.next() => match event {
                Ok(Event::Init) => listed = Some(BTreeSet::new()),
                Ok(Event::InitApply(pod)) => {
                    listed.get_or_insert_default().extend(pod.uid());
                    seen(&shared, &mut workers, pod);
                }
                Ok(Event::InitDone) => {
                    let listed = listed.take().unwrap_or_default();
                    workers.retain(|uid, worker| listed.contains(uid) || removed(worker));
                }
                Ok(Event::Apply(pod)) => seen(&shared, &mut workers, pod),
                Ok(Event::Delete(pod)) => {
                    if let Some(worker) = pod.uid().and_then(|uid| workers.remove(&uid)) {
                        removed(&worker);
                    }
                }
                Err(error) => tracing::warn!(%error, "watching pods"),
            },
            Some(event) = maps.next() => if let Ok(Event::Apply(map)) = event {
                refresh(&workers, map.namespace(), |refers| refers.1.contains(&map.name_any()));
            },
            Some(event) = secrets.next() => if let Ok(Event::Apply(secret)) = event {
                refresh(&workers, secret.namespace(), |refers| refers.2.contains(&secret.name_any()));
            },
        }
    }
}

fn removed(worker: &Worker) -> bool {
    let _ = worker.changes.send(Change::Removed);
    false
}

fn refresh(
    workers: &HashMap<String, Worker>,
    namespace: Option<String>,
    refers: impl Fn(&(String, BTreeSet<String>, BTreeSet<String>)) -> bool,
) {
    for worker in workers
        .values()
        .filter(|w| Some(&w.refers.0) == namespace.as_ref() && refers(&w.refers))
    {
        let _ = worker.changes.send(Change::References);
    }
}

fn seen(shared: &Arc<Shared>, workers: &mut HashMap<String, Worker>, pod: Pod) {
    let Some(uid) = pod.uid() else { return };
    if let Some(worker) = workers.get(&uid) {
        let _ = worker.changes.send(Change::Pod(Box::new(pod)));
        return;
    }
    let (changes, receive) = mpsc::unbounded_channel();
    let (maps, secrets) = volumes::referenced(&pod);
    let refers = (pod.namespace().unwrap_or_default(), maps, secrets);
    workers.insert(uid, Worker { changes, refers });
    tokio::spawn(worker::run(shared.clone(), pod, receive));
}
