//! A connection that was accepted: where it was going, what it speaks, which filter chain takes it, and how it ends.

mod arrived;
mod frames;
mod linger;
pub mod tenure;

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderValue;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_net::sockets::original_destination;
use mesh_routing::Snapshot;
use mesh_routing::chain::{ConnectionView, FilterChain, NetworkFilter};
use mesh_routing::cluster::Transports;
use mesh_routing::filter::local_rate_limit::LocalRateLimit;
use mesh_routing::hcm::{ClientCert, Codec, HttpManager};
use mesh_routing::listener::{Direction, Listener};
use mesh_routing::peer::PeerTls;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::clock;
use crate::exec::LocalExec;
use crate::filter::bucket::Buckets;
use crate::filter::guard;
use crate::framing::HeadScan;
use crate::listener::frames::FrameScan;
use crate::listener::linger::Linger;
use crate::pool::Ends;
use crate::report::principals::Principals;
use crate::sniff::{self, Protocol};
use crate::tls::connect::{Source, Wish};
use crate::tls::wire::Wire;
use crate::worker::Worker;
use crate::{http as http_path, tcp};
use arrived::Arrived;
use tenure::{Lapse, Place, Tenancy};

/// Limit for request headers to arrive where the connection manager sets none, in seconds.
const HEADER_TIMEOUT: u32 = 10;
/// Streams of one HTTP/2 connection at once, unless configured (Envoy's advice for edges).
const MAX_STREAMS: u32 = 100;
/// Streams that we reset because of the client's doing before the connection is closed (rapid reset, CVE-2023-44487 and successors).
const MAX_RESETS: usize = 100;

/// How long a drained proxy leaves HTTP/1 connections open that wait for a request, and how long such a connection must have waited, in
/// seconds. The client may be about to send: it hears that the connection ends with the response, or from the control plane that the endpoint
/// goes.
const DRAIN_WAIT: u32 = 1;

/// Seconds that the sweep leaves to a stream's own timer.
const SWEEP_GRACE: u64 = 2;

/// A connection on its way through a worker.
pub struct Downstream {
    /// The worker.
    pub worker: Rc<Worker>,
    /// The client.
    pub remote: SocketAddr,
    /// Where the connection was going; its local address where it was not redirected.
    pub destination: SocketAddr,
    /// Was it redirected?
    pub redirected: bool,
    /// The client's address, where connections to endpoints are to come from it.
    pub source: Option<Source>,
    /// Who it is and where it was going, for PROXY protocol headers: as long as the client is there, somebody holds this.
    ends: OnceCell<Rc<Ends>>,
    /// Direction of the listener.
    pub direction: Direction,
    /// What the TLS handshake has shown; `None` for plain text.
    pub tls: Option<Arc<PeerTls>>,
    /// What both sides have proved, in mutual TLS.
    pub principals: Option<Arc<Principals>>,
    /// What is said of the client's certificate to who is behind us, by these settings.
    pub client_cert: RefCell<Option<(ClientCert, HeaderValue)>>,
    /// Where its filter chain is found in snapshots to come.
    place: Place,
    lapse: Lapse,
    manager: RefCell<Managed>,
    /// Buckets of limits that every connection has for itself.
    pub buckets: RefCell<Vec<(Arc<LocalRateLimit>, Arc<Buckets>)>>,
    activity: Arc<Activity>,
    /// Second in which the last request ended, or the connection began.
    idle_since: Cell<u32>,
    idle_limit: Cell<Option<Duration>>,
    silence: Cell<Option<Duration>>,
    head_limit: Cell<u32>,
    closing: Cell<Closing>,
    http2: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    requests: Cell<u32>,
}

/// The connection manager, and the snapshot that it was looked up in.
#[derive(Default)]
struct Managed {
    /// Weak, so that idle connections do not keep old configurations in memory.
    snapshot: Weak<Snapshot>,
    manager: Option<Arc<HttpManager>>,
}

