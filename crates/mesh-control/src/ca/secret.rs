//! The Secret of the authority: `cacerts`, brought by an operator, wins over `istio-ca-secret`, which is made where neither is there.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt;
use kube::Api;
use kube::api::PostParams;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::{self, Event, watcher};
use mesh_identity::ca::{Authority, CaError, Parts};
use mesh_xds::backoff::Backoff;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::Options;
use crate::ca::{Held, Origin, put, rotation};
use crate::metrics::Metrics;
use crate::serving::now;

/// Istio's names of the Secrets, and of the keys in them.
pub(crate) const SELF_SIGNED: &str = "istio-ca-secret";
const PLUGGED_IN: &str = "cacerts";
pub(crate) const CERTIFICATE: &str = "ca-cert.pem";
pub(crate) const KEY: &str = "ca-key.pem";
pub(crate) const ROOTS: &str = "root-cert.pem";
const CHAIN: &str = "cert-chain.pem";
const REVOKED: &str = "ca-crl.pem";
/// The other form of `cacerts`, that of cert-manager: certificate, key, root.
const TLS_FORM: [&str; 3] = ["tls.crt", "tls.key", "ca.crt"];
/// Ten years, as Istio's self-signed root.
pub(crate) const ROOT_LIFETIME: u64 = 3650 * 86_400;
pub(crate) const ORGANIZATION: &str = "cluster.local";
pub(crate) const COMMON_NAME: &str = "Root CA";

/// What is wrong with a Secret, or with reaching it; it is tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretError {
    #[error("reading or writing it: {0}")]
    Api(#[from] Box<kube::Error>),
    #[error("{0}; correct it (what was in force before stays)")]
    Content(String),
    #[error(transparent)]
    Authority(#[from] CaError),
    /// The root would be swapped under the feet of everybody.
    #[error(
        "its roots (root-cert.pem) leave out {present}, under which all certificates of now are, or its own root is not trusted by all as yet, so that workloads would \
         not trust each other any more; what was in force before stays. To change the root take two steps: first put both roots into root-cert.pem and wait until all proxies trust both \
         (mesh proxy-config secret), then put the new certificate and key there, and when all certificates are renewed take the old root out. \
         To change it at once, at the price of refused connections, restart the control plane"
    )]
    NoOverlap { present: String },
    /// An operator's authority is gone.
    #[error(
        "it was deleted; what it held stays in force until the control plane is restarted: put it back, or put one there whose root-cert.pem holds {present} too"
    )]
    Deleted { present: String },
}

impl From<kube::Error> for SecretError {
    fn from(error: kube::Error) -> Self {
        Self::Api(Box::new(error))
    }
}

/// Keeps the authority that the Secrets hold in force, for ever. A broken one never replaces a good one, and `cacerts` that can't be used is
/// never passed over: the mesh would get a root that nobody chose.
pub(crate) async fn keep(
    options: Arc<Options>,
    metrics: Arc<Metrics>,
    issuing: watch::Sender<Option<Arc<Held>>>,
) {
    let api = secrets(&options);
    let watched = |name: &'static str| {
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        watcher(api.clone(), config).map(move |event| (name, event))
    };
    let mut events = std::pin::pin!(futures::stream::select(
        watched(PLUGGED_IN),
        watched(SELF_SIGNED)
    ));
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5), 1);
    let mut plugged_in = Seen::default();
    let mut own = Seen::default();
    let mut retry = None;
    loop {
        let again = async {
            match retry {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = events.next() => match event {
                Some((PLUGGED_IN, Ok(event))) => plugged_in.take(PLUGGED_IN, event),
                Some((_, Ok(event))) => own.take(SELF_SIGNED, event),
                Some((secret, Err(error))) => {
                    tracing::warn!(secret, %error, "watching the authority's Secret; trying again");
                    tokio::time::sleep(backoff.wait()).await;
                    continue;
                }
                None => return,
            },
            () = again => {}
        }
        retry = None;
        if !plugged_in.listed || !own.listed {
            continue;
        }
        let present = issuing.borrow().clone();
        match settle(&api, &options, (&plugged_in, &own), present.as_deref()).await {
            Ok(Settled::Now(held)) => {
                backoff.reset();
                put(&issuing, &metrics, *held);
            }
            Ok(Settled::Restored(written)) => {
                backoff.reset();
                metrics.citadel.restored.inc_by(i64::from(written));
            }
            Err((secret, error)) => {
                metrics.citadel.load_failures.inc();
                tracing::error!(secret, %error, "the certificate authority can't be used");
                // What is wrong in a Secret is mended by changing it, and that is seen.
                let by_itself = matches!(error, SecretError::Api(_));
                retry = by_itself.then(|| backoff.wait());
            }
        }
    }
}

