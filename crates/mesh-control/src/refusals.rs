//! What proxies refused, by the objects that it was made from, so that it stands where its author looks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::Metadata;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::google::protobuf::value::Kind;
use mesh_model::{ObjectKey, Problem};
use mesh_xds::types;
use prost::Message;
use tokio::sync::watch;

/// What stands in a status of one proxy and resource at most, in bytes: messages of proxies may hold whole configurations.
const MAX_MESSAGE: usize = 512;

/// Why a proxy does not do what an object says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Refusal {
    /// Kind, name and namespace of the proxy, such as `sidecar reviews-v1.default`.
    pub(crate) node: String,
    /// The resource or the field, and the reason.
    pub(crate) message: String,
}

/// By object.
pub(crate) type Refusals = BTreeMap<ObjectKey, BTreeSet<Refusal>>;

/// What one stream refuses, by subject (a type, or patches).
type Subjects = BTreeMap<String, Vec<(ObjectKey, Refusal)>>;

/// Refusals of all connected proxies; clones share them.
#[derive(Clone)]
pub(crate) struct Board {
    by_stream: Arc<Mutex<BTreeMap<u64, Subjects>>>,
    changes: watch::Sender<u64>,
}

impl Board {
    pub(crate) fn new() -> Self {
        Self {
            by_stream: Arc::default(),
            changes: watch::Sender::new(0),
        }
    }

    /// Tells of every change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Everything that is refused at the moment.
    pub(crate) fn all(&self) -> Refusals {
        let mut all = Refusals::new();
        let by_stream = self.lock();
        let found = by_stream.values().flat_map(BTreeMap::values).flatten();
        for (object, refusal) in found {
            all.entry(object.clone())
                .or_default()
                .insert(refusal.clone());
        }
        all
    }

