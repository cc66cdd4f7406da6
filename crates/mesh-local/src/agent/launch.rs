//! The stages inside a container: PID 1 that makes the root file system and waits, the step that becomes the program, and `exec`.
//!
//! The agent's thread has already entered the pod's network, UTS and IPC namespaces and asked for a new PID namespace when these start
//! (`process.rs`); they are single-threaded. What to run comes as JSON over standard input, errors go back the same way; the socket
//! closes on a successful exec.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

use super::resolve::{Privileges, START_ERROR};
use super::rootfs::{RootSpec, make_root};
use super::terminal::take_terminal;
use crate::pass;
use crate::stage::{next_stage, reap, take_stdin};

/// Where a container has our binary, and links to it by the names of its image's programs (`rootfs.rs`).
const APPLETS: &str = "/usr/local/bin";

/// Everything a container's processes need to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// The file system.
    pub root: RootSpec,
    /// The program.
    pub process: ProcessSpec,
    /// The control group to join, when there is one.
    pub cgroup: Option<PathBuf>,
}

/// One program and who it runs as.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Where it starts.
    pub cwd: String,
    /// Who it runs as.
    pub privileges: Privileges,
    /// It gets a terminal; the descriptor that came with this is the socket over which the agent waits for the terminal's other end.
    pub tty: bool,
}

impl ProcessSpec {
    /// Tells the program what its terminal can do, unless its own environment does; container runtimes say the same.
    pub fn describe_terminal(&mut self) {
        if !self.env.iter().any(|(name, _)| name == "TERM") {
            self.env.push(("TERM".to_owned(), "xterm".to_owned()));
        }
    }
}

/// What `exec` needs: the container's mount namespace and the program.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecSpec {
    /// PID of the container's PID 1 as the node sees it.
    pub pid: u32,
    /// The program.
    pub process: ProcessSpec,
    /// The control group to join, when there is one.
    pub cgroup: Option<PathBuf>,
}

/// Why a container did not start, as sent to the agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LaunchFailure {
    /// `StartError` or `CreateContainerError`.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// The `container` stage.
pub(crate) fn container_stage() -> anyhow::Result<ExitCode> {
    let mut agent = UnixStream::from(take_stdin()?);
    let failed = |agent: &mut UnixStream, error: anyhow::Error| {
        report(agent, "CreateContainerError", &error);
        Ok(ExitCode::from(128))
    };
    let (spec, input) = match read_spec::<LaunchSpec>(&mut agent) {
        Ok(received) => received,
        Err(error) => return failed(&mut agent, error),
    };
    let signals = block_all();
    match start(&spec, input, &mut agent) {
        Ok(Some(main)) => {
            // The agent takes the end of this socket for "it runs".
            drop(agent);
            Ok(ExitCode::from(wait(main, &signals)))
        }
        Ok(None) => Ok(ExitCode::from(127)),
        Err(error) => failed(&mut agent, error),
    }
}

fn block_all() -> SigSet {
    let mut set = SigSet::all();
    set.remove(Signal::SIGKILL);
    set.remove(Signal::SIGSTOP);
    let _ = set.thread_block();
    set
}

/// Reaps and passes signals on until `main` ends.
fn wait(main: Pid, signals: &SigSet) -> u8 {
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {
                if let Some(code) = reap(main) {
                    return code;
                }
            }
            Ok(signal) => {
                let _ = kill(main, signal);
            }
            Err(_) => {}
        }
    }
}

/// Makes the root file system and starts the program; `None` when the program itself could not be run (already reported).
fn start(
    spec: &LaunchSpec,
    input: Option<OwnedFd>,
    agent: &mut UnixStream,
) -> anyhow::Result<Option<Pid>> {
    if let Some(cgroup) = &spec.cgroup {
        std::fs::write(cgroup.join("cgroup.procs"), "0")
            .with_context(|| format!("joining the control group {}", cgroup.display()))?;
    }
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
    make_root(
        &spec.root,
        spec.process.privileges.read_only_root,
        &spec.process.cwd,
    )?;
    let (mut ours, theirs) = UnixStream::pair()?;
    let child = next_stage("enter", theirs.into())
        .spawn()
        .context("starting the container's program")?;
    send_spec(&mut ours, &spec.process, input)?;
    let mut answer = Vec::new();
    ours.read_to_end(&mut answer)?;
    let main = Pid::from_raw(child.id() as i32);
    if answer.is_empty() {
        return Ok(Some(main));
    }
    agent.write_all(&answer)?;
    Ok(None)
}

