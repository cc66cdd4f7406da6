//! Who talks to whom, and how that is proved.

use std::collections::BTreeMap;

use mesh_api::security::authorization_policy::{Action, Rule};
use mesh_api::security::request_authentication::JwtRule;

use crate::ObjectKey;
use crate::service::contains_labels;

/// Label that Kubernetes' Gateway gives to the pods that serve it.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// How a port takes mutual TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum MtlsMode {
    /// Plain text only; TLS is the application's own affair.
    Disable,
    /// Both.
    #[default]
    Permissive,
    /// Mutual TLS only.
    Strict,
}

/// The proxies that a policy is for, among those of its namespace (of all, where that is the root namespace).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    All,
    /// Those whose pods have these labels.
    Labels(BTreeMap<String, String>),
    /// Those that serve one of these Gateways of Kubernetes.
    Gateways(Vec<String>),
    /// None: what it names is not served by this version, which is reported.
    Nothing,
}

/// Modes of mutual TLS for the workloads of a selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// The object.
    pub key: ObjectKey,
    /// Labels that select workloads; never empty here.
    pub selector: BTreeMap<String, String>,
    /// Mode of all ports; `None` is inherited.
    pub mode: Option<MtlsMode>,
    /// Modes of single ports of the workload; `None` is that of all ports.
    pub ports: BTreeMap<u16, Option<MtlsMode>>,
}

/// Modes of mutual TLS of a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NamespaceMtls {
    /// The namespace's own; `None` is inherited.
    pub mode: Option<MtlsMode>,
    /// Of single workloads, oldest first.
    pub workloads: Vec<PeerAuthentication>,
}

/// Who may do what.
#[derive(Debug, Clone, PartialEq)]
pub struct AuthorizationPolicy {
    /// The object.
    pub key: ObjectKey,
    /// When it was created, in seconds since 1970 (0 if unknown).
    pub created: i64,
    /// For whom it is.
    pub scope: Scope,
    /// What happens on a match.
    pub action: Action,
    /// Rules, of which one has to match.
    pub rules: Vec<Rule>,
    /// Who decides where the action is CUSTOM.
    pub provider: String,
    /// Evaluated and counted, without effect.
    pub dry_run: bool,
}

/// Which tokens are checked.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestAuthentication {
    /// The object.
    pub key: ObjectKey,
    /// When it was created, in seconds since 1970 (0 if unknown).
    pub created: i64,
    /// For whom it is.
    pub scope: Scope,
    /// Rules.
    pub rules: Vec<JwtRule>,
}

/// Where the keys of an issuer are found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeySource {
    /// The key set itself is at this address.
    Jwks(String),
    /// The issuer's OpenID configuration (`ISSUER/.well-known/openid-configuration`) names the address.
    Discovery(String),
}

impl KeySource {
    /// Where the keys of a rule are; `None` where the rule has them in itself.
    pub fn of(rule: &JwtRule) -> Option<Self> {
        if !rule.jwks.is_empty() {
            None
        } else if rule.jwks_uri.is_empty() {
            Some(Self::Discovery(rule.issuer.clone()))
        } else {
            Some(Self::Jwks(rule.jwks_uri.clone()))
        }
    }
}

impl Scope {
    /// True if a proxy with these labels is meant.
    pub fn includes(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::All => true,
            Self::Labels(wanted) => contains_labels(labels, wanted),
            Self::Gateways(names) => labels
                .get(GATEWAY_NAME)
                .is_some_and(|served| names.contains(served)),
            Self::Nothing => false,
        }
    }
}

impl PeerAuthentication {
    /// The mode of a port, where the rest of the namespace has `inherited`.
    pub(crate) fn mode(&self, port: u16, inherited: MtlsMode) -> MtlsMode {
        let own = self.mode.unwrap_or(inherited);
        self.ports.get(&port).copied().flatten().unwrap_or(own)
    }
}
