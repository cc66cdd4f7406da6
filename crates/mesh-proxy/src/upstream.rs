//! Clusters as one worker uses them: which endpoint, its pool, the metrics. What workers know together is in [`common`].

pub mod breaker;
pub mod common;
pub mod counters;
mod dns;
mod outlier;
mod resolver;
mod window;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mesh_routing::cluster::{
    Breakers, Cluster, ClusterConfig, Discovery, OutlierDetection, Traits,
};
use mesh_routing::endpoint::EndpointSet;
use mesh_routing::lb::{Balancer, Cursor, Load, Wanted};

use crate::pool::Host;
use crate::report::{Peers, Reports};
use crate::shared::Shared;
use breaker::{Gauge, Held, counts_requests};
use common::{Common, EndpointState};
use counters::{ClusterShard, Counter, HostCounter};
use outlier::Outcome;

pub(crate) use outlier::Outcome as ConnectOutcome;

/// Endpoints of one ORIGINAL_DST cluster that are remembered; beyond, unused ones are forgotten first.
const MOST_DESTINATIONS: usize = 10_000;

/// What is looked for in an endpoint.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish<'a> {
    /// Where the connection was going, for clusters that follow it.
    pub destination: Option<SocketAddr>,
    /// The request's hash, for consistent hashing.
    pub hash: Option<u64>,
    /// Endpoints that were tried already.
    pub tried: &'a [SocketAddr],
    /// How often one of these may be refused (`host_selection_retry_max_attempts` with the predicate `previous_hosts`).
    pub avoid: u32,
    /// Priorities of the endpoints that were tried, where these are to be avoided (`previous_priorities`).
    pub tried_priorities: &'a [u32],
    /// But only after every so many tries; 0 is off.
    pub update_frequency: u32,
}

impl<'a> Wish<'a> {
    /// The priorities of the tries up to the last full round.
    fn avoided_priorities(&self) -> &'a [u32] {
        let tries = self.tried_priorities.len();
        match tries.checked_rem(self.update_frequency as usize) {
            Some(rest) => self
                .tried_priorities
                .get(..tries - rest)
                .unwrap_or_default(),
            None => &[],
        }
    }
}

/// What came of a try on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observation {
    /// Response headers.
    Response {
        /// Their status.
        status: u16,
        /// What outlier detection takes it for: of a gRPC answer without body the HTTP status that stands for its status.
        judged: u16,
    },
    /// The connection or stream broke before response headers.
    Reset,
    /// No response headers within the time of the try.
    TryTimeout,
    /// No response headers within the time of the request.
    Timeout,
}

/// What a cluster's endpoints have in common on a worker.
#[derive(Debug)]
pub struct Core {
    /// The part of all workers.
    pub common: Arc<Common>,
    /// This worker's counters.
    pub counters: Arc<ClusterShard>,
    limits: Cell<Breakers>,
    outlier: RefCell<Option<Rc<OutlierDetection>>>,
}

impl Core {
    fn new(config: &ClusterConfig, shared: &Shared) -> Rc<Self> {
        let common = shared.upstreams.enter(config);
        let core = Self {
            counters: common.shard(),
            common,
            limits: Cell::new(config.breakers),
            outlier: RefCell::default(),
        };
        core.configure(config);
        Rc::new(core)
    }

    fn configure(&self, config: &ClusterConfig) {
        self.limits.set(config.breakers);
        self.common.configure(config);
        *self.outlier.borrow_mut() = config.outlier.clone().map(Rc::new);
        let common = &self.common;
        if config.outlier.is_some() && !common.watched.swap(true, Ordering::AcqRel) {
            tokio::task::spawn_local(outlier::watch(Arc::downgrade(common)));
        }
        if matches!(config.discovery, Discovery::Dns(_))
            && !common.resolving.swap(true, Ordering::AcqRel)
        {
            tokio::task::spawn_local(dns::keep_resolved(
                Arc::downgrade(common),
                config.name.clone(),
            ));
        }
    }

    fn refused<T>(&self, counter: Counter) -> Option<T> {
        self.counters.inc(counter);
        None
    }

