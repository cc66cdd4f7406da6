//! Who is at the other end of the secure port: by a certificate of the mesh, or by a service account token that the cluster confirms.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Api;
use kube::api::PostParams;
use mesh_identity::spiffe::SpiffeId;
use mesh_identity::token::MAX_TOKEN_BYTES;
use mesh_xds::Caller;
use tokio::sync::Semaphore;
use tonic::metadata::MetadataMap;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Extensions, Status};

use crate::publish::Shared;

/// Questions to the API at a time, so that a flood of callers does not become one of the API.
const QUESTIONS: usize = 32;
/// Waiting for one's turn and the answer.
const PATIENCE: Duration = Duration::from_secs(10);
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Why a caller is not let in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// Nothing was shown.
    #[error(
        "no credentials: come with a certificate of the mesh, or with a service account token (authorization: Bearer …, audience istio-ca)"
    )]
    Nothing,
    /// Verified against the roots, but not a workload's.
    #[error("the client certificate names no workload of the mesh: {0}")]
    Certificate(String),
    /// The cluster does not confirm the token.
    #[error("the token is not accepted: {0}")]
    Token(String),
    /// The account is gone.
    #[error("the service account {0} does not exist any more")]
    Gone(String),
    /// The pod of a token is gone, or runs as somebody else.
    #[error("the token is bound to pod {0}, which {1}")]
    Pod(String, &'static str),
    /// The API can't be asked.
    #[error("the cluster's API can't be asked about the caller: {0}; try again")]
    Unavailable(String),
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        match refusal {
            Refusal::Unavailable(_) => Status::unavailable(text),
            _ => Status::unauthenticated(text),
        }
    }
}

/// A caller.
#[derive(Debug, Clone)]
pub(crate) struct Identified {
    pub(crate) identity: SpiffeId,
    pub(crate) by_certificate: bool,
    /// Name and uid of the pod that the token is bound to.
    pub(crate) pod: Option<(String, String)>,
}

impl Identified {
    pub(crate) fn by(&self) -> &'static str {
        match self.by_certificate {
            true => "certificate",
            false => "token",
        }
    }
}

impl From<Identified> for Caller {
    fn from(identified: Identified) -> Self {
        Self {
            identity: identified.identity.to_string(),
            by_certificate: identified.by_certificate,
            pod: identified.pod,
        }
    }
}

/// Finds out who calls.
pub(crate) struct Authenticator {
    client: kube::Client,
    shared: Arc<Shared>,
    audiences: Vec<String>,
    questions: Semaphore,
}

impl Authenticator {
    pub(crate) fn new(client: kube::Client, shared: Arc<Shared>, audiences: Vec<String>) -> Self {
        Self {
            client,
            shared,
            audiences,
            questions: Semaphore::new(QUESTIONS),
        }
    }

    /// Whether a call came over the secure port.
    pub(crate) fn is_secure(extensions: &Extensions) -> bool {
        extensions.get::<TlsConnectInfo<TcpConnectInfo>>().is_some()
    }

