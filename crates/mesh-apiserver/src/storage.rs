//! Objects in memory with the store beneath: revisions, durable writes, the watch history.
//!
//! One lock orders all writes, so revisions are handed out in the order in which watchers see them. A write stands in line until it
//! is flushed, together with all that wait at the same time; only then does anybody see it. Those who read look at what is flushed and
//! never wait for a disk; those who write look at the line first, since the newest state of an object may stand there.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use mesh_store::{Batch, Store, StoreError, Tree};
use serde_json::Value;
use tokio::sync::{broadcast, oneshot, watch};

use crate::{OpenError, rbac};

/// Changes kept for watches of one resource that resume.
const HISTORY: usize = 4096;
/// Changes that a watcher may be behind before it is closed.
const WATCH_BUFFER: usize = 1024;

/// A stored object at one revision.
#[derive(Debug)]
pub struct Stored {
    /// The object, with its `metadata.resourceVersion`.
    pub value: Value,
    /// The revision.
    pub revision: u64,
}

/// What happened to an object.
#[derive(Debug)]
pub struct Change {
    /// Revision of the change.
    pub revision: u64,
    /// `namespace/name`.
    pub key: String,
    /// The object after the change; after a deletion its last state at the revision of the deletion.
    pub object: Arc<Stored>,
    /// The object before the change; `None` after a creation.
    pub previous: Option<Arc<Stored>>,
    /// The object is gone.
    pub deleted: bool,
}

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The object is not at the expected revision, or exists, or doesn't.
    #[error("the object has changed")]
    Changed,
    /// The store failed; nobody has seen the change.
    #[error("writing to the state store: {0}")]
    Store(#[from] StoreError),
    /// The store was closed before it answered.
    #[error("the state store was closed during the write; start the cluster again")]
    Closed,
}

/// What must be there for a write to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Nothing.
    Absent,
    /// The object at this revision.
    Revision(u64),
}

#[derive(Debug)]
struct Collection {
    objects: BTreeMap<String, Arc<Stored>>,
    history: VecDeque<Arc<Change>>,
    /// Watches can resume at this revision or later.
    floor: u64,
    sender: broadcast::Sender<Arc<Change>>,
}

impl Collection {
    fn new(floor: u64) -> Collection {
        Collection {
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            floor,
            sender: broadcast::Sender::new(WATCH_BUFFER),
        }
    }
}

#[derive(Debug)]
struct State {
    revision: u64,
    /// The newest change of a role or binding.
    policy_revision: u64,
    collections: HashMap<String, Collection>,
}

/// What became of a write.
type Answer = Result<Arc<Stored>, WriteError>;

/// A write that is not flushed yet.
#[derive(Debug)]
struct Staged {
    resource: String,
    key: String,
    /// The object after the write, or its last state.
    object: Arc<Stored>,
    deleted: bool,
}

/// The writes that are not flushed yet, oldest first.
#[derive(Debug)]
struct Line {
    /// The newest revision given out.
    revision: u64,
    staged: VecDeque<Staged>,
}

/// All objects.
#[derive(Debug)]
pub struct Storage {
    store: Store,
    objects: Tree,
    meta: Tree,
    /// Locked before `state` where both are needed.
    line: Mutex<Line>,
    /// What is flushed.
    state: Arc<RwLock<State>>,
    /// The revision up to which the line has been settled, for better or worse.
    settled: Arc<watch::Sender<u64>>,
}

/// Objects of one resource at one moment.
pub struct Snapshot {
    /// The newest revision of all resources.
    pub revision: u64,
    /// In order of `namespace/name`.
    pub items: Vec<(String, Arc<Stored>)>,
}

/// What a watch starts from.
pub struct WatchStart {
    /// Changes after the asked revision, oldest first.
    pub backlog: Vec<Arc<Change>>,
    /// Later ones.
    pub receiver: broadcast::Receiver<Arc<Change>>,
    /// The newest revision at the start.
    pub revision: u64,
}

/// A watch can't start at the asked revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchRefused {
    /// Too old; the first is the oldest revision that works.
    Expired(u64),
    /// In the future; the current one is given.
    Future(u64),
}

impl State {
    /// Lets everybody see a change that is flushed.
    fn publish(&mut self, resource: &str, change: Change) {
        self.revision = change.revision;
        if is_policy(resource) {
            self.policy_revision = change.revision;
        }
        let collection = self
            .collections
            .entry(resource.to_owned())
            .or_insert_with(|| Collection::new(0));
        if change.deleted {
            collection.objects.remove(&change.key);
        } else {
            collection
                .objects
                .insert(change.key.clone(), change.object.clone());
        }
        if collection.history.len() == HISTORY
            && let Some(oldest) = collection.history.pop_front()
        {
            collection.floor = oldest.revision;
        }
        let change = Arc::new(change);
        collection.history.push_back(change.clone());
        // No receiver is no error: nobody watches.
        let _ = collection.sender.send(change);
    }
}

