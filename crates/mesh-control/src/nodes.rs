//! Connected proxies: what each gets, and how it takes it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use envoy_types::pb::google::protobuf::{Struct, Value as Wire, value::Kind};
use mesh_identity::spiffe::{SpiffeError, SpiffeId};
use mesh_model::{NodeKind, ObjectKey};
use mesh_translate::{Resources, translate};
use mesh_xds::json::{self, Naming};
use mesh_xds::resources::ByName;
use mesh_xds::{
    Caller, Connection, NodeSource, Rejection, Report, Resource, ResourceSet, StreamEvent, types,
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Status};

use crate::Options;
use crate::auth::{Authenticator, Refusal};
use crate::ca::Held;
use crate::ca::rotation::waiting::{self, Said};
use crate::metrics::{Connected, Metrics};
use crate::publish::{Newest, Published};
use crate::refusals::{self, Board};
use crate::secrets::Secrets;

/// What a node's failed patches stand under, beside the types that it refused.
const PATCHES: &str = "patches";
/// What secrets that it can't have stand under.
const SECRETS: &str = "secrets";
/// Where a node says what it trusts, and under which root its certificate is.
pub(crate) const TRUST: &str = "TRUST";
/// Depth of a node's metadata; deeper is cut off.
const MAX_DEPTH: usize = 16;

/// All connected proxies; clones share them.
#[derive(Clone)]
pub(crate) struct Nodes {
    newest: Newest,
    metrics: Arc<Metrics>,
    table: Arc<Mutex<BTreeMap<u64, Arc<Entry>>>>,
    next: Arc<AtomicU64>,
    refusals: Board,
    gate: Gate,
    secrets: Secrets,
    /// Translations at a time: as many as there are processors, so that the others find the newest mesh when their turn comes.
    turns: Arc<Semaphore>,
    /// Those of whom nobody knows who they are have one turn among them: they must not keep the others waiting.
    unproven_turns: Arc<Semaphore>,
}

/// One stream of one proxy.
struct Entry {
    number: u64,
    node: mesh_model::Node,
    /// Who that is, where it could be proven: what is secret is for these alone.
    identity: Option<SpiffeId>,
    /// Name and uid of the pod that its token is bound to.
    pod: Option<(String, String)>,
    peer: Option<SocketAddr>,
    connected: jiff::Timestamp,
    state: Mutex<EntryState>,
}

#[derive(Default)]
struct EntryState {
    set: Option<Arc<ResourceSet>>,
    patched_by: PatchedBy,
    /// The configuration names secrets of the cluster.
    uses_secrets: bool,
    /// When the oldest change in the present set was seen; taken when it is sent.
    since: Option<Instant>,
    types: BTreeMap<String, TypeStatus>,
}

