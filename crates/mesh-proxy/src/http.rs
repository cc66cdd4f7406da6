//! The way of an HTTP request, as one function of numbered phases.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{CONNECTION, CONTENT_TYPE, HOST, SERVER, UPGRADE};
use http::uri::Scheme;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    request,
};
use hyper::body::{Body, Incoming};
use mesh_routing::Snapshot;
use mesh_routing::action::{Action, ClusterTarget, Forward, HostRewrite};
use mesh_routing::cluster::{Cluster, UpstreamProtocol};
use mesh_routing::hcm::{HttpManager, RouteSource, ServerHeader};
use mesh_routing::listener::Direction;
use mesh_routing::route::{Decision, Matched, RequestView, RouteTable};

use crate::attempt::{self, Failure, Outcome};
use crate::body::{InFlight, RequestBody, ResponseBody, UpstreamBody, grpc_status};
use crate::listener::Downstream;
use crate::message::{self, Refusal};
use crate::node::{PEER_ID, PEER_METADATA};
use crate::pool::Version as Upstream;
use crate::reply;
use crate::report::{Flag, Flow, Report};
use crate::upgrade::Asked;
use crate::upstream::ClusterState;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
/// How often the request was tried.
pub const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");
const EXPECTED_TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");

/// What the phases hand on.
pub struct Exchange {
    /// The connection it came on.
    pub connection: Rc<Downstream>,
    /// Request and response bodies' common knowledge.
    pub flow: Rc<Flow>,
    /// Authority, in canonical form.
    pub authority: HeaderValue,
    /// The request is gRPC.
    pub is_grpc: bool,
    /// Number that decides splits.
    pub random: u64,
}

/// Takes a request to its response. Never fails: what goes wrong is an answer, too.
pub async fn handle(
    connection: Rc<Downstream>,
    manager: Arc<HttpManager>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let last = connection.begin(&manager);
    let guard = InFlight(connection.clone());
    let http1 = request.version() < Version::HTTP_2;
    let mut response = forward(&connection, &manager, request).await;
    if last && http1 {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    } else if last {
        connection.end_gracefully();
    }
    response.body_mut().guard(guard);
    Ok(response)
}

async fn forward(
    connection: &Rc<Downstream>,
    manager: &Arc<HttpManager>,
    request: Request<Incoming>,
) -> Response<ResponseBody> {
    // 1. The request begins: one snapshot for all of it.
    let worker = connection.worker.clone();
    let snapshot = worker.snapshot();
    let (mut parts, body) = request.into_parts();
    let mut report = begin_report(connection, &parts);

    // 2. It is checked and brought into one form.
    let authority = match message::canonicalize(&mut parts, manager) {
        Ok(authority) => authority,
        Err(refusal) => return refuse(refusal, &parts, manager, report),
    };
    let peer_exchange = exchange_in(connection, &mut parts.headers, &mut report);
    let upgrade = Asked::take(&mut parts, manager);
    prepare_headers(connection, manager, &mut parts);
    if let Some(upgrade) = &upgrade {
        upgrade.announce(&mut parts.headers);
    }
    let exchange = Exchange {
        connection: connection.clone(),
        flow: report.flow.clone(),
        authority,
        is_grpc: report.is_grpc,
        random: worker.random(),
    };

    // 3. The route is found.
    let Some(table) = route_table(&snapshot, manager) else {
        return finish_local(
            reply::local(StatusCode::NOT_FOUND, "", Flag::NoRoute, report),
            manager,
        );
    };
    let matched = match decide(&table, &exchange, &parts) {
        Decision::Matched(matched) => matched,
        Decision::TlsRequired => {
            let location = format!(
                "https://{}{}",
                exchange.authority.to_str().unwrap_or(""),
                parts.uri.path()
            );
            return finish_local(
                reply::redirect(StatusCode::MOVED_PERMANENTLY, &location, report),
                manager,
            );
        }
        Decision::NoRoute => {
            return finish_local(
                reply::local(StatusCode::NOT_FOUND, "", Flag::NoRoute, report),
                manager,
            );
        }
    };
    let route = match &matched.route.action {
        Action::Forward(route) => route,
        other => {
            let mut response = answer(other, &matched, &exchange, &parts, report);
            matched.route.response_ops.apply(response.headers_mut());
            return finish_local(response, manager);
        }
    };

    // 4. The cluster is found, the request is rewritten for it.
    let view = view(&exchange, &parts);
    let target = route.target(&view);
    let Some((cluster, state)) = find_cluster(connection, &snapshot, &target) else {
        return finish_local(
            reply::local(route.cluster_not_found, "", Flag::NoCluster, report),
            manager,
        );
    };
    report.reports = state.reports();
    rewrite(&matched, route, &target, &exchange, &mut parts);

    // 5. It is sent, and sent again where that is allowed.
    let request = Request::from_parts(parts, RequestBody::new(Some(body), exchange.flow.clone()));
    let plan = attempt::Plan::new(&exchange, route, manager, &matched, cluster, &state);
    let outcome = attempt::run(plan, request).await;

    // 6. The response is passed on.
    match outcome {
        Outcome::Response(done) => {
            if connection.direction == Direction::Outbound {
                report.peer = done.lease.host().peer.clone();
            }
            pass_on(
                &matched,
                route,
                &target,
                manager,
                &exchange,
                *done,
                report,
                Extras {
                    peer_exchange,
                    upgrade,
                },
            )
        }
        Outcome::Failed { failure, peer } => {
            if let Some(peer) = peer.filter(|_| connection.direction == Direction::Outbound) {
                report.peer = peer;
            }
            finish_local(failed(failure, report), manager)
        }
    }
}

