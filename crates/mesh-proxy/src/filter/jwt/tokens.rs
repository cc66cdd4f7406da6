//! Where requests carry tokens.

use std::borrow::Cow;

use http::header::COOKIE;
use http::{HeaderName, request};
use mesh_routing::filter::jwt_authn::Provider;

use super::effects::Effects;
use super::values;

/// A token and the place where it was found.
#[derive(Debug)]
pub(super) struct Token<'r> {
    pub(super) text: Cow<'r, str>,
    pub(super) place: Place,
}

/// Where a token was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Header(HeaderName),
    Param(Box<str>),
    Cookie,
}

/// All tokens at a provider's places, without those that an earlier provider has taken away.
pub(super) fn find<'r>(
    provider: &Provider,
    parts: &'r request::Parts,
    effects: &Effects,
) -> Vec<Token<'r>> {
    let mut found = Vec::new();
    for from in &provider.headers {
        if effects.has_taken(&Place::Header(from.name.clone())) {
            continue;
        }
        // Each line by itself: of two tokens in two lines both must be good.
        for value in values(&parts.headers, &from.name) {
            if let Some(token) = behind(value, &from.prefix) {
                found.push(Token {
                    text: token.into(),
                    place: Place::Header(from.name.clone()),
                });
            }
        }
    }
    for param in &provider.params {
        let place = Place::Param(param.clone());
        if effects.has_taken(&place) {
            continue;
        }
        // Each of those of that name: all of them go on to the application.
        for text in parameters(parts.uri.query().unwrap_or(""), param) {
            found.push(Token {
                text,
                place: place.clone(),
            });
        }
    }
    for cookie in &provider.cookies {
        for text in cookies(parts, cookie) {
            found.push(Token {
                text: text.into(),
                place: Place::Cookie,
            });
        }
    }
    found
}

/// What stands behind the prefix, wherever that stands.
fn behind<'v>(value: &'v str, prefix: &str) -> Option<&'v str> {
    value.split_once(prefix).map(|(_, token)| token)
}

/// The parameters of that name.
fn parameters<'r>(query: &'r str, name: &str) -> impl Iterator<Item = Cow<'r, str>> {
    query.split('&').filter_map(move |pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key) == name).then(|| decoded(value))
    })
}

/// Percent-decoding (RFC 3986 section 2.1); what is not well-formed stays as it is.
pub(in crate::filter) fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return text.into();
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let digits = after.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        let digits = digits.filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned().into()
}

/// All cookies of that name (RFC 6265 section 4.2).
fn cookies<'r>(parts: &'r request::Parts, name: &str) -> Vec<&'r str> {
    values(&parts.headers, &COOKIE)
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| value.trim_matches('"'))
        .collect()
}

/// The request's path without a parameter of its query.
pub(in crate::filter) fn without_parameter(path_and_query: &str, name: &str) -> String {
    let Some((path, query)) = path_and_query.split_once('?') else {
        return path_and_query.to_owned();
    };
    let is_other = |pair: &&str| decoded(pair.split('=').next().unwrap_or("")) != name;
    let rest: Vec<&str> = query.split('&').filter(is_other).collect();
    match rest.is_empty() {
        true => path.to_owned(),
        false => format!("{path}?{}", rest.join("&")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_what_stands_behind_its_prefix() {
        for (value, prefix, token) in [
            ("Bearer a.b.c", "Bearer ", Some("a.b.c")),
            ("bearer a.b.c", "Bearer ", None),
            ("Basic x, Bearer a.b.c", "Bearer ", Some("a.b.c")),
            ("jwt=a.b.c,d", "jwt=", Some("a.b.c,d")),
            ("a.b.c", "", Some("a.b.c")),
            ("Basic x", "Bearer ", None),
        ] {
            assert_eq!(behind(value, prefix), token, "{value}");
        }
    }

    #[test]
    fn a_parameter_is_found_and_taken_away() {
        let found: Vec<_> = parameters("a=1&t=x%2Ey&t=z", "t").collect();
        assert_eq!(found, ["x.y", "z"]);
        assert_eq!(parameters("a=1", "t").count(), 0);
        assert_eq!(without_parameter("/p?a=1&t=x&b=2&t=y", "t"), "/p?a=1&b=2");
        assert_eq!(without_parameter("/p?t=x", "t"), "/p");
        assert_eq!(without_parameter("/p", "t"), "/p");
    }
}
