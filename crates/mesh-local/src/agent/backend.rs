//! Logs, exec, attach and port-forward for the API server.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use mesh_apiserver::node::{
    Duplex, ExecRequest, ExecSession, ExitStatus, LogRequest, NodeBackend, NodeError, NodeErrorKind,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::process::{Target, exit_code};
use super::registry::{Entry, Registry};
use super::sandbox::on_thread;
use super::terminal::Terminal;

/// The node agent as the API server sees it. Works from the start; knows a pod once its sandbox exists.
#[derive(Debug, Clone, Default)]
pub struct Backend {
    registry: Arc<Registry>,
}

impl Backend {
    /// A backend over the registry that the agent fills.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }

    fn entry(&self, namespace: &str, pod: &str, container: &str) -> Result<Entry, NodeError> {
        let found = self.registry.container(namespace, pod, container);
        found.ok_or_else(|| {
            bad(format!(
                "container \"{container}\" in pod \"{pod}\" is waiting to start"
            ))
        })
    }
}

fn bad(message: String) -> NodeError {
    NodeError::new(NodeErrorKind::BadRequest, message)
}

fn internal(error: impl std::fmt::Display) -> NodeError {
    NodeError::new(NodeErrorKind::Internal, format!("{error:#}"))
}

impl NodeBackend for Backend {
    fn logs(
        &self,
        request: LogRequest,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Bytes>, NodeError>> {
        let entry = self.entry(&request.namespace, &request.pod, &request.container);
        async move {
            let entry = entry?;
            let log = if request.previous {
                entry.previous
            } else {
                entry.log
            };
            let log = log.ok_or_else(|| {
                bad(format!(
                    "previous terminated container \"{}\" in pod \"{}\" not found",
                    request.container, request.pod
                ))
            })?;
            let (send, receive) = mpsc::channel(64);
            tokio::spawn(log.stream(request, send));
            Ok(ReceiverStream::new(receive).boxed())
        }
        .boxed()
    }

    fn exec(&self, request: ExecRequest) -> BoxFuture<'static, Result<ExecSession, NodeError>> {
        let entry = self.entry(&request.namespace, &request.pod, &request.container);
        async move {
            let entry = entry?;
            let target = entry.target.clone();
            let target = target.ok_or_else(|| {
                bad(format!(
                    "container \"{}\" is not running",
                    request.container
                ))
            })?;
            if request.attach {
                let streams = entry.streams.ok_or_else(|| {
                    bad(format!(
                        "container \"{}\" is not running",
                        request.container
                    ))
                })?;
                return Ok(streams.attach(&request));
            }
            if request.tty {
                exec_tty(&target, request).await
            } else {
                exec_pipes(&target, request).await
            }
        }
        .boxed()
    }

    fn port_forward(
        &self,
        namespace: String,
        pod: String,
        port: u16,
    ) -> BoxFuture<'static, Result<Box<dyn Duplex>, NodeError>> {
        let sandbox = self.registry.sandbox(&namespace, &pod);
        async move {
            let sandbox = sandbox.ok_or_else(|| bad(format!("pod \"{pod}\" is not running")))?;
            let stream = on_thread(move || {
                sandbox.enter()?;
                let stream = std::net::TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, port))?;
                stream.set_nonblocking(true)?;
                Ok(stream)
            });
            let stream = stream.await.map_err(|e| {
                internal(format!("connecting to port {port} inside pod {pod}: {e:#}"))
            })?;
            let stream = tokio::net::TcpStream::from_std(stream).map_err(internal)?;
            Ok(Box::new(stream) as Box<dyn Duplex>)
        }
        .boxed()
    }
}

async fn exec_pipes(target: &Target, request: ExecRequest) -> Result<ExecSession, NodeError> {
    let pipe = |wanted: bool| {
        if wanted {
            Stdio::piped()
        } else {
            Stdio::null()
        }
    };
    let streams = [
        pipe(request.stdin),
        pipe(request.stdout),
        pipe(request.stderr),
    ];
    let mut child = target
        .spawn(request.command, false, streams)
        .await
        .map_err(internal)?;
    Ok(ExecSession {
        stdin: child.stdin.take().map(|s| Box::pin(s) as _),
        stdout: child.stdout.take().map(|s| Box::pin(s) as _),
        stderr: child.stderr.take().map(|s| Box::pin(s) as _),
        resize: mpsc::channel(1).0,
        exit: wait(child).boxed(),
    })
}

async fn wait(mut child: tokio::process::Child) -> ExitStatus {
    match child.wait().await {
        Ok(status) => ExitStatus::Code(exit_code(status)),
        Err(error) => ExitStatus::Failed(error.to_string()),
    }
}

async fn exec_tty(target: &Target, request: ExecRequest) -> Result<ExecSession, NodeError> {
    let (ours, theirs) = UnixStream::pair().map_err(internal)?;
    let streams = [
        Stdio::from(OwnedFd::from(theirs)),
        Stdio::null(),
        Stdio::null(),
    ];
    let child = target
        .spawn(request.command, true, streams)
        .await
        .map_err(internal)?;
    let terminal = Terminal::receive(ours)
        .await
        .map_err(|e| internal(format!("the command ended before it had a terminal: {e}")))?;
    let (resize, sizes) = mpsc::channel(4);
    terminal.window.follow(sizes);
    Ok(ExecSession {
        stdin: request.stdin.then(|| Box::pin(terminal.keys) as _),
        stdout: Some(Box::pin(terminal.screen)),
        stderr: None,
        resize,
        exit: wait(child).boxed(),
    })
}