/// What the request left for the response.
struct Extras {
    peer_exchange: bool,
    upgrade: Option<Asked>,
}

#[expect(
    clippy::too_many_arguments,
    reason = "the last phase needs what all earlier ones found"
)]
fn pass_on(
    matched: &Matched<'_>,
    route: &Forward,
    target: &ClusterTarget<'_>,
    manager: &HttpManager,
    exchange: &Exchange,
    mut done: attempt::Done,
    mut report: Box<Report>,
    extras: Extras,
) -> Response<ResponseBody> {
    let switches = done.response.status() == StatusCode::SWITCHING_PROTOCOLS;
    if switches && extras.upgrade.is_none() {
        return finish_local(failed(Failure::Protocol, report), manager);
    }
    let headers = done.response.headers_mut();
    message::remove_hop_by_hop(headers);
    exchange_out(
        &exchange.connection,
        headers,
        &mut report,
        extras.peer_exchange,
    );
    finish_headers(headers, manager, &done.sent_at);
    if let ClusterTarget::Entry(entry) = target {
        entry.response_ops.apply(headers);
    }
    matched.route.response_ops.apply(headers);
    if matched.host.response_attempt_count {
        headers.insert(ATTEMPT_COUNT, HeaderValue::from(done.attempts));
    }
    if let Some(upgrade) = extras.upgrade.filter(|_| switches) {
        upgrade.announce(headers);
        let mut response = done.response;
        upgrade.join(
            &mut response,
            done.lease,
            report,
            exchange.connection.worker.shared.clone(),
        );
        return response.map(|_| ResponseBody::empty());
    }
    let (mut head, incoming) = done.response.into_parts();
    report.code = head.status.as_u16();
    report.grpc = if report.is_grpc {
        grpc_status(&head.headers)
    } else {
        None
    };
    head.version = Version::HTTP_11;
    let body = UpstreamBody::new(
        incoming,
        done.lease,
        *report,
        done.deadline,
        idle_limit(route, manager),
    );
    Response::from_parts(head, ResponseBody::upstream(body))
}

fn begin_report(connection: &Downstream, parts: &request::Parts) -> Box<Report> {
    let is_grpc = parts
        .headers
        .get(CONTENT_TYPE)
        .is_some_and(|v| v.as_bytes().starts_with(b"application/grpc"));
    Box::new(Report {
        reports: connection.worker.unrouted.clone(),
        direction: connection.direction,
        peer: connection.worker.peers.unknown().clone(),
        started: Instant::now(),
        code: 0,
        grpc: None,
        is_grpc,
        flag: Flag::None,
        response_bytes: 0,
        flow: Rc::new(Flow::default()),
    })
}

