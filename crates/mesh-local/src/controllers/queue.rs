//! The work queue of a control loop: each key at most once at a time, retries with growing pauses.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use kube::{Resource, ResourceExt as _};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::time::{DelayQueue, delay_queue};

use super::{Context, Outcome};

/// Failures in a row of one key that are nobody's business yet.
const QUIET_FAILURES: u32 = 4;

/// Namespace (empty for cluster-wide kinds) and name of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl Key {
    pub(super) fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    pub(super) fn of<K: Resource>(object: &K) -> Self {
        Self::new(object.namespace().unwrap_or_default(), object.name_any())
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Keys that wait for their turn.
pub(super) struct Queue {
    name: &'static str,
    waiting: Mutex<(VecDeque<Key>, HashSet<Key>)>,
    notify: Notify,
}

/// Keys that one loop works on at the same time.
const PARALLEL: usize = 16;
/// Pause before the first retry; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

impl Queue {
    pub(super) fn new(name: &'static str) -> Arc<Self> {
        Arc::new(Self {
            name,
            waiting: Mutex::default(),
            notify: Notify::new(),
        })
    }

    /// Asks for a reconcile of `key`; asking again before it begins changes nothing.
    pub(super) fn add(&self, key: Key) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.1.insert(key.clone()) {
            waiting.0.push_back(key);
            drop(waiting);
            self.notify.notify_one();
        }
    }

    /// The next key that is not in `busy`.
    fn take(&self, busy: &HashSet<Key>) -> Option<Key> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let position = waiting.0.iter().position(|key| !busy.contains(key))?;
        let key = waiting.0.remove(position)?;
        waiting.1.remove(&key);
        Some(key)
    }
}

/// Keys to look at later, each once.
#[derive(Default)]
struct Later {
    delays: DelayQueue<Key>,
    handles: HashMap<Key, delay_queue::Key>,
}

impl Later {
    fn set(&mut self, key: &Key, pause: Duration) {
        match self.handles.get(key) {
            Some(handle) => self.delays.reset(handle, pause),
            None => {
                let handle = self.delays.insert(key.clone(), pause);
                self.handles.insert(key.clone(), handle);
            }
        }
    }

    fn clear(&mut self, key: &Key) {
        if let Some(handle) = self.handles.remove(key) {
            self.delays.try_remove(&handle);
        }
    }
}

/// Works on `queue` until `shutdown`.
pub(super) async fn run<F, R>(
    queue: Arc<Queue>,
    context: Arc<Context>,
    shutdown: CancellationToken,
    reconcile: F,
) where
    F: Fn(Arc<Context>, Key) -> R,
    R: Future<Output = Outcome>,
{
    let mut under_way = FuturesUnordered::new();
    let mut busy = HashSet::new();
    let mut failures: HashMap<Key, u32> = HashMap::new();
    let mut later = Later::default();
    loop {
        while busy.len() < PARALLEL {
            let Some(key) = queue.take(&busy) else { break };
            busy.insert(key.clone());
            let work = reconcile(context.clone(), key.clone());
            under_way.push(async move { (key, work.await) });
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = queue.notify.notified() => {}
            Some((key, outcome)) = under_way.next() => {
                busy.remove(&key);
                settle(&queue, key, outcome, &mut failures, &mut later);
            }
            Some(due) = later.delays.next() => {
                let key = due.into_inner();
                later.handles.remove(&key);
                queue.add(key);
            }
        }
    }
}

fn settle(
    queue: &Queue,
    key: Key,
    outcome: Outcome,
    failures: &mut HashMap<Key, u32>,
    later: &mut Later,
) {
    match outcome {
        Ok(next) => {
            failures.remove(&key);
            match next {
                Some(pause) => later.set(&key, pause),
                None => later.clear(&key),
            }
        }
        Err(error) if error.is_namespace_ending() => {
            tracing::debug!(controller = queue.name, %key, %error, "the namespace is ending");
            failures.remove(&key);
            later.clear(&key);
        }
        Err(error) => {
            let count = failures.entry(key.clone()).or_default();
            let pause = pause(*count);
            *count += 1;
            if error.is_conflict() {
                tracing::debug!(controller = queue.name, %key, %error, "another writer was faster; trying again");
            } else if *count <= QUIET_FAILURES {
                // While a cluster starts, a webhook's endpoint may be a few milliseconds away.
                tracing::debug!(controller = queue.name, %key, %error, ?pause, "failed; trying again");
            } else {
                tracing::warn!(controller = queue.name, %key, %error, ?pause, "failed; trying again");
            }
            later.set(&key, pause);
        }
    }
}

/// The pause after a failure that `count` failures preceded.
fn pause(count: u32) -> Duration {
    FIRST_PAUSE
        .saturating_mul(1 << count.min(20))
        .min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_waits_once_and_not_beside_itself() {
        let queue = Queue::new("test");
        for name in ["a", "b", "a"] {
            queue.add(Key::new("", name));
        }
        let busy = HashSet::from([Key::new("", "a")]);
        assert_eq!(queue.take(&busy), Some(Key::new("", "b")));
        assert_eq!(queue.take(&busy), None);
        assert_eq!(queue.take(&HashSet::new()), Some(Key::new("", "a")));
        assert_eq!(queue.take(&HashSet::new()), None);
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        assert_eq!(pause(0), Duration::from_millis(10));
        assert_eq!(pause(3), Duration::from_millis(80));
        assert_eq!(pause(60), LONGEST_PAUSE);
    }
}
