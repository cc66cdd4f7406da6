//! The certificate authority of the mesh: its key in a Secret, its roots in every namespace, its service on the secure port.

pub(crate) mod roots;
pub(crate) mod rotation;
pub(crate) mod secret;
pub(crate) mod service;

use std::sync::Arc;

use mesh_identity::ca::{Authority, CaError};
use mesh_identity::trust::TrustBundle;
use tokio::sync::watch;

/// The authority in force; none before it was read or made.
pub(crate) type Issuing = watch::Receiver<Option<Arc<Held>>>;

/// Where the authority comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Made here, kept in `istio-ca-secret`.
    SelfSigned,
    /// Brought by an operator in `cacerts`.
    PluggedIn,
}

/// An authority, and whom everybody is to trust.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) authority: Authority,
    pub(crate) origin: Origin,
    /// All roots, first the one that what is issued now leads to: a workload sees by that whether its certificate is of the old one.
    pub(crate) trusted: TrustBundle,
    /// How far a change of the root is.
    pub(crate) phase: rotation::Phase,
    /// Somebody asks for one.
    pub(crate) requested: bool,
}

impl Held {
    pub(crate) fn new(authority: Authority, origin: Origin) -> Result<Self, CaError> {
        let trusted = authority.roots().with_first(authority.root());
        Ok(Self {
            authority,
            origin,
            trusted,
            phase: rotation::Phase::Idle,
            requested: false,
        })
    }
}

/// Waits for the authority.
pub(crate) async fn held(issuing: &mut Issuing) -> Option<Arc<Held>> {
    issuing.wait_for(Option::is_some).await.ok()?.clone()
}
