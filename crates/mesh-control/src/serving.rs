//! The control plane's own certificate: issued by its authority, renewed in time, and known to those who call the webhooks.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt;
use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::{self, Event, watcher};
use mesh_xds::backoff::Backoff;
use serde_json::{Value, json};

use crate::Options;
use crate::ca::registration::SignError;
use crate::ca::{Held, Issuing, Signer, held};

const LEAF_LIFETIME: u64 = 90 * 86_400;
/// The certificate is made anew at this age.
const RENEW: Duration = Duration::from_secs(30 * 86_400);

/// Shortest time from one certificate to the next, however short they are valid.
const SHORTEST: Duration = Duration::from_secs(30);

/// The TLS configurations of our servers; empty until there is a certificate. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Certificate(Arc<ArcSwapOption<Configs>>);

struct Configs {
    webhooks: Arc<rustls::ServerConfig>,
    channel: Arc<rustls::ServerConfig>,
}

impl Certificate {
    /// The configuration for a new connection to the webhooks.
    pub(crate) fn config(&self) -> Option<Arc<rustls::ServerConfig>> {
        self.0
            .load()
            .as_ref()
            .map(|both| Arc::clone(&both.webhooks))
    }

    /// The configuration for a new connection of a proxy: it may come with a certificate of the mesh.
    pub(crate) fn channel(&self) -> Option<Arc<rustls::ServerConfig>> {
        self.0.load().as_ref().map(|both| Arc::clone(&both.channel))
    }
}

