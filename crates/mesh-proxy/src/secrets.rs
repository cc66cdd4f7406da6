//! Keys, certificates and trusted authorities by name, as SDS knows them. Workers read without a lock; who changes one lets new handshakes
//! use the new one, while connections that are open go on.

pub mod files;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use mesh_identity::tls::{TlsError, certified_key, roots, split_certificates};
use mesh_identity::verify::CertificateNames;
use rustls::RootCertStore;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateRevocationListDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

/// Name of the workload's own certificate (Istio's agent).
pub const WORKLOAD: &str = "default";
/// Name of the mesh's authorities (Istio's agent).
pub const MESH_ROOTS: &str = "ROOTCA";

/// A secret as it comes from an agent, a file or the control plane.
pub enum Secret {
    /// A certificate that this proxy presents.
    Certificate {
        /// The leaf first.
        chain_pem: String,
        /// Its private key; wiped once it is read.
        key_pem: Zeroizing<String>,
    },
    /// Authorities that this proxy trusts.
    Trust {
        /// Their certificates.
        roots_pem: String,
        /// Revocation lists, empty where there are none.
        crl_pem: String,
    },
    /// Revocation lists alone.
    Revoked {
        /// The lists.
        crl_pem: String,
    },
}

impl Secret {
    /// Authorities without revocation lists.
    pub fn trust(roots_pem: impl Into<String>) -> Self {
        Self::Trust {
            roots_pem: roots_pem.into(),
            crl_pem: String::new(),
        }
    }
}

/// Why a secret was not taken; the one before it stays.
#[derive(Debug, thiserror::Error)]
#[error("secret {name:?}: {source}")]
pub struct SecretError {
    name: String,
    source: TlsError,
}

/// A secret in the form that handshakes use.
#[derive(Debug)]
pub enum Material {
    /// A certificate with its key.
    Certificate(Arc<CertifiedKey>),
    /// Authorities and revocation lists.
    Trust(
        Arc<RootCertStore>,
        Vec<CertificateRevocationListDer<'static>>,
    ),
    /// Revocation lists.
    Revoked(Vec<CertificateRevocationListDer<'static>>),
}

/// A secret in force.
#[derive(Debug)]
pub struct Held {
    /// It.
    pub material: Material,
    /// Its certificates as PEM: nothing that is secret.
    pub certificates_pem: String,
    /// When it was taken.
    pub updated: SystemTime,
    /// Of the store when it was taken; no two secrets have the same.
    pub version: u64,
}

impl Held {
    /// What its certificates say, the leaf first; those that cannot be read are left out.
    pub fn names(&self) -> Vec<CertificateNames> {
        let certificates = split_certificates(&self.certificates_pem).unwrap_or_default();
        let names = certificates.iter().map(|der| CertificateNames::of(der));
        names.filter_map(Result::ok).collect()
    }
}

type Table = BTreeMap<String, Arc<Held>>;

/// All secrets of a proxy.
#[derive(Debug, Default)]
pub struct Secrets {
    table: ArcSwap<Table>,
    version: AtomicU64,
    /// Held by who changes something, never by who reads.
    changing: Mutex<()>,
}

impl Secrets {
    /// Takes a secret, in place of one of the same name. A broken one is refused and the one before stays.
    pub fn set(&self, name: &str, secret: Secret) -> Result<(), SecretError> {
        let refused = |source| SecretError {
            name: name.to_owned(),
            source,
        };
        let (material, certificates_pem) = read(secret).map_err(refused)?;
        // Agents give the same authorities again with every certificate: sessions need not end for that.
        if let (Material::Trust(_, lists), Some(held)) = (&material, self.held(name))
            && let Material::Trust(_, held_lists) = &held.material
            && held.certificates_pem == certificates_pem
            && held_lists == lists
        {
            return Ok(());
        }
        self.change(|table, version| {
            let held = Held {
                material,
                certificates_pem,
                updated: SystemTime::now(),
                version,
            };
            table.insert(name.to_owned(), Arc::new(held));
        });
        Ok(())
    }

    /// Forgets a secret; handshakes that need it fail from now on.
    pub fn remove(&self, name: &str) {
        self.change(|table, _| {
            table.remove(name);
        });
    }

    fn change(&self, change: impl FnOnce(&mut Table, u64)) {
        let _changing = self.changing.lock().unwrap_or_else(|e| e.into_inner());
        let version = self.version.load(Ordering::Acquire) + 1;
        let mut table = Table::clone(&self.table.load());
        change(&mut table, version);
        self.table.store(Arc::new(table));
        self.version.store(version, Ordering::Release);
    }

    /// Goes up with every change.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The secret of this name.
    pub fn held(&self, name: &str) -> Option<Arc<Held>> {
        self.table.load().get(name).cloned()
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        self.table.load().keys().cloned().collect()
    }

    /// All secrets, for a dump. Private keys cannot be had from here.
    pub fn describe(&self) -> Vec<(String, Arc<Held>)> {
        let table = self.table.load();
        let pairs = table
            .iter()
            .map(|(name, held)| (name.clone(), held.clone()));
        pairs.collect()
    }
}

fn read(secret: Secret) -> Result<(Material, String), TlsError> {
    match secret {
        Secret::Certificate { chain_pem, key_pem } => {
            let key = certified_key(&chain_pem, &key_pem)?;
            Ok((Material::Certificate(Arc::new(key)), chain_pem))
        }
        Secret::Trust { roots_pem, crl_pem } => {
            let material = Material::Trust(roots(&roots_pem)?, revocations(&crl_pem)?);
            Ok((material, roots_pem))
        }
        Secret::Revoked { crl_pem } => {
            Ok((Material::Revoked(revocations(&crl_pem)?), String::new()))
        }
    }
}

fn revocations(pem: &str) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let lists = CertificateRevocationListDer::pem_slice_iter(pem.as_bytes());
    let lists = lists.collect::<Result<Vec<_>, _>>();
    lists.map_err(|error| TlsError::Pem {
        what: "revocation lists",
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_identity::ca::Authority;

    fn now() -> u64 {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |d| d.as_secs())
    }

    #[test]
    fn a_broken_secret_leaves_the_one_before_it() {
        let authority = Authority::generate("o", "root", now(), 3600).unwrap();
        let leaf = authority
            .issue_server(&["a.example"], &[], now(), 600)
            .unwrap();
        let secrets = Secrets::default();
        let good = || Secret::Certificate {
            chain_pem: leaf.chain_pem.clone(),
            key_pem: Zeroizing::new(leaf.key_pem.clone()),
        };
        secrets.set(WORKLOAD, good()).unwrap();
        let first = secrets.held(WORKLOAD).unwrap();
        let other = authority
            .issue_server(&["b.example"], &[], now(), 600)
            .unwrap();
        let mixed = Secret::Certificate {
            chain_pem: leaf.chain_pem.clone(),
            key_pem: Zeroizing::new(other.key_pem.clone()),
        };
        let error = secrets.set(WORKLOAD, mixed).unwrap_err().to_string();
        assert!(error.contains("\"default\""), "{error}");
        assert!(secrets.set(MESH_ROOTS, Secret::trust("nothing")).is_err());
        assert_eq!(secrets.held(WORKLOAD).unwrap().version, first.version);
        secrets.set(WORKLOAD, good()).unwrap();
        assert!(secrets.held(WORKLOAD).unwrap().version > first.version);
        assert_eq!(secrets.names(), ["default"]);
        assert_eq!(first.names()[0].dns, ["a.example"]);
        secrets.remove(WORKLOAD);
        assert!(secrets.held(WORKLOAD).is_none());
    }
}
