//! One rule of an AuthorizationPolicy: sources, operations and conditions.

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::rbac::v3::permission::{self, Rule as PermissionRule};
use envoy_types::pb::envoy::config::rbac::v3::principal::{self, Authenticated, Identifier};
use envoy_types::pb::envoy::config::rbac::v3::{Permission, Policy, Principal};
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_types::pb::envoy::r#type::matcher::v3::path_matcher::Rule as PathRule;
use envoy_types::pb::envoy::r#type::matcher::v3::{MetadataMatcher, PathMatcher, StringMatcher};
use mesh_api::security::authorization_policy::{Condition, Operation, Rule, Source};
use mesh_model::Mesh;

use super::matcher::{
    self, claim, element, header, one_of, present, range, string, string_after, string_value,
    text_claim,
};
use super::principals;
use crate::pb::any;

/// For what rules are translated.
pub(super) struct Context<'a> {
    pub(super) mesh: &'a Mesh,
    /// Namespace of the policy.
    pub(super) namespace: &'a str,
    /// For connections without requests: what only requests have can't be asked.
    pub(super) tcp: bool,
    /// A part that can't be asked makes the rule match nothing (ALLOW); else it is left out, so that the rule matches more (DENY).
    pub(super) strict: bool,
}

/// A rule with a part that can't be asked where it must be.
struct Unfit;

/// Conditions in the making: `values` of which one has to hold, `not_values` of which none may.
struct Part<'a, T> {
    values: &'a [String],
    not_values: &'a [String],
    /// What a value means; nothing if it can't be asked here.
    of: &'a dyn Fn(&str) -> Option<T>,
}

/// The rule; `None` where it can match nothing.
pub(super) fn policy(rule: &Rule, context: &Context<'_>) -> Option<Policy> {
    context.policy(rule).ok()
}

