//! The control plane as registration authority: it judges who asks for what, lets a signer of the cluster sign (a
//! CertificateSigningRequest of `certificates.k8s.io/v1` that it approves), and judges the certificate before it hands it on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt;
use kube::Api;
use kube::api::{DeleteParams, PostParams, Preconditions, WatchEvent, WatchParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use mesh_identity::ca::Leaf;
use mesh_identity::csr::{self, CertificateRequest};
use mesh_identity::issued::{self, Issued, IssuedError};
use mesh_identity::spiffe::SpiffeId;
use mesh_identity::trust::TrustBundle;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::serving::now;

/// Requests to signers at a time: a flood of proxies must not become one of the API.
const PLACES: usize = 256;
/// Of these for one identity: a workload that asks without end must leave room for the others.
const PER_IDENTITY: usize = 64;
/// Shortest validity that Kubernetes takes, in seconds.
const MIN_SECONDS: u64 = 600;
/// Rounds of approving a request that others keep changing.
const ATTEMPTS: usize = 8;
/// Pause after a watch that broke.
const PAUSE: Duration = Duration::from_millis(200);
const USAGES: [&str; 4] = [
    "digital signature",
    "key encipherment",
    "server auth",
    "client auth",
];

/// A signer of the cluster that signs in place of the mesh's own authority (Istio's `EXTERNAL_CA=ISTIOD_RA_KUBERNETES_API`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct External {
    /// Who signs for workloads that name nobody (`K8S_SIGNER`), such as `clusterissuers.cert-manager.io/mesh`; empty where all name one.
    pub signer: String,
    /// Domain of the signers that workloads may name with `CertSigner` (`CERT_SIGNER_DOMAIN`); empty where they may not.
    pub domain: String,
    /// Who signs for the control plane itself (`PILOT_CERT_PROVIDER=k8s.io/SIGNER`).
    pub server_signer: String,
    /// How long a signer may take. Default: 60 s.
    pub patience: Duration,
}

/// Why an authority elsewhere can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExternalError {
    /// Another kind of authority.
    #[error(
        "EXTERNAL_CA={0:?} is not supported; the only one is ISTIOD_RA_KUBERNETES_API (a signer of the cluster), or give the mesh an intermediate of yours in the Secret cacerts"
    )]
    Kind(String),
    /// Settings of signers without the one that makes them count.
    #[error("{0} has no effect without EXTERNAL_CA=ISTIOD_RA_KUBERNETES_API")]
    Alone(&'static str),
    /// No signer for the control plane.
    #[error(
        "EXTERNAL_CA=ISTIOD_RA_KUBERNETES_API needs a signer: give K8S_SIGNER=DOMAIN/NAME, or CERT_SIGNER_DOMAIN and PILOT_CERT_PROVIDER=k8s.io/DOMAIN/NAME"
    )]
    NoSigner,
    /// A signer's name that Kubernetes would refuse.
    #[error(
        "{variable}={name:?} is not the name of a signer, DOMAIN/NAME, such as example.com/mesh"
    )]
    Name {
        /// Where it stands.
        variable: &'static str,
        /// What stands there.
        name: String,
    },
    /// A provider of the control plane's certificate that is not known.
    #[error(
        "PILOT_CERT_PROVIDER={0:?} is not supported; leave it out (istiod), or give k8s.io/SIGNER"
    )]
    Provider(String),
}

