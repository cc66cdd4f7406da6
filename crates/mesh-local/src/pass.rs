//! The socket between parent and node: "bind this host address for me", answered with the listening socket (SCM_RIGHTS).
//!
//! One request at a time, one line of JSON each way, so that a read always yields a whole message.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};

/// Longest message of either side; they are addresses and error texts.
const MAX_MESSAGE: usize = 4096;

/// Asks for a host port.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BindRequest {
    pub(crate) address: SocketAddr,
}

#[derive(Debug, Serialize, Deserialize)]
struct BindReply {
    error: Option<String>,
    /// The errno of the failure, so that "in use" can be told from "not permitted".
    errno: Option<i32>,
}

/// The node's end.
#[derive(Debug)]
pub(crate) struct HostPorts {
    socket: Mutex<UnixStream>,
}

impl HostPorts {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self {
            socket: Mutex::new(socket),
        }
    }

    /// Binds `address` in the host's network. An address that the parent bound before the start is handed over.
    pub(crate) fn bind(&self, address: SocketAddr) -> std::io::Result<TcpListener> {
        let mut socket = self
            .socket
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        socket.write_all(&serde_json::to_vec(&BindRequest { address })?)?;
        let mut buffer = [0; MAX_MESSAGE];
        let (length, fd) = receive(socket.as_fd(), &mut buffer)?;
        let reply: BindReply = serde_json::from_slice(&buffer[..length])?;
        match (fd, reply) {
            (Some(fd), _) => Ok(TcpListener::from(fd)),
            (
                None,
                BindReply {
                    errno: Some(errno), ..
                },
            ) => Err(std::io::Error::from_raw_os_error(errno)),
            (None, reply) => Err(std::io::Error::other(
                reply
                    .error
                    .unwrap_or_else(|| "the parent sent no socket".to_owned()),
            )),
        }
    }
}

impl crate::edge::PortBinder for HostPorts {
    fn bind(&self, host_addr: SocketAddr) -> std::io::Result<TcpListener> {
        HostPorts::bind(self, host_addr)
    }
}

/// The parent's end: reads one request. `None`: the node has closed the socket.
pub(crate) fn read_request(socket: &mut UnixStream) -> std::io::Result<Option<BindRequest>> {
    let mut buffer = [0; MAX_MESSAGE];
    match socket.read(&mut buffer)? {
        0 => Ok(None),
        length => Ok(Some(serde_json::from_slice(&buffer[..length])?)),
    }
}

/// The parent's end: answers a request.
pub(crate) fn answer(
    socket: &UnixStream,
    listener: std::io::Result<TcpListener>,
) -> std::io::Result<()> {
    let reply = match &listener {
        Ok(_) => BindReply {
            error: None,
            errno: None,
        },
        Err(error) => BindReply {
            error: Some(error.to_string()),
            errno: error.raw_os_error(),
        },
    };
    let message = serde_json::to_vec(&reply)?;
    send(socket, &message, listener.as_ref().ok().map(|l| l.as_fd()))
}

/// Sends a message, which must be short and not empty, with a descriptor (unix(7), SCM_RIGHTS).
pub(crate) fn send(
    socket: &UnixStream,
    message: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|d| [d]);
    if let Some(descriptors) = &descriptors {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(message)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Receives what [`send`] sent: the message's length and the descriptor. The end of the stream is an error.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> std::io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((received.bytes, fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_and_an_error_come_across() {
        let (node, mut parent) = UnixStream::pair().unwrap();
        let serving = std::thread::spawn(move || {
            let mut bound = None;
            while let Some(request) = read_request(&mut parent).unwrap() {
                let listener = TcpListener::bind(request.address);
                if let Ok(listener) = &listener {
                    bound = Some(listener.local_addr().unwrap());
                }
                answer(&parent, listener).unwrap();
            }
            bound
        });
        let ports = HostPorts::new(node);
        let address = ports
            .bind("127.0.0.1:0".parse().unwrap())
            .unwrap()
            .local_addr()
            .unwrap();
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = ports.bind(holder.local_addr().unwrap()).unwrap_err();
        assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
        drop(ports);
        assert_eq!(serving.join().unwrap(), Some(address));
    }
}