/// What reading has to tell about the connection. Only the worker's thread touches it; the atomics are there since a connection that is
/// upgraded must be able to move.
#[derive(Debug, Default)]
struct Activity {
    in_flight: AtomicU32,
    /// Second in which the first byte after the last request was read; 0 before.
    head_since: AtomicU32,
    /// A head with two kinds of length was read since then.
    two_lengths: AtomicBool,
    /// Or one with several lengths.
    repeated_length: AtomicBool,
    /// The last request had a body.
    had_body: AtomicBool,
    /// Second in which bytes last passed in either direction.
    moved: AtomicU32,
}

impl Activity {
    fn note_moved(&self) {
        self.moved.store(clock::now(), Ordering::Relaxed);
    }

    fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Bytes have come. True if they begin a new exchange.
    fn note_read(&self) -> bool {
        let begins = self.in_flight() == 0 && self.head_since.load(Ordering::Relaxed) == 0;
        if begins {
            self.head_since.store(clock::now(), Ordering::Relaxed);
        }
        begins
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    No,
    Graceful,
    Told,
    Now,
}

/// Takes care of an accepted connection until it ends.
pub async fn serve(worker: Rc<Worker>, stream: TcpStream, remote: SocketAddr, bound: SocketAddr) {
    let totals = &worker.shared.totals;
    totals.connections.fetch_add(1, Ordering::Relaxed);
    totals.open.fetch_add(1, Ordering::Relaxed);
    let shared = worker.shared.clone();
    if let Err(error) = serve_inner(worker, stream, remote, bound).await {
        tracing::debug!(%remote, %error, "connection");
    }
    shared.totals.open.fetch_sub(1, Ordering::Relaxed);
}

async fn serve_inner(
    worker: Rc<Worker>,
    stream: TcpStream,
    remote: SocketAddr,
    bound: SocketAddr,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let snapshot = worker.snapshot();
    let Some(accepted) = snapshot
        .listeners()
        .find(|l| l.bind && l.address == bound)
        .cloned()
    else {
        return Ok(());
    };
    let original = if accepted.restores_destination {
        original_destination(&stream)
    } else {
        None
    };
    let destination = original.unwrap_or(stream.local_addr()?);
    // By TPROXY a connection has the address that it was going to; who means the port itself was not captured.
    let redirected =
        original.is_some() || (accepted.transparent && destination.port() != bound.port());
    let source = accepted.original_source.map(|mark| Source {
        ip: remote.ip().to_canonical(),
        mark,
    });
    let listener = snapshot.hand_over(&accepted, destination).clone();
    let direction = accepted.direction;
    drop(snapshot);
    let mut stream = stream;
    let mut prefix = BytesMut::new();
    let protocol = match listener.needs_bytes(destination) {
        true => read_first(&mut stream, &mut prefix, &listener).await?,
        false => None,
    };
    let Some(chain) = choose(&listener, destination, remote, protocol.as_ref()) else {
        let counters = worker.shared.listeners.listener(&accepted.stat_name);
        counters
            .no_filter_chain_match
            .fetch_add(1, Ordering::Relaxed);
        tracing::debug!(%remote, %destination, listener = &*listener.name, "no filter chain takes the connection");
        return Ok(());
    };
    if !admits(&worker, &chain) {
        tracing::debug!(%remote, %destination, "closed: beyond the local rate limit");
        return Ok(());
    }
    let place = Place::of(&listener, &chain);
    let arrived = Arrived::plain(stream, prefix, protocol);
    let counters = || worker.shared.listeners.listener(&accepted.stat_name);
    let Some(mut arrived) = arrived.through(&worker, &chain, counters).await else {
        return Ok(());
    };
    let connection = Rc::new(Downstream {
        place,
        lapse: Lapse::default(),
        manager: RefCell::default(),
        remote,
        destination,
        redirected,
        source,
        ends: OnceCell::new(),
        direction,
        principals: arrived.tls.as_deref().and_then(Principals::of_client),
        client_cert: RefCell::default(),
        tls: arrived.tls.clone(),
        buckets: RefCell::default(),
        activity: Arc::default(),
        idle_since: Cell::new(clock::now()),
        idle_limit: Cell::new(None),
        silence: Cell::new(None),
        head_limit: Cell::new(HEADER_TIMEOUT),
        closing: Cell::new(Closing::No),
        http2: Cell::new(false),
        waker: RefCell::default(),
        requests: Cell::new(0),
        worker,
    });
    if !chain.guards.is_empty() {
        let name = arrived.server_name();
        if !Box::pin(guard::admits(&connection, &chain, name)).await {
            guard::wait_for_first_byte(&mut arrived.wire, &arrived.prefix).await;
            return Ok(());
        }
    }
    match &chain.filter {
        NetworkFilter::Tcp(proxy) => {
            let name = arrived.server_name().unwrap_or("").to_owned();
            let stream = (arrived.wire, arrived.prefix.freeze());
            tcp::serve(&connection, proxy, stream, &name).await;
            Ok(())
        }
        NetworkFilter::Http(manager) => {
            let Arrived {
                wire,
                prefix,
                protocol,
                ..
            } = arrived;
            serve_http(connection, manager.clone(), wire, prefix, protocol).await
        }
    }
}

/// Do the chain's limits for new connections let one more in? Those that come first take their token also where a later one refuses.
fn admits(worker: &Worker, chain: &FilterChain) -> bool {
    let now = worker.shared.started.elapsed().as_secs_f64();
    let counters = &worker.shared.counters;
    let admitted = |limit| counters.connections(limit, now).consume(1.0, now);
    chain.limits.iter().all(admitted)
}

/// Reads until the inspectors know. `None`: the client sent nothing within the time, and the connection is to go on as plain bytes.
async fn read_first(
    stream: &mut TcpStream,
    prefix: &mut BytesMut,
    listener: &Listener,
) -> io::Result<Option<Protocol>> {
    let reading = read_until_known(stream, prefix);
    let Some(limit) = listener.detection_timeout else {
        return reading.await.map(Some);
    };
    match tokio::time::timeout(limit, reading).await {
        Ok(done) => done.map(Some),
        Err(_) if listener.continue_on_timeout => Ok(None),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client said nothing within the detection timeout",
        )),
    }
}

