//! Commands and ports over WebSocket: every binary message starts with its channel's number.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::port_forward::{self, Target};
use super::session::{self, Channel, Input, Output};
use super::{PORT_FORWARD_TUNNEL, V4, V5};
use crate::node::{ExecRequest, NodeBackend};

/// In `v5.channel.k8s.io` the first byte 255 closes the channel that the second names.
const CLOSE: u8 = 255;

pub(super) async fn exec(
    node: Arc<dyn NodeBackend>,
    exec: ExecRequest,
    request: Request<Body>,
) -> Response {
    let upgrade = match upgrade(request, &[V5, V4]).await {
        Ok(upgrade) => upgrade,
        Err(response) => return response,
    };
    match node.exec(exec).await {
        Ok(session) => upgrade.on_upgrade(move |socket| async move {
            let (inputs, input) = mpsc::channel(16);
            let (output, outputs) = mpsc::channel(16);
            tokio::join!(
                session::run(session, input, output),
                carry(socket, inputs, outputs)
            );
        }),
        Err(error) => super::refuse(&error),
    }
}

async fn upgrade(
    request: Request<Body>,
    protocols: &[&'static str],
) -> Result<WebSocketUpgrade, Response> {
    let (mut parts, _) = request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &()).await;
    upgrade
        .map(|u| u.protocols(protocols.iter().copied()))
        .map_err(IntoResponse::into_response)
}

/// Messages to inputs, outputs to messages, until the command's status was sent or the client is gone.
async fn carry(
    mut socket: WebSocket,
    inputs: mpsc::Sender<Input>,
    mut outputs: mpsc::Receiver<Output>,
) {
    loop {
        tokio::select! {
            output = outputs.recv() => match output {
                Some(Output::Data(channel, data)) => {
                    if socket.send(message(channel as u8, &data)).await.is_err() {
                        return;
                    }
                }
                Some(Output::End(_)) => {}
                None => break,
            },
            incoming = socket.recv() => match incoming {
                Some(Ok(Message::Binary(data))) => {
                    if let Some(input) = input(&data) {
                        // A command that has ended takes no more input.
                        let _ = inputs.send(input).await;
                    }
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
        }
    }
    close(socket).await;
}

/// Ends in order: a client takes a connection that just ends for a failure (RFC 6455 section 7.4.1, code 1000).
async fn close(mut socket: WebSocket) {
    let frame = CloseFrame {
        code: close_code::NORMAL,
        reason: "".into(),
    };
    if socket.send(Message::Close(Some(frame))).await.is_ok() {
        // The client's own close frame, a second at most: what was sent before must not be lost to a reset.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(1), async {
            while let Some(Ok(_)) = socket.recv().await {}
        })
        .await;
    }
}

fn message(channel: u8, data: &[u8]) -> Message {
    let mut bytes = BytesMut::with_capacity(data.len() + 1);
    bytes.put_u8(channel);
    bytes.put_slice(data);
    Message::Binary(bytes.freeze())
}

fn input(data: &Bytes) -> Option<Input> {
    let number = *data.first()?;
    if number == CLOSE {
        return (data.get(1) == Some(&(Channel::Stdin as u8))).then_some(Input::StdinEnd);
    }
    match Channel::from_number(number)? {
        Channel::Stdin => Some(Input::Stdin(data.slice(1..))),
        Channel::Resize => Some(Input::Resize(data.slice(1..))),
        _ => None,
    }
}

pub(super) async fn port_forward(
    target: Target,
    ports: Vec<u16>,
    request: Request<Body>,
) -> Response {
    let upgrade = match upgrade(request, &[PORT_FORWARD_TUNNEL, V4]).await {
        Ok(upgrade) => upgrade,
        Err(response) => return response,
    };
    let tunnel = upgrade
        .selected_protocol()
        .is_some_and(|p| p == PORT_FORWARD_TUNNEL);
    if !tunnel && ports.is_empty() {
        return super::bad_request("query parameter \"ports\" is required");
    }
    upgrade.on_upgrade(move |socket| async move {
        if tunnel {
            port_forward::serve(tunnelled(socket), target).await;
        } else {
            pairs(socket, target, ports).await;
        }
    })
}

/// The bytes of a WebSocket's binary messages as one stream.
fn tunnelled(socket: WebSocket) -> tokio::io::DuplexStream {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    tokio::spawn(async move {
        let (mut sink, mut stream) = socket.split();
        let (mut read, mut write) = tokio::io::split(ours);
        let inward = async {
            while let Some(Ok(message)) = stream.next().await {
                if let Message::Binary(data) = message
                    && write.write_all(&data).await.is_err()
                {
                    break;
                }
            }
            let _ = write.shutdown().await;
        };
        let outward = async {
            let mut buffer = vec![0; 32 * 1024];
            while let Ok(length @ 1..) = read.read(&mut buffer).await {
                if sink
                    .send(Message::Binary(Bytes::copy_from_slice(&buffer[..length])))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            let _ = sink.close().await;
        };
        tokio::join!(inward, outward);
    });
    theirs
}

/// Two channels a port, data and error; the first message of each is the port's number, little endian.
async fn pairs(mut socket: WebSocket, target: Target, ports: Vec<u16>) {
    let (output, mut outputs) = mpsc::channel::<(u8, Bytes)>(32);
    let mut inputs = Vec::new();
    for (index, port) in (0u8..).step_by(2).zip(ports) {
        for channel in [index, index + 1] {
            if socket
                .send(message(channel, &port.to_le_bytes()))
                .await
                .is_err()
            {
                return;
            }
        }
        let (input, queue) = mpsc::channel::<Bytes>(32);
        inputs.push(input);
        tokio::spawn(pair(target.clone(), port, index, queue, output.clone()));
    }
    drop(output);
    loop {
        tokio::select! {
            data = outputs.recv() => match data {
                Some((channel, data)) => {
                    if socket.send(message(channel, &data)).await.is_err() {
                        return;
                    }
                }
                None => break,
            },
            incoming = socket.recv() => match incoming {
                Some(Ok(Message::Binary(data))) => {
                    let number = data.first().copied().unwrap_or(1);
                    if let Some(input) = inputs.get(usize::from(number / 2)).filter(|_| number % 2 == 0) {
                        let _ = input.send(data.slice(1..)).await;
                    }
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
        }
    }
    close(socket).await;
}

async fn pair(
    target: Target,
    port: u16,
    index: u8,
    mut queue: mpsc::Receiver<Bytes>,
    output: mpsc::Sender<(u8, Bytes)>,
) {
    let stream = match target.connect(port).await {
        Ok(stream) => stream,
        Err(error) => {
            let _ = output.send((index + 1, Bytes::from(error.message))).await;
            return;
        }
    };
    let (mut read, mut write) = tokio::io::split(stream);
    let inward = async {
        while let Some(data) = queue.recv().await {
            if write.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    };
    let outward = async {
        let mut buffer = vec![0; 32 * 1024];
        while let Ok(length @ 1..) = read.read(&mut buffer).await {
            if output
                .send((index, Bytes::copy_from_slice(&buffer[..length])))
                .await
                .is_err()
            {
                return;
            }
        }
    };
    // The pod's end closing ends the pair; the client can't close one direction here.
    tokio::select! {
        () = outward => {}
        () = async { inward.await; std::future::pending().await } => {}
    }
}
