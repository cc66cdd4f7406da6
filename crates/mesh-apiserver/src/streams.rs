//! Streaming subresources of pods: `exec`, `attach` and `portforward`, over WebSocket and, for older clients, over SPDY/3.1.
//!
//! The protocols are Kubernetes' own: `v5.channel.k8s.io` and `v4.channel.k8s.io` for commands, `portforward.k8s.io` for ports, also
//! with SPDY tunnelled through a WebSocket (`SPDY/3.1+portforward.k8s.io`). Commands run in the node agent ([`crate::node`]); this
//! module only carries bytes.

mod port_forward;
mod session;
mod spdy;
mod spdy_frame;
mod websocket;

use std::sync::Arc;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, Request, StatusCode, header};

use crate::node::{ExecRequest, NodeBackend, NodeError, NodeErrorKind};

pub(crate) const V5: &str = "v5.channel.k8s.io";
pub(crate) const V4: &str = "v4.channel.k8s.io";
pub(crate) const PORT_FORWARD: &str = "portforward.k8s.io";
pub(crate) const PORT_FORWARD_TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// How the client wants to stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    WebSocket,
    Spdy,
}

/// Answers `pods/exec` and `pods/attach`; `exec` has everything that the URL says.
pub(crate) async fn exec(
    node: Arc<dyn NodeBackend>,
    exec: ExecRequest,
    request: Request<Body>,
) -> Response {
    match transport(request.headers()) {
        Some(Transport::WebSocket) => websocket::exec(node, exec, request).await,
        Some(Transport::Spdy) => match choose(request.headers(), &[V4]) {
            // The command is started before the upgrade, so that a refusal is an ordinary answer.
            Some(_) => match node.exec(exec.clone()).await {
                Ok(session) => spdy::upgrade(request, V4, move |io| spdy::exec(io, session, exec)),
                Err(error) => refuse(&error),
            },
            None => bad_request(
                "none of the X-Stream-Protocol-Version offered is supported; this server has v4.channel.k8s.io",
            ),
        },
        None => bad_request(
            "you must specify at least 1 of stdin, stdout, stderr in an Upgrade: websocket or SPDY/3.1 request",
        ),
    }
}

/// Answers `pods/portforward`; `ports` are those of the query (kubectl names them in the streams instead).
pub(crate) async fn port_forward(
    node: Arc<dyn NodeBackend>,
    namespace: String,
    pod: String,
    ports: Vec<u16>,
    request: Request<Body>,
) -> Response {
    let target = port_forward::Target {
        node,
        namespace,
        pod,
    };
    match transport(request.headers()) {
        Some(Transport::WebSocket) => websocket::port_forward(target, ports, request).await,
        Some(Transport::Spdy) => match choose(request.headers(), &[PORT_FORWARD]) {
            Some(_) => spdy::upgrade(request, PORT_FORWARD, move |io| {
                port_forward::serve(io, target)
            }),
            None => bad_request(
                "none of the X-Stream-Protocol-Version offered is supported; this server has portforward.k8s.io",
            ),
        },
        None => bad_request("port forwarding needs an Upgrade: websocket or SPDY/3.1 request"),
    }
}

fn transport(headers: &HeaderMap) -> Option<Transport> {
    let upgrade = headers.get(header::UPGRADE)?.to_str().ok()?;
    if upgrade.eq_ignore_ascii_case("websocket") {
        Some(Transport::WebSocket)
    } else if upgrade.eq_ignore_ascii_case("SPDY/3.1") {
        Some(Transport::Spdy)
    } else {
        None
    }
}

/// The first of `supported` that the client offers. A client that offers nothing takes the first (so do kubectl's oldest versions).
fn choose(headers: &HeaderMap, supported: &[&'static str]) -> Option<&'static str> {
    let offered: Vec<&str> = headers
        .get_all("x-stream-protocol-version")
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
        .collect();
    if offered.is_empty() {
        return supported.first().copied();
    }
    supported.iter().find(|s| offered.contains(*s)).copied()
}

/// A `Status` for what the node agent refused.
fn refuse(error: &NodeError) -> Response {
    let (code, reason) = match error.kind {
        NodeErrorKind::NotFound => (StatusCode::NOT_FOUND, "NotFound"),
        NodeErrorKind::BadRequest => (StatusCode::BAD_REQUEST, "BadRequest"),
        NodeErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
    };
    status(code, reason, &error.message)
}

fn bad_request(message: &str) -> Response {
    status(StatusCode::BAD_REQUEST, "BadRequest", message)
}

fn status(code: StatusCode, reason: &str, message: &str) -> Response {
    let body = serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code.as_u16(),
    });
    (code, axum::Json(body)).into_response()
}
