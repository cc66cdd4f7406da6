//! From all resources to a snapshot.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster as PbCluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener as PbListener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;

use crate::cluster::{Cluster, ClusterConfig, Discovery};
use crate::endpoint::EndpointSet;
use crate::error::Result;
use crate::listener::Listener;
use crate::route::RouteTable;
use crate::tls::{self, SecretName};

/// Type URL of listeners.
pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
/// Type URL of route tables.
pub const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
/// Type URL of clusters.
pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
/// Type URL of endpoints.
pub const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// The resources as received, decoded. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct XdsState {
    /// LDS by name.
    pub listeners: BTreeMap<String, Arc<PbListener>>,
    /// RDS by name.
    pub routes: BTreeMap<String, Arc<RouteConfiguration>>,
    /// CDS by name.
    pub clusters: BTreeMap<String, Arc<PbCluster>>,
    /// EDS by name.
    pub endpoints: BTreeMap<String, Arc<ClusterLoadAssignment>>,
}

/// A resource that was not taken; the last good version of it, if any, stays in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Its type.
    pub type_url: &'static str,
    /// Its name.
    pub name: String,
    /// The field and what is wrong with it.
    pub message: String,
}

/// Compiled resources. Never changes; replaced whole.
#[derive(Debug, Default)]
pub struct Snapshot {
    listeners: BTreeMap<String, Entry<Listener, PbListener>>,
    routes: BTreeMap<String, Entry<RouteTable, RouteConfiguration>>,
    configs: BTreeMap<String, Entry<ClusterConfig, PbCluster>>,
    endpoints: BTreeMap<String, Entry<EndpointSet, ClusterLoadAssignment>>,
    by_address: Map<SocketAddr, Arc<Listener>>,
    tables: Map<Arc<str>, Arc<RouteTable>>,
    clusters: Map<Arc<str>, Cluster>,
    warming: Vec<String>,
}

/// A compiled resource beside the message it was made from, so that unchanged ones are not compiled again.
#[derive(Debug)]
struct Entry<T, R> {
    raw: Arc<R>,
    compiled: Arc<T>,
    /// Differs from the message only for endpoints, whose form depends on the cluster.
    variant: u32,
}

impl<T, R> Clone for Entry<T, R> {
    fn clone(&self) -> Self {
        Self {
            raw: self.raw.clone(),
            compiled: self.compiled.clone(),
            variant: self.variant,
        }
    }
}

/// Compiles all resources. What did not change since `previous` is shared with it. Bad resources are reported one by one, and their last
/// good version stays.
pub fn compile(state: &XdsState, previous: Option<&Snapshot>) -> (Snapshot, Vec<Rejection>) {
    let empty = Snapshot::default();
    let old = previous.unwrap_or(&empty);
    let mut rejections = Vec::new();
    let mut snapshot = Snapshot {
        listeners: compile_all(
            LISTENER,
            &state.listeners,
            &old.listeners,
            &mut rejections,
            |_| 0,
            |m, _| Listener::compile(m),
        ),
        routes: compile_all(
            ROUTE,
            &state.routes,
            &old.routes,
            &mut rejections,
            |_| 0,
            |m, _| RouteTable::compile(m),
        ),
        configs: compile_all(
            CLUSTER,
            &state.clusters,
            &old.configs,
            &mut rejections,
            |_| 0,
            |m, _| ClusterConfig::compile(m),
        ),
        ..Snapshot::default()
    };
    snapshot.endpoints = compile_all(
        ENDPOINTS,
        &state.endpoints,
        &old.endpoints,
        &mut rejections,
        |_| 0,
        |m, _| EndpointSet::compile(m),
    );
    snapshot.warm(old);
    snapshot.index();
    (snapshot, rejections)
}

fn compile_all<T, R>(
    type_url: &'static str,
    wanted: &BTreeMap<String, Arc<R>>,
    old: &BTreeMap<String, Entry<T, R>>,
    rejections: &mut Vec<Rejection>,
    variant: impl Fn(&str) -> u32,
    compile: impl Fn(&R, u32) -> Result<T>,
) -> BTreeMap<String, Entry<T, R>> {
    let mut all = BTreeMap::new();
    for (name, raw) in wanted {
        let variant = variant(name);
        let kept = old.get(name);
        if let Some(entry) = kept.filter(|e| Arc::ptr_eq(&e.raw, raw) && e.variant == variant) {
            all.insert(name.clone(), entry.clone());
            continue;
        }
        match compile(raw, variant) {
            Ok(compiled) => {
                all.insert(
                    name.clone(),
                    Entry {
                        raw: raw.clone(),
                        compiled: Arc::new(compiled),
                        variant,
                    },
                );
            }
            Err(error) => {
                rejections.push(Rejection {
                    type_url,
                    name: name.clone(),
                    message: error.to_string(),
                });
                if let Some(entry) = kept {
                    all.insert(name.clone(), entry.clone());
                }
            }
        }
    }
    all
}

