//! The webhooks' certificate: from the authority in a Secret, renewed in time, and known to those who call the webhooks.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
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
/// How often the webhook configurations are looked at: somebody may have put back what we wrote.
const REFRESH: Duration = Duration::from_secs(2);

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
                backoff.reset();
                let renew = tokio::time::Instant::now() + RENEW;
                while tokio::time::Instant::now() < renew {
                    tell_callers(&options, &bundle).await;
                    tokio::time::sleep(REFRESH).await;
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

/// Puts the authority's certificate into the webhook configurations that call us, and makes validation binding now that it
/// is served (it is installed with `Ignore`, so that it does not block its own installation).
async fn tell_callers(options: &Options, bundle: &str) {
    for (kind, plural) in [
        (
            "MutatingWebhookConfiguration",
            "mutatingwebhookconfigurations",
        ),
        (
            "ValidatingWebhookConfiguration",
            "validatingwebhookconfigurations",
        ),
    ] {
        let gvk = GroupVersionKind::gvk("admissionregistration.k8s.io", "v1", kind);
        let resource = ApiResource::from_gvk_with_plural(&gvk, plural);
        let api: Api<DynamicObject> = Api::all_with(options.client.clone(), &resource);
        let listed = match api.list(&Default::default()).await {
            Ok(list) => list.items,
            Err(error) => {
                tracing::warn!(kind, %error, "listing webhook configurations; trying again");
                continue;
            }
        };
        for configuration in listed {
            let Some(name) = configuration.metadata.name.as_deref() else {
                continue;
            };
            let fail = kind.starts_with("Validating");
            let operations = corrections(&configuration.data["webhooks"], options, bundle, fail);
            if operations.is_empty() {
                continue;
            }
            let patch: Result<json_patch::Patch, _> =
                serde_json::from_value(Value::Array(operations));
            let Ok(patch) = patch else { continue };
            match api
                .patch(name, &PatchParams::default(), &Patch::Json::<()>(patch))
                .await
            {
                Ok(_) => {
                    tracing::info!(kind, name, "told the caller of our webhooks whom to trust")
                }
                Err(error) => tracing::warn!(kind, name, %error, "patching; trying again"),
            }
        }
    }
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
