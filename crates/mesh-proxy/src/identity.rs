//! Who this proxy is: its key, made here and never written to a disk; its certificate, from the control plane's authority and renewed in
//! time; and the mesh's roots, followed wherever they change.
//!
//! What is in force lies in [`Secrets`](crate::secrets::Secrets) for handshakes and here for the channel to the control plane. While the
//! authority is away the last good certificate stays, until it expires.

mod kept;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use mesh_identity::ca::Leaf;
use mesh_identity::spiffe::SpiffeId;
use mesh_identity::trust::{self, TrustBundle};
use mesh_identity::{channel, csr};
use mesh_xds::Node;
use mesh_xds::backoff::Backoff;
use mesh_xds::certificate::{self, CertificateRequest};
use mesh_xds::channel::{ChannelError, Connector, CredentialSource, Credentials};
use mesh_xds::client::NodeUpdate;
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::agent::AGENT;
use crate::secrets::{MESH_ROOTS, Secret, SecretError, WORKLOAD};
use crate::shared::Shared;

/// Time from one look at the file of the roots, and at the clock, to the next.
const LOOK: Duration = Duration::from_secs(1);
/// Connecting to the authority may take this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// One request for a certificate may take this long, with connecting: behind the authority may be a signer that takes its time.
const ANSWER: Duration = Duration::from_secs(70);
/// After a change of the roots proxies ask for certificates over this time, not all at once.
const SPREAD: Duration = Duration::from_secs(3);
/// Where the request names the signer that is wanted (Istio's agents do the same).
const CERT_SIGNER: &str = "CertSigner";
/// What the node says of its trust stands under this key of its metadata.
const TRUST: &str = "TRUST";

/// How a proxy gets its identity.
#[derive(Debug, Clone)]
pub struct IdentityOptions {
    /// `host:port` of the authority, spoken to in TLS (`CA_ADDR`). Default: the control plane's.
    pub authority: String,
    /// The mesh's name (`TRUST_DOMAIN`). Default `cluster.local`.
    pub trust_domain: String,
    /// The pod's service account (`SERVICE_ACCOUNT`). Default `default`.
    pub service_account: String,
    /// Its token, read before each use. Default `/var/run/secrets/tokens/istio-token`.
    pub token_file: PathBuf,
    /// The mesh's roots, PEM, followed when they change (`CA_ROOT_CA`). Default `/var/run/secrets/istio/root-cert.pem`.
    pub roots_file: PathBuf,
    /// A folder in memory where key and certificate outlive the process, so that it can start again while the authority is away; `None`
    /// keeps nothing. One that is on a disk is not used. Default `/var/run/secrets/workload-spiffe-credentials` where that exists.
    pub credentials_dir: Option<PathBuf>,
    /// The signer to ask for, where the authority has several (`ISTIO_META_CERT_SIGNER`). Default: the authority's choice.
    pub signer: Option<String>,
    /// Validity to ask for (`SECRET_TTL`). Default 24 h.
    pub lifetime: Duration,
    /// Share of the lifetime that is left when a certificate is renewed (`SECRET_GRACE_PERIOD_RATIO`). Default 0.5.
    pub grace: f64,
    /// By how much of the lifetime the renewal is moved, earlier or later, at random (`SECRET_GRACE_PERIOD_RATIO_JITTER`). Default 0.01.
    pub jitter: f64,
}

