//! Asking the pod's resolvers what is not the mesh's to answer, past capture.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use mesh_net::sockets::{ConnectOptions, connect};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// How long one resolver may take: the next one is to have its turn before the application's own limit (resolv.conf(5): 5 s).
const TIMEOUT: Duration = Duration::from_secs(2);

/// By which way a query came, and goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// The first answer that one of the resolvers gives, as it came; `None` if none does.
pub(super) async fn ask(
    resolvers: &[SocketAddr],
    query: &[u8],
    transport: Transport,
    mark: Option<u32>,
) -> Option<Vec<u8>> {
    for resolver in resolvers {
        let asking = async {
            match transport {
                Transport::Udp => by_datagram(*resolver, query, mark).await,
                Transport::Tcp => by_stream(*resolver, query, mark).await,
            }
        };
        match tokio::time::timeout(TIMEOUT, asking).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => tracing::info!(%resolver, %error, "asking a resolver"),
            Err(_) => tracing::info!(%resolver, "a resolver does not answer"),
        }
    }
    None
}

/// From a socket of its own: a new source port for each query makes forged answers harder (RFC 5452).
async fn by_datagram(resolver: SocketAddr, query: &[u8], mark: Option<u32>) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match resolver {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    if let Some(mark) = mark {
        SockRef::from(&socket).set_mark(mark)?;
    }
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    loop {
        let length = socket.recv(&mut answer).await?;
        if length >= 12 && answer[..2] == query[..2] {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn by_stream(resolver: SocketAddr, query: &[u8], mark: Option<u32>) -> io::Result<Vec<u8>> {
    let options = ConnectOptions {
        mark,
        ..ConnectOptions::default()
    };
    let mut stream = connect(resolver, options).await?;
    write(&mut stream, query).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

/// A message with its length before it, in one piece.
pub(super) async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let framed = [&length.to_be_bytes(), message].concat();
    stream.write_all(&framed).await
}