async fn read_until_known(stream: &mut TcpStream, prefix: &mut BytesMut) -> io::Result<Protocol> {
    loop {
        if let Some(protocol) = sniff::judge(prefix) {
            return Ok(protocol);
        }
        if stream.read_buf(prefix).await? == 0 {
            // Half-closed before anything could be told: plain bytes.
            return Ok(Protocol::Other);
        }
    }
}

fn choose(
    listener: &Listener,
    destination: SocketAddr,
    remote: SocketAddr,
    protocol: Option<&Protocol>,
) -> Option<Arc<FilterChain>> {
    let mut view = ConnectionView {
        destination: Some(destination),
        source: Some(remote),
        transport: "raw_buffer",
        ..ConnectionView::default()
    };
    let http = listener.wants_http(destination);
    let names: Vec<&str> = match protocol {
        Some(Protocol::Tls {
            server_name,
            applications,
        }) => {
            view.transport = "tls";
            view.server_name = server_name.as_deref();
            applications.iter().map(String::as_str).collect()
        }
        Some(Protocol::Http10) if http => vec!["http/1.0"],
        Some(Protocol::Http11) if http => vec!["http/1.1"],
        Some(Protocol::Http2) if http => vec!["h2c"],
        _ => Vec::new(),
    };
    view.applications = &names;
    listener.chain(&view).cloned()
}

