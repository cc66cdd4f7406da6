//! Key and certificate in a folder in memory (an `emptyDir` with medium `Memory`), for the next process of the same pod.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mesh_identity::ca::Leaf;

const CERTIFICATE: &str = "cert-chain.pem";
const KEY: &str = "key.pem";
/// File systems that are memory only. (tmpfs may be swapped out; Kubernetes nodes have no swap, or an encrypted one.)
const MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

/// Writes both, each whole or not at all, for the owner alone.
///
/// # Errors
/// A folder that does not exist, is on a disk, or can't be written.
pub(super) fn write(dir: &Path, leaf: &Leaf) -> io::Result<()> {
    if !in_memory(dir)? {
        return Err(io::Error::other(format!(
            "{} is not in memory",
            dir.display()
        )));
    }
    for (name, text) in [(KEY, &leaf.key_pem), (CERTIFICATE, &leaf.chain_pem)] {
        let next = dir.join(format!(".{name}.next"));
        match std::fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&next)?;
        file.write_all(text.as_bytes())?;
        std::fs::rename(&next, dir.join(name))?;
    }
    Ok(())
}

/// Reads both. Whether they belong together, and are still valid, is found out by who uses them.
pub(super) fn read(dir: &Path) -> Option<Leaf> {
    let text = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    Some(Leaf {
        chain_pem: text(CERTIFICATE)?,
        key_pem: text(KEY)?,
    })
}

/// Whether a folder is in memory, from the mount that it is in (proc(5), mountinfo).
fn in_memory(dir: &Path) -> io::Result<bool> {
    let dir = dir.canonicalize()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(is_memory(&mounts, &dir))
}

fn is_memory(mounts: &str, dir: &Path) -> bool {
    let mount = |line: &str| {
        let point = line.split(' ').nth(4)?.replace("\\040", " ");
        let kind = line.split(" - ").nth(1)?.split(' ').next()?.to_owned();
        dir.starts_with(&point).then_some((point.len(), kind))
    };
    // Of mounts on one place the last is seen.
    let innermost = mounts
        .lines()
        .filter_map(mount)
        .max_by_key(|(length, _)| *length);
    innermost.is_some_and(|(_, kind)| MEMORY.contains(&kind.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 21 0:25 / /var/run/secrets/workload-spiffe-credentials rw - tmpfs tmpfs rw,size=1024k
31 21 0:26 / /dev/shm rw - tmpfs tmpfs rw
32 31 8:1 / /dev/shm/disk rw - ext4 /dev/sda1 rw
";

    #[test]
    fn keys_are_written_to_memory_only() {
        let memory = |path: &str| is_memory(MOUNTS, Path::new(path));
        assert!(memory("/var/run/secrets/workload-spiffe-credentials"));
        assert!(memory("/dev/shm/x"));
        assert!(!memory("/dev/shm/disk/x"));
        assert!(!memory("/var/run/secrets"));
        assert!(!is_memory("", Path::new("/")));
    }

    #[test]
    fn what_was_written_in_memory_is_read_back_by_its_owner() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is needed");
        let leaf = |text: &str| Leaf {
            chain_pem: format!("chain {text}"),
            key_pem: format!("key {text}"),
        };
        for text in ["one", "two"] {
            write(dir.path(), &leaf(text)).expect("in memory");
            let back = read(dir.path()).expect("both");
            assert_eq!(back.chain_pem, format!("chain {text}"));
            assert_eq!(back.key_pem, format!("key {text}"));
        }
        let mode = std::fs::metadata(dir.path().join(KEY))
            .expect("a key")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
