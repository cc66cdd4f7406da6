//! From changes to published meshes: the first change after a quiet moment at once, what follows within a window together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::{Mesh, ObjectKey, Problem};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::jwks;
use crate::metrics::Metrics;
use crate::status::Wish;
use crate::table::Table;
use crate::watch::Change;

/// The shortest time from one mesh to the next; a burst costs one build per window.
const WINDOW: Duration = Duration::from_millis(50);
/// The longest, however long building takes.
const MAX_WINDOW: Duration = Duration::from_secs(1);
/// Changes that may wait while a mesh is built; the watches wait when there are more.
const QUEUE: usize = 4096;

/// A mesh, and when the oldest change that is new in it was seen.
pub(crate) struct Published {
    pub(crate) mesh: Mesh,
    pub(crate) since: Instant,
}

/// The newest mesh; none before every kind has been listed.
pub(crate) type Newest = watch::Receiver<Option<Arc<Published>>>;
/// What the statuses of objects should say.
pub(crate) type Wishes = watch::Receiver<Arc<Vec<Wish>>>;

/// What others than nodes read.
pub(crate) struct Shared {
    state: watch::Receiver<State>,
}

/// What others read.
#[derive(Clone, Default)]
pub(crate) struct State {
    ready: bool,
    native_sidecars: bool,
    namespaces: Arc<BTreeMap<String, BTreeMap<String, String>>>,
    injector: Arc<BTreeMap<String, String>>,
    mesh_config: Arc<mesh_api::mesh_config::MeshConfig>,
}

impl Shared {
    /// Whether a mesh has been published.
    pub(crate) fn ready(&self) -> bool {
        self.state.borrow().ready
    }

    /// Labels of a namespace.
    pub(crate) fn namespace_labels(&self, namespace: &str) -> BTreeMap<String, String> {
        let state = self.state.borrow();
        state.namespaces.get(namespace).cloned().unwrap_or_default()
    }

    /// All namespaces with their labels.
    pub(crate) fn namespaces(&self) -> Arc<BTreeMap<String, BTreeMap<String, String>>> {
        Arc::clone(&self.state.borrow().namespaces)
    }

    /// Tells of every change of what is here.
    pub(crate) fn changes(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Whether every node runs native sidecars.
    pub(crate) fn native_sidecars(&self) -> bool {
        self.state.borrow().native_sidecars
    }

    /// Data of the injector's ConfigMap.
    pub(crate) fn injector(&self) -> Arc<BTreeMap<String, String>> {
        Arc::clone(&self.state.borrow().injector)
    }

    /// The mesh configuration.
    pub(crate) fn mesh_config(&self) -> Arc<mesh_api::mesh_config::MeshConfig> {
        Arc::clone(&self.state.borrow().mesh_config)
    }
}

/// Takes changes, makes meshes.
pub(crate) struct Publisher {
    table: Table,
    sender: mpsc::Sender<Change>,
    receiver: mpsc::Receiver<Change>,
    published: watch::Sender<Option<Arc<Published>>>,
    wishes: watch::Sender<Arc<Vec<Wish>>>,
    state: watch::Sender<State>,
    metrics: Arc<Metrics>,
}

/// A publisher and what it gives to others.
pub(crate) fn new(
    revision: &str,
    metrics: Arc<Metrics>,
) -> (Publisher, Newest, Wishes, Arc<Shared>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let (published, newest) = watch::channel(None);
    let (wishes, wanted) = watch::channel(Arc::new(Vec::new()));
    let (state, view) = watch::channel(State::default());
    let publisher = Publisher {
        table: Table::new(revision),
        sender,
        receiver,
        published,
        wishes,
        state,
        metrics,
    };
    (publisher, newest, wanted, Arc::new(Shared { state: view }))
}

impl Publisher {
    /// Where changes are sent.
    pub(crate) fn changes(&self) -> mpsc::Sender<Change> {
        self.sender.clone()
    }

    /// Publishes until all watches are gone. Nothing is published before `kinds` kinds have been listed: a mesh without its
    /// rules would send traffic where nobody wants it.
    pub(crate) async fn run(self, kinds: usize, keys: jwks::Keys) {
        let Self {
            mut table,
            sender,
            mut receiver,
            published,
            wishes,
            state,
            metrics,
        } = self;
        drop(sender);
        let mut not_before = Instant::now();
        while let Some(change) = receiver.recv().await {
            let since = Instant::now();
            let mut dirty = table.apply(change);
            loop {
                while let Ok(change) = receiver.try_recv() {
                    dirty |= table.apply(change);
                }
                share(&table, &state);
                if !dirty || table.listed() < kinds {
                    break;
                }
                match tokio::time::timeout_at(not_before, receiver.recv()).await {
                    Ok(Some(change)) if Instant::now() < not_before => {
                        dirty |= table.apply(change);
                        continue;
                    }
                    Ok(Some(change)) => dirty |= table.apply(change),
                    Ok(None) => return,
                    Err(_) => {}
                }
                if !state.borrow().ready {
                    jwks::prefetch(&keys, &mut table.objects).await;
                }
                let started = Instant::now();
                table = build(table, since, &published, &wishes, &metrics).await;
                let took = started.elapsed();
                not_before = Instant::now() + (took * 2).clamp(WINDOW, MAX_WINDOW);
                state.send_if_modified(|state| !std::mem::replace(&mut state.ready, true));
                break;
            }
        }
    }
}

/// Tells others what is new for them.
fn share(table: &Table, state: &watch::Sender<State>) {
    state.send_if_modified(|state| {
        let same = Arc::ptr_eq(&state.namespaces, &table.namespaces)
            && Arc::ptr_eq(&state.injector, &table.injector)
            && state.native_sidecars == table.native_sidecars()
            && *state.mesh_config == *table.objects.mesh_config();
        if !same {
            state.namespaces = Arc::clone(&table.namespaces);
            state.injector = Arc::clone(&table.injector);
            state.native_sidecars = table.native_sidecars();
            state.mesh_config = Arc::new(table.objects.mesh_config().clone());
        }
        !same
    });
}

/// Builds and publishes, away from the threads that serve connections.
async fn build(
    table: Table,
    since: Instant,
    published: &watch::Sender<Option<Arc<Published>>>,
    wishes: &watch::Sender<Arc<Vec<Wish>>>,
    metrics: &Arc<Metrics>,
) -> Table {
    let objects = table.objects.clone();
    let built = tokio::task::spawn_blocking(move || Mesh::build(&objects)).await;
    match built {
        Ok(mesh) => {
            metrics.mesh_built(&mesh, since.elapsed());
            wishes.send_replace(Arc::new(wishes_of(&table, mesh.problems())));
            published.send_replace(Some(Arc::new(Published { mesh, since })));
        }
        // Building must not fail; should it, the mesh before stays in force.
        Err(error) => tracing::error!(%error, "building the mesh failed; the one before stays"),
    }
    table
}

fn wishes_of(table: &Table, problems: &[Problem]) -> Vec<Wish> {
    let mut by_object: BTreeMap<&ObjectKey, Vec<Problem>> = BTreeMap::new();
    for problem in problems {
        by_object
            .entry(&problem.object)
            .or_default()
            .push(problem.clone());
    }
    table
        .istio
        .iter()
        .map(|(key, view)| {
            let mut problems = view.findings.clone();
            problems.extend(by_object.remove(key).unwrap_or_default());
            Wish {
                key: key.clone(),
                api_version: view.api_version.clone(),
                generation: view.generation,
                current: view.status.clone(),
                problems,
            }
        })
        .collect()
}
