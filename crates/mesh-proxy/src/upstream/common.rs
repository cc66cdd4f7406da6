//! What all workers know together about a cluster: limits, counters, health of endpoints, the arranged endpoints. Locks here are taken when
//! something changes or is looked at, never on the way of a request.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use mesh_routing::cluster::{Cluster, ClusterConfig, Discovery, Dns, OutlierDetection};
use mesh_routing::endpoint::EndpointSet;
use mesh_routing::lb::{Balancer, LbConfig};
use tokio::sync::Notify;

use crate::upstream::breaker::Gauges;
use crate::upstream::counters::{ClusterShard, Counter, HostCounter, HostShard};
use crate::upstream::outlier::Monitor;

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What panicked while it held one of these locks left nothing half done that matters.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All clusters that are in use.
#[derive(Debug, Default)]
pub struct Upstreams(Mutex<Map<Arc<str>, Weak<Common>>>);

impl Upstreams {
    /// The shared state of a cluster; made where there is none.
    pub fn enter(&self, config: &ClusterConfig) -> Arc<Common> {
        let mut map = locked(&self.0);
        if let Some(known) = map.get(&config.name).and_then(Weak::upgrade) {
            return known;
        }
        map.retain(|_, common| common.strong_count() > 0);
        let made = Arc::new(Common::default());
        map.insert(config.name.clone(), Arc::downgrade(&made));
        made
    }

    /// The state of a cluster, where it is in use.
    pub fn find(&self, name: &str) -> Option<Arc<Common>> {
        locked(&self.0).get(name).and_then(Weak::upgrade)
    }
}

/// The shared state of one cluster.
#[derive(Debug, Default)]
pub struct Common {
    /// What is under way.
    pub gauges: Gauges,
    shards: Mutex<Vec<Arc<ClusterShard>>>,
    /// Counters of what belongs to no worker.
    pub(crate) own: ClusterShard,
    endpoints: Mutex<Map<SocketAddr, Weak<EndpointState>>>,
    /// Goes up when endpoints, or their health, are others than before.
    epoch: AtomicU64,
    arranged: Mutex<Arranged>,
    /// Only one detection at a time, so that not more are taken out than allowed.
    pub(crate) detecting: Mutex<()>,
    outlier: Mutex<Option<Arc<OutlierDetection>>>,
    pub(crate) watched: AtomicBool,
    dns: Mutex<Option<Arc<Dns>>>,
    pub(crate) resolving: AtomicBool,
    pub(crate) dns_changed: Notify,
}

#[derive(Debug, Default)]
struct Arranged {
    /// Of DNS clusters, what the lookups came to.
    resolved: Option<Arc<EndpointSet>>,
    balancer: Option<Arc<Balancer>>,
    lb: Option<LbConfig>,
    epoch: u64,
}

/// An endpoint as all workers see it.
#[derive(Debug)]
pub struct EndpointState {
    /// Where it is.
    pub address: SocketAddr,
    /// When it was added.
    pub added: Instant,
    /// Its failures.
    pub(crate) monitor: Monitor,
    shards: Mutex<Vec<Weak<HostShard>>>,
}

impl EndpointState {
    /// Counters for one more worker.
    pub fn shard(&self) -> Arc<HostShard> {
        let made = Arc::new(HostShard::default());
        let mut shards = locked(&self.shards);
        shards.retain(|shard| shard.strong_count() > 0);
        shards.push(Arc::downgrade(&made));
        made
    }

    /// The sum over all workers.
    pub fn total(&self, counter: HostCounter) -> u64 {
        let shards = locked(&self.shards);
        let values = shards.iter().filter_map(Weak::upgrade);
        values.fold(0, |sum, shard| sum.wrapping_add(shard.of(counter)))
    }
}

impl Common {
    /// Counters for one more worker.
    pub fn shard(&self) -> Arc<ClusterShard> {
        let made = Arc::new(ClusterShard::default());
        locked(&self.shards).push(made.clone());
        made
    }

    /// The sum over all workers.
    pub fn total(&self, counter: Counter) -> u64 {
        let shards = locked(&self.shards);
        shards.iter().fold(self.own.of(counter), |sum, shard| {
            sum.wrapping_add(shard.of(counter))
        })
    }