async fn serve_http(
    connection: Rc<Downstream>,
    manager: Arc<HttpManager>,
    mut stream: Wire,
    mut prefix: BytesMut,
    protocol: Option<Protocol>,
) -> io::Result<()> {
    connection.idle_limit.set(manager.idle_timeout);
    if let Some(limit) = manager.headers_timeout {
        connection
            .head_limit
            .set(u32::try_from(limit.as_secs()).unwrap_or(u32::MAX).max(1));
    }
    connection.worker.watch_over(&connection);
    // The chain may have changed while the connection was accepted.
    connection.settle(&connection.worker.snapshot());
    let http2 = match (manager.codec, protocol) {
        (Codec::Http2, _) => true,
        (Codec::Http1, _) => false,
        (Codec::Auto, Some(protocol)) => protocol == Protocol::Http2,
        (Codec::Auto, None) => {
            let limit = Duration::from_secs(u64::from(connection.head_limit.get()));
            match tokio::time::timeout(limit, preface(&mut stream, &mut prefix)).await {
                Ok(is_preface) => is_preface?,
                // A connection opened ahead of use: HTTP/1 unless told otherwise; the idle timeout takes over.
                Err(_) if prefix.is_empty() => false,
                Err(_) => return Ok(()),
            }
        }
    };
    connection.http2.set(http2);
    let scan = (!http2).then(HeadScan::default);
    let mut io = Prefixed {
        prefix: prefix.freeze(),
        stream,
        activity: connection.activity.clone(),
        scan,
        frames: http2.then(FrameScan::new),
        linger: None,
    };
    let prefix = io.prefix.clone();
    io.look_at(&prefix)?;
    let io = TokioIo::new(io);
    let result = if http2 {
        serve_http2(connection, manager, io).await
    } else {
        serve_http1(connection, manager, io).await
    };
    result.map_err(io::Error::other)
}

/// Does the connection begin with the preface of HTTP/2?
async fn preface(stream: &mut Wire, prefix: &mut BytesMut) -> io::Result<bool> {
    loop {
        let seen = prefix.len().min(sniff::PREFACE.len());
        if prefix.get(..seen) != sniff::PREFACE.get(..seen) {
            return Ok(false);
        }
        if seen == sniff::PREFACE.len() {
            return Ok(true);
        }
        if stream.read_buf(prefix).await? == 0 {
            return Ok(false);
        }
    }
}

type Io = TokioIo<Prefixed>;

async fn serve_http1(
    connection: Rc<Downstream>,
    manager: Arc<HttpManager>,
    io: Io,
) -> hyper::Result<()> {
    let mut builder = http1::Builder::new();
    // The sweep keeps the time: hyper's own timer would also cut idle connections off.
    builder.timer(TokioTimer::new()).header_read_timeout(None);
    builder.max_buf_size(
        usize::try_from(manager.max_headers_kb)
            .unwrap_or(60)
            .clamp(8, 8192)
            * 1024,
    );
    if manager.max_headers != 100 {
        builder.max_headers(manager.max_headers as usize);
    }
    let handler = connection.clone();
    let service =
        service_fn(move |request| http_path::handle(handler.clone(), manager.clone(), request));
    let serving = builder.serve_connection(io, service).with_upgrades();
    tokio::pin!(serving);
    std::future::poll_fn(|cx| {
        match connection.poll_closing(cx) {
            Closing::Graceful => serving.as_mut().graceful_shutdown(),
            Closing::Now => return Poll::Ready(Ok(())),
            Closing::No | Closing::Told => {}
        }
        serving.as_mut().poll(cx)
    })
    .await
}

async fn serve_http2(
    connection: Rc<Downstream>,
    manager: Arc<HttpManager>,
    io: Io,
) -> hyper::Result<()> {
    let mut builder = http2::Builder::new(LocalExec);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(manager.http2.max_concurrent_streams.unwrap_or(MAX_STREAMS))
        .max_header_list_size(manager.max_headers_kb.saturating_mul(1024))
        .max_local_error_reset_streams(MAX_RESETS)
        .max_pending_accept_reset_streams(MAX_RESETS);
    if manager.http2.allow_connect {
        builder.enable_connect_protocol();
    }
    if let Some(window) = manager.http2.stream_window {
        builder.initial_stream_window_size(window);
    }
    if let Some(window) = manager.http2.connection_window {
        builder.initial_connection_window_size(window);
    }
    let handler = connection.clone();
    let service =
        service_fn(move |request| http_path::handle(handler.clone(), manager.clone(), request));
    let serving = builder.serve_connection(io, service);
    tokio::pin!(serving);
    std::future::poll_fn(|cx| {
        match connection.poll_closing(cx) {
            Closing::Graceful => serving.as_mut().graceful_shutdown(),
            Closing::Now => return Poll::Ready(Ok(())),
            Closing::No | Closing::Told => {}
        }
        serving.as_mut().poll(cx)
    })
    .await
}