impl Storage {
    /// Loads everything from the store.
    pub fn open(store: Store) -> Result<Storage, OpenError> {
        let (objects, meta) = (store.tree("objects")?, store.tree("meta")?);
        let mut state = State {
            revision: read_number(&meta, "revision")?.unwrap_or(1),
            policy_revision: 1,
            collections: HashMap::new(),
        };
        for item in meta.scan_prefix("last/") {
            let (key, value) = item?;
            let name = String::from_utf8_lossy(&key[b"last/".len()..]).into_owned();
            state.collections.insert(
                name,
                Collection::new(number(&value).unwrap_or(state.revision)),
            );
        }
        for item in objects.scan_prefix("") {
            let (key, bytes) = item?;
            let key = String::from_utf8_lossy(&key).into_owned();
            let bad = |reason: &str| OpenError::Object {
                key: key.replace('\0', " "),
                reason: reason.to_owned(),
            };
            let (resource, name) = key
                .split_once('\0')
                .ok_or_else(|| bad("the key has no resource"))?;
            let value: Value = serde_json::from_slice(&bytes).map_err(|e| bad(&e.to_string()))?;
            let revision = value["metadata"]["resourceVersion"]
                .as_str()
                .and_then(|t| t.parse().ok());
            let revision = revision.ok_or_else(|| bad("it has no resourceVersion"))?;
            let floor = state.revision;
            let collection = state
                .collections
                .entry(resource.to_owned())
                .or_insert_with(|| Collection::new(floor));
            collection
                .objects
                .insert(name.to_owned(), Arc::new(Stored { value, revision }));
        }
        Ok(Storage {
            store,
            objects,
            meta,
            line: Mutex::new(Line {
                revision: state.revision,
                staged: VecDeque::new(),
            }),
            settled: Arc::new(watch::Sender::new(state.revision)),
            state: Arc::new(RwLock::new(state)),
        })
    }

    /// The newest revision.
    pub fn revision(&self) -> u64 {
        self.read().revision
    }

    /// Revision of the newest change of a role or binding since the server opened.
    pub fn policy_revision(&self) -> u64 {
        self.read().policy_revision
    }

    /// One object by `namespace/name` (`/name` without namespace).
    pub fn get(&self, resource: &str, key: &str) -> Option<Arc<Stored>> {
        self.read()
            .collections
            .get(resource)?
            .objects
            .get(key)
            .cloned()
    }

    /// The objects of a namespace, or of all for `None`.
    pub fn list(&self, resource: &str, namespace: Option<&str>) -> Snapshot {
        let state = self.read();
        let mut items = Vec::new();
        if let Some(collection) = state.collections.get(resource) {
            let prefix = namespace.map(|n| format!("{n}/")).unwrap_or_default();
            let range = collection.objects.range(prefix.clone()..);
            items = range
                .take_while(|(k, _)| k.starts_with(&prefix))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
        }
        Snapshot {
            revision: state.revision,
            items,
        }
    }

    /// Writes `value` (its `resourceVersion` is set here), durable before it answers. The write happens even when nobody waits for
    /// the answer.
    pub async fn put(
        &self,
        resource: &str,
        key: &str,
        expect: Expect,
        value: Value,
    ) -> Result<Arc<Stored>, WriteError> {
        self.answer(self.write(resource, key, expect, Some(value)))
            .await
    }

    /// Deletes an object; answers its last state at the revision of the deletion.
    pub async fn delete(
        &self,
        resource: &str,
        key: &str,
        revision: u64,
    ) -> Result<Arc<Stored>, WriteError> {
        self.answer(self.write(resource, key, Expect::Revision(revision), None))
            .await
    }

    /// Waits for a write; one that was overtaken waits for the other, so that its next try sees it.
    async fn answer(
        &self,
        written: Result<oneshot::Receiver<Answer>, WriteError>,
    ) -> Result<Arc<Stored>, WriteError> {
        let receiver = match written {
            Ok(receiver) => receiver,
            Err(WriteError::Changed) => {
                let newest = self.line().revision;
                // The sender lives in self: waiting cannot fail.
                let _ = self
                    .settled
                    .subscribe()
                    .wait_for(|settled| *settled >= newest)
                    .await;
                return Err(WriteError::Changed);
            }
            Err(error) => return Err(error),
        };
        receiver.await.map_err(|_| WriteError::Closed)?
    }

