//! The conditions of a policy: permissions (what is done) and principals (by whom).

use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::config::rbac::v3::MetadataSource;
use envoy_types::pb::envoy::config::rbac::v3::permission::Rule as PbRule;
use envoy_types::pb::envoy::config::rbac::v3::principal::Identifier;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::envoy::r#type::v3::Int32Range;

use super::Facts;
use crate::chain::Cidr;
use crate::dynamic::MetadataMatch;
use crate::error::{CompileError, Result, Within, every_field};
use crate::matcher::{HeaderMatch, StringMatch};
use crate::rewrite::split_query;
use crate::template::Template;

/// Levels of conditions within conditions; deeper ones are refused, so that judging cannot use up the stack.
const DEEPEST: usize = 64;
/// Where Istio keeps the peer's identity in the filter state.
const PEER_PRINCIPAL: &str = "io.istio.peer_principal";
/// The type of path templates.
const TEMPLATE: &str = "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig";

/// A condition.
#[derive(Debug)]
pub(super) enum Rule {
    Always,
    All(Vec<Rule>),
    Any(Vec<Rule>),
    Not(Box<Rule>),
    Header(HeaderMatch),
    Path(StringMatch),
    Template(Template),
    Metadata(MetadataMatch),
    ServerName(StringMatch),
    DestinationIp(Cidr),
    DestinationPort(u32),
    /// Half-open.
    DestinationPorts(i32, i32),
    /// `None`: whoever speaks TLS.
    Authenticated(Option<StringMatch>),
    PeerPrincipal(StringMatch),
    DirectIp(Cidr),
    RemoteIp(Cidr),
}

impl Rule {
    pub(super) fn permission(m: &pb::Permission, depth: usize) -> Result<Self> {
        check_depth(depth)?;
        let set = |set: &pb::permission::Set| {
            let all = set.rules.iter();
            all.map(|rule| Self::permission(rule, depth + 1))
                .collect::<Result<Vec<_>>>()
        };
        match &m.rule {
            None => Err(CompileError::new("rule", "is missing")),
            Some(PbRule::AndRules(rules)) => Ok(Self::All(set(rules).within("and_rules")?)),
            Some(PbRule::OrRules(rules)) => Ok(Self::Any(set(rules).within("or_rules")?)),
            Some(PbRule::NotRule(rule)) => {
                let rule = Self::permission(rule, depth + 1).within("not_rule")?;
                Ok(Self::Not(Box::new(rule)))
            }
            Some(PbRule::Any(yes)) => always(*yes),
            Some(PbRule::Header(m)) => HeaderMatch::compile(m).within("header").map(Self::Header),
            Some(PbRule::UrlPath(m)) => path(m),
            Some(PbRule::DestinationIp(m)) => Cidr::compile(m)
                .within("destination_ip")
                .map(Self::DestinationIp),
            Some(PbRule::DestinationPort(port)) => match u16::try_from(*port) {
                Ok(_) => Ok(Self::DestinationPort(*port)),
                Err(_) => Err(CompileError::new(
                    "destination_port",
                    format!("{port} is not a port"),
                )),
            },
            Some(PbRule::DestinationPortRange(range)) => ports(range),
            Some(PbRule::Metadata(m)) => MetadataMatch::compile(m)
                .within("metadata")
                .map(Self::Metadata),
            Some(PbRule::SourcedMetadata(m)) => sourced(m),
            Some(PbRule::RequestedServerName(m)) => StringMatch::compile(m)
                .within("requested_server_name")
                .map(Self::ServerName),
            Some(PbRule::UriTemplate(m)) => {
                let type_name = m
                    .typed_config
                    .as_ref()
                    .map_or("", |any| any.type_url.rsplit('/').next().unwrap_or(""));
                if type_name != TEMPLATE {
                    return Err(CompileError::unsupported(format!(
                        "uri_template {type_name}"
                    )));
                }
                Template::compile(m)
                    .within("uri_template")
                    .map(Self::Template)
            }
            Some(PbRule::Matcher(m)) => {
                Err(CompileError::unsupported(format!("matcher {}", m.name)))
            }
        }
    }

    pub(super) fn principal(m: &pb::Principal, depth: usize) -> Result<Self> {
        check_depth(depth)?;
        let set = |set: &pb::principal::Set| {
            let all = set.ids.iter();
            all.map(|id| Self::principal(id, depth + 1))
                .collect::<Result<Vec<_>>>()
        };
        match &m.identifier {
            None => Err(CompileError::new("identifier", "is missing")),
            Some(Identifier::AndIds(ids)) => Ok(Self::All(set(ids).within("and_ids")?)),
            Some(Identifier::OrIds(ids)) => Ok(Self::Any(set(ids).within("or_ids")?)),
            Some(Identifier::NotId(id)) => {
                let id = Self::principal(id, depth + 1).within("not_id")?;
                Ok(Self::Not(Box::new(id)))
            }
            Some(Identifier::Any(yes)) => always(*yes),
            Some(Identifier::Authenticated(m)) => {
                let name = m.principal_name.as_ref().map(StringMatch::compile);
                let name = name.transpose().within("authenticated.principal_name")?;
                Ok(Self::Authenticated(name))
            }
            Some(Identifier::SourceIp(m)) => {
                Cidr::compile(m).within("source_ip").map(Self::DirectIp)
            }
            Some(Identifier::DirectRemoteIp(m)) => Cidr::compile(m)
                .within("direct_remote_ip")
                .map(Self::DirectIp),
            Some(Identifier::RemoteIp(m)) => {
                Cidr::compile(m).within("remote_ip").map(Self::RemoteIp)
            }
            Some(Identifier::Header(m)) => {
                HeaderMatch::compile(m).within("header").map(Self::Header)
            }
            Some(Identifier::UrlPath(m)) => path(m),
            Some(Identifier::Metadata(m)) => MetadataMatch::compile(m)
                .within("metadata")
                .map(Self::Metadata),
            Some(Identifier::SourcedMetadata(m)) => sourced(m),
            Some(Identifier::FilterState(m)) => filter_state(m).within("filter_state"),
            Some(Identifier::Custom(m)) => {
                Err(CompileError::unsupported(format!("custom {}", m.name)))
            }
        }
    }

