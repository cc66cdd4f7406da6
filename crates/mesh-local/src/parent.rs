//! The parent: stays in the host's namespaces, binds host ports, starts and ends the cluster.
//!
//! It is one thread that polls two descriptors: the socket to the node (bind requests) and a signalfd. When it dies, however, the node's
//! init sees the socket close and ends, and with it every process of the cluster.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use serde::{Deserialize, Serialize};

use crate::stage::{STAGE, signal_fd};
use crate::{ClusterOptions, StateDir, pass};

/// What the node process is told beyond the user's options.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NodeSetup {
    pub(crate) options: ClusterOptions,
    pub(crate) state: PathBuf,
    pub(crate) in_memory: bool,
    /// The API's address on the host, with the port that was really bound.
    pub(crate) api: SocketAddr,
}

/// The file in the state directory through which [`NodeSetup`] travels; the node removes it.
pub(crate) const SETUP_FILE: &str = "setup.json";

/// The file in the state directory that a running cluster holds a lock on.
const LOCK_FILE: &str = "lock";

/// Runs the local cluster until it is stopped by SIGINT or SIGTERM, and says how it ended.
///
/// Must be called before any thread exists. Fails with a message for people when a privilege is missing, the state directory is in use, or
/// a host port is taken; nothing is left behind then.
pub fn all_in_one(options: ClusterOptions) -> anyhow::Result<ExitCode> {
    let state = State::open(&options.state_dir)?;
    let code = in_state(&state, options);
    state.clean_up();
    code
}

fn in_state(state: &State, mut options: ClusterOptions) -> anyhow::Result<ExitCode> {
    let mut held = HashMap::new();
    let api = hold(
        &mut held,
        options.api_address,
        "--api-port",
        "the Kubernetes API",
    )?;
    for port in &mut options.host_ports {
        let what = format!(
            "port {} of service {}/{}",
            port.port, port.namespace, port.service
        );
        port.address = hold(&mut held, port.address, &port.flag, &what)?;
    }
    let setup = NodeSetup {
        options,
        state: state.path.clone(),
        in_memory: state.temporary,
        api,
    };
    write_private(&state.path.join(SETUP_FILE), &serde_json::to_vec(&setup)?)?;

    let signals = signal_fd()?;
    let (ours, theirs) = UnixStream::pair().context("making the socket to the node process")?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("mesh")
        .args([STAGE, "cluster"])
        .arg(&state.path)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .process_group(0)
        .spawn()
        .context("starting the node process")?;
    serve(ours, &mut held, &signals, &mut child)
}

/// The state directory, locked for as long as this lives.
struct State {
    path: PathBuf,
    temporary: bool,
    /// The directories that were made for it, the innermost first.
    made: Vec<PathBuf>,
    _lock: File,
}

impl State {
    fn open(choice: &StateDir) -> anyhow::Result<Self> {
        let temporary = *choice == StateDir::Memory;
        let path = match choice {
            StateDir::Path(path) => std::path::absolute(path)?,
            StateDir::Memory => std::env::temp_dir().join(format!("mesh-{}", uuid::Uuid::new_v4())),
            StateDir::Default => default_state_dir()?,
        };
        let make = |dir: &Path| {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .with_context(|| {
                    format!(
                        "making the state directory {}: choose another with --state-dir",
                        dir.display()
                    )
                })
        };
        let made: Vec<PathBuf> = path
            .ancestors()
            .take_while(|dir| !dir.exists())
            .map(Path::to_owned)
            .collect();
        make(&path)?;
        let path = path.canonicalize()?;
        let lock_path = path.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path);
        let lock = lock.with_context(|| format!("opening {}", lock_path.display()))?;
        if lock.try_lock().is_err() {
            bail!(
                "the state directory {} is used by another mesh that is still running: stop it, or choose another directory with --state-dir \
                 (and other ports)",
                path.display()
            );
        }
        // What a run that was killed left in its runtime folder lay in a mount that ended with it; only the empty folder remains.
        make(&path.join("run"))?;
        Ok(Self {
            path,
            temporary,
            made,
            _lock: lock,
        })
    }

    fn clean_up(&self) {
        crate::agent::cgroup::remove(&self.path);
        let _ = std::fs::remove_file(self.path.join(SETUP_FILE));
        if self.temporary {
            let _ = std::fs::remove_dir_all(&self.path);
        } else if !self.made.is_empty() && self.holds_nothing() {
            let _ = std::fs::remove_dir(self.path.join("run"));
            let _ = std::fs::remove_file(self.path.join(LOCK_FILE));
            // Stops at the first that somebody else has put something into.
            self.made.iter().all(|dir| std::fs::remove_dir(dir).is_ok());
        }
    }

    /// Whether the start failed before the cluster wrote anything.
    fn holds_nothing(&self) -> bool {
        let ours = |name: &std::ffi::OsStr| name == LOCK_FILE || name == "run";
        std::fs::read_dir(&self.path)
            .is_ok_and(|mut all| all.all(|e| e.is_ok_and(|e| ours(&e.file_name()))))
    }
}

