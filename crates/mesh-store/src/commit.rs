//! Group commit: writers that wait at the same time share one flush.
//!
//! A flush asks the disk and takes milliseconds when that is busy; asking for each write alone makes a burst of writes as slow as
//! their number. One thread flushes; whatever was written while it did so shares the next flush.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::StoreError;

/// Told once, on the flushing thread.
pub(crate) type Done = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Counts of a store since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CommitStats {
    /// Durable writes asked for.
    pub commits: u64,
    /// Flushes that they took.
    pub flushes: u64,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Done>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    commits: AtomicU64,
    flushes: AtomicU64,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The flushing thread of one store; it ends, after a last flush for those who still wait, when this is dropped.
pub(crate) struct Committer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Committer {
    pub(crate) fn new() -> Committer {
        Committer {
            shared: Arc::default(),
            thread: Mutex::new(None),
        }
    }

    pub(crate) fn stats(&self) -> CommitStats {
        CommitStats {
            commits: self.shared.commits.load(Ordering::Relaxed),
            flushes: self.shared.flushes.load(Ordering::Relaxed),
        }
    }

    /// Calls `done` when everything that was written before this call is flushed. Calls are answered in their order.
    pub(crate) fn submit(&self, db: &sled::Db, done: Done) {
        self.shared.commits.fetch_add(1, Ordering::Relaxed);
        if !self.is_running(db) {
            // A machine that gives no more threads still keeps the promise, one flush for each write.
            self.shared.flushes.fetch_add(1, Ordering::Relaxed);
            return done(db.flush().map(|_| ()).map_err(StoreError::from));
        }
        self.shared.queue().waiting.push(done);
        self.shared.wake.notify_one();
    }

    /// Whether the thread is there, after starting it where it is not.
    fn is_running(&self, db: &sled::Db) -> bool {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let (shared, db) = (self.shared.clone(), db.clone());
            *thread = std::thread::Builder::new()
                .name("store-flush".to_owned())
                .spawn(move || run(&shared, &db))
                .ok();
        }
        thread.is_some()
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.wake.notify_one();
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take()
            // The last owner may be what the thread itself has just called.
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic there was printed when it happened, and there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, db: &sled::Db) {
    loop {
        let batch = {
            let mut queue = shared.queue();
            while queue.waiting.is_empty() && !queue.closed {
                queue = shared
                    .wake
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if queue.waiting.is_empty() {
                return;
            }
            std::mem::take(&mut queue.waiting)
        };
        shared.flushes.fetch_add(1, Ordering::Relaxed);
        let result = db.flush();
        for done in batch {
            done(match &result {
                Ok(_) => Ok(()),
                Err(error) => Err(error.clone().into()),
            });
        }
    }
}
