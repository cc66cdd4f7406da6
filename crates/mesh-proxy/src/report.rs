//! Counting what happened. Label sets are built once for each combination and worker; a request pays one lookup by a small key.

pub mod principals;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Instant;

use http::HeaderValue;
use mesh_routing::cluster::ClusterConfig;
use mesh_routing::endpoint::Workload;
use mesh_routing::listener::Direction;
use mesh_telemetry::istio::{Reporter, ResponseLabels, UNKNOWN};
use mesh_telemetry::{IstioMetrics, Labels, Peer, RequestHandles, TcpHandles};

use crate::mirror::Tap;
use crate::node::parse_peer;
use principals::{Principals, identified};

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// Peers that a worker remembers by their header; more are taken for unknown, so that nobody can fill the memory.
const MOST_PEERS: usize = 4096;
/// Label sets that a cluster remembers; beyond, the code is reported as 0.
const MOST_HANDLES: usize = 4096;

/// Envoy's response flags, as far as this proxy sets them, in the order in which Envoy writes several of them
/// (`envoy/stream_info/stream_info.h`, `CoreResponseFlag`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Flag {
    /// No healthy endpoint.
    NoHealthy,
    /// The route's timeout, or that of a try.
    Timeout,
    /// We reset the stream.
    LocalReset,
    /// The endpoint reset the stream.
    UpstreamReset,
    /// Connecting failed.
    ConnectFailure,
    /// The endpoint closed the connection.
    UpstreamClosed,
    /// A circuit breaker is open.
    Overflow,
    /// No route.
    NoRoute,
    /// A delay was injected.
    DelayInjected,
    /// An abort was injected.
    FaultInjected,
    /// A local rate limit.
    RateLimited,
    /// Refused by an external authorization service.
    Unauthorized,
    /// The rate limit service failed.
    RateLimitService,
    /// The client went away.
    ClientGone,
    /// Retries were used up.
    RetryLimit,
    /// The stream was silent too long.
    Idle,
    /// The client broke the protocol.
    BadRequest,
    /// The stream lasted longer than it may.
    MaxStreamDuration,
    /// The connection lasted longer than it may.
    Duration,
    /// The endpoint broke the protocol.
    UpstreamProtocol,
    /// No cluster.
    NoCluster,
    /// The name of the endpoint could not be resolved.
    Dns,
}

impl Flag {
    /// All of them in Envoy's order.
    const ALL: [Self; 22] = [
        Self::NoHealthy,
        Self::Timeout,
        Self::LocalReset,
        Self::UpstreamReset,
        Self::ConnectFailure,
        Self::UpstreamClosed,
        Self::Overflow,
        Self::NoRoute,
        Self::DelayInjected,
        Self::FaultInjected,
        Self::RateLimited,
        Self::Unauthorized,
        Self::RateLimitService,
        Self::ClientGone,
        Self::RetryLimit,
        Self::Idle,
        Self::BadRequest,
        Self::MaxStreamDuration,
        Self::Duration,
        Self::UpstreamProtocol,
        Self::NoCluster,
        Self::Dns,
    ];

    /// As Envoy writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoHealthy => "UH",
            Self::Timeout => "UT",
            Self::LocalReset => "LR",
            Self::UpstreamReset => "UR",
            Self::ConnectFailure => "UF",
            Self::UpstreamClosed => "UC",
            Self::Overflow => "UO",
            Self::NoRoute => "NR",
            Self::DelayInjected => "DI",
            Self::FaultInjected => "FI",
            Self::RateLimited => "RL",
            Self::Unauthorized => "UAEX",
            Self::RateLimitService => "RLSE",
            Self::ClientGone => "DC",
            Self::RetryLimit => "URX",
            Self::Idle => "SI",
            Self::BadRequest => "DPE",
            Self::MaxStreamDuration => "UMSDR",
            Self::Duration => "DT",
            Self::UpstreamProtocol => "UPE",
            Self::NoCluster => "NC",
            Self::Dns => "DF",
        }
    }
}

/// A set of [`Flag`]s.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);

impl Flags {
    /// Nothing special.
    pub const NONE: Self = Self(0);

    /// Adds one.
    pub fn add(&mut self, flag: impl Into<Flags>) {
        self.0 |= flag.into().0;
    }

