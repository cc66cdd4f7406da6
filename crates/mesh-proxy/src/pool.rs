//! Connections to endpoints, one pool for each worker, cluster and endpoint.

mod announce;
mod connect;
mod early;
mod lease;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_routing::cluster::{ClusterConfig, Transport};
use mesh_telemetry::Peer;
use tokio::sync::{Semaphore, oneshot};

use crate::body::RequestBody;
use crate::clock;
use crate::exec::LocalExec;
use crate::report::principals::Principals;
use crate::shared::Shared;
use crate::tls::connect::Wish;
use crate::upstream::Core;
use crate::upstream::common::EndpointState;
use crate::upstream::counters::{Counter, HostShard};

pub use announce::Ends;
pub use connect::{ConnectError, TcpUpstream};
pub use early::EarlyAnswer;
pub use lease::{Lease, Sent};

use connect::Open;
use lease::Sender;

/// Unused connections that an endpoint keeps open at most.
const MOST_IDLE: usize = 1024;
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
    /// As all workers see it.
    pub endpoint: Arc<EndpointState>,
    pub(crate) core: Rc<Core>,
    pub(crate) counters: Arc<HostShard>,
    hostname: RefCell<Arc<str>>,
    /// How its connections begin.
    transport: RefCell<Transport>,
    priority: Cell<u32>,
    idle: RefCell<Vec<Idle>>,
    http2: RefCell<Vec<Rc<Multiplexed>>>,
    /// One connection attempt at a time for HTTP/2, since one connection serves many.
    connecting: Semaphore,
    /// Connections of this worker that are open or being opened.
    open: Cell<u32>,
    waiting: RefCell<VecDeque<oneshot::Sender<Option<Idle>>>>,
    /// Goes up when connections made until now are not to be used any more.
    generation: Cell<u32>,
}

/// An HTTP/1 connection without a request.
struct Idle {
    sender: Http1,
    /// Second of the worker's clock at which it fell idle.
    since: u32,
    history: History,
}

/// What a connection has behind it.
#[derive(Debug, Clone)]
struct History {
    /// What the request wanted that it was opened for.
    wish: Wish,
    /// What both sides have proved, in mutual TLS.
    principals: Option<Arc<Principals>>,
    /// Second of the worker's clock at which it was opened.
    born: u32,
    /// Requests it was lent for.
    requests: u32,
    /// Of the host when it was opened.
    generation: u32,
    /// That it is open.
    open: Weak<Open>,
}

/// An HTTP/2 connection.
struct Multiplexed {
    sender: Http2,
    /// Streams that the endpoint allows at once.
    room: Rc<Cell<u32>>,
    streams: Cell<u32>,
    /// Second at which the last stream ended.
    since: Cell<u32>,
    history: RefCell<History>,
}

/// A request in the queue for a connection.
struct Waiter<'a> {
    host: &'a Host,
    take: oneshot::Receiver<Option<Idle>>,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        // What came too late for a request that was given up is for the next one.
        if let Ok(given) = self.take.try_recv() {
            self.host.hand_over(given);
        }
    }
}

/// Which HTTP version to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Was this connection made for one client alone, who has gone?
fn is_bereft(history: &History) -> bool {
    let ends = history.wish.ends.as_ref();
    ends.is_some_and(|ends| Rc::strong_count(ends) == 1)
}

impl Host {
    /// An endpoint without connections. `renewed`: it is another one than what was at this address before.
    pub fn new(core: &Rc<Core>, address: SocketAddr, peer: Arc<Peer>, renewed: bool) -> Self {
        let endpoint = core.common.endpoint(address, renewed);
        Self {
            counters: endpoint.shard(),
            address,
            active: Cell::new(0),
            peer,
            endpoint,
            core: core.clone(),
            hostname: RefCell::new("".into()),
            transport: RefCell::default(),
            priority: Cell::new(0),
            idle: RefCell::default(),
            http2: RefCell::default(),
            connecting: Semaphore::new(1),
            open: Cell::new(0),
            waiting: RefCell::default(),
            generation: Cell::new(0),
        }
    }

