//! Hashes of requests and connections, for balancers that send what is alike to the same endpoint. Values and their combination are
//! Envoy's (`RouteAction.HashPolicy`), so that a request goes to the same endpoint whichever of the two proxies it passes.

use std::borrow::Cow;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use envoy_types::pb::envoy::config::route::v3::route_action as pb;
use envoy_types::pb::envoy::config::route::v3::route_action::hash_policy::{
    Cookie as PbCookie, PolicySpecifier,
};
use envoy_types::pb::envoy::r#type::v3::HashPolicy as PbTcpPolicy;
use envoy_types::pb::envoy::r#type::v3::hash_policy::PolicySpecifier as TcpSpecifier;
use http::header::COOKIE;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::error::{CompileError, Result, Within, duration};
use crate::rewrite::{Substitution, split_query};
use crate::route::RequestView;
use crate::xxhash::xx_hash64;

/// What to hash of a request, in order.
#[derive(Debug)]
pub struct HashPolicy(Vec<Part>);

#[derive(Debug)]
struct Part {
    source: Source,
    /// Stop here once there is a hash.
    terminal: bool,
}

#[derive(Debug)]
enum Source {
    Header(HeaderName, Option<Substitution>),
    Cookie(Cookie),
    Address,
    Query(Box<str>),
}

#[derive(Debug)]
struct Cookie {
    name: Box<str>,
    /// Present (even if zero) where a client without the cookie is to be given one.
    ttl_seconds: Option<u64>,
    /// `; Path=..; Attribute=..; HttpOnly`, ready to be appended.
    suffix: Box<str>,
}

/// The hash of a request.
#[derive(Debug, Default)]
pub struct RequestHash {
    /// `None` where nothing that the policy names is there: the balancer picks by chance.
    pub value: Option<u64>,
    /// Cookies to give to the client with the response.
    pub set_cookies: Vec<HeaderValue>,
}

impl HashPolicy {
    /// `None` where the list is empty.
    pub(crate) fn compile(list: &[pb::HashPolicy]) -> Result<Option<Self>> {
        let mut parts = Vec::with_capacity(list.len());
        for (i, policy) in list.iter().enumerate() {
            let source = Source::compile(policy).within(format_args!("hash_policy[{i}]"))?;
            parts.extend(source.map(|source| Part {
                source,
                terminal: policy.terminal,
            }));
        }
        Ok((!parts.is_empty()).then_some(Self(parts)))
    }

    /// Hashes a request that came from `remote` to `local`.
    pub fn hash(
        &self,
        request: &RequestView<'_>,
        remote: SocketAddr,
        local: SocketAddr,
    ) -> RequestHash {
        let mut hash = RequestHash::default();
        for part in &self.0 {
            let new = match &part.source {
                Source::Header(name, rewrite) => header(request.headers, name, rewrite.as_ref()),
                Source::Cookie(cookie) => {
                    cookie.hash(request.headers, remote, local, &mut hash.set_cookies)
                }
                Source::Address => Some(of_ip(remote.ip())),
                Source::Query(name) => query(request.path_and_query, name),
            };
            hash.value = combine(hash.value, new);
            if part.terminal && hash.value.is_some() {
                break;
            }
        }
        hash
    }
}

/// The hash so far is rotated before the next is mixed in, so that the same part named twice does not cancel itself out.
fn combine(old: Option<u64>, new: Option<u64>) -> Option<u64> {
    match (old, new) {
        (old, None) => old,
        (old, Some(new)) => Some(old.unwrap_or(0).rotate_left(1) ^ new),
    }
}

impl Source {
    /// `None` for connection properties without `source_ip`, which ask for nothing.
    fn compile(m: &pb::HashPolicy) -> Result<Option<Self>> {
        Ok(Some(match &m.policy_specifier {
            Some(PolicySpecifier::Header(header)) => {
                let name = header
                    .header_name
                    .parse()
                    .map_err(|_| CompileError::new("header.header_name", "is not a header name"))?;
                let rewrite = header.regex_rewrite.as_ref().map(Substitution::compile);
                let rewrite = rewrite.transpose().within("header.regex_rewrite")?;
                Self::Header(name, rewrite)
            }
            Some(PolicySpecifier::Cookie(cookie)) => {
                Self::Cookie(Cookie::compile(cookie).within("cookie")?)
            }
            Some(PolicySpecifier::ConnectionProperties(m)) if m.source_ip => Self::Address,
            Some(PolicySpecifier::ConnectionProperties(_)) => return Ok(None),
            Some(PolicySpecifier::QueryParameter(m)) => Self::Query(m.name.as_str().into()),
            Some(PolicySpecifier::FilterState(_)) => {
                return Err(CompileError::unsupported("filter_state"));
            }
            None => return Err(CompileError::new("policy_specifier", "is missing")),
        }))
    }
}

