//! Rules for the kinds that say who may do what.

use crate::security::authorization_policy::{Action, Condition, Operation, Rule, Source};
use crate::security::request_authentication::JwtRule;
use crate::security::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication};

use super::destination_rule::duration;
use super::{Check, Validate, names};

impl Validate for AuthorizationPolicy {
    fn validate(&self, check: &mut Check) {
        names::attachment(
            self.selector.as_ref(),
            self.target_ref.as_ref(),
            &self.target_refs,
            check,
        );
        match self.action {
            Action::Custom => {
                check.require(!self.rules.is_empty(), "rules", "CUSTOM needs rules");
                let named = self
                    .provider
                    .as_ref()
                    .is_some_and(|provider| !provider.name.is_empty());
                check.require(
                    named,
                    "provider.name",
                    "CUSTOM needs the name of a provider of the mesh configuration",
                );
            }
            Action::Deny => check.require(
                !self.rules.is_empty(),
                "rules",
                "DENY without rules refuses nothing; write \"rules: [{}]\" to refuse everything",
            ),
            Action::Allow | Action::Audit => {}
        }
        if self.provider.is_some() && self.action != Action::Custom {
            check.error_at("provider", "a provider goes with action CUSTOM only");
        }
        check.require(self.rules.len() <= 512, "rules", "more than 512 rules");
        check.each("rules", &self.rules, |check, rule| {
            authorization_rule(rule, self.action, check);
        });
    }
}

fn authorization_rule(rule: &Rule, action: Action, check: &mut Check) {
    check.require(rule.from.len() <= 512, "from", "more than 512 sources");
    check.each("from", &rule.from, |check, from| match &from.source {
        Some(source) => check.at("source", |check| {
            authorization_source(source, action, check)
        }),
        None => check.error_at(
            "source",
            "empty; a source with at least one field is needed",
        ),
    });
    check.each("to", &rule.to, |check, to| match &to.operation {
        Some(operation) => check.at("operation", |check| {
            authorization_operation(operation, check)
        }),
        None => check.error_at(
            "operation",
            "empty; an operation with at least one field is needed",
        ),
    });
    check.each("when", &rule.when, |check, condition| {
        authorization_condition(condition, action, check)
    });
    if action == Action::Deny && says_http_only(rule) {
        check.warn("has nothing but what only HTTP requests have, so on TCP ports it refuses every connection; name the ports that are meant (to.operation.ports)");
    }
}

/// Istio's condition for its warning: a part of the rule is there, and in none of its entries is anything that connections have too.
fn says_http_only(rule: &Rule) -> bool {
    let from_tcp = rule.from.iter().filter_map(|from| from.source.as_ref());
    let from_tcp = from_tcp.into_iter().any(|source| {
        [
            &source.principals,
            &source.not_principals,
            &source.namespaces,
            &source.not_namespaces,
            &source.service_accounts,
            &source.not_service_accounts,
            &source.trust_domains,
            &source.not_trust_domains,
            &source.ip_blocks,
            &source.not_ip_blocks,
        ]
        .iter()
        .any(|list| !list.is_empty())
    });
    let to_tcp = rule.to.iter().filter_map(|to| to.operation.as_ref());
    let to_tcp = to_tcp
        .into_iter()
        .any(|operation| !(operation.ports.is_empty() && operation.not_ports.is_empty()));
    (!rule.from.is_empty() && rule.to.is_empty() && !from_tcp) || (!rule.to.is_empty() && !to_tcp)
}

fn authorization_condition(condition: &Condition, action: Action, check: &mut Check) {
    let key = condition.key.as_str();
    let message = format!(
        "unknown attribute {key:?}; one of {}, request.headers[NAME], request.auth.claims[NAME] and experimental.envoy.filters.NAME[KEY]",
        ATTRIBUTES.join(", ")
    );
    check.require(is_attribute(key), "key", &message);
    if let Some(name) = key
        .strip_prefix("request.headers[")
        .and_then(|rest| rest.strip_suffix(']'))
        && !names::is_matched_header(name)
    {
        check.error_at(
            "key",
            format!("{name:?} is not the name of a header: letters, digits and !#$%&'*+-.^_`|~"),
        );
    }
    if action == Action::Custom
        && (key.starts_with("request.auth.") || IDENTITY_ATTRIBUTES.contains(&key))
    {
        check.error_at("key", CUSTOM_IDENTITY);
    }
    if condition.values.is_empty() && condition.not_values.is_empty() {
        check.error_at("values", "values or notValues are needed");
    }
    for (field, list) in [
        ("values", &condition.values),
        ("notValues", &condition.not_values),
    ] {
        check.each(field, list, |check, value| {
            attribute_value(key, value, check)
        });
    }
}