/// EnvoyFilters that changed a resource, by its type URL and name.
type PatchedBy = BTreeMap<(&'static str, String), BTreeSet<ObjectKey>>;

/// How one type stands on a stream.
#[derive(Clone, Default, Serialize)]
struct TypeStatus {
    nonce_sent: String,
    nonce_acked: String,
    version_sent: String,
    version_acked: String,
    /// Refused by the last answer.
    rejected: BTreeMap<String, String>,
    error: String,
}

impl Entry {
    /// Refused resources by the objects that they were made from.
    fn blamed(&self, state: &EntryState, type_url: &str) -> Vec<(ObjectKey, refusals::Refusal)> {
        let node = described(&self.node);
        let known = state.set.as_ref().and_then(|set| set.of_type(type_url));
        let mut blamed = Vec::new();
        let rejected = state.types.get(type_url).map(|status| &status.rejected);
        for (name, message) in rejected.into_iter().flatten() {
            let body = known.and_then(|by_name| by_name.get(name));
            let body = body.map_or(&[][..], |resource| resource.value.as_ref());
            let patched = state.patched_by.iter();
            let patched = patched
                .filter(|((of_type, of_name), _)| *of_type == type_url && of_name == name)
                .map(|(_, objects)| objects)
                .next();
            blamed.extend(refusals::of_resource(
                &node, type_url, name, message, body, patched,
            ));
        }
        blamed
    }
}

impl EntryState {
    /// Forgets refusals of resources that the node is not given any more; the types that this changed.
    fn forget_gone(&mut self) -> Vec<String> {
        let set = self.set.as_ref();
        let mut changed = Vec::new();
        for (type_url, status) in &mut self.types {
            let present = set.and_then(|set| set.of_type(type_url));
            let before = status.rejected.len();
            status
                .rejected
                .retain(|name, _| present.is_some_and(|by_name| by_name.contains_key(name)));
            if status.rejected.len() != before {
                if status.rejected.is_empty() {
                    status.error.clear();
                }
                changed.push(type_url.clone());
            }
        }
        changed
    }
}

impl TypeStatus {
    /// Notes that resources were answered: what a client refused before of others, it still refuses. True if that changed what is refused.
    fn take(&mut self, names: &[String]) -> bool {
        let before = self.rejected.len();
        self.rejected.retain(|name, _| !names.contains(name));
        if self.rejected.is_empty() {
            self.error.clear();
        }
        self.rejected.len() != before
    }

    /// Istio's words.
    fn word(&self) -> &'static str {
        if self.nonce_sent.is_empty() {
            "NOT SENT"
        } else if !self.error.is_empty() {
            "NACK"
        } else if self.nonce_sent == self.nonce_acked {
            "SYNCED"
        } else {
            "STALE"
        }
    }
}

impl Nodes {
    pub(crate) fn new(
        newest: Newest,
        metrics: Arc<Metrics>,
        refusals: Board,
        gate: Gate,
        secrets: Secrets,
    ) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            newest,
            metrics,
            table: Arc::default(),
            next: Arc::default(),
            refusals,
            gate,
            secrets,
            turns: Arc::new(Semaphore::new(processors)),
            unproven_turns: Arc::new(Semaphore::new(1)),
        }
    }

    /// `/debug/syncz`, in the shape of Istio's.
    pub(crate) fn syncz(&self) -> Value {
        self.entries()
            .iter()
            .map(|entry| {
                let state = lock(&entry.state);
                let mut object = json!({
                    "proxy": proxy_id(&entry.node),
                    "proxy_type": kind_name(entry.node.kind),
                    "cluster_id": entry.node.cluster_id(),
                    "istio_version": entry.node.version,
                });
                for (type_url, prefix) in [
                    (types::CLUSTER, "cluster"),
                    (types::LISTENER, "listener"),
                    (types::ROUTE, "route"),
                    (types::ENDPOINT, "endpoint"),
                ] {
                    let status = state.types.get(type_url).cloned().unwrap_or_default();
                    object[format!("{prefix}_sent")] = json!(status.nonce_sent);
                    object[format!("{prefix}_acked")] = json!(status.nonce_acked);
                    object[format!("{prefix}_status")] = json!(status.word());
                }
                object
            })
            .collect()
    }

    /// `/debug/adsz`: every stream with all that is known of it.
    pub(crate) fn adsz(&self) -> Value {
        let clients: Vec<Value> = self
            .entries()
            .iter()
            .map(|entry| {
                let state = lock(&entry.state);
                let by_type: BTreeMap<&str, Value> = state
                    .types
                    .iter()
                    .map(|(type_url, status)| {
                        let resources = state
                            .set
                            .as_ref()
                            .and_then(|set| set.of_type(type_url))
                            .map_or(0, |by_name| by_name.len());
                        let mut value = json!(status);
                        value["status"] = json!(status.word());
                        value["resources"] = json!(resources);
                        (types::short_name(type_url), value)
                    })
                    .collect();
                json!({
                    "connectionId": entry.node.id,
                    "connectedAt": entry.connected.to_string(),
                    "address": entry.peer.map(|peer| peer.to_string()),
                    "labels": entry.node.labels,
                    "stockEnvoy": entry.node.stock_envoy,
                    "identity": entry.identity.as_ref().map(ToString::to_string),
                    "trust": entry.node.metadata[TRUST],
                    "watches": by_type,
                })
            })
            .collect();
        json!({ "totalClients": clients.len(), "clients": clients })
    }

    /// `/debug/config_dump`: what a proxy (`pod.namespace`) was given, as Envoy would show it.
    pub(crate) fn config_dump(&self, proxy: &str) -> Option<Value> {
        let entry = self
            .entries()
            .into_iter()
            .rfind(|entry| proxy_id(&entry.node) == proxy)?;
        let set = lock(&entry.state).set.clone().unwrap_or_default();
        let _held = json::Descriptors::hold();
        let mut configs = Vec::new();
        for type_url in types::PUSH_ORDER {
            for resource in set
                .of_type(type_url)
                .into_iter()
                .flat_map(|by_name| by_name.values())
            {
                let shown = if type_url == types::SECRET {
                    // Keys are for the proxy's eyes only.
                    json!({ "name": resource.name })
                } else {
                    json::any_to_json(&resource.type_url, &resource.value, Naming::Proto)
                        .unwrap_or_else(|error| json!({ "error": error.to_string() }))
                };
                configs.push(json!({
                    "name": resource.name,
                    "version_info": resource.version,
                    "type": types::short_name(type_url),
                    "resource": shown,
                }));
            }
        }
        Some(json!({ "proxy": proxy, "configs": configs }))
    }

    /// How far the authenticated proxies say they are with a change of the root, the oldest stream first.
    pub(crate) fn trust_said(&self, held: &Held) -> Vec<Said> {
        let said = |entry: Arc<Entry>| {
            let identity = entry.identity.clone()?;
            Some(Said {
                done: waiting::is_done(held.phase, &entry.node.metadata[TRUST], held),
                identity,
                claims: entry.node.name.clone(),
                bound: entry.pod.clone(),
                address: entry.peer.map(|peer| peer.ip().to_canonical()),
            })
        };
        self.entries().into_iter().filter_map(said).collect()
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.table).values().cloned().collect()
    }
}

