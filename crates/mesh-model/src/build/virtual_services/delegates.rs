//! Delegates: VirtualServices without hosts, whose rules stand in for rules of others.

use std::collections::BTreeMap;

use mesh_api::networking::virtual_service::{Delegate, HttpMatchRequest, HttpRoute};
use mesh_api::{AnyObject, StringMatch};

use super::destinations::Context;
use super::http::{self, Rule};
use super::size;
use crate::problem::Reporter;
use crate::{Mesh, ObjectKey, Objects, Problem, Severity, Visibility};

/// All delegates, by namespace and name.
pub(super) struct Delegates {
    by_name: BTreeMap<(String, String), Entry>,
}

struct Entry {
    key: ObjectKey,
    visibility: Visibility,
    rules: Vec<Rule>,
    used: bool,
}

impl Delegates {
    /// Reads the VirtualServices without hosts; what is wrong with one of them is reported on it, once.
    pub(super) fn read(objects: &Objects, mesh: &Mesh, problems: &mut Vec<Problem>) -> Self {
        let mut by_name = BTreeMap::new();
        for (key, object) in &objects.istio {
            let AnyObject::VirtualService(object) = object.as_ref() else {
                continue;
            };
            let spec = &object.spec;
            if !spec.hosts.is_empty() {
                continue;
            }
            let mut report = Reporter::new(key, problems);
            for (field, given) in [
                ("spec.gateways", !spec.gateways.is_empty()),
                ("spec.tls", !spec.tls.is_empty()),
                ("spec.tcp", !spec.tcp.is_empty()),
            ] {
                if given {
                    let message = "a VirtualService without hosts is a delegate, which has http rules only; this has no effect";
                    report.report(Severity::Error, Some("IST0106"), field, message);
                }
            }
            let context = Context {
                namespace: &key.namespace,
                mesh,
                delegate: true,
            };
            let entry = Entry {
                key: key.clone(),
                visibility: super::visibility(spec, key, mesh),
                rules: http::rules(&spec.http, &context, &mut report),
                used: false,
            };
            by_name.insert((key.namespace.clone(), key.name.clone()), entry);
        }
        Self { by_name }
    }

    /// Replaces the rules of a VirtualService that delegate by what their delegates say.
    pub(super) fn expand(
        &mut self,
        rules: Vec<Rule>,
        namespace: &str,
        report: &mut Reporter<'_>,
    ) -> Vec<HttpRoute> {
        let mut expanded = Vec::new();
        let mut left = size::MOST;
        for mut rule in rules {
            match rule.route.delegate.take() {
                None => expanded.push(rule.route),
                Some(delegate) => {
                    let replaced = self.replace(&rule, &delegate, namespace, left, report);
                    left -= replaced.iter().map(size::of_rule).sum::<usize>().min(left);
                    expanded.extend(replaced);
                }
            }
        }
        expanded
    }

    fn replace(
        &mut self,
        root: &Rule,
        delegate: &Delegate,
        own: &str,
        left: usize,
        report: &mut Reporter<'_>,
    ) -> Vec<HttpRoute> {
        let namespace = match delegate.namespace.as_str() {
            "" => own,
            other => other,
        };
        let field = format!("{}.delegate", root.field);
        let name = (namespace.to_owned(), delegate.name.clone());
        let Some(entry) = self.by_name.get_mut(&name) else {
            let message = format!(
                "there is no VirtualService {namespace}/{} without hosts; this rule has no effect",
                delegate.name
            );
            report.not_found(field, message);
            return Vec::new();
        };
        entry.used = true;
        if !entry.visibility.includes(own) {
            let message = format!(
                "{} is not exported to namespace {own}; this rule has no effect. Add it to the delegate's exportTo",
                entry.key
            );
            report.report(Severity::Error, Some("IST0101"), field, message);
            return Vec::new();
        }
        let conditions = root.route.matches.len().max(1);
        let product = entry.rules.iter().fold(0_usize, |sum, rule| {
            sum.saturating_add(conditions.saturating_mul(size::of_rule(&rule.route)))
        });
        if product > left {
            let message = format!(
                "with the rules of {} this object comes to more than {} destinations, counted for each condition; this rule has no effect",
                entry.key,
                size::MOST
            );
            report.report(Severity::Error, Some("IST0106"), field, message);
            return Vec::new();
        }
        let mut merged = Vec::new();
        for rule in &entry.rules {
            match merge(&root.route, &rule.route) {
                Some(route) => merged.push(route),
                None => {
                    let message = format!(
                        "the conditions of {} of {} contradict those of this rule; the delegate's rule has no effect here",
                        rule.field, entry.key
                    );
                    report.report(Severity::Error, Some("IST0106"), field.clone(), message);
                }
            }
        }
        merged
    }

