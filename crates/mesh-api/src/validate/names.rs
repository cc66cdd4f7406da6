//! Forms of names: hosts, labels, namespaces, addresses.

use std::net::IpAddr;

use crate::object::AnyObject;
use crate::{LabelSelector, PolicyTargetReference, WorkloadSelector};

use super::{Check, Validate};

/// Checks the metadata of any Istio object.
pub(crate) fn metadata(object: &AnyObject, check: &mut Check) {
    let meta = object.meta();
    check.at("metadata", |check| {
        if !meta.name.is_empty() && !is_dns_subdomain(&meta.name) {
            check.error_at(
                "name",
                format!(
                    "{:?} is not a DNS name: lower-case letters, digits, '-' and '.'",
                    meta.name
                ),
            );
        }
        for key in meta
            .annotations
            .keys()
            .filter(|key| key.starts_with("internal.istio.io/"))
        {
            check.error_at(
                &format!("annotations[{key}]"),
                "internal annotations belong to generated objects",
            );
        }
        if let Some(value) = meta.annotations.get("istio.io/dry-run") {
            dry_run(object, value, check);
        }
    });
}

fn dry_run(object: &AnyObject, value: &str, check: &mut Check) {
    use crate::security::authorization_policy::Action;
    let field = "annotations[istio.io/dry-run]";
    match object {
        AnyObject::AuthorizationPolicy(policy)
            if matches!(policy.spec.action, Action::Allow | Action::Deny) =>
        {
            check.require(
                parse_bool(value).is_some(),
                field,
                "not a boolean; write \"true\" or \"false\"",
            );
        }
        _ => check.error_at(
            field,
            "only an AuthorizationPolicy with action ALLOW or DENY can be tried without effect",
        ),
    }
}

/// Reads a boolean as Go's strconv.ParseBool does.
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// A DNS label: at most 63 lower-case letters, digits and hyphens, no hyphen at the ends (RFC 1123).
pub(crate) fn is_dns_label(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 63
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Labels joined by dots, 253 characters at most.
pub(crate) fn is_dns_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_dns_label)
}

/// A host name as Istio takes it: labels may have upper case and `_`, 255 characters at most, a final dot is allowed.
pub(crate) fn is_fqdn(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    !text.is_empty() && text.len() <= 255 && text.split('.').all(label)
}

/// Checks a host: a name, `*`, or `*.` and a name.
pub(crate) fn wildcard_host(host: &str) -> Result<(), String> {
    let name = match host {
        "" => return Err("empty; write a host name".to_owned()),
        "*" => return Ok(()),
        _ => host.strip_prefix("*.").unwrap_or(host),
    };
    if name.contains('*') {
        return Err(format!(
            "{host:?} has a wildcard inside; only \"*\" or \"*.\" at the beginning is allowed"
        ));
    }
    if is_fqdn(name) || host.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    Err(format!(
        "{host:?} is not a host name: labels of letters, digits and '-', at most 63 characters each"
    ))
}

/// True if one of two hosts, possibly wildcards, contains the other.
pub(crate) fn hosts_overlap(a: &str, b: &str) -> bool {
    let covers = |wide: &str, narrow: &str| {
        wide == "*"
            || wide
                .strip_prefix('*')
                .is_some_and(|suffix| narrow.strip_prefix('*').unwrap_or(narrow).ends_with(suffix))
    };
    a == b || covers(a, b) || covers(b, a)
}

/// True if every host that `narrow` stands for is one of `wide`.
pub(crate) fn host_covers(wide: &str, narrow: &str) -> bool {
    wide == narrow
        || wide == "*"
        || wide
            .strip_prefix('*')
            .is_some_and(|suffix| narrow.strip_prefix('*').unwrap_or(narrow).ends_with(suffix))
}