/// Who is let in on the secure port.
#[derive(Clone)]
pub(crate) struct Gate {
    authenticator: Arc<Authenticator>,
    required: bool,
    check_node: bool,
}

impl Gate {
    pub(crate) fn new(options: &Options, authenticator: Arc<Authenticator>) -> Self {
        Self {
            authenticator,
            required: options.xds_auth,
            check_node: options.xds_identity_check,
        }
    }
}

impl NodeSource for Nodes {
    async fn authenticate(
        &self,
        metadata: &MetadataMap,
        extensions: &Extensions,
    ) -> Result<Option<Caller>, Status> {
        if !Authenticator::is_secure(extensions) {
            return Ok(None);
        }
        let gate = &self.gate;
        match gate
            .authenticator
            .identify(metadata, extensions, false)
            .await
        {
            Ok(identified) => Ok(Some(identified.into())),
            Err(Refusal::Nothing) if !gate.required => Ok(None),
            Err(refusal) => {
                tracing::warn!(%refusal, "discovery stream refused");
                self.metrics.xds_refused("authentication");
                Err(refusal.into())
            }
        }
    }

    fn connect(
        &self,
        node: mesh_xds::Node,
        peer: Option<SocketAddr>,
    ) -> Result<Connection, Status> {
        Ok(self.open(read_node(node)?, peer, None, None))
    }

