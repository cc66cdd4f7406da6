//! Answers that the proxy gives itself, with Envoy's texts.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use http::{HeaderValue, Response, StatusCode};

use crate::body::ResponseBody;
use crate::report::{Flag, Flags, Report};

/// Body where no endpoint is usable.
pub const NO_HEALTHY: &str = "no healthy upstream";
/// Body where the route's timeout is over.
pub const TIMEOUT: &str = "upstream request timeout";
/// Body where a stream was silent too long.
pub const STREAM_TIMEOUT: &str = "stream timeout";

/// Body where the request did not arrive in time.
pub const REQUEST_TIMEOUT: &str = "request timeout";
/// Body where an exchange lasted too long.
pub const DURATION_TIMEOUT: &str = "downstream duration timeout";

/// Body where connecting failed, or the connection broke before response headers.
pub fn disconnect(reason: &str, retried: bool) -> String {
    let latest = if retried {
        "retried and the latest "
    } else {
        ""
    };
    format!(
        "upstream connect error or disconnect/reset before headers. {latest}reset reason: {reason}"
    )
}

/// A local reply; its report is recorded when it has been sent.
pub fn local(
    status: StatusCode,
    body: impl Into<Bytes>,
    flags: impl Into<Flags>,
    report: Box<Report>,
) -> Response<ResponseBody> {
    with_grpc_status(status, body, flags, None, report)
}

/// The same; gRPC callers get this status, where one is given.
pub fn with_grpc_status(
    status: StatusCode,
    body: impl Into<Bytes>,
    flags: impl Into<Flags>,
    grpc_status: Option<u16>,
    mut report: Box<Report>,
) -> Response<ResponseBody> {
    let body: Bytes = body.into();
    report.code = status.as_u16();
    report.flags.add(flags);
    report.response_bytes = body.len() as u64;
    if report.is_grpc {
        return grpc(status, grpc_status, &body, report);
    }
    let text = !body.is_empty();
    let mut response = Response::new(ResponseBody::local(text.then_some(body), report));
    *response.status_mut() = status;
    if text {
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    }
    response
}

/// Makes an answer of ours one to HEAD: its length is told, its body is not sent (RFC 9110 section 9.3.2).
pub fn leave_out_body(response: &mut Response<ResponseBody>) {
    let length = response.body_mut().leave_out();
    // Never with 204 (RFC 9110 section 8.6).
    if let Some(length) = length.filter(|_| response.status() != StatusCode::NO_CONTENT) {
        response
            .headers_mut()
            .entry(CONTENT_LENGTH)
            .or_insert_with(|| HeaderValue::from(length));
    }
}

/// gRPC callers get a headers-only answer (gRPC over HTTP/2, "Responses"; mapping of statuses as Envoy's).
fn grpc(
    status: StatusCode,
    grpc_status: Option<u16>,
    body: &Bytes,
    mut report: Box<Report>,
) -> Response<ResponseBody> {
    let code = grpc_status.unwrap_or(match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    });
    report.code = 200;
    report.grpc = Some(code);
    let mut response = Response::new(ResponseBody::local(None, report));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(code));
    // Our own texts; nothing of a peer is in them that is not percent-encoded by being dropped.
    if let Ok(message) = HeaderValue::from_bytes(body) {
        headers.insert("grpc-message", message);
    }
    response
}

/// A redirect.
pub fn redirect(status: StatusCode, location: &str, report: Box<Report>) -> Response<ResponseBody> {
    match HeaderValue::from_str(location) {
        Ok(value) => {
            let mut response = local(status, Bytes::new(), Flags::NONE, report);
            response.headers_mut().insert(LOCATION, value);
            response
        }
        Err(_) => local(
            StatusCode::BAD_REQUEST,
            Bytes::new(),
            Flag::BadRequest,
            report,
        ),
    }
}
