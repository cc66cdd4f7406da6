//! Matchers of strings, headers, query parameters and fractions, as `envoy.type.matcher.v3` and `envoy.config.route.v3` define them.

use std::borrow::Cow;

use envoy_types::pb::envoy::config::core::v3::RuntimeFractionalPercent;
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::config::route::v3::query_parameter_matcher::QueryParameterMatchSpecifier;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher};
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::error::{CompileError, Result, Within};
use crate::regex::Regex;
use crate::route::RequestView;

/// A `StringMatcher`.
#[derive(Debug, Clone)]
pub struct StringMatch {
    pattern: Pattern,
    ignore_case: bool,
}

#[derive(Debug, Clone)]
enum Pattern {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Contains(Box<str>),
    Regex(Regex),
}

impl StringMatch {
    /// Compiles the message; custom matchers are refused.
    pub(crate) fn compile(message: &StringMatcher) -> Result<Self> {
        let pattern = match &message.match_pattern {
            Some(MatchPattern::Exact(s)) => Pattern::Exact(s.as_str().into()),
            Some(MatchPattern::Prefix(s)) => Pattern::Prefix(s.as_str().into()),
            Some(MatchPattern::Suffix(s)) => Pattern::Suffix(s.as_str().into()),
            Some(MatchPattern::Contains(s)) if message.ignore_case => {
                Pattern::Contains(s.to_ascii_lowercase().into())
            }
            Some(MatchPattern::Contains(s)) => Pattern::Contains(s.as_str().into()),
            Some(MatchPattern::SafeRegex(regex)) => {
                Pattern::Regex(whole_regex(regex, false).within("safe_regex")?)
            }
            Some(MatchPattern::Custom(_)) => return Err(CompileError::unsupported("custom")),
            None => return Err(CompileError::new("match_pattern", "is missing")),
        };
        Ok(Self {
            pattern,
            ignore_case: message.ignore_case,
        })
    }

    fn exact(value: &str) -> Self {
        Self {
            pattern: Pattern::Exact(value.into()),
            ignore_case: false,
        }
    }

    /// Does the whole `value` match?
    pub fn matches(&self, value: &str) -> bool {
        let (v, ic) = (value.as_bytes(), self.ignore_case);
        match &self.pattern {
            Pattern::Exact(p) => equal(v, p.as_bytes(), ic),
            Pattern::Prefix(p) => v.len() >= p.len() && equal(&v[..p.len()], p.as_bytes(), ic),
            Pattern::Suffix(p) => {
                v.len() >= p.len() && equal(&v[v.len() - p.len()..], p.as_bytes(), ic)
            }
            Pattern::Contains(p) if ic => value.to_ascii_lowercase().contains(&**p),
            Pattern::Contains(p) => value.contains(&**p),
            Pattern::Regex(regex) => regex.is_match(value),
        }
    }
}

pub(crate) fn equal(a: &[u8], b: &[u8], ignore_case: bool) -> bool {
    if ignore_case {
        a.eq_ignore_ascii_case(b)
    } else {
        a == b
    }
}

/// A regular expression that must match the whole value (Envoy's `safe_regex`).
pub(crate) fn whole_regex(message: &RegexMatcher, ignore_case: bool) -> Result<Regex> {
    Regex::new(&format!("^(?:{})$", message.regex), ignore_case)
}

/// A regular expression that may match anywhere (for substitutions).
pub(crate) fn anywhere_regex(message: &RegexMatcher) -> Result<Regex> {
    Regex::new(&message.regex, false)
}

/// A `HeaderMatcher`.
#[derive(Debug, Clone)]
pub struct HeaderMatch {
    source: HeaderSource,
    test: HeaderTest,
    invert: bool,
    missing_is_empty: bool,
}

#[derive(Debug, Clone)]
enum HeaderSource {
    Method,
    Authority,
    Path,
    Scheme,
    Status,
    Field(HeaderName),
}

#[derive(Debug, Clone)]
enum HeaderTest {
    Present(bool),
    Text(StringMatch),
    /// Half-open interval of decimal integers.
    Range(i64, i64),
}

impl HeaderMatch {
    pub(crate) fn compile(message: &pb::HeaderMatcher) -> Result<Self> {
        let source = match message.name.to_ascii_lowercase().as_str() {
            ":method" => HeaderSource::Method,
            ":authority" | "host" => HeaderSource::Authority,
            ":path" => HeaderSource::Path,
            ":scheme" => HeaderSource::Scheme,
            ":status" => HeaderSource::Status,
            name => HeaderSource::Field(name.parse().map_err(|_| {
                CompileError::new("name", format!("{name:?} is not a header name"))
            })?),
        };
        let plain = |pattern| {
            HeaderTest::Text(StringMatch {
                pattern,
                ignore_case: false,
            })
        };
        let test = match &message.header_match_specifier {
            None => HeaderTest::Present(true),
            Some(HeaderMatchSpecifier::PresentMatch(present)) => HeaderTest::Present(*present),
            Some(HeaderMatchSpecifier::StringMatch(m)) => {
                HeaderTest::Text(StringMatch::compile(m).within("string_match")?)
            }
            Some(HeaderMatchSpecifier::ExactMatch(s)) => HeaderTest::Text(StringMatch::exact(s)),
            Some(HeaderMatchSpecifier::PrefixMatch(s)) => plain(Pattern::Prefix(s.as_str().into())),
            Some(HeaderMatchSpecifier::SuffixMatch(s)) => plain(Pattern::Suffix(s.as_str().into())),
            Some(HeaderMatchSpecifier::ContainsMatch(s)) => {
                plain(Pattern::Contains(s.as_str().into()))
            }
            Some(HeaderMatchSpecifier::SafeRegexMatch(r)) => plain(Pattern::Regex(
                whole_regex(r, false).within("safe_regex_match")?,
            )),
            Some(HeaderMatchSpecifier::RangeMatch(r)) => HeaderTest::Range(r.start, r.end),
        };
        Ok(Self {
            source,
            test,
            invert: message.invert_match,
            missing_is_empty: message.treat_missing_header_as_empty,
        })
    }

