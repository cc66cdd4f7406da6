//! Checking and cleaning of messages: framing, authority, path, hop-by-hop fields (RFC 9110 section 7.6.1, RFC 9112).

use std::borrow::Cow;
use std::net::IpAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
    TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version, request};
use mesh_routing::hcm::{EscapedSlashes, HttpManager, Underscores};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// What [`remove_controls`] takes off.
const CONTROLS: [&str; 13] = [
    "x-envoy-retriable-status-codes",
    "x-envoy-retriable-header-names",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-ip-tags",
    "x-envoy-hedge-on-per-try-timeout",
];
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// A request that is not forwarded.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Answer with this status and close.
    Status(StatusCode),
    /// Redirect to the cleaned path.
    Redirect(String),
}

impl Refusal {
    const BAD: Self = Self::Status(StatusCode::BAD_REQUEST);
}

/// Checks a request and brings it into one canonical form; the answer is its authority. `two_lengths`: the bytes of the connection had
/// both kinds of length ([`crate::framing`]), of which the codec leaves only the transfer coding.
pub fn canonicalize(
    parts: &mut request::Parts,
    manager: &HttpManager,
    two_lengths: bool,
) -> Result<HeaderValue, Refusal> {
    check_version(parts, manager)?;
    check_framing(&parts.headers, parts.version, two_lengths)?;
    check_names(&mut parts.headers, manager)?;
    let authority = authority(parts, manager)?;
    normalize(parts, manager)?;
    Ok(authority)
}

fn check_version(parts: &request::Parts, manager: &HttpManager) -> Result<(), Refusal> {
    // HTTP/1.0 is an option in Envoy, too (accept_http_10).
    if parts.version < Version::HTTP_11 && !manager.http10 {
        return Err(Refusal::Status(StatusCode::UPGRADE_REQUIRED));
    }
    Ok(())
}

/// What the codec lets through and RFC 9112 section 6 forbids: any transfer coding but one `chunked`, and both kinds of length.
fn check_framing(headers: &HeaderMap, version: Version, two_lengths: bool) -> Result<(), Refusal> {
    if two_lengths {
        return Err(Refusal::BAD);
    }
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next() {
        let plain = coding.as_bytes().eq_ignore_ascii_case(b"chunked") && codings.next().is_none();
        if !plain || version >= Version::HTTP_2 {
            return Err(Refusal::BAD);
        }
    }
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    match (lengths.next(), lengths.next()) {
        (Some(length), None) if length.as_bytes().iter().all(u8::is_ascii_digit) => Ok(()),
        (None, _) => Ok(()),
        _ => Err(Refusal::BAD),
    }
}

fn check_names(headers: &mut HeaderMap, manager: &HttpManager) -> Result<(), Refusal> {
    if manager.underscores == Underscores::Allow {
        return Ok(());
    }
    let bad: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().contains('_'))
        .cloned()
        .collect();
    if !bad.is_empty() && manager.underscores == Underscores::Reject {
        return Err(Refusal::BAD);
    }
    bad.iter().for_each(|name| {
        headers.remove(name);
    });
    Ok(())
}

/// One authority for routing and upstream alike: that of the target (absolute form, `:authority`) beats `Host`
/// (RFC 9112 section 3.2.2); two different ones of the same rank are refused.
fn authority(parts: &mut request::Parts, manager: &HttpManager) -> Result<HeaderValue, Refusal> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let (host, second) = (hosts.next().cloned(), hosts.next().is_some());
    if second {
        return Err(Refusal::BAD);
    }
    let target = match parts.uri.authority() {
        Some(authority) if authority.as_str().contains('@') => return Err(Refusal::BAD),
        Some(authority) => {
            Some(HeaderValue::from_str(authority.as_str()).map_err(|_| Refusal::BAD)?)
        }
        None => None,
    };
    if parts.version >= Version::HTTP_2
        && let (Some(target), Some(host)) = (&target, &host)
        && !target.as_bytes().eq_ignore_ascii_case(host.as_bytes())
    {
        return Err(Refusal::BAD);
    }
    let replace = target.is_some();
    let authority = target.or(host).ok_or(Refusal::BAD)?;
    let text = authority.to_str().map_err(|_| Refusal::BAD)?;
    if text.is_empty()
        || text
            .bytes()
            .any(|b| b.is_ascii_whitespace() || b"@/?#\\,".contains(&b))
    {
        return Err(Refusal::BAD);
    }
    let cut = strip(text, manager);
    let authority = match cut {
        Cow::Borrowed(same) if same.len() == text.len() && !replace => return Ok(authority),
        cut => HeaderValue::from_str(&cut).map_err(|_| Refusal::BAD)?,
    };
    if parts.version < Version::HTTP_2 {
        parts.headers.insert(HOST, authority.clone());
    }
    Ok(authority)
}

