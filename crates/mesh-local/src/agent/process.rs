//! Starts container processes and commands in them from the multi-threaded agent.
//!
//! A thread enters the pod's namespaces, asks for a PID namespace and starts the stage; `nsproxy` belongs to the thread, so the agent's
//! other threads stay where they are and the process is still the agent's child.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use nix::sched::{CloneFlags, setns, unshare};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use super::launch::{ExecSpec, LaunchFailure, LaunchSpec, ProcessSpec, encode_spec};
use super::sandbox::{Sandbox, on_thread};
use crate::pass;
use crate::stage::{STAGE, next_stage};

/// Output of a probe or hook command that is kept, in bytes.
const MAX_OUTPUT: u64 = 4096;

fn failure(error: &anyhow::Error) -> LaunchFailure {
    LaunchFailure {
        reason: "CreateContainerError".to_owned(),
        message: format!("{error:#}"),
    }
}

/// Starts a container; its output is piped. `input` is its standard input, or the socket for its terminal. Returns when the program runs,
/// or with the reason why it does not.
pub async fn start(
    sandbox: Arc<Sandbox>,
    spec: &LaunchSpec,
    input: Option<OwnedFd>,
) -> Result<Child, LaunchFailure> {
    let (length, message) = encode_spec(spec).map_err(|e| failure(&e))?;
    let started = spawn_stage(sandbox, length, input).await;
    let (child, mut socket) = started.map_err(|e| failure(&e))?;
    let mut answer = Vec::new();
    let exchange = async {
        socket.write_all(&message).await?;
        socket.read_to_end(&mut answer).await
    };
    // A write fails when the stage gave up early; its answer says why.
    if let Err(error) = exchange.await
        && answer.is_empty()
    {
        let _ = socket.read_to_end(&mut answer).await;
        if answer.is_empty() {
            return Err(failure(
                &anyhow::Error::new(error).context("talking to the container's first process"),
            ));
        }
    }
    if answer.is_empty() {
        return Ok(child);
    }
    Err(serde_json::from_slice(&answer).unwrap_or_else(|e| failure(&e.into())))
}

async fn spawn_stage(
    sandbox: Arc<Sandbox>,
    length: [u8; 4],
    input: Option<OwnedFd>,
) -> anyhow::Result<(Child, tokio::net::UnixStream)> {
    let runtime = tokio::runtime::Handle::current();
    let (child, ours) = on_thread(move || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        pass::send(&ours, &length, input.as_ref().map(OwnedFd::as_fd))?;
        sandbox.enter().context("entering the pod's namespaces")?;
        unshare(CloneFlags::CLONE_NEWPID).context("making a PID namespace")?;
        let mut command = Command::from(next_stage("container", theirs.into()));
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let _runtime = runtime.enter();
        Ok((
            command
                .spawn()
                .context("starting the container's first process")?,
            ours,
        ))
    })
    .await?;
    ours.set_nonblocking(true)?;
    Ok((child, tokio::net::UnixStream::from_std(ours)?))
}

/// A running container as other parts of the agent reach it.
#[derive(Debug, Clone)]
pub struct Target {
    /// The pod's namespaces.
    pub sandbox: Arc<Sandbox>,
    /// PID 1 of the container, as the node sees it.
    pub pid: u32,
    /// The container's program; commands inherit its environment and privileges.
    pub process: ProcessSpec,
    /// Its control group.
    pub cgroup: Option<PathBuf>,
    /// The node's runtime folder.
    pub run: PathBuf,
}

impl Target {
    /// Starts a command in the container with the given standard streams. With `tty` the first of them is the socket for its terminal.
    pub async fn spawn(
        &self,
        argv: Vec<String>,
        tty: bool,
        streams: [Stdio; 3],
    ) -> anyhow::Result<Child> {
        let mut process = ProcessSpec {
            argv,
            tty,
            ..self.process.clone()
        };
        if tty {
            process.describe_terminal();
        }
        let spec = ExecSpec {
            pid: self.pid,
            process,
            cgroup: self.cgroup.clone(),
        };
        let path = self.run.join(format!("exec-{}", uuid::Uuid::new_v4()));
        crate::parent::write_private(&path, &serde_json::to_vec(&spec)?)?;
        let (sandbox, pid) = (self.sandbox.clone(), self.pid);
        let runtime = tokio::runtime::Handle::current();
        on_thread(move || {
            let pids = File::open(format!("/proc/{pid}/ns/pid"))
                .context("the container is not running")?;
            sandbox.enter().context("entering the pod's namespaces")?;
            setns(pids, CloneFlags::CLONE_NEWPID)
                .context("entering the container's PID namespace")?;
            let [stdin, stdout, stderr] = streams;
            let mut command = Command::new("/proc/self/exe");
            command.arg0("mesh").args([STAGE, "exec"]).arg(&path);
            command
                .stdin(stdin)
                .stdout(stdout)
                .stderr(stderr)
                .kill_on_drop(true);
            let _runtime = runtime.enter();
            command.spawn().context("starting the command")
        })
        .await
    }

    /// Runs a command to its end and gives its exit code and the beginning of its output; an error when it takes longer than `limit`.
    pub async fn run(&self, argv: Vec<String>, limit: Duration) -> Result<(i32, String), String> {
        let run = async {
            let child = self
                .spawn(argv, false, [Stdio::null(), Stdio::piped(), Stdio::piped()])
                .await;
            let mut child = child.map_err(|e| format!("{e:#}"))?;
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
            tokio::join!(drain(stdout, &mut out), drain(stderr, &mut err));
            let status = child.wait().await.map_err(|e| e.to_string())?;
            out.extend(err);
            Ok((
                exit_code(status),
                String::from_utf8_lossy(&out).into_owned(),
            ))
        };
        tokio::time::timeout(limit, run)
            .await
            .unwrap_or_else(|_| Err(format!("command timed out after {} s", limit.as_secs_f32())))
    }
}

async fn drain(stream: Option<impl tokio::io::AsyncRead + Unpin>, into: &mut Vec<u8>) {
    if let Some(mut stream) = stream {
        let _ = (&mut stream).take(MAX_OUTPUT).read_to_end(into).await;
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
}

/// The shell's convention: the code, or 128 + signal.
pub fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