    fn connect_as(
        &self,
        node: mesh_xds::Node,
        peer: Option<SocketAddr>,
        caller: Caller,
    ) -> Result<Connection, Status> {
        let node = read_node(node)?;
        let identity: SpiffeId = caller
            .identity
            .parse()
            .map_err(|error: SpiffeError| Status::unauthenticated(error.to_string()))?;
        let account = node.metadata["SERVICE_ACCOUNT"].as_str();
        let same = identity.namespace == node.namespace
            && account.is_none_or(|account| account == identity.service_account);
        if self.gate.check_node && !same {
            let text = format!(
                "the node {} says that it is {}/{}, its credentials are those of {identity}",
                node.id,
                node.namespace,
                account.unwrap_or_default()
            );
            tracing::warn!(?peer, "discovery stream refused: {text}");
            self.metrics.xds_refused("identity");
            return Err(Status::permission_denied(text));
        }
        // What the token says of its pod was confirmed by the cluster; what the node says is only said.
        let other = caller.pod.as_ref().filter(|(pod, _)| *pod != node.name);
        if let Some((pod, _)) = other.filter(|_| self.gate.check_node) {
            let text = format!(
                "the node {} says that it is pod {}, its token is bound to pod {pod}",
                node.id, node.name
            );
            tracing::warn!(?peer, "discovery stream refused: {text}");
            self.metrics.xds_refused("pod");
            return Err(Status::permission_denied(text));
        }
        Ok(self.open(node, peer, Some(identity), caller.pod))
    }
}

fn read_node(node: mesh_xds::Node) -> Result<mesh_model::Node, Status> {
    let metadata = node
        .metadata
        .map_or(Value::Null, |metadata| from_struct(metadata, 0));
    mesh_model::Node::from_xds_id(&node.id, &metadata)
        .map_err(|error| Status::invalid_argument(error.to_string()))
}

impl Nodes {
    fn open(
        &self,
        node: mesh_model::Node,
        peer: Option<SocketAddr>,
        identity: Option<SpiffeId>,
        pod: Option<(String, String)>,
    ) -> Connection {
        let shown = identity.as_ref().map(ToString::to_string);
        tracing::info!(node = node.id, ?peer, identity = shown, "proxy connected");
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Entry {
            number,
            node,
            identity,
            pod,
            peer,
            connected: jiff::Timestamp::now(),
            state: Mutex::default(),
        });
        lock(&self.table).insert(number, Arc::clone(&entry));
        let (sender, sets) = watch::channel(None);
        let turns = match entry.identity {
            Some(_) => &self.turns,
            None => &self.unproven_turns,
        };
        tokio::spawn(feed(
            self.newest.clone(),
            Arc::clone(&entry),
            sender,
            Arc::clone(turns),
            self.refusals.clone(),
            self.secrets.clone(),
        ));
        Connection {
            sets,
            report: Box::new(Reporter {
                entry,
                metrics: Arc::clone(&self.metrics),
                refusals: self.refusals.clone(),
                _connected: self.metrics.node_connected(),
                _place: Place {
                    table: Arc::clone(&self.table),
                    refusals: self.refusals.clone(),
                    secrets: self.secrets.clone(),
                    number,
                },
            }),
        }
    }
}

/// Translates every new mesh for one node, until its stream ends.
async fn feed(
    mut newest: Newest,
    entry: Arc<Entry>,
    sets: watch::Sender<Option<Arc<ResourceSet>>>,
    turns: Arc<Semaphore>,
    refusals: Board,
    secrets: Secrets,
) {
    let mut changed_secrets = secrets.changes();
    loop {
        changed_secrets.mark_unchanged();
        let published = newest.borrow_and_update().clone();
        if let Some(published) = published {
            let Ok(_turn) = turns.acquire().await else {
                return;
            };
            push(published, &entry, &sets, &refusals, &secrets).await;
            if sets.is_closed() {
                // The stream ended meanwhile, and nobody else would take away what stands there for it.
                refusals.remove(entry.number);
                secrets.forget(entry.number);
            }
        }
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            // Only those proxies that use some are looked at again.
            Ok(()) = changed_secrets.changed(), if lock(&entry.state).uses_secrets => {}
            () = sets.closed() => return,
        }
    }
}

