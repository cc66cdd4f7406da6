//! Endpoints with bodies of many kinds.

use std::collections::BTreeMap;
use std::io::Write as _;

use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE, URL_SAFE_NO_PAD};
use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use http::header::{ACCEPT, ACCEPT_RANGES, CONTENT_ENCODING, CONTENT_RANGE, ETAG, RANGE};
use http::{HeaderMap, Method, StatusCode, Uri};
use rand::{RngCore as _, SeedableRng as _};
use serde_json::{Value, json};

use super::{Shared, Style, inspect, number, pretty, refuse, typed};
use crate::serve::Peer;

/// Most bytes of a made body.
pub(super) const MOST_BYTES: u64 = 100 * 1024;

pub(super) const INDEX: &str = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>httpbin</title></head>\n\
<body><h1>httpbin</h1><p>Shows requests and makes responses to order.</p><ul>\n\
<li><a href=\"/get\">/get</a>, /post, /put, /patch, /delete, <a href=\"/anything\">/anything</a>: the request as JSON</li>\n\
<li><a href=\"/headers\">/headers</a>, <a href=\"/ip\">/ip</a>, <a href=\"/user-agent\">/user-agent</a>, \
<a href=\"/cookies\">/cookies</a>, <a href=\"/hostname\">/hostname</a>: parts of it</li>\n\
<li>/status/CODE, /delay/SECONDS, /redirect/COUNT, <a href=\"/unstable\">/unstable</a>: how to answer</li>\n\
<li>/bytes/COUNT, /stream/COUNT, <a href=\"/drip\">/drip</a>, /range/COUNT, <a href=\"/gzip\">/gzip</a>, \
<a href=\"/json\">/json</a>, <a href=\"/html\">/html</a>, <a href=\"/image/png\">/image/png</a>: what to answer</li>\n\
</ul></body></html>\n";

pub(super) const HTML: &str = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>A page</title></head>\n\
<body><h1>On proxies</h1><p>A proxy is a guest at every table and the host of none: what it is told it passes on, \
and what it keeps it keeps for the next who asks.</p></body></html>\n";

pub(super) const UTF8: &str = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>UTF-8</title></head>\n\
<body><h1>UTF-8</h1><p>ASCII, Größe, ça va, ελληνικά, кириллица, עברית, العربية, हिन्दी, ไทย, 日本語, 한국어, ∮ E⋅da = Q, ☃, 🦀</p>\
</body></html>\n";

pub(super) const XML: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<shelf>\n  <book pages=\"200\">\n    \
<title>The Comedy of Errors</title>\n    <author>William Shakespeare</author>\n  </book>\n</shelf>\n";

pub(super) const SVG: &str = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 100 100\">\
<rect width=\"100\" height=\"100\" fill=\"#23405f\"/><circle cx=\"50\" cy=\"50\" r=\"30\" fill=\"#e9c46a\"/></svg>\n";

pub(super) const FORM: &str = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Form</title></head>\n\
<body><form method=\"post\" action=\"/post\"><p><label>Name <input name=\"custname\"></label></p>\
<p><label>Telephone <input name=\"custtel\" type=\"tel\"></label></p>\
<p><label>E-mail <input name=\"custemail\" type=\"email\"></label></p>\
<p><label>Comments <textarea name=\"comments\"></textarea></label></p><p><button>Send</button></p></form></body></html>\n";

pub(super) async fn sample_json() -> Response {
    pretty(&json!({ "slideshow": {
        "title": "A slide show", "author": "httpbin", "date": "2026",
        "slides": [{ "type": "all", "title": "What comes in" }, { "type": "all", "title": "What goes out", "items": ["head", "body"] }],
    } }))
}

/// The seed that the arguments ask for, else a random one.
pub(super) fn seed(arguments: &BTreeMap<String, Vec<String>>) -> u64 {
    let seed = arguments.get("seed").and_then(|values| values.first());
    seed.and_then(|text| text.parse::<i64>().ok())
        .map_or_else(rand::random, i64::cast_unsigned)
}

/// Random bytes, the same for the same seed.
pub(super) fn noise(count: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(count.min(MOST_BYTES)).unwrap_or(0)];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

pub(super) async fn bytes(Path(count): Path<String>, RawQuery(query): RawQuery) -> Response {
    match number(&count, MOST_BYTES) {
        Ok(count) => {
            let seed = seed(&inspect::pairs(&query.unwrap_or_default()));
            typed("application/octet-stream", noise(count, seed))
        }
        Err(refusal) => refusal,
    }
}

/// The alphabet over and over, of which parts can be asked for (RFC 9110 section 14).
pub(super) async fn range(Path(count): Path<String>, headers: HeaderMap) -> Response {
    let count = match number(&count, MOST_BYTES) {
        Ok(count) => count,
        Err(refusal) => return refusal,
    };
    let all: Vec<u8> = (b'a'..=b'z')
        .cycle()
        .zip(0..count)
        .map(|(letter, _)| letter)
        .collect();
    let marks = [
        (ETAG, format!("\"range{count}\"")),
        (ACCEPT_RANGES, "bytes".into()),
    ];
    let Some(asked) = headers.get(RANGE).and_then(|value| value.to_str().ok()) else {
        return (marks, typed("application/octet-stream", all)).into_response();
    };
    match part(asked, count) {
        Some((first, last)) => {
            let body = all
                [usize::try_from(first).unwrap_or(0)..=usize::try_from(last).unwrap_or(0)]
                .to_vec();
            let place = [(CONTENT_RANGE, format!("bytes {first}-{last}/{count}"))];
            (
                StatusCode::PARTIAL_CONTENT,
                marks,
                place,
                typed("application/octet-stream", body),
            )
                .into_response()
        }
        None => {
            let place = [(CONTENT_RANGE, format!("bytes */{count}"))];
            (StatusCode::RANGE_NOT_SATISFIABLE, marks, place).into_response()
        }
    }
}

