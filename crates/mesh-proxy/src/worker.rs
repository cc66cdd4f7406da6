//! A worker: one thread with its own runtime, listeners, connections and upstream pools.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_net::sockets::{ListenOptions, listen};
use mesh_routing::Snapshot;
use mesh_routing::chain::NetworkFilter;
use mesh_routing::cluster::{Cluster, Discovery};
use mesh_routing::listener::Direction;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::clock;
use crate::filter::jwt;
use crate::listener::tenure::Tenancy;
use crate::listener::{self, Downstream};
use crate::report::{Peers, Reports};
use crate::shared::Shared;
use crate::upstream::ClusterState;

/// A wait after accepting failed (as with too many open files), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The state of a worker. Everything in it belongs to its thread.
pub struct Worker {
    /// What all threads share.
    pub shared: Arc<Shared>,
    /// TLS handshakes with clients that are under way.
    pub handshakes: Rc<Cell<u32>>,
    /// Peers by what they say.
    pub peers: Peers,
    /// Metrics of requests that reach no cluster.
    pub unrouted: Rc<Reports>,
    snapshot: RefCell<Arc<Snapshot>>,
    clusters: RefCell<HashMap<Arc<str>, Rc<ClusterState>, foldhash::fast::RandomState>>,
    connections: RefCell<Vec<Weak<Downstream>>>,
    tenancies: RefCell<Vec<Weak<Tenancy>>>,
    /// By address, and whether connections to any address are taken.
    open: RefCell<HashMap<(SocketAddr, bool), JoinHandle<()>>>,
    seed: Cell<u64>,
}

impl Worker {
    /// A worker without listeners.
    pub fn new(shared: Arc<Shared>) -> Rc<Self> {
        Rc::new(Self {
            handshakes: Rc::default(),
            peers: Peers::default(),
            unrouted: Rc::new(Reports::new(&shared.metrics, &shared.identity.peer, None)),
            snapshot: RefCell::new(shared.snapshot()),
            clusters: RefCell::default(),
            connections: RefCell::default(),
            tenancies: RefCell::default(),
            open: RefCell::default(),
            seed: Cell::new(rand::random::<u64>() | 1),
            shared,
        })
    }