/// Attributes without a name in brackets.
const ATTRIBUTES: &[&str] = &[
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "destination.ip",
    "destination.port",
    "connection.sni",
];
/// Those of them that name a workload's identity.
const IDENTITY_ATTRIBUTES: &[&str] = &[
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
];
const CUSTOM_IDENTITY: &str = "identities can't be named with CUSTOM, as in Istio: the service that decides is told who asks; use paths, hosts, ports, methods, headers or addresses";

/// What a value of an attribute has to look like.
fn attribute_value(key: &str, value: &str, check: &mut Check) {
    match key {
        _ if value.is_empty() => check.error("empty value"),
        "source.ip" | "remote.ip" | "destination.ip" => {
            if let Err(message) = names::cidr(value) {
                check.error(message);
            }
        }
        "destination.port" if value.parse::<u16>().is_err() => {
            check.error(format!("{value:?} is not a port from 0 to 65535"));
        }
        _ => {}
    }
}

fn authorization_source(source: &Source, action: Action, check: &mut Check) {
    let lists = [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
        ("trustDomains", &source.trust_domains),
        ("notTrustDomains", &source.not_trust_domains),
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ];
    no_empty_values(&lists, "a source", check);
    let accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
    let others = [
        &source.principals,
        &source.not_principals,
        &source.namespaces,
        &source.not_namespaces,
    ]
    .iter()
    .any(|list| !list.is_empty());
    if accounts && others {
        check.error_at(
            "serviceAccounts",
            "service accounts can't be mixed with principals or namespaces",
        );
    }
    for (field, list) in lists
        .iter()
        .filter(|(field, _)| field.to_ascii_lowercase().ends_with("ipblocks"))
    {
        check.each(field, list, |check, block| {
            if let Err(message) = names::cidr(block) {
                check.error(message);
            }
        });
    }
    if action == Action::Custom {
        let named = |field: &str| !field.to_ascii_lowercase().ends_with("ipblocks");
        for (field, _) in lists
            .iter()
            .filter(|(field, list)| named(field) && !list.is_empty())
        {
            check.error_at(field, CUSTOM_IDENTITY);
        }
    }
    service_accounts("serviceAccounts", &source.service_accounts, check);
    service_accounts("notServiceAccounts", &source.not_service_accounts, check);
}

fn service_accounts(field: &str, list: &[String], check: &mut Check) {
    check.require(list.len() <= 16, field, "more than 16 service accounts");
    check.each(field, list, |check, name| {
        if name.len() > 320 {
            check.error(format!(
                "{} characters; a service account has at most 320",
                name.len()
            ));
        } else if name.split('/').count() > 2 || name.starts_with('/') || name.ends_with('/') {
            check.error(format!(
                "{name:?} is not NAME or NAMESPACE/NAME of a service account"
            ));
        }
    });
}

fn authorization_operation(operation: &Operation, check: &mut Check) {
    let lists = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("ports", &operation.ports),
        ("notPorts", &operation.not_ports),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    no_empty_values(&lists, "an operation", check);
    for (field, list) in [
        ("ports", &operation.ports),
        ("notPorts", &operation.not_ports),
    ] {
        check.each(field, list, |check, port| {
            if port.parse::<u16>().is_err() {
                check.error(format!("{port:?} is not a port from 0 to 65535"));
            }
        });
    }
    for (field, list) in [
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ] {
        check.each(field, list, |check, path| {
            if let Err(message) = path_template(path) {
                check.error(message);
            }
        });
    }
}

