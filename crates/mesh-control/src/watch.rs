//! Watching the cluster: every kind that a mesh is made of, object by object, so that one that can't be read stops nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::StreamExt;
use kube::Api;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::{self, Event};
use mesh_api::core::{ConfigMap, CoreObject, EndpointSlice, Namespace, Node, Pod, Service};
use mesh_api::{AnyObject, KINDS, ParseError};
use mesh_model::{Item, KeySource, ObjectKey};
use mesh_xds::backoff::Backoff;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::stand_in;

/// What the watches tell the publisher.
#[derive(Debug)]
pub(crate) enum Change {
    /// An object as it is now.
    Upsert(Box<Seen>),
    /// An object is gone.
    Remove(ObjectKey),
    /// Keys of a token issuer that were fetched (JSON).
    Keys(KeySource, String),
    /// Nothing refers to a source of keys any more.
    ForgetKeys(KeySource),
    /// A kind has been listed as a whole (or the cluster does not have it).
    Listed(usize),
}

/// An object that was read.
#[derive(Debug)]
pub(crate) struct Seen {
    /// Which.
    pub(crate) key: ObjectKey,
    /// Group and version under which it was read.
    pub(crate) api_version: String,
    /// `metadata.generation`.
    pub(crate) generation: i64,
    /// Its status, null if none.
    pub(crate) status: Value,
    /// What it says, or why it says nothing.
    pub(crate) reading: Result<Reading, ParseError>,
    /// What holds instead where it says nothing and must not be left out.
    pub(crate) stand_in: Option<AnyObject>,
}

/// What an object means to us.
#[derive(Debug)]
pub(crate) enum Reading {
    /// Part of the mesh.
    Item(Item),
    /// One of our ConfigMaps.
    Config(ConfigMap),
}

/// A kind to be watched.
#[derive(Clone, Debug)]
pub(crate) struct Kind {
    index: usize,
    resource: ApiResource,
    namespace: Option<String>,
    read: fn(&Value) -> Result<Reading, ParseError>,
}

#[cfg(test)]
impl Kind {
    /// Its name.
    pub(crate) fn kind(&self) -> &str {
        &self.resource.kind
    }
}

/// Everything that is watched. `system` is the namespace of our ConfigMaps.
pub(crate) fn kinds(system: &str) -> Vec<Kind> {
    let mut kinds = vec![
        core::<Namespace>(|raw| Ok(Reading::Item(Namespace::from_value(raw)?.into()))),
        core::<Node>(|raw| Ok(Reading::Item(Node::from_value(raw)?.into()))),
        core::<Service>(|raw| Ok(Reading::Item(Service::from_value(raw)?.into()))),
        core::<EndpointSlice>(|raw| Ok(Reading::Item(EndpointSlice::from_value(raw)?.into()))),
        core::<Pod>(|raw| Ok(Reading::Item(Pod::from_value(raw)?.into()))),
    ];
    let mut config = core::<ConfigMap>(|raw| Ok(Reading::Config(ConfigMap::from_value(raw)?)));
    config.namespace = Some(system.to_owned());
    kinds.push(config);
    kinds.extend(KINDS.iter().map(|info| {
        let gvk = GroupVersionKind::gvk(info.group, info.storage_version(), info.kind);
        Kind {
            index: 0,
            resource: ApiResource::from_gvk_with_plural(&gvk, info.plural),
            namespace: None,
            read: |raw| {
                mesh_api::parse(raw).map(|object: AnyObject| Reading::Item(Item::Istio(object)))
            },
        }
    }));
    for (index, kind) in kinds.iter_mut().enumerate() {
        kind.index = index;
    }
    kinds
}

fn core<K: CoreObject>(read: fn(&Value) -> Result<Reading, ParseError>) -> Kind {
    let (group, version) = K::API_VERSION
        .split_once('/')
        .unwrap_or(("", K::API_VERSION));
    let gvk = GroupVersionKind::gvk(group, version, K::KIND);
    Kind {
        index: 0,
        resource: ApiResource::from_gvk_with_plural(&gvk, K::PLURAL),
        namespace: None,
        read,
    }
}

