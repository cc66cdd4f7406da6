//! Certificates of gateways: from Secrets of the cluster to those proxies alone that may read them (SDS over the aggregated stream).
//!
//! Only Secrets that a connected proxy was told to ask for are watched, each by its name. A proxy gets those of its own namespace, if it has proven who
//! it is, and if the API says that its service account may read them there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret as Message, TlsCertificate,
};
use futures::StreamExt;
use kube::Api;
use kube::api::PostParams;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::{self, Event};
use mesh_api::core::{CoreObject, Secret};
use mesh_identity::spiffe::SpiffeId;
use mesh_xds::backoff::Backoff;
use mesh_xds::{Resource, types};
use prost::Message as _;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// How long an answer about what an account may read is believed (Istio's).
const REVIEW: Duration = Duration::from_secs(60);
/// Longest time for such an answer: others wait meanwhile.
const ANSWER: Duration = Duration::from_secs(2);
/// Names of the two forms that a Secret may have.
const CERTIFICATES: [(&str, &str); 2] = [("tls.crt", "tls.key"), ("cert", "key")];
const ROOTS: [&str; 2] = ["ca.crt", "cacert"];
const REVOCATIONS: [&str; 2] = ["ca.crl", "crl"];
/// What names of roots end in.
const ROOTS_SUFFIX: &str = "-cacert";

/// Namespace and name.
type Name = (String, String);

/// All Secrets that somebody wants. Clones share them.
#[derive(Clone)]
pub(crate) struct Secrets {
    client: kube::Client,
    state: Arc<Mutex<State>>,
    /// Counts changes.
    version: Arc<watch::Sender<u64>>,
}

#[derive(Default)]
struct State {
    /// Who wants each, with what is known of it and what watches it.
    watched: BTreeMap<Name, Watched>,
    /// What accounts may read Secrets of a namespace, and when that was said.
    reviews: BTreeMap<(String, String, String), (bool, Instant)>,
}

struct Watched {
    by: BTreeSet<u64>,
    task: AbortHandle,
    /// The API has said whether there is one.
    listed: bool,
    secret: Option<Arc<Secret>>,
}

/// What a proxy gets.
#[derive(Default)]
pub(crate) struct Given {
    pub(crate) resources: Vec<Resource>,
    /// What it does not get, and why.
    pub(crate) refused: Vec<(String, &'static str)>,
}

impl Given {
    fn refuse(&mut self, name: &str, reason: &'static str) {
        self.refused.push((name.to_owned(), reason));
    }
}

/// A name that a proxy asks for.
struct Wanted {
    /// As it is asked for.
    resource: String,
    /// Secrets that may have it, the first one first.
    candidates: Vec<Name>,
    /// Roots alone.
    roots: bool,
}

/// Why the API did not say what an account may read.
#[derive(Debug, thiserror::Error)]
enum ReviewError {
    #[error("it took too long")]
    Slow,
    #[error(transparent)]
    Api(#[from] kube::Error),
}

impl Wanted {
    /// What a Secret lacks that has not what is wanted.
    fn needs(&self) -> &'static str {
        if self.roots {
            "the Secret has no ca.crt (or cacert)"
        } else {
            "the Secret has not both of tls.crt and tls.key (or cert and key)"
        }
    }

    /// `kubernetes://NAME`, `kubernetes://NAMESPACE/NAME` or `kubernetes-gateway://NAMESPACE/NAME`, for roots with `-cacert` at the end: of the
    /// Secret of that very name, or of the one without the end.
    fn parse(resource: &str, own_namespace: &str) -> Option<Self> {
        let (scheme, rest) = resource.split_once("://")?;
        if !matches!(scheme, "kubernetes" | "kubernetes-gateway") {
            return None;
        }
        let (namespace, name) = rest.split_once('/').unwrap_or((own_namespace, rest));
        let whole = (namespace.to_owned(), name.to_owned());
        let (candidates, roots) = match name.strip_suffix(ROOTS_SUFFIX) {
            Some(short) => (vec![whole, (namespace.to_owned(), short.to_owned())], true),
            None => (vec![whole], false),
        };
        Some(Self {
            resource: resource.to_owned(),
            candidates,
            roots,
        })
    }
}

impl Secrets {
    pub(crate) fn new(client: kube::Client) -> Self {
        Self {
            client,
            state: Arc::default(),
            version: Arc::new(watch::Sender::new(0)),
        }
    }

