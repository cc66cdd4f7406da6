//! Namespaces: the user namespace as seen from inside, and the way into another network namespace.

use std::path::Path;

use nix::sched::{CloneFlags, setns};

/// Moves the calling thread into the network namespace that a file stands for, such as `/run/netns/a` or `/proc/7/ns/net`.
///
/// # Errors
/// When the file is no network namespace, or CAP_SYS_ADMIN is missing.
pub fn enter_network(path: &Path) -> std::io::Result<()> {
    let file = std::fs::File::open(path)?;
    setns(file, CloneFlags::CLONE_NEWNET)?;
    Ok(())
}

/// Whether a user id has a meaning in this user namespace (user_namespaces(7), `uid_map`).
///
/// # Errors
/// When /proc can't be read.
pub fn is_mapped(uid: u32) -> std::io::Result<bool> {
    Ok(uid_map_contains(
        &std::fs::read_to_string("/proc/self/uid_map")?,
        uid,
    ))
}

fn uid_map_contains(map: &str, uid: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(inside)), Some(Ok(_)), Some(Ok(count))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        (inside..inside.saturating_add(count)).contains(&u64::from(uid))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_of_one_uid_has_no_1337() {
        assert!(uid_map_contains("         0          0 4294967295\n", 1337));
        assert!(!uid_map_contains(
            "         0       1000          1\n",
            1337
        ));
        assert!(uid_map_contains("0 1000 1\n1337 101337 1\n", 1337));
        assert!(!uid_map_contains("", 0));
    }
}
