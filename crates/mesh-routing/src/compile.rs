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
use crate::regex;
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
    /// Bytes that its regular expressions take.
    regexes: usize,
}

impl<T, R> Clone for Entry<T, R> {
    fn clone(&self) -> Self {
        Self {
            raw: self.raw.clone(),
            compiled: self.compiled.clone(),
            regexes: self.regexes,
        }
    }
}

/// Compiles all resources. What did not change since `previous` is shared with it. Bad resources are reported one by one, and their last
/// good version stays.
pub fn compile(state: &XdsState, previous: Option<&Snapshot>) -> (Snapshot, Vec<Rejection>) {
    compile_within(regex::MOST_TOGETHER, state, previous)
}

/// The same with a limit on what regular expressions may take, in bytes.
fn compile_within(
    most: usize,
    state: &XdsState,
    previous: Option<&Snapshot>,
) -> (Snapshot, Vec<Rejection>) {
    let empty = Snapshot::default();
    let old = previous.unwrap_or(&empty);
    let mut rejections = Vec::new();
    let kept = kept_regexes(&state.listeners, &old.listeners)
        + kept_regexes(&state.routes, &old.routes)
        + kept_regexes(&state.clusters, &old.configs);
    let mut budget = most.saturating_sub(kept);
    let mut all = Compiler {
        budget: &mut budget,
        rejections: &mut rejections,
    };
    let mut snapshot = Snapshot {
        listeners: all.of(
            LISTENER,
            &state.listeners,
            &old.listeners,
            Listener::compile,
        ),
        routes: all.of(ROUTE, &state.routes, &old.routes, RouteTable::compile),
        configs: all.of(
            CLUSTER,
            &state.clusters,
            &old.configs,
            ClusterConfig::compile,
        ),
        endpoints: all.of(
            ENDPOINTS,
            &state.endpoints,
            &old.endpoints,
            EndpointSet::compile,
        ),
        ..Snapshot::default()
    };
    snapshot.warm(old);
    snapshot.index();
    (snapshot, rejections)
}

/// What the expressions of resources take that did not change.
fn kept_regexes<T, R>(
    wanted: &BTreeMap<String, Arc<R>>,
    old: &BTreeMap<String, Entry<T, R>>,
) -> usize {
    let entries = wanted.iter().filter_map(|(name, raw)| {
        old.get(name)
            .filter(|entry| Arc::ptr_eq(&entry.raw, raw))
            .map(|entry| entry.regexes)
    });
    entries.sum()
}

/// What the compilation of one snapshot shares among its resources.
struct Compiler<'a> {
    /// Bytes that regular expressions may still take.
    budget: &'a mut usize,
    rejections: &'a mut Vec<Rejection>,
}

impl Compiler<'_> {
    fn of<T, R>(
        &mut self,
        type_url: &'static str,
        wanted: &BTreeMap<String, Arc<R>>,
        old: &BTreeMap<String, Entry<T, R>>,
        compile: impl Fn(&R) -> Result<T>,
    ) -> BTreeMap<String, Entry<T, R>> {
        let mut all = BTreeMap::new();
        for (name, raw) in wanted {
            let kept = old.get(name);
            if let Some(entry) = kept.filter(|entry| Arc::ptr_eq(&entry.raw, raw)) {
                all.insert(name.clone(), entry.clone());
                continue;
            }
            match regex::within_budget(*self.budget, || compile(raw)) {
                (Ok(compiled), regexes) => {
                    *self.budget -= regexes.min(*self.budget);
                    let entry = Entry {
                        raw: raw.clone(),
                        compiled: Arc::new(compiled),
                        regexes,
                    };
                    all.insert(name.clone(), entry);
                }
                (Err(error), _) => {
                    self.rejections.push(Rejection {
                        type_url,
                        name: name.clone(),
                        message: error.to_string(),
                    });
                    if let Some(entry) = kept {
                        *self.budget -= entry.regexes.min(*self.budget);
                        all.insert(name.clone(), entry.clone());
                    }
                }
            }
        }
        all
    }
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

    /// Are all listeners those of the other snapshot, unchanged?
    pub fn has_listeners_of(&self, other: &Snapshot) -> bool {
        let mut both = self.listeners().zip(other.listeners());
        self.listeners.len() == other.listeners.len() && both.all(|(a, b)| Arc::ptr_eq(a, b))
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

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::route::v3 as pb;
    use envoy_types::pb::envoy::r#type::matcher::v3::RegexMatcher;

    use super::*;

    fn table(name: &str, pattern: &str) -> Arc<RouteConfiguration> {
        let matcher = RegexMatcher {
            regex: pattern.to_owned(),
            ..RegexMatcher::default()
        };
        let path = pb::route_match::PathSpecifier::SafeRegex(matcher);
        let route = pb::Route {
            r#match: Some(pb::RouteMatch {
                path_specifier: Some(path),
                ..pb::RouteMatch::default()
            }),
            action: Some(pb::route::Action::DirectResponse(
                pb::DirectResponseAction {
                    status: 200,
                    ..pb::DirectResponseAction::default()
                },
            )),
            ..pb::Route::default()
        };
        // The same expression for many hosts counts once.
        let host = |i: usize| pb::VirtualHost {
            name: i.to_string(),
            domains: vec![i.to_string()],
            routes: vec![route.clone()],
            ..pb::VirtualHost::default()
        };
        Arc::new(RouteConfiguration {
            name: name.to_owned(),
            virtual_hosts: (0..20).map(host).collect(),
            ..RouteConfiguration::default()
        })
    }

    #[test]
    fn expressions_that_take_too_much_together_are_refused_and_the_rest_stays() {
        let mut state = XdsState::default();
        state
            .routes
            .insert("a".to_owned(), table("a", "/[a-z]{40}"));
        let (first, rejections) = compile(&state, None);
        assert_eq!(rejections, []);
        let taken = first.routes["a"].regexes;
        assert!(taken > 0);

        let most = taken * 3 / 2;
        state
            .routes
            .insert("b".to_owned(), table("b", "/[b-z]{40}"));
        let (second, rejections) = compile_within(most, &state, Some(&first));
        assert_eq!(rejections.len(), 1);
        assert_eq!(rejections[0].name, "b");
        let message = &rejections[0].message;
        assert!(
            message.starts_with("virtual_hosts[0]") && message.contains("/[b-z]{40}"),
            "{message}"
        );
        assert!(second.routes("a").is_some() && second.routes("b").is_none());

        // Where the first one is gone there is room.
        state.routes.remove("a");
        let (third, rejections) = compile_within(most, &state, Some(&second));
        assert_eq!(rejections, []);
        assert!(third.routes("b").is_some());
    }
}