/// Checks an exportTo list.
pub(crate) fn export_to(list: &[String], none_allowed: bool, check: &mut Check) {
    check.each("exportTo", list, |check, entry| match entry.as_str() {
        "." | "*" => {}
        "~" if none_allowed => {}
        name if is_dns_label(name) => {}
        name => check.error(format!("{name:?} is neither '.', '*' nor a namespace")),
    });
    for (index, entry) in list.iter().enumerate() {
        if list[..index].contains(entry) {
            check.error_at(
                &format!("exportTo[{index}]"),
                format!("{entry:?} is there twice"),
            );
        }
    }
    if list.len() > 1 && list.iter().any(|entry| matches!(entry.as_str(), "*" | "~")) {
        check.error_at("exportTo", "'*' and '~' have to stand alone");
    }
}

/// Checks a port number.
pub(crate) fn port(number: u32, field: &str, check: &mut Check) {
    check.require(
        (1..=65535).contains(&number),
        field,
        "a port is a number from 1 to 65535",
    );
}

/// Protocols that a port may be declared to speak, beside none.
pub(crate) const PROTOCOLS: &[&str] = &[
    "HTTP",
    "HTTP2",
    "HTTP_PROXY",
    "HTTPS",
    "GRPC",
    "GRPC-WEB",
    "TCP",
    "TLS",
    "MONGO",
    "REDIS",
    "MYSQL",
    "UDP",
    "HBONE",
];

/// Checks the protocol of a port, which may be left out.
pub(crate) fn protocol(name: &str, field: &str, check: &mut Check) {
    let known = PROTOCOLS
        .iter()
        .any(|protocol| protocol.eq_ignore_ascii_case(name));
    check.require(
        known || name.is_empty(),
        field,
        &format!("unknown protocol {name:?}; one of {}", PROTOCOLS.join(", ")),
    );
}

/// The way to a claim of the request's token, where a condition on headers names one: `@request.auth.claims.a.b`, or
/// `@request.auth.claims[a][b]` for names with dots. `None` for headers and for claims without a name.
pub fn claim_of_token(name: &str) -> Option<Vec<&str>> {
    let (prefix, rest) = name.split_at_checked(CLAIMS.len())?;
    if !prefix.eq_ignore_ascii_case(CLAIMS) {
        return None;
    }
    let names: Vec<&str> = match rest.strip_prefix('.') {
        Some(dotted) => dotted.split('.').collect(),
        None => {
            let inner = rest.strip_prefix('[')?.strip_suffix(']')?;
            inner.split("][").collect()
        }
    };
    names.iter().all(|name| !name.is_empty()).then_some(names)
}

/// True where a condition on headers means a claim, well written or not.
pub fn is_about_claims(name: &str) -> bool {
    name.split_at_checked(CLAIMS.len())
        .is_some_and(|(prefix, _)| prefix.eq_ignore_ascii_case(CLAIMS))
}

/// Conditions whose name begins so are about claims of the request's token.
const CLAIMS: &str = "@request.auth.claims";

/// Checks an address or a CIDR block.
pub(crate) fn cidr(text: &str) -> Result<(), String> {
    let wrong = || format!("{text:?} is neither an IP address nor a block such as 10.0.0.0/8");
    let (address, bits) = match text.split_once('/') {
        Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| wrong())?)),
        None => (text, None),
    };
    let limit = match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return Err(wrong()),
    };
    if bits.is_some_and(|bits| bits > limit) {
        Err(wrong())
    } else {
        Ok(())
    }
}

/// True for the name of a header that a proxy can look at: a token (RFC 9110 section 5.1), or one of the pseudo headers of HTTP/2.
pub fn is_matched_header(name: &str) -> bool {
    const PSEUDO: &[&str] = &[":authority", ":method", ":path", ":scheme", ":status"];
    let letter = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let token = !name.is_empty() && name.bytes().all(letter);
    token || PSEUDO.iter().any(|known| name.eq_ignore_ascii_case(known))
}

