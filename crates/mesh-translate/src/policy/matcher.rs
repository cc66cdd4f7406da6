//! How Istio's values of policies are matched: exactly, `x*`, `*x`, and `*` for presence.

use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::route::v3::HeaderMatcher;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::r#type::matcher::v3::list_matcher::MatchPattern as ListPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::PathSegment;
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::path_segment::Segment;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::value_matcher::MatchPattern as ValuePattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{
    ListMatcher, MetadataMatcher, OrMatcher, RegexMatcher, StringMatcher, ValueMatcher,
};

use crate::pb::uint32;

/// Filter whose metadata holds what tokens say, and the key in it.
const JWT_FILTER: &str = "envoy.filters.http.jwt_authn";
const PAYLOAD: &str = "payload";

pub(super) fn with(pattern: MatchPattern) -> StringMatcher {
    StringMatcher {
        match_pattern: Some(pattern),
        ignore_case: false,
    }
}

pub(super) fn regex(regex: impl Into<String>) -> StringMatcher {
    with(MatchPattern::SafeRegex(RegexMatcher {
        regex: regex.into(),
        ..RegexMatcher::default()
    }))
}

/// Anything that is there.
pub(super) fn present() -> StringMatcher {
    regex(".+")
}

pub(super) fn with_exact(text: &str) -> StringMatcher {
    with(MatchPattern::Exact(text.to_owned()))
}

pub(super) fn string(value: &str) -> StringMatcher {
    string_after("", value)
}

/// The same for what has a fixed text before the value.
pub(super) fn string_after(before: &str, value: &str) -> StringMatcher {
    if value == "*" {
        return present();
    }
    if let Some(end) = value.strip_prefix('*') {
        return if before.is_empty() {
            with(MatchPattern::Suffix(end.to_owned()))
        } else {
            regex(format!("{}.*{}", quoted(before), quoted(end)))
        };
    }
    match value.strip_suffix('*') {
        Some(beginning) => with(MatchPattern::Prefix(format!("{before}{beginning}"))),
        None => with(MatchPattern::Exact(format!("{before}{value}"))),
    }
}

/// Text for a regular expression (RE2) in which only `*` means something: any text.
pub(super) fn glob(value: &str) -> String {
    let parts: Vec<String> = value.split('*').map(quoted).collect();
    parts.join(".*")
}

/// Text for a regular expression that stands for itself.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        if r"\.+*?()|[]{}^$".contains(letter) {
            out.push('\\');
        }
        out.push(letter);
    }
    out
}

pub(super) fn header(name: &str, value: &str, ignore_case: bool) -> HeaderMatcher {
    let specifier = match value {
        "*" => HeaderMatchSpecifier::PresentMatch(true),
        value => HeaderMatchSpecifier::StringMatch(StringMatcher {
            ignore_case,
            ..string(value)
        }),
    };
    HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(specifier),
        ..HeaderMatcher::default()
    }
}

/// An address or a range of addresses.
pub(super) fn range(text: &str) -> Option<CidrRange> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length.parse::<u8>().ok()?)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let whole = if address.is_ipv4() { 32 } else { 128 };
    let length = length.unwrap_or(whole);
    (length <= whole).then(|| CidrRange {
        address_prefix: address.to_string(),
        prefix_len: uint32(length),
    })
}

pub(super) fn metadata(filter: &str, path: &[&str], value: ValueMatcher) -> MetadataMatcher {
    let segment = |key: &&str| PathSegment {
        segment: Some(Segment::Key((*key).to_owned())),
    };
    MetadataMatcher {
        filter: filter.to_owned(),
        path: path.iter().map(segment).collect(),
        value: Some(value),
        invert: false,
    }
}

fn value(pattern: ValuePattern) -> ValueMatcher {
    ValueMatcher {
        match_pattern: Some(pattern),
    }
}

pub(super) fn string_value(matcher: StringMatcher) -> ValueMatcher {
    value(ValuePattern::StringMatch(matcher))
}

/// An element of a list.
pub(super) fn element(of: ValueMatcher) -> ValueMatcher {
    value(ValuePattern::ListMatch(Box::new(ListMatcher {
        match_pattern: Some(ListPattern::OneOf(Box::new(of))),
    })))
}

/// One of several; a single one stands alone.
pub(super) fn one_of(mut values: Vec<ValueMatcher>) -> ValueMatcher {
    match (values.len(), values.pop()) {
        (1, Some(only)) => only,
        (_, last) => {
            values.extend(last);
            value(ValuePattern::OrMatch(OrMatcher {
                value_matchers: values,
            }))
        }
    }
}

/// A condition on a claim of the token, which is a text or a list of texts. Names are the way to a nested claim.
pub(crate) fn claim(names: &[&str], matchers: Vec<StringMatcher>) -> MetadataMatcher {
    let any = one_of(matchers.into_iter().map(string_value).collect());
    let path: Vec<&str> = std::iter::once(PAYLOAD)
        .chain(names.iter().copied())
        .collect();
    metadata(JWT_FILTER, &path, one_of(vec![element(any.clone()), any]))
}

/// A condition on a claim that is a text.
pub(super) fn text_claim(name: &str, matcher: StringMatcher) -> MetadataMatcher {
    metadata(JWT_FILTER, &[PAYLOAD, name], string_value(matcher))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stars_at_the_ends_mean_something() {
        let pattern = |matcher: StringMatcher| matcher.match_pattern.unwrap();
        assert_eq!(pattern(string("a.b")), MatchPattern::Exact("a.b".into()));
        assert_eq!(pattern(string("/a*")), MatchPattern::Prefix("/a".into()));
        assert_eq!(pattern(string("*.b")), MatchPattern::Suffix(".b".into()));
        assert_eq!(string("*"), present());
        assert_eq!(
            string_after("spiffe://", "*/sa/a.b"),
            regex(r"spiffe://.*/sa/a\.b")
        );
        assert_eq!(glob("a.b*"), r"a\.b.*");
    }

    #[test]
    fn ranges_are_checked() {
        assert_eq!(range("10.0.0.0/8").unwrap().prefix_len, uint32(8u32));
        assert_eq!(range("::1").unwrap().prefix_len, uint32(128u32));
        assert!(range("10.0.0.0/33").is_none() && range("a/8").is_none());
    }
}
