//! SPIFFE ids in the form that Istio gives to workloads: `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`.

use std::fmt;
use std::str::FromStr;

/// Why a text is not the SPIFFE id of a workload.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not the SPIFFE id of a workload (spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT): {reason}"
)]
pub struct SpiffeError {
    text: String,
    reason: &'static str,
}

/// The identity of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    /// The trust domain, `cluster.local` unless the mesh says otherwise.
    pub trust_domain: String,
    /// The Kubernetes namespace.
    pub namespace: String,
    /// The Kubernetes service account.
    pub service_account: String,
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let fail = |reason| SpiffeError {
            text: text.chars().take(256).collect(),
            reason,
        };
        // The length limit is SPIFFE-ID section 2.3's.
        if text.len() > 2048 {
            return Err(fail("longer than 2,048 bytes"));
        }
        let rest = text
            .strip_prefix("spiffe://")
            .ok_or_else(|| fail("it does not start with spiffe://"))?;
        let parts: Vec<&str> = rest.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", service_account] = parts[..] else {
            return Err(fail("its path is not /ns/NAMESPACE/sa/SERVICE-ACCOUNT"));
        };
        if !is_trust_domain(trust_domain) {
            return Err(fail(
                "a trust domain is made of lower-case letters, digits, '.', '-' and '_'",
            ));
        }
        if !is_path_segment(namespace) || !is_path_segment(service_account) {
            return Err(fail(
                "a path segment is made of letters, digits, '.', '-' and '_'",
            ));
        }
        Ok(Self {
            trust_domain: trust_domain.to_owned(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
        })
    }
}

/// SPIFFE-ID section 2.1.
fn is_trust_domain(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 255
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b))
}

/// SPIFFE-ID section 2.2: no dot segments, no empty ones, no percent-encoding.
fn is_path_segment(text: &str) -> bool {
    !text.is_empty()
        && text != "."
        && text != ".."
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
}
