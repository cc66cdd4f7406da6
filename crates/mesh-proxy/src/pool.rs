//! Connections to endpoints, one pool for each worker, cluster and endpoint.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_net::sockets::{ConnectOptions, connect};
use mesh_routing::cluster::ClusterConfig;
use mesh_telemetry::Peer;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::body::RequestBody;
use crate::clock;
use crate::exec::LocalExec;
use crate::shared::Shared;

/// Unused connections that an endpoint keeps open at most.
const MOST_IDLE: usize = 1024;
/// Idle time before TCP asks whether the other side is still there.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// A connection that was idle for longer than this many seconds may be about to be closed by the endpoint.
const SUSPECT_AFTER: u32 = 1;

type Http1 = http1::SendRequest<RequestBody>;
type Http2 = http2::SendRequest<RequestBody>;

/// An endpoint as one worker sees it.
pub struct Host {
    /// Where it is.
    pub address: SocketAddr,
    /// Requests under way.
    pub active: Cell<u32>,
    /// Who runs there.
    pub peer: Arc<Peer>,
    idle: RefCell<Vec<Idle>>,
    http2: RefCell<Option<Http2>>,
    /// One connection attempt at a time for HTTP/2, since one connection serves all.
    connecting: Semaphore,
}

struct Idle {
    sender: Http1,
    /// Second of the worker's clock at which it fell idle.
    since: u32,
    requests: u32,
}

/// Which HTTP version to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

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
}

impl Host {
    /// An endpoint without connections.
    pub fn new(address: SocketAddr, peer: Arc<Peer>) -> Self {
        Self {
            address,
            active: Cell::new(0),
            peer,
            idle: RefCell::default(),
            http2: RefCell::default(),
            connecting: Semaphore::new(1),
        }
    }

    /// A connection that is ready to send. `fresh` does not take one that was used before.
    pub async fn lease(
        self: &Rc<Self>,
        shared: &Shared,
        config: &ClusterConfig,
        version: Version,
        fresh: bool,
    ) -> Result<Lease, ConnectError> {
        match version {
            Version::Http1 => self.lease_http1(shared, config, fresh).await,
            Version::Http2 => self.lease_http2(shared, config).await,
        }
    }

    async fn lease_http1(
        self: &Rc<Self>,
        shared: &Shared,
        config: &ClusterConfig,
        fresh: bool,
    ) -> Result<Lease, ConnectError> {
        while !fresh && let Some(mut idle) = self.take_idle() {
            if !idle.sender.is_closed() && idle.sender.ready().await.is_ok() {
                let suspect = clock::now().saturating_sub(idle.since) > SUSPECT_AFTER;
                let lease = Lease::new(self, Sender::Http1(idle.sender), config);
                return Ok(lease.used_before(suspect, idle.requests));
            }
        }
        let stream = dial(shared, config, self.address).await?;
        let (mut sender, connection) = http1::Builder::new()
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::task::spawn_local(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::trace!(%error, "upstream connection");
            }
        });
        sender.ready().await?;
        Ok(Lease::new(self, Sender::Http1(sender), config))
    }

    fn take_idle(&self) -> Option<Idle> {
        self.idle.borrow_mut().pop()
    }

    fn open_http2(&self) -> Option<Http2> {
        self.http2
            .borrow()
            .as_ref()
            .filter(|sender| !sender.is_closed())
            .cloned()
    }

    async fn lease_http2(
        self: &Rc<Self>,
        shared: &Shared,
        config: &ClusterConfig,
    ) -> Result<Lease, ConnectError> {
        if let Some(mut sender) = self.open_http2()
            && sender.ready().await.is_ok()
        {
            return Ok(Lease::new(self, Sender::Http2(sender), config).used_before(false, 0));
        }
        let _permit = self.connecting.acquire().await;
        // Somebody else may have connected while this request waited.
        if let Some(mut sender) = self.open_http2()
            && sender.ready().await.is_ok()
        {
            return Ok(Lease::new(self, Sender::Http2(sender), config).used_before(false, 0));
        }
        let stream = dial(shared, config, self.address).await?;
        let mut builder = http2::Builder::new(LocalExec);
        builder.timer(TokioTimer::new());
        if let Some(window) = config.http2.stream_window {
            builder.initial_stream_window_size(window);
        }
        if let Some(window) = config.http2.connection_window {
            builder.initial_connection_window_size(window);
        }
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                tracing::trace!(%error, "upstream connection");
            }
        });
        sender.ready().await?;
        *self.http2.borrow_mut() = Some(sender.clone());
        Ok(Lease::new(self, Sender::Http2(sender), config))
    }

    /// Closes connections that have been idle for longer than `limit` seconds.
    pub fn sweep(&self, limit: Option<Duration>) {
        let now = clock::now();
        let limit = limit.map_or(u64::MAX, |l| l.as_secs());
        self.idle.borrow_mut().retain(|idle| {
            !idle.sender.is_closed() && u64::from(now.saturating_sub(idle.since)) <= limit
        });
        self.http2.borrow_mut().take_if(|sender| sender.is_closed());
    }

    /// Has it neither connections nor requests?
    pub fn is_unused(&self) -> bool {
        self.active.get() == 0 && self.idle.borrow().is_empty() && self.http2.borrow().is_none()
    }
}

