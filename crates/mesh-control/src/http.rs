//! Readiness, version, metrics, and the debug pages.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::{ConnectInfo, Query, Request, State as Extract};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;

use crate::ControlError;
use crate::ending::Announced;
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::publish::Shared;
use crate::serving::Certificate;

/// What the pages show.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) nodes: Nodes,
    pub(crate) shared: Arc<Shared>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) certificate: Certificate,
    pub(crate) version: String,
    pub(crate) ending: Announced,
}

/// `/ready` for everyone, debug pages for the loopback address only: they show the whole configuration.
pub(crate) fn main_router(state: State) -> Router {
    let debug = Router::new()
        .route(
            "/debug/syncz",
            get(async |Extract(state): Extract<State>| Json(state.nodes.syncz())),
        )
        .route(
            "/debug/adsz",
            get(async |Extract(state): Extract<State>| Json(state.nodes.adsz())),
        )
        .route("/debug/config_dump", get(config_dump))
        .layer(from_fn(loopback_only));
    Router::new()
        .route("/ready", get(ready))
        .route("/version", get(version))
        .merge(debug)
        .with_state(state)
}

/// `/metrics`, `/version`, `/ready`.
pub(crate) fn monitoring_router(state: State) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .route("/ready", get(ready))
        .with_state(state)
}

/// Serves until the listener fails.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    what: &'static str,
) -> Result<(), ControlError> {
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let result = axum::serve(listener, service).await;
    Err(ControlError::Serve {
        what,
        reason: result
            .err()
            .map_or("ended".to_owned(), |error| error.to_string()),
    })
}

async fn ready(Extract(state): Extract<State>) -> Response {
    if state.ending.has_begun() {
        return not_ready("the control plane ends; another one takes over");
    }
    if !state.shared.ready() {
        return not_ready("the cluster's objects are still being read");
    }
    if state.certificate.config().is_none() {
        return not_ready("the webhooks have no certificate yet");
    }
    (StatusCode::OK, "ready\n").into_response()
}

fn not_ready(why: &str) -> Response {
    (
        StatusCode::SERVICE_UNAVAILABLE,
        format!("not ready: {why}\n"),
    )
        .into_response()
}

async fn version(Extract(state): Extract<State>) -> String {
    format!("{}\n", state.version)
}

async fn metrics(Extract(state): Extract<State>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], state.metrics.text())
}

#[derive(Deserialize)]
struct Dump {
    #[serde(rename = "proxyID", default)]
    proxy: String,
}

async fn config_dump(Extract(state): Extract<State>, Query(dump): Query<Dump>) -> Response {
    if dump.proxy.is_empty() {
        let text =
            "name the proxy: /debug/config_dump?proxyID=POD.NAMESPACE; /debug/syncz lists them\n";
        return (StatusCode::BAD_REQUEST, text).into_response();
    }
    // Making the JSON of a large configuration takes a while.
    let nodes = state.nodes.clone();
    let name = dump.proxy.clone();
    match tokio::task::spawn_blocking(move || nodes.config_dump(&name)).await {
        Ok(Some(shown)) => Json(shown).into_response(),
        Ok(None) => {
            let error = format!(
                "proxy {:?} is not connected; /debug/syncz lists those that are",
                dump.proxy
            );
            (StatusCode::NOT_FOUND, Json(json!({ "error": error }))).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Lets only clients on the loopback address in, and only under a loopback name: a web page that rebinds its own name to
/// 127.0.0.1 comes with that name in `Host`.
async fn loopback_only(
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    request: Request,
    next: Next,
) -> Response {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let local_name = matches!(name, "localhost" | "127.0.0.1" | "::1");
    if !peer.ip().to_canonical().is_loopback()
        || !local_name
        || headers.contains_key(header::ORIGIN)
    {
        let text = "debug pages are served on the loopback address only, for instance through kubectl exec or port-forward\n";
        return (StatusCode::FORBIDDEN, text).into_response();
    }
    next.run(request).await
}
