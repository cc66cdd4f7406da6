//! The roots where workloads find them: a ConfigMap in every namespace, kept right whoever changes it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::{self, Event, watcher};
use mesh_xds::backoff::Backoff;
use serde_json::json;

use crate::Options;
use crate::ca::{Held, Issuing, Origin, held};
use crate::publish::Shared;

/// Istio's name of the ConfigMap, and the key in it.
pub(crate) const CONFIG_MAP: &str = "istio-ca-root-cert";
pub(crate) const KEY: &str = "root-cert.pem";
/// Istio's mark on it.
const LABEL: &str = "istio.io/config";

/// Keeps the ConfigMaps, for ever.
pub(crate) async fn keep(options: Arc<Options>, shared: Arc<Shared>, mut issuing: Issuing) {
    let Some(mut held) = held(&mut issuing).await else {
        return;
    };
    let config = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    let mut maps = std::pin::pin!(watcher(everywhere(&options), config));
    let mut namespaces = shared.changes();
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10), 2);
    let mut present = Present::default();
    let mut wait = None;
    let mut told = false;
    loop {
        let again = async {
            match wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = maps.next() => match event {
                Some(Ok(event)) => present.take(event),
                Some(Err(error)) => {
                    tracing::warn!(%error, "watching the ConfigMaps {CONFIG_MAP}; trying again");
                    tokio::time::sleep(backoff.wait()).await;
                }
                None => return,
            },
            changed = namespaces.changed() => if changed.is_err() { return },
            changed = issuing.changed() => {
                if changed.is_err() {
                    return;
                }
                if let Some(next) = issuing.borrow_and_update().clone() {
                    held = next;
                }
            },
            () = again => {}
        }
        wait = None;
        if !present.listed || !shared.ready() {
            continue;
        }
        let given = !shared.mesh_config().ca_certificates.is_empty();
        if given && held.origin != Origin::External && !std::mem::replace(&mut told, true) {
            tracing::warn!(
                "caCertificates of the mesh configuration has no effect: the mesh's own authority signs (EXTERNAL_CA is not set)"
            );
        }
        let failed = write_missing(&options, &shared, &held, &mut present).await;
        if failed {
            wait = Some(backoff.wait());
        } else {
            backoff.reset();
        }
    }
}

/// What the ConfigMaps say, by namespace.
#[derive(Default)]
struct Present {
    listed: bool,
    listing: BTreeMap<String, Option<String>>,
    roots: BTreeMap<String, Option<String>>,
}

impl Present {
    fn take(&mut self, event: Event<DynamicObject>) {
        let read = |object: &DynamicObject| {
            let namespace = object.metadata.namespace.clone().unwrap_or_default();
            let text = object.data["data"][KEY].as_str().map(str::to_owned);
            (object.metadata.name.as_deref() == Some(CONFIG_MAP)).then_some((namespace, text))
        };
        match event {
            Event::Init => self.listing.clear(),
            Event::InitApply(object) => self.listing.extend(read(&object)),
            Event::InitDone => {
                self.listed = true;
                self.roots = std::mem::take(&mut self.listing);
            }
            Event::Apply(object) => self.roots.extend(read(&object)),
            Event::Delete(object) => {
                if let Some((namespace, _)) = read(&object) {
                    self.roots.remove(&namespace);
                }
            }
        }
    }
}

/// Writes what is missing or wrong; true if something could not be written.
async fn write_missing(
    options: &Options,
    shared: &Shared,
    held: &Held,
    present: &mut Present,
) -> bool {
    let wanted = held.trusted.pem();
    let namespaces: BTreeSet<String> = shared.namespaces().keys().cloned().collect();
    let mut failed = false;
    for namespace in namespaces {
        if held.is_from_map() && namespace == options.namespace {
            continue;
        }
        let there = present.roots.get(&namespace);
        if there.is_some_and(|text| text.as_deref() == Some(wanted)) {
            continue;
        }
        match write(options, &namespace, wanted, there.is_some()).await {
            Ok(()) => {
                present.roots.insert(namespace, Some(wanted.to_owned()));
            }
            // A namespace that is ending takes nothing new, and one that has ended is not there.
            Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => {
                tracing::debug!(namespace, reason = status.message, "writing {CONFIG_MAP}");
            }
            Err(error) => {
                failed = true;
                tracing::warn!(namespace, %error, "writing the ConfigMap {CONFIG_MAP}; trying again");
            }
        }
    }
    failed
}

async fn write(
    options: &Options,
    namespace: &str,
    roots: &str,
    exists: bool,
) -> Result<(), kube::Error> {
    let api = Api::namespaced_with(options.client.clone(), namespace, &resource());
    let patch = json!({ "data": { KEY: roots } });
    if !exists {
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": CONFIG_MAP, "namespace": namespace, "labels": { LABEL: "true" } },
            "data": { KEY: roots },
        });
        let map: DynamicObject = serde_json::from_value(map).map_err(kube::Error::SerdeError)?;
        match api.create(&PostParams::default(), &map).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            created => return created.map(drop),
        }
    }
    api.patch(CONFIG_MAP, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .map(drop)
}

fn everywhere(options: &Options) -> Api<DynamicObject> {
    Api::all_with(options.client.clone(), &resource())
}

fn resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", "ConfigMap"), "configmaps")
}
