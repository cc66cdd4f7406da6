//! The proxy's end of the control plane: resources come in, are compiled, put in force and kept.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mesh_routing::compile::{CLUSTER, ENDPOINTS, LISTENER, ROUTE};
use mesh_routing::{Rejection as Refused, XdsState};
use mesh_store::{Batch, Store, StoreError, StoreOptions, Tree};
use mesh_xds::client::{Named, Versions};
use mesh_xds::types::NAME_TABLE;
use mesh_xds::{Handler, Rejection, Update};
use prost::Message;

use crate::dns;
use crate::sds::{SECRET, Subscription};
use crate::shared::Shared;

/// The resources are small and read once, at the start.
const CACHE_BYTES: u64 = 1 << 20;

/// The last good resources on disk.
pub struct Keeper {
    store: Store,
    tree: Tree,
}

impl Keeper {
    /// Opens the store in a directory.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let options = StoreOptions {
            dir: Some(dir.to_owned()),
            cache_bytes: Some(CACHE_BYTES),
        };
        let (store, recovery) = Store::open_with(options)?;
        if !recovery.is_clean() {
            tracing::warn!(
                ?recovery,
                "the kept resources were damaged; the control plane sends what is missing"
            );
        }
        let tree = store.tree("xds")?;
        Ok(Self { store, tree })
    }

    /// As [`Self::open`] for a directory, where there is one. What another version kept in a form of its own is left to that version: this run keeps
    /// nothing and waits for the control plane.
    pub fn open_if_ours(dir: Option<&Path>) -> Result<Option<Self>, StoreError> {
        match dir.map(Self::open).transpose() {
            Err(error @ StoreError::Format { .. }) => {
                tracing::warn!(%error, "starting without kept resources, and keeping none");
                Ok(None)
            }
            opened => opened,
        }
    }

    /// Type URL, name, version, bytes of everything that was kept.
    fn load(&self) -> Result<Vec<Kept>, StoreError> {
        let mut all = Vec::new();
        for item in self.tree.scan_prefix("") {
            let (key, value) = item?;
            if let Some(kept) = Kept::decode(&key, &value) {
                all.push(kept);
            }
        }
        Ok(all)
    }

    fn keep(&self, update: &Update, refused: &[Rejection]) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        for resource in update
            .upserts
            .iter()
            .filter(|r| refused.iter().all(|x| x.name != r.name))
        {
            let value = [resource.version.as_bytes(), &[0], &resource.value].concat();
            batch.insert(&self.tree, key(&update.type_url, &resource.name), value);
        }
        for name in &update.removals {
            batch.remove(&self.tree, key(&update.type_url, name));
        }
        self.store.batch(batch)
    }
}

fn key(type_url: &str, name: &str) -> Vec<u8> {
    [type_url.as_bytes(), &[0], name.as_bytes()].concat()
}

struct Kept {
    type_url: String,
    name: String,
    version: String,
    value: Vec<u8>,
}

impl Kept {
    fn decode(key: &[u8], value: &[u8]) -> Option<Self> {
        let split = |bytes: &[u8]| {
            let at = bytes.iter().position(|b| *b == 0)?;
            Some((
                String::from_utf8(bytes.get(..at)?.to_vec()).ok()?,
                bytes.get(at + 1..)?.to_vec(),
            ))
        };
        let (type_url, name) = split(key)?;
        let (version, value) = split(value)?;
        Some(Self {
            type_url,
            name: String::from_utf8(name).ok()?,
            version,
            value,
        })
    }
}

/// Takes the updates of the discovery stream.
pub struct Receiver {
    shared: Arc<Shared>,
    keeper: Option<Keeper>,
    state: XdsState,
    /// Versions by type and name, for the config dump and for what a new stream begins with.
    versions: BTreeMap<String, Versions>,
    secrets: Subscription,
    seen: [bool; 2],
    /// Listeners that were refused and of which there is no good version.
    missing: BTreeSet<String>,
}

impl Receiver {
    /// Begins with what an earlier run kept, and puts that in force.
    pub fn new(shared: Arc<Shared>, keeper: Option<Keeper>) -> Self {
        let mut receiver = Self {
            shared,
            keeper,
            state: XdsState::default(),
            versions: BTreeMap::new(),
            secrets: Subscription::default(),
            seen: [false; 2],
            missing: BTreeSet::new(),
        };
        let kept = receiver.keeper.as_ref().map(Keeper::load);
        match kept {
            Some(Ok(kept)) if !kept.is_empty() => receiver.resume(kept),
            Some(Err(error)) => {
                tracing::warn!(%error, "reading the kept resources; waiting for the control plane instead")
            }
            _ => {}
        }
        receiver
    }

    fn resume(&mut self, kept: Vec<Kept>) {
        for resource in kept {
            let taken = match resource.type_url.as_str() {
                NAME_TABLE => dns::take(&self.shared, &resource.value),
                type_url => insert(&mut self.state, type_url, &resource.name, &resource.value),
            };
            match taken {
                Ok(()) => {
                    let versions = self.versions.entry(resource.type_url).or_default();
                    versions.insert(resource.name, resource.version);
                }
                Err(error) => tracing::warn!(name = resource.name, error, "a kept resource"),
            }
        }
        for refused in self.shared.publish(&self.state) {
            tracing::warn!(
                name = refused.name,
                reason = refused.message,
                "a kept resource"
            );
            if refused.type_url == LISTENER {
                self.missing.insert(refused.name.clone());
            }
            // Not announced as held, so that the control plane sends it again.
            self.versions
                .entry(refused.type_url.to_owned())
                .or_default()
                .remove(&refused.name);
        }
        self.secrets.follow(&self.shared);
        self.seen = [
            !self.state.clusters.is_empty(),
            !self.state.listeners.is_empty(),
        ];
        self.note_configured();
    }

