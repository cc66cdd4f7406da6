//! `ext-authz`: an external authorization service over HTTP and gRPC, with the flags, ports, headers and texts of the field's sample of
//! that name. It lets pass what has the header `x-ext-authz: allow`, and without that header whom a certificate names as the service
//! account that it was told.

use std::process::ExitCode;

use anyhow::Context as _;
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::{BufMut, Bytes, BytesMut};
use envoy_types::pb::envoy::config::core::v3::{HeaderValue as PbHeader, HeaderValueOption};
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{
    CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse,
};
use envoy_types::pb::envoy::r#type::v3::{HttpStatus, StatusCode as PbStatus};
use envoy_types::pb::google::rpc::Status;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;

use crate::serve;

const CHECK: HeaderName = HeaderName::from_static("x-ext-authz");
const ALLOW: &str = "allow";
const RESULT: HeaderName = HeaderName::from_static("x-ext-authz-check-result");
const RECEIVED: HeaderName = HeaderName::from_static("x-ext-authz-check-received");
const OVERRIDE: HeaderName = HeaderName::from_static("x-ext-authz-additional-header-override");
const GRPC_OVERRIDE: &str = "grpc-additional-header-override-value";
const REFUSAL: &str =
    "denied by ext_authz for not found header `x-ext-authz: allow` in the request";
/// Longer questions are refused.
const LONGEST: usize = 1 << 20;
/// What was received is told back up to this, so that proxies take the header.
const MOST_TOLD: usize = 60_000;
/// gRPC's PERMISSION_DENIED and INVALID_ARGUMENT.
const PERMISSION_DENIED: i32 = 7;
const INVALID_ARGUMENT: u16 = 3;

/// What it was told, as flags with one dash or two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Port for HTTP.
    pub http: u16,
    /// Port for gRPC.
    pub grpc: u16,
    /// Service account that needs no header.
    pub service_account: String,
}

impl Settings {
    /// Reads the program's arguments.
    pub fn parse(args: &[String]) -> anyhow::Result<Self> {
        let mut settings = Self {
            http: 8000,
            grpc: 9000,
            service_account: "a".to_owned(),
        };
        for (name, value) in serve::flags(args)? {
            let port = || {
                value
                    .parse()
                    .with_context(|| format!("-{name} {value:?} is not a port number"))
            };
            match name {
                "http" => settings.http = port()?,
                "grpc" => settings.grpc = port()?,
                "allow_service_account" => value.clone_into(&mut settings.service_account),
                other => anyhow::bail!(
                    "ext-authz has no flag -{other}; it has -http PORT, -grpc PORT, -allow_service_account NAME"
                ),
            }
        }
        Ok(settings)
    }
}

/// The sample's entry point.
pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    let settings = Settings::parse(args)?;
    serve::block_on(async {
        let stop = serve::stop_signal()?;
        let grpc = grpc(settings.service_account);
        for (name, port, router) in [
            ("HTTP", settings.http, http()),
            ("gRPC", settings.grpc, grpc),
        ] {
            let listener = serve::listen(port).await?;
            serve::say(&format!("ext-authz listens on port {port} ({name})"));
            tokio::spawn(serve::serve_on(listener, router, std::future::pending()));
        }
        stop.await;
        Ok(())
    })
}