    /// Is none set?
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Is this one set?
    pub fn contains(self, flag: Flag) -> bool {
        self.0 & (1 << flag as u8) != 0
    }

    /// As Envoy writes them: names joined by commas, `-` for none. Texts of several flags are made once for each combination and thread.
    pub fn name(self) -> &'static str {
        thread_local! {
            static JOINED: RefCell<Map<u32, &'static str>> = RefCell::default();
        }
        let mut set = Flag::ALL.into_iter().filter(|flag| self.contains(*flag));
        match (set.next(), set.next()) {
            (None, _) => "-",
            (Some(only), None) => only.name(),
            // Few combinations ever occur, so what is leaked here is bounded by a few hundred bytes.
            _ => JOINED.with_borrow_mut(|known| {
                *known.entry(self.0).or_insert_with(|| {
                    let set = Flag::ALL.into_iter().filter(|flag| self.contains(*flag));
                    let names: Vec<_> = set.map(Flag::name).collect();
                    Box::leak(names.join(",").into_boxed_str())
                })
            }),
        }
    }
}

impl From<Flag> for Flags {
    fn from(flag: Flag) -> Self {
        Self(1 << flag as u8)
    }
}

/// The peers that a worker knows.
#[derive(Debug, Default)]
pub struct Peers {
    by_header: RefCell<Map<HeaderValue, Arc<Peer>>>,
    by_workload: RefCell<Map<Workload, Arc<Peer>>>,
    unknown: Arc<Peer>,
}

impl Peers {
    /// Nobody known.
    pub fn unknown(&self) -> &Arc<Peer> {
        &self.unknown
    }

    /// The peer of a metadata header.
    pub fn of_header(&self, header: &HeaderValue) -> Arc<Peer> {
        if let Some(known) = self.by_header.borrow().get(header) {
            return known.clone();
        }
        let peer = parse_peer(header).map_or_else(|| self.unknown.clone(), Arc::new);
        let mut map = self.by_header.borrow_mut();
        if map.len() < MOST_PEERS {
            map.insert(header.clone(), peer.clone());
        }
        peer
    }

    /// The peer of an endpoint's metadata.
    pub fn of_workload(&self, workload: &Workload) -> Arc<Peer> {
        if workload.name.is_empty() {
            return self.unknown.clone();
        }
        let mut map = self.by_workload.borrow_mut();
        map.entry(workload.clone())
            .or_insert_with(|| Arc::new(self.describe(workload)))
            .clone()
    }

    fn describe(&self, workload: &Workload) -> Peer {
        let or = |found: &str, default: &Arc<str>| {
            if found.is_empty() {
                default.clone()
            } else {
                Arc::from(found)
            }
        };
        let unknown = &*self.unknown;
        Peer {
            workload: or(&workload.name, &unknown.workload),
            namespace: or(&workload.namespace, &unknown.namespace),
            canonical_service: or(&workload.canonical_name, &unknown.canonical_service),
            canonical_revision: or(&workload.canonical_revision, &unknown.canonical_revision),
            cluster: or(&workload.cluster, &unknown.cluster),
            ..unknown.clone()
        }
    }
}

/// The parts of a label set that differ between the requests to one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    /// Address of the interned peer; it lives as long as the labels in the handles' map.
    peer: usize,
    /// Address of the interned principals, 0 for none; they live as long, too.
    principals: usize,
    inbound: bool,
    code: u16,
    grpc: Option<u16>,
    flags: Flags,
    is_grpc: bool,
    host: Option<HeaderValue>,
}

/// Handles with the peer that their key points to, so that its address cannot be another one's.
#[derive(Debug)]
struct Recorded {
    handles: RequestHandles,
    _peer: Arc<Peer>,
    _principals: Option<Arc<Principals>>,
}

/// The metrics of one cluster.
#[derive(Debug)]
pub struct Reports {
    metrics: IstioMetrics,
    us: Arc<Peer>,
    /// The cluster belongs to no service: requests name it themselves.
    follows_host: bool,
    service: [Arc<str>; 3],
    handles: RefCell<Map<Key, Rc<Recorded>>>,
}

