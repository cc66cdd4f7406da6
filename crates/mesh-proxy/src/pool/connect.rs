//! Opening connections.

use std::net::{IpAddr, SocketAddr};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_net::sockets::{ConnectOptions, connect};
use mesh_routing::cluster::{ClusterConfig, Keepalive};
use rustls::CertificateError;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::pool::Host;
use crate::pool::announce::{self, Ends};
use crate::report::principals::Principals;
use crate::shared::Shared;
use crate::tls::HandshakeError;
use crate::tls::connect::{Connected, Source, Target, Wish as TlsWish};
use crate::tls::wire::Wire;
use crate::upstream::breaker::Held;
use crate::upstream::counters::{Counter, HostCounter, HostShard};
use crate::upstream::{ConnectOutcome, Core};

/// Idle time before TCP asks whether the other side is still there, where nothing is configured.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Why no connection could be had.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kernel said so.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The cluster's connect timeout.
    #[error("no connection within the connect timeout")]
    Timeout,
    /// The HTTP handshake failed.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// The TLS handshake failed.
    #[error("TLS handshake: {0}")]
    Tls(HandshakeError),
    /// A circuit breaker is open.
    #[error("a limit of the cluster (circuit breaker) is reached")]
    Overflow,
}

/// An open connection, for counting; closed when dropped.
#[derive(Debug)]
pub struct Open {
    host: Weak<Host>,
    core: Rc<Core>,
    counters: Arc<HostShard>,
    _held: Held,
}

impl Open {
    fn new(host: &Rc<Host>, held: Held) -> Self {
        host.open.set(host.open.get() + 1);
        host.core.counters.inc(Counter::CxTotal);
        host.core.counters.inc(Counter::CxActive);
        host.counters.inc(HostCounter::CxTotal);
        host.counters.inc(HostCounter::CxActive);
        Self {
            host: Rc::downgrade(host),
            core: host.core.clone(),
            counters: host.counters.clone(),
            _held: held,
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.core.counters.dec(Counter::CxActive);
        self.counters.dec(HostCounter::CxActive);
        if let Some(host) = self.host.upgrade() {
            host.open.set(host.open.get() - 1);
            // There is a place for another connection.
            host.hand_over(None);
        }
    }
}

/// A TCP connection for one client.
pub struct TcpUpstream {
    /// The connection.
    pub stream: Wire,
    /// What both sides have proved, in mutual TLS.
    pub principals: Option<Arc<Principals>>,
    _open: Rc<Open>,
}

impl Host {
    /// A connection of its own for a TCP client, from the address that it is to come from. Above the limit of connections there is none: nobody
    /// would give one back.
    pub async fn connect(
        self: &Rc<Self>,
        shared: &Shared,
        config: &ClusterConfig,
        wish: &TlsWish,
    ) -> Result<TcpUpstream, ConnectError> {
        let held = self
            .core
            .begin_connection(false)
            .ok_or(ConnectError::Overflow)?;
        let (dialled, open) = self.dial(shared, config, held, wish).await?;
        self.observe_connect(ConnectOutcome::ConnectedFinal);
        Ok(TcpUpstream {
            stream: dialled.wire,
            principals: dialled.principals,
            _open: open,
        })
    }