/// A Secret as the watch shows it.
#[derive(Default)]
struct Seen {
    listed: bool,
    secret: Option<DynamicObject>,
    listing: Option<DynamicObject>,
}

impl Seen {
    fn take(&mut self, name: &str, event: Event<DynamicObject>) {
        let this = |object: &DynamicObject| object.metadata.name.as_deref() == Some(name);
        match event {
            Event::Init => self.listing = None,
            Event::InitApply(object) if this(&object) => self.listing = Some(object),
            Event::InitDone => {
                self.listed = true;
                self.secret = self.listing.take();
            }
            Event::Apply(object) if this(&object) => self.secret = Some(object),
            Event::Delete(object) if this(&object) => self.secret = None,
            _ => {}
        }
    }
}

/// What the Secrets led to.
enum Settled {
    /// The authority that they say.
    Now(Box<Held>),
    /// They said nothing any more, and say again what is in force; whether it was written here.
    Restored(bool),
}

/// The authority that the Secrets say; makes one where they say nothing, and nothing is in force. What would swap the root that is in force
/// for another one, without a time in which both are trusted, is refused (as in Istio).
async fn settle(
    api: &Api<DynamicObject>,
    options: &Options,
    (plugged_in, own): (&Seen, &Seen),
    present: Option<&Held>,
) -> Result<Settled, (&'static str, SecretError)> {
    let (name, loaded) = match (&plugged_in.secret, &own.secret, present) {
        (Some(secret), ..) => (PLUGGED_IN, load(secret, Origin::PluggedIn)),
        (None, Some(secret), _) => (SELF_SIGNED, load(secret, Origin::SelfSigned)),
        (None, None, None) => (SELF_SIGNED, make(api, options).await),
        (None, None, Some(present)) if present.origin == Origin::PluggedIn => {
            let present = present.root.clone();
            return Err((PLUGGED_IN, SecretError::Deleted { present }));
        }
        (None, None, Some(present)) => {
            let restored = restore(api, options, present).await;
            return restored
                .map(Settled::Restored)
                .map_err(|error| (SELF_SIGNED, error));
        }
    };
    let held = loaded.map_err(|error| (name, error))?;
    match present {
        Some(present) if !present.is_continued_by(&held) => {
            let present = present.root.clone();
            Err((name, SecretError::NoOverlap { present }))
        }
        _ => Ok(Settled::Now(Box::new(held))),
    }
}

/// Writes the Secret of the self-signed authority again, from what is in force. A next root that was only trusted is given up: nothing is
/// signed by it yet.
async fn restore(
    api: &Api<DynamicObject>,
    options: &Options,
    present: &Held,
) -> Result<bool, SecretError> {
    let Some(authority) = present.own() else {
        return Ok(false);
    };
    let secret = object(options, authority, present.trusted.pem())?;
    match api.create(&PostParams::default(), &secret).await {
        Ok(_) => {
            tracing::warn!(
                root = present.root,
                "Secret {SELF_SIGNED} was deleted, and is written again with the authority that is in force; a new root is asked for with `mesh ca rotate`"
            );
            Ok(true)
        }
        // Somebody else wrote one, or the watch has not shown ours yet.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The Secret of a self-signed authority.
fn object(
    options: &Options,
    authority: &Authority,
    roots: &str,
) -> Result<DynamicObject, SecretError> {
    let secret = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": { "name": SELF_SIGNED, "namespace": options.namespace },
        "type": "istio.io/ca-root",
        "data": {
            CERTIFICATE: BASE64.encode(authority.certificate_pem()),
            KEY: BASE64.encode(authority.key_pem()),
            CHAIN: "",
            ROOTS: BASE64.encode(roots),
        },
    });
    serde_json::from_value(secret).map_err(|error| SecretError::Content(error.to_string()))
}