impl Context<'_> {
    fn policy(&self, rule: &Rule) -> Result<Policy, Unfit> {
        let mut permissions = Vec::new();
        let mut principals = Vec::new();
        let none = Operation::default();
        let anyone = Source::default();
        for to in operations(rule, &none) {
            let mut all = Vec::new();
            self.operation(to, &mut all)?;
            for condition in &rule.when {
                self.permission(condition, &mut all)?;
            }
            permissions.push(all_permissions(all));
        }
        for from in sources(rule, &anyone) {
            let mut all = Vec::new();
            self.source(from, &mut all)?;
            for condition in &rule.when {
                self.principal(condition, &mut all)?;
            }
            principals.push(all_principals(all));
        }
        Ok(Policy {
            permissions,
            principals,
            ..Policy::default()
        })
    }

    fn operation(&self, to: &Operation, all: &mut Vec<Permission>) -> Result<(), Unfit> {
        let host =
            |value: &str| self.request(PermissionRule::Header(header(":authority", value, true)));
        let method =
            |value: &str| self.request(PermissionRule::Header(header(":method", value, false)));
        let path = |value: &str| self.request(path(value)?);
        self.permissions(&to.hosts, &to.not_hosts, &host, all)?;
        self.permissions(&to.methods, &to.not_methods, &method, all)?;
        self.permissions(&to.paths, &to.not_paths, &path, all)?;
        self.permissions(&to.ports, &to.not_ports, &port, all)
    }

    fn source(&self, from: &Source, all: &mut Vec<Principal>) -> Result<(), Unfit> {
        let mesh = self.mesh;
        let named = principals::with_aliases(mesh, &from.principals);
        let not_named = principals::with_aliases(mesh, &from.not_principals);
        self.principals(&named, &not_named, &identity, all)?;
        let token = |value: &str| self.of_request(token_identity(value));
        self.principals(
            &from.request_principals,
            &from.not_request_principals,
            &token,
            all,
        )?;
        let account = |value: &str| Some(peer(principals::service_account(self.namespace, value)));
        self.principals(
            &from.service_accounts,
            &from.not_service_accounts,
            &account,
            all,
        )?;
        let domains = principals::domains_with_aliases(mesh, &from.trust_domains);
        let not_domains = principals::domains_with_aliases(mesh, &from.not_trust_domains);
        self.principals(&domains, &not_domains, &trust_domain, all)?;
        self.principals(&from.namespaces, &from.not_namespaces, &namespace, all)?;
        self.principals(
            &from.remote_ip_blocks,
            &from.not_remote_ip_blocks,
            &remote,
            all,
        )?;
        self.principals(&from.ip_blocks, &from.not_ip_blocks, &direct, all)
    }

    /// A condition that is about what is done.
    fn permission(&self, condition: &Condition, all: &mut Vec<Permission>) -> Result<(), Unfit> {
        let Condition {
            key,
            values,
            not_values,
        } = condition;
        match key.as_str() {
            "destination.ip" => {
                let of =
                    |value: &str| Some(permission(PermissionRule::DestinationIp(range(value)?)));
                self.permissions(values, not_values, &of, all)
            }
            "destination.port" => self.permissions(values, not_values, &port, all),
            "connection.sni" => {
                let of = |value: &str| {
                    Some(permission(PermissionRule::RequestedServerName(string(
                        value,
                    ))))
                };
                self.permissions(values, not_values, &of, all)
            }
            key if key.starts_with("experimental.envoy.filters.") => {
                let of = |value: &str| filter_metadata(key, value);
                self.permissions(values, not_values, &of, all)
            }
            _ => Ok(()),
        }
    }

    /// A condition that is about who does it.
    fn principal(&self, condition: &Condition, all: &mut Vec<Principal>) -> Result<(), Unfit> {
        let Condition {
            key,
            values,
            not_values,
        } = condition;
        match key.as_str() {
            "source.ip" => self.principals(values, not_values, &direct, all),
            "remote.ip" => self.principals(values, not_values, &remote, all),
            "source.namespace" => self.principals(values, not_values, &namespace, all),
            "source.principal" => {
                let values = principals::with_aliases(self.mesh, values);
                let not_values = principals::with_aliases(self.mesh, not_values);
                self.principals(&values, &not_values, &identity, all)
            }
            "source.serviceAccount" => {
                let of =
                    |value: &str| Some(peer(principals::service_account(self.namespace, value)));
                self.principals(values, not_values, &of, all)
            }
            "source.trustDomain" => {
                let values = principals::domains_with_aliases(self.mesh, values);
                let not_values = principals::domains_with_aliases(self.mesh, not_values);
                self.principals(&values, &not_values, &trust_domain, all)
            }
            "request.auth.principal" => {
                let of = |value: &str| self.of_request(token_identity(value));
                self.principals(values, not_values, &of, all)
            }
            "request.auth.audiences" => self.claim(&["aud"], condition, all),
            "request.auth.presenter" => self.claim(&["azp"], condition, all),
            _ => self.keyed(condition, all),
        }
    }

    /// Conditions with a name in brackets.
    fn keyed(&self, condition: &Condition, all: &mut Vec<Principal>) -> Result<(), Unfit> {
        let key = condition.key.as_str();
        if let Some(name) = key
            .strip_prefix("request.headers[")
            .and_then(|rest| rest.strip_suffix(']'))
        {
            // The proxy would refuse the whole listener for it.
            if !mesh_api::validate::is_matched_header(name) {
                return self.unfit();
            }
            let of = |value: &str| self.of_request(Identifier::Header(header(name, value, false)));
            return self.principals(&condition.values, &condition.not_values, &of, all);
        }
        if let Some(names) = key.strip_prefix("request.auth.claims").and_then(brackets) {
            return self.claim(&names, condition, all);
        }
        match key {
            "destination.ip" | "destination.port" | "connection.sni" => Ok(()),
            key if key.starts_with("experimental.envoy.filters.") => Ok(()),
            // Validation refuses unknown attributes; should one come through, it is one that can't be asked.
            _ => self.unfit(),
        }
    }

    fn claim(
        &self,
        names: &[&str],
        condition: &Condition,
        all: &mut Vec<Principal>,
    ) -> Result<(), Unfit> {
        if self.tcp {
            return self.unfit();
        }
        let made = |values: &[String]| {
            let matchers = values.iter().map(|value| string(value)).collect();
            said(claim(names, matchers))
        };
        if !condition.values.is_empty() {
            all.push(made(&condition.values));
        }
        if !condition.not_values.is_empty() {
            all.push(principal(Identifier::NotId(Box::new(made(
                &condition.not_values,
            )))));
        }
        Ok(())
    }

    fn unfit(&self) -> Result<(), Unfit> {
        if self.strict { Err(Unfit) } else { Ok(()) }
    }

    fn request(&self, rule: PermissionRule) -> Option<Permission> {
        (!self.tcp).then(|| permission(rule))
    }

    fn of_request(&self, identifier: Identifier) -> Option<Principal> {
        (!self.tcp).then(|| principal(identifier))
    }

    fn permissions(
        &self,
        values: &[String],
        not_values: &[String],
        of: &dyn Fn(&str) -> Option<Permission>,
        all: &mut Vec<Permission>,
    ) -> Result<(), Unfit> {
        let part = Part {
            values,
            not_values,
            of,
        };
        let (some, none) = part.collect(self.strict)?;
        let any = |rules| permission(PermissionRule::OrRules(permission::Set { rules }));
        all.extend(some.map(any));
        all.extend(none.map(|rules| permission(PermissionRule::NotRule(Box::new(any(rules))))));
        Ok(())
    }

    fn principals(
        &self,
        values: &[String],
        not_values: &[String],
        of: &dyn Fn(&str) -> Option<Principal>,
        all: &mut Vec<Principal>,
    ) -> Result<(), Unfit> {
        let part = Part {
            values,
            not_values,
            of,
        };
        let (some, none) = part.collect(self.strict)?;
        let any = |ids| principal(Identifier::OrIds(principal::Set { ids }));
        all.extend(some.map(any));
        all.extend(none.map(|ids| principal(Identifier::NotId(Box::new(any(ids))))));
        Ok(())
    }
}