async fn push(
    published: Arc<Published>,
    entry: &Arc<Entry>,
    sets: &watch::Sender<Option<Arc<ResourceSet>>>,
    refusals: &Board,
    secrets: &Secrets,
) {
    let since = published.since;
    let previous = lock(&entry.state).set.clone();
    let translated = {
        let (entry, previous) = (Arc::clone(entry), previous.clone());
        tokio::task::spawn_blocking(move || {
            let resources = translate(&published.mesh, &entry.node);
            for note in &resources.notes {
                tracing::warn!(node = entry.node.id, note, "not translated");
            }
            let node = described(&entry.node);
            let failed = resources.problems.iter();
            let failed = failed
                .map(|problem| refusals::of_patch(&node, problem))
                .collect();
            let names = resources.secrets.clone();
            let (set, patched_by) = to_set(resources);
            let set = match &previous {
                Some(previous) => set.sharing(previous),
                None => set,
            };
            (set, patched_by, failed, names)
        })
        .await
    };
    let (mut set, patched_by, failed, names) = match translated {
        Ok(translated) => translated,
        Err(error) => {
            tracing::error!(node = entry.node.id, %error, "translating failed; the node keeps what it has");
            return;
        }
    };
    let number = entry.number;
    refusals.set(number, PATCHES, failed);
    let given = secrets.of(number, entry.identity.as_ref(), names.keys());
    let given = given.await;
    refusals.set(
        number,
        SECRETS,
        without(&entry.node, &names, &given.refused),
    );
    for secret in given.resources {
        set.insert(secret);
    }
    let mut state = lock(&entry.state);
    state.patched_by = patched_by;
    state.uses_secrets = !names.is_empty();
    if previous.as_deref() == Some(&set) {
        return;
    }
    let set = Arc::new(set);
    state.set = Some(Arc::clone(&set));
    state.since.get_or_insert(since);
    for type_url in state.forget_gone() {
        refusals.set(number, &type_url, entry.blamed(&state, &type_url));
    }
    drop(state);
    sets.send_replace(Some(set));
}

/// Secrets that a node does not get, by the objects that name them.
fn without(
    node: &mesh_model::Node,
    names: &BTreeMap<String, BTreeSet<ObjectKey>>,
    refused: &[(String, &str)],
) -> Vec<(ObjectKey, refusals::Refusal)> {
    let node = described(node);
    let mut found = Vec::new();
    for (name, reason) in refused {
        tracing::warn!(node, secret = name, reason, "a proxy does not get a secret");
        let objects = names.get(name).into_iter().flatten();
        found.extend(objects.map(|object| {
            let refusal = refusals::of_secret(&node, name, reason);
            (object.clone(), refusal)
        }));
    }
    found
}

fn to_set(resources: Resources) -> (ResourceSet, PatchedBy) {
    let mut set = ResourceSet::new();
    for (type_url, by_name) in [
        (types::CLUSTER, resources.clusters),
        (types::ENDPOINT, resources.endpoints),
        (types::LISTENER, resources.listeners),
        (types::ROUTE, resources.routes),
        (types::NAME_TABLE, resources.name_tables),
    ] {
        let by_name: ByName = by_name
            .into_iter()
            .map(|(name, resource)| {
                let resource = Resource {
                    name: name.clone(),
                    version: resource.hash,
                    type_url: type_url.to_owned(),
                    value: resource.body,
                };
                (name, Arc::new(resource))
            })
            .collect();
        set.set_type(type_url, Arc::new(by_name));
    }
    (set, resources.patched_by)
}

/// Keeps the status of a stream; dropped with it.
struct Reporter {
    entry: Arc<Entry>,
    metrics: Arc<Metrics>,
    refusals: Board,
    _connected: Connected,
    _place: Place,
}

/// A stream's place in the table.
struct Place {
    table: Arc<Mutex<BTreeMap<u64, Arc<Entry>>>>,
    refusals: Board,
    secrets: Secrets,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.refusals.remove(self.number);
        self.secrets.forget(self.number);
        if let Some(entry) = lock(&self.table).remove(&self.number) {
            tracing::info!(node = entry.node.id, "proxy disconnected");
        }
    }
}