    /// The snapshot in force.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    /// A random number (xorshift64*): good enough for balancing, and without a system call.
    pub fn random(&self) -> u64 {
        let mut x = self.seed.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.seed.set(x);
        x.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// The state of a cluster.
    pub fn cluster_state(&self, cluster: &Cluster) -> Rc<ClusterState> {
        if let Some(state) = self.clusters.borrow().get(&cluster.config.name) {
            return state.clone();
        }
        // The newest version, also for a request that began on an older snapshot: the state lives on.
        let snapshot = self.snapshot();
        let newest = snapshot.cluster(&cluster.config.name).unwrap_or(cluster);
        let state = ClusterState::new(newest, &self.shared, &self.peers, self.random());
        let state = Rc::new(state);
        self.clusters
            .borrow_mut()
            .insert(cluster.config.name.clone(), state.clone());
        state
    }

    /// Runs until the proxy drains and the last connection is gone, or for ever.
    pub async fn run(self: Rc<Self>, mut changes: watch::Receiver<u64>) {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        self.take_snapshot();
        self.fetch_keys();
        let mut failed = self.sync_listeners();
        self.shared
            .serving
            .fetch_add(usize::from(!failed), Ordering::AcqRel);
        let mut counted = !failed;
        let mut drained = None;
        loop {
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.take_snapshot();
                    self.fetch_keys();
                    failed = self.sync_listeners();
                }
                _ = second.tick() => {
                    self.sweep();
                    if failed {
                        failed = self.sync_listeners();
                    }
                }
            }
            if self.shared.is_draining(Direction::Inbound) {
                // Draining all begins anew where only what comes in was drained before.
                let all = self.shared.is_draining(Direction::Outbound);
                let began = match drained {
                    Some((before, began)) if before == all => began,
                    _ => clock::now(),
                };
                drained = Some((all, began));
                self.drain_connections(began);
            }
            if counted == failed {
                counted = !failed;
                match counted {
                    true => self.shared.serving.fetch_add(1, Ordering::AcqRel),
                    false => self.shared.serving.fetch_sub(1, Ordering::AcqRel),
                };
            }
        }
    }

    fn take_snapshot(&self) {
        let snapshot = self.shared.snapshot();
        let mut clusters = self.clusters.borrow_mut();
        clusters.retain(|name, state| {
            let kept = snapshot.cluster(name).is_some();
            if !kept {
                state.retire();
            }
            kept
        });
        for (name, state) in clusters.iter() {
            if let Some(cluster) = snapshot.cluster(name) {
                state.update(cluster, &self.shared, &self.peers);
            }
        }
        drop(clusters);
        let before = self.snapshot.replace(snapshot.clone());
        if !snapshot.has_listeners_of(&before) {
            self.settle(&snapshot);
        }
        // Names are looked up before the first request.
        let named = |c: &&Cluster| matches!(c.config.discovery, Discovery::Dns(_));
        for cluster in snapshot.clusters().filter(named) {
            self.cluster_state(cluster);
        }
    }

    /// Tells what earlier listeners have let in.
    fn settle(&self, snapshot: &Snapshot) {
        let connections = self.connections.borrow();
        let known = connections.iter().filter_map(Weak::upgrade);
        known.for_each(|connection| connection.settle(snapshot));
        let drain = self.shared.options.drain;
        let tenancies = self.tenancies.borrow();
        let known = tenancies.iter().filter_map(Weak::upgrade);
        known.for_each(|tenancy| tenancy.settle(snapshot, drain));
    }

    /// Fetches keys of token providers that are not to wait for a request.
    fn fetch_keys(self: &Rc<Self>) {
        let snapshot = self.snapshot();
        let chains = snapshot.listeners().flat_map(|listener| listener.chains());
        let providers = chains.filter_map(|chain| match &chain.filter {
            NetworkFilter::Http(manager) => Some(manager.filters.fetched_ahead()),
            NetworkFilter::Tcp(_) => None,
        });
        jwt::keys::fetch_ahead(self, providers.flatten());
    }

    /// Opens and closes sockets so that they are those of the snapshot. Connections stay. True if one could not be opened.
    fn sync_listeners(self: &Rc<Self>) -> bool {
        let snapshot = self.snapshot();
        let wanted: Vec<(SocketAddr, bool)> = snapshot
            .listeners()
            .filter(|l| l.bind && !self.shared.is_stopped(l.direction))
            .map(|l| (l.address, l.transparent))
            .collect();
        let mut open = self.open.borrow_mut();
        open.retain(|socket, task| {
            let keep = wanted.contains(socket) && !task.is_finished();
            if !keep {
                task.abort();
            }
            keep
        });
        let mut failed = false;
        for (address, transparent) in wanted {
            if open.contains_key(&(address, transparent)) {
                continue;
            }
            match self.open_listener(address, transparent) {
                Ok(task) => {
                    open.insert((address, transparent), task);
                }
                Err(error) => {
                    failed = true;
                    tracing::error!(%address, error, "cannot listen; trying again every second");
                }
            }
        }
        failed
    }

    fn open_listener(
        self: &Rc<Self>,
        address: SocketAddr,
        transparent: bool,
    ) -> Result<JoinHandle<()>, String> {
        let options = ListenOptions {
            reuse_port: true,
            transparent,
            ..ListenOptions::default()
        };
        let socket = listen(address, options).map_err(|error| error.to_string())?;
        let socket = TcpListener::from_std(socket).map_err(|error| error.to_string())?;
        Ok(tokio::task::spawn_local(
            self.clone().accept(socket, address),
        ))
    }

    async fn accept(self: Rc<Self>, socket: TcpListener, address: SocketAddr) {
        loop {
            match socket.accept().await {
                Ok((stream, peer)) => {
                    let worker = self.clone();
                    tokio::task::spawn_local(listener::serve(worker, stream, peer, address));
                }
                Err(error) => {
                    tracing::warn!(%address, %error, "accepting a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Adds a connection to those that the sweep looks after.
    pub fn watch_over(&self, connection: &Rc<Downstream>) {
        self.connections
            .borrow_mut()
            .push(Rc::downgrade(connection));
    }

    /// The same for bytes that are not judged again.
    pub fn watch_over_bytes(&self, tenancy: &Rc<Tenancy>) {
        self.tenancies.borrow_mut().push(Rc::downgrade(tenancy));
    }

    fn sweep(&self) {
        clock::step();
        self.tenancies
            .borrow_mut()
            .retain(|tenancy| match tenancy.upgrade() {
                Some(tenancy) => {
                    tenancy.check();
                    true
                }
                None => false,
            });
        self.connections
            .borrow_mut()
            .retain(|connection| match connection.upgrade() {
                Some(connection) => {
                    connection.check_timeouts();
                    true
                }
                None => false,
            });
        let states: Vec<_> = self.clusters.borrow().values().cloned().collect();
        states.iter().for_each(|state| state.sweep());
    }

    /// Asks all connections to end as soon as no request can be lost.
    fn drain_connections(&self, began: u32) {
        self.connections
            .borrow()
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|connection| self.shared.is_draining(connection.direction))
            .for_each(|connection| connection.drain(began));
    }
}
