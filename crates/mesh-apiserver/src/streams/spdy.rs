//! A SPDY/3.1 connection as kubectl up to 1.29 opens it: the upgrade, one task that reads and one that writes, commands on top.

use std::collections::HashMap;

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf};
use tokio::sync::mpsc;

use super::session::{self, Channel, Input, Output};
use super::spdy_frame::{Frame, Reader, Writer};
use crate::node::{ExecRequest, ExecSession};

/// How long a client may take to open the streams that its request asked for.
const OPEN_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// Answers 101 and hands the connection to `serve`.
pub(super) fn upgrade<F, W>(
    mut request: Request<Body>,
    protocol: &'static str,
    serve: F,
) -> Response
where
    F: FnOnce(TokioIo<hyper::upgrade::Upgraded>) -> W + Send + 'static,
    W: Future<Output = ()> + Send,
{
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(connection) => serve(TokioIo::new(connection)).await,
            Err(error) => tracing::debug!(%error, "a client asked for SPDY/3.1 and went away"),
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(
        header::CONNECTION,
        http::HeaderValue::from_static("Upgrade"),
    );
    headers.insert(header::UPGRADE, http::HeaderValue::from_static("SPDY/3.1"));
    headers.insert(
        "x-stream-protocol-version",
        http::HeaderValue::from_static(protocol),
    );
    response
}

/// What happens on a connection.
pub(super) enum Event {
    Open {
        stream: u32,
        headers: HashMap<String, String>,
    },
    Data {
        stream: u32,
        data: Bytes,
        end: bool,
    },
    Reset {
        stream: u32,
    },
}

enum Command {
    Reply(u32),
    Data(u32, Bytes, bool),
    Reset(u32),
    Ping(u32),
    Close,
}

/// The sending side; clones share it. What is sent after the client has gone is dropped.
#[derive(Clone)]
pub(super) struct Sender(mpsc::Sender<Command>);

impl Sender {
    pub(super) async fn reply(&self, stream: u32) {
        let _ = self.0.send(Command::Reply(stream)).await;
    }

    pub(super) async fn data(&self, stream: u32, data: Bytes, end: bool) {
        let _ = self.0.send(Command::Data(stream, data, end)).await;
    }

    pub(super) async fn reset(&self, stream: u32) {
        let _ = self.0.send(Command::Reset(stream)).await;
    }

    /// Says goodbye and waits until everything is written.
    async fn close(self) {
        let _ = self.0.send(Command::Close).await;
        self.0.closed().await;
    }
}

/// The receiving side.
pub(super) struct Connection<S> {
    read: ReadHalf<S>,
    buffer: BytesMut,
    frames: Reader,
    sender: Sender,
    pending: Option<Event>,
}

impl<S: AsyncRead + AsyncWrite + Send + 'static> Connection<S> {
    pub(super) fn start(io: S) -> (Self, Sender) {
        let (read, mut write) = tokio::io::split(io);
        let (commands, mut queue) = mpsc::channel::<Command>(32);
        tokio::spawn(async move {
            let (mut writer, mut out) = (Writer::new(), BytesMut::new());
            while let Some(command) = queue.recv().await {
                let mut close = false;
                match command {
                    Command::Reply(stream) => writer.reply(stream, &mut out),
                    Command::Data(stream, data, end) => Writer::data(stream, &data, end, &mut out),
                    Command::Reset(stream) => Writer::reset(stream, &mut out),
                    Command::Ping(id) => Writer::ping(id, &mut out),
                    Command::Close => {
                        Writer::goaway(0, &mut out);
                        close = true;
                    }
                }
                if write.write_all(&out).await.is_err() || write.flush().await.is_err() || close {
                    break;
                }
                out.clear();
            }
            // The client may be gone already.
            let _ = write.shutdown().await;
        });
        let sender = Sender(commands);
        let connection = Self {
            read,
            buffer: BytesMut::new(),
            frames: Reader::new(),
            sender: sender.clone(),
            pending: None,
        };
        (connection, sender)
    }

    /// The next event; `None` at the end of the connection, which an error in the client's frames is too.
    pub(super) async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.pending.take() {
            return Some(event);
        }
        loop {
            match self.frames.next(&mut self.buffer) {
                Ok(Some(Frame::Open {
                    stream,
                    headers,
                    end,
                })) => {
                    if end {
                        self.pending = Some(Event::Data {
                            stream,
                            data: Bytes::new(),
                            end,
                        });
                    }
                    return Some(Event::Open { stream, headers });
                }
                Ok(Some(Frame::Data { stream, data, end })) => {
                    return Some(Event::Data { stream, data, end });
                }
                Ok(Some(Frame::Reset { stream })) => return Some(Event::Reset { stream }),
                Ok(Some(Frame::Ping { id })) => {
                    let _ = self.sender.0.send(Command::Ping(id)).await;
                }
                Ok(Some(Frame::Goaway)) => return None,
                Ok(None) => match self.read.read_buf(&mut self.buffer).await {
                    Ok(1..) => {}
                    _ => return None,
                },
                Err(error) => {
                    tracing::info!(%error, "a SPDY/3.1 client is disconnected");
                    return None;
                }
            }
        }
    }
}