    /// A delegate that nobody refers to does nothing.
    pub(super) fn report_unused(&self, problems: &mut Vec<Problem>) {
        for entry in self.by_name.values().filter(|entry| !entry.used) {
            let message = "no VirtualService delegates to this one, so it has no effect; write hosts, or refer to it in http[].delegate of another";
            Reporter::new(&entry.key, problems).report(
                Severity::Warning,
                None,
                "spec.hosts",
                message,
            );
        }
    }
}

/// The delegate's rule under the conditions of the root's; nothing if they contradict. What the delegate says wins over what the root says.
fn merge(root: &HttpRoute, delegate: &HttpRoute) -> Option<HttpRoute> {
    let mut merged = delegate.clone();
    merged.matches = merge_conditions(&root.matches, &delegate.matches)?;
    merged.name = joined(&root.name, &delegate.name);
    let HttpRoute {
        rewrite,
        timeout,
        retries,
        fault,
        cors_policy,
        headers,
        ..
    } = root.clone();
    merged.rewrite = merged.rewrite.or(rewrite);
    merged.timeout = merged.timeout.or(timeout);
    merged.retries = merged.retries.or(retries);
    merged.fault = merged.fault.or(fault);
    merged.cors_policy = merged.cors_policy.or(cors_policy);
    merged.headers = merged.headers.or(headers);
    merged.mirror_percentage = merged
        .mirror_percentage
        .or_else(|| root.mirror_percentage.clone());
    merged.mirror_percent = merged.mirror_percent.or(root.mirror_percent);
    merged.mirror = merged.mirror.or_else(|| root.mirror.clone());
    if merged.mirrors.is_empty() {
        merged.mirrors.clone_from(&root.mirrors);
    }
    Some(merged)
}

fn joined(root: &str, delegate: &str) -> String {
    match (root, delegate) {
        (root, "") => root.to_owned(),
        ("", delegate) => delegate.to_owned(),
        (root, delegate) => format!("{root}-{delegate}"),
    }
}

/// Every condition of the delegate with every one of the root that it does not contradict. Each of the delegate's has to find one: else the rule
/// would match less than it says, and Istio leaves it out.
fn merge_conditions(
    root: &[HttpMatchRequest],
    delegate: &[HttpMatchRequest],
) -> Option<Vec<HttpMatchRequest>> {
    if root.is_empty() {
        return Some(delegate.to_vec());
    }
    if delegate.is_empty() {
        return Some(root.to_vec());
    }
    let mut merged = Vec::new();
    for inner in delegate {
        let before = merged.len();
        merged.extend(
            root.iter()
                .filter(|outer| !contradict(outer, inner))
                .map(|outer| merge_condition(outer, inner)),
        );
        if merged.len() == before {
            return None;
        }
    }
    Some(merged)
}

fn merge_condition(root: &HttpMatchRequest, delegate: &HttpMatchRequest) -> HttpMatchRequest {
    let text = |inner: &String, outer: &String| {
        if inner.is_empty() {
            outer.clone()
        } else {
            inner.clone()
        }
    };
    let both = |outer: &BTreeMap<String, StringMatch>, inner: &BTreeMap<String, StringMatch>| {
        let mut both = outer.clone();
        both.extend(inner.clone());
        both
    };
    let mut source_labels = root.source_labels.clone();
    source_labels.extend(delegate.source_labels.clone());
    HttpMatchRequest {
        name: joined(&root.name, &delegate.name),
        uri: delegate.uri.clone().or_else(|| root.uri.clone()),
        scheme: delegate.scheme.clone().or_else(|| root.scheme.clone()),
        method: delegate.method.clone().or_else(|| root.method.clone()),
        authority: delegate
            .authority
            .clone()
            .or_else(|| root.authority.clone()),
        headers: both(&root.headers, &delegate.headers),
        without_headers: both(&root.without_headers, &delegate.without_headers),
        query_params: both(&root.query_params, &delegate.query_params),
        ignore_uri_case: delegate.ignore_uri_case,
        port: if delegate.port == 0 {
            root.port
        } else {
            delegate.port
        },
        source_labels,
        source_namespace: text(&delegate.source_namespace, &root.source_namespace),
        gateways: if delegate.gateways.is_empty() {
            root.gateways.clone()
        } else {
            delegate.gateways.clone()
        },
        stat_prefix: text(&delegate.stat_prefix, &root.stat_prefix),
    }
}