    /// What the configuration says about it.
    pub fn describe(&self, hostname: &Arc<str>, priority: u32) {
        if *self.hostname.borrow() != *hostname {
            self.hostname.replace(hostname.clone());
        }
        self.priority.set(priority);
    }

    /// Sets how its connections begin. Those that were made otherwise are not used again.
    pub fn protect(&self, transport: &Transport) {
        let before = self.transport.replace(transport.clone());
        if !before.is_equal(transport) {
            self.retire_connections();
        }
    }

    /// How its connections begin.
    pub fn transport(&self) -> Transport {
        self.transport.borrow().clone()
    }

    /// Its host name, empty where it has none.
    pub fn hostname(&self) -> Arc<str> {
        self.hostname.borrow().clone()
    }

    /// Its priority.
    pub fn priority(&self) -> u32 {
        self.priority.get()
    }

    /// A connection that is ready to send. `fresh` does not take one that was used before.
    pub async fn lease(
        self: &Rc<Self>,
        shared: &Shared,
        config: &ClusterConfig,
        version: Version,
        fresh: bool,
    ) -> Result<Lease, ConnectError> {
        self.lease_for(shared, config, (version, &Wish::default()), fresh)
            .await
    }

    /// The same, for a request that wants something of the TLS handshake.
    pub async fn lease_for(
        self: &Rc<Self>,
        shared: &Shared,
        config: &ClusterConfig,
        (version, wish): (Version, &Wish),
        fresh: bool,
    ) -> Result<Lease, ConnectError> {
        match version {
            Version::Http1 => self.lease_http1(shared, config, wish, fresh).await,
            Version::Http2 => self.lease_http2(shared, config, wish).await,
        }
    }

    async fn lease_http1(
        self: &Rc<Self>,
        shared: &Shared,
        config: &ClusterConfig,
        wish: &Wish,
        fresh: bool,
    ) -> Result<Lease, ConnectError> {
        while !fresh && let Some(idle) = self.take_idle(wish) {
            if let Some(lease) = self.reuse(idle, config).await? {
                return Ok(lease);
            }
        }
        let _pending = self.core.begin_pending().ok_or(ConnectError::Overflow)?;
        loop {
            // Above the limit of connections one of this endpoint's own is waited for, as in Envoy.
            let Some(held) = self.core.begin_connection(self.open.get() == 0) else {
                self.make_room();
                if let Some(idle) = self.wait().await
                    && self.fits(&idle.history.wish, wish)
                    && let Some(lease) = self.reuse(idle, config).await?
                {
                    return Ok(lease);
                }
                continue;
            };
            let (dialled, open) = self.dial(shared, config, held, wish).await?;
            let history = self.begin_history(wish, dialled.principals, &open);
            let (mut sender, connection) = http1::Builder::new()
                .handshake(TokioIo::new(EarlyAnswer::new(dialled.wire)))
                .await?;
            self.core.counters.inc(Counter::CxHttp1Total);
            tokio::task::spawn_local(async move {
                if let Err(error) = connection.with_upgrades().await {
                    tracing::trace!(%error, "upstream connection");
                }
                drop(open);
            });
            sender.ready().await?;
            return Lease::new(self, Sender::Http1(sender), config, history);
        }
    }

    async fn reuse(
        self: &Rc<Self>,
        mut idle: Idle,
        config: &ClusterConfig,
    ) -> Result<Option<Lease>, ConnectError> {
        if idle.sender.is_closed() || idle.sender.ready().await.is_err() {
            return Ok(None);
        }
        let suspect = clock::now().saturating_sub(idle.since) > SUSPECT_AFTER;
        let lease = Lease::new(self, Sender::Http1(idle.sender), config, idle.history)?;
        Ok(Some(lease.used_before(suspect)))
    }

    fn begin_history(
        &self,
        wish: &Wish,
        principals: Option<Arc<Principals>>,
        open: &Rc<Open>,
    ) -> History {
        History {
            open: Rc::downgrade(open),
            principals,
            wish: wish.clone(),
            born: clock::now(),
            requests: 0,
            generation: self.generation.get(),
        }
    }