impl Downstream {
    /// Whom PROXY protocol headers of a cluster tell of, where it has any.
    pub fn ends_for(&self, transports: &Transports) -> Option<Rc<Ends>> {
        transports.announces().then(|| {
            let ends = self.ends.get_or_init(|| {
                Rc::new(Ends {
                    client: self.remote,
                    destination: self.destination,
                })
            });
            Rc::clone(ends)
        })
    }

    /// What connections to endpoints that are this client's alone are opened with.
    pub fn wish_for(&self, transports: &Transports) -> Wish {
        Wish {
            ends: self.ends_for(transports),
            source: self.source,
            ..Wish::default()
        }
    }

    /// The connection manager for a request: routes and settings follow the snapshot also on a connection that was accepted before it.
    /// Where the filter chain is gone, the connection ends with this request, under the old one.
    pub fn manager(
        &self,
        accepted: &Arc<HttpManager>,
        snapshot: &Arc<Snapshot>,
    ) -> Arc<HttpManager> {
        let mut known = self.manager.borrow_mut();
        if !std::ptr::eq(known.snapshot.as_ptr(), Arc::as_ptr(snapshot)) {
            match self.place.manager(snapshot) {
                Some(manager) => known.manager = Some(manager),
                None => self.end_gracefully(),
            }
            known.snapshot = Arc::downgrade(snapshot);
        }
        known
            .manager
            .get_or_insert_with(|| accepted.clone())
            .clone()
    }

    /// A request has begun; true if it is to be the last one of the connection.
    pub fn begin(&self, manager: &HttpManager, has_body: bool) -> bool {
        self.activity.had_body.store(has_body, Ordering::Relaxed);
        self.activity.in_flight.fetch_add(1, Ordering::Relaxed);
        self.activity.head_since.store(0, Ordering::Relaxed);
        self.requests.set(self.requests.get() + 1);
        self.worker
            .shared
            .totals
            .requests
            .fetch_add(1, Ordering::Relaxed);
        let last = manager
            .max_requests_per_connection
            .is_some_and(|most| self.requests.get() >= most);
        last || self.is_leaving() || self.worker.shared.is_draining(self.direction)
    }

    /// The longest silence that a request allows its stream (`None`: any). Of several requests the most patient one counts.
    pub fn allow_silence(&self, limit: Option<Duration>) {
        let alone = self.activity.in_flight() <= 1;
        let longest = match (alone, self.silence.get(), limit) {
            (true, _, limit) => limit,
            (false, Some(other), Some(limit)) => Some(limit.max(other)),
            (false, ..) => None,
        };
        self.silence.set(longest);
    }

    /// Has the client sent a head with two lengths? For a request with a transfer coding (`coded`) any other length is one too many. (The
    /// codec takes all but one away.)
    pub fn sent_two_lengths(&self, coded: bool) -> bool {
        self.activity.repeated_length.load(Ordering::Relaxed)
            || (coded && self.activity.two_lengths.load(Ordering::Relaxed))
    }

    /// Begins to pass bytes that are not judged again, for a request that began in this era.
    pub fn settle_in(&self, era: u32) -> Rc<Tenancy> {
        let tenancy = Tenancy::begin(self, era);
        self.worker.watch_over_bytes(&tenancy);
        tenancy
    }

    /// A request that began in this era has its response.
    pub fn finish(&self, era: u32) {
        self.leave_era(era);
        self.activity.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.idle_since.set(clock::now());
    }

