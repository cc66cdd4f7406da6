//! What the API server asks of the node agent: logs, commands and ports of running pods.

use std::pin::Pin;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

/// A stream of bytes in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// The node agent as the API server sees it.
pub trait NodeBackend: Send + Sync + 'static {
    /// Opens a container's log.
    fn logs(
        &self,
        request: LogRequest,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Bytes>, NodeError>>;

    /// Runs a command in a container, or attaches to its main process.
    fn exec(&self, request: ExecRequest) -> BoxFuture<'static, Result<ExecSession, NodeError>>;

    /// Connects to a port inside the pod's network namespace.
    fn port_forward(
        &self,
        namespace: String,
        pod: String,
        port: u16,
    ) -> BoxFuture<'static, Result<Box<dyn Duplex>, NodeError>>;
}

/// A backend for servers without a node, for tests: every call is refused.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoNode;

impl NodeBackend for NoNode {
    fn logs(
        &self,
        _: LogRequest,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Bytes>, NodeError>> {
        Box::pin(async { Err(NodeError::none()) })
    }

    fn exec(&self, _: ExecRequest) -> BoxFuture<'static, Result<ExecSession, NodeError>> {
        Box::pin(async { Err(NodeError::none()) })
    }

    fn port_forward(
        &self,
        _: String,
        _: String,
        _: u16,
    ) -> BoxFuture<'static, Result<Box<dyn Duplex>, NodeError>> {
        Box::pin(async { Err(NodeError::none()) })
    }
}

/// Query of `pods/log` (Kubernetes `PodLogOptions`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogRequest {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Container; always set, the API server fills in the default one.
    pub container: String,
    /// Keep the stream open for new lines.
    pub follow: bool,
    /// The log of the run before the last restart.
    pub previous: bool,
    /// Only so many lines from the end.
    pub tail_lines: Option<u64>,
    /// Only lines not older than this, RFC 3339.
    pub since_time: Option<String>,
    /// Only lines not older than this many seconds.
    pub since_seconds: Option<u64>,
    /// Start every line with its RFC 3339 time.
    pub timestamps: bool,
    /// End after so many bytes.
    pub limit_bytes: Option<u64>,
}

/// Query of `pods/exec` and `pods/attach`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Container; always set, the API server fills in the default one.
    pub container: String,
    /// Program and arguments; empty with `attach`.
    pub command: Vec<String>,
    /// The client will send standard input.
    pub stdin: bool,
    /// The client wants standard output.
    pub stdout: bool,
    /// The client wants standard error; never together with `tty`.
    pub stderr: bool,
    /// Run in a terminal.
    pub tty: bool,
    /// Attach to the container's main process in place of running `command`.
    pub attach: bool,
}

/// A running command, or an attached process.
pub struct ExecSession {
    /// Where standard input goes; dropping it is end of file. `None` when it was not asked for.
    pub stdin: Option<Pin<Box<dyn AsyncWrite + Send>>>,
    /// Standard output (and error, with a terminal). `None` when it was not asked for.
    pub stdout: Option<Pin<Box<dyn AsyncRead + Send>>>,
    /// Standard error. `None` when it was not asked for or with a terminal.
    pub stderr: Option<Pin<Box<dyn AsyncRead + Send>>>,
    /// Changes of the terminal's size; ignored without a terminal.
    pub resize: mpsc::Sender<TerminalSize>,
    /// Resolves when the process has ended.
    pub exit: BoxFuture<'static, ExitStatus>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Lines.
    pub height: u16,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitStatus {
    /// It returned this code; 0 is success.
    Code(i32),
    /// It ended otherwise (a signal, or it could not be watched); the text is for people.
    Failed(String),
}

/// Why the node agent refused.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct NodeError {
    /// Decides the HTTP status.
    pub kind: NodeErrorKind,
    /// For the user.
    pub message: String,
}

/// The kinds of [`NodeError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeErrorKind {
    /// The pod, container or log does not exist: 404.
    NotFound,
    /// The request can't be served in this state, for example the container has not started: 400.
    BadRequest,
    /// The agent failed: 500.
    Internal,
}

impl NodeError {
    /// An error with its kind.
    pub fn new(kind: NodeErrorKind, message: impl Into<String>) -> NodeError {
        NodeError {
            kind,
            message: message.into(),
        }
    }

    fn none() -> NodeError {
        NodeError::new(NodeErrorKind::Internal, "this API server has no node agent")
    }
}
