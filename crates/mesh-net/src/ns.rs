//! Network namespaces as seen from a process with many threads: a namespace is entered by a thread of its own that ends afterwards.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

/// Why something could not be done in a network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NsError {
    /// The namespace can't be opened.
    #[error("can't open the network namespace of {whose}: {source}")]
    Open {
        /// The process or thread.
        whose: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace can't be entered.
    #[error("can't enter a network namespace: {0}; it needs CAP_SYS_ADMIN in the namespace's user namespace")]
    Enter(nix::Error),
    /// No namespace can be made.
    #[error("can't make a network namespace: {0}; it needs CAP_SYS_ADMIN")]
    Make(nix::Error),
    /// No thread could be started, or it panicked.
    #[error("can't run a thread in a network namespace: {0}")]
    Thread(String),
}

/// The network namespace of a process; it lives as long as the descriptor.
pub fn of_process(pid: u32) -> Result<OwnedFd, NsError> {
    open(&pid.to_string())
}

fn open(whose: &str) -> Result<OwnedFd, NsError> {
    let file = std::fs::File::open(format!("/proc/{whose}/ns/net"));
    file.map(OwnedFd::from).map_err(|source| NsError::Open { whose: whose.to_owned(), source })
}

/// A new, empty network namespace; it lives as long as the descriptor, or anything in it.
pub fn new() -> Result<OwnedFd, NsError> {
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(NsError::Make)?;
        open("thread-self")
    })
}

/// Runs `work` on a new thread that has entered `namespace`; sockets that it opens stay in that namespace for good.
///
/// Blocks until `work` is done. Only the network namespace changes, which a single thread may do (setns(2)).
pub fn run_in<T: Send>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T, NsError> {
    on_a_thread(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(NsError::Enter)?;
        Ok(work())
    })
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T, NsError> + Send) -> Result<T, NsError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| NsError::Thread(e.to_string()))?;
        thread.join().map_err(|_| NsError::Thread("it panicked".to_owned()))?
    })
}

/// Makes `command` start in a user namespace of its own, in which it is root (one id is mapped: the caller's), and a network namespace
/// of its own. Needs no privilege where unprivileged user namespaces are allowed. Safe from a process with many threads.
pub fn isolate(command: &mut Command) {
    let uids = format!("0 {} 1\n", nix::unistd::geteuid());
    let gids = format!("0 {} 1\n", nix::unistd::getegid());
    let enter = move || {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
        write_raw(c"/proc/self/setgroups", b"deny")?;
        write_raw(c"/proc/self/uid_map", uids.as_bytes())?;
        write_raw(c"/proc/self/gid_map", gids.as_bytes())
    };
    // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor takes locks.
    unsafe { command.pre_exec(enter) };
}

/// Writes a file without allocating, for use between fork and exec.
fn write_raw(path: &std::ffi::CStr, text: &[u8]) -> io::Result<()> {
    // SAFETY: the path is NUL-terminated and outlives the call.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: pointer and length describe `text`; `fd` was opened above.
    let written = unsafe { libc::write(fd, text.as_ptr().cast(), text.len()) };
    let result = if written == text.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: `fd` was opened above and is closed once.
    unsafe { libc::close(fd) };
    result
}

/// Whether a user id has a meaning in this user namespace (user_namespaces(7), `uid_map`).
pub fn is_mapped(uid: u32) -> io::Result<bool> {
    Ok(uid_map_contains(&std::fs::read_to_string("/proc/self/uid_map")?, uid))
}

fn uid_map_contains(map: &str, uid: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(inside)), Some(Ok(_)), Some(Ok(count))) = (numbers.next(), numbers.next(), numbers.next()) else {
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
        assert!(!uid_map_contains("         0       1000          1\n", 1337));
        assert!(uid_map_contains("0 1000 1\n1337 101337 1\n", 1337));
        assert!(!uid_map_contains("", 0));
    }
}