/// Watches a kind for ever. Where the cluster does not have it (its CRD is missing) it is asked for again.
pub(crate) async fn run(client: kube::Client, kind: Kind, changes: mpsc::Sender<Change>) {
    let api: Api<DynamicObject> = match &kind.namespace {
        Some(namespace) => Api::namespaced_with(client, namespace, &kind.resource),
        None => Api::all_with(client, &kind.resource),
    };
    let mut backoff = Backoff::new(
        Duration::from_millis(100),
        Duration::from_secs(5),
        kind.index as u64,
    );
    let mut events = std::pin::pin!(watcher::watcher(api, watcher::Config::default()));
    let mut known = BTreeSet::new();
    let mut listed = BTreeSet::new();
    while let Some(event) = events.next().await {
        let sent = match event {
            Ok(event) => {
                backoff.reset();
                take(&kind, event, &mut known, &mut listed, &changes).await
            }
            Err(error) => {
                let missing = is_missing(&error);
                if missing {
                    tracing::debug!(
                        kind = kind.resource.kind,
                        "the cluster does not have this kind"
                    );
                } else {
                    tracing::warn!(kind = kind.resource.kind, %error, "watching; trying again");
                }
                let sent = if missing {
                    take(&kind, Event::Init, &mut known, &mut listed, &changes)
                        .await
                        .and(take(&kind, Event::InitDone, &mut known, &mut listed, &changes).await)
                } else {
                    Ok(())
                };
                tokio::time::sleep(backoff.wait()).await;
                sent
            }
        };
        if sent.is_err() {
            // The publisher is gone: the control plane is stopping.
            return;
        }
    }
}

type Sent = Result<(), mpsc::error::SendError<Change>>;

async fn take(
    kind: &Kind,
    event: Event<DynamicObject>,
    known: &mut BTreeSet<ObjectKey>,
    listed: &mut BTreeSet<ObjectKey>,
    changes: &mpsc::Sender<Change>,
) -> Sent {
    match event {
        Event::Init => listed.clear(),
        Event::InitApply(object) => {
            let seen = read(kind, object);
            listed.insert(seen.key.clone());
            changes.send(Change::Upsert(Box::new(seen))).await?;
        }
        Event::InitDone => {
            // What was there before and is not in the new list went away while nobody watched.
            for gone in known.difference(listed) {
                changes.send(Change::Remove(gone.clone())).await?;
            }
            *known = std::mem::take(listed);
            changes.send(Change::Listed(kind.index)).await?;
        }
        Event::Apply(object) => {
            let seen = read(kind, object);
            known.insert(seen.key.clone());
            changes.send(Change::Upsert(Box::new(seen))).await?;
        }
        Event::Delete(object) => {
            let key = key(kind, &object);
            known.remove(&key);
            changes.send(Change::Remove(key)).await?;
        }
    }
    Ok(())
}

fn key(kind: &Kind, object: &DynamicObject) -> ObjectKey {
    ObjectKey::new(
        &kind.resource.kind,
        object.metadata.namespace.as_deref().unwrap_or_default(),
        object.metadata.name.as_deref().unwrap_or_default(),
    )
}

pub(crate) fn read(kind: &Kind, mut object: DynamicObject) -> Seen {
    let key = key(kind, &object);
    // Nobody reads it, and it is most of some objects.
    object.metadata.managed_fields = None;
    let generation = object.metadata.generation.unwrap_or_default();
    let status = object.data.get("status").cloned().unwrap_or_default();
    // Items of a list may come without them.
    object.types = Some(kube::core::TypeMeta {
        api_version: kind.resource.api_version.clone(),
        kind: kind.resource.kind.clone(),
    });
    let raw = serde_json::to_value(&object).map_err(|error| ParseError {
        path: String::new(),
        message: error.to_string(),
        expected: String::new(),
    });
    let (reading, stand_in) = match raw {
        Ok(raw) => {
            let reading = (kind.read)(&raw);
            let stand_in = reading.is_err().then(|| stand_in::of(&raw)).flatten();
            (reading, stand_in)
        }
        Err(error) => (Err(error), None),
    };
    Seen {
        key,
        api_version: kind.resource.api_version.clone(),
        generation,
        status,
        reading,
        stand_in,
    }
}

fn is_missing(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404)
}