/// A TCP connection to an endpoint, with the cluster's source address and the mark that exempts it from capture.
pub async fn dial(
    shared: &Shared,
    config: &ClusterConfig,
    address: SocketAddr,
) -> Result<TcpStream, ConnectError> {
    let source = config
        .bind_source
        .filter(|source| source.is_ipv4() == address.is_ipv4());
    let options = ConnectOptions {
        source: source.map(|ip| SocketAddr::new(ip, 0)),
        mark: shared.mark,
        keepalive: Some(KEEPALIVE),
    };
    shared
        .totals
        .upstream_connections
        .fetch_add(1, Ordering::Relaxed);
    let done = tokio::time::timeout(config.connect_timeout, connect(address, options)).await;
    let done = done
        .map_err(|_| ConnectError::Timeout)
        .and_then(|stream| Ok(stream?));
    if done.is_err() {
        shared
            .totals
            .upstream_failures
            .fetch_add(1, Ordering::Relaxed);
    }
    done
}

enum Sender {
    Http1(Http1),
    Http2(Http2),
}

/// A connection lent to one request. Dropping it without [`Lease::give_back`] closes it (HTTP/1) or resets the stream (HTTP/2).
pub struct Lease {
    host: Rc<Host>,
    sender: Option<Sender>,
    /// Was it used before? (Then the endpoint may close it at the very moment it is used again.)
    pub reused: bool,
    /// Was it unused for so long that this is likely?
    pub suspect: bool,
    requests: u32,
    limit: Option<u32>,
}

/// What became of a try.
pub enum Sent {
    /// There is a response.
    Response(Response<Incoming>),
    /// Nothing was written; here is the request again.
    Unsent(Box<Request<RequestBody>>, hyper::Error),
    /// It may have been received.
    Lost(hyper::Error),
}

impl Lease {
    fn new(host: &Rc<Host>, sender: Sender, config: &ClusterConfig) -> Self {
        host.active.set(host.active.get() + 1);
        Self {
            host: host.clone(),
            sender: Some(sender),
            reused: false,
            suspect: false,
            requests: 1,
            limit: config.max_requests_per_connection,
        }
    }

    fn used_before(mut self, suspect: bool, requests: u32) -> Self {
        self.reused = true;
        self.suspect = suspect;
        self.requests = requests + 1;
        self
    }

    /// The endpoint.
    pub fn host(&self) -> &Rc<Host> {
        &self.host
    }

    /// Sends a request.
    pub async fn send(&mut self, request: Request<RequestBody>) -> Option<Sent> {
        let done = match self.sender.as_mut()? {
            Sender::Http1(sender) => sender.try_send_request(request).await,
            Sender::Http2(sender) => sender.try_send_request(request).await,
        };
        Some(match done {
            Ok(response) => Sent::Response(response),
            Err(mut error) => match error.take_message() {
                Some(request) => Sent::Unsent(Box::new(request), error.into_error()),
                None => Sent::Lost(error.into_error()),
            },
        })
    }

    /// Back to the pool after the whole response; an HTTP/1 connection whose request was not sent whole is closed instead.
    pub fn give_back(mut self, request_done: bool) {
        let full = self.limit.is_some_and(|limit| self.requests >= limit);
        if let Some(Sender::Http1(sender)) = self.sender.take()
            && request_done
            && !full
        {
            let mut idle = self.host.idle.borrow_mut();
            if idle.len() < MOST_IDLE {
                idle.push(Idle {
                    sender,
                    since: clock::now(),
                    requests: self.requests,
                });
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.host.active.set(self.host.active.get() - 1);
    }
}
