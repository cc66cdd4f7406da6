//! The hidden stages that the binary is re-executed as, since namespaces are entered by single-threaded processes only.
//!
//! | stage | what it does |
//! | --- | --- |
//! | `cluster` | leaves the host's network, mounts and PIDs (and users, where the caller is not root); starts `init` |
//! | `init` | PID 1 of the cluster: own /proc and runtime folder; starts `node`, reaps orphans, ends when the parent's socket closes |
//! | `node` | the node process (`node.rs`) |
//! | `container` | PID 1 of a container: makes its root file system, starts `enter`, reaps, forwards signals (`agent/launch.rs`) |
//! | `enter` | gives up privileges and becomes the container's program |
//! | `exec` | joins a running container and becomes the command |

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getegid, geteuid};

/// The hidden subcommand.
pub(crate) const STAGE: &str = "local-stage";

/// Runs a hidden stage when `args` (the whole argument list, program name first) asks for one: `mesh local-stage NAME ...`.
///
/// Call it first thing in `main`, before any thread exists. `None`: not a stage, go on with the ordinary command line.
pub fn stage_main(args: &[OsString]) -> Option<ExitCode> {
    if args.get(1)? != STAGE {
        return None;
    }
    // The stage before had signals blocked for its signalfd, and std lets children inherit that; a container's program must not.
    let _ = SigSet::empty().thread_set_mask();
    let name = args.get(2).and_then(|a| a.to_str()).unwrap_or_default();
    let rest = args.get(3).map(PathBuf::from).unwrap_or_default();
    let result = match name {
        "cluster" => cluster(&rest),
        "init" => init(&rest),
        "node" => crate::node::main(&rest),
        "container" => crate::agent::launch::container_stage(),
        "enter" => crate::agent::launch::enter_stage(),
        "exec" => crate::agent::launch::exec_stage(
            args.get(3).and_then(|a| a.to_str()).unwrap_or_default(),
        ),
        other => Err(anyhow::anyhow!(
            "\"{other}\" is not a stage; {STAGE} is for the program's own use"
        )),
    };
    Some(result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    }))
}

/// The next stage of this binary with `stdin` as its standard input.
pub(crate) fn next_stage(name: &str, stdin: OwnedFd) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("mesh")
        .args([STAGE, name])
        .stdin(Stdio::from(stdin));
    command
}

/// Standard input as a descriptor of its own, closed on exec; sockets are inherited this way, since taking a number needs `unsafe`.
pub(crate) fn take_stdin() -> anyhow::Result<OwnedFd> {
    let stdin = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("taking over standard input")?;
    let null = std::fs::File::open("/dev/null").context("opening /dev/null")?;
    nix::unistd::dup2_stdin(null).context("closing standard input")?;
    Ok(stdin)
}

fn cluster(state: &Path) -> anyhow::Result<ExitCode> {
    let signals = signal_fd()?;
    let socket = take_stdin()?;
    leave_host()?;
    let mut child = next_stage("init", socket)
        .arg(state)
        .spawn()
        .context("starting the cluster's init")?;
    loop {
        wait_readable(&[signals.as_fd()])?;
        while let Ok(Some(info)) = signals.read_signal() {
            if info.ssi_signo != Signal::SIGCHLD as u32 {
                let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
            }
        }
        if let Some(status) = child.try_wait().context("waiting for the cluster's init")? {
            return Ok(ExitCode::from(
                status
                    .code()
                    .and_then(|c| u8::try_from(c).ok())
                    .unwrap_or(1),
            ));
        }
    }
}

/// Unshares user (where not root), network, mount and PID namespaces.
fn leave_host() -> anyhow::Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    let rest = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    if uid.is_root() {
        match unshare(rest) {
            Ok(()) => return private_mounts(),
            // Root without CAP_SYS_ADMIN, as in a plain container: a user namespace may still work.
            Err(Errno::EPERM) => {}
            Err(error) => return Err(refused(error)),
        }
    }
    unshare(CloneFlags::CLONE_NEWUSER).map_err(refused)?;
    let write = |file: &str, text: String| {
        std::fs::write(file, text).map_err(|e| anyhow::anyhow!("writing {file}: {e}"))
    };
    write("/proc/self/setgroups", "deny".to_owned())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    unshare(rest).map_err(refused)?;
    private_mounts()
}

fn private_mounts() -> anyhow::Result<()> {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("making the mounts private")
}

