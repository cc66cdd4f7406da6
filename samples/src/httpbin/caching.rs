//! Endpoints for conditional requests (RFC 9110 section 13).

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::header::{
    CACHE_CONTROL, ETAG, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use serde_json::Value;

use super::{Shared, inspect, number, pretty, refuse};
use crate::serve::Peer;

/// The tags in a list, without quotes and without the mark of weak ones.
fn lists(headers: &HeaderMap, name: HeaderName, etag: &str) -> Option<bool> {
    let value = headers.get(name)?.to_str().ok()?;
    let same = |tag: &str| tag == "*" || tag.trim_start_matches("W/").trim_matches('"') == etag;
    Some(value.split(',').any(|tag| same(tag.trim())))
}

pub(super) async fn etag(
    State(style): State<Shared>,
    Path(etag): Path<String>,
    peer: Peer,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let Ok(value) = HeaderValue::try_from(format!("\"{etag}\"")) else {
        return refuse(
            StatusCode::BAD_REQUEST,
            "the tag has characters that a header can't have",
        );
    };
    if lists(&headers, IF_NONE_MATCH, &etag) == Some(true) {
        return (StatusCode::NOT_MODIFIED, [(ETAG, value)]).into_response();
    }
    if lists(&headers, IF_MATCH, &etag) == Some(false) {
        return (StatusCode::PRECONDITION_FAILED, [(ETAG, value)]).into_response();
    }
    let body = pretty(&Value::Object(inspect::describe(
        *style, peer, &method, &uri, &headers,
    )));
    ([(ETAG, value)], body).into_response()
}

pub(super) async fn cache(
    State(style): State<Shared>,
    peer: Peer,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    if headers.contains_key(IF_MODIFIED_SINCE) || headers.contains_key(IF_NONE_MATCH) {
        return StatusCode::NOT_MODIFIED.into_response();
    }
    let body = pretty(&Value::Object(inspect::describe(
        *style, peer, &method, &uri, &headers,
    )));
    let marks = [
        (LAST_MODIFIED, "Thu, 01 Jan 2026 00:00:00 GMT"),
        (ETAG, "\"httpbin\""),
    ];
    (marks, body).into_response()
}

pub(super) async fn cache_for(
    State(style): State<Shared>,
    Path(seconds): Path<String>,
    peer: Peer,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    match number(&seconds, u64::from(u32::MAX)) {
        Ok(seconds) => {
            let body = pretty(&Value::Object(inspect::describe(
                *style, peer, &method, &uri, &headers,
            )));
            (
                [(CACHE_CONTROL, format!("public, max-age={seconds}"))],
                body,
            )
                .into_response()
        }
        Err(refusal) => refusal,
    }
}