fn text(text: String) -> Value {
    Value {
        kind: Some(Kind::StringValue(text)),
    }
}

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
enum IdentityError {
    #[error("reading the mesh's roots from {path}: {reason}")]
    Roots { path: PathBuf, reason: String },
    #[error("reading the service account token from {path}: {source}")]
    Token {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Spiffe(#[from] mesh_identity::spiffe::SpiffeError),
    #[error("making a key and a certificate request: {0}")]
    Request(String),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the certificate authority says {:?}: {}", .0.code(), .0.message())]
    Authority(#[from] tonic::Status),
    #[error("the certificate authority takes longer than {ANSWER:?}")]
    Late,
    #[error("what the certificate authority sent can't be used: {0}")]
    Answer(String),
    #[error(transparent)]
    Secret(#[from] SecretError),
}

/// What is in force.
#[derive(Default)]
struct Present {
    leaf: ArcSwapOption<Held>,
    trusted: ArcSwap<TrustBundle>,
}

/// A certificate with its key.
struct Held {
    leaf: Leaf,
    identity: SpiffeId,
    not_after: SystemTime,
    renew_at: SystemTime,
    /// Fingerprint of the root that it leads to.
    root: Option<String>,
}

/// Keeps a proxy's identity.
pub struct Agent {
    shared: Arc<Shared>,
    options: IdentityOptions,
    connector: Connector,
    present: Arc<Present>,
    renewed: watch::Sender<u64>,
    /// The text of the roots' file when it was last read.
    roots_text: String,
    /// The first root of the file: a certificate that leads to another is renewed, once for each such root.
    asked_for_root: Option<String>,
    failing: bool,
    retry_at: SystemTime,
    backoff: Backoff,
}

impl Agent {
    /// An agent that begins with what an earlier run left, if that is still good.
    pub fn new(shared: Arc<Shared>, options: IdentityOptions, connector: Connector) -> Self {
        let seed = shared.options.pod.bytes().fold(11_u64, |hash, byte| {
            hash.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        let mut agent = Self {
            shared,
            options,
            connector,
            present: Arc::default(),
            renewed: watch::channel(0).0,
            roots_text: String::new(),
            asked_for_root: None,
            failing: false,
            retry_at: SystemTime::UNIX_EPOCH,
            backoff: Backoff::new(Duration::from_millis(200), Duration::from_secs(30), seed),
        };
        agent.read_roots();
        agent.resume(SystemTime::now());
        agent
    }

    /// What connections to the control plane are authenticated with: the certificate, and without one the token.
    pub fn credentials(&self) -> CredentialSource {
        let (present, options) = (Arc::clone(&self.present), self.options.clone());
        Arc::new(move || {
            let held = present.leaf.load_full();
            // An expired certificate would only be refused.
            let held = held.filter(|held| held.not_after > SystemTime::now());
            let trusted = present.trusted.load();
            let leaf = held.as_ref().map(|held| &held.leaf);
            let tls = channel::client(&trusted, leaf).map_err(|error| error.to_string())?;
            let token = match leaf {
                Some(_) => None,
                None => Some(token(&options).map_err(|error| error.to_string())?),
            };
            Ok(Credentials { tls, token })
        })
    }

    /// Adds to the node what it trusts, and under which root its certificate is: a rotation of the root waits for that.
    pub fn node_update(&self) -> NodeUpdate {
        let present = Arc::clone(&self.present);
        Arc::new(move |node: &mut Node| {
            let roots = present.trusted.load().fingerprints();
            let roots = ListValue {
                values: roots.into_iter().map(text).collect(),
            };
            let root = present
                .leaf
                .load()
                .as_ref()
                .and_then(|held| held.root.clone());
            let roots = Value {
                kind: Some(Kind::ListValue(roots)),
            };
            let fields = [
                ("roots".to_owned(), roots),
                ("root".to_owned(), text(root.unwrap_or_default())),
            ];
            let said = Kind::StructValue(Struct {
                fields: fields.into_iter().collect(),
            });
            let metadata = node.metadata.get_or_insert_default();
            let said = Value { kind: Some(said) };
            metadata.fields.insert(TRUST.to_owned(), said);
        })
    }

    /// Goes up when what the node says of its trust has changed.
    pub fn renewed(&self) -> watch::Receiver<u64> {
        self.renewed.subscribe()
    }

    /// Keeps the identity for ever.
    pub async fn run(mut self) {
        loop {
            self.look(SystemTime::now()).await;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Does what is due at this time.
    async fn look(&mut self, now: SystemTime) {
        self.read_roots();
        self.note_expiry(now);
        if now < self.retry_at || !self.is_due(now) {
            return;
        }
        match self.renew(now).await {
            Ok(()) => {
                self.failing = false;
                self.backoff.reset();
                self.retry_at = SystemTime::UNIX_EPOCH;
            }
            Err(error) => {
                let left = self.present.leaf.load().as_ref().map(|held| {
                    held.not_after
                        .duration_since(now)
                        .unwrap_or_default()
                        .as_secs()
                });
                tracing::warn!(%error, seconds_left = left, "no new certificate; trying again");
                self.failing = true;
                self.retry_at = now + self.backoff.wait();
            }
        }
        self.note_expiry(now);
    }

    fn is_due(&self, now: SystemTime) -> bool {
        let held = self.present.leaf.load();
        let Some(held) = held.as_ref() else {
            return true;
        };
        if now >= held.renew_at {
            return true;
        }
        let signer = self
            .present
            .trusted
            .load()
            .fingerprints()
            .into_iter()
            .next();
        signer != held.root && signer != self.asked_for_root
    }

    /// Reads the roots' file, and trusts what it says if that has changed. A file that can't be read, or holds nothing, changes nothing.
    fn read_roots(&mut self) {
        let path = &self.options.roots_file;
        let read = std::fs::read_to_string(path).map_err(|error| error.to_string());
        let failed = |reason| IdentityError::Roots {
            path: path.clone(),
            reason,
        };
        let text = match read {
            Ok(text) if text == self.roots_text => return,
            Ok(text) => text,
            Err(reason) if self.roots_text.is_empty() && !self.failing => {
                let error = failed(reason);
                tracing::warn!(%error, "waiting for the mesh's roots");
                self.failing = true;
                return;
            }
            Err(_) => return,
        };
        let trusted = TrustBundle::from_pem(&text).map_err(|error| failed(error.to_string()));
        self.roots_text = text;
        match trusted {
            Ok(trusted) => {
                // All proxies see it at the same time; who has a certificate can wait a little.
                self.retry_at = match self.present.leaf.load().is_some() {
                    true => SystemTime::now() + SPREAD.mul_f64(rand::random::<f64>()),
                    false => SystemTime::UNIX_EPOCH,
                };
                if let Err(error) = self.trust(trusted) {
                    tracing::error!(%error, "the mesh's roots");
                }
            }
            Err(error) => tracing::error!(%error, "what was trusted before stays"),
        }
    }

    fn trust(&self, trusted: TrustBundle) -> Result<(), SecretError> {
        if **self.present.trusted.load() == trusted {
            return Ok(());
        }
        self.shared
            .secrets
            .set(MESH_ROOTS, Secret::trust(trusted.pem()))?;
        tracing::info!(target: AGENT, roots = ?trusted.fingerprints(), "trusting the mesh's roots");
        self.present.trusted.store(Arc::new(trusted));
        self.renewed.send_modify(|number| *number += 1);
        Ok(())
    }

    /// Gets a certificate for a new key, and puts it in force.
    async fn renew(&mut self, now: SystemTime) -> Result<(), IdentityError> {
        let trusted = self.present.trusted.load_full();
        let roots_missing = || IdentityError::Roots {
            path: self.options.roots_file.clone(),
            reason: "there are none yet".to_owned(),
        };
        let signer = trusted.fingerprints().into_iter().next();
        signer.as_ref().ok_or_else(roots_missing)?;
        let options = &self.options;
        let identity = SpiffeId {
            trust_domain: options.trust_domain.clone(),
            namespace: self.shared.options.namespace.clone(),
            service_account: options.service_account.clone(),
        };
        let (request, key) =
            csr::make(&identity).map_err(|error| IdentityError::Request(error.to_string()))?;
        let key = Zeroizing::new(key);
        let asked = self.ask(request, &trusted);
        let mut chain = tokio::time::timeout(ANSWER, asked)
            .await
            .map_err(|_| IdentityError::Late)??;
        let roots = chain.pop();
        let answer = |error: &dyn std::fmt::Display| IdentityError::Answer(error.to_string());
        // What the answer trusts beyond the file counts until the file changes: the file may come later to this node.
        let roots = TrustBundle::from_pem(&roots.unwrap_or_default()).map_err(|e| answer(&e))?;
        let described = trust::describe(roots.pem()).map_err(|e| answer(&e))?;
        if chain.is_empty() || !described.iter().all(|root| root.is_ca) {
            return Err(answer(&"it does not end with the mesh's roots"));
        }
        let both = trusted.and(&roots).map_err(|e| answer(&e))?;
        let leaf = Leaf {
            chain_pem: chain.join("\n"),
            key_pem: key.as_str().to_owned(),
        };
        self.trust(both)?;
        self.asked_for_root = signer;
        self.put(leaf, identity, now)?;
        let kept = self.options.credentials_dir.as_deref();
        if let (Some(dir), Some(held)) = (kept, self.present.leaf.load_full())
            && let Err(error) = kept::write(dir, &held.leaf)
        {
            tracing::debug!(%error, "the key is kept in this process only");
        }
        Ok(())
    }

    async fn ask(&self, csr: String, trusted: &TrustBundle) -> Result<Vec<String>, IdentityError> {
        let token = token(&self.options)?;
        let tls = channel::client(trusted, None)
            .map_err(|error| IdentityError::Request(error.to_string()))?;
        let credentials = Credentials {
            tls,
            token: Some(token),
        };
        let source: CredentialSource = Arc::new(move || Ok(credentials.clone()));
        let address = &self.options.authority;
        let connection =
            mesh_xds::channel::open(address, &self.connector, Some(&source), PATIENCE).await?;
        let request = CertificateRequest {
            csr,
            validity_duration: i64::try_from(self.options.lifetime.as_secs()).unwrap_or(0),
            metadata: self.options.signer.as_deref().map(|signer| Struct {
                fields: [(CERT_SIGNER.to_owned(), text(signer.to_owned()))]
                    .into_iter()
                    .collect(),
            }),
        };
        Ok(certificate::create(&connection, request).await?.cert_chain)
    }

    /// Puts a certificate in force. It must be this workload's, whoever sent it.
    fn put(&self, leaf: Leaf, identity: SpiffeId, now: SystemTime) -> Result<(), IdentityError> {
        let answer = |text: String| IdentityError::Answer(text);
        let described =
            trust::describe(&leaf.chain_pem).map_err(|error| answer(error.to_string()))?;
        let first = described
            .first()
            .ok_or_else(|| answer("there is no certificate in it".to_owned()))?;
        if first.uris != [identity.to_string()] {
            let shown = first.uris.join(", ");
            return Err(answer(format!("it is for {shown:?}, not for {identity}")));
        }
        let root = self.present.trusted.load().root_of(&leaf.chain_pem);
        if root.is_none() {
            return Err(answer("it leads to no root that is trusted".to_owned()));
        }
        let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(first.not_after);
        let secret = Secret::Certificate {
            chain_pem: leaf.chain_pem.clone(),
            key_pem: Zeroizing::new(leaf.key_pem.clone()),
        };
        self.shared.secrets.set(WORKLOAD, secret)?;
        let renew_at = renewal(
            now,
            not_after,
            self.options.grace,
            self.options.jitter,
            rand::random::<f64>(),
        );
        tracing::info!(
            target: AGENT,
            %identity,
            serial = first.serial,
            not_after = first.not_after,
            renewal_in = ?renew_at.duration_since(now).unwrap_or_default(),
            "certificate in force"
        );
        let before = self.present.leaf.swap(Some(Arc::new(Held {
            leaf,
            identity,
            not_after,
            renew_at,
            root: root.clone(),
        })));
        // The first one is no reason to connect anew: the stream that was opened with a token is as good.
        if before.is_some_and(|before| before.root != root) {
            self.renewed.send_modify(|number| *number += 1);
        }
        Ok(())
    }

    /// Takes what an earlier run left, if it is still good.
    fn resume(&mut self, now: SystemTime) {
        let Some(dir) = self.options.credentials_dir.as_deref() else {
            return;
        };
        let Some(leaf) = kept::read(dir) else { return };
        let identity = SpiffeId {
            trust_domain: self.options.trust_domain.clone(),
            namespace: self.shared.options.namespace.clone(),
            service_account: self.options.service_account.clone(),
        };
        let valid = mesh_identity::ca::not_after(&leaf.chain_pem)
            .is_some_and(|end| SystemTime::UNIX_EPOCH + Duration::from_secs(end) > now);
        if !valid {
            return;
        }
        if let Err(error) = self.put(leaf, identity, now) {
            tracing::warn!(%error, "the certificate of an earlier run");
        }
        self.note_expiry(now);
    }

    /// Tells readiness and metrics how long the certificate lasts.
    fn note_expiry(&self, now: SystemTime) {
        let held = self.present.leaf.load();
        let left = held
            .as_ref()
            .map(|held| match held.not_after.duration_since(now) {
                Ok(left) => left.as_secs_f64(),
                Err(past) => -past.duration().as_secs_f64(),
            });
        self.shared
            .identified
            .store(left.is_some_and(|left| left > 0.0), Ordering::Release);
        if let Some(left) = left {
            self.shared.certificate_expiry.set(left);
        }
    }
}

/// When a certificate that was got at `now` is renewed: when the share `grace` of its lifetime is left, moved by up to the share `jitter` of
/// it either way (`random` is 0 to 1), so that pods that were started together don't renew together.
fn renewal(
    now: SystemTime,
    not_after: SystemTime,
    grace: f64,
    jitter: f64,
    random: f64,
) -> SystemTime {
    let lifetime = not_after.duration_since(now).unwrap_or_default();
    let share = 1.0 - grace + jitter * (2.0 * random - 1.0);
    now + lifetime.mul_f64(share.clamp(0.0, 1.0))
}

fn token(options: &IdentityOptions) -> Result<String, IdentityError> {
    let path = &options.token_file;
    let text = std::fs::read_to_string(path).map_err(|source| IdentityError::Token {
        path: path.clone(),
        source,
    })?;
    Ok(text.trim().to_owned())
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let held = self.present.leaf.load();
        let identity = held.as_ref().map(|held| &held.identity);
        f.debug_struct("Agent")
            .field("identity", &identity)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
