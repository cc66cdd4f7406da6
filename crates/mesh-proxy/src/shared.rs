//! What all threads of a proxy share. Nothing here is locked on the way of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use mesh_routing::listener::Direction;
use mesh_routing::{Rejection, Snapshot, XdsState, compile};
use mesh_telemetry::IstioMetrics;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::node::Identity;
use crate::options::ProxyOptions;
use crate::upstream::common::Upstreams;

/// Counters that the admin interface shows.
#[derive(Debug, Default)]
pub struct Totals {
    /// Connections accepted since the start.
    pub connections: AtomicU64,
    /// Connections open now.
    pub open: AtomicUsize,
    /// Requests since the start.
    pub requests: AtomicU64,
    /// Connections to endpoints since the start.
    pub upstream_connections: AtomicU64,
    /// Connections to endpoints that failed.
    pub upstream_failures: AtomicU64,
    /// Resources that were refused since the start.
    pub rejected: AtomicU64,
    /// Snapshots published.
    pub snapshots: AtomicU64,
}

/// Values of [`Shared::stop_listeners`], in the order in which they follow each other.
const STOPPED_INBOUND: u8 = 1;
const STOPPED_ALL: u8 = 2;

/// The shared part of a proxy.
#[derive(Debug)]
pub struct Shared {
    /// How it was started.
    pub options: ProxyOptions,
    /// Who it is.
    pub identity: Identity,
    /// The standard metrics.
    pub metrics: IstioMetrics,
    /// Where they are registered.
    pub registry: Registry,
    /// Counters.
    pub totals: Totals,
    /// What workers know together about clusters.
    pub upstreams: Upstreams,
    /// What filters of all workers count together.
    pub counters: crate::filter::bucket::Counters,
    /// TLS configurations made of settings and secrets.
    pub contexts: crate::tls::contexts::Contexts,
    /// What is counted about listeners.
    pub listeners: crate::tls::counters::Counters,
    /// Keys, certificates and authorities.
    pub secrets: crate::secrets::Secrets,
    /// Set while all connections are drained.
    pub draining: AtomicBool,
    /// Set while those are that came in from outside the workload.
    pub draining_inbound: AtomicBool,
    /// Listeners that take no more connections, whatever the configuration says ([`Shared::stop_listeners`]).
    stopped: AtomicU8,
    /// Set by `POST /healthcheck/fail`.
    pub failing: AtomicBool,
    /// CDS and LDS have arrived (or were kept from an earlier run).
    pub configured: AtomicBool,
    /// There is a valid certificate, or none is needed.
    pub identified: AtomicBool,
    /// Seconds until the certificate expires.
    pub certificate_expiry: Gauge<f64, AtomicU64>,
    /// Workers whose listeners are open for the present snapshot.
    pub serving: AtomicUsize,
    /// Mark for upstream sockets, where capture exempts by mark.
    pub mark: Option<u32>,
    /// When the process started.
    pub started: Instant,
    snapshot: ArcSwap<Snapshot>,
    changes: watch::Sender<u64>,
}

impl Shared {
    /// An idle proxy without configuration.
    pub fn new(options: ProxyOptions) -> Arc<Self> {
        let mut registry = Registry::default();
        let metrics = IstioMetrics::register(&mut registry, "proxy", env!("CARGO_PKG_VERSION"));
        let certificate_expiry = Gauge::default();
        if options.identity.is_some() {
            registry.register(
                "cert_expiry_seconds",
                "Seconds until the workload's certificate expires, negative when it has",
                certificate_expiry.clone(),
            );
        }
        let exempt_by_uid = effective_uid() == mesh_net::sockets::PROXY_UID;
        Arc::new(Self {
            identity: Identity::new(&options),
            identified: AtomicBool::new(options.identity.is_none()),
            certificate_expiry,
            options,
            metrics,
            registry,
            totals: Totals::default(),
            upstreams: Upstreams::default(),
            counters: crate::filter::bucket::Counters::default(),
            contexts: crate::tls::contexts::Contexts::default(),
            listeners: crate::tls::counters::Counters::default(),
            secrets: crate::secrets::Secrets::default(),
            draining: AtomicBool::new(false),
            draining_inbound: AtomicBool::new(false),
            stopped: AtomicU8::new(0),
            failing: AtomicBool::new(false),
            configured: AtomicBool::new(false),
            serving: AtomicUsize::new(0),
            mark: (!exempt_by_uid && mesh_net::sockets::may_mark())
                .then_some(mesh_net::sockets::EXEMPT_MARK),
            started: Instant::now(),
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            changes: watch::channel(0).0,
        })
    }

    /// The present snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// A view of the number of the present snapshot.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Compiles the resources and puts the result in force. What could not be compiled is returned.
    pub fn publish(&self, state: &XdsState) -> Vec<Rejection> {
        let previous = self.snapshot();
        let (snapshot, rejections) = compile(state, Some(&previous));
        self.snapshot.store(Arc::new(snapshot));
        self.totals.snapshots.fetch_add(1, Ordering::Relaxed);
        self.changes.send_modify(|number| *number += 1);
        rejections
    }

    /// Reports not ready from now on, and ends connections with the response under way.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.changes.send_modify(|number| *number += 1);
    }

    /// The same for connections that came in from outside the workload only.
    pub fn drain_inbound(&self) {
        self.draining_inbound.store(true, Ordering::Release);
        self.changes.send_modify(|number| *number += 1);
    }

    /// Are connections of this direction drained?
    pub fn is_draining(&self, direction: Direction) -> bool {
        self.draining.load(Ordering::Acquire)
            || (direction == Direction::Inbound && self.draining_inbound.load(Ordering::Acquire))
    }

    /// Closes listeners for good, those of `Direction::Inbound` or all. Their connections stay.
    pub fn stop_listeners(&self, inbound_only: bool) {
        let stage = if inbound_only {
            STOPPED_INBOUND
        } else {
            STOPPED_ALL
        };
        self.stopped.fetch_max(stage, Ordering::AcqRel);
        self.changes.send_modify(|number| *number += 1);
    }

    /// Are listeners of this direction closed for good?
    pub fn is_stopped(&self, direction: Direction) -> bool {
        match self.stopped.load(Ordering::Acquire) {
            0 => false,
            STOPPED_INBOUND => direction == Direction::Inbound,
            _ => true,
        }
    }

    /// Is it on its way out, in whole or in part?
    pub fn is_leaving(&self) -> bool {
        self.is_draining(Direction::Inbound) || self.is_stopped(Direction::Inbound)
    }

    /// Can traffic be taken? (`/healthz/ready`)
    pub fn is_ready(&self) -> bool {
        self.configured.load(Ordering::Acquire)
            && self.identified.load(Ordering::Acquire)
            && self.serving.load(Ordering::Acquire) >= self.options.concurrency
            && !self.is_leaving()
            && !self.failing.load(Ordering::Acquire)
    }
}

/// The effective uid, from /proc, so that no system call wrapper is needed here.
fn effective_uid() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .unwrap_or("");
    line.split_whitespace()
        .nth(1)
        .and_then(|uid| uid.parse().ok())
        .unwrap_or(u32::MAX)
}
