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
    /// Of Istio's kinds, the revision whose objects are read.
    revision: Option<String>,
    read: fn(&Value) -> Result<Reading, ParseError>,
}

/// Label of an object that is meant for the control plane of one revision. It names the revision itself: a tag is none (as in Istio).
const REVISION: &str = "istio.io/rev";

impl Kind {
    /// Whether an object is meant for the control plane of another revision. One without the label is meant for all.
    fn is_of_another(&self, object: &DynamicObject) -> bool {
        let Some(own) = &self.revision else {
            return false;
        };
        let labels = object.metadata.labels.as_ref();
        labels
            .and_then(|labels| labels.get(REVISION))
            .is_some_and(|named| named != own)
    }
}

#[cfg(test)]
impl Kind {
    /// Its name.
    pub(crate) fn kind(&self) -> &str {
        &self.resource.kind
    }
}

/// Everything that is watched by a control plane of `revision`. `system` is the namespace of its ConfigMaps.
pub(crate) fn kinds(system: &str, revision: &str) -> Vec<Kind> {
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
            revision: Some(revision.to_owned()),
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
        revision: None,
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
    // What is meant for another revision is as if it were not there: no rule of it holds, nothing is kept of it, and its status is another's.
    let event = match event {
        Event::InitApply(object) if kind.is_of_another(&object) => return Ok(()),
        Event::Apply(object) if kind.is_of_another(&object) => Event::Delete(object),
        event => event,
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(revision: Option<&str>) -> DynamicObject {
        let mut object = json!({
            "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": { "name": "x", "namespace": "default", "labels": { "app": "x" } },
            "spec": { "hosts": ["x"], "http": [{ "route": [{ "destination": { "host": "x" } }] }] },
        });
        if let Some(revision) = revision {
            object["metadata"]["labels"][REVISION] = json!(revision);
        }
        serde_json::from_value(object).expect("an object")
    }

    /// What the table is told of events, seen by a control plane of revision `canary`.
    async fn told(events: Vec<Event<DynamicObject>>) -> Vec<&'static str> {
        let kinds = kinds("istio-system", "canary");
        let kind = kinds.iter().find(|kind| kind.kind() == "VirtualService");
        let kind = kind.expect("a kind that is watched");
        let (sender, mut receiver) = mpsc::channel(16);
        let (mut known, mut listed) = (BTreeSet::new(), BTreeSet::new());
        for event in events {
            take(kind, event, &mut known, &mut listed, &sender)
                .await
                .expect("the receiver is there");
        }
        drop(sender);
        let mut told = Vec::new();
        while let Some(change) = receiver.recv().await {
            told.push(match change {
                Change::Upsert(_) => "upsert",
                Change::Remove(_) => "remove",
                Change::Listed(_) => "listed",
                _ => "other",
            });
        }
        told
    }

    #[tokio::test]
    async fn objects_of_another_revision_are_as_if_they_were_not_there() {
        for (revision, upserts) in [
            (None, 1),
            (Some("canary"), 1),
            (Some("default"), 0),
            (Some("prod"), 0),
            (Some(""), 0),
        ] {
            let events = vec![
                Event::Init,
                Event::InitApply(object(revision)),
                Event::InitDone,
            ];
            let mut expected = vec!["upsert"; upserts];
            expected.push("listed");
            assert_eq!(told(events).await, expected, "{revision:?}");
        }
    }

    #[tokio::test]
    async fn an_object_that_is_given_to_another_revision_goes_and_comes_back() {
        let events = vec![
            Event::Init,
            Event::InitApply(object(Some("canary"))),
            Event::InitDone,
            Event::Apply(object(Some("default"))),
            Event::Apply(object(None)),
            // Given away while nobody watched.
            Event::Init,
            Event::InitApply(object(Some("default"))),
            Event::InitDone,
        ];
        assert_eq!(
            told(events).await,
            ["upsert", "listed", "remove", "upsert", "remove", "listed"]
        );
    }

    #[test]
    fn pods_and_services_are_seen_whatever_revision_they_name() {
        let kinds = kinds("istio-system", "canary");
        let pods = kinds.iter().find(|kind| kind.kind() == "Pod");
        assert!(!pods.expect("pods").is_of_another(&object(Some("default"))));
    }
}
