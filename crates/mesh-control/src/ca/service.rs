//! Certificate requests: who asks, whether what is asked is in order, the certificate.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::google::protobuf::value::Kind;
use mesh_identity::csr::{self, CsrError};
use mesh_xds::certificate::{Authority, CertificateRequest, CertificateResponse};
use tonic::{Request, Status};

use crate::auth::{Authenticator, Refusal};
use crate::ca::registration::SignError;
use crate::ca::{Issuing, Signer};
use crate::metrics::Metrics;
use crate::serving::now;

/// Where a caller names the signer that it wants.
const CERT_SIGNER: &str = "CertSigner";

/// How long certificates are valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetimes {
    /// Where the request does not say. Default: 24 h (`DEFAULT_WORKLOAD_CERT_TTL`).
    pub default: Duration,
    /// At most; a request for more is refused. Default: 90 days (`MAX_WORKLOAD_CERT_TTL`).
    pub max: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        let day = Duration::from_secs(86_400);
        Self {
            default: day,
            max: day * 90,
        }
    }
}

/// The service.
pub(crate) struct Service {
    pub(crate) issuing: Issuing,
    pub(crate) authenticator: Arc<Authenticator>,
    pub(crate) lifetimes: Lifetimes,
    pub(crate) metrics: Arc<Metrics>,
}

