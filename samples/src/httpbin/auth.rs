//! Endpoints that ask who is there.

use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, StatusCode};
use serde_json::json;

use super::pretty;

/// Whether the request carries these credentials (RFC 7617).
fn has_credentials(headers: &HeaderMap, user: &str, password: &str) -> bool {
    let value = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    value.split_once(' ').is_some_and(|(scheme, encoded)| {
        scheme.eq_ignore_ascii_case("basic")
            && encoded.trim() == STANDARD.encode(format!("{user}:{password}"))
    })
}

fn verdict(authorized: bool, user: &str, refusal: StatusCode) -> Response {
    let body =
        pretty(&json!({ "authenticated": authorized, "authorized": authorized, "user": user }));
    if authorized {
        body
    } else {
        (refusal, body).into_response()
    }
}

pub(super) async fn basic(
    Path((user, password)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let authorized = has_credentials(&headers, &user, &password);
    let answer = verdict(authorized, &user, StatusCode::UNAUTHORIZED);
    if authorized {
        answer
    } else {
        ([(WWW_AUTHENTICATE, "Basic realm=\"Fake Realm\"")], answer).into_response()
    }
}

/// As [`basic`], with 404 in place of the question.
pub(super) async fn hidden_basic(
    Path((user, password)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    verdict(
        has_credentials(&headers, &user, &password),
        &user,
        StatusCode::NOT_FOUND,
    )
}

pub(super) async fn bearer(headers: HeaderMap) -> Response {
    let value = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    match value
        .strip_prefix("Bearer ")
        .filter(|token| !token.is_empty())
    {
        Some(token) => pretty(&json!({ "authenticated": true, "token": token })),
        None => (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Bearer")]).into_response(),
    }
}
