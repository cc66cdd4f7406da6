//! The one state store of every mode of `mesh`: named trees of bytes that survive SIGKILL.
//!
//! * **In:** a directory (or none, for memory only), keys and values as bytes.
//! * **Out:** the same bytes later, whole batches or nothing; JSON lines for people (`export`, `import`, `check`).
//! * **Never:** knows what a value means, keeps secrets apart, runs a background task that matters, or survives power loss by promise
//!   (a flushed write is in the kernel, not necessarily on the platter).
//! * **Start here:** [`Store::open`], then [`Store::tree`] and [`Store::commit`].
//!
//! Underneath is one sled tree; a named tree is a key prefix, so a batch over several trees is one sled batch. Every value carries a CRC32.
//! What happens when files are damaged is in `recovery.rs`, the text form in `dump.rs`, how writers share a flush in `commit.rs`.

mod commit;
mod dump;
mod recovery;

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use commit::Committer;

pub use commit::CommitStats;
pub use dump::{CheckReport, DumpError};
pub use recovery::Recovery;

/// Separates the name of a tree from the key; names may not contain it.
const SEPARATOR: u8 = 0;
/// Bytes of CRC32 in front of every value.
const CRC_LEN: usize = 4;

/// How a store is opened.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// Directory of the files; `None` keeps everything in memory and loses it on drop.
    pub dir: Option<PathBuf>,
    /// Bytes of page cache; `None` is 16 MiB. The proxy takes 1 MiB.
    pub cache_bytes: Option<u64>,
}

/// What can go wrong with a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the directory open.
    #[error(
        "opening the state directory {dir}: another process is using it; stop that process, or choose another directory with --state-dir"
    )]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// The directory can't be created, read or moved.
    #[error(
        "opening the state directory {dir}: {source}; check that it exists, is writable and has free space"
    )]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another version wrote the directory, in a form that this one does not read; nothing in it was touched.
    #[error(
        "opening the state directory {dir}: it is in format {found:?} of another version of this program, and this one reads {known:?}; use that \
         version (its `state export` writes a form to import here), or choose another directory with --state-dir"
    )]
    Format {
        /// The directory.
        dir: PathBuf,
        /// What it is in.
        found: String,
        /// What this version reads.
        known: &'static str,
    },
    /// A value does not match its checksum.
    #[error(
        "reading key {key:?} of tree {tree:?}: the checksum does not match; `mesh state check` lists all damaged values"
    )]
    Checksum {
        /// Name of the tree.
        tree: String,
        /// Key within the tree, lossily decoded.
        key: String,
    },
    /// A tree's name is empty or contains a zero byte.
    #[error("{0:?} is not a usable name for a tree")]
    TreeName(String),
    /// Anything else from the storage engine.
    #[error("the state store failed: {0}")]
    Engine(#[from] sled::Error),
}

/// An open store; clones share it.
#[derive(Clone)]
pub struct Store {
    // Before the files: its thread must be done with them.
    committer: Arc<Committer>,
    db: sled::Db,
    dir: Option<PathBuf>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens (creating where needed) the store in `dir`, or one in memory for `None`. The second value says what was
    /// repaired; show it to the user when it is not [`Recovery::is_clean`].
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process holds the directory, [`StoreError::Format`] when another version wrote it in another form,
    /// [`StoreError::Directory`] when it can't be used.
    pub fn open(dir: Option<&Path>) -> Result<(Store, Recovery), StoreError> {
        Store::open_with(StoreOptions {
            dir: dir.map(Path::to_path_buf),
            cache_bytes: None,
        })
    }