    /// The connection that fell idle last, of those that were made for such a request.
    fn take_idle(&self, wish: &Wish) -> Option<Idle> {
        let mut all = self.idle.borrow_mut();
        let last = all.last()?;
        if self.fits(&last.history.wish, wish) {
            return all.pop();
        }
        let at = all
            .iter()
            .rposition(|idle| self.fits(&idle.history.wish, wish))?;
        Some(all.remove(at))
    }

    /// May a request with this wish use a connection that was made for that one? In plain text nothing was wished of a handshake; but what was
    /// said of a client holds for that client's requests only.
    fn fits(&self, made_for: &Wish, wish: &Wish) -> bool {
        let transport = self.transport.borrow();
        made_for.source == wish.source
            && (transport.tls.is_none() || made_for.has_handshake_of(wish))
            && (transport.header.is_none() || made_for.ends == wish.ends)
    }

    /// Closes an unused connection that was made for other requests than that which waits, so that this one does not wait until it is idle for
    /// too long.
    fn make_room(&self) {
        let mut idle = self.idle.borrow_mut();
        if !idle.is_empty() {
            idle.remove(0);
            return;
        }
        let mut shared = self.http2.borrow_mut();
        if let Some(at) = shared.iter().position(|m| m.streams.get() == 0) {
            shared.remove(at);
        }
    }

    /// Waits for a connection that is given back (`None`: for one that is closed, so that another may be opened).
    async fn wait(&self) -> Option<Idle> {
        let (give, take) = oneshot::channel();
        self.waiting.borrow_mut().push_back(give);
        let mut waiter = Waiter { host: self, take };
        (&mut waiter.take).await.ok().flatten()
    }

    /// Gives a connection, or the news of a place for one, to who has waited longest; the connection comes back where nobody waits.
    fn hand_over(&self, mut idle: Option<Idle>) -> Option<Idle> {
        loop {
            let waiting = self.waiting.borrow_mut().pop_front();
            match waiting.map(|waiting| waiting.send(idle.take())) {
                None => return idle,
                Some(Ok(())) => return None,
                // Gone meanwhile; the next one.
                Some(Err(back)) => idle = back,
            }
        }
    }

    /// An HTTP/2 connection with room for another stream.
    fn open_http2(&self, config: &ClusterConfig, wish: &Wish) -> Option<Rc<Multiplexed>> {
        let mut all = self.http2.borrow_mut();
        let old = |m: &Rc<Multiplexed>| {
            m.sender.is_closed() || self.is_spent(&m.history.borrow(), config)
        };
        // What runs on a spent one goes on; it closes with its last stream.
        all.retain(|m| !old(m));
        let own = config.http2.max_concurrent_streams.unwrap_or(u32::MAX);
        let room = |m: &&Rc<Multiplexed>| {
            m.streams.get() < own.min(m.room.get()).max(1)
                && self.fits(&m.history.borrow().wish, wish)
        };
        all.iter().find(room).cloned()
    }

    async fn lease_http2(
        self: &Rc<Self>,
        shared: &Shared,
        config: &ClusterConfig,
        wish: &Wish,
    ) -> Result<Lease, ConnectError> {
        if let Some(lease) = self.join_http2(config, wish)? {
            return Ok(lease);
        }
        let _pending = self.core.begin_pending().ok_or(ConnectError::Overflow)?;
        let _permit = self.connecting.acquire().await;
        loop {
            // Somebody else may have connected while this request waited.
            if let Some(lease) = self.join_http2(config, wish)? {
                return Ok(lease);
            }
            let Some(held) = self.core.begin_connection(self.open.get() == 0) else {
                self.make_room();
                self.wait().await;
                continue;
            };
            let (dialled, open) = self.dial(shared, config, held, wish).await?;
            let history = self.begin_history(wish, dialled.principals, &open);
            let (mut sender, mut connection) = http2_builder(config)
                .handshake(TokioIo::new(dialled.wire))
                .await?;
            self.core.counters.inc(Counter::CxHttp2Total);
            let room = Rc::new(Cell::new(u32::MAX));
            let told = room.clone();
            tokio::task::spawn_local(async move {
                let running = std::future::poll_fn(|cx| {
                    let done = Pin::new(&mut connection).poll(cx);
                    let streams = connection.current_max_send_streams();
                    told.set(u32::try_from(streams).unwrap_or(u32::MAX));
                    done
                });
                if let Err(error) = running.await {
                    tracing::trace!(%error, "upstream connection");
                }
                drop(open);
            });
            sender.ready().await?;
            let made = Rc::new(Multiplexed {
                sender,
                room,
                streams: Cell::new(0),
                since: Cell::new(clock::now()),
                history: RefCell::new(history.clone()),
            });
            let mut all = self.http2.borrow_mut();
            // Only where connections are one client's each there are so many.
            if all.len() >= MOST_IDLE
                && let Some(at) = all.iter().position(|m| m.streams.get() == 0)
            {
                all.remove(at);
            }
            all.push(made.clone());
            drop(all);
            return Lease::new(self, Sender::Http2(made), config, history);
        }
    }