    /// A connection more; `None` above the limit. `always`: an endpoint without any gets one in any case, as in Envoy.
    pub(crate) fn begin_connection(&self, always: bool) -> Option<Held> {
        let held = Held::within(
            &self.common,
            Gauge::Connections,
            self.limits.get().connections,
        );
        if held.is_some() {
            return held;
        }
        self.counters.inc(Counter::CxOverflow);
        always.then(|| Held::beyond(&self.common, Gauge::Connections))
    }

    /// A request that has to wait for a connection; `None` above the limit.
    pub(crate) fn begin_pending(self: &Rc<Self>) -> Option<Pending> {
        match Held::within(&self.common, Gauge::Pending, self.limits.get().pending) {
            Some(held) => {
                self.counters.inc(Counter::PendingTotal);
                self.counters.inc(Counter::PendingActive);
                Some(Pending {
                    core: self.clone(),
                    _held: held,
                })
            }
            None => self.refused(Counter::PendingOverflow),
        }
    }

    /// A request under way; `None` above the limit. `Some(None)`: there is none.
    pub(crate) fn begin_request(&self) -> Option<Option<Held>> {
        let limits = self.limits.get();
        if !counts_requests(&limits) {
            return Some(None);
        }
        match Held::within(&self.common, Gauge::Requests, limits.requests) {
            Some(held) => {
                self.common.gauges.note_request(&limits);
                Some(Some(held))
            }
            None => self.refused(Counter::PendingOverflow),
        }
    }

    pub(crate) fn observe(&self, endpoint: &EndpointState, outcome: Outcome) {
        if let Some(config) = &*self.outlier.borrow() {
            outlier::observe(&self.common, endpoint, config, outcome);
        }
    }
}

/// A request that waits.
#[derive(Debug)]
pub struct Pending {
    core: Rc<Core>,
    _held: Held,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.core.counters.dec(Counter::PendingActive);
    }
}

/// A retry under way; over when dropped.
#[derive(Debug)]
pub struct RetryGuard(#[expect(dead_code, reason = "its end is what counts")] Held);

/// The state of one cluster on one worker.
pub struct ClusterState {
    core: Rc<Core>,
    cursor: Cursor,
    /// All endpoints that have been used or are in the set.
    hosts: RefCell<HashMap<SocketAddr, Rc<Host>, foldhash::fast::RandomState>>,
    aligned: RefCell<Aligned>,
    cluster: RefCell<Cluster>,
    reports: RefCell<Rc<Reports>>,
}

/// The hosts in the order of the balancer's endpoints.
#[derive(Default)]
struct Aligned {
    epoch: u64,
    balancer: Option<Arc<Balancer>>,
    hosts: Vec<Rc<Host>>,
    /// When the last of them was added.
    newest: Option<Instant>,
}

/// What the balancer asks about the endpoints.
struct Present<'a> {
    hosts: &'a [Rc<Host>],
    warming: bool,
}

impl Load for Present<'_> {
    fn active(&self, index: usize) -> u32 {
        self.hosts.get(index).map_or(u32::MAX, |h| h.active.get())
    }

    fn age(&self, index: usize) -> Duration {
        self.hosts
            .get(index)
            .map_or(Duration::MAX, |h| h.endpoint.added.elapsed())
    }

    fn warming(&self) -> bool {
        self.warming
    }
}

impl ClusterState {
    /// For a cluster that is used for the first time.
    pub fn new(cluster: &Cluster, shared: &Shared, peers: &Peers, start: u64) -> Self {
        let reports = Reports::new(
            &shared.metrics,
            &shared.identity.peer,
            Some(&cluster.config),
        );
        let state = Self {
            core: Core::new(&cluster.config, shared),
            cursor: Cursor::starting_at(start),
            hosts: RefCell::default(),
            aligned: RefCell::default(),
            cluster: RefCell::new(cluster.clone()),
            reports: RefCell::new(Rc::new(reports)),
        };
        state.align(peers);
        state
    }

    /// Its metrics.
    pub fn reports(&self) -> Rc<Reports> {
        self.reports.borrow().clone()
    }

    /// One more of what the caller counts.
    pub fn count(&self, counter: Counter) {
        self.core.counters.inc(counter);
    }

    /// Leave to try once more; `None` above the limit.
    pub fn admit_retry(&self) -> Option<RetryGuard> {
        let common = &self.core.common;
        let limit = common.gauges.retry_limit(&self.core.limits.get());
        match Held::within(common, Gauge::Retries, limit) {
            Some(held) => {
                self.core.counters.inc(Counter::RqRetry);
                Some(RetryGuard(held))
            }
            None => self.core.refused(Counter::RqRetryOverflow),
        }
    }