/// The error for a machine that does not let us make namespaces; names what has to be changed.
fn refused(error: Errno) -> anyhow::Error {
    let sysctl = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/")))
            .map(|v| v.trim().to_owned())
    };
    let hint = if sysctl("kernel.unprivileged_userns_clone").is_ok_and(|v| v == "0") {
        "set the sysctl kernel.unprivileged_userns_clone=1, or run as root"
    } else if sysctl("user.max_user_namespaces").is_ok_and(|v| v == "0") {
        "set the sysctl user.max_user_namespaces to a number above 0, or run as root"
    } else if sysctl("kernel.apparmor_restrict_unprivileged_userns").is_ok_and(|v| v == "1") {
        "set the sysctl kernel.apparmor_restrict_unprivileged_userns=0, or run as root"
    } else {
        "the capability CAP_SYS_ADMIN is missing and unprivileged user namespaces are refused (by seccomp in a container?): run as root, \
         or allow unprivileged user namespaces"
    };
    anyhow::anyhow!("this machine does not let mesh make namespaces ({error}): {hint}")
}

/// Blocks the signals that end a cluster, or tell of a child's end, and gives them to be read instead.
pub(crate) fn signal_fd() -> anyhow::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGCHLD,
    ] {
        set.add(signal);
    }
    set.thread_block().context("blocking signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("making a signalfd")
}

/// Waits until one of `fds` can be read; says which ones hung up.
fn wait_readable(fds: &[std::os::fd::BorrowedFd<'_>]) -> anyhow::Result<Vec<PollFlags>> {
    let mut polls: Vec<PollFd<'_>> = fds
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    // The socket is only watched for the other side's end; its data belongs to the node process.
    if let Some(second) = polls.get_mut(1) {
        second.set_events(PollFlags::empty());
    }
    match poll(&mut polls, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(polls
            .iter()
            .map(|p| p.revents().unwrap_or(PollFlags::empty()))
            .collect()),
        Err(error) => Err(error).context("waiting"),
    }
}

fn init(state: &Path) -> anyhow::Result<ExitCode> {
    let signals = signal_fd()?;
    let socket = take_stdin()?;
    nix::unistd::sethostname(crate::agent::NODE_NAME).context("naming the node")?;
    let run = prepare_mounts(state)?;
    let node_socket = socket.try_clone().context("sharing the parent's socket")?;
    let node = next_stage("node", node_socket)
        .arg(state)
        .current_dir(&run)
        .spawn()
        .context("starting the node process")?;
    let node = Pid::from_raw(node.id() as i32);
    loop {
        let ready = wait_readable(&[signals.as_fd(), socket.as_fd()])?;
        if ready
            .get(1)
            .is_some_and(|flags| flags.contains(PollFlags::POLLHUP))
        {
            return Ok(ExitCode::from(137));
        }
        while let Ok(Some(info)) = signals.read_signal() {
            if info.ssi_signo != Signal::SIGCHLD as u32 {
                let _ = kill(node, Signal::SIGTERM);
            }
        }
        if let Some(code) = reap(node) {
            return Ok(ExitCode::from(code));
        }
    }
}

/// Collects every child that has ended; the exit code of `main` when it is among them.
pub(crate) fn reap(main: Pid) -> Option<u8> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == main => return Some(code as u8),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == main => {
                return Some(128 + signal as u8);
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return None,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
}

/// The cluster's own /proc, its runtime folder in memory, and the binary where every uid can execute it.
fn prepare_mounts(state: &Path) -> anyhow::Result<PathBuf> {
    mount_proc(Path::new("/proc"))?;
    let run = state.join("run");
    mount(
        Some("mesh"),
        &run,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=0755"),
    )
    .with_context(|| format!("mounting the runtime folder {}", run.display()))?;
    let binary = run.join("mesh");
    std::fs::write(&binary, []).context("making the binary's mount point")?;
    let own = std::fs::read_link("/proc/self/exe").context("finding the running binary")?;
    let mode = std::fs::metadata("/proc/self/exe")
        .map(|m| m.permissions().mode())
        .unwrap_or(0);
    let bound = mode & 0o005 == 0o005
        && mount(
            Some(&own),
            &binary,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .is_ok();
    if !bound {
        std::fs::copy("/proc/self/exe", &binary).context("copying the running binary")?;
        std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(run)
}

/// Mounts a /proc of this PID namespace; where that is refused (a container hides parts of its own) the one that is there is kept.
pub(crate) fn mount_proc(target: &Path) -> anyhow::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    match mount(Some("proc"), target, Some("proc"), flags, None::<&str>) {
        Ok(()) => Ok(()),
        Err(Errno::EPERM) if target == Path::new("/proc") => {
            bail!(
                "this machine does not let mesh mount /proc in a PID namespace (parts of /proc are hidden here, as in a container): run as root or start the container with an unmasked /proc"
            )
        }
        Err(error) => Err(error).with_context(|| format!("mounting {}", target.display())),
    }
}