/// The `enter` stage.
pub(crate) fn enter_stage() -> anyhow::Result<ExitCode> {
    let mut socket = UnixStream::from(take_stdin()?);
    let (process, input) = read_spec::<ProcessSpec>(&mut socket)?;
    let error = become_process(&process, input);
    report(&mut socket, START_ERROR, &error);
    Ok(ExitCode::from(
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
        {
            127
        } else {
            126
        },
    ))
}

/// The `exec` stage; `path` is a file with an [`ExecSpec`], which is removed once read (it holds the environment, so it is not an argument).
/// Standard input is the command's, or with a terminal the socket for it.
pub(crate) fn exec_stage(path: &str) -> anyhow::Result<ExitCode> {
    let json = std::fs::read(path).context("reading the exec specification")?;
    let _ = std::fs::remove_file(path);
    let spec: ExecSpec = serde_json::from_slice(&json).context("reading the exec specification")?;
    if let Some(cgroup) = &spec.cgroup {
        let _ = std::fs::write(cgroup.join("cgroup.procs"), "0");
    }
    let mounts = std::fs::File::open(format!("/proc/{}/ns/mnt", spec.pid))
        .context("finding the container")?;
    setns(mounts, CloneFlags::CLONE_NEWNS).context("entering the container's file system")?;
    let console = spec.process.tty.then(take_stdin).transpose()?;
    let error = become_process(&spec.process, console);
    eprintln!("{error:#}");
    Ok(ExitCode::from(127))
}

/// Gives up what is not the program's and becomes it. Only returns with an error.
fn become_process(process: &ProcessSpec, input: Option<OwnedFd>) -> anyhow::Error {
    let program = process.argv.first().map(String::as_str).unwrap_or_default();
    if let Err(error) = prepare(process, input) {
        return error;
    }
    let mut error = command(process, Path::new(program)).exec();
    if error.kind() == std::io::ErrorKind::NotFound
        && let Some(applet) = applet_for(program)
    {
        error = command(process, &applet).exec();
    }
    let what = match error.kind() {
        std::io::ErrorKind::NotFound if program.contains('/') => "no such file or directory",
        std::io::ErrorKind::NotFound => "executable file not found in $PATH",
        std::io::ErrorKind::PermissionDenied => "permission denied",
        _ => "can't be executed",
    };
    anyhow::Error::new(error).context(format!("exec: \"{program}\": {what}"))
}

/// Real images have a program where ours has it as an applet of the binary, such as /usr/bin/fortio: its name decides.
fn applet_for(program: &str) -> Option<PathBuf> {
    let name = Path::new(program)
        .file_name()
        .filter(|_| program.starts_with('/'))?;
    let link = Path::new(APPLETS).join(name);
    let is_applet = std::fs::read_link(&link).is_ok_and(|target| target == Path::new("mesh"));
    is_applet.then_some(link)
}

fn command(process: &ProcessSpec, program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .args(process.argv.iter().skip(1))
        .env_clear()
        .envs(process.env.iter().map(|(k, v)| (k, v)));
    command
}

fn prepare(process: &ProcessSpec, input: Option<OwnedFd>) -> anyhow::Result<()> {
    let _ = nix::unistd::setsid();
    match input {
        Some(console) if process.tty => take_terminal(console, process.privileges.uid)?,
        Some(pipe) => nix::unistd::dup2_stdin(pipe).context("taking over standard input")?,
        None => {}
    }
    drop_privileges(&process.privileges)?;
    heed_signals()?;
    if process.argv.is_empty() {
        bail!("no command");
    }
    std::env::set_current_dir(&process.cwd)
        .with_context(|| format!("changing to the working directory {}", process.cwd))
}

