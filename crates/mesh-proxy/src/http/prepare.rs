//! The beginning of a request: its report, its peer, the headers that the connection manager sets.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use http::header::{CONTENT_TYPE, EXPECT};
use http::{HeaderMap, HeaderName, HeaderValue, Version, request};
use mesh_routing::Snapshot;
use mesh_routing::hcm::{HttpManager, RouteSource};
use mesh_routing::listener::Direction;
use mesh_routing::route::{RequestView, RouteTable};

use super::Exchange;
use super::client_cert::forward_client_cert;
use crate::listener::Downstream;
use crate::message;
use crate::node::{PEER_ID, PEER_METADATA};
use crate::report::{Flags, Flow, Report};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

pub(super) fn begin_report(connection: &Downstream, parts: &request::Parts) -> Box<Report> {
    let is_grpc = parts.headers.get(CONTENT_TYPE).is_some_and(|v| {
        let rest = v.as_bytes().strip_prefix(b"application/grpc");
        rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+')))
    });
    Box::new(Report {
        reports: connection.worker.unrouted.clone(),
        direction: connection.direction,
        peer: connection.worker.peers.unknown().clone(),
        principals: match connection.direction {
            Direction::Inbound => connection.principals.clone(),
            Direction::Outbound => None,
        },
        started: Instant::now(),
        code: 0,
        grpc: None,
        is_grpc,
        flags: Flags::NONE,
        response_bytes: 0,
        host: None,
        flow: Rc::new(Flow::default()),
    })
}

/// Takes the peer's metadata off the request. True if the peer speaks metadata exchange.
pub(super) fn exchange_in(
    connection: &Downstream,
    headers: &mut HeaderMap,
    report: &mut Report,
) -> bool {
    let id = headers.remove(PEER_ID);
    let metadata = headers.remove(PEER_METADATA);
    if connection.direction == Direction::Outbound {
        // From an application or a client outside: not to be believed.
        return false;
    }
    if let Some(metadata) = &metadata {
        report.peer = connection.worker.peers.of_header(metadata);
    }
    id.is_some()
}

/// Tells the peer who we are, or learns who the peer is.
pub(super) fn exchange_out(
    connection: &Downstream,
    headers: &mut HeaderMap,
    report: &mut Report,
    peer_exchange: bool,
) {
    let worker = &connection.worker;
    if connection.direction == Direction::Inbound {
        headers.remove(PEER_ID);
        headers.remove(PEER_METADATA);
        if peer_exchange {
            headers.insert(PEER_ID, worker.shared.identity.id_header.clone());
            headers.insert(
                PEER_METADATA,
                worker.shared.identity.metadata_header.clone(),
            );
        }
        return;
    }
    headers.remove(PEER_ID);
    if let Some(metadata) = headers.remove(PEER_METADATA) {
        report.peer = worker.peers.of_header(&metadata);
    }
}

pub(super) fn prepare_headers(
    connection: &Downstream,
    manager: &HttpManager,
    parts: &mut request::Parts,
) {
    let headers = &mut parts.headers;
    message::remove_hop_by_hop(headers);
    forward_client_cert(connection, manager, headers);
    if parts.version >= Version::HTTP_2 {
        message::join_cookies(headers);
    }
    if !manager.pass_continue {
        // Answered here as soon as the body is asked for (RFC 9110 section 10.1.1).
        headers.remove(EXPECT);
    }
    if manager.use_remote_address {
        message::remove_internal(headers);
        if !manager.skip_xff_append {
            message::append_forwarded_for(headers, connection.remote.ip());
        }
        if manager.trusted_hops == 0 || !headers.contains_key(FORWARDED_PROTO) {
            headers.insert(FORWARDED_PROTO, connection_scheme(connection));
        }
        if !manager.preserve_request_id {
            headers.remove(REQUEST_ID);
        }
    } else {
        if headers
            .keys()
            .any(|name| name.as_str().starts_with("x-envoy-"))
            && !message::is_internal(headers, manager)
        {
            message::remove_controls(headers);
        }
        if !headers.contains_key(FORWARDED_PROTO) {
            headers.insert(FORWARDED_PROTO, connection_scheme(connection));
        }
    }
    if manager.generate_request_id && !headers.contains_key(REQUEST_ID) {
        headers.insert(REQUEST_ID, request_id(connection));
    }
}

/// What the client sees, where no proxy before us has noted it.
fn connection_scheme(connection: &Downstream) -> HeaderValue {
    HeaderValue::from_static(match connection.tls {
        Some(_) => "https",
        None => "http",
    })
}

/// A random UUID (RFC 9562, version 4).
pub(super) fn request_id(connection: &Downstream) -> HeaderValue {
    let mut bytes = [0; 16];
    let (high, low) = bytes.split_at_mut(8);
    high.copy_from_slice(&connection.worker.random().to_be_bytes());
    low.copy_from_slice(&connection.worker.random().to_be_bytes());
    let id = uuid::Builder::from_random_bytes(bytes).into_uuid();
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let text = id.hyphenated().encode_lower(&mut text);
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""))
}

pub(super) fn route_table(snapshot: &Snapshot, manager: &HttpManager) -> Option<Arc<RouteTable>> {
    match &manager.routes {
        RouteSource::Rds(name) => snapshot.routes(name).cloned(),
        RouteSource::Inline(table) => Some(table.clone()),
    }
}

pub(crate) fn view<'a>(exchange: &'a Exchange, parts: &'a request::Parts) -> RequestView<'a> {
    RequestView {
        host: exchange.authority.to_str().unwrap_or(""),
        method: parts.method.as_str(),
        path_and_query: parts.uri.path_and_query().map_or("/", |p| p.as_str()),
        scheme: exchange.scheme,
        headers: &parts.headers,
        random: exchange.random,
    }
}

/// The scheme that the client sees, as the first proxy has noted it.
pub(super) fn scheme(headers: &HeaderMap) -> &'static str {
    match headers.get(FORWARDED_PROTO).map(HeaderValue::as_bytes) {
        Some(b"https") => "https",
        _ => "http",
    }
}
