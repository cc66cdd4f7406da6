//! Endpoints that show the request.

use std::collections::BTreeMap;

use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, COOKIE, HOST, LOCATION, SET_COOKIE, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use serde_json::{Map, Value, json};

use super::{Shared, Style, pretty};
use crate::serve::Peer;

/// The request's head, in the field's shape.
pub(super) fn describe(
    style: Style,
    peer: Peer,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
) -> Map<String, Value> {
    let scheme = headers
        .get("x-forwarded-proto")
        .and_then(|value| value.to_str().ok())
        .unwrap_or("http");
    let host = authority(uri, headers);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut shown = Map::new();
    shown.insert(
        "args".into(),
        multi(style, pairs(uri.query().unwrap_or_default())),
    );
    shown.insert("headers".into(), header_values(style, uri, headers));
    if style == Style::Lists {
        shown.insert("method".into(), json!(method.as_str()));
    }
    shown.insert("origin".into(), json!(origin(peer, headers)));
    shown.insert("url".into(), json!(format!("{scheme}://{host}{path}")));
    shown
}

/// Host and port that the client asked for: the Host header, or HTTP/2's authority.
pub(super) fn authority(uri: &Uri, headers: &HeaderMap) -> String {
    let host = headers
        .get(HOST)
        .map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned());
    host.or_else(|| uri.authority().map(ToString::to_string))
        .unwrap_or_default()
}

/// The first hop that proxies report, else the peer.
fn origin(peer: Peer, headers: &HeaderMap) -> String {
    let forwarded = headers
        .get("x-forwarded-for")
        .and_then(|value| value.to_str().ok());
    let first = forwarded
        .and_then(|list| list.split(',').next())
        .map(|address| address.trim().to_owned());
    first.unwrap_or_else(|| peer.0.ip().to_string())
}

fn header_values(style: Style, uri: &Uri, headers: &HeaderMap) -> Value {
    let mut values: BTreeMap<String, Vec<String>> = BTreeMap::new();
    if !headers.contains_key(HOST) {
        values.insert("Host".into(), vec![authority(uri, headers)]);
    }
    for (name, value) in headers {
        let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
        values
            .entry(canonical(name.as_str()))
            .or_default()
            .push(text);
    }
    multi(style, values)
}

/// `x-request-id` as `X-Request-Id`, the way Go and Python show names.
fn canonical(name: &str) -> String {
    let mut upper = true;
    name.chars()
        .map(|letter| {
            let shown = if upper {
                letter.to_ascii_uppercase()
            } else {
                letter
            };
            upper = letter == '-';
            shown
        })
        .collect()
}

/// Values by name, in the style's shape.
fn multi(style: Style, values: BTreeMap<String, Vec<String>>) -> Value {
    let shown = |list: Vec<String>| match style {
        Style::Lists => json!(list),
        Style::Plain => json!(list.join(",")),
    };
    Value::Object(
        values
            .into_iter()
            .map(|(name, list)| (name, shown(list)))
            .collect(),
    )
}

/// The pairs of a query or of a form.
pub(super) fn pairs(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut pairs: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        pairs.entry(decode(name)).or_default().push(decode(value));
    }
    pairs
}

/// Undoes form encoding; what is not valid stays as it is.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while let Some(&byte) = bytes.get(index) {
        let digits = bytes
            .get(index + 1..index + 3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match (
            byte,
            digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()),
        ) {
            (b'%', Some(value)) => {
                decoded.push(value);
                index += 3;
                continue;
            }
            (b'+', _) => decoded.push(b' '),
            _ => decoded.push(byte),
        }
        index += 1;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

pub(super) async fn without_body(
    State(style): State<Shared>,
    peer: Peer,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    pretty(&Value::Object(describe(
        *style, peer, &method, &uri, &headers,
    )))
}

pub(super) async fn with_body(
    State(style): State<Shared>,
    peer: Peer,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let mut shown = describe(*style, peer, &method, &uri, &headers);
    let content_type = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let is_form = content_type.starts_with("application/x-www-form-urlencoded");
    let form = if is_form {
        pairs(&String::from_utf8_lossy(&body))
    } else {
        BTreeMap::new()
    };
    // Python's version leaves out of "data" what it understood as a form.
    let data = if is_form && *style == Style::Plain {
        String::new()
    } else {
        data(&body)
    };
    shown.insert("data".into(), json!(data));
    shown.insert("files".into(), json!({}));
    shown.insert("form".into(), multi(*style, form));
    shown.insert(
        "json".into(),
        serde_json::from_slice(&body).unwrap_or(Value::Null),
    );
    pretty(&Value::Object(shown))
}