/// The values of a header are hashed one after the other, sorted so that their order does not count; each hash is the seed of the next.
fn header(headers: &HeaderMap, name: &HeaderName, rewrite: Option<&Substitution>) -> Option<u64> {
    let mut values: Vec<Cow<'_, [u8]>> = headers
        .get_all(name)
        .iter()
        .map(|value| match rewrite {
            None => Cow::Borrowed(value.as_bytes()),
            Some(rewrite) => {
                let text = String::from_utf8_lossy(value.as_bytes());
                Cow::Owned(rewrite.apply(&text).into_owned().into_bytes())
            }
        })
        .collect();
    values.sort_unstable();
    let hash = values.iter().fold(0, |seed, value| xx_hash64(value, seed));
    (!values.is_empty()).then_some(hash)
}

impl Cookie {
    fn compile(m: &PbCookie) -> Result<Self> {
        let mut suffix = String::new();
        if !m.path.is_empty() {
            suffix.push_str("; Path=");
            suffix.push_str(&m.path);
        }
        for attribute in &m.attributes {
            suffix.push_str("; ");
            suffix.push_str(&attribute.name);
            if !attribute.value.is_empty() {
                suffix.push('=');
                suffix.push_str(&attribute.value);
            }
        }
        suffix.push_str("; HttpOnly");
        let cookie = Self {
            name: m.name.as_str().into(),
            ttl_seconds: duration("ttl", m.ttl.as_ref())?.map(|ttl| ttl.as_secs()),
            suffix: suffix.into(),
        };
        // What a client would be sent must be a header value.
        match cookie.value("") {
            Some(_) => Ok(cookie),
            None => Err(CompileError::new(
                "name",
                "name, path and attributes make no valid cookie",
            )),
        }
    }

    /// A client without the cookie is given one that follows from the two ends of its connection, so that requests that race on one
    /// connection get the same.
    fn hash(
        &self,
        headers: &HeaderMap,
        remote: SocketAddr,
        local: SocketAddr,
        set: &mut Vec<HeaderValue>,
    ) -> Option<u64> {
        let sent = cookie(headers, &self.name);
        if !sent.is_empty() {
            return Some(xx_hash64(sent.as_bytes(), 0));
        }
        self.ttl_seconds?;
        let seed = format!("{remote}{local}");
        let value = format!("{:016x}", xx_hash64(seed.as_bytes(), 0));
        set.extend(self.value(&value));
        Some(xx_hash64(value.as_bytes(), 0))
    }

    fn value(&self, value: &str) -> Option<HeaderValue> {
        let mut text = format!("{}=\"{value}\"", self.name);
        if let Some(ttl) = self.ttl_seconds.filter(|ttl| *ttl > 0) {
            // Writing to a String cannot fail.
            let _ = write!(text, "; Max-Age={ttl}");
        }
        text.push_str(&self.suffix);
        HeaderValue::try_from(text).ok()
    }
}

/// The value of a cookie without its quotes (RFC 6265 section 4.1.1); empty where it is missing.
fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    let pairs = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'));
    for pair in pairs {
        if let Some((key, value)) = pair.split_once('=')
            && key.trim_start_matches(' ') == name
        {
            let inner = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
            return inner.unwrap_or(value);
        }
    }
    ""
}

fn query(path_and_query: &str, name: &str) -> Option<u64> {
    let (_, query) = split_query(path_and_query);
    let pairs = query.strip_prefix('?')?.split('&');
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| xx_hash64(value.as_bytes(), 0))
}

/// The hash of an address without its port.
pub(crate) fn of_ip(ip: IpAddr) -> u64 {
    xx_hash64(ip.to_string().as_bytes(), 0)
}

/// Does the TCP proxy's policy ask for the client's address? (It can ask for nothing else here.)
pub(crate) fn compile_tcp(list: &[PbTcpPolicy]) -> Result<bool> {
    let mut by_source = false;
    for policy in list {
        match &policy.policy_specifier {
            Some(TcpSpecifier::SourceIp(_)) => by_source = true,
            Some(TcpSpecifier::FilterState(_)) => {
                return Err(CompileError::unsupported("filter_state"));
            }
            None => return Err(CompileError::new("policy_specifier", "is missing")),
        }
    }
    Ok(by_source)
}
