//! Who is asking: bearer tokens to identities. What they may do is decided in `access.rs`.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mesh_identity::token::{Claims, TokenError, TokenKeys};

/// The group whose members may do everything.
const MASTERS: &str = "system:masters";

/// Credentials that the server accepts.
#[derive(Clone)]
pub struct Auth {
    /// Bearer tokens of the administrator (`system:masters`). At least 20 characters each; an empty list means service accounts only.
    pub admin_tokens: Vec<String>,
    /// Signs and checks service account tokens.
    pub tokens: Arc<TokenKeys>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").finish_non_exhaustive()
    }
}

/// Who sent a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User name, for example `system:serviceaccount:default:sleep`.
    pub username: String,
    /// Uid of a service account, else empty.
    pub uid: String,
    /// Groups, for example `system:masters`.
    pub groups: Vec<String>,
    /// More facts, for example the pod that a token is bound to.
    pub extra: Vec<(String, Vec<String>)>,
}

impl Identity {
    /// The administrator, as in the kubeconfig file.
    pub fn admin() -> Identity {
        Identity::named(
            "kubernetes-admin",
            &["system:masters", "system:authenticated"],
        )
    }

    /// A part of the cluster itself, for example `system:kube-controller-manager`.
    pub fn system(username: &str) -> Identity {
        Identity::named(username, &["system:masters", "system:authenticated"])
    }

    /// What the requests' fields are managed by when no user agent says it: `kube-controller-manager`, `kubelet`, the name of a service
    /// account; `unknown` for nobody in particular, as in Kubernetes.
    pub fn component(&self) -> &str {
        match self.username.strip_prefix("system:") {
            Some("anonymous") => "unknown",
            Some(node) if node.starts_with("node:") => "kubelet",
            _ => self.username.rsplit(':').next().unwrap_or_default(),
        }
    }

    /// A user of the outside; `groups` beside `system:authenticated`, `uid` may be empty.
    pub fn user(username: &str, uid: &str, groups: &[String]) -> Identity {
        let mut identity = Identity::named(username, &[]);
        uid.clone_into(&mut identity.uid);
        identity.groups = groups.to_vec();
        let authenticated = "system:authenticated".to_owned();
        if !identity.groups.contains(&authenticated) {
            identity.groups.push(authenticated);
        }
        identity
    }

    /// A service account.
    pub fn service_account(namespace: &str, name: &str, uid: &str) -> Identity {
        let group = format!("system:serviceaccounts:{namespace}");
        let mut identity = Identity::named(
            &format!("system:serviceaccount:{namespace}:{name}"),
            &["system:serviceaccounts", &group, "system:authenticated"],
        );
        identity.uid = uid.to_owned();
        identity
    }

    /// Whether it may do everything, whatever the roles say (as in Kubernetes).
    pub(crate) fn is_master(&self) -> bool {
        self.groups.iter().any(|group| group == MASTERS)
    }

    pub(crate) fn anonymous() -> Identity {
        Identity::named("system:anonymous", &["system:unauthenticated"])
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        self.username == "system:anonymous"
    }

    fn named(username: &str, groups: &[&str]) -> Identity {
        Identity {
            username: username.to_owned(),
            uid: String::new(),
            groups: groups.iter().map(|g| (*g).to_owned()).collect(),
            extra: Vec::new(),
        }
    }

    fn from_claims(claims: &Claims) -> Identity {
        let k = &claims.kubernetes;
        let mut identity =
            Identity::service_account(&k.namespace, &k.serviceaccount.name, &k.serviceaccount.uid);
        if let Some(pod) = &k.pod {
            identity.extra = vec![
                (
                    "authentication.kubernetes.io/pod-name".to_owned(),
                    vec![pod.name.clone()],
                ),
                (
                    "authentication.kubernetes.io/pod-uid".to_owned(),
                    vec![pod.uid.clone()],
                ),
            ];
        }
        identity
    }
}

impl Auth {
    /// The identity behind a bearer token, with the claims of a service account token. Whether the account still exists is the
    /// caller's to check.
    pub(crate) fn identify(
        &self,
        token: &str,
        audiences: &[String],
    ) -> Result<(Identity, Option<Claims>), TokenError> {
        // Every token is compared, and each over its full length, so that the time tells nothing.
        let mut admin = false;
        for known in &self.admin_tokens {
            admin |= same_bytes(known.as_bytes(), token.as_bytes());
        }
        if admin {
            return Ok((Identity::admin(), None));
        }
        let claims = self.tokens.check(token, audiences, now_seconds())?;
        Ok((Identity::from_claims(&claims), Some(claims)))
    }
}

/// The one whose token this is. Every token is compared, and each over its full length, so that the time tells nothing.
pub(crate) fn holder<'a>(known: &'a [(String, Identity)], token: &str) -> Option<&'a Identity> {
    let mut found = None;
    for (secret, identity) in known {
        if same_bytes(secret.as_bytes(), token.as_bytes()) {
            found = Some(identity);
        }
    }
    found
}

/// Seconds since 1970.
pub(crate) fn now_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

fn same_bytes(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && !a.is_empty() && a.iter().zip(b).fold(0, |acc, (x, y)| acc | (x ^ y)) == 0
}
