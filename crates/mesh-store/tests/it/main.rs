//! The store against real files: restart, SIGKILL, damage, a second process.
#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use mesh_store::{Batch, Store, StoreError};

/// Set for the child of the SIGKILL test: the directory to write to.
const CHILD_DIR: &str = "MESH_STORE_TEST_CHILD";

fn open(dir: &Path) -> Store {
    let (store, recovery) = Store::open(Some(dir)).unwrap();
    assert!(recovery.is_clean(), "{recovery}");
    store
}

#[test]
fn values_survive_reopening_and_trees_are_apart() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        let (a, b) = (store.tree("a").unwrap(), store.tree("ab").unwrap());
        let mut batch = Batch::new();
        batch.insert(&a, "k/1", "one");
        batch.insert(&a, "k/2", "two");
        batch.insert(&b, "k/1", "other");
        store.commit(batch).unwrap();
        a.remove("k/2").unwrap();
        store.flush().unwrap();
    }
    let store = open(dir.path());
    let a = store.tree("a").unwrap();
    assert_eq!(a.get("k/1").unwrap().as_deref(), Some(b"one".as_slice()));
    assert_eq!(a.get("k/2").unwrap(), None);
    let all: Vec<_> = a.scan_prefix("k/").collect::<Result<_, _>>().unwrap();
    assert_eq!(all, vec![(b"k/1".to_vec(), b"one".to_vec())]);
    assert_eq!(store.tree("ab").unwrap().scan_prefix("").count(), 1);
    assert!(matches!(store.tree("x\0y"), Err(StoreError::TreeName(_))));
}

#[test]
fn writers_that_wait_together_share_a_flush() {
    const WRITES: u64 = 100;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let tree = store.tree("t").unwrap();
    let batch = |key: u64| {
        let mut batch = Batch::new();
        batch.insert(&tree, key.to_string(), "v");
        batch
    };
    // The first write's callback holds the flushing thread until all others have been asked for.
    let (entered, in_callback) = std::sync::mpsc::channel();
    let (release, gate) = std::sync::mpsc::channel::<()>();
    store
        .commit_then(batch(0), move |_| {
            entered.send(()).unwrap();
            gate.recv().unwrap();
        })
        .unwrap();
    in_callback.recv().unwrap();
    let (done, answers) = std::sync::mpsc::channel();
    for key in 1..WRITES {
        let done = done.clone();
        store
            .commit_then(batch(key), move |result| done.send(result.is_ok()).unwrap())
            .unwrap();
    }
    release.send(()).unwrap();
    drop(done);
    assert!(answers.iter().all(|good| good));
    let stats = store.commit_stats();
    assert_eq!((stats.commits, stats.flushes), (WRITES, 2));
    drop((tree, store));
    let count = open(dir.path()).tree("t").unwrap().scan_prefix("").count();
    assert_eq!(count, WRITES as usize);
}

#[test]
fn threads_that_commit_all_get_their_answer() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let tree = store.tree("t").unwrap();
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let (store, tree) = (&store, &tree);
            scope.spawn(move || {
                for number in 0..10 {
                    let mut batch = Batch::new();
                    batch.insert(tree, format!("{writer}/{number}"), "v");
                    store.commit(batch).unwrap();
                }
            });
        }
    });
    let stats = store.commit_stats();
    assert_eq!(stats.commits, 80);
    assert!(stats.flushes <= 80, "{stats:?}");
}

#[test]
fn callbacks_come_in_the_order_of_the_writes() {
    let dir = tempfile::tempdir().unwrap();
    for store in [open(dir.path()), Store::open(None).unwrap().0] {
        let tree = store.tree("t").unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        for number in 0..100 {
            let mut batch = Batch::new();
            batch.insert(&tree, format!("{number}"), "v");
            let sender = sender.clone();
            store
                .commit_then(batch, move |result| {
                    sender.send((number, result.is_ok())).unwrap()
                })
                .unwrap();
        }
        drop(sender);
        let order: Vec<_> = receiver.iter().collect();
        assert_eq!(order, (0..100).map(|n| (n, true)).collect::<Vec<_>>());
    }
}

#[test]
fn memory_store_needs_no_directory() {
    let (store, recovery) = Store::open(None).unwrap();
    assert!(recovery.is_clean() && store.dir().is_none());
    store.tree("t").unwrap().insert("k", "v").unwrap();
    assert_eq!(store.check().unwrap().values, 1);
}

#[test]
fn a_second_opener_is_told_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let _first = open(dir.path());
    let error = Store::open(Some(dir.path())).unwrap_err();
    assert!(
        matches!(&error, StoreError::Locked { dir: d } if d == dir.path()),
        "{error:?}"
    );
}

#[test]
fn a_damaged_snapshot_is_dropped_without_loss() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        let tree = store.tree("t").unwrap();
        for n in 0..500u32 {
            tree.insert(n.to_be_bytes(), vec![7; 2000]).unwrap();
        }
        store.flush().unwrap();
    }
    // sled writes a snapshot when it opens a log.
    drop(open(dir.path()));
    let snapshots: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| {
            p.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("snap.")
        })
        .collect();
    assert!(
        !snapshots.is_empty(),
        "the store wrote no snapshot to damage"
    );
    for path in snapshots {
        std::fs::write(path, b"").unwrap();
    }
    let (store, recovery) = Store::open(Some(dir.path())).unwrap();
    assert!(
        recovery.snapshots_dropped && recovery.moved_aside.is_none(),
        "{recovery:?}"
    );
    assert_eq!(store.tree("t").unwrap().scan_prefix("").count(), 500);
}

