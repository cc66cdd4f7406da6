//! What a worker keeps for a cluster beside the snapshot: the turn, the endpoints' pools, the metrics.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use mesh_routing::cluster::{Cluster, ClusterConfig, Discovery};
use mesh_routing::endpoint::EndpointSet;
use mesh_routing::lb::{self, Turn};

use crate::pool::Host;
use crate::report::{Peers, Reports};
use crate::shared::Shared;

/// Endpoints of one ORIGINAL_DST cluster that are remembered; beyond, unused ones are forgotten first.
const MOST_DESTINATIONS: usize = 10_000;

/// The state of one cluster on one worker.
pub struct ClusterState {
    turn: Turn,
    /// All endpoints that have been used or are in the set.
    hosts: RefCell<HashMap<SocketAddr, Rc<Host>, foldhash::fast::RandomState>>,
    /// The hosts in the order of an endpoint set.
    aligned: RefCell<(Arc<EndpointSet>, Vec<Rc<Host>>)>,
    config: RefCell<Arc<ClusterConfig>>,
    reports: RefCell<Rc<Reports>>,
}

impl ClusterState {
    /// For a cluster that is used for the first time.
    pub fn new(cluster: &Cluster, shared: &Shared) -> Self {
        let reports = Reports::new(
            &shared.metrics,
            &shared.identity.peer,
            Some(&cluster.config),
        );
        Self {
            turn: Turn::default(),
            hosts: RefCell::default(),
            aligned: RefCell::default(),
            config: RefCell::new(cluster.config.clone()),
            reports: RefCell::new(Rc::new(reports)),
        }
    }

    /// Its metrics.
    pub fn reports(&self) -> Rc<Reports> {
        self.reports.borrow().clone()
    }

    /// Takes note of a new version of the cluster: labels follow the service, endpoints that are gone are forgotten.
    pub fn update(&self, cluster: &Cluster, shared: &Shared, peers: &Peers) {
        if self.config.borrow().service != cluster.config.service {
            let reports = Reports::new(
                &shared.metrics,
                &shared.identity.peer,
                Some(&cluster.config),
            );
            self.reports.replace(Rc::new(reports));
        }
        self.config.replace(cluster.config.clone());
        self.align(&cluster.endpoints, peers);
        if !matches!(cluster.config.discovery, Discovery::OriginalDestination(_)) {
            let aligned = self.aligned.borrow();
            let known = |address: &SocketAddr| aligned.1.iter().any(|h| h.address == *address);
            self.hosts.borrow_mut().retain(|address, _| known(address));
        }
    }

    fn align(&self, set: &Arc<EndpointSet>, peers: &Peers) {
        if Arc::ptr_eq(&self.aligned.borrow().0, set) {
            return;
        }
        let mut hosts = self.hosts.borrow_mut();
        let mut order = Vec::with_capacity(set.endpoints().len());
        for endpoint in set.endpoints() {
            let peer = peers.of_workload(&endpoint.workload);
            let host = hosts
                .entry(endpoint.address)
                .or_insert_with(|| Rc::new(Host::new(endpoint.address, peer.clone())));
            if !Arc::ptr_eq(&host.peer, &peer) {
                // Another workload has got the address: nothing of the old one may be used.
                *host = Rc::new(Host::new(endpoint.address, peer));
            }
            order.push(host.clone());
        }
        drop(hosts);
        self.aligned.replace((set.clone(), order));
    }

    /// An endpoint for a request; `None` where none is usable. `destination` is where the connection was going. Endpoints in `tried`
    /// are passed over up to `avoid` times.
    pub fn pick(
        &self,
        cluster: &Cluster,
        destination: Option<SocketAddr>,
        peers: &Peers,
        mut random: impl FnMut() -> u64,
        tried: &[SocketAddr],
        avoid: u32,
    ) -> Option<Rc<Host>> {
        if let Discovery::OriginalDestination(port) = cluster.config.discovery {
            let mut address = destination?;
            address.set_port(port.unwrap_or(address.port()));
            return Some(self.destination_host(address, peers));
        }
        self.align(&cluster.endpoints, peers);
        let aligned = self.aligned.borrow();
        let active = |i: usize| aligned.1.get(i).map_or(u32::MAX, |h| h.active.get());
        let mut left = if tried.is_empty() { 0 } else { avoid };
        loop {
            let index = lb::pick(
                &cluster.endpoints,
                cluster.config.policy,
                &self.turn,
                &mut random,
                active,
            )?;
            let host = aligned.1.get(index)?;
            if left == 0 || !tried.contains(&host.address) {
                return Some(host.clone());
            }
            left -= 1;
        }
    }

    fn destination_host(&self, address: SocketAddr, peers: &Peers) -> Rc<Host> {
        let mut hosts = self.hosts.borrow_mut();
        if hosts.len() >= MOST_DESTINATIONS {
            hosts.retain(|_, host| !host.is_unused());
        }
        hosts
            .entry(address)
            .or_insert_with(|| Rc::new(Host::new(address, peers.unknown().clone())))
            .clone()
    }

    /// Closes what has been unused for too long.
    pub fn sweep(&self) {
        let config = self.config.borrow().clone();
        let mut hosts = self.hosts.borrow_mut();
        hosts
            .values()
            .for_each(|host| host.sweep(config.idle_timeout));
        if matches!(config.discovery, Discovery::OriginalDestination(_)) {
            hosts.retain(|_, host| !host.is_unused());
        }
    }
}