impl Reports {
    /// For a cluster, or for requests that found none.
    pub fn new(metrics: &IstioMetrics, us: &Arc<Peer>, config: Option<&ClusterConfig>) -> Self {
        let or =
            |text: &str, default: &str| Arc::from(if text.is_empty() { default } else { text });
        let service = match config {
            None => [UNKNOWN.into(), UNKNOWN.into(), UNKNOWN.into()],
            Some(c) => [
                or(&c.service.host, UNKNOWN),
                or(&c.service.name, &c.name),
                or(&c.service.namespace, UNKNOWN),
            ],
        };
        Self {
            metrics: metrics.clone(),
            us: us.clone(),
            follows_host: config.is_some_and(|c| c.service.host.is_empty()),
            service,
            handles: RefCell::default(),
        }
    }

    /// Is the request's authority the service (Istio: passthrough traffic)?
    pub fn follows_host(&self) -> bool {
        self.follows_host
    }

    fn labels(
        &self,
        peer: &Arc<Peer>,
        principals: Option<&Arc<Principals>>,
        inbound: bool,
        flags: Flags,
    ) -> Labels {
        let peer = &identified(peer, principals.map(|p| &p.remote));
        let us = &identified(&self.us, principals.map(|p| &p.local));
        let (source, destination) = if inbound { (peer, us) } else { (us, peer) };
        let [service, service_name, service_namespace] = self.service.clone();
        Labels {
            reporter: if inbound {
                Reporter::Destination
            } else {
                Reporter::Source
            },
            source: source.clone(),
            destination: destination.clone(),
            service,
            service_name,
            service_namespace,
            protocol: "tcp",
            response: None,
            flags: flags.name(),
            // Istio's reporters of the client's side do not know.
            security: match (inbound, principals) {
                (false, _) => UNKNOWN,
                (true, None) => "none",
                (true, Some(_)) => "mutual_tls",
            },
        }
    }

    fn requests(
        &self,
        key: Key,
        peer: &Arc<Peer>,
        principals: Option<&Arc<Principals>>,
    ) -> Rc<Recorded> {
        if let Some(found) = self.handles.borrow().get(&key) {
            return found.clone();
        }
        let mut handles = self.handles.borrow_mut();
        let full = handles.len() >= MOST_HANDLES;
        let code = if full { 0 } else { key.code };
        let mut base = self.labels(peer, principals, key.inbound, key.flags);
        let host = key.host.as_ref().filter(|_| !full);
        if let Some(host) = host.and_then(|host| host.to_str().ok()) {
            base.service = host.into();
        }
        let labels = Labels {
            protocol: if key.is_grpc { "grpc" } else { "http" },
            response: Some(ResponseLabels {
                code,
                grpc: key.grpc,
            }),
            ..base
        };
        let made = Rc::new(Recorded {
            handles: self.metrics.requests(&labels),
            _peer: peer.clone(),
            _principals: principals.cloned(),
        });
        if !full {
            handles.insert(key, made.clone());
        }
        made
    }

    /// The handles for a connection.
    pub fn tcp(
        &self,
        peer: &Arc<Peer>,
        principals: Option<&Arc<Principals>>,
        direction: Direction,
        flags: Flags,
    ) -> TcpHandles {
        let inbound = direction == Direction::Inbound;
        self.metrics
            .tcp(&self.labels(peer, principals, inbound, flags))
    }
}

/// What is gathered about a request while it runs. Recorded once, when it is dropped: with the last byte of the response or when
/// the client goes away.
#[derive(Debug)]
pub struct Report {
    /// Whose metrics.
    pub reports: Rc<Reports>,
    /// Direction of the listener.
    pub direction: Direction,
    /// The other side.
    pub peer: Arc<Peer>,
    /// What both sides have proved, in mutual TLS.
    pub principals: Option<Arc<Principals>>,
    /// When the request's headers were there.
    pub started: Instant,
    /// The final status, 0 before there is one.
    pub code: u16,
    /// gRPC status, where it is gRPC.
    pub grpc: Option<u16>,
    /// gRPC?
    pub is_grpc: bool,
    /// Envoy's flags.
    pub flags: Flags,
    /// Bytes of the response so far.
    pub response_bytes: u64,
    /// The authority, where that stands for the service.
    pub host: Option<HeaderValue>,
    /// Shared with the request's body.
    pub flow: Rc<Flow>,
}