/// Those of which one has to hold, and those of which none may.
type Sides<T> = (Option<Vec<T>>, Option<Vec<T>>);

impl<T> Part<'_, T> {
    fn collect(&self, strict: bool) -> Result<Sides<T>, Unfit> {
        // What is made of the values, and whether of all of them.
        let made = |values: &[String]| {
            let made: Vec<T> = values.iter().filter_map(|value| (self.of)(value)).collect();
            let whole = made.len() == values.len();
            (made, whole)
        };
        let (some, all_of_some) = made(self.values);
        let (none, all_of_none) = made(self.not_values);
        if strict && !(all_of_some && all_of_none) {
            return Err(Unfit);
        }
        // With fewer values it would match less, so the list goes as a whole; with fewer exceptions it matches more.
        Ok((
            (all_of_some && !some.is_empty()).then_some(some),
            (!none.is_empty()).then_some(none),
        ))
    }
}

fn operations<'a>(rule: &'a Rule, none: &'a Operation) -> Vec<&'a Operation> {
    if rule.to.is_empty() {
        return vec![none];
    }
    let of = |to: &'a mesh_api::security::authorization_policy::To| {
        to.operation.as_ref().unwrap_or(none)
    };
    rule.to.iter().map(of).collect()
}

fn sources<'a>(rule: &'a Rule, anyone: &'a Source) -> Vec<&'a Source> {
    if rule.from.is_empty() {
        return vec![anyone];
    }
    let of = |from: &'a mesh_api::security::authorization_policy::From| {
        from.source.as_ref().unwrap_or(anyone)
    };
    rule.from.iter().map(of).collect()
}

fn permission(rule: PermissionRule) -> Permission {
    Permission { rule: Some(rule) }
}