impl Snapshot {
    /// Listeners whose route tables have not arrived stay as they were, or out, until they have (Envoy's warming): LDS comes before RDS.
    fn warm(&mut self, old: &Snapshot) {
        let waits = |entry: &Entry<Listener, PbListener>, routes: &BTreeMap<String, _>| {
            entry
                .compiled
                .route_names()
                .any(|name| !routes.contains_key(name))
        };
        let waiting: Vec<String> = self
            .listeners
            .iter()
            .filter(|(_, entry)| waits(entry, &self.routes))
            .map(|(name, _)| name.clone())
            .collect();
        for name in &waiting {
            match old
                .listeners
                .get(name)
                .filter(|entry| !waits(entry, &self.routes))
            {
                Some(entry) => self.listeners.insert(name.clone(), entry.clone()),
                None => self.listeners.remove(name),
            };
        }
        self.warming = waiting;
    }

    /// Listeners that wait for their route tables.
    pub fn warming(&self) -> &[String] {
        &self.warming
    }

    fn index(&mut self) {
        for entry in self.listeners.values() {
            self.by_address
                .insert(entry.compiled.address, entry.compiled.clone());
        }
        for entry in self.routes.values() {
            self.tables
                .insert(entry.compiled.name.clone(), entry.compiled.clone());
        }
        let none = Arc::new(EndpointSet::default());
        for entry in self.configs.values() {
            let config = entry.compiled.clone();
            let endpoints = match &config.discovery {
                Discovery::Eds(service) => self
                    .endpoints
                    .get(&**service)
                    .map_or_else(|| none.clone(), |e| e.compiled.clone()),
                Discovery::Static(set) => set.clone(),
                Discovery::OriginalDestination(_) | Discovery::Dns(_) => none.clone(),
            };
            self.clusters
                .insert(config.name.clone(), Cluster { config, endpoints });
        }
    }

    /// All listeners by name.
    pub fn listeners(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners.values().map(|entry| &entry.compiled)
    }

    /// The listener of this name.
    pub fn listener(&self, name: &str) -> Option<&Arc<Listener>> {
        self.listeners.get(name).map(|entry| &entry.compiled)
    }

    /// The listener that takes a connection to `destination` which `accepted` got: the one of that very address, else the one of the port
    /// on all addresses, else `accepted` itself. Other listeners with sockets of their own take part too, as in Envoy.
    pub fn hand_over<'a>(
        &'a self,
        accepted: &'a Arc<Listener>,
        destination: SocketAddr,
    ) -> &'a Arc<Listener> {
        if !accepted.use_original_dst {
            return accepted;
        }
        let any: IpAddr = match destination.ip() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let exact = self.by_address.get(&destination);
        exact
            .or_else(|| {
                self.by_address
                    .get(&SocketAddr::new(any, destination.port()))
            })
            .unwrap_or(accepted)
    }

    /// The route table of this name.
    pub fn routes(&self, name: &str) -> Option<&Arc<RouteTable>> {
        self.tables.get(name)
    }

    /// The cluster of this name.
    pub fn cluster(&self, name: &str) -> Option<&Cluster> {
        self.clusters.get(name)
    }

    /// All clusters.
    pub fn clusters(&self) -> impl Iterator<Item = &Cluster> {
        self.clusters.values()
    }

    /// The secrets that listeners and clusters name.
    pub fn secrets(&self) -> BTreeSet<SecretName> {
        let mut names = BTreeSet::new();
        for listener in self.listeners() {
            let contexts = listener.chains().filter_map(|chain| chain.tls.as_ref());
            tls::gather(contexts.flat_map(|tls| tls.secrets()), &mut names);
        }
        for cluster in self.clusters() {
            tls::gather(cluster.config.transports.secrets(), &mut names);
        }
        names
    }

    /// The messages in force (also those of older versions that stayed because the newer one was refused).
    pub fn state(&self) -> XdsState {
        fn raw<T, R>(entries: &BTreeMap<String, Entry<T, R>>) -> BTreeMap<String, Arc<R>> {
            entries
                .iter()
                .map(|(name, entry)| (name.clone(), entry.raw.clone()))
                .collect()
        }
        XdsState {
            listeners: raw(&self.listeners),
            routes: raw(&self.routes),
            clusters: raw(&self.configs),
            endpoints: raw(&self.endpoints),
        }
    }
}
