//! `mesh exec`: runs a command in a container.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::Api;
use kube::api::{AttachParams, AttachedProcess, TerminalSize};
use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::signal::unix::{SignalKind, signal};

use crate::out::Out;
use crate::{Global, pods};

/// Run a command in a container
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// POD or TYPE/NAME, for instance deployment/reviews-v1
    #[arg(value_name = "POD")]
    pub target: String,
    /// Container; for injected pods, istio-proxy is the sidecar
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<String>,
    /// Pass standard input on
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Command with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Runs the command; the exit code is that of the command in the container.
///
/// # Errors
/// No such pod or container, or a command that can't be started.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    let pod = pods::find(&cluster, &args.target).await?;
    let container = pods::container(&pod, args.container.as_deref())?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let tty = args.tty && std::io::stdin().is_terminal();
    if args.tty && !tty {
        eprintln!("standard input is not a terminal, so the command gets none either");
    }
    // With a terminal both streams are one.
    let params = AttachParams::default()
        .container(container)
        .stdin(args.stdin)
        .stdout(true)
        .stderr(!tty)
        .tty(tty);
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let process = api
        .exec(name, &args.command, &params)
        .await
        .with_context(|| format!("running {:?} in pod {name}", args.command[0]))?;
    let raw = if tty { Some(RawMode::enter()?) } else { None };
    let status = attach(process, tty, &global.out).await;
    drop(raw);
    exit_code(status.context("the connection ended before the command did")?)
}

/// Copies the streams until the command ends.
async fn attach(mut process: AttachedProcess, tty: bool, out: &Out) -> Option<Status> {
    let status = process.take_status();
    if let Some(remote) = process.stdin() {
        // Detached: a read from a terminal can't be cancelled, and must not keep us.
        tokio::spawn(copy(tokio::io::stdin(), remote));
    }
    if tty && let Some(sizes) = process.terminal_size() {
        tokio::spawn(resize(sizes));
    }
    let (stdout, stderr) = (process.stdout(), process.stderr());
    let output = async {
        if let Some(remote) = stdout {
            show(remote, out).await;
        }
    };
    let errors = async {
        if let Some(remote) = stderr {
            copy(remote, tokio::io::stderr()).await;
        }
    };
    tokio::join!(output, errors);
    match status {
        Some(status) => status.await,
        None => None,
    }
}

/// Copies the command's output to ours until it ends.
async fn show(mut from: impl AsyncRead + Unpin, out: &Out) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count) = from.read(&mut buffer).await {
        if count == 0 || out.bytes(&buffer[..count]).is_err() {
            break;
        }
    }
}

/// Copies until one side ends, and passes the end on.
async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count) = from.read(&mut buffer).await {
        if count == 0 || to.write_all(&buffer[..count]).await.is_err() || to.flush().await.is_err()
        {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// Tells the terminal's size, now and whenever it changes.
async fn resize(mut sizes: futures::channel::mpsc::Sender<TerminalSize>) {
    use futures::SinkExt as _;
    let Ok(mut changes) = signal(SignalKind::window_change()) else {
        return;
    };
    loop {
        if let Some((width, height)) = terminal_size::terminal_size() {
            let size = TerminalSize {
                width: width.0,
                height: height.0,
            };
            if sizes.send(size).await.is_err() {
                return;
            }
        }
        if changes.recv().await.is_none() {
            return;
        }
    }
}

/// The exit code in the server's final status.
fn exit_code(status: Status) -> anyhow::Result<ExitCode> {
    if status.status.as_deref() == Some("Success") {
        return Ok(ExitCode::SUCCESS);
    }
    let causes = status
        .details
        .iter()
        .flat_map(|details| details.causes.iter().flatten());
    let code = causes
        .filter(|cause| cause.reason.as_deref() == Some("ExitCode"))
        .find_map(|cause| cause.message.as_ref()?.parse::<u8>().ok());
    match code {
        Some(code) => {
            eprintln!("command terminated with exit code {code}");
            Ok(ExitCode::from(code))
        }
        None => anyhow::bail!("{}", status.message.unwrap_or_default()),
    }
}

/// The terminal without line editing and echo, until this is dropped.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> anyhow::Result<Self> {
        let before =
            termios::tcgetattr(std::io::stdin()).context("reading the terminal's settings")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw)
            .context("setting the terminal to raw mode")?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