/// True if no request that the delegate's condition means is one that the root's means, as far as Istio looks.
fn contradict(root: &HttpMatchRequest, delegate: &HttpMatchRequest) -> bool {
    let single = [
        (&root.uri, &delegate.uri),
        (&root.scheme, &delegate.scheme),
        (&root.method, &delegate.method),
        (&root.authority, &delegate.authority),
    ];
    let maps = [
        (&root.headers, &delegate.headers),
        (&root.without_headers, &delegate.without_headers),
        (&root.query_params, &delegate.query_params),
    ];
    let mut both = maps.into_iter().flat_map(|(outer, inner)| {
        inner
            .iter()
            .filter_map(|(name, inner)| Some((outer.get(name)?, inner)))
    });
    let texts = single
        .into_iter()
        .filter_map(|(outer, inner)| Some((outer.as_ref()?, inner.as_ref()?)))
        .any(|(outer, inner)| values_contradict(outer, inner))
        || both.any(|(outer, inner)| values_contradict(outer, inner));
    let ports = root.port != 0 && delegate.port != 0 && root.port != delegate.port;
    let namespaces = !root.source_namespace.is_empty()
        && !delegate.source_namespace.is_empty()
        && root.source_namespace != delegate.source_namespace;
    let labels = delegate.source_labels.iter().any(|(key, value)| {
        root.source_labels
            .get(key)
            .is_some_and(|outer| outer != value)
    });
    let gateways = !root.gateways.is_empty()
        && delegate
            .gateways
            .iter()
            .any(|gateway| !root.gateways.contains(gateway));
    texts
        || ports
        || namespaces
        || labels
        || gateways
        || root.ignore_uri_case != delegate.ignore_uri_case
}

/// The delegate's value has to be the root's, or a longer one where the root asks for a prefix; patterns can't be compared.
fn values_contradict(root: &StringMatch, delegate: &StringMatch) -> bool {
    match (root, delegate) {
        (StringMatch::Exact(root), StringMatch::Exact(delegate)) => root != delegate,
        (
            StringMatch::Prefix(root),
            StringMatch::Prefix(delegate) | StringMatch::Exact(delegate),
        ) => !delegate.starts_with(root.as_str()),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exact(text: &str) -> StringMatch {
        StringMatch::Exact(text.to_owned())
    }

    fn prefix(text: &str) -> StringMatch {
        StringMatch::Prefix(text.to_owned())
    }

    fn uri(value: StringMatch) -> HttpMatchRequest {
        HttpMatchRequest {
            uri: Some(value),
            ..HttpMatchRequest::default()
        }
    }

    #[test]
    fn values_contradict_unless_the_delegates_is_narrower() {
        let regex = || StringMatch::Regex(".*".to_owned());
        for (root, delegate, expected) in [
            (exact("/a"), exact("/a"), false),
            (exact("/a"), exact("/b"), true),
            (exact("/a"), prefix("/a"), true),
            (prefix("/a"), prefix("/a/b"), false),
            (prefix("/a/b"), prefix("/a"), true),
            (prefix("/a"), exact("/ab"), false),
            (regex(), regex(), true),
            (regex(), exact("/a"), true),
            (StringMatch::Present, exact("x"), true),
        ] {
            assert_eq!(
                values_contradict(&root, &delegate),
                expected,
                "{root:?} {delegate:?}"
            );
        }
    }

    #[test]
    fn conditions_multiply_and_one_without_a_partner_drops_the_rule() {
        let root = [uri(prefix("/a")), uri(prefix("/b"))];
        let merged =
            merge_conditions(&root, &[uri(prefix("/a/x")), HttpMatchRequest::default()]).unwrap();
        let uris: Vec<_> = merged.into_iter().filter_map(|entry| entry.uri).collect();
        assert_eq!(uris, [prefix("/a/x"), prefix("/a"), prefix("/b")]);
        assert_eq!(
            merge_conditions(&root, &[uri(prefix("/a/x")), uri(prefix("/c"))]),
            None
        );
    }

    #[test]
    fn what_the_delegate_says_wins_and_names_are_joined() {
        let root = HttpRoute {
            name: "root".to_owned(),
            timeout: Some(mesh_api::Duration::from_secs(1)),
            mirror_percent: Some(10),
            ..HttpRoute::default()
        };
        let delegate = HttpRoute {
            name: "leaf".to_owned(),
            timeout: Some(mesh_api::Duration::from_secs(2)),
            ..HttpRoute::default()
        };
        let merged = merge(&root, &delegate).unwrap();
        assert_eq!(merged.name, "root-leaf");
        assert_eq!(merged.timeout, delegate.timeout);
        assert_eq!(merged.mirror_percent, Some(10));
        assert_eq!(joined("", "leaf"), "leaf");
        assert_eq!(joined("root", ""), "root");
    }

    #[test]
    fn clients_have_to_agree() {
        let of = |namespace: &str, label: &str, gateways: &[&str]| HttpMatchRequest {
            source_namespace: namespace.to_owned(),
            source_labels: [("app".to_owned(), label.to_owned())].into(),
            gateways: gateways.iter().map(|&name| name.to_owned()).collect(),
            ..HttpMatchRequest::default()
        };
        let root = of("a", "x", &["mesh", "a/g"]);
        assert!(!contradict(&root, &of("a", "x", &["mesh"])));
        assert!(!contradict(&root, &of("", "x", &[])));
        assert!(contradict(&root, &of("b", "x", &["mesh"])));
        assert!(contradict(&root, &of("a", "y", &["mesh"])));
        assert!(contradict(&root, &of("a", "x", &["a/other"])));
    }
}