/// Checks a label: key with optional prefix, value at most 63 characters.
pub(crate) fn label(key: &str, value: &str) -> Result<(), String> {
    let part = |text: &str| {
        !text.is_empty()
            && text.len() <= 63
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && text
                .as_bytes()
                .first()
                .is_some_and(u8::is_ascii_alphanumeric)
            && text
                .as_bytes()
                .last()
                .is_some_and(u8::is_ascii_alphanumeric)
    };
    let (prefix, name) = key
        .rsplit_once('/')
        .map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if !part(name) || prefix.is_some_and(|prefix| !is_dns_subdomain(prefix)) {
        return Err(format!("{key:?} is not a label key"));
    }
    if value.is_empty() || part(value) {
        Ok(())
    } else {
        Err(format!("{value:?} is not a label value"))
    }
}

/// Checks all labels of a map.
pub(crate) fn labels<'a>(
    field: &str,
    labels: impl IntoIterator<Item = (&'a String, &'a String)>,
    check: &mut Check,
) {
    for (key, value) in labels {
        if let Err(message) = label(key, value) {
            check.error_at(field, message);
        }
    }
}

/// Checks a regular expression: RE2 syntax, at most 1024 bytes.
pub(crate) fn regex(pattern: &str, check: &mut Check) {
    if pattern.is_empty() {
        check.error("the regular expression is empty");
    } else if pattern.len() > 1024 {
        check.error(format!(
            "the regular expression has {} bytes; at most 1024 are allowed",
            pattern.len()
        ));
    } else if let Err(error) = regex::Regex::new(pattern) {
        let last = error
            .to_string()
            .lines()
            .last()
            .unwrap_or_default()
            .trim()
            .to_owned();
        check.error(format!(
            "{pattern:?} is not a regular expression in RE2 syntax: {last}"
        ));
    }
}

impl Validate for LabelSelector {
    fn validate(&self, check: &mut Check) {
        for (key, value) in &self.match_labels {
            let field = "matchLabels";
            if key.is_empty() {
                check.error_at(field, "a label key is empty");
            } else if key.contains('*') || value.contains('*') {
                check.error_at(field, "wildcards are not supported in label selectors");
            } else if let Err(message) = label(key, value) {
                check.error_at(field, message);
            }
        }
    }
}

impl Validate for WorkloadSelector {
    fn validate(&self, check: &mut Check) {
        check.require(self.labels.len() <= 256, "labels", "more than 256 labels");
        for (key, value) in &self.labels {
            if key.contains('*') || value.contains('*') {
                check.error_at("labels", "wildcards are not supported in label selectors");
            } else if let Err(message) = label(key, value) {
                check.error_at("labels", message);
            }
        }
    }
}

/// Checks the three ways to say what a policy is attached to.
pub(crate) fn attachment(
    selector: Option<&LabelSelector>,
    target_ref: Option<&PolicyTargetReference>,
    target_refs: &[PolicyTargetReference],
    check: &mut Check,
) {
    let forms = usize::from(selector.is_some())
        + usize::from(target_ref.is_some())
        + usize::from(!target_refs.is_empty());
    if forms > 1 {
        check.error("only one of selector, targetRef and targetRefs may be given");
    }
    if let Some(selector) = selector {
        check.part("selector", selector);
    }
    if let Some(target) = target_ref {
        check.part("targetRef", target);
    }
    check.require(
        target_refs.len() <= 16,
        "targetRefs",
        "more than 16 targets",
    );
    check.parts("targetRefs", target_refs);
}

impl Validate for PolicyTargetReference {
    fn validate(&self, check: &mut Check) {
        check.require(
            !self.name.is_empty(),
            "name",
            "empty; write the name of the target",
        );
        check.require(
            self.namespace.is_empty(),
            "namespace",
            "a policy can only be attached in its own namespace; leave this empty",
        );
        let known = matches!(
            (self.group.as_str(), self.kind.as_str()),
            ("" | "core", "Service")
                | ("networking.istio.io", "ServiceEntry")
                | ("gateway.networking.k8s.io", "Gateway" | "GatewayClass")
        );
        check.require(known, "kind", "a target is a Service, a ServiceEntry, or a Gateway or GatewayClass of gateway.networking.k8s.io");
    }
}