    /// Replaces what a stream refuses of one subject (a type, or patches).
    pub(crate) fn set(&self, stream: u64, subject: &str, refusals: Vec<(ObjectKey, Refusal)>) {
        let mut by_stream = self.lock();
        let changed = if refusals.is_empty() {
            by_stream
                .get_mut(&stream)
                .and_then(|subjects| subjects.remove(subject))
                .is_some()
        } else {
            let subjects = by_stream.entry(stream).or_default();
            let before = subjects.insert(subject.to_owned(), refusals.clone());
            before.as_ref() != Some(&refusals)
        };
        drop(by_stream);
        if changed {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// Forgets a stream.
    pub(crate) fn remove(&self, stream: u64) {
        let removed = self.lock().remove(&stream);
        if removed.is_some_and(|subjects| !subjects.is_empty()) {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// A panic elsewhere must not take the statuses with it.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Subjects>> {
        self.by_stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A patch that could not be applied for a node.
pub(crate) fn of_patch(node: &str, problem: &Problem) -> (ObjectKey, Refusal) {
    let refusal = Refusal {
        node: node.to_owned(),
        message: shortened(&format!("{}: {}", problem.field, problem.message)),
    };
    (problem.object.clone(), refusal)
}

/// A secret that a proxy does not get.
pub(crate) fn of_secret(node: &str, name: &str, reason: &str) -> Refusal {
    Refusal {
        node: node.to_owned(),
        message: shortened(&format!("secret {name}: {reason}")),
    }
}

/// A resource that a proxy refused, for each object that it was made from: those named in its metadata, and the EnvoyFilters that changed it.
pub(crate) fn of_resource(
    node: &str,
    type_url: &str,
    name: &str,
    message: &str,
    body: &[u8],
    patched_by: Option<&BTreeSet<ObjectKey>>,
) -> Vec<(ObjectKey, Refusal)> {
    let mut objects: BTreeSet<ObjectKey> = sources(type_url, body, message);
    objects.extend(patched_by.into_iter().flatten().cloned());
    let refusal = Refusal {
        node: node.to_owned(),
        message: shortened(&format!("{} {name}: {message}", word(type_url))),
    };
    objects
        .into_iter()
        .map(|object| (object, refusal.clone()))
        .collect()
}

fn word(type_url: &str) -> &'static str {
    match type_url {
        types::CLUSTER => "cluster",
        types::LISTENER => "listener",
        types::ROUTE => "route table",
        types::ENDPOINT => "endpoints of",
        _ => "resource",
    }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_MESSAGE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The objects that a resource names as its sources, under `istio.config` of its metadata.
fn sources(type_url: &str, body: &[u8], message: &str) -> BTreeSet<ObjectKey> {
    let found: Vec<Option<ObjectKey>> = match type_url {
        types::CLUSTER => Cluster::decode(body)
            .map(|cluster| vec![source(cluster.metadata.as_ref())])
            .unwrap_or_default(),
        types::LISTENER => Listener::decode(body)
            .map(|listener| listener_sources(&listener))
            .unwrap_or_default(),
        types::ROUTE => RouteConfiguration::decode(body)
            .map(|table| route_sources(&table, message))
            .unwrap_or_default(),
        _ => Vec::new(),
    };
    found.into_iter().flatten().collect()
}

/// Those of the listener and of all its filter chains, which rules for TCP and TLS make.
fn listener_sources(listener: &Listener) -> Vec<Option<ObjectKey>> {
    let chains = listener.filter_chains.iter();
    let chains = chains.chain(&listener.default_filter_chain);
    std::iter::once(listener.metadata.as_ref())
        .chain(chains.map(|chain| chain.metadata.as_ref()))
        .map(source)
        .collect()
}

/// The object of the route that the message names (`virtual_hosts[1].routes[0]`, as our proxy says it), else those of all routes.
fn route_sources(table: &RouteConfiguration, message: &str) -> Vec<Option<ObjectKey>> {
    let of_host = |host: usize| {
        let host = table.virtual_hosts.get(host);
        let routes = host.into_iter().flat_map(|host| &host.routes);
        routes
            .map(|route| source(route.metadata.as_ref()))
            .collect()
    };
    match (index(message, "virtual_hosts["), index(message, "routes[")) {
        (Some(host), Some(route)) => {
            let all: Vec<Option<ObjectKey>> = of_host(host);
            all.into_iter().skip(route).take(1).collect()
        }
        (Some(host), None) => of_host(host),
        _ => (0..table.virtual_hosts.len()).flat_map(of_host).collect(),
    }
}

fn index(message: &str, before: &str) -> Option<usize> {
    let (_, rest) = message.split_once(before)?;
    rest.split(']').next()?.parse().ok()
}

fn source(metadata: Option<&Metadata>) -> Option<ObjectKey> {
    let value = metadata?
        .filter_metadata
        .get("istio")?
        .fields
        .get("config")?;
    match &value.kind {
        Some(Kind::StringValue(path)) => object(path),
        _ => None,
    }
}

/// The object of a path `/apis/GROUP/VERSION/namespaces/NAMESPACE/virtual-service/NAME`, as Istio refers to objects.
fn object(path: &str) -> Option<ObjectKey> {
    let mut parts = path.split('/').skip(4);
    let (Some("namespaces"), Some(namespace), Some(kind), Some(name)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let wanted: String = kind.split('-').collect();
    let info = mesh_api::KINDS
        .iter()
        .find(|info| info.kind.eq_ignore_ascii_case(&wanted))?;
    Some(ObjectKey::new(info.kind, namespace, name))
}

#[cfg(test)]
mod tests {
    use mesh_xds::json::from_json;
    use serde_json::json;

    use super::*;

    fn config(kind: &str, name: &str) -> serde_json::Value {
        let path = format!("/apis/networking.istio.io/v1alpha3/namespaces/default/{kind}/{name}");
        json!({"filter_metadata": {"istio": {"config": path}}})
    }

    #[test]
    fn a_refused_route_blames_its_rule_and_the_patches() {
        let table = json!({
            "name": "9080",
            "virtual_hosts": [
                {"name": "a", "domains": ["a"], "routes": [{"metadata": config("virtual-service", "a")}]},
                {"name": "b", "domains": ["b"], "routes": [{"metadata": config("virtual-service", "b")}, {}]},
            ],
        });
        let body = from_json(types::ROUTE, &table).unwrap();
        let objects = |message: &str| -> Vec<String> {
            of_resource(
                "sidecar x.default",
                types::ROUTE,
                "9080",
                message,
                &body,
                None,
            )
            .into_iter()
            .map(|(object, _)| object.name)
            .collect()
        };
        assert_eq!(objects("no idea"), ["a", "b"]);
        assert_eq!(objects("virtual_hosts[1].routes[0].match: bad"), ["b"]);
        assert!(objects("virtual_hosts[1].routes[1].match: bad").is_empty());
        let filter = ObjectKey::new("EnvoyFilter", "default", "f");
        let patched = BTreeSet::from([filter.clone()]);
        let found = of_resource("n", types::LISTENER, "l", "x", &[], Some(&patched));
        assert_eq!(found[0].0, filter);
        assert_eq!(found[0].1.message, "listener l: x");
    }

    #[test]
    fn a_refused_cluster_blames_its_destination_rule() {
        let cluster = json!({"name": "c", "metadata": config("destination-rule", "reviews")});
        let body = from_json(types::CLUSTER, &cluster).unwrap();
        let found = of_resource("n", types::CLUSTER, "c", "x", &body, None);
        assert_eq!(
            found[0].0,
            ObjectKey::new("DestinationRule", "default", "reviews")
        );
    }

    #[test]
    fn the_board_forgets_what_is_mended() {
        let board = Board::new();
        let changes = board.changes();
        let key = ObjectKey::new("EnvoyFilter", "default", "f");
        let refusal = Refusal {
            node: "n".to_owned(),
            message: "m".to_owned(),
        };
        board.set(1, "a", vec![(key.clone(), refusal.clone())]);
        board.set(2, "a", vec![(key.clone(), refusal.clone())]);
        assert_eq!(board.all()[&key].len(), 1);
        let before = *changes.borrow();
        board.set(1, "a", vec![(key.clone(), refusal)]);
        assert_eq!(*changes.borrow(), before, "nothing new");
        board.set(1, "a", Vec::new());
        board.remove(2);
        assert!(board.all().is_empty());
    }

    #[test]
    fn long_messages_are_cut() {
        assert_eq!(shortened(&"é".repeat(600)).chars().count(), MAX_MESSAGE + 1);
    }
}