impl Report for Reporter {
    fn event(&mut self, event: StreamEvent) {
        let mut state = lock(&self.entry.state);
        match event {
            StreamEvent::Sent {
                type_url,
                nonce,
                version,
                ..
            } => {
                let took: Option<Duration> = state.since.take().map(|since| since.elapsed());
                self.metrics.sent(&type_url, took);
                let status = state.types.entry(type_url).or_default();
                status.nonce_sent = nonce;
                status.version_sent = version;
            }
            StreamEvent::Acked {
                type_url,
                nonce,
                version,
                names,
            } => {
                self.metrics.accepted(&type_url);
                let status = state.types.entry(type_url.clone()).or_default();
                status.nonce_acked = nonce;
                status.version_acked = version;
                if status.take(&names) {
                    self.refusals.set(
                        self.entry.number,
                        &type_url,
                        self.entry.blamed(&state, &type_url),
                    );
                }
            }
            StreamEvent::Nacked {
                type_url,
                message,
                rejections,
                names,
                ..
            } => {
                tracing::error!(
                    node = self.entry.node.id,
                    kind = types::short_name(&type_url),
                    message,
                    "a proxy refused resources"
                );
                self.metrics.rejected(&type_url, rejections.len());
                let status = state.types.entry(type_url.clone()).or_default();
                status.take(&names);
                status.error = message;
                status.rejected.extend(
                    rejections
                        .into_iter()
                        .map(|Rejection { name, message }| (name, message)),
                );
                self.refusals.set(
                    self.entry.number,
                    &type_url,
                    self.entry.blamed(&state, &type_url),
                );
            }
            StreamEvent::StaleNonce { type_url } => self.metrics.stale(&type_url),
        }
    }
}

/// A panic elsewhere must not take the status pages with it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `sidecar reviews-v1.default`.
fn described(node: &mesh_model::Node) -> String {
    format!("{} {}", kind_name(node.kind), proxy_id(node))
}

fn proxy_id(node: &mesh_model::Node) -> String {
    format!("{}.{}", node.name, node.namespace)
}

fn kind_name(kind: NodeKind) -> &'static str {
    match kind {
        NodeKind::Sidecar => "sidecar",
        NodeKind::Router => "router",
    }
}

fn from_struct(fields: Struct, depth: usize) -> Value {
    let convert = |(key, value)| (key, from_wire(value, depth + 1));
    Value::Object(fields.fields.into_iter().map(convert).collect())
}

fn from_wire(value: Wire, depth: usize) -> Value {
    if depth > MAX_DEPTH {
        return Value::Null;
    }
    match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => value.into(),
        Some(Kind::NumberValue(value)) => value.into(),
        Some(Kind::StringValue(value)) => value.into(),
        Some(Kind::StructValue(fields)) => from_struct(fields, depth),
        Some(Kind::ListValue(list)) => list
            .values
            .into_iter()
            .map(|value| from_wire(value, depth + 1))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_stays_refused_until_it_is_answered_again_or_gone() {
        let mut state = EntryState::default();
        let status = state.types.entry(types::ROUTE.to_owned()).or_default();
        status.error = "no".to_owned();
        status.nonce_sent = "1".to_owned();
        for name in ["80", "81"] {
            status.rejected.insert(name.to_owned(), "no".to_owned());
        }
        assert!(!status.take(&["82".to_owned()]), "another one was taken");
        assert_eq!(status.word(), "NACK");
        assert!(status.take(&["80".to_owned()]));
        assert_eq!(status.rejected.keys().collect::<Vec<_>>(), ["81"]);
        assert_eq!(state.forget_gone(), [types::ROUTE]);
        let status = &state.types[types::ROUTE];
        assert!(status.rejected.is_empty() && status.error.is_empty());
    }
}