impl External {
    /// Reads the settings as Istio has them: `EXTERNAL_CA`, `K8S_SIGNER`, `CERT_SIGNER_DOMAIN`, `PILOT_CERT_PROVIDER`, each empty where it is
    /// not given. `None` where the mesh's own authority signs.
    ///
    /// # Errors
    /// Values that are not supported or don't fit together.
    pub fn read(
        kind: &str,
        signer: &str,
        domain: &str,
        provider: &str,
    ) -> Result<Option<Self>, ExternalError> {
        let server = match provider {
            "" | "istiod" => None,
            other => Some(
                other
                    .strip_prefix("k8s.io/")
                    .ok_or_else(|| ExternalError::Provider(other.to_owned()))?,
            ),
        };
        match kind {
            "" => {
                let given = [
                    ("K8S_SIGNER", !signer.is_empty()),
                    ("CERT_SIGNER_DOMAIN", !domain.is_empty()),
                    ("PILOT_CERT_PROVIDER=k8s.io/…", server.is_some()),
                ];
                return match given.into_iter().find(|(_, given)| *given) {
                    Some((name, _)) => Err(ExternalError::Alone(name)),
                    None => Ok(None),
                };
            }
            "ISTIOD_RA_KUBERNETES_API" => {}
            other => return Err(ExternalError::Kind(other.to_owned())),
        }
        let server = server.unwrap_or(signer);
        if server.is_empty() {
            return Err(ExternalError::NoSigner);
        }
        for (variable, name, may_be_empty) in [
            ("K8S_SIGNER", signer, true),
            ("PILOT_CERT_PROVIDER", server, false),
        ] {
            if !(may_be_empty && name.is_empty() || is_signer(name)) {
                let name = name.to_owned();
                return Err(ExternalError::Name { variable, name });
            }
        }
        if !domain.is_empty() && !is_signer(&format!("{domain}/x")) {
            return Err(ExternalError::Name {
                variable: "CERT_SIGNER_DOMAIN",
                name: domain.to_owned(),
            });
        }
        Ok(Some(Self {
            signer: signer.to_owned(),
            domain: domain.to_owned(),
            server_signer: server.to_owned(),
            patience: Duration::from_secs(60),
        }))
    }
}

/// `DOMAIN/NAME` as Kubernetes takes it.
fn is_signer(name: &str) -> bool {
    let good = |text: &str| {
        text.split('.').all(|label| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        })
    };
    name.len() <= 571
        && name
            .split_once('/')
            .is_some_and(|(domain, path)| domain.contains('.') && good(domain) && good(path))
}

/// Why there is no certificate of a signer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignError {
    #[error("the signer {0:?} may not be asked for: {1}")]
    Signer(String, &'static str),
    #[error(
        "a signer of the cluster gives no certificate for less than {MIN_SECONDS} seconds, {0} were asked for"
    )]
    TooShort(u64),
    #[error("{doing} a CertificateSigningRequest for signer {signer}: {source}{hint}")]
    Api {
        doing: &'static str,
        signer: String,
        source: Box<kube::Error>,
        hint: &'static str,
    },
    #[error("the CertificateSigningRequest {name} was denied: {message}")]
    Denied { name: String, message: String },
    #[error("the signer {signer} failed on the CertificateSigningRequest {name}: {message}")]
    Failed {
        name: String,
        signer: String,
        message: String,
    },
    #[error("the CertificateSigningRequest {0} was deleted before it was signed")]
    Gone(String),
    #[error(
        "no certificate from the signer {signer} within {patience:?}; is it running, and does it sign what is approved?"
    )]
    Late { signer: String, patience: Duration },
    #[error("the certificate of the signer {signer} is not handed on: {source}")]
    Answer { signer: String, source: IssuedError },
    #[error("{0} has {PER_IDENTITY} requests at signers already; try again")]
    Busy(String),
    #[error("making a certificate request: {0}")]
    Request(String),
    #[error("the request ended unexpectedly: {0}")]
    Ended(String),
}

impl SignError {
    /// The label by which refusals are counted.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Signer(..) => "signer",
            Self::TooShort(_) => "TTL_ERROR",
            Self::Api { .. } | Self::Request(_) | Self::Ended(_) => "signer_api",
            Self::Denied { .. } => "signer_denied",
            Self::Failed { .. } | Self::Gone(_) => "signer_failed",
            Self::Late { .. } => "signer_timeout",
            Self::Busy(_) => "signer_busy",
            Self::Answer { .. } => "signer_answer",
        }
    }
}

/// Roots, and the signers whose certificates lead to them; none means every signer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Roots {
    pub(crate) bundle: TrustBundle,
    pub(crate) signers: Vec<String>,
}

/// Signers of the cluster with the roots of each.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) roots: Vec<Roots>,
    /// The roots are those that an operator put into the ConfigMap of the control plane's namespace.
    pub(crate) from_map: bool,
    external: External,
    desk: Arc<Desk>,
}