    /// Tells of changes of any Secret that somebody wants.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// The secrets that a proxy gets of those that its configuration names; `node` is a number for the proxy's stream. What it may not have or what
    /// does not exist is left out, so that the proxy refuses connections which need it, and named with the reason.
    pub(crate) async fn of<'a>(
        &self,
        node: u64,
        identity: Option<&SpiffeId>,
        names: impl Iterator<Item = &'a String>,
    ) -> Given {
        let mut given = Given::default();
        let mut wanted = Vec::new();
        for name in names {
            let Some(identity) = identity else {
                given.refuse(name, "discovery in plain text proves no identity, and secrets are for proven ones alone");
                continue;
            };
            match Wanted::parse(name, &identity.namespace) {
                None => given.refuse(name, "not the name of a Secret of Kubernetes"),
                Some(one) if one.candidates[0].0 != identity.namespace => {
                    given.refuse(name, "a gateway gets secrets of its own namespace alone");
                }
                Some(one) => wanted.push(one),
            }
        }
        let allowed = match identity {
            Some(identity) if !wanted.is_empty() => self.may_read(identity).await,
            _ => false,
        };
        let names: BTreeSet<Name> = wanted
            .iter()
            .filter(|_| allowed)
            .flat_map(|wanted| wanted.candidates.iter().cloned())
            .collect();
        self.want(node, &names);
        let state = self.lock();
        for one in &wanted {
            if !allowed {
                given.refuse(&one.resource, "the gateway's service account may not list secrets of its namespace (a Role for that is missing)");
                continue;
            }
            let watched = || {
                one.candidates
                    .iter()
                    .filter_map(|name| state.watched.get(name))
            };
            let found = watched().filter_map(|watched| watched.secret.as_ref());
            let exists = found.clone().next().is_some();
            let mut usable = found.filter_map(|secret| encoded(one, secret));
            match usable.next() {
                Some(resource) => given.resources.push(resource),
                None if exists => given.refuse(&one.resource, one.needs()),
                None if watched().all(|watched| watched.listed) => {
                    given.refuse(
                        &one.resource,
                        "there is no such Secret in the gateway's namespace",
                    );
                }
                // It is being looked up.
                None => {}
            }
        }
        given
    }

    /// A proxy is gone: what nobody else wants is not watched any more.
    pub(crate) fn forget(&self, node: u64) {
        self.want(node, &BTreeSet::new());
    }

    fn want(&self, node: u64, names: &BTreeSet<Name>) {
        let mut state = self.lock();
        state.watched.retain(|name, watched| {
            if !names.contains(name) {
                watched.by.remove(&node);
            }
            if watched.by.is_empty() {
                watched.task.abort();
            }
            !watched.by.is_empty()
        });
        for name in names {
            let watched = state.watched.entry(name.clone()).or_insert_with(|| {
                let task = tokio::spawn(observe(self.clone(), name.clone()));
                Watched {
                    by: BTreeSet::new(),
                    task: task.abort_handle(),
                    listed: false,
                    secret: None,
                }
            });
            watched.by.insert(node);
        }
    }

    fn put(&self, name: &Name, secret: Option<Secret>) {
        let mut state = self.lock();
        let Some(watched) = state.watched.get_mut(name) else {
            return;
        };
        let first = !std::mem::replace(&mut watched.listed, true);
        if first || watched.secret.as_deref() != secret.as_ref() {
            watched.secret = secret.map(Arc::new);
            drop(state);
            self.version.send_modify(|version| *version += 1);
        }
    }

