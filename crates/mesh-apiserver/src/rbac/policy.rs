//! All roles and bindings at one moment, indexed by who they are for.
//!
//! Immutable, and made anew by the first request after a role or binding has changed; what did not change is taken over from the one
//! before. A decision reads memory only and allocates nothing.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use super::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, ROLE_BINDINGS, ROLES, Rule};
use crate::access::{Action, On};
use crate::auth::Identity;
use crate::storage::Storage;

/// Roles and bindings.
#[derive(Debug, Default)]
pub struct Policy {
    /// Revision of the newest role or binding in it; 0 for none yet.
    pub revision: u64,
    /// By storage key: `/name` of a ClusterRole, `namespace/name` of a Role; with the revision of the object.
    roles: HashMap<String, (u64, Arc<[Rule]>)>,
    cluster: Subjects,
    namespaces: HashMap<String, Subjects>,
}

#[derive(Debug, Default)]
struct Subjects {
    users: HashMap<String, Vec<Arc<Grant>>>,
    groups: HashMap<String, Vec<Arc<Grant>>>,
}

/// What a binding gives.
#[derive(Debug)]
pub struct Grant {
    /// `ClusterRoleBinding "x"`, for people.
    binding: String,
    role_kind: String,
    role: String,
    /// `None` when the role does not exist.
    rules: Option<Arc<[Rule]>>,
}

/// Why something is allowed.
#[derive(Debug)]
pub enum Allowed<'a> {
    /// The user is of the group that may do everything.
    Master,
    /// By a binding to a user or group (the kind, then the name).
    By(&'a Grant, &'static str, &'a str),
}

impl std::fmt::Display for Allowed<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Allowed::Master => Ok(()),
            Allowed::By(grant, kind, name) => {
                let (binding, role_kind, role) = (&grant.binding, &grant.role_kind, &grant.role);
                let service_account = name.strip_prefix("system:serviceaccount:");
                match (service_account.and_then(|rest| rest.split_once(':')), *kind) {
                    (Some((namespace, account)), "User") => write!(
                        f,
                        "RBAC: allowed by {binding} of {role_kind} {role:?} to ServiceAccount \"{account}/{namespace}\""
                    ),
                    _ => write!(
                        f,
                        "RBAC: allowed by {binding} of {role_kind} {role:?} to {kind} {name:?}"
                    ),
                }
            }
        }
    }
}

impl Policy {
    /// The policy of what is stored; `before` may be any earlier one.
    pub fn read(storage: &Storage, before: &Policy) -> Policy {
        // Asked first: what changes while the rest is read makes the next policy.
        let mut policy = Policy {
            revision: storage.policy_revision(),
            ..Policy::default()
        };
        for kind in [CLUSTER_ROLES, ROLES] {
            for (key, stored) in storage.list(kind, None).items {
                let rules = match before.roles.get(&key) {
                    Some((revision, rules)) if *revision == stored.revision => rules.clone(),
                    _ => Rule::list(&stored.value).into(),
                };
                policy.roles.insert(key, (stored.revision, rules));
            }
        }
        for (key, stored) in storage.list(CLUSTER_ROLE_BINDINGS, None).items {
            let name = key.trim_start_matches('/');
            let grant = policy.grant(format!("ClusterRoleBinding {name:?}"), "", &stored.value);
            policy.cluster.bind(&grant, "", &stored.value);
        }
        for (key, stored) in storage.list(ROLE_BINDINGS, None).items {
            let (namespace, name) = key.split_once('/').unwrap_or(("", &key));
            let title = format!("RoleBinding \"{name}/{namespace}\"");
            let grant = policy.grant(title, namespace, &stored.value);
            let subjects = policy.namespaces.entry(namespace.to_owned()).or_default();
            subjects.bind(&grant, namespace, &stored.value);
        }
        policy
    }

