//! What all threads of a proxy share. Nothing here is locked on the way of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_routing::listener::Direction;
use mesh_routing::{Rejection, Snapshot, XdsState, compile};
use mesh_telemetry::IstioMetrics;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::dns::DnsCounters;
use crate::dns::names::Names;
use crate::node::Identity;
use crate::options::{ProxyOptions, Role};
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
    /// Set when the draining began ahead of the signal to end ([`Shared::drain_ahead`]).
    drained_ahead: AtomicBool,
    /// Listeners that take no more connections, whatever the configuration says ([`Shared::stop_listeners`]).
    stopped: AtomicU8,
    /// Set by `POST /healthcheck/fail`.
    pub failing: AtomicBool,
    /// CDS and LDS have arrived (or were kept from an earlier run).
    pub configured: AtomicBool,
    /// There is a valid certificate, or none is needed.
    pub identified: AtomicBool,
    /// Names of the mesh, for the application's DNS queries; `None` before the control plane has sent them.
    pub names: ArcSwapOption<Names>,
    /// DNS queries.
    pub dns: DnsCounters,
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
        let dns = DnsCounters::default();
        if options.dns.is_some() {
            dns.register(&mut registry);
        }
        // Under TPROXY the proxy is root, for its capability, and its group is what capture goes by.
        let exempt_by_owner = ["Uid:", "Gid:"]
            .iter()
            .any(|field| effective_id(field) == mesh_net::sockets::PROXY_UID);
        Arc::new(Self {
            identity: Identity::new(&options),
            identified: AtomicBool::new(options.identity.is_none()),
            certificate_expiry,
            names: ArcSwapOption::empty(),
            dns,
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
            drained_ahead: AtomicBool::new(false),
            stopped: AtomicU8::new(0),
            failing: AtomicBool::new(false),
            configured: AtomicBool::new(false),
            serving: AtomicUsize::new(0),
            mark: (!exempt_by_owner && mesh_net::sockets::may_mark())
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

    /// What Istio's agent does for `POST /drain`, the hook that a pod's end begins with: a sidecar drains what comes in, and the application
    /// may go on calling others until it has ended; a gateway drains everything. Listeners stay open.
    pub fn drain_ahead(&self) {
        self.drained_ahead.store(true, Ordering::Release);
        match self.options.role {
            Role::Sidecar => self.drain_inbound(),
            Role::Router => self.drain(),
        }
    }

    /// Has [`Shared::drain_ahead`] been called?
    pub fn is_drained_ahead(&self) -> bool {
        self.drained_ahead.load(Ordering::Acquire)
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

    /// Are names of the mesh known, where the application's DNS queries depend on them?
    pub fn knows_names(&self) -> bool {
        self.options.dns.is_none() || self.names.load().is_some()
    }

    /// Can traffic be taken? (`/healthz/ready`)
    pub fn is_ready(&self) -> bool {
        self.configured.load(Ordering::Acquire)
            && self.knows_names()
            && self.identified.load(Ordering::Acquire)
            && self.serving.load(Ordering::Acquire) >= self.options.concurrency
            && !self.is_leaving()
            && !self.failing.load(Ordering::Acquire)
    }
}

/// The effective uid or gid, from /proc, so that no system call wrapper is needed here.
fn effective_id(field: &str) -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap_or("");
    line.split_whitespace()
        .nth(1)
        .and_then(|id| id.parse().ok())
        .unwrap_or(u32::MAX)
}