/// What requests share, whatever the roots are.
pub(crate) struct Desk {
    client: kube::Client,
    places: Semaphore,
    /// Requests under way, by identity.
    under_way: Mutex<HashMap<String, usize>>,
}

/// A request under way; not one any more when it is dropped.
struct UnderWay {
    desk: Arc<Desk>,
    identity: String,
}

impl UnderWay {
    fn begin(desk: &Arc<Desk>, identity: String) -> Result<Self, SignError> {
        let mut all = desk
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let own = all.entry(identity.clone()).or_default();
        if *own >= PER_IDENTITY {
            return Err(SignError::Busy(identity));
        }
        *own += 1;
        Ok(Self {
            desk: Arc::clone(desk),
            identity,
        })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let all = &self.desk.under_way;
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = all.get_mut(&self.identity) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                all.remove(&self.identity);
            }
        }
    }
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

impl Desk {
    pub(crate) fn new(client: kube::Client) -> Arc<Self> {
        Arc::new(Self {
            client,
            places: Semaphore::new(PLACES),
            under_way: Mutex::default(),
        })
    }
}

impl Registration {
    pub(crate) fn new(
        external: External,
        (roots, from_map): (Vec<Roots>, bool),
        desk: Arc<Desk>,
    ) -> Self {
        Self {
            roots,
            from_map,
            external,
            desk,
        }
    }

    /// A certificate for a workload whose request (`pem`) was found good for `names`. `asked`: the signer that the workload names.
    pub(crate) async fn workload(
        &self,
        (pem, checked): (&str, &CertificateRequest),
        names: &[SpiffeId],
        asked: Option<&str>,
        lifetime: u64,
        max_lifetime: u64,
    ) -> Result<Issued, SignError> {
        let signer = self.signer(asked)?;
        let trusted = self.trusted(&signer)?;
        let identity = names.first().map(ToString::to_string);
        let under_way = UnderWay::begin(&self.desk, identity.unwrap_or_default())?;
        let answer = self.sign(pem, &signer, lifetime, Some(under_way)).await?;
        issued::workload(&answer, checked, names, &trusted, now(), max_lifetime)
            .map_err(|source| SignError::Answer { signer, source })
    }

    /// The control plane's own certificate; its key is made here. Gives the end of its validity, too.
    pub(crate) async fn server(
        &self,
        names: &[&str],
        lifetime: u64,
    ) -> Result<(Leaf, u64), SignError> {
        let signer = self.external.server_signer.clone();
        let trusted = self.trusted(&signer)?;
        let (pem, key_pem) =
            csr::make_server(names).map_err(|error| SignError::Request(error.to_string()))?;
        let answer = self.sign(&pem, &signer, lifetime, None).await?;
        let issued = issued::server(&answer, &key_pem, names, &trusted, now())
            .map_err(|source| SignError::Answer { signer, source })?;
        let leaf = Leaf {
            chain_pem: issued.chain_pem,
            key_pem,
        };
        Ok((leaf, issued.not_after))
    }

    fn signer(&self, asked: Option<&str>) -> Result<String, SignError> {
        let External { signer, domain, .. } = &self.external;
        let Some(asked) = asked else {
            return match signer.is_empty() {
                true => Err(SignError::Signer(
                    String::new(),
                    "there is none for workloads that name none (K8S_SIGNER); set ISTIO_META_CERT_SIGNER at the proxy",
                )),
                false => Ok(signer.clone()),
            };
        };
        let full = format!("{domain}/{asked}");
        if domain.is_empty() {
            let why = "the control plane has no domain of signers (CERT_SIGNER_DOMAIN)";
            return Err(SignError::Signer(asked.to_owned(), why));
        }
        match is_signer(&full) {
            true => Ok(full),
            false => Err(SignError::Signer(
                asked.chars().take(100).collect(),
                "it is not the name of a signer",
            )),
        }
    }