    /// Called every second.
    pub fn check_timeouts(&self) {
        self.check_lapse();
        let now = clock::now();
        if self.activity.in_flight() > 0 {
            // Streams look after themselves as long as their client reads; one that does not is only seen here.
            let moved = self.activity.moved.load(Ordering::Relaxed);
            let silent = u64::from(now.saturating_sub(moved));
            if self
                .silence
                .get()
                .is_some_and(|limit| silent > limit.as_secs() + SWEEP_GRACE)
            {
                self.close(Closing::Now);
            }
            return;
        }
        let head = self.activity.head_since.load(Ordering::Relaxed);
        if head > 0 && now.saturating_sub(head) > self.head_limit.get() {
            self.close(Closing::Now);
        } else if self.idle_limit.get().is_some_and(|limit| {
            u64::from(now.saturating_sub(self.idle_since.get())) > limit.as_secs()
        }) {
            self.end_gracefully();
        }
    }

    /// The proxy has been draining since `began`: ends the connection where no request can be lost by it.
    pub fn drain(&self, began: u32) {
        let now = clock::now();
        let is_recent = |second: u32| now.saturating_sub(second) <= DRAIN_WAIT;
        let may_send = self.activity.in_flight() == 0
            && (is_recent(began) || is_recent(self.idle_since.get()));
        if self.http2.get() || !may_send {
            self.end_gracefully();
        }
    }

    /// Ends the connection with the response under way.
    pub fn end_gracefully(&self) {
        if self.closing.get() == Closing::No {
            self.close(Closing::Graceful);
        }
    }

    fn close(&self, how: Closing) {
        self.closing.set(how);
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    fn poll_closing(&self, cx: &Context<'_>) -> Closing {
        let closing = self.closing.get();
        if closing == Closing::Graceful {
            self.closing.set(Closing::Told);
        }
        let mut waker = self.waker.borrow_mut();
        if !waker
            .as_ref()
            .is_some_and(|known| known.will_wake(cx.waker()))
        {
            *waker = Some(cx.waker().clone());
        }
        closing
    }
}

/// The connection with the bytes that were read to find out what it speaks.
struct Prefixed {
    prefix: Bytes,
    stream: Wire,
    activity: Arc<Activity>,
    scan: Option<HeadScan>,
    frames: Option<FrameScan>,
    /// At the end: how long what the client still sends is read and dropped.
    linger: Option<Linger>,
}

impl Prefixed {
    fn look_at(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.activity.note_moved();
        let begins = self.activity.note_read();
        if let Some(scan) = &mut self.scan {
            if begins {
                let after_body = self.activity.had_body.load(Ordering::Relaxed);
                // Without a body in between, a head with two lengths is this one, which may have begun to come ahead.
                if after_body {
                    self.activity.two_lengths.store(false, Ordering::Relaxed);
                }
                self.activity
                    .repeated_length
                    .store(false, Ordering::Relaxed);
                scan.begin(after_body);
            }
            let found = scan.read(bytes);
            if found.both {
                self.activity.two_lengths.store(true, Ordering::Relaxed);
            }
            if found.repeated {
                self.activity.repeated_length.store(true, Ordering::Relaxed);
            }
        } else if let Some(frames) = &mut self.frames
            && frames.read(bytes)
        {
            return Err(io::Error::other(
                "the client floods the connection with control frames",
            ));
        }
        Ok(())
    }

    fn note_written(&mut self, written: &Poll<io::Result<usize>>) {
        if let Poll::Ready(written) = written {
            self.activity.note_moved();
            if let (Some(frames), Ok(written)) = (&mut self.frames, written) {
                frames.note_written(*written);
            }
        }
    }
}

impl AsyncRead for Prefixed {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.prefix.is_empty() {
            let n = this.prefix.len().min(buf.remaining());
            buf.put_slice(this.prefix.get(..n).unwrap_or_default());
            this.prefix.advance(n);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let done = Pin::new(&mut this.stream).poll_read(cx, buf);
        this.look_at(buf.filled().get(before..).unwrap_or_default())?;
        done
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.note_written(&done);
        done
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        if this.scan.is_none() {
            // HTTP/2 has ends of its own for streams, and only ends a connection as a whole where nothing is left to be read from it.
            return Poll::Ready(Ok(()));
        }
        let linger = this.linger.get_or_insert_with(Linger::new);
        linger.poll(&mut this.stream, cx).map(Ok)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.note_written(&done);
        done
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
