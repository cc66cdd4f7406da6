//! The plain port: discovery without authentication, so without secrets, for tools and for meshes that have no mutual TLS. Anybody who
//! reaches it may use it; its places are few and its own, so that nobody can lock out those who come over the secure port.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use mesh_xds::Limits;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::metrics::Metrics;

/// Connections at a time.
const CONNECTIONS: usize = 512;
/// Connections at a time of one address: a pod has one, and a few tools.
const PER_ADDRESS: usize = 16;
/// Discovery streams at a time.
const STREAMS: usize = 512;
/// Largest request, in bytes: nobody here is worth the memory of a large one.
const REQUEST: usize = 4 << 20;

/// Streams of one connection: a proxy needs one, and an address may have a few connections.
const STREAMS_PER_CONNECTION: u32 = 4;

/// What the streams of this port may cost.
pub(crate) fn limits() -> Limits {
    Limits {
        max_streams: STREAMS,
        max_streams_per_connection: STREAMS_PER_CONNECTION,
        max_request_bytes: REQUEST,
        ..Limits::default()
    }
}

/// Connections within the limits; others are closed at once, and counted. Ends never; a listener that fails is tried again.
pub(crate) fn connections(
    listener: TcpListener,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = io::Result<Guest>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(accept(listener, metrics, sender));
    ReceiverStream::new(receiver)
}

async fn accept(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    ready: mpsc::Sender<io::Result<Guest>>,
) {
    let guests = Guests::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ready.closed() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Mostly too many open files: waiting is what helps.
                tracing::warn!(%error, "accepting a connection on the plain port");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(seat) = guests.seat(peer.ip().to_canonical()) else {
            tracing::debug!(%peer, "too many connections on the plain port");
            metrics.xds_refused("plain_connections");
            continue;
        };
        // A small push would wait for the acknowledgement of the one before. A socket that refuses is gone.
        let _ = stream.set_nodelay(true);
        let guest = Guest {
            stream,
            _seat: seat,
        };
        if ready.send(Ok(guest)).await.is_err() {
            return;
        }
    }
}

/// Who is there, by address.
#[derive(Clone, Default)]
struct Guests(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// A place, given back when it is dropped.
struct Seat {
    guests: Guests,
    address: IpAddr,
}

impl Guests {
    fn seat(&self, address: IpAddr) -> Option<Seat> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.values().sum::<usize>() >= CONNECTIONS {
            return None;
        }
        let own = all.entry(address).or_default();
        if *own >= PER_ADDRESS {
            return None;
        }
        *own += 1;
        Some(Seat {
            guests: self.clone(),
            address,
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let all = &mut self.guests.0;
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = all.get_mut(&self.address) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                all.remove(&self.address);
            }
        }
    }
}

/// A connection with its place.
pub(crate) struct Guest {
    stream: TcpStream,
    _seat: Seat,
}

impl Connected for Guest {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Guest {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_few_places_and_all_together_have_an_end() {
        let guests = Guests::default();
        let address = |n: u8| IpAddr::from([10, 0, 0, n]);
        let mut own: Vec<Seat> = (0..PER_ADDRESS)
            .map(|_| guests.seat(address(1)).expect("a place"))
            .collect();
        assert!(guests.seat(address(1)).is_none());
        let other = guests.seat(address(2));
        assert!(other.is_some());
        own.pop();
        assert!(guests.seat(address(1)).is_some());
        drop((own, other));
        assert!(guests.0.lock().expect("no panic").is_empty());
        let all: Vec<Seat> = (0..CONNECTIONS)
            .map(|n| {
                let address = address(u8::try_from(n / PER_ADDRESS).expect("few"));
                guests.seat(address).expect("a place")
            })
            .collect();
        assert!(guests.seat(address(200)).is_none());
        drop(all);
    }
}