    fn join_http2(
        self: &Rc<Self>,
        config: &ClusterConfig,
        wish: &Wish,
    ) -> Result<Option<Lease>, ConnectError> {
        let Some(shared) = self.open_http2(config, wish) else {
            return Ok(None);
        };
        let history = shared.history.borrow().clone();
        let lease = Lease::new(self, Sender::Http2(shared), config, history)?;
        Ok(Some(lease.used_before(false)))
    }

    /// Has it had its requests, or its time?
    fn is_spent(&self, history: &History, config: &ClusterConfig) -> bool {
        let counters = &self.core.counters;
        if history.generation != self.generation.get() {
            return true;
        }
        if config
            .max_requests_per_connection
            .is_some_and(|most| history.requests >= most)
        {
            counters.inc(Counter::CxMaxRequests);
            return true;
        }
        let age = clock::now().saturating_sub(history.born);
        let old = config
            .max_connection_duration
            .is_some_and(|most| u64::from(age) >= most.as_secs().max(1));
        if old {
            counters.inc(Counter::CxMaxDuration);
        }
        old
    }

    /// Closes connections that have been unused for too long, or are old enough.
    pub fn sweep(&self, config: &ClusterConfig) {
        let now = clock::now();
        let limit = config.idle_timeout.map_or(u64::MAX, |l| l.as_secs());
        let expired = |since: u32| {
            let over = u64::from(now.saturating_sub(since)) > limit;
            if over {
                self.core.counters.inc(Counter::CxIdleTimeout);
            }
            over
        };
        let mut idle = self.idle.borrow_mut();
        idle.retain(|idle| {
            !idle.sender.is_closed()
                && !is_bereft(&idle.history)
                && !expired(idle.since)
                && !self.is_spent(&idle.history, config)
        });
        if idle.is_empty() {
            idle.shrink_to(0);
        }
        drop(idle);
        self.http2.borrow_mut().retain(|m| {
            let idle = m.streams.get() == 0;
            let unused = idle && (is_bereft(&m.history.borrow()) || expired(m.since.get()));
            !m.sender.is_closed() && !unused && !self.is_spent(&m.history.borrow(), config)
        });
    }

    /// Closes unused connections; those in use are closed when they are given back.
    pub fn retire_connections(&self) {
        self.generation.set(self.generation.get().wrapping_add(1));
        self.idle.borrow_mut().clear();
        self.http2.borrow_mut().clear();
    }

    /// Has it neither connections nor requests?
    pub fn is_unused(&self) -> bool {
        self.active.get() == 0 && self.open.get() == 0
    }
}

fn http2_builder(config: &ClusterConfig) -> http2::Builder<LocalExec> {
    let mut builder = http2::Builder::new(LocalExec);
    builder.timer(TokioTimer::new());
    if let Some(window) = config.http2.stream_window {
        builder.initial_stream_window_size(window);
    }
    if let Some(window) = config.http2.connection_window {
        builder.initial_connection_window_size(window);
    }
    if let Some((interval, wait)) = config.http2.keepalive {
        builder
            .keep_alive_interval(interval)
            .keep_alive_timeout(wait)
            .keep_alive_while_idle(true);
    }
    builder
}
