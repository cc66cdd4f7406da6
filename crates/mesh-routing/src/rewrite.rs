//! Rewrites of path and authority, and the location of redirects.

use std::borrow::Cow;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::redirect_action::{
    PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier,
};
use envoy_types::pb::envoy::config::route::v3::route_action::HostRewriteSpecifier;
use envoy_types::pb::envoy::r#type::matcher::v3::RegexMatchAndSubstitute;
use http::{HeaderName, HeaderValue, StatusCode};

use crate::error::{CompileError, Result, Within, every_field};
use crate::matcher::anywhere_regex;
use crate::regex::Regex;
use crate::route::RequestView;
use crate::template::TemplateRewrite;

/// How the authority is replaced.
#[derive(Debug, Clone)]
pub enum HostRewrite {
    /// By this text.
    Literal(HeaderValue),
    /// By the endpoint's host name, where it has one.
    Endpoint,
    /// By the value of a request header, where present.
    Header(HeaderName),
    /// By what a substitution makes of the path.
    Path(Substitution),
}

/// A regular expression and what its matches are replaced by.
#[derive(Debug, Clone)]
pub struct Substitution {
    regex: Regex,
    /// In the form of [`Regex::replace_all`].
    by: String,
}

impl Substitution {
    pub(crate) fn compile(m: &RegexMatchAndSubstitute) -> Result<Self> {
        let pattern = m
            .pattern
            .as_ref()
            .ok_or_else(|| CompileError::new("pattern", "is missing"))?;
        Ok(Self {
            regex: anywhere_regex(pattern)?,
            by: substitution(&m.substitution),
        })
    }

    /// The text with all matches replaced.
    pub fn apply<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.regex.replace_all(text, &self.by)
    }
}

impl HostRewrite {
    pub(crate) fn compile(specifier: Option<&HostRewriteSpecifier>) -> Result<Option<Self>> {
        Ok(match specifier {
            None => None,
            Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => {
                Some(Self::Literal(host_value(host)?))
            }
            Some(HostRewriteSpecifier::AutoHostRewrite(on)) => on.value.then_some(Self::Endpoint),
            Some(HostRewriteSpecifier::HostRewriteHeader(name)) => {
                Some(Self::Header(name.parse().map_err(|_| {
                    CompileError::new("host_rewrite_header", "is not a header name")
                })?))
            }
            Some(HostRewriteSpecifier::HostRewritePathRegex(m)) => Some(Self::Path(
                Substitution::compile(m).within("host_rewrite_path_regex")?,
            )),
            Some(HostRewriteSpecifier::HostRewrite(_)) => {
                return Err(CompileError::unsupported("host_rewrite"));
            }
        })
    }
}

pub(crate) fn host_value(host: &str) -> Result<HeaderValue> {
    HeaderValue::from_str(host)
        .map_err(|_| CompileError::new("host_rewrite_literal", "is not a header value"))
}

/// A path rewrite; the query stays.
#[derive(Debug)]
pub(crate) enum Rewrite {
    Prefix(String),
    Regex(Substitution),
    Template(TemplateRewrite),
}

impl Rewrite {
    pub(crate) fn compile(
        prefix: &str,
        regex: Option<&RegexMatchAndSubstitute>,
    ) -> Result<Option<Self>> {
        match (prefix, regex) {
            ("", None) => Ok(None),
            ("", Some(regex)) => Substitution::compile(regex)
                .within("regex_rewrite")
                .map(|s| Some(Self::Regex(s))),
            (prefix, None) => Ok(Some(Self::Prefix(prefix.to_owned()))),
            _ => Err(CompileError::new(
                "prefix_rewrite",
                "cannot be combined with regex_rewrite",
            )),
        }
    }

    pub(crate) fn apply(&self, path_and_query: &str, matched: usize) -> String {
        let (path, query) = split_query(path_and_query);
        let mut out = match self {
            Self::Prefix(new) => format!("{new}{}", path.get(matched..).unwrap_or("")),
            Self::Regex(substitution) => substitution.apply(path).into_owned(),
            Self::Template(template) => template.apply(path),
        };
        out.push_str(query);
        if !out.starts_with('/') {
            out.insert(0, '/');
        }
        out
    }
}

/// RE2's `\1` to this crate's `${1}`.
pub(crate) fn substitution(re2: &str) -> String {
    let mut out = String::with_capacity(re2.len() + 8);
    let mut chars = re2.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '\\' { chars.next() } else { None }) {
            ('\\', Some(d)) if d.is_ascii_digit() => out.push_str(&format!("${{{d}}}")),
            ('\\', Some(other)) => out.push(other),
            ('$', _) => out.push_str("$$"),
            (other, _) => out.push(other),
        }
    }
    out
}