    /// Who calls. Certificates count before tokens, as in Istio. `exists` asks the cluster whether the account behind a certificate still
    /// exists; the one behind a token must exist anyway.
    pub(crate) async fn identify(
        &self,
        metadata: &MetadataMap,
        extensions: &Extensions,
        exists: bool,
    ) -> Result<Identified, Refusal> {
        if !self.shared.ready() {
            // The trust domain is not known before.
            return Err(Refusal::Unavailable(
                "the cluster's objects are still being read".to_owned(),
            ));
        }
        let certificates = extensions
            .get::<TlsConnectInfo<TcpConnectInfo>>()
            .and_then(TlsConnectInfo::peer_certs);
        if let Some(leaf) = certificates.as_ref().and_then(|chain| chain.first()) {
            let identity = self.of_certificate(leaf)?;
            if exists {
                self.within(self.account_exists(&identity)).await?;
            }
            return Ok(Identified {
                identity,
                by_certificate: true,
                pod: None,
            });
        }
        let token = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .map(str::trim)
            .filter(|token| !token.is_empty())
            .ok_or(Refusal::Nothing)?;
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Refusal::Token(format!(
                "it has {} bytes, more than {MAX_TOKEN_BYTES}",
                token.len()
            )));
        }
        self.within(self.of_token(token)).await
    }

    /// The names under which a workload's certificate may be asked for: its own, and the same in the aliases of the trust domain.
    pub(crate) fn names_of(&self, identity: &SpiffeId) -> Vec<SpiffeId> {
        let config = self.shared.mesh_config();
        let aliases = config.trust_domain_aliases.iter().map(|alias| SpiffeId {
            trust_domain: alias.clone(),
            ..identity.clone()
        });
        std::iter::once(identity.clone()).chain(aliases).collect()
    }

    /// A workload by its certificate, in the mesh's own trust domain whichever alias it has.
    fn of_certificate(
        &self,
        leaf: &rustls::pki_types::CertificateDer<'_>,
    ) -> Result<SpiffeId, Refusal> {
        let mut identity = mesh_identity::channel::workload(leaf).ok_or_else(|| {
            Refusal::Certificate("it has not exactly one URI, a SPIFFE id".to_owned())
        })?;
        let config = self.shared.mesh_config();
        if identity.trust_domain != config.trust_domain
            && !config.trust_domain_aliases.contains(&identity.trust_domain)
        {
            return Err(Refusal::Certificate(format!(
                "{identity} is of another trust domain"
            )));
        }
        identity.trust_domain.clone_from(&config.trust_domain);
        Ok(identity)
    }

    async fn account_exists(&self, identity: &SpiffeId) -> Result<(), Refusal> {
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &identity.namespace);
        let account = api
            .get_opt(&identity.service_account)
            .await
            .map_err(|error| Refusal::Unavailable(error.to_string()))?;
        let shown = || format!("{}/{}", identity.namespace, identity.service_account);
        account.map(drop).ok_or_else(|| Refusal::Gone(shown()))
    }

    async fn of_token(&self, token: &str) -> Result<Identified, Refusal> {
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: Some(self.audiences.clone()),
            },
            ..Default::default()
        };
        let answer = api
            .create(&PostParams::default(), &review)
            .await
            .map_err(|error| Refusal::Unavailable(error.to_string()))?;
        let refused = |reason: &str| Refusal::Token(reason.to_owned());
        let status = answer
            .status
            .ok_or_else(|| refused("the API did not answer"))?;
        if status.authenticated != Some(true) {
            let reason = status.error.unwrap_or_default();
            return Err(Refusal::Token(if reason.is_empty() {
                "the cluster does not know it".to_owned()
            } else {
                reason
            }));
        }
        // A server that does not know audiences leaves them out, and would take a token that is meant for others.
        let meant_for_us = status
            .audiences
            .iter()
            .flatten()
            .any(|audience| self.audiences.contains(audience));
        if !meant_for_us {
            return Err(refused(
                "it is meant for others (its audience is not istio-ca)",
            ));
        }
        let user = status.user.unwrap_or_default();
        let name = user.username.unwrap_or_default();
        let account = name
            .strip_prefix("system:serviceaccount:")
            .and_then(|rest| rest.split_once(':'));
        let is_account = user
            .groups
            .iter()
            .flatten()
            .any(|group| group == "system:serviceaccounts");
        let Some((namespace, service_account)) = account.filter(|_| is_account) else {
            return Err(refused("it is not a service account's"));
        };
        let identity = SpiffeId {
            trust_domain: self.shared.mesh_config().trust_domain.clone(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
        };
        // A name that can't stand in an identity would be another's.
        let identity =
            identity
                .to_string()
                .parse()
                .map_err(|error: mesh_identity::spiffe::SpiffeError| {
                    Refusal::Token(error.to_string())
                })?;
        let mut extra = user.extra.unwrap_or_default();
        let mut first = |key| extra.remove(key).and_then(|all| all.into_iter().next());
        let pod = first(POD_NAME).map(|name| (name, first(POD_UID).unwrap_or_default()));
        if let Some((name, uid)) = &pod {
            self.pod_runs_as(&identity, name, uid).await?;
        }
        Ok(Identified {
            identity,
            by_certificate: false,
            pod,
        })
    }

    /// The cluster confirms a bound token only while its pod is there; that the pod is still the same one, and runs under the account, is
    /// asked here too. Where the control plane may not read pods it can't be known.
    async fn pod_runs_as(&self, identity: &SpiffeId, name: &str, uid: &str) -> Result<(), Refusal> {
        let shown = || format!("{}/{name}", identity.namespace);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &identity.namespace);
        let pod = match api.get_opt(name).await {
            Ok(Some(pod)) => pod,
            Ok(None) => return Err(Refusal::Pod(shown(), "does not exist any more")),
            Err(kube::Error::Api(status)) if status.code == 403 => return Ok(()),
            Err(error) => return Err(Refusal::Unavailable(error.to_string())),
        };
        let now = pod.metadata.uid.unwrap_or_default();
        if !uid.is_empty() && !now.is_empty() && now != uid {
            return Err(Refusal::Pod(shown(), "is another pod of that name now"));
        }
        let account = pod.spec.and_then(|spec| spec.service_account_name);
        match account.as_deref().unwrap_or("default") == identity.service_account {
            true => Ok(()),
            false => Err(Refusal::Pod(shown(), "runs under another service account")),
        }
    }

    async fn within<T>(
        &self,
        question: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let answered = tokio::time::timeout(PATIENCE, async {
            let _turn = self.questions.acquire().await;
            question.await
        });
        answered
            .await
            .unwrap_or_else(|_| Err(Refusal::Unavailable("it does not answer".to_owned())))
    }
}