    /// The roots of a signer. One without roots is not asked: nobody would trust what it signs.
    fn trusted(&self, signer: &str) -> Result<TrustBundle, SignError> {
        let is_of = |roots: &&Roots| {
            roots.signers.is_empty() || roots.signers.iter().any(|name| name == signer)
        };
        let mut all: Option<TrustBundle> = None;
        for roots in self.roots.iter().filter(is_of) {
            let both = match &all {
                None => Ok(roots.bundle.clone()),
                Some(before) => before.and(&roots.bundle),
            };
            all = Some(both.map_err(|error| SignError::Request(error.to_string()))?);
        }
        let why = "caCertificates of the mesh configuration holds no root of it (certSigners)";
        all.ok_or_else(|| SignError::Signer(signer.to_owned(), why))
    }

    /// Lets the signer sign. What was begun is finished and tidied up, also when the caller has gone meanwhile.
    async fn sign(
        &self,
        pem: &str,
        signer: &str,
        lifetime: u64,
        under_way: Option<UnderWay>,
    ) -> Result<String, SignError> {
        if lifetime < MIN_SECONDS {
            return Err(SignError::TooShort(lifetime));
        }
        let object = object(pem, signer, lifetime)?;
        let (desk, signer) = (Arc::clone(&self.desk), signer.to_owned());
        let patience = self.external.patience;
        let work = tokio::spawn(async move {
            let _under_way = under_way;
            desk.serve(object, signer, patience).await
        });
        work.await
            .unwrap_or_else(|error| Err(SignError::Ended(error.to_string())))
    }
}

fn object(pem: &str, signer: &str, lifetime: u64) -> Result<DynamicObject, SignError> {
    let object = json!({
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": { "generateName": "csr-workload-" },
        "spec": {
            "request": BASE64.encode(pem),
            "signerName": signer,
            // Kubernetes' field has 32 bits.
            "expirationSeconds": i32::try_from(lifetime).unwrap_or(i32::MAX),
            "usages": USAGES,
        },
    });
    serde_json::from_value(object).map_err(|error| SignError::Request(error.to_string()))
}

fn requests(client: &kube::Client) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk("certificates.k8s.io", "v1", "CertificateSigningRequest");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "certificatesigningrequests");
    Api::all_with(client.clone(), &resource)
}

impl Desk {
    async fn serve(
        &self,
        object: DynamicObject,
        signer: String,
        patience: Duration,
    ) -> Result<String, SignError> {
        let end = Instant::now() + patience;
        let late = || SignError::Late {
            signer: signer.clone(),
            patience,
        };
        let place = tokio::time::timeout_at(end, self.places.acquire()).await;
        let _place = place.map_err(|_| late())?;
        let api = requests(&self.client);
        let plain = PostParams::default();
        let created = tokio::time::timeout_at(end, api.create(&plain, &object)).await;
        let created = created.map_err(|_| late())?;
        let created = created.map_err(|source| failed("creating", &signer, source))?;
        let name = created.metadata.name.clone().unwrap_or_default();
        let created_uid = created.metadata.uid.clone();
        let work = async {
            let approved = approve(&api, created, &signer).await?;
            certificate(&api, approved, &signer).await
        };
        let result = tokio::time::timeout_at(end, work).await;
        // Nobody needs it any more; one that stays is taken away by the cluster in time.
        let ours = DeleteParams {
            preconditions: Some(Preconditions {
                uid: created_uid,
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let deleted = api.delete(&name, &ours);
        if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(10), deleted).await
            && !matches!(&error, kube::Error::Api(status) if matches!(status.code, 404 | 409))
        {
            tracing::warn!(name, %error, "deleting a CertificateSigningRequest that is done with");
        }
        result.unwrap_or_else(|_| Err(late()))
    }
}

fn failed(doing: &'static str, signer: &str, source: kube::Error) -> SignError {
    let hint = match &source {
        kube::Error::Api(status) if status.code == 403 => {
            "; the control plane's account needs create, get, watch and delete of certificatesigningrequests, update of certificatesigningrequests/approval, \
             and the verb approve on signers for this one"
        }
        _ => "",
    };
    SignError::Api {
        doing,
        signer: signer.to_owned(),
        source: Box::new(source),
        hint,
    }
}

/// Approves a request, unless somebody decided already.
async fn approve(
    api: &Api<DynamicObject>,
    mut object: DynamicObject,
    signer: &str,
) -> Result<DynamicObject, SignError> {
    let name = object.metadata.name.clone().unwrap_or_default();
    for _ in 0..ATTEMPTS {
        if condition(&object.data, "Approved").is_some()
            || condition(&object.data, "Denied").is_some()
        {
            return Ok(object);
        }
        let mut conditions = object.data["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        conditions.push(json!({
            "type": "Approved", "status": "True", "reason": "MeshWorkload",
            "message": "the control plane of the mesh found out who asks, and that the request is in order",
        }));
        if !object.data["status"].is_object() {
            object.data["status"] = json!({});
        }
        object.data["status"]["conditions"] = conditions.into();
        let replaced = api
            .replace_subresource("approval", &name, &PostParams::default(), &object)
            .await;
        match replaced {
            Ok(approved) => return Ok(approved),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let now = api
                    .get(&name)
                    .await
                    .map_err(|source| failed("reading", signer, source))?;
                // Of that name there may be somebody else's by now: no word of ours may make that one good.
                if !is_same(&now, &object) {
                    return Err(SignError::Gone(name));
                }
                object = now;
            }
            Err(source) => return Err(failed("approving", signer, source)),
        }
    }
    Err(SignError::Ended(
        "others keep changing the CertificateSigningRequest".to_owned(),
    ))
}