fn refuse(
    refusal: Refusal,
    parts: &request::Parts,
    manager: &HttpManager,
    report: Box<Report>,
) -> Response<ResponseBody> {
    let mut response = match refusal {
        Refusal::Status(status) => {
            let flag = if status == StatusCode::NOT_FOUND {
                Flag::NoRoute
            } else {
                Flag::BadRequest
            };
            reply::local(status, "", flag, report)
        }
        Refusal::Redirect(path) => reply::redirect(StatusCode::TEMPORARY_REDIRECT, &path, report),
    };
    // What follows on this connection cannot be trusted to be where we think it is.
    if parts.version < Version::HTTP_2 {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    finish_local(response, manager)
}

fn finish_local(
    mut response: Response<ResponseBody>,
    manager: &HttpManager,
) -> Response<ResponseBody> {
    response
        .headers_mut()
        .insert(SERVER, manager.server_name.clone());
    response
}

/// Takes the peer's metadata off the request. True if the peer speaks metadata exchange.
fn exchange_in(connection: &Downstream, headers: &mut HeaderMap, report: &mut Report) -> bool {
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
fn exchange_out(
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

fn prepare_headers(connection: &Downstream, manager: &HttpManager, parts: &mut request::Parts) {
    let headers = &mut parts.headers;
    message::remove_hop_by_hop(headers);
    if manager.use_remote_address {
        message::remove_internal(headers);
        if !manager.skip_xff_append {
            message::append_forwarded_for(headers, connection.remote.ip());
        }
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
        if !manager.preserve_request_id {
            headers.remove(REQUEST_ID);
        }
    } else if !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    if manager.generate_request_id && !headers.contains_key(REQUEST_ID) {
        headers.insert(REQUEST_ID, request_id(connection));
    }
}

/// A random UUID (RFC 9562, version 4).
fn request_id(connection: &Downstream) -> HeaderValue {
    let mut bytes = [0; 16];
    let (high, low) = bytes.split_at_mut(8);
    high.copy_from_slice(&connection.worker.random().to_be_bytes());
    low.copy_from_slice(&connection.worker.random().to_be_bytes());
    let id = uuid::Builder::from_random_bytes(bytes).into_uuid();
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let text = id.hyphenated().encode_lower(&mut text);
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""))
}

fn route_table(snapshot: &Snapshot, manager: &HttpManager) -> Option<Arc<RouteTable>> {
    match &manager.routes {
        RouteSource::Rds(name) => snapshot.routes(name).cloned(),
        RouteSource::Inline(table) => Some(table.clone()),
    }
}

fn view<'a>(exchange: &'a Exchange, parts: &'a request::Parts) -> RequestView<'a> {
    let scheme = match parts
        .headers
        .get(FORWARDED_PROTO)
        .map(HeaderValue::as_bytes)
    {
        Some(b"https") => "https",
        _ => "http",
    };
    RequestView {
        host: exchange.authority.to_str().unwrap_or(""),
        method: parts.method.as_str(),
        path_and_query: parts.uri.path_and_query().map_or("/", |p| p.as_str()),
        scheme,
        headers: &parts.headers,
        random: exchange.random,
    }
}

fn decide<'a>(table: &'a RouteTable, exchange: &Exchange, parts: &request::Parts) -> Decision<'a> {
    table.decide(&view(exchange, parts))
}

/// The answer of a route that does not forward.
fn answer(
    action: &Action,
    matched: &Matched<'_>,
    exchange: &Exchange,
    parts: &request::Parts,
    report: Box<Report>,
) -> Response<ResponseBody> {
    match action {
        Action::Redirect(redirect) => {
            let location = redirect.location(&view(exchange, parts), matched.matched_len);
            reply::redirect(redirect.status, &location, report)
        }
        Action::Direct(direct) => {
            reply::local(direct.status, direct.body.clone(), Flag::None, report)
        }
        // The caller forwards these.
        Action::Forward(_) => {
            reply::local(StatusCode::INTERNAL_SERVER_ERROR, "", Flag::None, report)
        }
    }
}

fn find_cluster<'a>(
    connection: &Downstream,
    snapshot: &'a Snapshot,
    target: &ClusterTarget<'_>,
) -> Option<(&'a Cluster, Rc<ClusterState>)> {
    let name = match target {
        ClusterTarget::Entry(entry) => &entry.name,
        ClusterTarget::Named(name) => name,
        ClusterTarget::Missing => return None,
    };
    let cluster = snapshot.cluster(name)?;
    Some((cluster, connection.worker.cluster_state(cluster)))
}

/// Path, authority and headers as the route wants them.
fn rewrite(
    matched: &Matched<'_>,
    route: &Forward,
    target: &ClusterTarget<'_>,
    exchange: &Exchange,
    parts: &mut request::Parts,
) {
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    if let Some(path) = route.rewritten_path(path, matched.matched_len)
        && let Some(uri) = message::with_path(&parts.uri, &path)
    {
        parts.uri = uri;
    }
    let authority = route
        .host_literal(target)
        .cloned()
        .or_else(|| match &route.host_rewrite {
            Some(HostRewrite::Header(name)) => parts.headers.get(name).cloned(),
            _ => None,
        });
    if let ClusterTarget::Entry(entry) = target {
        entry.request_ops.apply(&mut parts.headers);
    }
    matched.route.request_ops.apply(&mut parts.headers);
    if authority.is_some() && route.append_forwarded_host {
        parts
            .headers
            .append(FORWARDED_HOST, exchange.authority.clone());
    }
    parts.headers.insert(
        HOST,
        authority.unwrap_or_else(|| exchange.authority.clone()),
    );
    if let Some(timeout) = route.timeout {
        let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        parts
            .headers
            .insert(EXPECTED_TIMEOUT, HeaderValue::from(millis));
    }
}