#[test]
fn a_damaged_log_is_moved_aside() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("db");
    {
        let store = open(&dir);
        let tree = store.tree("t").unwrap();
        for n in 0..2000u32 {
            tree.insert(n.to_be_bytes(), vec![n as u8; 1000]).unwrap();
        }
        store.flush().unwrap();
    }
    let log = dir.join("db");
    let mut bytes = std::fs::read(&log).unwrap();
    for byte in bytes.iter_mut().skip(100).step_by(97) {
        *byte ^= 0x55;
    }
    std::fs::write(&log, bytes).unwrap();
    let (store, recovery) = Store::open(Some(&dir)).unwrap();
    let aside = recovery.moved_aside.expect("the damage was not noticed");
    assert!(aside.join("db").exists());
    store.tree("t").unwrap().insert("works", "again").unwrap();
    store.flush().unwrap();
}

/// What a future version might leave: another format, told by a marker sealed as today, and values in a form of its own.
fn written_by_a_newer_version(dir: &Path) {
    drop(open(dir));
    let db = sled::Config::new().path(dir).open().unwrap();
    let mut marker = crc32fast::hash(b"2").to_le_bytes().to_vec();
    marker.extend_from_slice(b"2");
    db.insert(b"\0format", marker).unwrap();
    db.insert(b"tree\0key", b"a form without checksums")
        .unwrap();
    db.flush().unwrap();
}

#[test]
fn what_a_newer_version_wrote_is_refused_and_kept() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("db");
    written_by_a_newer_version(&dir);
    // Twice: the first refusal must not have changed what the second one sees.
    for _ in 0..2 {
        let error = Store::open(Some(&dir)).unwrap_err();
        assert!(
            matches!(&error, StoreError::Format { found, known: "1", .. } if found == "2"),
            "{error:?}"
        );
        let text = error.to_string();
        assert!(
            text.contains(&dir.display().to_string()) && text.contains("--state-dir"),
            "{text}"
        );
    }
    let db = sled::Config::new().path(&dir).open().unwrap();
    assert_eq!(
        db.get(b"tree\0key").unwrap().as_deref(),
        Some(b"a form without checksums".as_slice())
    );
    let moved = std::fs::read_dir(parent.path()).unwrap().count();
    assert_eq!(moved, 1, "the directory was moved aside");
}

#[test]
fn a_damaged_marker_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        store.tree("t").unwrap().insert("k", "v").unwrap();
        store.flush().unwrap();
    }
    {
        let db = sled::Config::new().path(dir.path()).open().unwrap();
        db.insert(b"\0format", b"noise").unwrap();
        db.flush().unwrap();
    }
    // The second opening took a store without a marker for one beyond repair.
    for _ in 0..2 {
        let store = open(dir.path());
        let value = store.tree("t").unwrap().get("k").unwrap();
        assert_eq!(value.as_deref(), Some(b"v".as_slice()));
    }
}

#[test]
fn export_and_import_are_inverse() {
    let (store, _) = Store::open(None).unwrap();
    let tree = store.tree("t").unwrap();
    tree.insert("json", r#"{"b":1.0,"a":[]}"#).unwrap();
    tree.insert("text", "not json").unwrap();
    tree.insert([0xff, 0x00], [0u8, 1, 2]).unwrap();
    let mut text = Vec::new();
    assert_eq!(store.export(&mut text).unwrap(), 3);
    let (copy, _) = Store::open(None).unwrap();
    assert_eq!(copy.import(text.as_slice()).unwrap(), 3);
    let mut again = Vec::new();
    copy.export(&mut again).unwrap();
    assert_eq!(
        String::from_utf8(text).unwrap(),
        String::from_utf8(again).unwrap()
    );
    let error = copy
        .import(b"{\"tree\":\"t\",\"key\":\"k\"}\n".as_slice())
        .unwrap_err();
    assert!(
        error.to_string().starts_with("line 1 of the import"),
        "{error}"
    );
}

/// Not a test of its own: the process that `acknowledged_writes_survive_sigkill` starts and kills.
#[test]
fn sigkill_child() {
    let Ok(dir) = std::env::var(CHILD_DIR) else {
        return;
    };
    let store = open(Path::new(&dir));
    let (objects, meta) = (store.tree("objects").unwrap(), store.tree("meta").unwrap());
    for n in 0u64.. {
        let mut batch = Batch::new();
        batch.insert(&objects, n.to_be_bytes(), vec![n as u8; 500]);
        batch.insert(&meta, "rv", n.to_be_bytes());
        store.commit(batch).unwrap();
        println!("\nack {n}");
    }
}

#[test]
fn acknowledged_writes_survive_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "sigkill_child",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CHILD_DIR, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut acknowledged = 0u64;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        if let Some(n) = line.unwrap().strip_prefix("ack ") {
            acknowledged = n.parse().unwrap();
        }
        if acknowledged >= 300 {
            child.kill().unwrap();
            break;
        }
    }
    child.wait().unwrap();
    assert!(acknowledged >= 300, "the child ended by itself");
    let store = open(dir.path());
    let last = store.tree("meta").unwrap().get("rv").unwrap().unwrap();
    let last = u64::from_be_bytes(last.try_into().unwrap());
    assert!(
        last >= acknowledged,
        "revision {acknowledged} was acknowledged, {last} is stored"
    );
    let objects = store.tree("objects").unwrap().scan_prefix("").count() as u64;
    assert_eq!(objects, last + 1, "object and revision of one batch differ");
}
