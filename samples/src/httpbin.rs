//! `httpbin`: shows the request that arrived and makes responses to order, at the endpoints that the field knows.
//!
//! Shapes are go-httpbin's (header and argument values are lists); with [`Style::Plain`] they are the older Python
//! httpbin's (one string).

mod auth;
mod bodies;
mod caching;
mod inspect;
mod redirects;
mod timing;

use std::sync::Arc;

use axum::Router;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{any, delete, get, patch, post, put};
use http::header::{ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_ORIGIN, CONTENT_TYPE};
use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};

use crate::serve;

const PORT: u16 = 8080;

/// How values that may repeat are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// As lists (go-httpbin).
    Lists,
    /// As one string, joined by commas (Python httpbin).
    Plain,
}

/// Arguments of `mesh sample httpbin`.
#[derive(clap::Parser)]
#[command(no_binary_name = true)]
struct Args {
    /// Port to listen on.
    #[arg(long, short, env = "PORT", default_value_t = PORT)]
    port: u16,
    /// Show header and argument values as strings instead of lists.
    #[arg(long)]
    plain: bool,
}

pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    let args = <Args as clap::Parser>::try_parse_from(args)?;
    let style = if args.plain {
        Style::Plain
    } else {
        Style::Lists
    };
    serve::block_on(serve::serve("httpbin", args.port, router(style)))
}

/// What all handlers share.
type Shared = Arc<Style>;

/// All endpoints.
pub fn router(style: Style) -> Router {
    Router::new()
        .merge(inspecting())
        .merge(redirecting())
        .merge(content())
        .merge(timed())
        .with_state(Arc::new(style))
        .layer(axum::middleware::map_response(allow_any_origin))
}

fn inspecting() -> Router<Shared> {
    Router::new()
        .route("/get", get(inspect::without_body))
        .route("/head", get(inspect::without_body))
        .route("/post", post(inspect::with_body))
        .route("/put", put(inspect::with_body))
        .route("/patch", patch(inspect::with_body))
        .route("/delete", delete(inspect::with_body))
        .route("/anything", any(inspect::with_body))
        .route("/anything/{*path}", any(inspect::with_body))
        .route("/headers", get(inspect::headers))
        .route("/ip", get(inspect::ip))
        .route("/user-agent", get(inspect::user_agent))
        .route("/response-headers", get(inspect::response_headers))
        .route("/cookies", get(inspect::cookies))
        .route("/cookies/set", get(inspect::set_cookies))
        .route("/cookies/set/{name}/{value}", get(inspect::set_cookie))
        .route("/cookies/delete", get(inspect::delete_cookies))
        .route(
            "/hostname",
            get(async || pretty(&json!({ "hostname": serve::hostname() }))),
        )
        .route("/env", get(inspect::environment))
        .route("/basic-auth/{user}/{password}", get(auth::basic))
        .route(
            "/hidden-basic-auth/{user}/{password}",
            get(auth::hidden_basic),
        )
        .route("/bearer", get(auth::bearer))
}

fn redirecting() -> Router<Shared> {
    Router::new()
        .route("/redirect/{count}", get(redirects::relative))
        .route("/relative-redirect/{count}", get(redirects::relative))
        .route("/absolute-redirect/{count}", get(redirects::absolute))
        .route("/redirect-to", any(redirects::to))
        .route("/status/{codes}", any(redirects::status))
        .route("/unstable", get(redirects::unstable))
}

fn content() -> Router<Shared> {
    Router::new()
        .route("/", get(async || Html(bodies::INDEX)))
        .route("/bytes/{count}", get(bodies::bytes))
        .route("/range/{count}", get(bodies::range))
        .route("/gzip", get(bodies::gzip))
        .route("/deflate", get(bodies::deflate))
        .route("/base64/{value}", get(bodies::base64_decode))
        .route("/base64/decode/{value}", get(bodies::base64_decode))
        .route("/base64/encode/{value}", get(bodies::base64_encode))
        .route(
            "/uuid",
            get(async || pretty(&json!({ "uuid": uuid::Uuid::new_v4().to_string() }))),
        )
        .route("/json", get(bodies::sample_json))
        .route("/html", get(async || Html(bodies::HTML)))
        .route("/xml", get(async || typed("application/xml", bodies::XML)))
        .route("/encoding/utf8", get(async || Html(bodies::UTF8)))
        .route("/forms/post", get(async || Html(bodies::FORM)))
        .route(
            "/robots.txt",
            get(async || "User-agent: *\nDisallow: /deny\n"),
        )
        .route(
            "/deny",
            get(async || "This page asks robots to stay away.\n"),
        )
        .route("/image", get(bodies::image))
        .route(
            "/image/svg",
            get(async || typed("image/svg+xml", bodies::SVG)),
        )
        .route("/image/png", get(bodies::png))
        .route("/etag/{etag}", get(caching::etag))
        .route("/cache", get(caching::cache))
        .route("/cache/{seconds}", get(caching::cache_for))
}

fn timed() -> Router<Shared> {
    Router::new()
        .route("/delay/{seconds}", any(timing::delay))
        .route("/stream/{count}", get(timing::stream))
        .route("/stream-bytes/{count}", get(timing::stream_bytes))
        .route("/drip", get(timing::drip))
}

async fn allow_any_origin(mut response: Response) -> Response {
    response
        .headers_mut()
        .insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    response.headers_mut().insert(
        ACCESS_CONTROL_ALLOW_CREDENTIALS,
        HeaderValue::from_static("true"),
    );
    response
}

/// JSON for reading: indented, with a line's end.
fn pretty(value: &Value) -> Response {
    // A Value always has a text form.
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    typed("application/json; charset=utf-8", text)
}

fn typed(content_type: &'static str, body: impl IntoResponse) -> Response {
    let mut response = body.into_response();
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// An answer of go-httpbin's shape for errors.
fn refuse(status: StatusCode, detail: &str) -> Response {
    let error = status.canonical_reason().unwrap_or("Error");
    let body = pretty(&json!({ "status_code": status.as_u16(), "error": error, "detail": detail }));
    (status, body).into_response()
}

/// The number in a path, at most `most`.
fn number(text: &str, most: u64) -> Result<u64, Response> {
    match text.parse::<u64>() {
        Ok(number) => Ok(number.min(most)),
        Err(_) => Err(refuse(
            StatusCode::BAD_REQUEST,
            &format!("{text:?} is not a number"),
        )),
    }
}