    /// Takes note of a new version of the cluster: labels follow the service, endpoints that are gone are forgotten (what runs on their
    /// connections ends in peace, unused connections are closed). Connections stay, unless what they were made with is another now.
    pub fn update(&self, cluster: &Cluster, shared: &Shared, peers: &Peers) {
        let old = self.cluster.replace(cluster.clone());
        if Arc::ptr_eq(&old.config, &cluster.config)
            && Arc::ptr_eq(&old.endpoints, &cluster.endpoints)
        {
            return;
        }
        if old.config.service != cluster.config.service {
            let reports = Reports::new(
                &shared.metrics,
                &shared.identity.peer,
                Some(&cluster.config),
            );
            self.reports.replace(Rc::new(reports));
        }
        self.core.configure(&cluster.config);
        let same_transports = old.config.transports.is_equal(&cluster.config.transports);
        if connection_settings(&old.config) != connection_settings(&cluster.config)
            || !same_transports
        {
            self.retire();
        }
        if matches!(cluster.config.discovery, Discovery::OriginalDestination(_)) {
            let transport = cluster.config.transports.of(&Traits::default());
            let hosts = self.hosts.borrow();
            hosts.values().for_each(|host| host.protect(transport));
        }
        self.align(peers);
    }

    /// The cluster is gone: unused connections are closed, others with what runs on them.
    pub fn retire(&self) {
        let hosts = self.hosts.borrow();
        hosts.values().for_each(|host| host.retire_connections());
    }

    /// Arranges the endpoints anew.
    fn align(&self, peers: &Peers) {
        let cluster = self.cluster.borrow().clone();
        if matches!(cluster.config.discovery, Discovery::OriginalDestination(_)) {
            return;
        }
        let common = &self.core.common;
        // Before the set is taken: what changes meanwhile is seen by the next pick.
        let epoch = common.epoch();
        let set = common.set(&cluster);
        let hosts = self.hosts_of(&set, peers);
        let balancer = common.balancer(&set, &cluster.config.lb);
        self.cursor.renew();
        self.aligned.replace(Aligned {
            epoch,
            newest: hosts.iter().map(|host| host.endpoint.added).max(),
            balancer: Some(balancer),
            hosts,
        });
    }

    fn hosts_of(&self, set: &EndpointSet, peers: &Peers) -> Vec<Rc<Host>> {
        let config = self.cluster.borrow().config.clone();
        let transports = &config.transports;
        let mut known = self.hosts.borrow_mut();
        let mut kept = HashMap::with_capacity_and_hasher(
            set.endpoints().len(),
            foldhash::fast::RandomState::default(),
        );
        let mut order = Vec::with_capacity(set.endpoints().len());
        for endpoint in set.endpoints() {
            let peer = peers.of_workload(&endpoint.workload);
            let host = match known.remove(&endpoint.address) {
                Some(host) if Arc::ptr_eq(&host.peer, &peer) => host,
                // Another workload has got the address: nothing of the old one may be used.
                other => {
                    let renewed = other.is_some();
                    if let Some(old) = other {
                        old.retire_connections();
                    }
                    Rc::new(Host::new(&self.core, endpoint.address, peer, renewed))
                }
            };
            host.describe(&endpoint.hostname, endpoint.priority);
            host.protect(transports.of(&endpoint.traits));
            kept.insert(endpoint.address, host.clone());
            order.push(host);
        }
        for gone in std::mem::replace(&mut *known, kept).into_values() {
            // Not by dropping it: what still runs there holds on to it.
            gone.retire_connections();
        }
        order
    }