    /// [`Store::open`] with all options.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(options: StoreOptions) -> Result<(Store, Recovery), StoreError> {
        let (db, recovery) = recovery::open(&options)?;
        Ok((
            Store {
                committer: Arc::new(Committer::new()),
                db,
                dir: options.dir,
            },
            recovery,
        ))
    }

    /// The directory of the files; `None` in memory.
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// A named tree; it exists as soon as something is in it.
    ///
    /// # Errors
    /// [`StoreError::TreeName`] for an empty name or one with a zero byte.
    pub fn tree(&self, name: &str) -> Result<Tree, StoreError> {
        if name.is_empty() || name.as_bytes().contains(&SEPARATOR) {
            return Err(StoreError::TreeName(name.to_owned()));
        }
        let mut prefix = name.as_bytes().to_vec();
        prefix.push(SEPARATOR);
        Ok(Tree {
            db: self.db.clone(),
            name: name.to_owned(),
            prefix,
        })
    }

    /// Applies all changes of `batch` or none, without waiting; see [`Store::commit`] for the durable form.
    ///
    /// # Errors
    /// [`StoreError::Engine`] when the engine refuses, for example on a full disk.
    pub fn batch(&self, batch: Batch) -> Result<(), StoreError> {
        Ok(self.db.apply_batch(batch.inner)?)
    }

    /// Applies `batch` and hands it to the kernel before it returns: it survives SIGKILL of this process. Writers that wait at the
    /// same time share one flush.
    ///
    /// # Errors
    /// As [`Store::batch`].
    pub fn commit(&self, batch: Batch) -> Result<(), StoreError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.commit_then(batch, move |result| {
            // The receiver waits below.
            let _ = sender.send(result);
        })?;
        // Without an answer the flushing thread is gone: ask the disk here.
        receiver.recv().unwrap_or_else(|_| self.flush())
    }

    /// Applies `batch` at once and calls `done` when it has been handed to the kernel. Calls come in the order of the batches, from
    /// the flushing thread (in memory: from this one, before this returns), so that `done` must be quick.
    ///
    /// # Errors
    /// As [`Store::batch`]; `done` is not called then.
    pub fn commit_then(
        &self,
        batch: Batch,
        done: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) -> Result<(), StoreError> {
        self.batch(batch)?;
        if self.dir.is_some() {
            self.committer.submit(&self.db, Box::new(done));
        } else {
            done(Ok(()));
        }
        Ok(())
    }

    /// How many durable writes there were and how many flushes they took; zero in memory.
    pub fn commit_stats(&self) -> CommitStats {
        self.committer.stats()
    }

    /// Hands everything written so far to the kernel.
    ///
    /// # Errors
    /// [`StoreError::Engine`] when writing fails.
    pub fn flush(&self) -> Result<(), StoreError> {
        if self.dir.is_some() {
            self.db.flush()?;
        }
        Ok(())
    }
}

/// One named tree of a [`Store`]; clones share it.
#[derive(Clone)]
pub struct Tree {
    db: sled::Db,
    name: String,
    prefix: Vec<u8>,
}

impl std::fmt::Debug for Tree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tree")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Tree {
    /// The tree's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value of `key`, or `None`.
    ///
    /// # Errors
    /// [`StoreError::Checksum`] when the value is damaged.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>, StoreError> {
        match self.db.get(self.full_key(key.as_ref()))? {
            None => Ok(None),
            Some(stored) => match open_value(&stored) {
                Some(value) => Ok(Some(value.to_vec())),
                None => Err(self.damaged(key.as_ref())),
            },
        }
    }

    /// Sets one value, not yet flushed. Several changes that belong together go through [`Store::batch`].
    ///
    /// # Errors
    /// [`StoreError::Engine`] when writing fails.
    pub fn insert(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), StoreError> {
        self.db
            .insert(self.full_key(key.as_ref()), seal_value(value.as_ref()))?;
        Ok(())
    }

    /// Removes one key; a missing key is fine.
    ///
    /// # Errors
    /// [`StoreError::Engine`] when writing fails.
    pub fn remove(&self, key: impl AsRef<[u8]>) -> Result<(), StoreError> {
        self.db.remove(self.full_key(key.as_ref()))?;
        Ok(())
    }

    /// All pairs whose key starts with `prefix`, in key order; an empty prefix is the whole tree.
    pub fn scan_prefix(
        &self,
        prefix: impl AsRef<[u8]>,
    ) -> impl Iterator<Item = Result<(Vec<u8>, Vec<u8>), StoreError>> + '_ {
        let skip = self.prefix.len();
        self.db
            .scan_prefix(self.full_key(prefix.as_ref()))
            .map(move |item| {
                let (key, stored) = item?;
                let key = key[skip..].to_vec();
                match open_value(&stored) {
                    Some(value) => Ok((key, value.to_vec())),
                    None => Err(self.damaged(&key)),
                }
            })
    }

    fn full_key(&self, key: &[u8]) -> Vec<u8> {
        [self.prefix.as_slice(), key].concat()
    }

    fn damaged(&self, key: &[u8]) -> StoreError {
        StoreError::Checksum {
            tree: self.name.clone(),
            key: String::from_utf8_lossy(key).into_owned(),
        }
    }
}

/// Changes over any trees of one store, applied together by [`Store::batch`].
#[derive(Default)]
pub struct Batch {
    inner: sled::Batch,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Sets a value.
    pub fn insert(&mut self, tree: &Tree, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        self.inner
            .insert(tree.full_key(key.as_ref()), seal_value(value.as_ref()));
    }

    /// Removes a key; a missing key is fine.
    pub fn remove(&mut self, tree: &Tree, key: impl AsRef<[u8]>) {
        self.inner.remove(tree.full_key(key.as_ref()));
    }
}

fn seal_value(value: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(CRC_LEN + value.len());
    sealed.extend_from_slice(&crc32fast::hash(value).to_le_bytes());
    sealed.extend_from_slice(value);
    sealed
}

/// The value inside, or `None` when it is shorter than its checksum or does not match it.
fn open_value(stored: &[u8]) -> Option<&[u8]> {
    let (crc, value) = stored.split_at_checked(CRC_LEN)?;
    (crc == crc32fast::hash(value).to_le_bytes()).then_some(value)
}
