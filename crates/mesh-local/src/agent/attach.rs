//! The standard streams of a container's run, as `attach` and the log share them.
//!
//! Where the fields `stdin`, `stdinOnce` and `tty` leave something open, this does what the kubelet with containerd does.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::Container;
use mesh_apiserver::node::{ExecRequest, ExecSession, ExitStatus};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::StreamReader;
use tokio_util::sync::CancellationToken;

use super::terminal::{Screen, Terminal, Window};

/// Bytes that are on their way from an attached client to the container.
const INPUT_BUFFER: usize = 16 << 10;
/// Pieces of output that a client may be behind; then the container waits for it, as with a terminal that is stopped.
const BEHIND: usize = 16;

/// The clients attached to one output stream; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Listeners(Arc<Mutex<Clients>>);

#[derive(Debug, Default)]
struct Clients {
    senders: Vec<mpsc::Sender<Bytes>>,
    ended: bool,
}

impl Listeners {
    fn clients(&self) -> std::sync::MutexGuard<'_, Clients> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything from now on.
    fn listen(&self) -> mpsc::Receiver<Bytes> {
        let (send, receive) = mpsc::channel(BEHIND);
        let mut clients = self.clients();
        if !clients.ended {
            clients.senders.push(send);
        }
        receive
    }

    /// Sends output to all clients; those that have gone are forgotten.
    pub async fn tell(&self, output: &[u8]) {
        let senders = self.clients().senders.clone();
        if senders.is_empty() {
            return;
        }
        let output = Bytes::copy_from_slice(output);
        for sender in senders {
            // Whoever has gone is taken out below.
            let _ = sender.send(output.clone()).await;
        }
        self.clients().senders.retain(|sender| !sender.is_closed());
    }

    /// Says that no more will come.
    fn end(&self) {
        let mut clients = self.clients();
        clients.senders.clear();
        clients.ended = true;
    }
}

/// The agent's side of a standard input that is being made.
#[derive(Debug)]
pub enum Prepared {
    /// The container reads /dev/null.
    Nothing,
    /// A pipe.
    Pipe(pipe::Sender),
    /// The container will send its terminal over this socket.
    Console(UnixStream),
}

/// Makes what `container` gets beside its specification: the reading end of its standard input, or the socket for its terminal.
///
/// # Errors
/// When the process has no descriptors left.
pub fn prepare(container: &Container) -> std::io::Result<(Prepared, Option<OwnedFd>)> {
    if container.tty == Some(true) {
        let (ours, theirs) = UnixStream::pair()?;
        return Ok((Prepared::Console(ours), Some(theirs.into())));
    }
    if container.stdin != Some(true) {
        return Ok((Prepared::Nothing, None));
    }
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((
        Prepared::Pipe(pipe::Sender::from_owned_fd(writer)?),
        Some(reader),
    ))
}

/// The streams of one run.
#[derive(Debug)]
pub struct Streams {
    /// `None`: the container has no standard input, or it has been closed.
    input: tokio::sync::Mutex<Option<pipe::Sender>>,
    /// The size of the container's terminal, where it has one.
    window: Option<Window>,
    /// Standard input ends with the first client that was attached to it.
    once: bool,
    /// Who is attached to standard output, or to the terminal.
    pub out: Listeners,
    /// Who is attached to standard error.
    pub err: Listeners,
    ended: CancellationToken,
}

impl Streams {
    /// The streams of a container that runs now, and its terminal's output.
    ///
    /// # Errors
    /// When it did not send the terminal that it was asked to make.
    pub async fn connect(
        prepared: Prepared,
        container: &Container,
    ) -> std::io::Result<(Self, Option<Screen>)> {
        let (input, window, screen) = match prepared {
            Prepared::Nothing => (None, None, None),
            Prepared::Pipe(pipe) => (Some(pipe), None, None),
            Prepared::Console(console) => {
                let terminal = Terminal::receive(console).await?;
                let input = (container.stdin == Some(true)).then_some(terminal.keys);
                (input, Some(terminal.window), Some(terminal.screen))
            }
        };
        let streams = Self {
            input: tokio::sync::Mutex::new(input),
            window,
            once: container.stdin_once == Some(true),
            out: Listeners::default(),
            err: Listeners::default(),
            ended: CancellationToken::new(),
        };
        Ok((streams, screen))
    }

    /// Says that the run is over and all its output was told.
    pub fn end(&self) {
        self.out.end();
        self.err.end();
        self.ended.cancel();
    }

    /// Attaches a client: it gets what the container writes from now on, and writes to its standard input, where it has one.
    pub fn attach(self: Arc<Self>, request: &ExecRequest) -> ExecSession {
        let detached = CancellationToken::new();
        let output = |wanted: bool, listeners: &Listeners| {
            wanted.then(|| reader(listeners.listen(), detached.clone()))
        };
        let stdout = output(request.stdout, &self.out);
        let stderr = output(request.stderr && self.window.is_none(), &self.err);
        let stdin = request.stdin.then(|| {
            let (ours, theirs) = tokio::io::duplex(INPUT_BUFFER);
            tokio::spawn(self.clone().feed(ours, detached.clone()));
            Box::pin(theirs) as _
        });
        let (resize, sizes) = mpsc::channel(4);
        if let Some(window) = self.window.clone() {
            window.follow(sizes);
        }
        ExecSession {
            stdin,
            stdout,
            stderr,
            resize,
            // How the container ended is told by the pod's status.
            exit: async move {
                tokio::select! {
                    () = self.ended.cancelled() => {}
                    () = detached.cancelled() => {}
                }
                ExitStatus::Code(0)
            }
            .boxed(),
        }
    }

    /// Carries a client's input. Its end closes the container's input with `stdinOnce`, unless that is a terminal; else it only ends this
    /// client's session, and the next one goes on.
    async fn feed(self: Arc<Self>, mut from: DuplexStream, detached: CancellationToken) {
        let mut buffer = vec![0; INPUT_BUFFER];
        let carry = async {
            while let Ok(length @ 1..) = from.read(&mut buffer).await {
                let mut input = self.input.lock().await;
                let written = match input.as_mut() {
                    Some(input) => input.write_all(&buffer[..length]).await,
                    None => Ok(()),
                };
                if written.is_err() {
                    // The container has closed its side.
                    *input = None;
                }
            }
        };
        tokio::select! {
            () = carry => {}
            () = self.ended.cancelled() => return,
        }
        if self.once && self.window.is_none() {
            *self.input.lock().await = None;
        } else {
            detached.cancel();
        }
    }
}

/// A client's output as a stream of bytes. It ends with the run, after all of its output, or at once when the client is detached.
fn reader(
    output: mpsc::Receiver<Bytes>,
    detached: CancellationToken,
) -> std::pin::Pin<Box<dyn AsyncRead + Send>> {
    let pieces = ReceiverStream::new(output)
        .take_until(detached.cancelled_owned())
        .map(Ok::<Bytes, std::io::Error>);
    Box::pin(StreamReader::new(pieces))
}