/// First and last position of `bytes=A-B`, `A-` or `-LENGTH` in a body of `count` bytes.
fn part(asked: &str, count: u64) -> Option<(u64, u64)> {
    let (first, last) = asked.strip_prefix("bytes=")?.split_once('-')?;
    let end = count.checked_sub(1)?;
    let (first, last) = match (first.trim(), last.trim()) {
        ("", length) => (
            count.saturating_sub(length.parse().ok().filter(|length| *length > 0)?),
            end,
        ),
        (first, "") => (first.parse().ok()?, end),
        (first, last) => (first.parse().ok()?, last.parse::<u64>().ok()?.min(end)),
    };
    (first <= last).then_some((first, last))
}

pub(super) async fn gzip(
    State(style): State<Shared>,
    peer: Peer,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let text = marked("gzipped", *style, peer, &method, &uri, &headers);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoded(
        "gzip",
        encoder
            .write_all(text.as_bytes())
            .and_then(|()| encoder.finish()),
    )
}

pub(super) async fn deflate(
    State(style): State<Shared>,
    peer: Peer,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let text = marked("deflated", *style, peer, &method, &uri, &headers);
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoded(
        "deflate",
        encoder
            .write_all(text.as_bytes())
            .and_then(|()| encoder.finish()),
    )
}

fn marked(
    mark: &str,
    style: Style,
    peer: Peer,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
) -> String {
    let mut shown = inspect::describe(style, peer, method, uri, headers);
    shown.insert(mark.into(), json!(true));
    Value::Object(shown).to_string()
}

fn encoded(encoding: &'static str, body: std::io::Result<Vec<u8>>) -> Response {
    match body {
        Ok(body) => (
            [(CONTENT_ENCODING, encoding)],
            typed("application/json; charset=utf-8", body),
        )
            .into_response(),
        Err(error) => refuse(
            StatusCode::INTERNAL_SERVER_ERROR,
            &format!("compressing failed: {error}"),
        ),
    }
}

pub(super) async fn base64_decode(Path(value): Path<String>) -> Response {
    let engines = [&STANDARD, &URL_SAFE, &URL_SAFE_NO_PAD];
    match engines.iter().find_map(|engine| engine.decode(&value).ok()) {
        Some(decoded) => typed("text/plain; charset=utf-8", decoded),
        None => refuse(StatusCode::BAD_REQUEST, "the value is not base64"),
    }
}

pub(super) async fn base64_encode(Path(value): Path<String>) -> Response {
    typed("text/plain; charset=utf-8", URL_SAFE.encode(value))
}

/// The kind of image that the client prefers, of the two there are.
pub(super) async fn image(headers: HeaderMap) -> Response {
    let accept = headers
        .get(ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("*/*");
    if accept.contains("image/svg") {
        typed("image/svg+xml", SVG)
    } else if accept.contains("image/png") || accept.contains("image/*") || accept.contains("*/*") {
        png().await
    } else {
        refuse(
            StatusCode::NOT_ACCEPTABLE,
            "there are image/png and image/svg+xml",
        )
    }
}

pub(super) async fn png() -> Response {
    match draw() {
        Ok(body) => typed("image/png", body),
        Err(error) => refuse(
            StatusCode::INTERNAL_SERVER_ERROR,
            &format!("drawing failed: {error}"),
        ),
    }
}

/// Edge of the picture in pixels.
const EDGE: u32 = 64;

/// A disc on a ground, as PNG (ISO 15948): 8 bits a channel, no alpha, rows without a filter.
fn draw() -> std::io::Result<Vec<u8>> {
    let mut pixels = ZlibEncoder::new(Vec::new(), Compression::default());
    for y in 0..EDGE {
        pixels.write_all(&[0])?;
        for x in 0..EDGE {
            let distance = (x.abs_diff(EDGE / 2)).pow(2) + (y.abs_diff(EDGE / 2)).pow(2);
            pixels.write_all(if distance < 400 {
                &[0xe9, 0xc4, 0x6a]
            } else {
                &[0x23, 0x40, 0x5f]
            })?;
        }
    }
    let mut header = Vec::new();
    header.extend(EDGE.to_be_bytes());
    header.extend(EDGE.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    let mut picture = b"\x89PNG\r\n\x1a\n".to_vec();
    chunk(&mut picture, b"IHDR", &header);
    chunk(&mut picture, b"IDAT", &pixels.finish()?);
    chunk(&mut picture, b"IEND", &[]);
    Ok(picture)
}

fn chunk(picture: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    let mut sum = flate2::Crc::new();
    sum.update(kind);
    sum.update(data);
    picture.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    picture.extend(kind);
    picture.extend(data);
    picture.extend(sum.sum().to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_cut_to_the_body() {
        for (asked, expected) in [
            ("bytes=0-9", Some((0, 9))),
            ("bytes=90-", Some((90, 99))),
            ("bytes=-10", Some((90, 99))),
            ("bytes=-1000", Some((0, 99))),
            ("bytes=50-1000", Some((50, 99))),
            ("bytes=100-", None),
            ("bytes=5-1", None),
            ("bytes=-0", None),
            ("lines=0-1", None),
            ("bytes=x-y", None),
        ] {
            assert_eq!(part(asked, 100), expected, "{asked}");
        }
        assert_eq!(part("bytes=0-0", 0), None);
    }

    #[test]
    fn noise_depends_on_the_seed_alone() {
        assert_eq!(noise(32, 7), noise(32, 7));
        assert_ne!(noise(32, 7), noise(32, 8));
        assert_eq!(noise(u64::MAX, 1).len() as u64, MOST_BYTES);
    }
}
