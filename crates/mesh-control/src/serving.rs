//! The webhooks' certificate: from the authority in a Secret, renewed in time, and known to those who call the webhooks.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::{self, Event, watcher};
use mesh_identity::ca::Authority;
use mesh_xds::backoff::Backoff;
use serde_json::{Value, json};

use crate::Options;

/// Istio's name for the Secret of a self-signed authority, and the keys in it.
const SECRET: &str = "istio-ca-secret";
const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
/// Ten years, as Istio's self-signed root.
const ROOT_LIFETIME: u64 = 3650 * 86_400;
const LEAF_LIFETIME: u64 = 90 * 86_400;
/// The certificate is made anew at this age.
const RENEW: Duration = Duration::from_secs(30 * 86_400);
/// The TLS configuration of the webhooks; empty until there is a certificate. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Certificate(Arc<ArcSwapOption<rustls::ServerConfig>>);

impl Certificate {
    /// The configuration for a new connection.
    pub(crate) fn config(&self) -> Option<Arc<rustls::ServerConfig>> {
        self.0.load_full()
    }
}

/// What went wrong; it is tried again.
#[derive(Debug, thiserror::Error)]
enum ServingError {
    #[error("Secret {SECRET}: {0}")]
    Secret(Box<kube::Error>),
    #[error(
        "Secret {SECRET}: {0}; delete it to have a new authority made, which breaks the trust of running proxies"
    )]
    Content(String),
    #[error(transparent)]
    Authority(#[from] mesh_identity::ca::CaError),
    #[error(transparent)]
    Tls(#[from] mesh_identity::tls::TlsError),
}

/// Keeps the certificate and the webhook configurations right, for ever.
pub(crate) async fn keep(options: Arc<Options>, certificate: Certificate) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5), 1);
    loop {
        match serve_with(&options, &certificate).await {
            Ok(bundle) => {
                // Ends early only when telling failed: then it starts anew, after a moment.
                if let Ok(error) =
                    tokio::time::timeout(RENEW, tell_callers(&options, &bundle)).await
                {
                    tracing::warn!(%error, "keeping the webhook configurations; trying again");
                    tokio::time::sleep(backoff.wait()).await;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "making the webhooks' certificate; trying again");
                tokio::time::sleep(backoff.wait()).await;
            }
        }
    }
}

/// Makes a certificate and serves with it; gives the authority's certificate.
async fn serve_with(options: &Options, certificate: &Certificate) -> Result<String, ServingError> {
    let authority = authority(options).await?;
    let (service, namespace) = (&options.service, &options.namespace);
    let names = [
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}.svc.cluster.local"),
        format!("{service}.{namespace}"),
        service.clone(),
        "localhost".to_owned(),
    ];
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let leaf = authority.issue_server(&names, &[], now(), LEAF_LIFETIME)?;
    let config = mesh_identity::tls::server_config(&leaf, &["h2", "http/1.1"])?;
    certificate.0.store(Some(config));
    Ok(authority.certificate_pem().to_owned())
}

/// Loads the authority, or makes it. When two control planes start at once, one of them creates the Secret and the other
/// loads it.
async fn authority(options: &Options) -> Result<Authority, ServingError> {
    let api = core_api(options, "Secret", "secrets");
    let failed = |error| ServingError::Secret(Box::new(error));
    if let Some(secret) = api.get_opt(SECRET).await.map_err(failed)? {
        return load(&secret);
    }
    let authority = Authority::generate("cluster.local", "Root CA", now(), ROOT_LIFETIME)?;
    let secret = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": { "name": SECRET, "namespace": options.namespace },
        "type": "istio.io/ca-root",
        "data": {
            CERTIFICATE: BASE64.encode(authority.certificate_pem()),
            KEY: BASE64.encode(authority.key_pem()),
        },
    });
    let secret: DynamicObject =
        serde_json::from_value(secret).map_err(|error| ServingError::Content(error.to_string()))?;
    match api.create(&PostParams::default(), &secret).await {
        Ok(_) => Ok(authority),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            load(&api.get(SECRET).await.map_err(failed)?)
        }
        Err(error) => Err(failed(error)),
    }
}

fn load(secret: &DynamicObject) -> Result<Authority, ServingError> {
    let part = |key: &str| {
        let text = secret.data["data"][key]
            .as_str()
            .ok_or_else(|| ServingError::Content(format!("it has no {key}")))?;
        BASE64
            .decode(text)
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or_else(|| ServingError::Content(format!("{key} is not text in base64")))
    };
    Ok(Authority::from_pem(&part(CERTIFICATE)?, &part(KEY)?)?)
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

fn core_api(options: &Options, kind: &str, plural: &str) -> Api<DynamicObject> {
    let resource =
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", kind), plural);
    Api::namespaced_with(options.client.clone(), &options.namespace, &resource)
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}