    pub(super) fn matches(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Always => true,
            Self::All(rules) => rules.iter().all(|rule| rule.matches(facts)),
            Self::Any(rules) => rules.iter().any(|rule| rule.matches(facts)),
            Self::Not(rule) => !rule.matches(facts),
            Self::Header(header) => facts.request.is_some_and(|r| header.matches(r)),
            Self::Path(text) => request_path(facts).is_some_and(|path| text.matches(path)),
            Self::Template(template) => {
                request_path(facts).is_some_and(|path| template.matches(path))
            }
            Self::Metadata(value) => value.matches(facts.metadata),
            Self::ServerName(text) => text.matches(facts.server_name),
            Self::DestinationIp(range) => range.contains(facts.destination.ip()),
            Self::DestinationPort(port) => u32::from(facts.destination.port()) == *port,
            Self::DestinationPorts(start, end) => {
                (*start..*end).contains(&i32::from(facts.destination.port()))
            }
            Self::Authenticated(name) => is_authenticated(name.as_ref(), facts),
            Self::PeerPrincipal(name) => {
                let principal = facts.tls.and_then(|tls| tls.principal());
                principal.is_some_and(|principal| name.matches(principal))
            }
            Self::DirectIp(range) => range.contains(facts.direct),
            Self::RemoteIp(range) => range.contains(facts.remote),
        }
    }

    /// Does the condition, or one within it, have this property?
    pub(super) fn has(&self, property: fn(&Self) -> bool) -> bool {
        match self {
            Self::All(rules) | Self::Any(rules) => rules.iter().any(|rule| rule.has(property)),
            Self::Not(rule) => rule.has(property),
            other => property(other),
        }
    }

    pub(super) fn reads_forwarded(&self) -> bool {
        matches!(self, Self::RemoteIp(_))
    }

    pub(super) fn reads_headers(&self) -> bool {
        matches!(self, Self::Header(_))
    }
}

fn check_depth(depth: usize) -> Result<()> {
    match depth > DEEPEST {
        true => Err(CompileError::new("rule", "is nested too deeply")),
        false => Ok(()),
    }
}

/// Envoy takes `any: true` only.
fn always(yes: bool) -> Result<Rule> {
    match yes {
        true => Ok(Rule::Always),
        false => Err(CompileError::new("any", "must be true")),
    }
}

fn path(m: &matcher::PathMatcher) -> Result<Rule> {
    match &m.rule {
        Some(matcher::path_matcher::Rule::Path(text)) => StringMatch::compile(text)
            .within("url_path.path")
            .map(Rule::Path),
        None => Err(CompileError::new("url_path.path", "is missing")),
    }
}

fn ports(range: &Int32Range) -> Result<Rule> {
    match 0 <= range.start && range.start < range.end && range.end <= 65_536 {
        true => Ok(Rule::DestinationPorts(range.start, range.end)),
        false => Err(CompileError::new(
            "destination_port_range",
            format!("[{}, {}) is not a range of ports", range.start, range.end),
        )),
    }
}

fn sourced(m: &pb::SourcedMetadata) -> Result<Rule> {
    every_field!(m, pb::SourcedMetadata, used { metadata_matcher, metadata_source } irrelevant {} refused {});
    if MetadataSource::try_from(m.metadata_source) != Ok(MetadataSource::Dynamic) {
        return Err(CompileError::unsupported(
            "sourced_metadata.metadata_source ROUTE",
        ));
    }
    match &m.metadata_matcher {
        Some(m) => MetadataMatch::compile(m)
            .within("sourced_metadata")
            .map(Rule::Metadata),
        None => Err(CompileError::new("metadata_matcher", "is missing")),
    }
}

fn filter_state(m: &matcher::FilterStateMatcher) -> Result<Rule> {
    use matcher::filter_state_matcher::Matcher;
    match (&m.matcher, m.key.as_str()) {
        (Some(Matcher::StringMatch(text)), PEER_PRINCIPAL) => {
            StringMatch::compile(text).map(Rule::PeerPrincipal)
        }
        (_, key) => Err(CompileError::unsupported(format!("key {key:?}"))),
    }
}

/// The path without query and fragment.
fn request_path<'a>(facts: &Facts<'a>) -> Option<&'a str> {
    // A CONNECT request has no path.
    let request = facts
        .request
        .filter(|request| request.method != "CONNECT")?;
    let path = split_query(request.path_and_query).0;
    Some(path.split('#').next().unwrap_or(path))
}

/// URI names, then DNS names, then the subject, as Envoy goes through them.
fn is_authenticated(name: Option<&StringMatch>, facts: &Facts<'_>) -> bool {
    let Some(tls) = facts.tls else {
        return false;
    };
    match name {
        // Without a name Envoy asks for nothing but TLS; who presented no certificate is nobody.
        None => tls.is_mutual(),
        Some(name) => {
            let mut names = tls.uri_sans.iter().chain(&tls.dns_sans);
            tls.is_mutual() && (names.any(|san| name.matches(san)) || name.matches(&tls.subject))
        }
    }
}