/// Paths with `{*}` (one segment) and `{**}` (all that is left, so nothing variable follows) are templates; no other braces are allowed.
fn path_template(path: &str) -> Result<(), String> {
    let template = path.contains("{*}") || path.contains("{**}");
    let mut rest = false;
    for segment in path.trim_matches('/').split('/') {
        match segment {
            "{*}" | "{**}" if rest => {
                return Err(format!("{path:?}: nothing variable may follow {{**}}"));
            }
            "{*}" => {}
            "{**}" => rest = true,
            segment if segment.contains(['{', '}']) => {
                return Err(format!(
                    "{path:?}: braces are for templates, in which a segment is {{*}} or {{**}} as a whole"
                ));
            }
            segment if template && segment.contains('*') => {
                return Err(format!(
                    "{path:?}: beside {{*}} or {{**}} a path has no other wildcards"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

fn no_empty_values(lists: &[(&str, &Vec<String>)], what: &str, check: &mut Check) {
    if lists.iter().all(|(_, list)| list.is_empty()) {
        check.error(format!(
            "{what} without any field would match nothing that can be named; give at least one"
        ));
    }
    for (field, list) in lists {
        check.each(field, list, |check, value| {
            if value.is_empty() {
                check.error("empty value");
            }
        });
    }
}

fn is_attribute(key: &str) -> bool {
    let claim = |rest: &str| {
        let inner = rest
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        inner.is_some_and(|inner| inner.split("][").all(|name| !name.is_empty()))
    };
    let filter = |rest: &str| {
        rest.strip_suffix(']')
            .and_then(|rest| rest.split_once('['))
            .is_some_and(|(name, key)| !name.is_empty() && !key.is_empty())
    };
    ATTRIBUTES.contains(&key)
        || (key.starts_with("request.headers[") && key.ends_with(']'))
        || key.strip_prefix("request.auth.claims").is_some_and(claim)
        || key
            .strip_prefix("experimental.envoy.filters.")
            .is_some_and(filter)
}

impl Validate for PeerAuthentication {
    fn validate(&self, check: &mut Check) {
        check.part("selector", &self.selector);
        let selects = self
            .selector
            .as_ref()
            .is_some_and(|selector| !selector.match_labels.is_empty());
        if !self.port_level_mtls.is_empty() && !selects {
            check.error_at(
                "portLevelMtls",
                "settings of single ports need a selector with labels",
            );
        }
        for port in self.port_level_mtls.keys() {
            if port.parse::<u16>().ok().filter(|port| *port > 0).is_none() {
                check.error_at(
                    &format!("portLevelMtls[{port}]"),
                    "a port is a number from 1 to 65535",
                );
            }
        }
    }
}

impl Validate for RequestAuthentication {
    fn validate(&self, check: &mut Check) {
        names::attachment(
            self.selector.as_ref(),
            self.target_ref.as_ref(),
            &self.target_refs,
            check,
        );
        check.require(
            self.jwt_rules.len() <= 4096,
            "jwtRules",
            "more than 4096 rules",
        );
        check.parts("jwtRules", &self.jwt_rules);
    }
}

impl Validate for JwtRule {
    fn validate(&self, check: &mut Check) {
        check.require(
            !self.issuer.is_empty() || !self.jwks_uri.is_empty(),
            "issuer",
            "an issuer or a jwksUri is needed",
        );
        keys(self, check);
        not_empty("audiences", &self.audiences, check);
        check.each("fromHeaders", &self.from_headers, |check, header| {
            header_name("name", &header.name, check);
        });
        not_empty("fromParams", &self.from_params, check);
        not_empty("fromCookies", &self.from_cookies, check);
        not_empty("spaceDelimitedClaims", &self.space_delimited_claims, check);
        check.require(
            self.space_delimited_claims.len() <= 64,
            "spaceDelimitedClaims",
            "more than 64 claims",
        );
        if !self.output_payload_to_header.is_empty() {
            header_name(
                "outputPayloadToHeader",
                &self.output_payload_to_header,
                check,
            );
        }
        check.each(
            "outputClaimToHeaders",
            &self.output_claim_to_headers,
            |check, output| {
                header_name("header", &output.header, check);
                check.require(
                    !output.claim.is_empty(),
                    "claim",
                    "empty; write the name of a claim",
                );
            },
        );
        duration(self.timeout, "timeout", check);
    }
}

/// Where the keys of an issuer are.
fn keys(rule: &JwtRule, check: &mut Check) {
    if !rule.jwks_uri.is_empty() {
        let rest = ["https://", "http://"]
            .iter()
            .find_map(|scheme| rule.jwks_uri.strip_prefix(scheme));
        let authority = rest.map_or("", |rest| rest.split(['/', '?', '#']).next().unwrap_or(""));
        let port = match authority.rsplit_once(':') {
            Some((_, port)) if !port.ends_with(']') => port.parse::<u16>().is_ok(),
            _ => true,
        };
        check.require(
            !authority.is_empty() && port,
            "jwksUri",
            "an address that begins with https://HOST or http://HOST is needed",
        );
        check.require(
            rule.jwks_uri.len() <= 2048,
            "jwksUri",
            "more than 2048 characters",
        );
        check.require(
            rule.jwks.is_empty(),
            "jwks",
            "jwks and jwksUri exclude each other",
        );
    }
    if !rule.jwks.is_empty() {
        let keys = serde_json::from_str::<serde_json::Value>(&rule.jwks).ok();
        let list = keys
            .as_ref()
            .and_then(|keys| keys.get("keys"))
            .and_then(serde_json::Value::as_array);
        check.require(
            list.is_some(),
            "jwks",
            "not a JSON Web Key Set: an object with a list \"keys\" is needed",
        );
        if list.is_some_and(|list| list.iter().any(|key| key.get("d").is_some())) {
            check.warn_at(
                "jwks",
                "the key set contains a private key; everybody who can read this object has it",
            );
        }
    }
}

fn not_empty(field: &str, list: &[String], check: &mut Check) {
    check.each(field, list, |check, text| {
        if text.is_empty() {
            check.error("empty");
        }
    });
}

/// A header that tokens are taken from or claims are put into: no pseudo header.
fn header_name(field: &str, name: &str, check: &mut Check) {
    if name.starts_with(':') || !names::is_matched_header(name) {
        check.error_at(
            field,
            format!("{name:?} is not the name of a header: letters, digits and !#$%&'*+-.^_`|~"),
        );
    }
}
