//! The last good keys of token issuers, in a ConfigMap: so that a start while an issuer is away does not refuse its good tokens. They are public
//! keys; who may change our ConfigMaps may change what everybody trusts anyway.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use mesh_model::KeySource;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::{Options, revisioned};

/// Name of the ConfigMap.
const MAP: &str = "istio-jwks";
/// Longest key set that is kept, in bytes.
const MAX_KEYS: usize = 64 << 10;
/// What is kept of all together, in bytes: a ConfigMap has room for 1 MiB.
const MAX_ALL: usize = 900 << 10;
/// The longest that the API is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is kept; clones share it.
#[derive(Clone)]
pub(super) struct Kept {
    api: Api<DynamicObject>,
    name: String,
    /// What the ConfigMap says as far as it is known; `None` before it was read.
    known: Arc<Mutex<Option<BTreeMap<String, String>>>>,
}

impl Kept {
    pub(super) fn new(options: &Options) -> Self {
        let gvk = GroupVersionKind::gvk("", "v1", "ConfigMap");
        let resource = ApiResource::from_gvk_with_plural(&gvk, "configmaps");
        Self {
            api: Api::namespaced_with(options.client.clone(), &options.namespace, &resource),
            name: revisioned(MAP, &options.revision),
            known: Arc::default(),
        }
    }

    /// The keys that are kept of these sources.
    pub(super) async fn read(&self, sources: &BTreeSet<KeySource>) -> Vec<(KeySource, String)> {
        if sources.is_empty() {
            return Vec::new();
        }
        let mut known = self.known.lock().await;
        self.load(&mut known).await;
        let known = known.as_ref();
        let found = |source: &KeySource| {
            let text = known?.get(&mark(source))?;
            let entry: Value = serde_json::from_str(text).ok()?;
            // The mark is short; what it stands for is compared.
            let same = entry["source"] == shown(source);
            let keys = entry["keys"].as_str().filter(|_| same)?;
            let set: Value = serde_json::from_str(keys).ok()?;
            let any = set["keys"].as_array().is_some_and(|all| !all.is_empty());
            any.then(|| (source.clone(), keys.to_owned()))
        };
        sources.iter().filter_map(found).collect()
    }

    /// Keeps the keys of a source.
    pub(super) async fn write(&self, source: &KeySource, keys: &str) {
        let mut known = self.known.lock().await;
        self.load(&mut known).await;
        let Some(all) = known.as_mut() else { return };
        let mark = mark(source);
        let entry = json!({ "source": shown(source), "keys": keys }).to_string();
        if all.get(&mark) == Some(&entry) {
            return;
        }
        let others = all.iter().filter(|(other, _)| **other != mark);
        let size: usize = others.map(|(_, text)| text.len()).sum();
        if entry.len() > MAX_KEYS || size + entry.len() > MAX_ALL {
            tracing::warn!(
                ?source,
                "the keys of an issuer are too many to be kept for the next start of the control plane"
            );
            return;
        }
        if self.patch(json!({ &mark: &entry })).await {
            all.insert(mark, entry);
        }
    }

    /// Forgets all sources but these.
    pub(super) async fn retain<'a>(&self, wanted: impl Iterator<Item = &'a KeySource>) {
        let wanted: BTreeSet<String> = wanted.map(mark).collect();
        let mut known = self.known.lock().await;
        self.load(&mut known).await;
        let Some(all) = known.as_mut() else { return };
        let gone = all.keys().filter(|mark| !wanted.contains(*mark));
        let gone: BTreeMap<String, Value> = gone.map(|mark| (mark.clone(), Value::Null)).collect();
        if !gone.is_empty() && self.patch(json!(gone)).await {
            all.retain(|mark, _| wanted.contains(mark));
        }
    }

    async fn load(&self, known: &mut Option<BTreeMap<String, String>>) {
        if known.is_some() {
            return;
        }
        match tokio::time::timeout(PATIENCE, self.api.get_opt(&self.name)).await {
            Ok(Ok(map)) => {
                let data = map.map(|map| map.data["data"].clone()).unwrap_or_default();
                *known = Some(serde_json::from_value(data).unwrap_or_default());
            }
            Ok(Err(error)) => tracing::warn!(%error, name = self.name, "reading the kept keys"),
            Err(_) => tracing::warn!(name = self.name, "reading the kept keys took too long"),
        }
    }

    /// Whether the ConfigMap says it now.
    async fn patch(&self, data: Value) -> bool {
        let patch = Patch::Merge(json!({ "data": data }));
        let parameters = PatchParams::default();
        let work = async {
            match self.api.patch(&self.name, &parameters, &patch).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    let map = json!({
                        "apiVersion": "v1", "kind": "ConfigMap",
                        "metadata": { "name": self.name, "namespace": self.api.namespace() }, "data": data,
                    });
                    let map: DynamicObject =
                        serde_json::from_value(map).map_err(kube::Error::SerdeError)?;
                    self.api.create(&PostParams::default(), &map).await
                }
                patched => patched,
            }
        };
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                tracing::warn!(%error, name = self.name, "keeping the keys of issuers");
                false
            }
            Err(_) => false,
        }
    }
}

/// A key that a ConfigMap can have.
fn mark(source: &KeySource) -> String {
    let hash = mesh_identity::verify::sha256(shown(source).as_bytes()).unwrap_or_default();
    mesh_identity::verify::hex(&hash[..16])
}

fn shown(source: &KeySource) -> String {
    match source {
        KeySource::Jwks(uri) => format!("jwks {uri}"),
        KeySource::Discovery(issuer) => format!("issuer {issuer}"),
    }
}