fn strip<'a>(host: &'a str, manager: &HttpManager) -> Cow<'a, str> {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => (name, Some(port)),
        _ => (host, None),
    };
    let name = if manager.strip_dot {
        name.strip_suffix('.').unwrap_or(name)
    } else {
        name
    };
    match port {
        Some(port) if !manager.strip_port && name.len() + port.len() + 1 < host.len() => {
            Cow::Owned(format!("{name}:{port}"))
        }
        Some(_) if !manager.strip_port => Cow::Borrowed(host),
        _ => Cow::Borrowed(name),
    }
}

fn normalize(parts: &mut request::Parts, manager: &HttpManager) -> Result<(), Refusal> {
    let path = parts.uri.path();
    if parts.method == Method::CONNECT && path.is_empty() {
        return Ok(());
    }
    if !path.starts_with('/') {
        // `*` belongs to OPTIONS (RFC 9110 section 9.3.7); an empty path in absolute form is `/`.
        let ok = path == "*" && parts.method == Method::OPTIONS;
        return if ok { Ok(()) } else { Err(Refusal::BAD) };
    }
    let new = normalized(path, manager)?;
    if new == path {
        return Ok(());
    }
    let redirect = manager.escaped_slashes == EscapedSlashes::Redirect && has_escaped_slash(path);
    let query = parts
        .uri
        .query()
        .map(|q| format!("?{q}"))
        .unwrap_or_default();
    let full = format!("{new}{query}");
    if redirect {
        return Err(Refusal::Redirect(full));
    }
    parts.uri = with_path(&parts.uri, &full).ok_or(Refusal::BAD)?;
    Ok(())
}

fn has_escaped_slash(path: &str) -> bool {
    path.as_bytes()
        .windows(3)
        .any(|w| w.eq_ignore_ascii_case(b"%2f") || w.eq_ignore_ascii_case(b"%5c"))
}

/// Escaped slashes, dot segments, backslashes and double slashes, as far as the manager says.
fn normalized<'a>(path: &'a str, manager: &HttpManager) -> Result<Cow<'a, str>, Refusal> {
    let mut path = Cow::Borrowed(path);
    if manager.escaped_slashes != EscapedSlashes::Keep && has_escaped_slash(&path) {
        if manager.escaped_slashes == EscapedSlashes::Reject {
            return Err(Refusal::BAD);
        }
        path = Cow::Owned(unescape(&path, |byte| byte == b'/' || byte == b'\\'));
    }
    if manager.normalize_path {
        // Escapes of unreserved characters and dot segments (RFC 3986 sections 6.2.2.2 and 6.2.2.3); a backslash is a slash (WHATWG).
        if path.contains('%') {
            path = Cow::Owned(unescape(&path, |byte| {
                byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
            }));
        }
        if path.contains('\\') {
            path = Cow::Owned(path.replace('\\', "/"));
        }
        if path.contains("/.") {
            path = Cow::Owned(remove_dot_segments(&path));
        }
    }
    if manager.merge_slashes && path.contains("//") {
        let mut merged = String::with_capacity(path.len());
        path.chars().for_each(|c| {
            if c != '/' || !merged.ends_with('/') {
                merged.push(c);
            }
        });
        path = Cow::Owned(merged);
    }
    Ok(path)
}