    /// An endpoint's state; made where there is none, or where `renewed` says that it is another endpoint than before.
    pub fn endpoint(&self, address: SocketAddr, renewed: bool) -> Arc<EndpointState> {
        let mut endpoints = locked(&self.endpoints);
        if let Some(known) = endpoints.get(&address).and_then(Weak::upgrade)
            && !renewed
        {
            return known;
        }
        if endpoints.len() == endpoints.capacity() {
            endpoints.retain(|_, endpoint| endpoint.strong_count() > 0);
        }
        let made = Arc::new(EndpointState {
            address,
            added: Instant::now(),
            monitor: Monitor::default(),
            shards: Mutex::default(),
        });
        endpoints.insert(address, Arc::downgrade(&made));
        made
    }

    /// An endpoint's state, where there is one.
    pub fn find(&self, address: &SocketAddr) -> Option<Arc<EndpointState>> {
        locked(&self.endpoints).get(address).and_then(Weak::upgrade)
    }

    /// All endpoints that have been used, of a cluster that has no set of them.
    pub fn destinations(&self) -> Vec<Arc<EndpointState>> {
        let endpoints = locked(&self.endpoints);
        endpoints.values().filter_map(Weak::upgrade).collect()
    }

    /// The endpoints of the last arrangement.
    pub(crate) fn members(&self) -> Vec<Arc<EndpointState>> {
        let set = locked(&self.arranged)
            .balancer
            .as_ref()
            .map(|b| b.set().clone());
        let Some(set) = set else { return Vec::new() };
        let endpoints = locked(&self.endpoints);
        let find = |e: &mesh_routing::endpoint::Endpoint| endpoints.get(&e.address)?.upgrade();
        set.endpoints().iter().filter_map(find).collect()
    }

    /// The number of the present endpoints and their health.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn changed(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// The endpoints of the cluster at this time.
    pub fn set(&self, cluster: &Cluster) -> Arc<EndpointSet> {
        match cluster.config.discovery {
            Discovery::Dns(_) => locked(&self.arranged).resolved.clone().unwrap_or_default(),
            _ => cluster.endpoints.clone(),
        }
    }

    /// Puts the answers of DNS in force, where they differ.
    pub(crate) fn set_resolved(&self, set: EndpointSet) {
        let mut arranged = locked(&self.arranged);
        if arranged.resolved.as_deref().is_some_and(|old| *old == set) {
            return;
        }
        arranged.resolved = Some(Arc::new(set));
        drop(arranged);
        self.changed();
    }

    /// The endpoints arranged for picking; worked out by whoever needs it first after a change.
    pub fn balancer(&self, set: &Arc<EndpointSet>, lb: &LbConfig) -> Arc<Balancer> {
        let mut arranged = locked(&self.arranged);
        let epoch = self.epoch();
        if let Some(balancer) = &arranged.balancer
            && arranged.epoch == epoch
            && Arc::ptr_eq(balancer.set(), set)
            && arranged.lb.as_ref() == Some(lb)
        {
            return balancer.clone();
        }
        let ejected: Vec<bool> = {
            let endpoints = locked(&self.endpoints);
            let state = |address| endpoints.get(address).and_then(Weak::upgrade);
            set.endpoints()
                .iter()
                .map(|e| state(&e.address).is_some_and(|s| s.monitor.is_ejected()))
                .collect()
        };
        let is_ejected = |i: usize| ejected.get(i).copied().unwrap_or(false);
        let balancer = Arc::new(Balancer::new(set.clone(), lb, is_ejected));
        arranged.balancer = Some(balancer.clone());
        arranged.lb = Some(lb.clone());
        arranged.epoch = epoch;
        balancer
    }

    /// Takes note of the configuration.
    pub fn configure(&self, config: &ClusterConfig) {
        let mut outlier = locked(&self.outlier);
        if outlier.as_deref() != config.outlier.as_ref() {
            *outlier = config.outlier.clone().map(Arc::new);
        }
        drop(outlier);
        let wanted = match &config.discovery {
            Discovery::Dns(dns) => Some(dns),
            _ => None,
        };
        let mut known = locked(&self.dns);
        if known.as_ref().map(Arc::as_ptr) != wanted.map(Arc::as_ptr) {
            *known = wanted.cloned();
            self.dns_changed.notify_one();
        }
    }

    pub(crate) fn outlier(&self) -> Option<Arc<OutlierDetection>> {
        locked(&self.outlier).clone()
    }

    pub(crate) fn dns(&self) -> Option<Arc<Dns>> {
        locked(&self.dns).clone()
    }
}