fn default_state_dir() -> anyhow::Result<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    if let Some(dir) = absolute("XDG_STATE_HOME") {
        return Ok(dir.join("mesh"));
    }
    let home = absolute("HOME")
        .context("neither XDG_STATE_HOME nor HOME is set: choose a directory with --state-dir")?;
    Ok(home.join(".local/state/mesh"))
}

/// Writes a file that only its owner can read.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("writing {}", path.display()))?;
    file.write_all(content)
        .with_context(|| format!("writing {}", path.display()))
}

/// Binds a port that was asked for on the command line and keeps it for the node; gives the address with the real port.
fn hold(
    held: &mut HashMap<SocketAddr, TcpListener>,
    wanted: SocketAddr,
    flag: &str,
    what: &str,
) -> anyhow::Result<SocketAddr> {
    let listener = bind(wanted).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => anyhow::anyhow!(
            "{wanted} is already in use (wanted for {what}): stop the program that listens there, or choose another port with {flag} (0 takes a free one)"
        ),
        std::io::ErrorKind::PermissionDenied => {
            anyhow::anyhow!("no permission to listen on {wanted} (wanted for {what}): choose a port above 1023 with {flag}")
        }
        _ => anyhow::anyhow!("listening on {wanted} for {what}: {error}: choose another with {flag}"),
    })?;
    let address = listener.local_addr()?;
    held.insert(address, listener);
    Ok(address)
}

/// Listens without SO_REUSEPORT, so that a second instance fails and does not share the port; with SO_REUSEADDR (std's default).
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn serve(
    socket: UnixStream,
    held: &mut HashMap<SocketAddr, TcpListener>,
    signals: &SignalFd,
    child: &mut Child,
) -> anyhow::Result<ExitCode> {
    let mut socket = Some(socket);
    let mut asked = 0;
    loop {
        let mut ready = [false; 2];
        {
            let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            fds.extend(
                socket
                    .as_ref()
                    .map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)),
            );
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.context("waiting for the node process")?,
            };
            for (ready, fd) in ready.iter_mut().zip(&fds) {
                *ready = fd.any().unwrap_or(true);
            }
        }
        while let Ok(Some(info)) = signals.read_signal() {
            if info.ssi_signo == Signal::SIGCHLD as u32 {
                continue;
            }
            asked += 1;
            if asked == 1 {
                eprintln!("stopping; press Ctrl-C again to kill");
                let pid = nix::unistd::Pid::from_raw(child.id() as i32);
                nix::sys::signal::kill(pid, Signal::SIGTERM)
                    .context("stopping the node process")?;
            } else {
                // The node's init ends when the socket closes, and every process of the cluster with it.
                socket = None;
            }
        }
        if let Some(status) = child.try_wait().context("waiting for the node process")? {
            let code = status
                .code()
                .and_then(|c| u8::try_from(c).ok())
                .unwrap_or(1);
            return Ok(if asked > 0 && code == 0 {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(code)
            });
        }
        if ready[1]
            && let Some(stream) = socket.as_mut()
        {
            match pass::read_request(stream) {
                Ok(Some(request)) => {
                    let listener = held
                        .remove(&request.address)
                        .map_or_else(|| bind(request.address), Ok);
                    let _ = pass::answer(stream, listener);
                }
                _ => socket = None,
            }
        }
    }
}