fn principal(identifier: Identifier) -> Principal {
    Principal {
        identifier: Some(identifier),
    }
}

fn all_permissions(mut rules: Vec<Permission>) -> Permission {
    if rules.is_empty() {
        rules.push(permission(PermissionRule::Any(true)));
    }
    permission(PermissionRule::AndRules(permission::Set { rules }))
}

fn all_principals(mut ids: Vec<Principal>) -> Principal {
    if ids.is_empty() {
        ids.push(principal(Identifier::Any(true)));
    }
    principal(Identifier::AndIds(principal::Set { ids }))
}

/// A path, or a template: `{*}` is one segment, `{**}` all that follow.
fn path(value: &str) -> Option<PermissionRule> {
    if value.contains("{*}") || value.contains("{**}") {
        let template = UriTemplateMatchConfig {
            path_template: template(value)?,
        };
        return Some(PermissionRule::UriTemplate(TypedExtensionConfig {
            name: "uri-template".to_owned(),
            typed_config: Some(any(&template)),
        }));
    }
    Some(PermissionRule::UrlPath(PathMatcher {
        rule: Some(PathRule::Path(string(value))),
    }))
}

/// Envoy's form of a template; `None` for one that it would refuse, and the whole listener with it.
fn template(value: &str) -> Option<String> {
    let segments: Vec<&str> = value.strip_prefix('/')?.split('/').collect();
    let literal = |segment: &str| {
        let fits =
            |letter: char| letter.is_ascii_alphanumeric() || "-._~%!$&'+,;:@".contains(letter);
        !segment.is_empty() && segment.chars().all(fits)
    };
    let last = segments.len() - 1;
    let valid = segments
        .iter()
        .enumerate()
        .all(|(index, segment)| match *segment {
            "{*}" => true,
            "{**}" => index == last,
            segment => literal(segment),
        });
    valid.then(|| value.replace("{**}", "**").replace("{*}", "*"))
}

fn port(value: &str) -> Option<Permission> {
    let number: u16 = value.parse().ok()?;
    Some(permission(PermissionRule::DestinationPort(u32::from(
        number,
    ))))
}

fn peer(matcher: StringMatcher) -> Principal {
    principal(Identifier::Authenticated(Authenticated {
        principal_name: Some(matcher),
    }))
}

fn identity(value: &str) -> Option<Principal> {
    Some(peer(string_after("spiffe://", value)))
}

fn namespace(value: &str) -> Option<Principal> {
    Some(peer(principals::in_namespace(value)))
}

fn trust_domain(value: &str) -> Option<Principal> {
    Some(peer(principals::in_trust_domain(value)))
}

fn direct(value: &str) -> Option<Principal> {
    Some(principal(Identifier::DirectRemoteIp(range(value)?)))
}

fn remote(value: &str) -> Option<Principal> {
    Some(principal(Identifier::RemoteIp(range(value)?)))
}

/// `ISSUER/SUBJECT`, where the last slash divides, with `*` at one end.
fn token_identity(value: &str) -> Identifier {
    let (issuer, subject) = match value.rsplit_once('/') {
        _ if value == "*" => (present(), present()),
        Some((issuer, subject)) => (string(issuer), string(subject)),
        None => match (value.strip_prefix('*'), value.strip_suffix('*')) {
            (Some(_), _) => (present(), string(value)),
            (None, Some(_)) => (string(value), present()),
            (None, None) => (string(value), matcher::with_exact("")),
        },
    };
    let both = vec![
        said(text_claim("iss", issuer)),
        said(text_claim("sub", subject)),
    ];
    Identifier::AndIds(principal::Set { ids: both })
}

/// `[a][b]` to a and b.
fn brackets(text: &str) -> Option<Vec<&str>> {
    let inner = text.strip_prefix('[')?.strip_suffix(']')?;
    let names: Vec<&str> = inner.split("][").collect();
    names.iter().all(|name| !name.is_empty()).then_some(names)
}