/// A program begins with every signal's default action. Whoever started the cluster may have had some ignored (nohup, a script's background
/// job), and that passes on to programs where a handler does not (execve(2)): Ctrl-C would do nothing in a container's terminal.
fn heed_signals() -> anyhow::Result<()> {
    use signal_hook::consts::{
        SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU, SIGUSR1,
        SIGUSR2,
    };
    let ignorable = [
        SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU, SIGUSR1,
        SIGUSR2,
    ];
    for signal in ignorable {
        signal_hook::flag::register(signal, Arc::default())
            .with_context(|| format!("taking signal {signal} to be handled"))?;
    }
    Ok(())
}

fn drop_privileges(privileges: &Privileges) -> anyhow::Result<()> {
    let bounding = CapabilitySet::from_bits_truncate(privileges.bounding);
    let ambient = CapabilitySet::from_bits_truncate(privileges.ambient);
    for capability in CapabilitySet::all().iter() {
        if !bounding.contains(capability) {
            // A number that this kernel does not know can't be held either.
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
    }
    rustix::thread::set_keep_capabilities(true)
        .context("keeping capabilities over the change of user")?;
    if let Some(uid) = privileges.uid {
        let gid = Gid::from_raw(privileges.gid.unwrap_or(uid));
        let groups: Vec<Gid> = privileges
            .groups
            .iter()
            .copied()
            .map(Gid::from_raw)
            .collect();
        setgroups(&groups).context("setting the groups")?;
        setresgid(gid, gid, gid).with_context(|| format!("changing to group {gid}"))?;
        let uid = Uid::from_raw(uid);
        setresuid(uid, uid, uid).with_context(|| format!("changing to user {uid}"))?;
    }
    let held = rustix::thread::capabilities(None)
        .context("reading capabilities")?
        .permitted
        & bounding;
    let sets = CapabilitySets {
        effective: held,
        permitted: held,
        inheritable: ambient & held,
    };
    rustix::thread::set_capabilities(None, sets).context("dropping capabilities")?;
    let _ = rustix::thread::clear_ambient_capability_set();
    for capability in (ambient & held).iter() {
        rustix::thread::configure_capability_in_ambient_set(capability, true)
            .context("keeping a capability")?;
    }
    if privileges.no_new_privs {
        nix::sys::prctl::set_no_new_privs().context("setting no_new_privs")?;
    }
    Ok(())
}

/// Sends a value as a length and its JSON, with a descriptor.
fn send_spec(
    socket: &mut UnixStream,
    value: &impl Serialize,
    descriptor: Option<OwnedFd>,
) -> anyhow::Result<()> {
    let (length, json) = encode_spec(value)?;
    let sent = pass::send(socket, &length, descriptor.as_ref().map(OwnedFd::as_fd))
        .and_then(|()| socket.write_all(&json));
    sent.context("sending the container's specification")
}

/// The length and the JSON of a value.
pub(crate) fn encode_spec(value: &impl Serialize) -> anyhow::Result<([u8; 4], Vec<u8>)> {
    let json = serde_json::to_vec(value)?;
    Ok((u32::try_from(json.len())?.to_le_bytes(), json))
}

fn read_spec<T: serde::de::DeserializeOwned>(
    socket: &mut UnixStream,
) -> anyhow::Result<(T, Option<OwnedFd>)> {
    const WHAT: &str = "reading the container's specification";
    let mut length = [0; 4];
    // The descriptor comes with the first byte.
    let (received, descriptor) = pass::receive(socket.as_fd(), &mut length).context(WHAT)?;
    socket.read_exact(&mut length[received..]).context(WHAT)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > 64 << 20 {
        bail!("the container's specification is too large");
    }
    let mut json = vec![0; length];
    socket.read_exact(&mut json).context(WHAT)?;
    Ok((serde_json::from_slice(&json)?, descriptor))
}

fn report(socket: &mut UnixStream, reason: &str, error: &anyhow::Error) {
    let message = error
        .chain()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ");
    let failure = LaunchFailure {
        reason: reason.to_owned(),
        message,
    };
    let _ = socket.write_all(&serde_json::to_vec(&failure).unwrap_or_default());
}

/// Where a path of the container lies below its root while the root is being made.
pub(crate) fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}