    /// Asks for nothing but the presence of a header.
    pub(crate) fn present(name: HeaderName) -> Self {
        Self {
            source: HeaderSource::Field(name),
            test: HeaderTest::Present(true),
            invert: false,
            missing_is_empty: false,
        }
    }

    /// The same rules for a response, which has `:status` and no other pseudo header.
    pub(crate) fn matches_response(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        match &self.source {
            HeaderSource::Status => self.judge(Some(Cow::Borrowed(status.as_str()))),
            HeaderSource::Field(name) => self.judge_field(headers, name),
            _ => self.judge(None),
        }
    }

    /// Envoy's rules: of several values one has to match, each judged by itself; a missing header matches nothing (inverted or not)
    /// unless it is to be treated as empty, or its presence is what is asked for.
    pub fn matches(&self, request: &RequestView<'_>) -> bool {
        let value = match &self.source {
            HeaderSource::Method => Some(Cow::Borrowed(request.method)),
            HeaderSource::Authority => Some(Cow::Borrowed(request.host)),
            HeaderSource::Path => Some(Cow::Borrowed(request.path_and_query)),
            HeaderSource::Scheme => Some(Cow::Borrowed(request.scheme)),
            HeaderSource::Status => None,
            HeaderSource::Field(name) => return self.judge_field(request.headers, name),
        };
        self.judge(value)
    }

    fn judge_field(&self, headers: &HeaderMap, name: &HeaderName) -> bool {
        let mut values = headers.get_all(name).iter();
        let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        match (values.next(), values.next()) {
            (None, _) => self.judge(None),
            (Some(only), None) => self.judge(Some(String::from_utf8_lossy(only.as_bytes()))),
            (Some(_), Some(_)) => {
                let found = |value| self.judge(Some(Cow::Owned(text(value)))) != self.invert;
                headers.get_all(name).iter().any(found) != self.invert
            }
        }
    }

    fn judge(&self, value: Option<Cow<'_, str>>) -> bool {
        if let HeaderTest::Present(wanted) = self.test {
            let there = value.is_some() || self.missing_is_empty;
            return (there == wanted) != self.invert;
        }
        let value = match value {
            Some(value) => value,
            None if self.missing_is_empty => Cow::Borrowed(""),
            None => return false,
        };
        let matched = match &self.test {
            HeaderTest::Text(text) => text.matches(&value),
            HeaderTest::Range(start, end) => {
                value.parse::<i64>().is_ok_and(|n| n >= *start && n < *end)
            }
            HeaderTest::Present(_) => true,
        };
        matched != self.invert
    }
}

/// A `QueryParameterMatcher`.
#[derive(Debug, Clone)]
pub struct QueryMatch {
    name: Box<str>,
    /// `None` asks for presence only.
    text: Option<StringMatch>,
    present: bool,
}

impl QueryMatch {
    pub(crate) fn compile(message: &pb::QueryParameterMatcher) -> Result<Self> {
        let (text, present) = match &message.query_parameter_match_specifier {
            None => (None, true),
            Some(QueryParameterMatchSpecifier::PresentMatch(present)) => (None, *present),
            Some(QueryParameterMatchSpecifier::StringMatch(m)) => {
                (Some(StringMatch::compile(m).within("string_match")?), true)
            }
        };
        Ok(Self {
            name: message.name.as_str().into(),
            text,
            present,
        })
    }

    /// Judges the first parameter of that name; nothing is percent-decoded, as in Envoy.
    pub fn matches(&self, query: &str) -> bool {
        let value = query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == &*self.name).then_some(value)
        });
        match (&self.text, value) {
            (None, value) => value.is_some() == self.present,
            (Some(text), Some(value)) => text.matches(value),
            (Some(_), None) => false,
        }
    }
}

/// A share of requests, in parts per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fraction(u32);

impl Fraction {
    pub(crate) fn compile(message: &RuntimeFractionalPercent) -> Result<Self> {
        // `runtime_key` overrides the default from Envoy's runtime files, which do not exist here.
        let Some(value) = &message.default_value else {
            return Ok(Self(1_000_000));
        };
        let scale = match DenominatorType::try_from(value.denominator) {
            Ok(DenominatorType::Hundred) => 10_000,
            Ok(DenominatorType::TenThousand) => 100,
            Ok(DenominatorType::Million) => 1,
            Err(_) => return Err(CompileError::new("default_value.denominator", "is unknown")),
        };
        Ok(Self(value.numerator.saturating_mul(scale).min(1_000_000)))
    }

    /// Is the request with this random number in the share?
    pub fn covers(self, random: u64) -> bool {
        random % 1_000_000 < u64::from(self.0)
    }
}
