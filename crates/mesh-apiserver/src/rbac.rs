//! Role-based access control: what a rule allows, and which rules cover others.
//!
//! The matching is that of Kubernetes' RBAC (`rbac.authorization.k8s.io/v1`): rules only allow, nothing denies; `*` stands for every
//! verb, group or resource, `*/log` for a subresource of all resources, an URL that ends in `*` for all paths below it.

pub mod aggregate;
pub mod defaults;
pub mod escalation;
pub mod policy;

use serde_json::{Value, json};

use crate::access::{Action, On};

/// The API group of roles and bindings.
pub const GROUP: &str = "rbac.authorization.k8s.io";
/// Storage key of Roles.
pub const ROLES: &str = "rbac.authorization.k8s.io/roles";
/// Storage key of ClusterRoles.
pub const CLUSTER_ROLES: &str = "rbac.authorization.k8s.io/clusterroles";
/// Storage key of RoleBindings.
pub const ROLE_BINDINGS: &str = "rbac.authorization.k8s.io/rolebindings";
/// Storage key of ClusterRoleBindings.
pub const CLUSTER_ROLE_BINDINGS: &str = "rbac.authorization.k8s.io/clusterrolebindings";

/// A `PolicyRule`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// `get`, `list`, ..., `*`.
    pub verbs: Vec<String>,
    /// API groups; `""` is the core group.
    pub groups: Vec<String>,
    /// `pods`, `pods/log`, `*/log`, `*`.
    pub resources: Vec<String>,
    /// Empty for all names.
    pub names: Vec<String>,
    /// Paths that are no resources; those with a `*` at the end stand for all below.
    pub urls: Vec<String>,
}

impl Rule {
    /// Reads a rule; what is no text is left out.
    pub fn of(value: &Value) -> Rule {
        let texts = |field: &str| -> Vec<String> {
            let list = value[field].as_array().into_iter().flatten();
            list.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        Rule {
            verbs: texts("verbs"),
            groups: texts("apiGroups"),
            resources: texts("resources"),
            names: texts("resourceNames"),
            urls: texts("nonResourceURLs"),
        }
    }

    /// The rules of a role.
    pub fn list(role: &Value) -> Vec<Rule> {
        let rules = role["rules"].as_array().into_iter().flatten();
        rules.map(Rule::of).collect()
    }

    /// Whether it allows an action.
    pub fn allows(&self, action: &Action<'_>) -> bool {
        if !has_or_all(&self.verbs, &action.verb) {
            return false;
        }
        match &action.on {
            On::Resource(r) => {
                has_or_all(&self.groups, &r.group)
                    && self
                        .resources
                        .iter()
                        .any(|rule| resource_matches(rule, &r.resource, &r.subresource))
                    && (self.names.is_empty() || self.names.iter().any(|name| *name == r.name))
            }
            On::Path(path) => self.urls.iter().any(|url| url_covers(url, path)),
        }
    }

    /// Whether it allows all that `other` does; `other` is one of [`Rule::single`].
    fn covers(&self, other: &Rule) -> bool {
        let resources = |path: &String| {
            let (resource, subresource) = path.split_once('/').unwrap_or((path, ""));
            self.resources.iter().any(|rule| {
                // `pods/*` names a subresource literally; only `*` and `*/x` stand for more.
                resource_matches(rule, resource, subresource)
            })
        };
        let names = if other.names.is_empty() {
            self.names.is_empty()
        } else {
            self.names.is_empty() || other.names.iter().all(|name| self.names.contains(name))
        };
        other.verbs.iter().all(|verb| has_or_all(&self.verbs, verb))
            && other
                .groups
                .iter()
                .all(|group| has_or_all(&self.groups, group))
            && other.resources.iter().all(resources)
            && other
                .urls
                .iter()
                .all(|path| self.urls.iter().any(|url| url_covers(url, path)))
            && names
    }

    /// The same permissions as rules of one verb, one group, one resource and one name each.
    fn single(&self) -> Vec<Rule> {
        let mut all = Vec::new();
        let one = |text: &String| vec![text.clone()];
        let names: Vec<Vec<String>> = if self.names.is_empty() {
            vec![Vec::new()]
        } else {
            self.names.iter().map(one).collect()
        };
        for verb in &self.verbs {
            for group in &self.groups {
                for resource in &self.resources {
                    all.extend(names.iter().map(|names| Rule {
                        verbs: one(verb),
                        groups: one(group),
                        resources: one(resource),
                        names: names.clone(),
                        urls: Vec::new(),
                    }));
                }
            }
            all.extend(self.urls.iter().map(|url| Rule {
                verbs: one(verb),
                urls: one(url),
                ..Rule::default()
            }));
        }
        all
    }

    /// As in the spec of a role; empty lists are left out.
    pub fn to_json(&self) -> Value {
        let mut rule = json!({ "verbs": self.verbs });
        for (field, list) in [
            ("apiGroups", &self.groups),
            ("resources", &self.resources),
            ("resourceNames", &self.names),
            ("nonResourceURLs", &self.urls),
        ] {
            if !list.is_empty() {
                rule[field] = json!(list);
            }
        }
        rule
    }
}

/// As error messages of Kubernetes show a rule: `{APIGroups:[""], Resources:["pods"], Verbs:["get"]}`.
impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [
            ("APIGroups", &self.groups),
            ("Resources", &self.resources),
            ("ResourceNames", &self.names),
            ("NonResourceURLs", &self.urls),
            ("Verbs", &self.verbs),
        ];
        let texts: Vec<String> = parts
            .iter()
            .filter(|(_, list)| !list.is_empty())
            .map(|(title, list)| {
                let quoted: Vec<String> = list.iter().map(|text| format!("{text:?}")).collect();
                format!("{title}:[{}]", quoted.join(" "))
            })
            .collect();
        write!(f, "{{{}}}", texts.join(", "))
    }
}

