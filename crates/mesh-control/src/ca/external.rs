//! An authority elsewhere: nothing of it is kept here but its roots, which the mesh configuration names (`caCertificates`), or else the
//! ConfigMap `istio-ca-root-cert` of the control plane's namespace, which an operator then brings.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::Api;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::{self, Event, watcher};
use mesh_api::mesh_config::CertificateData;
use mesh_identity::trust::{TrustBundle, TrustError};
use mesh_xds::backoff::Backoff;
use tokio::sync::watch;

use crate::Options;
use crate::ca::registration::{Desk, External, Registration, Roots};
use crate::ca::roots::{CONFIG_MAP, KEY};
use crate::ca::{Held, Origin, Signer, put, rotation};
use crate::metrics::Metrics;
use crate::publish::Shared;

/// Why the roots can't be used; what was in force before stays.
#[derive(Debug, thiserror::Error)]
enum RootsError {
    #[error("caCertificates[{0}].pem of the mesh configuration: {1}")]
    Config(usize, TrustError),
    #[error("ConfigMap {CONFIG_MAP}, key {KEY}: {0}")]
    Map(TrustError),
    #[error(
        "there are none: give caCertificates in the mesh configuration, or ConfigMap {CONFIG_MAP} (key {KEY}) in the control plane's namespace"
    )]
    None,
    #[error(
        "none of the roots of now is among the new ones, so that workloads would not trust each other any more; first add the new roots to the old ones, \
         take the old ones out when all certificates have been renewed, or restart the control plane to change them at once"
    )]
    NoOverlap,
}

/// Keeps the roots of an authority elsewhere in force, for ever.
pub(crate) async fn keep(
    options: Arc<Options>,
    external: External,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    issuing: watch::Sender<Option<Arc<Held>>>,
) {
    let gvk = GroupVersionKind::gvk("", "v1", "ConfigMap");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "configmaps");
    let api: Api<DynamicObject> =
        Api::namespaced_with(options.client.clone(), &options.namespace, &resource);
    let config = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    let mut maps = std::pin::pin!(watcher(api, config));
    let mut changes = shared.changes();
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10), 3);
    let desk = Desk::new(options.client.clone());
    let (mut listed, mut map) = (false, None);
    let this = |object: &DynamicObject| {
        object.metadata.name.as_deref() == Some(CONFIG_MAP)
            && object.metadata.namespace.as_ref() == Some(&options.namespace)
    };
    let text = |object: &DynamicObject| object.data["data"][KEY].as_str().map(str::to_owned);
    let mut said = String::new();
    loop {
        tokio::select! {
            event = maps.next() => match event {
                Some(Ok(Event::Apply(object) | Event::InitApply(object))) if this(&object) => {
                    map = text(&object);
                }
                // What the map said stays in force; without caCertificates that is told below.
                Some(Ok(Event::Delete(object))) if this(&object) => map = None,
                Some(Ok(Event::InitDone)) => listed = true,
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::warn!(%error, "watching the ConfigMap {CONFIG_MAP}; trying again");
                    tokio::time::sleep(backoff.wait()).await;
                }
                None => return,
            },
            changed = changes.changed() => if changed.is_err() { return },
        }
        if !listed || !shared.ready() {
            continue;
        }
        let config = shared.mesh_config();
        let present = issuing.borrow().clone();
        match read(&config.ca_certificates, map.as_deref())
            .and_then(|roots| next(&external, roots, &desk, present.as_deref()))
        {
            Ok(held) => {
                said.clear();
                put(&issuing, &metrics, held);
            }
            Err(error) => {
                let text = error.to_string();
                if text != said {
                    metrics.citadel.load_failures.inc();
                    tracing::error!(%error, "the roots of the authority elsewhere can't be used");
                    said = text;
                }
            }
        }
    }
}

/// The roots, and whether they are those of the ConfigMap.
fn read(given: &[CertificateData], map: Option<&str>) -> Result<(Vec<Roots>, bool), RootsError> {
    let with_roots = given
        .iter()
        .enumerate()
        .filter(|(_, data)| !data.pem.is_empty());
    let mut all = Vec::new();
    for (index, data) in with_roots {
        let bundle = TrustBundle::from_pem(&data.pem);
        all.push(Roots {
            bundle: bundle.map_err(|error| RootsError::Config(index, error))?,
            signers: data.cert_signers.clone(),
        });
    }
    let from_map = all.is_empty();
    if from_map {
        let bundle = TrustBundle::from_pem(map.ok_or(RootsError::None)?);
        all.push(Roots {
            bundle: bundle.map_err(RootsError::Map)?,
            signers: Vec::new(),
        });
    }
    Ok((all, from_map))
}

fn next(
    external: &External,
    (roots, from_map): (Vec<Roots>, bool),
    desk: &Arc<Desk>,
    present: Option<&Held>,
) -> Result<Held, RootsError> {
    let mut bundles = roots.iter().map(|roots| &roots.bundle);
    let first = bundles.next().ok_or(RootsError::None)?.clone();
    let trusted = bundles.enumerate().try_fold(first, |all, (index, next)| {
        all.and(next)
            .map_err(|error| RootsError::Config(index + 1, error))
    })?;
    let held = Held {
        root: trusted.fingerprints().swap_remove(0),
        signer: Signer::Elsewhere(Registration::new(
            external.clone(),
            (roots, from_map),
            Arc::clone(desk),
        )),
        origin: Origin::External,
        trusted,
        phase: rotation::Phase::Idle,
        requested: false,
        former: None,
    };
    match present.is_none_or(|present| present.is_continued_by(&held)) {
        true => Ok(held),
        false => Err(RootsError::NoOverlap),
    }
}