/// What the filters before know of the request.
#[expect(
    deprecated,
    reason = "Istio sends this field, and older Envoys know nothing else"
)]
fn said(matcher: MetadataMatcher) -> Principal {
    principal(Identifier::Metadata(matcher))
}

/// `experimental.envoy.filters.a.b[key]`: metadata of a filter; a value in brackets is one of a list.
#[expect(
    deprecated,
    reason = "Istio sends this field, and older Envoys know nothing else"
)]
fn filter_metadata(key: &str, value: &str) -> Option<Permission> {
    let (filter, rest) = key.strip_prefix("experimental.")?.split_once('[')?;
    let name = rest.strip_suffix(']').filter(|name| !name.is_empty())?;
    let in_list = value
        .strip_prefix('[')
        .and_then(|inner| inner.strip_suffix(']'));
    let value = match in_list {
        Some(inner) => element(string_value(string(inner))),
        None => one_of(vec![string_value(string(value))]),
    };
    Some(permission(PermissionRule::Metadata(matcher::metadata(
        filter,
        &[name],
        value,
    ))))
}

#[cfg(test)]
mod tests {
    use mesh_model::Objects;
    use serde_json::{Value, json};

    use super::*;

    /// What a rule becomes: strictly as in ALLOW, or as in DENY.
    fn made(rule: &Value, strict: bool) -> Option<Policy> {
        let object = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": { "name": "a", "namespace": "default" }, "spec": { "rules": [rule] },
        });
        let Ok(mesh_api::AnyObject::AuthorizationPolicy(object)) = mesh_api::parse(&object) else {
            panic!("not a policy: {object}");
        };
        let context = Context {
            mesh: &Mesh::build(&Objects::default()),
            namespace: "default",
            tcp: false,
            strict,
        };
        policy(&object.spec.rules[0], &context)
    }

    #[test]
    fn a_header_that_can_not_be_allows_nothing_and_denies_more() {
        let when = |name: &str| {
            let header = json!({ "key": format!("request.headers[{name}]"), "values": ["a"] });
            json!({ "when": [header, { "key": "source.ip", "values": ["10.0.0.1"] }] })
        };
        let rest = json!({ "when": [{ "key": "source.ip", "values": ["10.0.0.1"] }] });
        for name in ["foo bar", ":foo", "é", ""] {
            assert_eq!(made(&when(name), true), None, "{name}");
            assert_eq!(made(&when(name), false), made(&rest, false), "{name}");
        }
        for strict in [true, false] {
            let found = made(&when("x-user"), strict);
            assert!(found.is_some() && found != made(&rest, strict));
        }
    }
    #[test]
    fn a_value_that_can_not_be_asked_makes_the_whole_list_deny_more() {
        let of = |field: &str, values: &[&str]| {
            let blocks = json!({ "namespaces": ["a"], field: values });
            json!({ "from": [{ "source": blocks }] })
        };
        let without = json!({ "from": [{ "source": { "namespaces": ["a"] } }] });
        let mixed = of("ipBlocks", &["10.0.0.1", "10.0.0.0/99"]);
        assert_eq!(made(&mixed, false), made(&without, false));
        assert_eq!(made(&mixed, true), None);
        let ports = |ports: &[&str]| json!({ "to": [{ "operation": { "methods": ["GET"], "ports": ports } }] });
        let without = json!({ "to": [{ "operation": { "methods": ["GET"] } }] });
        assert_eq!(made(&ports(&["80", "http"]), false), made(&without, false));
        assert_ne!(made(&ports(&["80", "81"]), false), made(&without, false));
        // Of exceptions those that can be asked stay.
        let excepted = of("notIpBlocks", &["10.0.0.1", "10.0.0.0/99"]);
        let one = of("notIpBlocks", &["10.0.0.1"]);
        assert_eq!(made(&excepted, false), made(&one, false));
        assert_eq!(made(&excepted, true), None);
    }
}