/// The permissions of `wanted` that `held` does not have, one by one.
pub fn missing(held: &[Rule], wanted: &[Rule]) -> Vec<Rule> {
    let singles = wanted.iter().flat_map(Rule::single);
    singles
        .filter(|single| !held.iter().any(|rule| rule.covers(single)))
        .collect()
}

fn has_or_all(list: &[String], text: &str) -> bool {
    list.iter().any(|item| item == "*" || item == text)
}

fn resource_matches(rule: &str, resource: &str, subresource: &str) -> bool {
    if rule == "*" {
        return true;
    }
    match rule.split_once('/') {
        None => subresource.is_empty() && rule == resource,
        Some((of, sub)) => {
            !subresource.is_empty() && sub == subresource && (of == "*" || of == resource)
        }
    }
}

fn url_covers(url: &str, path: &str) -> bool {
    url == path
        || url
            .strip_suffix('*')
            .is_some_and(|prefix| path.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        Rule::of(&serde_yaml::from_str(text).unwrap())
    }

    #[test]
    fn covering() {
        let cases = [
            (
                "{verbs: [get], apiGroups: [''], resources: [pods]}",
                "{verbs: [get], apiGroups: [''], resources: [pods]}",
                true,
            ),
            (
                "{verbs: [get], apiGroups: [''], resources: [pods]}",
                "{verbs: [get, list], apiGroups: [''], resources: [pods]}",
                false,
            ),
            (
                "{verbs: ['*'], apiGroups: ['*'], resources: ['*']}",
                "{verbs: ['*'], apiGroups: ['*'], resources: ['*']}",
                true,
            ),
            (
                "{verbs: [get], apiGroups: [''], resources: ['*/log']}",
                "{verbs: [get], apiGroups: [''], resources: [pods/log]}",
                true,
            ),
            (
                "{verbs: [get], apiGroups: [''], resources: [pods/log]}",
                "{verbs: [get], apiGroups: [''], resources: ['*/log']}",
                false,
            ),
            (
                "{verbs: [get], apiGroups: [''], resources: [pods], resourceNames: [a, b]}",
                "{verbs: [get], apiGroups: [''], resources: [pods], resourceNames: [b]}",
                true,
            ),
            (
                "{verbs: [get], apiGroups: [''], resources: [pods], resourceNames: [a]}",
                "{verbs: [get], apiGroups: [''], resources: [pods]}",
                false,
            ),
            (
                "{verbs: [get], nonResourceURLs: [/a/*]}",
                "{verbs: [get], nonResourceURLs: [/a/b]}",
                true,
            ),
            (
                "{verbs: [get], nonResourceURLs: [/a/*]}",
                "{verbs: [get], nonResourceURLs: ['*']}",
                false,
            ),
        ];
        for (held, wanted, covered) in cases {
            let rest = missing(&[rule(held)], &[rule(wanted)]);
            assert_eq!(rest.is_empty(), covered, "{held} and {wanted}: {rest:?}");
        }
    }

    #[test]
    fn shown_as_kubernetes_does() {
        let rule = rule(
            "{verbs: [get, list], apiGroups: [''], resources: [pods], resourceNames: [a], nonResourceURLs: []}",
        );
        assert_eq!(
            rule.to_string(),
            r#"{APIGroups:[""], Resources:["pods"], ResourceNames:["a"], Verbs:["get" "list"]}"#
        );
    }
}
