//! Identities in policies.

use mesh_model::Mesh;

use super::matcher::{glob, regex};
use crate::tls::trust_domains;
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;

/// Stands for the mesh's own trust domain, whatever its name.
const LOCAL: &str = "cluster.local";

/// Principals with those that mean the same under another name of the trust domain (Istio's trustdomain bundle).
pub(super) fn with_aliases(mesh: &Mesh, principals: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for principal in principals {
        for alias in aliases(mesh, principal) {
            if !all.contains(&alias) {
                all.push(alias);
            }
        }
    }
    all
}

fn aliases(mesh: &Mesh, principal: &str) -> Vec<String> {
    let same = || vec![principal.to_owned()];
    let Some((domain, rest)) = principal.split_once('/') else {
        return same();
    };
    // `DOMAIN/ns/NS/sa/SA`; what has another form says nothing about the domain.
    if rest.split('/').count() != 4 || domain == "*" {
        return same();
    }
    let covers = |known: &str| {
        known == domain
            || domain
                .strip_prefix('*')
                .is_some_and(|end| known.ends_with(end))
            || domain
                .strip_suffix('*')
                .is_some_and(|beginning| known.starts_with(beginning))
    };
    if domain != LOCAL && !trust_domains(mesh).any(covers) {
        return same();
    }
    trust_domains(mesh)
        .map(|known| {
            if domain
                .strip_prefix('*')
                .is_some_and(|end| known.ends_with(end))
            {
                principal.to_owned()
            } else {
                format!("{known}/{rest}")
            }
        })
        .collect()
}

/// Trust domains with the aliases of the mesh's own.
pub(super) fn domains_with_aliases(mesh: &Mesh, domains: &[String]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut add = |domain: &str| {
        if !all.iter().any(|known| known == domain) {
            all.push(domain.to_owned());
        }
    };
    for domain in domains {
        if trust_domains(mesh).any(|known| known == domain) {
            trust_domains(mesh).for_each(&mut add);
        } else {
            add(domain);
        }
    }
    all
}

pub(super) fn in_namespace(namespace: &str) -> StringMatcher {
    regex(format!(".*/ns/{}/.*", glob(namespace)))
}

/// `NAMESPACE/NAME`, or a name in the policy's own namespace.
pub(super) fn service_account(own: &str, account: &str) -> StringMatcher {
    let (namespace, name) = account.split_once('/').unwrap_or((own, account));
    regex(format!(
        "spiffe://.+/ns/{}/(.+/|)sa/{}(/.+)?",
        glob(namespace),
        glob(name)
    ))
}

pub(super) fn in_trust_domain(domain: &str) -> StringMatcher {
    regex(format!(
        "spiffe://{}/.*",
        glob(domain).replace(".*", "[^/]*")
    ))
}
