//! The cluster's keys: certificate authority, service account key, admin token; made once and kept in the state directory (0600).

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mesh_identity::ca::{Authority, Leaf};
use mesh_identity::token::TokenKeys;
use serde_json::json;

use crate::parent::write_private;
use crate::users::ClusterUser;

/// The issuer of service account tokens, as Kubernetes' default.
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
const YEAR: u64 = 365 * 24 * 3600;

/// The keys.
pub(super) struct Pki {
    pub(super) authority: Authority,
    pub(super) tokens: Arc<TokenKeys>,
    pub(super) admin_token: String,
}

impl Pki {
    /// Loads the keys from `state/pki`, making what is not there.
    pub(super) fn open(state: &Path) -> anyhow::Result<Self> {
        let dir = state.join("pki");
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let (certificate, key) = (dir.join("ca.crt"), dir.join("ca.key"));
        let authority = if key.exists() {
            let read = |path: &Path| {
                std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
            };
            Authority::from_pem(&read(&certificate)?, &read(&key)?)
                .with_context(|| format!("in {}", dir.display()))?
        } else {
            let authority = Authority::generate("mesh", "mesh local cluster", now(), 10 * YEAR)?;
            write_private(&certificate, authority.certificate_pem().as_bytes())?;
            write_private(&key, authority.key_pem().as_bytes())?;
            authority
        };
        let sa = dir.join("sa.key");
        let tokens = match std::fs::read_to_string(&sa) {
            Ok(pem) => {
                TokenKeys::from_pem(ISSUER, &pem).with_context(|| format!("in {}", sa.display()))?
            }
            Err(_) => {
                let tokens = TokenKeys::generate(ISSUER)?;
                write_private(&sa, tokens.key_pem().as_bytes())?;
                tokens
            }
        };
        let file = dir.join("admin.token");
        let admin_token = match std::fs::read_to_string(&file) {
            Ok(token) if token.len() >= 20 => token,
            _ => {
                let token = format!(
                    "{}{}",
                    uuid::Uuid::new_v4().simple(),
                    uuid::Uuid::new_v4().simple()
                );
                write_private(&file, token.as_bytes())?;
                token
            }
        };
        Ok(Self {
            authority,
            tokens: Arc::new(tokens),
            admin_token,
        })
    }

    /// A fresh serving certificate for the API server.
    pub(super) fn serving(&self, api: SocketAddr) -> anyhow::Result<Leaf> {
        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            "localhost",
        ];
        let mut addresses: Vec<IpAddr> = vec![
            [127, 0, 0, 1].into(),
            [10, 96, 0, 1].into(),
            crate::agent::NODE_IP.into(),
        ];
        if !api.ip().is_unspecified() && !addresses.contains(&api.ip()) {
            addresses.push(api.ip());
        }
        Ok(self
            .authority
            .issue_server(&names, &addresses, now(), YEAR)?)
    }

    /// The kubeconfig for the administrator, with the other users for `kubectl --user NAME`.
    pub(super) fn kubeconfig(
        &self,
        api: SocketAddr,
        users: &[ClusterUser],
    ) -> anyhow::Result<Vec<u8>> {
        let host = if api.ip().is_unspecified() {
            SocketAddr::new([127, 0, 0, 1].into(), api.port())
        } else {
            api
        };
        let admin = std::iter::once(("mesh-admin", &self.admin_token));
        let others = users.iter().map(|user| (user.name.as_str(), &user.token));
        let mut names = HashSet::new();
        let entries: Vec<_> = admin
            .chain(others)
            .filter(|(name, _)| names.insert(*name))
            .map(|(name, token)| json!({"name": name, "user": {"token": token}}))
            .collect();
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "mesh",
            "clusters": [{"name": "mesh", "cluster": {
                "server": format!("https://{host}"),
                "certificate-authority-data": STANDARD.encode(self.authority.certificate_pem()),
            }}],
            "users": entries,
            "contexts": [{"name": "mesh", "context": {"cluster": "mesh", "user": "mesh-admin", "namespace": "default"}}],
        });
        Ok(serde_yaml::to_string(&config)?.into_bytes())
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let first = Pki::open(dir.path()).unwrap();
        let second = Pki::open(dir.path()).unwrap();
        assert_eq!(
            first.authority.certificate_pem(),
            second.authority.certificate_pem()
        );
        assert_eq!(first.admin_token, second.admin_token);
        let user = ClusterUser {
            token: "t".to_owned(),
            name: "jane".to_owned(),
            uid: String::new(),
            groups: Vec::new(),
        };
        let config: serde_json::Value = serde_yaml::from_slice(
            &first
                .kubeconfig("127.0.0.1:16443".parse().unwrap(), &[user])
                .unwrap(),
        )
        .unwrap();
        assert_eq!(
            config["clusters"][0]["cluster"]["server"],
            "https://127.0.0.1:16443"
        );
        assert_eq!(config["users"][0]["user"]["token"], first.admin_token);
        assert_eq!(
            config["users"][1],
            json!({"name": "jane", "user": {"token": "t"}})
        );
    }
}
