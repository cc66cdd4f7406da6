//! `mesh state`: the state directory of a cluster or a proxy as text, and whether it is in order.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use mesh_store::Store;

use crate::out::Out;

/// The file that a running local cluster holds a lock on, and the directory of its store.
const LOCK: &str = "lock";
const CLUSTER_STORE: &str = "db";
/// What the storage engine calls its files; a proxy's state directory holds them directly.
const ENGINE_FILES: [&str; 2] = ["conf", "db"];

/// Export, import or check a state directory
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Write all values as JSON lines; they hold secrets and keys
    Export {
        #[command(flatten)]
        state: StateDir,
        /// File to write, for its owner only; - is standard output
        #[arg(value_name = "FILE", default_value = "-")]
        file: PathBuf,
    },
    /// Read JSON lines that export wrote, over what is there
    Import {
        #[command(flatten)]
        state: StateDir,
        /// File to read; - is standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Read everything and check every checksum; changes nothing
    Check {
        #[command(flatten)]
        state: StateDir,
    },
}

#[derive(Debug, Clone, clap::Args)]
struct StateDir {
    /// State directory of a local cluster or of a proxy [default: that of `mesh all-in-one`]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// The directory is in use or holds no state, a file can't be read or written, a value is damaged.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    run_with(args, &Out::default())
}

/// [`run`] with the results written to `out`.
///
/// # Errors
/// As [`run`].
pub fn run_with(args: Args, out: &Out) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Export { state, file } => export(&Locked::existing(&state)?, &file, out),
        Command::Import { state, file } => import(&Locked::for_import(&state)?, &file),
        Command::Check { state } => check(&Locked::existing(&state)?, out),
    }
}

/// A state directory that nobody else uses while this lives.
struct Locked {
    store: PathBuf,
    _lock: Option<File>,
}

impl Locked {
    fn existing(choice: &StateDir) -> anyhow::Result<Locked> {
        let root = root(choice)?;
        match store_in(&root) {
            Some(store) => Locked::lock(&root, store),
            None => bail!(
                "{} holds no state: choose the state directory of a cluster or a proxy with --state-dir",
                root.display()
            ),
        }
    }

    /// A directory without state becomes a cluster's.
    fn for_import(choice: &StateDir) -> anyhow::Result<Locked> {
        let root = root(choice)?;
        let store = store_in(&root).unwrap_or_else(|| root.join(CLUSTER_STORE));
        // Keys and tokens will lie there.
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root);
        made.with_context(|| format!("making the state directory {}", root.display()))?;
        Locked::lock(&root, store)
    }

    fn lock(root: &Path, store: PathBuf) -> anyhow::Result<Locked> {
        let path = root.join(LOCK);
        let lock = match File::open(&path) {
            Ok(lock) if lock.try_lock().is_err() => bail!(
                "the state directory {} is used by a running cluster: stop it first (Ctrl-C where `mesh all-in-one` runs)",
                root.display()
            ),
            Ok(lock) => Some(lock),
            // A proxy's directory has none; its store is locked by itself.
            Err(_) => None,
        };
        let engine = File::open(store.join(ENGINE_FILES[1]));
        if engine.is_ok_and(|file| file.try_lock().is_err()) {
            bail!(
                "the state in {} is used by a running process: stop it first",
                store.display()
            );
        }
        Ok(Locked { store, _lock: lock })
    }
}

/// The chosen directory, or the one that `mesh all-in-one` takes by itself.
fn root(choice: &StateDir) -> anyhow::Result<PathBuf> {
    if let Some(dir) = &choice.state_dir {
        return Ok(dir.clone());
    }
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|dir| dir.join("mesh"))
        .context("neither XDG_STATE_HOME nor HOME is set: choose a directory with --state-dir")
}

/// Where in a state directory the store is.
fn store_in(root: &Path) -> Option<PathBuf> {
    let is_store = |dir: &Path| ENGINE_FILES.iter().all(|name| dir.join(name).is_file());
    [root.join(CLUSTER_STORE), root.to_owned()]
        .into_iter()
        .find(|dir| is_store(dir))
}

fn open(dir: &Path) -> anyhow::Result<(Store, mesh_store::Recovery)> {
    let opened = Store::open(Some(dir))?;
    if !opened.1.is_clean() {
        eprintln!("{}", opened.1);
    }
    Ok(opened)
}

fn export(state: &Locked, file: &Path, out: &Out) -> anyhow::Result<ExitCode> {
    let (store, _) = open(&state.store)?;
    if file == Path::new("-") {
        let mut text = Vec::new();
        store.export(&mut text)?;
        out.bytes(&text)?;
        return Ok(ExitCode::SUCCESS);
    }
    let writing = || format!("writing {}", file.display());
    let target = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(file)
        .with_context(writing)?;
    let mut writer = BufWriter::new(target);
    let count = store.export(&mut writer).with_context(writing)?;
    writer.flush().with_context(writing)?;
    eprintln!("exported {count} values to {}", file.display());
    Ok(ExitCode::SUCCESS)
}

fn import(state: &Locked, file: &Path) -> anyhow::Result<ExitCode> {
    let (store, _) = open(&state.store)?;
    let count = if file == Path::new("-") {
        store.import(std::io::stdin().lock())?
    } else {
        let reading = || format!("reading {}", file.display());
        let source = File::open(file).with_context(reading)?;
        store.import(BufReader::new(source)).with_context(reading)?
    };
    eprintln!("imported {count} values into {}", state.store.display());
    Ok(ExitCode::SUCCESS)
}

/// Opening a store repairs it: what is checked is a copy.
fn check(state: &Locked, out: &Out) -> anyhow::Result<ExitCode> {
    let copy = Copy::of(&state.store)?;
    let (store, recovery) = Store::open(Some(&copy.0.join("store")))?;
    let report = store.check()?;
    let name = state.store.display();
    out.line(format!(
        "{name}: {} values, {} bytes",
        report.values, report.bytes
    ))?;
    let damaged: Vec<_> = recovery
        .values_dropped
        .iter()
        .chain(&report.damaged)
        .collect();
    for value in &damaged {
        out.line(format!("damaged: {value}"))?;
    }
    if recovery.snapshots_dropped {
        out.line("a snapshot file is damaged: the next start deletes it, no data is lost")?;
    }
    if recovery.moved_aside.is_some() {
        out.line("the files are beyond repair: the next start moves them aside and begins with an empty store")?;
    }
    if recovery.is_clean() && damaged.is_empty() {
        out.line("in order")?;
        return Ok(ExitCode::SUCCESS);
    }
    if !damaged.is_empty() {
        out.line("the next start drops the damaged values; `mesh state import` brings them back from an export")?;
    }
    Ok(ExitCode::FAILURE)
}

/// A private copy of a store's files; it is deleted when this is dropped.
struct Copy(PathBuf);

impl Copy {
    fn of(store: &Path) -> anyhow::Result<Copy> {
        let name = format!("mesh-state-check-{}", std::process::id());
        let copy = Copy(std::env::temp_dir().join(name));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&copy.0)
            .with_context(|| format!("making {} for a copy", copy.0.display()))?;
        copy_tree(store, &copy.0.join("store"))
            .with_context(|| format!("copying {} to {}", store.display(), copy.0.display()))?;
        Ok(copy)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // It lies in the system's directory for such files, which is emptied in any case.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