    fn grant(&self, binding: String, namespace: &str, object: &Value) -> Arc<Grant> {
        let reference = &object["roleRef"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Arc::new(Grant {
            binding,
            role_kind: text(&reference["kind"]),
            role: text(&reference["name"]),
            rules: self.referenced(namespace, reference),
        })
    }

    /// The rules of the role that a binding in `namespace` (empty: in none) refers to.
    pub fn referenced(&self, namespace: &str, reference: &Value) -> Option<Arc<[Rule]>> {
        let name = reference["name"].as_str().unwrap_or_default();
        let key = match reference["kind"].as_str() {
            Some("ClusterRole") => format!("/{name}"),
            Some("Role") if !namespace.is_empty() => format!("{namespace}/{name}"),
            _ => return None,
        };
        self.roles.get(&key).map(|(_, rules)| rules.clone())
    }

    /// Why `identity` may do this; `None` when it may not.
    pub fn allows<'a>(
        &'a self,
        identity: &'a Identity,
        action: &Action<'_>,
    ) -> Option<Allowed<'a>> {
        if identity.is_master() {
            return Some(Allowed::Master);
        }
        let namespace = match &action.on {
            On::Resource(object) => &*object.namespace,
            On::Path(_) => "",
        };
        let allows = |grant: &Grant| {
            let rules = grant.rules.iter().flat_map(|rules| rules.iter());
            rules.into_iter().any(|rule| rule.allows(action))
        };
        self.grants(identity, namespace)
            .find(|(grant, _, _)| allows(grant))
            .map(|(grant, kind, name)| Allowed::By(grant, kind, name))
    }

    /// What `identity` has by bindings for everything and, where a namespace is given, by those in it.
    fn grants<'a>(
        &'a self,
        identity: &'a Identity,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a Grant, &'static str, &'a str)> {
        let inner = (!namespace.is_empty()).then(|| self.namespaces.get(namespace));
        let places = std::iter::once(&self.cluster).chain(inner.flatten());
        places.flat_map(move |subjects| {
            let user = subjects
                .users
                .get(&identity.username)
                .into_iter()
                .flatten()
                .map(|grant| (&**grant, "User", identity.username.as_str()));
            let groups = identity.groups.iter().flat_map(|group| {
                let grants = subjects.groups.get(group).into_iter().flatten();
                grants.map(move |grant| (&**grant, "Group", group.as_str()))
            });
            user.chain(groups)
        })
    }

    /// All rules that `identity` has in a namespace (empty: outside of all).
    pub fn rules(&self, identity: &Identity, namespace: &str) -> Vec<Rule> {
        let mut all: Vec<Rule> = Vec::new();
        for (grant, _, _) in self.grants(identity, namespace) {
            for rule in grant.rules.iter().flat_map(|rules| rules.iter()) {
                if !all.contains(rule) {
                    all.push(rule.clone());
                }
            }
        }
        all
    }

    /// The roles that `identity` is bound to and that do not exist, in words; empty when there are none.
    pub fn broken(&self, identity: &Identity, action: &Action<'_>) -> String {
        let namespace = match &action.on {
            On::Resource(object) => &*object.namespace,
            On::Path(_) => "",
        };
        let missing: Vec<String> = self
            .grants(identity, namespace)
            .filter(|(grant, _, _)| grant.rules.is_none())
            .map(|(grant, _, _)| {
                let kind = grant.role_kind.to_lowercase();
                format!("{kind}.{} {:?} not found", super::GROUP, grant.role)
            })
            .collect();
        match missing.as_slice() {
            [] => String::new(),
            [one] => format!("RBAC: {one}"),
            more => format!("RBAC: [{}]", more.join(", ")),
        }
    }
}

impl Subjects {
    fn bind(&mut self, grant: &Arc<Grant>, namespace: &str, binding: &Value) {
        for subject in binding["subjects"].as_array().into_iter().flatten() {
            let text = |field: &str| subject[field].as_str().unwrap_or_default();
            let name = text("name");
            let (map, name) = match text("kind") {
                "User" => (&mut self.users, name.to_owned()),
                "Group" => (&mut self.groups, name.to_owned()),
                "ServiceAccount" => {
                    let own = text("namespace");
                    let namespace = if own.is_empty() { namespace } else { own };
                    if namespace.is_empty() {
                        continue;
                    }
                    let user = format!("system:serviceaccount:{namespace}:{name}");
                    (&mut self.users, user)
                }
                // Refused at the door; an object that came by another way binds nobody.
                _ => continue,
            };
            let grants = map.entry(name).or_default();
            if !grants.iter().any(|known| Arc::ptr_eq(known, grant)) {
                grants.push(grant.clone());
            }
        }
    }
}