/// What went wrong; it is tried again.
#[derive(Debug, thiserror::Error)]
enum ServingError {
    #[error(transparent)]
    Authority(#[from] mesh_identity::ca::CaError),
    #[error(transparent)]
    Tls(#[from] mesh_identity::tls::TlsError),
    #[error(transparent)]
    Channel(#[from] mesh_identity::channel::ChannelError),
    #[error(transparent)]
    Signer(#[from] SignError),
}

/// Keeps the certificate and the webhook configurations right, for ever: with each change of the authority, and in time.
pub(crate) async fn keep(options: Arc<Options>, certificate: Certificate, mut issuing: Issuing) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5), 1);
    loop {
        let Some(held) = held(&mut issuing).await else {
            return;
        };
        issuing.mark_unchanged();
        match serve_with(&options, &certificate, &held).await {
            Ok(end) => {
                // A signer elsewhere may give less than was asked for.
                let left = Duration::from_secs(end.saturating_sub(now()));
                let renewal = RENEW.min(left / 2).max(SHORTEST);
                tokio::select! {
                    () = tokio::time::sleep(renewal) => {}
                    changed = issuing.changed() => if changed.is_err() { return },
                    // Ends early only when telling failed: then it starts anew, after a moment.
                    error = tell_callers(&options, held.trusted.pem()) => {
                        tracing::warn!(%error, "keeping the webhook configurations; trying again");
                        tokio::time::sleep(backoff.wait()).await;
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, "making the control plane's certificate; trying again");
                tokio::time::sleep(backoff.wait()).await;
            }
        }
    }
}

/// Makes a certificate, or has one made, and serves with it. Gives the end of its validity.
async fn serve_with(
    options: &Options,
    certificate: &Certificate,
    held: &Held,
) -> Result<u64, ServingError> {
    let (service, namespace) = (&options.service, &options.namespace);
    let names = [
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}.svc.cluster.local"),
        format!("{service}.{namespace}"),
        service.clone(),
        // Istio's old name, which agents of remote clusters still use.
        format!("istio-pilot.{namespace}.svc"),
        "localhost".to_owned(),
    ];
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (leaf, end) = match &held.signer {
        Signer::Own(own) => {
            let now = now();
            let leaf = own.issue_server(&names, &[], now, LEAF_LIFETIME)?;
            (leaf, own.not_after().min(now + LEAF_LIFETIME))
        }
        Signer::Elsewhere(elsewhere) => elsewhere.server(&names, LEAF_LIFETIME).await?,
    };
    certificate.0.store(Some(Arc::new(Configs {
        webhooks: mesh_identity::tls::server_config(&leaf, &["h2", "http/1.1"])?,
        channel: mesh_identity::channel::server(&leaf, &held.trusted)?,
    })));
    Ok(end)
}

/// Keeps the authority's certificate in the webhook configurations that call us, whoever changes them, and makes validation
/// binding now that it is served (it is installed with `Ignore`, so that it does not block its own installation). Gives why
/// it stopped.
async fn tell_callers(options: &Options, bundle: &str) -> String {
    let configurations = |kind: &str, plural: &str| -> Api<DynamicObject> {
        let gvk = GroupVersionKind::gvk("admissionregistration.k8s.io", "v1", kind);
        let resource = ApiResource::from_gvk_with_plural(&gvk, plural);
        Api::all_with(options.client.clone(), &resource)
    };
    let mutating = configurations(
        "MutatingWebhookConfiguration",
        "mutatingwebhookconfigurations",
    );
    let validating = configurations(
        "ValidatingWebhookConfiguration",
        "validatingwebhookconfigurations",
    );
    let watched = |api: &Api<DynamicObject>, binding: bool| {
        watcher(api.clone(), watcher::Config::default()).map(move |event| (binding, event))
    };
    let mut events = std::pin::pin!(futures::stream::select(
        watched(&mutating, false),
        watched(&validating, true)
    ));
    while let Some((binding, event)) = events.next().await {
        let configuration = match event {
            Ok(Event::Apply(configuration) | Event::InitApply(configuration)) => configuration,
            Ok(_) => continue,
            Err(error) => return format!("watching: {error}"),
        };
        let api = if binding { &validating } else { &mutating };
        if let Err(error) = correct(api, &configuration, options, bundle, binding).await {
            return format!("patching: {error}");
        }
    }
    "the watch ended".to_owned()
}

async fn correct(
    api: &Api<DynamicObject>,
    configuration: &DynamicObject,
    options: &Options,
    bundle: &str,
    binding: bool,
) -> Result<(), kube::Error> {
    let name = configuration.metadata.name.as_deref().unwrap_or_default();
    let operations = corrections(&configuration.data["webhooks"], options, bundle, binding);
    if operations.is_empty() {
        return Ok(());
    }
    let patch: json_patch::Patch =
        serde_json::from_value(Value::Array(operations)).map_err(kube::Error::SerdeError)?;
    api.patch(name, &PatchParams::default(), &Patch::Json::<()>(patch))
        .await?;
    tracing::info!(name, "told the caller of our webhooks whom to trust");
    Ok(())
}

/// The JSON patch that makes the webhooks that call our Service trust us; empty if they do.
fn corrections(webhooks: &Value, options: &Options, bundle: &str, fail: bool) -> Vec<Value> {
    let bundle = BASE64.encode(bundle);
    let mut operations = Vec::new();
    for (index, webhook) in webhooks.as_array().into_iter().flatten().enumerate() {
        let service = &webhook["clientConfig"]["service"];
        if service["name"] != options.service.as_str()
            || service["namespace"] != options.namespace.as_str()
        {
            continue;
        }
        let mut corrected = Vec::new();
        if webhook["clientConfig"]["caBundle"] != bundle.as_str() {
            corrected.push(json!({"op": "add", "path": format!("/webhooks/{index}/clientConfig/caBundle"), "value": bundle}));
        }
        if fail && webhook["failurePolicy"] == "Ignore" {
            corrected.push(json!({"op": "add", "path": format!("/webhooks/{index}/failurePolicy"), "value": "Fail"}));
        }
        if !corrected.is_empty() {
            // Somebody may change the order meanwhile.
            operations.push(json!({"op": "test", "path": format!("/webhooks/{index}/name"), "value": webhook["name"]}));
            operations.extend(corrected);
        }
    }
    operations
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}