    /// What is held already, for the first request of a stream.
    pub fn versions(&self) -> BTreeMap<String, Versions> {
        self.versions.clone()
    }

    /// The secrets to subscribe to.
    pub fn secrets(&self) -> Named {
        self.secrets.named()
    }

    /// Ready means that every listener that was asked for is there: a sidecar without its inbound listener would let nothing in (Istio's
    /// agent waits for an update of listeners of which Envoy refused none).
    fn note_configured(&self) {
        let complete = self.seen == [true; 2]
            && self.missing.is_empty()
            && self.shared.snapshot().warming().is_empty();
        if complete {
            self.shared.configured.store(true, Ordering::Release);
        }
    }

    fn note_missing(&mut self, update: &Update, refused: &[Rejection]) {
        let settled = update.upserts.iter().map(|resource| &resource.name);
        for name in settled.chain(&update.removals) {
            self.missing.remove(name);
        }
        let snapshot = self.shared.snapshot();
        let gone = refused.iter().map(|rejection| &rejection.name);
        let gone = gone.filter(|name| snapshot.listener(name).is_none());
        self.missing.extend(gone.cloned());
    }

    fn apply_secrets(&mut self, update: &Update) -> Vec<Rejection> {
        for name in &update.removals {
            self.secrets.remove(&self.shared, name);
        }
        let taken = update.upserts.iter().map(|resource| {
            let taken = self
                .secrets
                .take(&self.shared, &resource.name, &resource.value);
            (&resource.name, taken)
        });
        let refused = taken.filter_map(|(name, taken)| taken.err().map(|why| (name, why)));
        refused
            .map(|(name, message)| Rejection {
                name: name.clone(),
                message,
            })
            .collect()
    }

    /// There is one table, or none: then there is nothing that the mesh answers.
    fn apply_names(&self, update: &Update) -> Vec<Rejection> {
        let Some(resource) = update.upserts.last() else {
            if !update.removals.is_empty() || self.shared.names.load().is_none() {
                // No bytes are a table without entries.
                let _ = dns::take(&self.shared, &[]);
            }
            return Vec::new();
        };
        let refused = dns::take(&self.shared, &resource.value).err();
        let refused = refused.map(|message| Rejection {
            name: resource.name.clone(),
            message,
        });
        refused.into_iter().collect()
    }

    fn apply(&mut self, update: &Update) -> Vec<Rejection> {
        match update.type_url.as_str() {
            SECRET => return self.apply_secrets(update),
            NAME_TABLE => return self.apply_names(update),
            _ => {}
        }
        let mut refused = Vec::new();
        for resource in &update.upserts {
            if let Err(message) = insert(
                &mut self.state,
                &update.type_url,
                &resource.name,
                &resource.value,
            ) {
                refused.push(Rejection {
                    name: resource.name.clone(),
                    message,
                });
            }
        }
        for name in &update.removals {
            remove(&mut self.state, &update.type_url, name);
        }
        let concerns = |r: &Refused| {
            r.type_url == update.type_url && update.upserts.iter().any(|u| u.name == r.name)
        };
        let uncompiled = self
            .shared
            .publish(&self.state)
            .into_iter()
            .filter(concerns);
        refused.extend(uncompiled.map(|r| Rejection {
            name: r.name,
            message: r.message,
        }));
        self.secrets.follow(&self.shared);
        refused
    }
}

impl Handler for Receiver {
    async fn update(&mut self, update: Update) -> Vec<Rejection> {
        let refused = self.apply(&update);
        for rejection in &refused {
            tracing::warn!(
                name = rejection.name,
                reason = rejection.message,
                "resource refused; its last good version stays"
            );
            self.shared.totals.rejected.fetch_add(1, Ordering::Relaxed);
        }
        match update.type_url.as_str() {
            CLUSTER => self.seen[0] = true,
            LISTENER => {
                self.seen[1] = true;
                self.note_missing(&update, &refused);
            }
            _ => {}
        }
        self.note_configured();
        // Secrets are not for the disk.
        let keeper = self.keeper.as_ref().filter(|_| update.type_url != SECRET);
        if let Some(Err(error)) = keeper.map(|keeper| keeper.keep(&update, &refused)) {
            tracing::warn!(%error, "keeping resources for the next start");
        }
        refused
    }
}

fn insert(state: &mut XdsState, type_url: &str, name: &str, value: &[u8]) -> Result<(), String> {
    fn put<M: Message + Default>(
        map: &mut BTreeMap<String, Arc<M>>,
        name: &str,
        value: &[u8],
    ) -> Result<(), String> {
        let message = M::decode(value).map_err(|error| format!("does not decode: {error}"))?;
        map.insert(name.to_owned(), Arc::new(message));
        Ok(())
    }
    match type_url {
        LISTENER => put(&mut state.listeners, name, value),
        ROUTE => put(&mut state.routes, name, value),
        CLUSTER => put(&mut state.clusters, name, value),
        ENDPOINTS => put(&mut state.endpoints, name, value),
        other => Err(format!("{other} is a type that this proxy does not know")),
    }
}

fn remove(state: &mut XdsState, type_url: &str, name: &str) {
    match type_url {
        LISTENER => drop(state.listeners.remove(name)),
        ROUTE => drop(state.routes.remove(name)),
        CLUSTER => drop(state.clusters.remove(name)),
        ENDPOINTS => drop(state.endpoints.remove(name)),
        _ => {}
    }
}