    /// Puts a write into the line.
    fn write(
        &self,
        resource: &str,
        key: &str,
        expect: Expect,
        value: Option<Value>,
    ) -> Result<oneshot::Receiver<Answer>, WriteError> {
        let mut line = self.line();
        let previous = self.newest(&mut line, resource, key);
        let found = previous
            .as_ref()
            .map_or(Expect::Absent, |p| Expect::Revision(p.revision));
        if found != expect {
            return Err(WriteError::Changed);
        }
        let deleted = value.is_none();
        let revision = line.revision + 1;
        let mut value = value
            .or_else(|| previous.as_ref().map(|p| p.value.clone()))
            .unwrap_or_default();
        value["metadata"]["resourceVersion"] = revision.to_string().into();
        let object = Arc::new(Stored { value, revision });
        let change = Change {
            revision,
            key: key.to_owned(),
            object: object.clone(),
            previous,
            deleted,
        };
        let (sender, receiver) = oneshot::channel();
        let (state, name, answer) = (self.state.clone(), resource.to_owned(), object.clone());
        let settled = self.settled.clone();
        self.store
            .commit_then(self.batch(resource, key, &object, deleted), move |result| {
                let result = result.map_err(WriteError::from).map(|()| {
                    let mut state = state.write().unwrap_or_else(PoisonError::into_inner);
                    state.publish(&name, change);
                    answer
                });
                settled.send_replace(revision);
                // Nobody may be waiting any more.
                let _ = sender.send(result);
            })?;
        line.revision = revision;
        line.staged.push_back(Staged {
            resource: resource.to_owned(),
            key: key.to_owned(),
            object,
            deleted,
        });
        Ok(receiver)
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest state of an object, flushed or not.
    fn newest(&self, line: &mut Line, resource: &str, key: &str) -> Option<Arc<Stored>> {
        let state = self.read();
        while line
            .staged
            .front()
            .is_some_and(|staged| staged.object.revision <= state.revision)
        {
            line.staged.pop_front();
        }
        let staged = line.staged.iter().rev();
        let mut same = staged.filter(|staged| staged.key == key && staged.resource == resource);
        match same.next() {
            Some(staged) => (!staged.deleted).then(|| staged.object.clone()),
            None => state.collections.get(resource)?.objects.get(key).cloned(),
        }
    }

    fn batch(&self, resource: &str, key: &str, object: &Stored, deleted: bool) -> Batch {
        let mut batch = Batch::new();
        let full = format!("{resource}\0{key}");
        if deleted {
            batch.remove(&self.objects, full);
        } else {
            batch.insert(&self.objects, full, object.value.to_string());
        }
        batch.insert(&self.meta, "revision", object.revision.to_string());
        // After a restart a watch may resume where nothing of its resource has changed since.
        batch.insert(
            &self.meta,
            format!("last/{resource}"),
            object.revision.to_string(),
        );
        batch
    }

    /// Starts a watch after `from` (`None`: now).
    pub fn watch(&self, resource: &str, from: Option<u64>) -> Result<WatchStart, WatchRefused> {
        let mut state = self.write_state();
        let revision = state.revision;
        let collection = state
            .collections
            .entry(resource.to_owned())
            .or_insert_with(|| Collection::new(0));
        let from = from.unwrap_or(revision);
        if from > revision {
            return Err(WatchRefused::Future(revision));
        }
        if from < collection.floor {
            return Err(WatchRefused::Expired(collection.floor));
        }
        let backlog = collection
            .history
            .iter()
            .filter(|c| c.revision > from)
            .cloned()
            .collect();
        Ok(WatchStart {
            backlog,
            receiver: collection.sender.subscribe(),
            revision,
        })
    }

    /// Snapshot and watch from the same moment.
    pub fn list_and_watch(
        &self,
        resource: &str,
        namespace: Option<&str>,
    ) -> (Snapshot, WatchStart) {
        loop {
            let snapshot = self.list(resource, namespace);
            if let Ok(start) = self.watch(resource, Some(snapshot.revision)) {
                return (snapshot, start);
            }
        }
    }

    /// Whether a continued list can still be followed by a watch from `revision`.
    pub fn remembers(&self, resource: &str, revision: u64) -> bool {
        let state = self.read();
        revision <= state.revision
            && state
                .collections
                .get(resource)
                .is_none_or(|c| c.floor <= revision)
    }

    /// Closes all watches of a resource that is no longer served.
    pub fn close_watches(&self, resource: &str) {
        if let Some(collection) = self.write_state().collections.get_mut(resource) {
            collection.sender = broadcast::Sender::new(WATCH_BUFFER);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn write_state(&self) -> RwLockWriteGuard<'_, State> {
        self.state
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn is_policy(resource: &str) -> bool {
    resource
        .strip_prefix(rbac::GROUP)
        .is_some_and(|rest| rest.starts_with('/'))
}

fn number(bytes: &[u8]) -> Option<u64> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

fn read_number(tree: &Tree, key: &str) -> Result<Option<u64>, StoreError> {
    Ok(tree.get(key)?.as_deref().and_then(number))
}