    /// An endpoint for a request; `None` where none is usable.
    pub fn pick(
        &self,
        wish: &Wish<'_>,
        peers: &Peers,
        mut random: impl FnMut() -> u64,
    ) -> Option<Rc<Host>> {
        let discovery = match &self.cluster.borrow().config.discovery {
            Discovery::OriginalDestination(port) => Some(*port),
            _ => None,
        };
        if let Some(port) = discovery {
            let mut address = wish.destination?;
            address.set_port(port.unwrap_or(address.port()));
            return Some(self.destination_host(address, peers));
        }
        if self.aligned.borrow().epoch != self.core.common.epoch() {
            self.align(peers);
        }
        let aligned = self.aligned.borrow();
        let balancer = aligned.balancer.as_ref()?;
        let present = Present {
            hosts: &aligned.hosts,
            warming: self.is_warming(&aligned),
        };
        let mut wanted = Wanted {
            hash: wish.hash,
            attempt: 0,
            avoided_priorities: wish.avoided_priorities(),
        };
        let most = if wish.tried.is_empty() { 0 } else { wish.avoid };
        loop {
            let picked = balancer.pick(&self.cursor, &wanted, &mut random, &present);
            let Some(host) = picked.and_then(|index| aligned.hosts.get(index)) else {
                self.core.counters.inc(Counter::NoneHealthy);
                return None;
            };
            if wanted.attempt == most || !wish.tried.contains(&host.address) {
                if balancer.in_panic() {
                    self.core.counters.inc(Counter::LbPanic);
                }
                return Some(host.clone());
            }
            wanted.attempt += 1;
        }
    }

    fn is_warming(&self, aligned: &Aligned) -> bool {
        let slow_start = self.cluster.borrow().config.lb.policy.slow_start();
        match (slow_start, aligned.newest) {
            (Some(slow), Some(newest)) => newest.elapsed() < slow.window,
            _ => false,
        }
    }

    fn destination_host(&self, address: SocketAddr, peers: &Peers) -> Rc<Host> {
        let mut hosts = self.hosts.borrow_mut();
        if hosts.len() >= MOST_DESTINATIONS {
            hosts.retain(|_, host| !host.is_unused());
        }
        hosts
            .entry(address)
            .or_insert_with(|| {
                let unknown = peers.unknown().clone();
                let host = Host::new(&self.core, address, unknown, false);
                host.protect(
                    self.cluster
                        .borrow()
                        .config
                        .transports
                        .of(&Traits::default()),
                );
                Rc::new(host)
            })
            .clone()
    }

    /// Closes what has been unused for too long.
    pub fn sweep(&self) {
        let config = self.cluster.borrow().config.clone();
        let mut hosts = self.hosts.borrow_mut();
        hosts.values().for_each(|host| host.sweep(&config));
        if matches!(config.discovery, Discovery::OriginalDestination(_)) {
            hosts.retain(|_, host| !host.is_unused());
        }
    }
}

/// What connections are made with.
fn connection_settings(config: &ClusterConfig) -> impl PartialEq + use<> {
    (
        config.protocol,
        config.http2,
        config.bind_source,
        config.keepalive,
    )
}

impl Host {
    /// To be called once for every try that got a connection: counts, and lets outlier detection know.
    pub fn observe(&self, what: Observation) {
        let core = &self.core;
        let outcome = match what {
            Observation::Response { status, judged } => {
                core.counters.inc(Counter::RqCompleted);
                match status / 100 {
                    2 => core.counters.inc(Counter::Rq2xx),
                    3 => core.counters.inc(Counter::Rq3xx),
                    4 => core.counters.inc(Counter::Rq4xx),
                    5 => core.counters.inc(Counter::Rq5xx),
                    _ => {}
                }
                self.counters.inc(match status {
                    500..=599 => HostCounter::RqError,
                    _ => HostCounter::RqSuccess,
                });
                Outcome::Status(judged)
            }
            Observation::Reset => {
                core.counters.inc(Counter::RqRxReset);
                self.counters.inc(HostCounter::RqError);
                Outcome::Failed
            }
            Observation::TryTimeout | Observation::Timeout => {
                core.counters.inc(match what {
                    Observation::TryTimeout => Counter::RqPerTryTimeout,
                    _ => Counter::RqTimeout,
                });
                self.counters.inc(HostCounter::RqTimeout);
                self.counters.inc(HostCounter::RqError);
                Outcome::TimedOut
            }
        };
        core.observe(&self.endpoint, outcome);
    }

    /// The endpoint has opened a tunnel.
    pub(crate) fn observe_tunnel(&self) {
        self.observe_connect(Outcome::ConnectedFinal);
    }

    pub(crate) fn observe_connect(&self, outcome: Outcome) {
        self.core.observe(&self.endpoint, outcome);
    }
}
