//! Sockets as a proxy needs them: listening, the original destination of a captured connection, the capture exemption.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// The mark that exempts a socket from capture where the proxy's uid can't be mapped; ztunnel's sockets carry the same one.
pub const EXEMPT_MARK: u32 = 0x539;

/// The uid and gid that the proxy runs as, where it can be mapped; capture exempts its sockets (Istio, `istio-iptables -u`).
pub const PROXY_UID: u32 = 1337;

/// How to listen.
#[derive(Debug, Clone, Copy)]
pub struct ListenOptions {
    /// Let other sockets with this option listen on the same address; the kernel spreads connections over them.
    /// Off where a second instance must notice that the port is taken.
    pub reuse_port: bool,
    /// Accept connections to addresses that are not local (IP_TRANSPARENT; needs CAP_NET_ADMIN).
    pub transparent: bool,
    /// Connections that may wait to be accepted (default 1,024).
    pub backlog: i32,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            reuse_port: false,
            transparent: false,
            backlog: 1024,
        }
    }
}

/// Why listening failed.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else has the port.
    #[error(
        "listening on {0}: the port is in use by another process; stop that one or choose another port"
    )]
    InUse(SocketAddr),
    /// The port needs a privilege.
    #[error(
        "listening on {0}: not permitted; ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE"
    )]
    NotPermitted(SocketAddr),
    /// Connections to addresses of others need a privilege.
    #[error(
        "listening on {0} for connections to any address (TPROXY): not permitted; it needs CAP_NET_ADMIN"
    )]
    NotTransparent(SocketAddr),
    /// Anything else.
    #[error("listening on {address}: {source}")]
    Other {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A non-blocking listening socket.
pub fn listen(address: SocketAddr, options: ListenOptions) -> Result<TcpListener, ListenError> {
    listen_socket(address, options).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse(address),
        io::ErrorKind::PermissionDenied if options.transparent => {
            ListenError::NotTransparent(address)
        }
        io::ErrorKind::PermissionDenied => ListenError::NotPermitted(address),
        _ => ListenError::Other { address, source },
    })
}

fn listen_socket(address: SocketAddr, options: ListenOptions) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // A restarted process must not wait for the old one's connections in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(options.reuse_port)?;
    if options.transparent {
        set_transparent(&socket, address)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(options.backlog)?;
    Ok(socket.into())
}

/// IP_TRANSPARENT (ip(7)): the socket may have addresses that are not this host's.
fn set_transparent(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true),
    }
}

/// Lets this process have as many files open as it is allowed to (getrlimit(2), the hard limit of RLIMIT_NOFILE) and gives their number. What starts
/// a container leaves the soft limit at 1,024 nowadays, for programs that use select(2): some 170 connections of plain TCP in a proxy.
pub fn raise_open_files() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// Where a redirected connection was going (SO_ORIGINAL_DST), or `None` when it was not redirected.
pub fn original_destination(socket: &impl AsFd) -> Option<SocketAddr> {
    let socket = SockRef::from(socket);
    let local = socket.local_addr().ok()?.as_socket()?;
    let found = match local {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    };
    // Without a redirection the kernel gives the socket's own address (conntrack knows it) or ENOENT.
    found
        .ok()?
        .as_socket()
        .filter(|destination| *destination != local)
}

/// How to connect.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConnectOptions {
    /// The source address; port 0 lets the kernel choose. Inbound connections to an application come from 127.0.0.6.
    pub source: Option<SocketAddr>,
    /// The source address is that of somebody else (IP_TRANSPARENT; needs CAP_NET_ADMIN).
    pub transparent: bool,
    /// The mark, where the process may set it ([`may_mark`]).
    pub mark: Option<u32>,
    /// TCP keep-alive: idle time before the first probe; probes follow every fifth of it.
    pub keepalive: Option<Duration>,
}

/// Connects without blocking the runtime. The caller sets a timeout around it.
pub async fn connect(
    address: SocketAddr,
    options: ConnectOptions,
) -> io::Result<tokio::net::TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
    };
    let reference = SockRef::from(&socket);
    if let Some(mark) = options.mark {
        reference.set_mark(mark)?;
    }
    if let Some(idle) = options.keepalive {
        let interval = (idle / 5).max(Duration::from_secs(1));
        reference
            .set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(interval))?;
    }
    if options.transparent {
        set_transparent(&reference, address)?;
    }
    if let Some(source) = options.source {
        socket.bind(source)?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Whether this process may set a socket's mark (CAP_NET_ADMIN or, since Linux 5.17, CAP_NET_RAW), found out by trying.
pub fn may_mark() -> bool {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))
        .is_ok_and(|socket| socket.set_mark(EXEMPT_MARK).is_ok())
}
