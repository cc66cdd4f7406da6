//! `mesh state` on directories as a cluster and a proxy leave them.
#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use clap::Parser;
use mesh_cli::out::Out;
use mesh_cli::state;
use mesh_store::{Batch, Store};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: state::Args,
}

#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs `mesh state WORDS --state-dir DIR`; what it wrote, and whether all was well.
fn run(words: &[&str], dir: &Path) -> anyhow::Result<(String, bool)> {
    let mut all = vec!["state"];
    all.extend(words);
    all.extend(["--state-dir", dir.to_str().unwrap()]);
    let buffer = Buffer::default();
    let line = Line::try_parse_from(all)?;
    let code = state::run_with(line.args, &Out::new(buffer.clone()))?;
    let text = String::from_utf8(buffer.0.lock().unwrap().clone())?;
    Ok((text, code == std::process::ExitCode::SUCCESS))
}

fn fill(dir: &Path, value: &str) -> Store {
    let (store, _) = Store::open(Some(dir)).unwrap();
    let mut batch = Batch::new();
    batch.insert(&store.tree("objects").unwrap(), "a", value);
    store.commit(batch).unwrap();
    store
}

#[test]
fn what_is_exported_can_be_imported_elsewhere() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    drop(fill(&from.path().join("db"), "{\"x\":1}"));
    let (text, _) = run(&["export"], from.path()).unwrap();
    assert_eq!(
        text,
        "{\"tree\":\"objects\",\"key\":\"a\",\"json\":{\"x\":1}}\n"
    );
    let file = to.path().join("dump.jsonl");
    run(&["export", file.to_str().unwrap()], from.path()).unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
    let new = to.path().join("new");
    run(&["import", file.to_str().unwrap()], &new).unwrap();
    assert_eq!(run(&["export"], &new).unwrap().0, text);
    let (report, good) = run(&["check"], &new).unwrap();
    assert!(
        good && report.contains("1 values") && report.contains("in order"),
        "{report}"
    );
}

#[test]
fn a_proxy_keeps_its_store_in_the_directory_itself() {
    let dir = tempfile::tempdir().unwrap();
    drop(fill(dir.path(), "1"));
    assert!(run(&["check"], dir.path()).unwrap().1);
    let empty = tempfile::tempdir().unwrap();
    let error = run(&["check"], empty.path()).unwrap_err().to_string();
    assert!(error.contains("holds no state"), "{error}");
}

#[test]
fn a_directory_in_use_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = fill(&dir.path().join("db"), "1");
    for words in [&["export"][..], &["check"], &["import", "/dev/null"]] {
        let error = run(words, dir.path()).unwrap_err().to_string();
        assert!(error.contains("running process"), "{error}");
    }
    drop(store);
    let lock = std::fs::File::create(dir.path().join("lock")).unwrap();
    lock.try_lock().unwrap();
    let error = run(&["export"], dir.path()).unwrap_err().to_string();
    assert!(error.contains("running cluster"), "{error}");
}

#[test]
fn a_check_tells_damage_and_repairs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("db");
    drop(fill(&store, "1"));
    let engine = store.join("db");
    let mut bytes = std::fs::read(&engine).unwrap();
    // Deep inside the log: nothing of it can be read.
    bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::write(&engine, &bytes).unwrap();
    for entry in std::fs::read_dir(&store).unwrap() {
        let path = entry.unwrap().path();
        if path
            .file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("snap.")
        {
            std::fs::remove_file(path).unwrap();
        }
    }
    let (report, good) = run(&["check"], dir.path()).unwrap();
    assert!(!good && report.contains("beyond repair"), "{report}");
    assert_eq!(std::fs::read(&engine).unwrap(), bytes);
    assert!(run(&["import", "/nowhere/at/all"], dir.path()).is_err());
}