impl Authority for Service {
    async fn create(
        self: Arc<Self>,
        request: Request<CertificateRequest>,
    ) -> Result<CertificateResponse, Status> {
        self.metrics.citadel.requests.inc();
        let peer = request.remote_addr();
        let result = self.issue(&request).await;
        if let Err(error) = &result {
            self.metrics.citadel.refused(error.label());
            match error {
                Error::Caller(_) => self.metrics.citadel.authentication_failures.inc(),
                Error::Request(error) if error.is_unreadable() => {
                    self.metrics.citadel.unreadable.inc()
                }
                Error::Request(_) => self.metrics.citadel.forbidden.inc(),
                _ => 0,
            };
            tracing::warn!(?peer, reason = error.label(), %error, "certificate request refused");
        }
        result.map_err(Status::from)
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Caller(#[from] Refusal),
    #[error(transparent)]
    Request(#[from] CsrError),
    #[error(
        "the setting {0} of the request is not supported: this authority has one signer, and certifies its callers alone"
    )]
    Setting(String),
    #[error(transparent)]
    Signer(#[from] SignError),
    #[error("the requested validity of {asked} s is above the maximum of {max} s")]
    Validity { asked: i64, max: u64 },
    #[error("the control plane has no certificate authority yet; try again")]
    NotReady,
    #[error(transparent)]
    Issue(#[from] mesh_identity::ca::CaError),
}

impl Error {
    /// The label by which refusals are counted, Istio's where it has one.
    fn label(&self) -> &'static str {
        match self {
            Self::Caller(_) => "authentication",
            Self::Request(CsrError::TooLarge(_)) => "too_large",
            Self::Request(CsrError::Malformed(_)) => "malformed",
            Self::Request(CsrError::Signature) => "signature",
            Self::Request(CsrError::Key(_)) => "key",
            Self::Request(CsrError::Name { .. }) => "name",
            Self::Request(CsrError::Authority) => "ca",
            Self::Request(CsrError::Subject(_)) => "subject",
            Self::Request(CsrError::Extension(_)) => "extension",
            Self::Setting(_) => "setting",
            Self::Signer(error) => error.label(),
            Self::Validity { .. } => "TTL_ERROR",
            Self::NotReady => "CA_NOT_READY",
            Self::Issue(_) => "CERT_GEN_ERROR",
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Caller(refusal) => refusal.into(),
            Error::Request(
                CsrError::Name { .. }
                | CsrError::Authority
                | CsrError::Extension(_)
                | CsrError::Subject(_),
            ) => Status::permission_denied(text),
            Error::Request(_) | Error::Setting(_) | Error::Validity { .. } => {
                Status::invalid_argument(text)
            }
            Error::Signer(error) => match error {
                SignError::Signer(..) | SignError::TooShort(_) => Status::invalid_argument(text),
                SignError::Denied { .. } => Status::permission_denied(text),
                SignError::Busy(_) => Status::resource_exhausted(text),
                SignError::Api { .. } | SignError::Late { .. } => Status::unavailable(text),
                _ => Status::internal(text),
            },
            Error::NotReady => Status::unavailable(text),
            Error::Issue(_) => Status::internal(text),
        }
    }
}

impl Service {
    async fn issue(
        &self,
        request: &Request<CertificateRequest>,
    ) -> Result<CertificateResponse, Error> {
        let caller = self
            .authenticator
            .identify(request.metadata(), request.extensions(), true)
            .await?;
        let message = request.get_ref();
        let settings = settings(message)?;
        let lifetime = self.lifetime(message.validity_duration)?;
        let names = self.authenticator.names_of(&caller.identity);
        let held = self.issuing.borrow().clone().ok_or(Error::NotReady)?;
        let (chain, trusted) = match &held.signer {
            Signer::Own(own) => {
                if settings.is_some() {
                    return Err(Error::Setting(CERT_SIGNER.to_owned()));
                }
                let checked = csr::check(&message.csr, &names)?;
                let chain = own.issue_workload(&checked, &caller.identity, now(), lifetime)?;
                (chain, held.trusted.clone())
            }
            Signer::Elsewhere(elsewhere) => {
                let checked = csr::check_for_signer(&message.csr, &names)?;
                let max = self.lifetimes.max.as_secs();
                let request = (message.csr.as_str(), &checked);
                let issued = elsewhere
                    .workload(request, &names, settings.as_deref(), lifetime, max)
                    .await?;
                (issued.chain_pem, held.trusted.with_first(&issued.root))
            }
        };
        self.metrics.citadel.issued.inc();
        let described = mesh_identity::trust::describe(&chain).unwrap_or_default();
        let leaf = described.first();
        tracing::info!(
            identity = %caller.identity,
            pod = caller.pod.as_ref().map(|(name, _)| name.as_str()),
            by = caller.by(),
            serial = leaf.map(|leaf| leaf.serial.as_str()),
            not_after = leaf.map(|leaf| leaf.not_after),
            "certificate issued"
        );
        let mut cert_chain = blocks(&chain);
        // The last one is what is trusted, which may be several roots while they change.
        cert_chain.push(trusted.pem().to_owned());
        Ok(CertificateResponse { cert_chain })
    }

    fn lifetime(&self, asked: i64) -> Result<u64, Error> {
        let max = self.lifetimes.max.as_secs();
        match u64::try_from(asked) {
            Err(_) | Ok(0) => Ok(self.lifetimes.default.as_secs().min(max)),
            Ok(seconds) if seconds > max => Err(Error::Validity { asked, max }),
            Ok(seconds) => Ok(seconds),
        }
    }
}

/// The signer that the caller names. Istio's agents send the settings always, and empty where they are not used.
fn settings(message: &CertificateRequest) -> Result<Option<String>, Error> {
    let mut signer = None;
    let fields = message
        .metadata
        .iter()
        .flat_map(|metadata| &metadata.fields);
    for (name, value) in fields {
        match &value.kind {
            None | Some(Kind::NullValue(_)) => {}
            Some(Kind::StringValue(text)) if text.is_empty() => {}
            Some(Kind::StringValue(text)) if name == CERT_SIGNER => signer = Some(text.clone()),
            _ => return Err(Error::Setting(name.chars().take(100).collect())),
        }
    }
    Ok(signer)
}

/// The certificates of a PEM text one by one.
fn blocks(pem: &str) -> Vec<String> {
    const END: &str = "-----END CERTIFICATE-----\n";
    pem.split_inclusive(END).map(str::to_owned).collect()
}