/// Undoes escapes of the bytes that are `wanted`. A `%` that begins no escape stays, unless what is undone behind it would make it one:
/// then it becomes `%25`, so that nobody further on undoes an escape that nobody here has judged (`%%361` is not `%61`).
fn unescape(path: &str, wanted: impl Fn(u8) -> bool) -> String {
    let hex = |c: Option<char>| c.and_then(|c| c.to_digit(16));
    let mut out = String::with_capacity(path.len());
    let mut alone = Vec::new();
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let mut chars = escape.chars().skip(1);
        let byte = hex(chars.next())
            .zip(hex(chars.next()))
            .map(|(h, l)| (h * 16 + l) as u8);
        match byte.filter(|b| b.is_ascii() && wanted(*b)) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = escape.get(3..).unwrap_or("");
            }
            None => {
                if byte.is_none() {
                    alone.push(out.len());
                }
                out.push('%');
                rest = escape.get(1..).unwrap_or("");
            }
        }
    }
    out.push_str(rest);
    alone.retain(|&at| {
        let behind = out.as_bytes().get(at + 1..at + 3);
        behind.is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit))
    });
    if alone.is_empty() {
        return out;
    }
    let mut apart = String::with_capacity(out.len() + 2 * alone.len());
    let mut from = 0;
    for at in alone {
        apart.push_str(out.get(from..=at).unwrap_or_default());
        apart.push_str("25");
        from = at + 1;
    }
    apart.push_str(out.get(from..).unwrap_or_default());
    apart
}

fn remove_dot_segments(path: &str) -> String {
    let mut out: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    out.pop();
                }
                if last {
                    out.push("");
                }
            }
            other => out.push(other),
        }
    }
    format!("/{}", out.join("/"))
}

/// The URI with another path and query.
pub fn with_path(uri: &Uri, path_and_query: &str) -> Option<Uri> {
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(path_and_query).ok()?);
    Uri::from_parts(parts).ok()
}

/// Removes what belongs to one connection only, and what `Connection` names.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse::<HeaderName>().ok())
            // These frame or address the message; a peer must not be able to have them cut away.
            .filter(|name| {
                *name != HOST
                    && *name != CONTENT_LENGTH
                    && !name.as_str().starts_with("x-forwarded-")
            })
            .collect();
        named.iter().for_each(|name| {
            headers.remove(name);
        });
        headers.remove(CONNECTION);
    }
    let trailers = headers
        .get(TE)
        .is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    for name in [
        &KEEP_ALIVE,
        &PROXY_CONNECTION,
        &TRANSFER_ENCODING,
        &UPGRADE,
        &PROXY_AUTHENTICATE,
        &PROXY_AUTHORIZATION,
    ] {
        headers.remove(name);
    }
    if !trailers {
        headers.remove(TE);
    }
    if headers.contains_key(TRAILER) && !trailers {
        headers.remove(TRAILER);
    }
}

/// Appends to a header that is a list, in one line.
pub fn append_to_list(headers: &mut HeaderMap, name: &HeaderName, value: &HeaderValue) {
    // All lines of the name are one list (RFC 9110 section 5.3); dropping one would let a client hide what a proxy before us added.
    let mut all = Vec::new();
    for before in headers.get_all(name) {
        all.extend_from_slice(before.as_bytes());
        all.push(b',');
    }
    all.extend_from_slice(value.as_bytes());
    let joined = HeaderValue::from_bytes(&all).unwrap_or_else(|_| value.clone());
    headers.insert(name, joined);
}

/// Joins the pieces of the cookie header that HTTP/2 may send apart (RFC 9113 section 8.2.3).
pub fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(COOKIE).iter();
    if crumbs.next().is_none() || crumbs.next().is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(COOKIE, whole);
    }
}

