//! Port forwarding over SPDY streams: for every connection a data and an error stream that carry the same `requestid`.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::spdy::{Connection, Event, Sender};
use crate::node::{Duplex, NodeBackend, NodeError};

/// Streams that a client may have open at once.
const MAX_STREAMS: usize = 1024;

/// The pod whose ports are forwarded.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) node: Arc<dyn NodeBackend>,
    pub(super) namespace: String,
    pub(super) pod: String,
}

impl Target {
    pub(super) async fn connect(&self, port: u16) -> Result<Box<dyn Duplex>, NodeError> {
        self.node
            .port_forward(self.namespace.clone(), self.pod.clone(), port)
            .await
    }
}

/// Serves a SPDY connection until the client closes it.
pub(super) async fn serve<S>(io: S, target: Target)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut connection, sender) = Connection::start(io);
    let mut streams: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    let mut errors: HashMap<String, u32> = HashMap::new();
    while let Some(event) = connection.next().await {
        match event {
            Event::Open { stream, headers } => {
                let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
                let port: Option<u16> = header("port").parse().ok();
                if streams.len() + errors.len() >= MAX_STREAMS || port.is_none() {
                    sender.reset(stream).await;
                    continue;
                }
                sender.reply(stream).await;
                match (header("streamtype").as_str(), port) {
                    ("error", _) => {
                        errors.insert(header("requestid"), stream);
                    }
                    ("data", Some(port)) => {
                        let (input, queue) = mpsc::channel(32);
                        streams.insert(stream, input);
                        let error_stream = errors.remove(&header("requestid"));
                        tokio::spawn(forward(
                            target.clone(),
                            port,
                            stream,
                            error_stream,
                            queue,
                            sender.clone(),
                        ));
                    }
                    _ => sender.reset(stream).await,
                }
            }
            Event::Data { stream, data, end } => {
                if let Some(input) = streams.get(&stream)
                    && !data.is_empty()
                {
                    // A connection that is closed on the pod's side takes no more.
                    let _ = input.send(data).await;
                }
                if end {
                    streams.remove(&stream);
                }
            }
            Event::Reset { stream } => {
                streams.remove(&stream);
            }
        }
    }
}

async fn forward(
    target: Target,
    port: u16,
    stream: u32,
    error_stream: Option<u32>,
    mut queue: mpsc::Receiver<Bytes>,
    sender: Sender,
) {
    let connection = target.connect(port).await;
    if let Some(error_stream) = error_stream {
        if let Err(error) = &connection {
            sender
                .data(error_stream, Bytes::from(error.message.clone()), false)
                .await;
        }
        sender.data(error_stream, Bytes::new(), true).await;
    }
    let Ok(connection) = connection else {
        sender.data(stream, Bytes::new(), true).await;
        return;
    };
    let (mut read, mut write) = tokio::io::split(connection);
    let inward = async {
        while let Some(data) = queue.recv().await {
            if write.write_all(&data).await.is_err() {
                break;
            }
        }
        let _ = write.shutdown().await;
    };
    let outward = async {
        let mut buffer = vec![0; 32 * 1024];
        while let Ok(length @ 1..) = read.read(&mut buffer).await {
            sender
                .data(stream, Bytes::copy_from_slice(&buffer[..length]), false)
                .await;
        }
        sender.data(stream, Bytes::new(), true).await;
    };
    tokio::join!(inward, outward);
}