/// Which HTTP version the endpoint is to be spoken to in.
pub fn upstream_version(cluster: &Cluster, downstream: Version) -> Upstream {
    match cluster.config.protocol {
        UpstreamProtocol::Http2 => Upstream::Http2,
        UpstreamProtocol::AsDownstream if downstream >= Version::HTTP_2 => Upstream::Http2,
        UpstreamProtocol::Http1 | UpstreamProtocol::AsDownstream => Upstream::Http1,
    }
}

/// Brings the request's head into the form of the version: origin form and `Host`, or an absolute URI without it.
pub fn address_head(request: &mut Request<RequestBody>, version: Upstream) {
    let path = request.uri().path_and_query().cloned();
    match version {
        Upstream::Http1 => {
            if request.uri().authority().is_some() {
                *request.uri_mut() = path.map_or_else(|| Uri::from_static("/"), Uri::from);
            }
            *request.version_mut() = Version::HTTP_11;
        }
        Upstream::Http2 => {
            let host = request.headers_mut().remove(HOST);
            let authority = host.and_then(|h| http::uri::Authority::try_from(h.as_bytes()).ok());
            let mut parts = http::uri::Parts::default();
            parts.scheme = Some(Scheme::HTTP);
            parts.authority = authority;
            parts.path_and_query = path.or(Some(http::uri::PathAndQuery::from_static("/")));
            if let Ok(uri) = Uri::from_parts(parts) {
                *request.uri_mut() = uri;
            }
            // Connection-specific headers have no place in HTTP/2 (RFC 9113 section 8.2.2).
            request.headers_mut().remove(CONNECTION);
            request.headers_mut().remove(UPGRADE);
            *request.version_mut() = Version::HTTP_2;
        }
    }
}

fn finish_headers(headers: &mut HeaderMap, manager: &HttpManager, sent_at: &Instant) {
    let millis = u64::try_from(sent_at.elapsed().as_millis()).unwrap_or(u64::MAX);
    headers.insert(SERVICE_TIME, HeaderValue::from(millis));
    match manager.server_header {
        ServerHeader::Overwrite => {
            headers.insert(SERVER, manager.server_name.clone());
        }
        ServerHeader::AppendIfAbsent => {
            headers
                .entry(SERVER)
                .or_insert_with(|| manager.server_name.clone());
        }
        ServerHeader::PassThrough => {}
    }
}

fn failed(failure: Failure, report: Box<Report>) -> Response<ResponseBody> {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    match failure {
        Failure::NoHealthy => reply::local(unavailable, reply::NO_HEALTHY, Flag::NoHealthy, report),
        Failure::Connect => reply::local(
            unavailable,
            reply::disconnect("remote connection failure"),
            Flag::ConnectFailure,
            report,
        ),
        Failure::ConnectTimeout => reply::local(
            unavailable,
            reply::disconnect("connection timeout"),
            Flag::ConnectFailure,
            report,
        ),
        Failure::Closed => reply::local(
            unavailable,
            reply::disconnect("connection termination"),
            Flag::UpstreamClosed,
            report,
        ),
        Failure::Refused => reply::local(
            unavailable,
            reply::disconnect("remote refused stream reset"),
            Flag::UpstreamReset,
            report,
        ),
        Failure::Protocol => reply::local(
            StatusCode::BAD_GATEWAY,
            reply::disconnect("protocol error"),
            Flag::UpstreamReset,
            report,
        ),
        Failure::Timeout => reply::local(
            StatusCode::GATEWAY_TIMEOUT,
            reply::TIMEOUT,
            Flag::Timeout,
            report,
        ),
        Failure::Idle => reply::local(
            StatusCode::GATEWAY_TIMEOUT,
            reply::STREAM_TIMEOUT,
            Flag::Idle,
            report,
        ),
        Failure::Client => reply::local(StatusCode::BAD_REQUEST, "", Flag::BadRequest, report),
    }
}

/// May the request be repeated although it may have been received (RFC 9110 section 9.2.2)?
pub fn is_idempotent(method: &Method) -> bool {
    [
        Method::GET,
        Method::HEAD,
        Method::OPTIONS,
        Method::PUT,
        Method::DELETE,
        Method::TRACE,
    ]
    .contains(method)
}

/// Is there a body still to come?
pub fn has_body(request: &Request<RequestBody>) -> bool {
    !request.body().is_end_stream()
}

/// Longest wait for response headers: the stream's idle timeout.
pub fn idle_limit(route: &Forward, manager: &HttpManager) -> Option<Duration> {
    route.idle_timeout.or(manager.stream_idle_timeout)
}

/// Where the connection was going, for clusters that follow it.
pub fn original_destination(exchange: &Exchange) -> Option<SocketAddr> {
    exchange
        .connection
        .redirected
        .then_some(exchange.connection.destination)
}