/// Carries a command: the client opens one stream a channel, then bytes flow until the command's status was sent.
pub(super) async fn exec<S>(io: S, session: ExecSession, request: ExecRequest)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut connection, sender) = Connection::start(io);
    let wanted = 1
        + usize::from(request.stdin)
        + usize::from(request.stdout)
        + usize::from(request.stderr && !request.tty)
        + usize::from(request.tty);
    let mut streams: HashMap<Channel, u32> = HashMap::new();
    let opening = async {
        while streams.len() < wanted {
            match connection.next().await? {
                Event::Open { stream, headers } => {
                    let channel = headers
                        .get("streamtype")
                        .and_then(|name| Channel::from_name(name));
                    match channel.filter(|c| !streams.contains_key(c)) {
                        Some(channel) => {
                            streams.insert(channel, stream);
                            sender.reply(stream).await;
                        }
                        None => sender.reset(stream).await,
                    }
                }
                early => {
                    connection.pending = Some(early);
                    return Some(());
                }
            }
        }
        Some(())
    };
    if !matches!(
        tokio::time::timeout(OPEN_TIMEOUT, opening).await,
        Ok(Some(()))
    ) {
        return;
    }
    let (inputs, input) = mpsc::channel(16);
    let (output, outputs) = mpsc::channel(16);
    let mut reader = tokio::spawn(read(connection, streams.clone(), inputs));
    let work = async {
        tokio::join!(
            session::run(session, input, output),
            write(outputs, &streams, &sender)
        )
    };
    tokio::select! {
        _ = work => {
            sender.clone().close().await;
            reader.abort();
        }
        // The client has gone: the session is dropped, which tells the node agent.
        _ = &mut reader => {}
    }
}

/// Frames to inputs; a lost client is the end of standard input, and the next thing written to it fails.
async fn read<S: AsyncRead + AsyncWrite + Send + 'static>(
    mut connection: Connection<S>,
    streams: HashMap<Channel, u32>,
    inputs: mpsc::Sender<Input>,
) {
    let is = |channel, stream| streams.get(&channel) == Some(&stream);
    while let Some(event) = connection.next().await {
        match event {
            Event::Data { stream, data, end } if is(Channel::Stdin, stream) => {
                if !data.is_empty() {
                    let _ = inputs.send(Input::Stdin(data)).await;
                }
                if end {
                    let _ = inputs.send(Input::StdinEnd).await;
                }
            }
            Event::Data { stream, data, .. } if is(Channel::Resize, stream) && !data.is_empty() => {
                let _ = inputs.send(Input::Resize(data)).await;
            }
            Event::Open { stream, .. } => connection.sender.reset(stream).await,
            _ => {}
        }
    }
    let _ = inputs.send(Input::StdinEnd).await;
}

async fn write(
    mut outputs: mpsc::Receiver<Output>,
    streams: &HashMap<Channel, u32>,
    sender: &Sender,
) {
    while let Some(output) = outputs.recv().await {
        match output {
            Output::Data(channel, data) => {
                if let Some(&stream) = streams.get(&channel) {
                    sender.data(stream, data, false).await;
                }
            }
            Output::End(channel) => {
                if let Some(&stream) = streams.get(&channel) {
                    sender.data(stream, Bytes::new(), true).await;
                }
            }
        }
        if sender.0.is_closed() {
            return;
        }
    }
}