/// `ext-authz` as a command in the container.
pub(crate) fn applet(args: &[String]) -> ExitCode {
    match main(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ext-authz: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The HTTP service: any path is a question.
pub fn http() -> Router {
    Router::new()
        .fallback(answer)
        .layer(DefaultBodyLimit::max(LONGEST))
}

async fn answer(request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, LONGEST)
        .await
        .unwrap_or_default();
    let allowed = parts.headers.get(&CHECK).is_some_and(|v| v == ALLOW);
    let host = parts.headers.get(http::header::HOST);
    let received = format!(
        "{} {}{}, headers: {:?}, body: [{}]",
        parts.method,
        host.and_then(|host| host.to_str().ok()).unwrap_or(""),
        parts.uri,
        parts.headers,
        String::from_utf8_lossy(&body)
    );
    say(allowed, "HTTP", &received);
    let (status, result, text) = match allowed {
        true => (StatusCode::OK, "allowed", ""),
        false => (StatusCode::FORBIDDEN, "denied", REFUSAL),
    };
    let mut response = (status, text).into_response();
    let headers = response.headers_mut();
    headers.insert(RESULT, HeaderValue::from_static(result));
    let empty = HeaderValue::from_static("");
    let wanted = parts.headers.get(&OVERRIDE).unwrap_or(&empty);
    headers.insert(OVERRIDE, wanted.clone());
    if let Ok(received) = HeaderValue::try_from(told(received)) {
        headers.insert(RECEIVED, received);
    }
    response
}

fn say(allowed: bool, how: &str, received: &str) {
    let result = if allowed { "allowed" } else { "denied" };
    serve::say(&format!("[{how}][{result}]: {received}"));
}

fn told(received: String) -> String {
    match received.len() > MOST_TOLD {
        true => "<too-long>".to_owned(),
        false => received.replace(|c: char| c.is_control(), " "),
    }
}

/// The gRPC service (HTTP/2 with prior knowledge). `service_account` needs no header.
pub fn grpc(service_account: String) -> Router {
    Router::new()
        .route("/envoy.service.auth.v3.Authorization/Check", post(check))
        .layer(DefaultBodyLimit::max(LONGEST))
        .with_state(service_account)
}

async fn check(State(service_account): State<String>, body: Bytes) -> Response {
    let message = body.get(5..).unwrap_or_default();
    let Ok(question) = CheckRequest::decode(message) else {
        return reply(Bytes::new(), INVALID_ARGUMENT);
    };
    let answer = judge(&question, &service_account);
    let length = answer.encoded_len();
    let mut framed = BytesMut::with_capacity(5 + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // A buffer that grows takes any message.
    let _ = answer.encode(&mut framed);
    reply(framed.freeze(), 0)
}

/// The answer to a question.
pub fn judge(question: &CheckRequest, service_account: &str) -> CheckResponse {
    let attributes = question.attributes.as_ref();
    let http = attributes.and_then(|a| a.request.as_ref()?.http.as_ref());
    let header = http.and_then(|http| http.headers.get(CHECK.as_str()));
    let principal = attributes
        .and_then(|a| a.source.as_ref())
        .map(|s| &*s.principal);
    let allowed = match header {
        Some(value) => value == ALLOW,
        None => principal.is_some_and(|p| p.ends_with(&format!("/sa/{service_account}"))),
    };
    let received = attributes.map_or_else(String::new, |a| format!("{a:?}"));
    say(allowed, "gRPC", &received);
    let result = if allowed { "allowed" } else { "denied" };
    let headers = vec![
        option(&RESULT, result.to_owned()),
        option(&RECEIVED, told(received)),
        option(&OVERRIDE, GRPC_OVERRIDE.to_owned()),
    ];
    let http_response = match allowed {
        true => HttpResponse::OkResponse(OkHttpResponse {
            headers,
            ..OkHttpResponse::default()
        }),
        false => HttpResponse::DeniedResponse(DeniedHttpResponse {
            status: Some(HttpStatus {
                code: PbStatus::Forbidden as i32,
            }),
            headers,
            body: REFUSAL.to_owned(),
        }),
    };
    CheckResponse {
        status: Some(Status {
            code: if allowed { 0 } else { PERMISSION_DENIED },
            ..Status::default()
        }),
        dynamic_metadata: None,
        http_response: Some(http_response),
    }
}

fn option(name: &HeaderName, value: String) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(PbHeader {
            key: name.as_str().to_owned(),
            value,
            ..PbHeader::default()
        }),
        ..HeaderValueOption::default()
    }
}

fn reply(message: Bytes, status: u16) -> Response {
    let mut trailers = HeaderMap::new();
    let name = HeaderName::from_static("grpc-status");
    trailers.insert(name, HeaderValue::from(status));
    let body = Full::new(message).with_trailers(async move { Some(Ok(trailers)) });
    let mut response = (StatusCode::OK, Body::new(body)).into_response();
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