/// Removes the headers by which only neighbours inside may steer how a request is sent (Envoy: `cleanInternalHeaders`).
pub fn remove_controls(headers: &mut HeaderMap) {
    for name in CONTROLS {
        headers.remove(name);
    }
}

/// Does a request come from inside, by Envoy's measure where the peer's address is not to be used: `x-forwarded-for` has exactly one
/// address, and that is one of those configured (of the private ones, where nothing is configured, as Envoy before 1.33)?
pub fn is_internal(headers: &HeaderMap, manager: &HttpManager) -> bool {
    let mut values = headers.get_all(&FORWARDED_FOR).iter();
    let (Some(only), None) = (values.next(), values.next()) else {
        return false;
    };
    let address = only.to_str().ok().and_then(|v| v.trim().parse().ok());
    if let (Some(ip), Some(ranges)) = (address, &manager.internal) {
        return ranges.iter().any(|range| range.contains(ip));
    }
    match address {
        Some(IpAddr::V4(ip)) => ip.is_private() || ip.is_loopback(),
        Some(IpAddr::V6(ip)) => ip.segments()[0] >> 8 == 0xfd || ip.is_loopback(),
        None => false,
    }
}

/// Appends the client to `x-forwarded-for`.
pub fn append_forwarded_for(headers: &mut HeaderMap, client: IpAddr) {
    if let Ok(value) = HeaderValue::from_str(&client.to_string()) {
        append_to_list(headers, &FORWARDED_FOR, &value);
    }
}

/// Removes the headers that only proxies inside may set; at the edge nobody is trusted to (A33).
pub fn remove_internal(headers: &mut HeaderMap) {
    let internal: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().starts_with("x-envoy-"))
        .cloned()
        .collect();
    internal.iter().for_each(|name| {
        headers.remove(name);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_segments_go() {
        for (path, expected) in [
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/../../x", "/x"),
            ("/a/..", "/"),
            ("/a/.", "/a/"),
            ("/a.b/.c", "/a.b/.c"),
        ] {
            assert_eq!(remove_dot_segments(path), expected, "{path}");
        }
    }

    #[test]
    fn every_line_of_a_list_is_kept() {
        let mut headers = HeaderMap::new();
        for value in ["1.1.1.1", "2.2.2.2"] {
            headers.append(FORWARDED_FOR, HeaderValue::from_static(value));
        }
        append_forwarded_for(&mut headers, "10.0.0.1".parse().unwrap());
        let lines: Vec<_> = headers.get_all(FORWARDED_FOR).iter().collect();
        assert_eq!(lines, ["1.1.1.1,2.2.2.2,10.0.0.1"]);
    }

    #[test]
    fn only_wanted_bytes_are_unescaped() {
        assert_eq!(
            unescape("/%41%2f%zz%4", |b| b.is_ascii_alphanumeric()),
            "/A%2f%zz%4"
        );
        assert_eq!(unescape("/%2Fx%5c", |b| b == b'/' || b == b'\\'), "//x\\");
    }

    #[test]
    fn nothing_undone_becomes_an_escape() {
        for (path, is) in [
            ("/%%361dmin", "/%2561dmin"),
            ("/x/%2%65%2%65/admin", "/x/%252e%252e/admin"),
            ("/admin%2%46x", "/admin%252Fx"),
            ("/%%%36%31", "/%%2561"),
            ("/%25%36%31", "/%2561"),
            ("/%%zz%3", "/%%zz%3"),
        ] {
            let undone = unescape(path, |b| b.is_ascii_alphanumeric() || b == b'.');
            assert_eq!(undone, is, "{path}");
            let again = unescape(&undone, |b| b.is_ascii_alphanumeric() || b == b'.');
            assert_eq!(again, is, "{path} is stable");
        }
    }

    #[test]
    fn connection_names_are_cut_but_not_framing() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "x-secret, content-length, host"),
            ("x-secret", "1"),
            ("content-length", "2"),
            ("host", "a"),
            ("te", "trailers"),
        ] {
            headers.insert(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
        }
        remove_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "host", "te"]);
    }
}