/// Path and the rest beginning at `?` (or empty).
pub(crate) fn split_query(path_and_query: &str) -> (&str, &str) {
    path_and_query.split_at(path_and_query.find('?').unwrap_or(path_and_query.len()))
}

/// A redirect answer.
#[derive(Debug)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
    scheme: Option<String>,
    host: Option<String>,
    port: Option<u32>,
    path: Option<RedirectPath>,
    strip_query: bool,
}

#[derive(Debug)]
enum RedirectPath {
    Whole(String),
    Rewrite(Rewrite),
}

impl Redirect {
    pub(crate) fn compile(m: &pb::RedirectAction) -> Result<Self> {
        every_field!(m, pb::RedirectAction,
            used {
                host_redirect, port_redirect, response_code, strip_query, scheme_rewrite_specifier, path_rewrite_specifier,
            }
            irrelevant {}
            refused {});
        let text = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        Ok(Self {
            status: match RedirectResponseCode::try_from(m.response_code) {
                Ok(RedirectResponseCode::MovedPermanently) => StatusCode::MOVED_PERMANENTLY,
                Ok(RedirectResponseCode::Found) => StatusCode::FOUND,
                Ok(RedirectResponseCode::SeeOther) => StatusCode::SEE_OTHER,
                Ok(RedirectResponseCode::TemporaryRedirect) => StatusCode::TEMPORARY_REDIRECT,
                Ok(RedirectResponseCode::PermanentRedirect) => StatusCode::PERMANENT_REDIRECT,
                Err(_) => return Err(CompileError::new("response_code", "is unknown")),
            },
            scheme: match &m.scheme_rewrite_specifier {
                Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some("https".to_owned()),
                Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => text(scheme),
                _ => None,
            },
            host: text(&m.host_redirect),
            port: (m.port_redirect != 0).then_some(m.port_redirect),
            path: match &m.path_rewrite_specifier {
                None => None,
                Some(PathRewriteSpecifier::PathRedirect(path)) => {
                    text(path).map(RedirectPath::Whole)
                }
                Some(PathRewriteSpecifier::PrefixRewrite(p)) => {
                    text(p).map(|p| RedirectPath::Rewrite(Rewrite::Prefix(p)))
                }
                Some(PathRewriteSpecifier::RegexRewrite(r)) => Some(RedirectPath::Rewrite(
                    Rewrite::Regex(Substitution::compile(r).within("regex_rewrite")?),
                )),
                Some(PathRewriteSpecifier::PathRewrite(_)) => {
                    return Err(CompileError::unsupported("path_rewrite"));
                }
            },
            strip_query: m.strip_query,
        })
    }

    /// The `location` of the answer. A port of the request stays, unless host or port are replaced, or the scheme is and the port was the
    /// default of the old one (Envoy: `processRequestHost`).
    pub fn location(&self, request: &RequestView<'_>, matched: usize) -> String {
        let scheme = self.scheme.as_deref().unwrap_or(request.scheme);
        let (own_host, own_port) = split_port(request.host);
        let default = match request.scheme {
            "https" => "443",
            _ => "80",
        };
        let own_port = own_port.filter(|port| scheme == request.scheme || *port != default);
        let port = match (self.port, &self.host) {
            (Some(port), _) => format!(":{port}"),
            (None, None) => own_port.map(|port| format!(":{port}")).unwrap_or_default(),
            (None, Some(_)) => String::new(),
        };
        let host = self.host.as_deref().unwrap_or(own_host);
        let (old_path, query) = split_query(request.path_and_query);
        let path = match &self.path {
            None => Cow::Borrowed(old_path),
            Some(RedirectPath::Whole(path)) => Cow::Borrowed(path.as_str()),
            Some(RedirectPath::Rewrite(rewrite)) => Cow::Owned(rewrite.apply(old_path, matched)),
        };
        let query = if self.strip_query || path.contains('?') {
            ""
        } else {
            query
        };
        format!("{scheme}://{host}{port}{path}{query}")
    }
}

/// `host:port` apart; brackets of IPv6 stay with the host.
pub(crate) fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            if name.contains(':') && !name.ends_with(']') {
                (host, None)
            } else {
                (name, Some(port))
            }
        }
        _ => (host, None),
    }
}