    /// A connection with the cluster's source address and the mark that exempts it from capture.
    pub(super) async fn dial(
        self: &Rc<Self>,
        shared: &Shared,
        config: &ClusterConfig,
        held: Held,
        wish: &TlsWish,
    ) -> Result<(Connected, Rc<Open>), ConnectError> {
        let open = Open::new(self, held);
        let totals = &shared.totals;
        totals.upstream_connections.fetch_add(1, Ordering::Relaxed);
        let connecting = self.open(shared, config, wish);
        let done = match tokio::time::timeout(config.connect_timeout, connecting).await {
            Ok(done) => done,
            Err(_) => Err(ConnectError::Timeout),
        };
        let outcome = match &done {
            Ok(_) => ConnectOutcome::Connected,
            Err(error) => {
                totals.upstream_failures.fetch_add(1, Ordering::Relaxed);
                self.core.counters.inc(Counter::CxConnectFail);
                self.counters.inc(HostCounter::CxConnectFail);
                self.counters.inc(HostCounter::RqError);
                match error {
                    ConnectError::Timeout => {
                        self.core.counters.inc(Counter::CxConnectTimeout);
                        ConnectOutcome::TimedOut
                    }
                    _ => ConnectOutcome::Failed,
                }
            }
        };
        self.observe_connect(outcome);
        done.map(|stream| (stream, Rc::new(open)))
    }

    /// A socket, what it is told of the client, and the handshake where the endpoint wants one.
    async fn open(
        &self,
        shared: &Shared,
        config: &ClusterConfig,
        wish: &TlsWish,
    ) -> Result<Connected, ConnectError> {
        let mut stream = open_socket(shared, config, self.address, wish.source).await?;
        let transport = self.transport();
        if let Some(version) = transport.header {
            let own = Ends {
                client: stream.local_addr()?,
                destination: self.address,
            };
            let header = announce::header(version, wish.ends.as_deref(), own);
            stream.write_all(&header).await?;
        }
        let Some(settings) = transport.tls else {
            return Ok(Connected {
                wire: Wire::Plain(stream),
                principals: None,
                resumed: false,
            });
        };
        let hostname = self.hostname();
        let target = Target {
            settings: &settings,
            config,
            hostname: &hostname,
            address: self.address.ip(),
        };
        // Boxed, since it is large and rare.
        match Box::pin(target.connect(shared, stream, wish)).await {
            Ok(connected) => {
                self.core.counters.inc(Counter::SslHandshake);
                if connected.resumed {
                    self.core.counters.inc(Counter::SslSessionReused);
                }
                Ok(connected)
            }
            Err(error) => {
                self.core.counters.inc(match error.tls() {
                    Some(rustls::Error::InvalidCertificate(
                        CertificateError::NotValidForName
                        | CertificateError::NotValidForNameContext { .. },
                    )) => Counter::SslFailName,
                    Some(rustls::Error::InvalidCertificate(_)) => Counter::SslFailVerify,
                    _ if matches!(error, HandshakeError::NotReady(_)) => Counter::SslNotReady,
                    _ => Counter::SslError,
                });
                Err(ConnectError::Tls(error))
            }
        }
    }
}

async fn open_socket(
    shared: &Shared,
    config: &ClusterConfig,
    address: SocketAddr,
    client: Option<Source>,
) -> std::io::Result<TcpStream> {
    let same_family = |ip: &IpAddr| ip.is_ipv4() == address.is_ipv4();
    let client = client.filter(|client| same_family(&client.ip));
    let source = match client {
        Some(client) => Some(client.ip),
        None => config.bind_source.filter(same_family),
    };
    let mark = client.map(|client| client.mark).filter(|mark| *mark != 0);
    let options = ConnectOptions {
        source: source.map(|ip| SocketAddr::new(ip, 0)),
        transparent: client.is_some(),
        mark: mark.or(shared.mark),
        keepalive: config.keepalive.is_none().then_some(KEEPALIVE),
    };
    let stream = connect(address, options).await?;
    if let Some(keepalive) = &config.keepalive {
        SockRef::from(&stream).set_tcp_keepalive(&tcp_keepalive(keepalive))?;
    }
    Ok(stream)
}

fn tcp_keepalive(config: &Keepalive) -> TcpKeepalive {
    let mut keepalive = TcpKeepalive::new();
    if let Some(time) = config.time {
        keepalive = keepalive.with_time(time);
    }
    if let Some(interval) = config.interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(probes) = config.probes {
        keepalive = keepalive.with_retries(probes);
    }
    keepalive
}
