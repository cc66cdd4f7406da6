//! The certificate authority of the mesh: its key in a Secret, or a signer elsewhere; its roots in every namespace; its service on the
//! secure port.

pub(crate) mod external;
pub(crate) mod registration;
pub(crate) mod roots;
pub(crate) mod rotation;
pub(crate) mod secret;
pub(crate) mod service;

use std::sync::Arc;

use mesh_identity::ca::{Authority, CaError};
use mesh_identity::trust::TrustBundle;
use tokio::sync::watch;

use registration::Registration;

/// The authority in force; none before it was read or made.
pub(crate) type Issuing = watch::Receiver<Option<Arc<Held>>>;

/// Where the authority comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Made here, kept in `istio-ca-secret`.
    SelfSigned,
    /// Brought by an operator in `cacerts`.
    PluggedIn,
    /// A signer elsewhere; only its roots are known here.
    External,
}

/// Who signs.
#[derive(Debug)]
pub(crate) enum Signer {
    /// This process, with the authority's key.
    Own(Box<Authority>),
    /// Somebody else, whom this process asks.
    Elsewhere(Registration),
}

/// An authority, and whom everybody is to trust.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) signer: Signer,
    pub(crate) origin: Origin,
    /// Fingerprint of the root that what is issued now leads to; of several signers elsewhere the first one's.
    pub(crate) root: String,
    /// All roots, that one first: a workload sees by that whether its certificate is of the old one.
    pub(crate) trusted: TrustBundle,
    /// How far a change of the root is.
    pub(crate) phase: rotation::Phase,
    /// Somebody asks for one.
    pub(crate) requested: bool,
    /// Fingerprint of the root before, where a rotation of ours brought this one.
    pub(crate) former: Option<String>,
}

impl Held {
    pub(crate) fn new(authority: Authority, origin: Origin) -> Result<Self, CaError> {
        let trusted = authority.roots().with_first(authority.root());
        Ok(Self {
            root: authority.root().to_owned(),
            signer: Signer::Own(Box::new(authority)),
            origin,
            trusted,
            phase: rotation::Phase::Idle,
            requested: false,
            former: None,
        })
    }

    /// The authority whose key is here.
    pub(crate) fn own(&self) -> Option<&Authority> {
        match &self.signer {
            Signer::Own(authority) => Some(authority),
            Signer::Elsewhere(_) => None,
        }
    }

    /// Whether the roots were brought in the ConfigMap of the control plane's namespace, which then is not ours to correct.
    pub(crate) fn is_from_map(&self) -> bool {
        matches!(&self.signer, Signer::Elsewhere(elsewhere) if elsewhere.from_map)
    }

    /// Whether nothing that matters to anybody is different.
    fn same(&self, other: &Self) -> bool {
        let signer = match (&self.signer, &other.signer) {
            (Signer::Own(one), Signer::Own(other)) => {
                one.certificate_pem() == other.certificate_pem()
            }
            (Signer::Elsewhere(one), Signer::Elsewhere(other)) => {
                one.roots == other.roots && one.from_map == other.from_map
            }
            _ => false,
        };
        signer
            && self.trusted == other.trusted
            && self.origin == other.origin
            && self.phase == other.phase
            && self.requested == other.requested
    }

    /// Whether whoever has a certificate of now is still trusted by those who trust `next`, and the other way round.
    fn is_continued_by(&self, next: &Self) -> bool {
        let after = next.trusted.fingerprints();
        let trusted =
            |bundle: &TrustBundle| bundle.fingerprints().iter().any(|r| after.contains(r));
        match &self.signer {
            // Which of a signer's roots is in use is not known here.
            Signer::Elsewhere(elsewhere) => {
                elsewhere.roots.iter().all(|roots| trusted(&roots.bundle))
            }
            // A rotation of our own, of which this replica has not seen every step; or both trust the root of the other one.
            _ => {
                next.former.as_ref() == Some(&self.root)
                    || after.contains(&self.root)
                        && self.trusted.fingerprints().contains(&next.root)
            }
        }
    }
}

/// Waits for the authority.
pub(crate) async fn held(issuing: &mut Issuing) -> Option<Arc<Held>> {
    issuing.wait_for(Option::is_some).await.ok()?.clone()
}

/// Puts an authority in force, if it is another than the present one.
fn put(issuing: &watch::Sender<Option<Arc<Held>>>, metrics: &crate::metrics::Metrics, held: Held) {
    let seconds = |time: u64| i64::try_from(time).unwrap_or(i64::MAX);
    let roots = mesh_identity::trust::describe(held.trusted.pem()).unwrap_or_default();
    let root_end = roots.iter().map(|root| root.not_after).min().unwrap_or(0);
    metrics.citadel.root_expiry.set(seconds(root_end));
    if let Some(own) = held.own() {
        metrics.citadel.chain_expiry.set(seconds(own.not_after()));
    }
    issuing.send_if_modified(|present| {
        let same = present.as_ref().is_some_and(|present| present.same(&held));
        if !same {
            tracing::info!(
                origin = ?held.origin,
                root = held.root,
                trusted = held.trusted.fingerprints().len(),
                "certificate authority in force"
            );
            *present = Some(Arc::new(held));
        }
        !same
    });
}