/// Is it the very request, and not another one of its name?
fn is_same(now: &DynamicObject, ours: &DynamicObject) -> bool {
    let of = |object: &DynamicObject| {
        let spec = &object.data["spec"];
        (spec["request"].clone(), spec["signerName"].clone())
    };
    now.metadata.uid == ours.metadata.uid && of(now) == of(ours)
}

/// Waits for the certificate.
async fn certificate(
    api: &Api<DynamicObject>,
    mut object: DynamicObject,
    signer: &str,
) -> Result<String, SignError> {
    let name = object.metadata.name.clone().unwrap_or_default();
    loop {
        if let Some(done) = outcome(&name, signer, &object.data) {
            return done;
        }
        let only = WatchParams::default().fields(&format!("metadata.name={name}"));
        let version = object.metadata.resource_version.clone().unwrap_or_default();
        if let Ok(events) = api.watch(&only, &version).await {
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                match event {
                    Ok(WatchEvent::Added(now) | WatchEvent::Modified(now))
                        if now.metadata.name.as_ref() == Some(&name) =>
                    {
                        if !is_same(&now, &object) {
                            return Err(SignError::Gone(name));
                        }
                        if let Some(done) = outcome(&name, signer, &now.data) {
                            return done;
                        }
                    }
                    Ok(WatchEvent::Deleted(now)) if now.metadata.name.as_ref() == Some(&name) => {
                        return Err(SignError::Gone(name));
                    }
                    Ok(WatchEvent::Error(_)) | Err(_) => break,
                    Ok(_) => {}
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
        object = match api.get_opt(&name).await {
            Ok(Some(now)) if is_same(&now, &object) => now,
            Ok(_) => return Err(SignError::Gone(name)),
            // The API may be away for a moment; the patience of the caller ends this.
            Err(_) => object,
        };
    }
}

/// What became of a request; `None` while nothing did.
fn outcome(name: &str, signer: &str, data: &Value) -> Option<Result<String, SignError>> {
    let message = |condition: &Value| {
        let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
        let both = format!("{} ({})", text("message"), text("reason"));
        both.chars().filter(|c| !c.is_control()).take(500).collect()
    };
    if let Some(denied) = condition(data, "Denied") {
        return Some(Err(SignError::Denied {
            name: name.to_owned(),
            message: message(denied),
        }));
    }
    if let Some(failed) = condition(data, "Failed") {
        return Some(Err(SignError::Failed {
            name: name.to_owned(),
            signer: signer.to_owned(),
            message: message(failed),
        }));
    }
    let encoded = data["status"]["certificate"]
        .as_str()
        .filter(|text| !text.is_empty())?;
    condition(data, "Approved")?;
    let decoded = BASE64.decode(encoded).ok();
    let text = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
    Some(text.ok_or_else(|| SignError::Answer {
        signer: signer.to_owned(),
        source: IssuedError::Unreadable("it is not PEM in base64".to_owned()),
    }))
}

fn condition<'a>(data: &'a Value, kind: &str) -> Option<&'a Value> {
    let all = data["status"]["conditions"].as_array()?;
    all.iter()
        .find(|condition| condition["type"] == kind && condition["status"] == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: &str = "ISTIOD_RA_KUBERNETES_API";

    #[tokio::test]
    async fn one_identity_leaves_room_for_others() {
        let router = axum::Router::new();
        let desk = Desk::new(kube::Client::new(router, "default"));
        let begin = |name: &str| UnderWay::begin(&desk, name.to_owned());
        let mut all: Vec<_> = (0..PER_IDENTITY).map(|_| begin("one")).collect();
        assert!(all.iter().all(Result::is_ok));
        assert!(matches!(begin("one"), Err(SignError::Busy(_))));
        assert!(begin("two").is_ok());
        all.pop();
        assert!(begin("one").is_ok());
        drop(all);
        assert!(desk.under_way.lock().expect("no panic").is_empty());
    }

    #[tokio::test]
    async fn another_request_of_the_same_name_gets_no_word_of_ours() {
        use axum::http::StatusCode;
        use axum::routing::{get, put};

        let request = |uid: &str| {
            let object = json!({
                "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
                "metadata": {"name": "csr-a", "uid": uid, "resourceVersion": "2"},
                "spec": {"request": "AAAA", "signerName": "example.com/mesh"},
            });
            serde_json::from_value::<DynamicObject>(object).expect("an object")
        };
        let theirs = serde_json::to_value(request("theirs")).expect("JSON");
        let conflict = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Conflict", "code": 409});
        let puts = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = Arc::clone(&puts);
        let refuse = move || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            std::future::ready((StatusCode::CONFLICT, axum::Json(conflict.clone())))
        };
        let show = move || std::future::ready(axum::Json(theirs.clone()));
        let place = "/apis/certificates.k8s.io/v1/certificatesigningrequests/csr-a";
        let router = axum::Router::new()
            .route(&format!("{place}/approval"), put(refuse))
            .route(place, get(show));
        let api = requests(&kube::Client::new(router, "default"));
        let end = approve(&api, request("ours"), "example.com/mesh").await;
        assert!(matches!(end, Err(SignError::Gone(_))), "{end:?}");
        assert_eq!(puts.load(std::sync::atomic::Ordering::Relaxed), 1);
    }

    #[test]
    fn settings_are_read_as_istio_has_them() {
        assert_eq!(External::read("", "", "", ""), Ok(None));
        assert_eq!(External::read("", "", "", "istiod"), Ok(None));
        let read = External::read(KIND, "example.com/mesh", "", "istiod");
        let read = read.expect("good").expect("one");
        assert_eq!(read.server_signer, "example.com/mesh");
        let domain = "clusterissuers.cert-manager.io";
        let provider = format!("k8s.io/{domain}/istio-system");
        let read = External::read(KIND, "", domain, &provider);
        let read = read.expect("good").expect("one");
        assert_eq!(read.server_signer, format!("{domain}/istio-system"));
        for (kind, signer, domain, provider) in [
            ("GOOGLE_CAS", "example.com/mesh", "", ""),
            ("", "example.com/mesh", "", ""),
            ("", "", "example.com", ""),
            ("", "", "", "k8s.io/example.com/mesh"),
            ("", "", "", "kubernetes"),
            (KIND, "", "", ""),
            (KIND, "", "example.com", ""),
            (KIND, "mesh", "", ""),
            (KIND, "example.com/a/b", "", ""),
            (KIND, "example.com/Mesh", "", ""),
            (KIND, "example.com/mesh", "example.com/x", ""),
            (KIND, "example.com/mesh", "", "k8s.io/mesh"),
        ] {
            let read = External::read(kind, signer, domain, provider);
            assert!(read.is_err(), "{kind} {signer} {domain} {provider}");
        }
    }
}