/// What request and response bodies know of each other.
#[derive(Debug, Default)]
pub struct Flow {
    /// Bytes of the request so far.
    pub request_bytes: Cell<u64>,
    /// The present try has sent the request whole.
    pub request_sent: Cell<bool>,
    /// When the client had sent it whole.
    finished: Cell<Option<tokio::time::Instant>>,
    request_done: Cell<bool>,
    /// The last frame in either direction; only kept where a timeout asks for it.
    touched: Cell<Option<tokio::time::Instant>>,
    watched: Cell<bool>,
    waiting: RefCell<Option<Waker>>,
    /// The rest of the request is not wanted: the whole answer is there.
    abandoned: Cell<bool>,
    sending: RefCell<Option<Waker>>,
    /// Copies of the request that are to see its body.
    pub tap: RefCell<Option<Box<Tap>>>,
}

impl Flow {
    /// The client has sent the request whole.
    pub fn finish_request(&self) {
        if !self.request_done.replace(true) {
            if let Some(waker) = self.waiting.borrow_mut().take() {
                waker.wake();
            }
            if let Some(mut tap) = self.tap.borrow_mut().take() {
                tap.end();
            }
        }
        if self.watched.get() && self.finished.get().is_none() {
            self.finished.set(Some(tokio::time::Instant::now()));
        }
    }

    /// Has the client sent the request whole?
    pub fn is_request_done(&self) -> bool {
        self.request_done.get()
    }

    /// Times are kept from now on.
    pub fn watch(&self) {
        if self.watched.replace(true) {
            return;
        }
        let now = tokio::time::Instant::now();
        self.touched.set(Some(now));
        if self.request_done.get() {
            self.finished.set(Some(now));
        }
    }

    /// Something has passed.
    pub fn touch(&self) {
        if self.watched.get() {
            self.touched.set(Some(tokio::time::Instant::now()));
        }
    }

    /// When something last passed; call [`Flow::watch`] before.
    pub fn touched(&self) -> tokio::time::Instant {
        self.touched.get().unwrap_or_else(tokio::time::Instant::now)
    }

    /// When the client had sent the request whole, if it has; call [`Flow::watch`] before.
    pub fn finished(&self) -> Option<tokio::time::Instant> {
        self.finished.get()
    }

    /// The answer is there whole: what is left of the request is not sent any more (Envoy resets the upstream request then, too).
    pub fn abandon_request(&self) {
        self.abandoned.set(true);
        if let Some(waker) = self.sending.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Has the request been answered before it was sent?
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.get()
    }

    /// Wakes the task that sends the request when it is abandoned.
    pub fn wait_for_abandon(&self, cx: &Context<'_>) {
        let mut sending = self.sending.borrow_mut();
        let known = sending.as_ref();
        if !known.is_some_and(|known| known.will_wake(cx.waker())) {
            *sending = Some(cx.waker().clone());
        }
    }

    /// Wakes the task when the client has sent the request whole.
    pub fn wait_for_end(&self, cx: &Context<'_>) {
        if !self.request_done.get() {
            self.waiting.replace(Some(cx.waker().clone()));
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if self.code == 0 && self.flags.is_empty() {
            // Nobody waited for the answer.
            self.flags.add(Flag::ClientGone);
        }
        let key = Key {
            peer: Arc::as_ptr(&self.peer) as usize,
            principals: self
                .principals
                .as_ref()
                .map_or(0, |p| Arc::as_ptr(p) as usize),
            inbound: self.direction == Direction::Inbound,
            code: self.code,
            grpc: self.grpc,
            flags: self.flags,
            is_grpc: self.is_grpc,
            host: self.host.take(),
        };
        let recorded = self
            .reports
            .requests(key, &self.peer, self.principals.as_ref());
        let handles = &recorded.handles;
        handles.requests.inc();
        handles
            .duration_ms
            .observe(self.started.elapsed().as_secs_f64() * 1000.0);
        handles
            .request_bytes
            .observe(self.flow.request_bytes.get() as f64);
        handles.response_bytes.observe(self.response_bytes as f64);
    }
}