    /// Whether a proxy's service account may read the Secrets of its namespace. When the API can't be asked, what it said last counts, and without that
    /// nobody may.
    async fn may_read(&self, identity: &SpiffeId) -> bool {
        let SpiffeId {
            namespace,
            service_account,
            ..
        } = identity;
        let key = (
            namespace.clone(),
            service_account.clone(),
            namespace.clone(),
        );
        let before = self.lock().reviews.get(&key).copied();
        if let Some((allowed, since)) = before
            && since.elapsed() < REVIEW
        {
            return allowed;
        }
        let answer = tokio::time::timeout(ANSWER, self.review(namespace, service_account)).await;
        match answer
            .map_err(|_| ReviewError::Slow)
            .and_then(|answer| Ok(answer?))
        {
            Ok(allowed) => {
                if !allowed {
                    self.look_again();
                    tracing::warn!(
                        %identity,
                        "the gateway's service account may not list secrets of its namespace (a Role for that is missing): it gets none"
                    );
                }
                self.lock().reviews.insert(key, (allowed, Instant::now()));
                allowed
            }
            Err(error) => {
                self.look_again();
                tracing::warn!(%identity, %error, "asking whether a gateway may read secrets");
                before.is_some_and(|(allowed, _)| allowed)
            }
        }
    }

    /// Asks again after a while for those who were told no.
    fn look_again(&self) {
        let version = Arc::clone(&self.version);
        tokio::spawn(async move {
            tokio::time::sleep(REVIEW).await;
            version.send_modify(|version| *version += 1);
        });
    }

    async fn review(&self, namespace: &str, account: &str) -> Result<bool, kube::Error> {
        let gvk = GroupVersionKind::gvk("authorization.k8s.io", "v1", "SubjectAccessReview");
        let resource = ApiResource::from_gvk_with_plural(&gvk, "subjectaccessreviews");
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "metadata": {},
            "spec": {
                "user": format!("system:serviceaccount:{namespace}:{account}"),
                "groups": ["system:serviceaccounts", format!("system:serviceaccounts:{namespace}"), "system:authenticated"],
                "resourceAttributes": { "namespace": namespace, "verb": "list", "resource": "secrets" },
            },
        });
        let review: DynamicObject =
            serde_json::from_value(review).map_err(kube::Error::SerdeError)?;
        let answer = api.create(&PostParams::default(), &review).await?;
        Ok(answer.data["status"]["allowed"] == true)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches one Secret until nobody wants it.
async fn observe(secrets: Secrets, name: Name) {
    let resource = ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("", "v1", Secret::KIND),
        Secret::PLURAL,
    );
    let api: Api<DynamicObject> = Api::namespaced_with(secrets.client.clone(), &name.0, &resource);
    let only = watcher::Config::default().fields(&format!("metadata.name={}", name.1));
    let mut events = std::pin::pin!(watcher::watcher(api, only));
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5), 7);
    // Not every API honours the selector.
    let is_it = |object: &DynamicObject| object.metadata.name.as_deref() == Some(name.1.as_str());
    let mut seen = None;
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => seen = None,
            Ok(Event::InitApply(object) | Event::Apply(object) | Event::Delete(object))
                if !is_it(&object) => {}
            Ok(Event::InitApply(object)) => seen = Some(object),
            Ok(Event::InitDone) => secrets.put(&name, seen.take().and_then(|object| read(&object))),
            Ok(Event::Apply(object)) => secrets.put(&name, read(&object)),
            Ok(Event::Delete(_)) => secrets.put(&name, None),
            Err(error) => {
                tracing::warn!(secret = %format!("{}/{}", name.0, name.1), %error, "watching a secret; trying again");
                tokio::time::sleep(backoff.wait()).await;
                continue;
            }
        }
        backoff.reset();
    }
}

fn read(object: &DynamicObject) -> Option<Secret> {
    Secret::from_value(&serde_json::to_value(object).ok()?).ok()
}