/// A body as text, or as a data URL where it is none.
fn data(body: &[u8]) -> String {
    match std::str::from_utf8(body) {
        Ok(text) => text.into(),
        Err(_) => {
            let encoded = base64::engine::general_purpose::STANDARD.encode(body);
            format!("data:application/octet-stream;base64,{encoded}")
        }
    }
}

pub(super) async fn headers(State(style): State<Shared>, uri: Uri, headers: HeaderMap) -> Response {
    pretty(&json!({ "headers": header_values(*style, &uri, &headers) }))
}

pub(super) async fn ip(peer: Peer, headers: HeaderMap) -> Response {
    pretty(&json!({ "origin": origin(peer, &headers) }))
}

pub(super) async fn user_agent(headers: HeaderMap) -> Response {
    let agent = headers
        .get(USER_AGENT)
        .map(|agent| String::from_utf8_lossy(agent.as_bytes()).into_owned());
    pretty(&json!({ "user-agent": agent.unwrap_or_default() }))
}

pub(super) async fn response_headers(
    State(style): State<Shared>,
    RawQuery(query): RawQuery,
) -> Response {
    let wanted = pairs(&query.unwrap_or_default());
    let mut response = pretty(&multi(*style, wanted.clone()));
    for (name, values) in wanted {
        let Ok(name) = HeaderName::try_from(name) else {
            continue;
        };
        // A name that the answer has already (the content type) is replaced, not doubled.
        response.headers_mut().remove(&name);
        for value in values {
            if let Ok(value) = HeaderValue::try_from(value) {
                response.headers_mut().append(name.clone(), value);
            }
        }
    }
    response
}

pub(super) async fn cookies(headers: HeaderMap) -> Response {
    let mut cookies = Map::new();
    for pair in headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(';'))
    {
        if let Some((name, value)) = pair.trim().split_once('=') {
            cookies.insert(name.into(), json!(value));
        }
    }
    pretty(&json!({ "cookies": cookies }))
}

pub(super) async fn set_cookies(RawQuery(query): RawQuery) -> Response {
    let pairs = pairs(&query.unwrap_or_default());
    to_cookies(
        pairs
            .into_iter()
            .filter_map(|(name, values)| Some(format!("{name}={}; Path=/", values.first()?))),
    )
}

pub(super) async fn set_cookie(Path((name, value)): Path<(String, String)>) -> Response {
    to_cookies([format!("{name}={value}; Path=/")].into_iter())
}

pub(super) async fn delete_cookies(RawQuery(query): RawQuery) -> Response {
    let pairs = pairs(&query.unwrap_or_default());
    to_cookies(
        pairs
            .into_keys()
            .map(|name| format!("{name}=; Path=/; Max-Age=0")),
    )
}

fn to_cookies(set: impl Iterator<Item = String>) -> Response {
    let mut response = (StatusCode::FOUND, [(LOCATION, "/cookies")]).into_response();
    for value in set.filter_map(|cookie| HeaderValue::try_from(cookie).ok()) {
        response.headers_mut().append(SET_COOKIE, value);
    }
    response
}

/// Variables that begin as go-httpbin wants them, so that nothing secret shows.
pub(super) async fn environment() -> Response {
    let shown = std::env::vars().filter(|(name, _)| name.starts_with("HTTPBIN_ENV_"));
    pretty(&json!({ "env": shown.collect::<BTreeMap<_, _>>() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded_and_bad_escapes_kept() {
        let pairs = pairs("a=1&a=2&b+c=%C3%A9&d=%zz&e&%");
        assert_eq!(pairs["a"], ["1", "2"]);
        assert_eq!(pairs["b c"], ["é"]);
        assert_eq!(pairs["d"], ["%zz"]);
        assert_eq!(pairs["e"], [""]);
        assert_eq!(pairs["%"], [""]);
    }

    #[test]
    fn names_are_shown_as_the_field_shows_them() {
        assert_eq!(canonical("x-b3-traceid"), "X-B3-Traceid");
        assert_eq!(canonical("host"), "Host");
    }
}