/// Makes an authority and keeps it. When two control planes start at once, one of them creates the Secret and the other loads it.
async fn make(api: &Api<DynamicObject>, options: &Options) -> Result<Held, SecretError> {
    let authority = Authority::generate(ORGANIZATION, COMMON_NAME, now(), ROOT_LIFETIME)?;
    let secret = object(options, &authority, authority.certificate_pem())?;
    match api.create(&PostParams::default(), &secret).await {
        Ok(_) => {
            tracing::info!(
                root = authority.root(),
                "a new certificate authority was made"
            );
            Ok(Held::new(authority, Origin::SelfSigned)?)
        }
        Err(kube::Error::Api(status)) if status.code == 409 => {
            load(&api.get(SELF_SIGNED).await?, Origin::SelfSigned)
        }
        Err(error) => Err(error.into()),
    }
}

/// Reads the authority from a Secret.
pub(crate) fn load(secret: &DynamicObject, origin: Origin) -> Result<Held, SecretError> {
    let data = &secret.data["data"];
    let [certificate, key, root] = TLS_FORM;
    let names = match origin {
        Origin::PluggedIn if data.get(CERTIFICATE).is_none() && data.get(certificate).is_some() => {
            [certificate, key, certificate, root]
        }
        _ => [CERTIFICATE, KEY, CHAIN, ROOTS],
    };
    if !part(data, REVOKED)?.trim().is_empty() {
        tracing::warn!(
            "the Secret has {REVOKED}: revocation lists of the authority are not supported, revoked certificates stay valid"
        );
    }
    let needed = |name: &str| match part(data, name)? {
        text if text.trim().is_empty() => Err(SecretError::Content(format!("it has no {name}"))),
        text => Ok(text),
    };
    let (issuing, key) = (needed(names[0])?, needed(names[1])?);
    // In the form of cert-manager the certificate is followed by those above it.
    let issuing = first(&issuing);
    let authority = Authority::load(Parts {
        certificate: &issuing,
        key: &key,
        chain: &part(data, names[2])?,
        roots: &part(data, names[3])?,
    })?;
    let mut held = Held::new(authority, origin)?;
    if origin == Origin::SelfSigned {
        held.phase = rotation::phase(data, &held.trusted);
        let annotations = secret.metadata.annotations.as_ref();
        held.requested = annotations.is_some_and(|all| all.contains_key(rotation::REQUEST));
        held.former = annotations.and_then(|all| all.get(rotation::FORMER).cloned());
    }
    Ok(held)
}

fn first(pem: &str) -> String {
    const END: &str = "-----END CERTIFICATE-----";
    match pem.find(END) {
        Some(end) => format!("{}\n", &pem[..end + END.len()]),
        None => pem.to_owned(),
    }
}

/// A key of a Secret's data; empty where there is none.
pub(crate) fn part(data: &Value, key: &str) -> Result<String, SecretError> {
    let Some(text) = data.get(key).and_then(Value::as_str) else {
        return Ok(String::new());
    };
    BASE64
        .decode(text)
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or_else(|| SecretError::Content(format!("{key} is not text in base64")))
}

pub(crate) fn secrets(options: &Options) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk("", "v1", "Secret");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "secrets");
    Api::namespaced_with(options.client.clone(), &options.namespace, &resource)
}
