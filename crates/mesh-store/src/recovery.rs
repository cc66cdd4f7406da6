//! Opening a store whose files may be damaged.
//!
//! sled's known failure is an empty or flipped `snap.*` file, with which no open succeeds; the log beside it is complete, so deleting
//! the snapshot loses nothing. A damaged log can't be repaired: the directory is moved aside and the caller told.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::{SEPARATOR, StoreError, StoreOptions, open_value, seal_value};

const DEFAULT_CACHE_BYTES: u64 = 16 << 20;
/// How long a locked store is tried again before it counts as in use.
const LETTING_GO: Duration = Duration::from_secs(1);
/// Written once into a new store: sled takes a log without a single readable segment for a new one, and this tells the two apart.
/// No tree has an empty name, so no key of a caller collides.
pub(crate) const MARKER: &[u8] = b"\0format";
/// The marker's value: the form of keys and values. A version that changes it must go on sealing the marker itself as now, since older ones
/// read it before anything else.
const FORMAT: &str = "1";

/// What had to be repaired while opening.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Snapshot files were damaged and deleted; no data is lost.
    pub snapshots_dropped: bool,
    /// The files were beyond repair; they lie here now and the store is empty.
    pub moved_aside: Option<PathBuf>,
    /// Values whose checksum did not match; they are removed. Written `tree/key`.
    pub values_dropped: Vec<String>,
}

impl Recovery {
    /// Nothing was repaired.
    pub fn is_clean(&self) -> bool {
        *self == Recovery::default()
    }
}

impl std::fmt::Display for Recovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_clean() {
            return f.write_str("the state store is in order");
        }
        if self.snapshots_dropped {
            f.write_str("a damaged snapshot file was deleted, no data is lost. ")?;
        }
        if let Some(dir) = &self.moved_aside {
            write!(
                f,
                "the state was beyond repair: it was moved to {} and an empty store was started. ",
                dir.display()
            )?;
        }
        if !self.values_dropped.is_empty() {
            write!(
                f,
                "these values were damaged and dropped: {}",
                self.values_dropped.join(", ")
            )?;
        }
        Ok(())
    }
}

pub(crate) fn open(options: &StoreOptions) -> Result<(sled::Db, Recovery), StoreError> {
    let cache = options.cache_bytes.unwrap_or(DEFAULT_CACHE_BYTES);
    let config = sled::Config::new()
        .cache_capacity(cache)
        .flush_every_ms(Some(100));
    let Some(dir) = options.dir.as_deref() else {
        return Ok((config.temporary(true).open()?, Recovery::default()));
    };
    std::fs::create_dir_all(dir).map_err(|source| StoreError::Directory {
        dir: dir.to_owned(),
        source,
    })?;
    let config = config.path(dir);
    let mut recovery = Recovery::default();
    let db = match try_open(&config, dir)? {
        Some(db) => db,
        None => {
            recovery.snapshots_dropped = drop_snapshots(dir)?;
            match try_open(&config, dir)? {
                Some(db) => db,
                None => {
                    recovery = Recovery {
                        moved_aside: Some(move_aside(dir)?),
                        ..Recovery::default()
                    };
                    config.open()?
                }
            }
        }
    };
    if !is_of_format(&db, dir)? {
        db.insert(MARKER, seal_value(FORMAT.as_bytes()))?;
        db.flush()?;
    }
    recovery.values_dropped = drop_damaged_values(&db)?;
    if !recovery.is_clean() {
        tracing::warn!(dir = %dir.display(), "{recovery}");
    }
    Ok((db, recovery))
}

/// Whether the marker says our format; false where there is none that can be read. Looked at before damage is: what seems damaged may be another
/// version's way to write.
fn is_of_format(db: &sled::Db, dir: &Path) -> Result<bool, StoreError> {
    let Some(stored) = db.get(MARKER)? else {
        return Ok(false);
    };
    match open_value(&stored) {
        None => Ok(false),
        Some(found) if found == FORMAT.as_bytes() => Ok(true),
        Some(found) => Err(StoreError::Format {
            dir: dir.to_owned(),
            found: String::from_utf8_lossy(found).into_owned(),
            known: FORMAT,
        }),
    }
}

/// As [`open_once`], but gives who had the store open until now a moment to let go: sled's threads do so shortly after the last handle is
/// dropped, as does a process that was just killed.
fn try_open(config: &sled::Config, dir: &Path) -> Result<Option<sled::Db>, StoreError> {
    let began = Instant::now();
    loop {
        match open_once(config, dir) {
            Err(StoreError::Locked { .. }) if began.elapsed() < LETTING_GO => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

/// Opens and reads everything once, since a damaged log may only show while iterating. `None` means damaged; sled panics on some
/// damage, which counts as the same.
fn open_once(config: &sled::Config, dir: &Path) -> Result<Option<sled::Db>, StoreError> {
    let is_new = std::fs::metadata(dir.join("db")).map_or(true, |m| m.len() == 0);
    let attempt = catch_unwind(AssertUnwindSafe(|| {
        let db = config.open()?;
        for item in db.iter() {
            item?;
        }
        let intact = is_new || db.contains_key(MARKER)?;
        Ok(intact.then_some(db))
    }));
    match attempt {
        Ok(Ok(db)) => Ok(db),
        Err(_) | Ok(Err(sled::Error::Corruption { .. })) => Ok(None),
        Ok(Err(sled::Error::Io(source)))
            if source.to_string().contains("could not acquire lock") =>
        {
            Err(StoreError::Locked {
                dir: dir.to_owned(),
            })
        }
        Ok(Err(sled::Error::Io(source))) => Err(StoreError::Directory {
            dir: dir.to_owned(),
            source,
        }),
        Ok(Err(other)) => Err(other.into()),
    }
}

fn drop_snapshots(dir: &Path) -> Result<bool, StoreError> {
    let wrap = |source| StoreError::Directory {
        dir: dir.to_owned(),
        source,
    };
    let mut dropped = false;
    for entry in std::fs::read_dir(dir).map_err(wrap)? {
        let entry = entry.map_err(wrap)?;
        if entry.file_name().to_string_lossy().starts_with("snap.") {
            std::fs::remove_file(entry.path()).map_err(wrap)?;
            dropped = true;
        }
    }
    Ok(dropped)
}

fn move_aside(dir: &Path) -> Result<PathBuf, StoreError> {
    let wrap = |source| StoreError::Directory {
        dir: dir.to_owned(),
        source,
    };
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let name = dir
        .file_name()
        .map_or_else(|| "state".into(), |n| n.to_string_lossy().into_owned());
    let free = (0u32..)
        .map(|n| dir.with_file_name(format!("{name}.damaged-{}", seconds + u64::from(n))))
        .find(|p| !p.exists());
    let target = free.unwrap_or_else(|| dir.with_file_name(format!("{name}.damaged")));
    std::fs::rename(dir, &target).map_err(wrap)?;
    std::fs::create_dir_all(dir).map_err(wrap)?;
    Ok(target)
}

fn drop_damaged_values(db: &sled::Db) -> Result<Vec<String>, StoreError> {
    let mut dropped = Vec::new();
    for item in db.iter() {
        let (key, stored) = item?;
        if open_value(&stored).is_none() {
            let text: Vec<u8> = key
                .iter()
                .map(|b| if *b == SEPARATOR { b'/' } else { *b })
                .collect();
            dropped.push(String::from_utf8_lossy(&text).into_owned());
            db.remove(&key)?;
        }
    }
    Ok(dropped)
}