/// The message for a proxy; `None` where the Secret has not what is wanted of it.
fn encoded(wanted: &Wanted, secret: &Secret) -> Option<Resource> {
    let value = |key: &str| secret.bytes(key).filter(|bytes| !bytes.is_empty());
    let first = |keys: [&str; 2]| keys.into_iter().find_map(value);
    let content = if wanted.roots {
        Type::ValidationContext(CertificateValidationContext {
            trusted_ca: Some(inline(first(ROOTS)?)),
            crl: first(REVOCATIONS).map(inline),
            ..CertificateValidationContext::default()
        })
    } else {
        let (chain, key) = CERTIFICATES
            .into_iter()
            .find_map(|(chain, key)| Some((value(chain)?, value(key)?)))?;
        Type::TlsCertificate(TlsCertificate {
            certificate_chain: Some(inline(chain)),
            private_key: Some(inline(key)),
            ..TlsCertificate::default()
        })
    };
    let message = Message {
        name: wanted.resource.clone(),
        r#type: Some(content),
    };
    Some(Resource {
        name: wanted.resource.clone(),
        // Not made of the content: versions are shown to people.
        version: format!("{}-{}", secret.meta.uid, secret.meta.resource_version),
        type_url: types::SECRET.to_owned(),
        value: message.encode_to_vec().into(),
    })
}

fn inline(bytes: Vec<u8>) -> DataSource {
    DataSource {
        specifier: Some(Specifier::InlineBytes(bytes)),
        ..DataSource::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(data: &[(&str, &str)]) -> Secret {
        use base64::Engine as _;
        let data: serde_json::Map<String, serde_json::Value> = data
            .iter()
            .map(|(key, text)| {
                let text = base64::engine::general_purpose::STANDARD.encode(text);
                ((*key).to_owned(), text.into())
            })
            .collect();
        let raw = json!({ "metadata": { "name": "s", "uid": "u", "resourceVersion": "7" }, "data": data });
        Secret::from_value(&raw).expect("a secret")
    }

    #[test]
    fn names_say_namespace_and_part() {
        let own = Wanted::parse("kubernetes://a", "gw").expect("a name");
        assert_eq!(own.candidates, [("gw".to_owned(), "a".to_owned())]);
        let roots = Wanted::parse("kubernetes-gateway://other/a-cacert", "gw").expect("a name");
        assert!(roots.roots);
        assert_eq!(roots.candidates[1], ("other".to_owned(), "a".to_owned()));
        for foreign in ["file-cert:a~b", "default", "sds://x", "configmap://a/b"] {
            assert!(Wanted::parse(foreign, "gw").is_none(), "{foreign}");
        }
    }

    #[test]
    fn both_forms_of_secrets_are_read_and_incomplete_ones_are_not() {
        let certificate = Wanted::parse("kubernetes://a", "gw").expect("a name");
        let roots = Wanted::parse("kubernetes://a-cacert", "gw").expect("a name");
        for data in [
            [("tls.crt", "c"), ("tls.key", "k"), ("ca.crt", "r")],
            [("cert", "c"), ("key", "k"), ("cacert", "r")],
        ] {
            let resource = encoded(&certificate, &secret(&data)).expect("a certificate");
            assert_eq!(
                (resource.name.as_str(), resource.version.as_str()),
                ("kubernetes://a", "u-7")
            );
            let message = Message::decode(resource.value).expect("a message");
            let Some(Type::TlsCertificate(found)) = message.r#type else {
                panic!("no certificate")
            };
            assert_eq!(found.private_key, Some(inline(b"k".to_vec())));
            assert!(encoded(&roots, &secret(&data)).is_some());
        }
        assert!(encoded(&certificate, &secret(&[("tls.crt", "c")])).is_none());
        assert!(encoded(&roots, &secret(&[("tls.crt", "c"), ("tls.key", "k")])).is_none());
    }
}
