//! The way of an HTTP request, as one function of numbered phases.

mod client_cert;
mod facts;
mod hooks;
mod outgoing;
mod prepare;
mod respond;
mod timeouts;

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use http::header::{CONNECTION, TRANSFER_ENCODING};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, request};
use hyper::body::{Body, Incoming};
use mesh_routing::Snapshot;
use mesh_routing::action::{Action, ClusterTarget, Forward};
use mesh_routing::cluster::Cluster;
use mesh_routing::filter::alpn::Protocols;
use mesh_routing::hcm::HttpManager;
use mesh_routing::listener::Direction;
use mesh_routing::route::{Decision, Matched};
use mesh_routing::upgrade::Passage;

use crate::attempt::{self, Failure};
use crate::body::{
    BodyLimits, InFlight, Input, RequestBody, ResponseBody, UpstreamBody, grpc_status,
};
use crate::filter;
use crate::listener::Downstream;
use crate::message;
use crate::reply;
use crate::report::{Flag, Flags, Flow, Report};
use crate::upgrade::{self, Asked};
use crate::upstream::{ClusterState, Wish};

use facts::Origin;
pub use outgoing::{address_head, has_body, is_idempotent, original_destination, upstream_version};
use outgoing::{find_cluster, limits, rewrite};
pub(crate) use prepare::view;
use prepare::{begin_report, exchange_in, exchange_out, prepare_headers, route_table, scheme};
use respond::{Failed, answer, decorate, finish_headers, finish_local, refuse};
pub use timeouts::Timeouts;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// How often the request was tried.
pub const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

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
    /// The version of the filter chain that it began under ([`Downstream::era`]).
    pub era: u32,
    /// When the request's headers were there.
    pub started: Instant,
    /// `http` or `https`, as the client sees it.
    pub scheme: &'static str,
    /// The version that the client speaks.
    pub version: Version,
    /// Application protocols for upstream TLS handshakes in HTTP/1 and HTTP/2.
    pub alpn: (Option<Protocols>, Option<Protocols>),
}

/// Takes a request to its response. Never fails: what goes wrong is an answer, too.
pub async fn handle(
    connection: Rc<Downstream>,
    accepted: Arc<HttpManager>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    // One snapshot for all of the request.
    let snapshot = connection.worker.snapshot();
    let manager = connection.manager(&accepted, &snapshot);
    let last = connection.begin(&manager, !request.body().is_end_stream());
    let guard = InFlight::new(&connection);
    let http1 = request.version() < Version::HTTP_2;
    let head = request.method() == Method::HEAD;
    let mut response = forward(&connection, &manager, &snapshot, request).await;
    if last && http1 {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    } else if last {
        connection.end_gracefully();
    }
    if head && !http1 {
        // The codec of HTTP/1 does this by itself.
        reply::leave_out_body(&mut response);
    }
    response.body_mut().guard(guard);
    Ok(response)
}

async fn forward(
    connection: &Rc<Downstream>,
    manager: &Arc<HttpManager>,
    snapshot: &Snapshot,
    request: Request<Incoming>,
) -> Response<ResponseBody> {
    // 1. The request begins.
    let worker = connection.worker.clone();
    let (mut parts, body) = request.into_parts();
    let mut report = begin_report(connection, &parts);

    // 2. It is checked and brought into one form.
    let coded = parts.headers.contains_key(TRANSFER_ENCODING);
    let two_lengths = connection.sent_two_lengths(coded);
    let authority = match message::canonicalize(&mut parts, manager, two_lengths) {
        Ok(authority) => authority,
        Err(refusal) => return refuse(refusal, &parts, manager, report),
    };
    let peer_exchange = exchange_in(connection, &mut parts.headers, &mut report);
    let upgrade = Asked::take(&mut parts);
    prepare_headers(connection, manager, &mut parts);
    let exchange = Exchange {
        connection: connection.clone(),
        flow: report.flow.clone(),
        authority,
        is_grpc: report.is_grpc,
        random: worker.random(),
        era: connection.era(),
        started: report.started,
        scheme: scheme(&parts.headers),
        version: parts.version,
        alpn: (manager.alpn.http1.clone(), manager.alpn.http2.clone()),
    };

    let request_id = match manager.request_id_in_response {
        true => parts.headers.get(REQUEST_ID).cloned(),
        false => None,
    };

    // 3. The route is found.
    let Some(table) = route_table(snapshot, manager) else {
        return finish_local(
            reply::local(StatusCode::NOT_FOUND, "", Flag::NoRoute, report),
            manager,
        );
    };
    let mut decision = table.decide(&view(&exchange, &parts));

    // 4. Filters see the request, whatever its route does; they may have it decided anew.
    let mut body = Input::from(body);
    let mut pass = None;
    if filter::wanted(manager, hooks::matched(&decision)) {
        let asked = filter::Request {
            snapshot,
            manager,
            exchange: &exchange,
            table: &table,
        };
        let filtered = asked.run(&mut decision, &mut parts, &mut body, &mut report);
        match filtered.await {
            filter::Outcome::Continue(left) => pass = left,
            filter::Outcome::Reply(reply, left) => {
                let decorate = |response: &mut _| {
                    let matched = hooks::matched(&decision);
                    hooks::decorate_reply(matched, &exchange, &parts, response);
                };
                let mut response = finish_local(reply.into_response(report, decorate), manager);
                if exchange.version < Version::HTTP_2 && !body.has_arrived() {
                    // The rest of the request is not read.
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                return hooks::leave(left, response);
            }
        }
    }
    let arrived = Arrived {
        parts,
        body,
        report,
        peer_exchange,
        upgrade,
    };
    let mut response = follow(decision, manager, snapshot, &exchange, arrived).await;
    if let Some(id) = request_id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    hooks::leave(pass, response)
}

/// A request that has passed its filters.
struct Arrived {
    parts: request::Parts,
    body: Input,
    report: Box<Report>,
    peer_exchange: bool,
    upgrade: Option<Asked>,
}

/// Does what the decision says.
async fn follow(
    decision: Decision<'_>,
    manager: &HttpManager,
    snapshot: &Snapshot,
    exchange: &Exchange,
    arrived: Arrived,
) -> Response<ResponseBody> {
    let matched = match decision {
        Decision::Matched(matched) => matched,
        Decision::TlsRequired => {
            let path = facts::path(&arrived.parts);
            let location = format!(
                "https://{}{path}",
                exchange.authority.to_str().unwrap_or("")
            );
            return finish_local(
                reply::redirect(StatusCode::MOVED_PERMANENTLY, &location, arrived.report),
                manager,
            );
        }
        Decision::NoRoute => {
            return finish_local(
                reply::local(StatusCode::NOT_FOUND, "", Flag::NoRoute, arrived.report),
                manager,
            );
        }
    };
    match &matched.route.action {
        Action::Forward(route) => {
            send((&matched, route), manager, snapshot, exchange, arrived).await
        }
        other => {
            let Arrived { parts, report, .. } = arrived;
            let mut response = answer(other, &matched, exchange, &parts, report);
            let origin = Origin::keep(&matched, None, &parts);
            decorate(&matched, None, exchange, origin.as_deref(), &mut response);
            finish_local(response, manager)
        }
    }
}

/// Sends a request to its cluster.
async fn send(
    (matched, route): (&Matched<'_>, &Forward),
    manager: &HttpManager,
    snapshot: &Snapshot,
    exchange: &Exchange,
    arrived: Arrived,
) -> Response<ResponseBody> {
    let Arrived {
        mut parts,
        body,
        mut report,
        peer_exchange,
        mut upgrade,
    } = arrived;
    let connection = &exchange.connection;
    let target = route.target(&view(exchange, &parts));
    let origin = Origin::keep(matched, Some(&target), &parts);
    // What the route adds to answers it adds to the proxy's own, too (Envoy: `DownstreamFilterManager::sendLocalReply`).
    let finish = |mut response: Response<ResponseBody>| {
        let origin = origin.as_deref();
        decorate(matched, Some(&target), exchange, origin, &mut response);
        finish_local(response, manager)
    };
    let mut ends_here = false;
    if let Some(upgrade) = &upgrade {
        match upgrade.passage(manager, route) {
            Passage::Through => upgrade.announce(&mut parts.headers),
            Passage::Terminated => ends_here = true,
            // Envoy's answer, with no more words.
            Passage::No => {
                let forbidden = StatusCode::FORBIDDEN;
                return finish(reply::local(forbidden, "", Flags::NONE, report));
            }
        }
    }

    // 5. The cluster is found, the limits too, and the request is rewritten for it.
    let Some((cluster, state)) = find_cluster(connection, snapshot, &target) else {
        let status = route.cluster_not_found;
        return finish(reply::local(status, "", Flag::NoCluster, report));
    };
    report.reports = state.reports();
    if report.reports.follows_host() {
        report.host = Some(exchange.authority.clone());
    }
    let (policy, timeouts) = limits(route, manager, exchange, &mut parts);
    connection.allow_silence(timeouts.idle);
    let hash = hooks::hash(route, cluster, exchange, &parts);
    let mirrors = hooks::mirrors(route, exchange, &parts);
    rewrite(matched, route, &target, exchange, &mut parts);

    if let Some(asked) = upgrade.take_if(|_| ends_here) {
        return finish(tunnel(asked, (cluster, &state), exchange, report).await);
    }

    // 6. It is sent, and sent again where that is allowed.
    let body = RequestBody::new(body, exchange.flow.clone());
    let about = (exchange, matched, &target);
    let mut request = hooks::copy(&mirrors, timeouts.global, about, parts, body);
    let plan = attempt::Plan::new(
        exchange,
        route,
        matched,
        (cluster, &state),
        (policy.as_deref(), timeouts),
        &mut request,
    )
    .hashed(hash.value);
    let outcome = attempt::run(&plan, request).await;

    // 7. The response is passed on.
    let sendings = outcome.sendings();
    report.flags.add(outcome.flags);
    if let Some(peer) = outcome
        .peer
        .filter(|_| connection.direction == Direction::Outbound)
    {
        report.peer = peer;
    }
    match outcome.result {
        Ok(done) => {
            if connection.direction == Direction::Outbound {
                report.principals = done.lease.principals();
            }
            let extras = Extras {
                peer_exchange,
                upgrade,
                origin,
                attempts: sendings,
                timeouts,
            };
            let response = pass_on(matched, &target, manager, exchange, *done, report, extras);
            hooks::give_cookies(hash.set_cookies, response)
        }
        Err(failure) => {
            let how = Failed {
                failure,
                attempts: outcome.attempts,
                timeouts: &timeouts,
                transport: outcome.transport_failure.as_deref(),
            };
            let mut response = finish(how.answer(report));
            count_attempts(matched, sendings, &mut response);
            response
        }
    }
}

/// A CONNECT that ends here.
async fn tunnel(
    asked: Asked,
    (cluster, state): (&Cluster, &ClusterState),
    exchange: &Exchange,
    mut report: Box<Report>,
) -> Response<ResponseBody> {
    let worker = &exchange.connection.worker;
    let wish = Wish {
        destination: original_destination(exchange),
        ..Wish::default()
    };
    let Some(host) = state.pick(&wish, &worker.peers, || worker.random()) else {
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        return reply::local(unavailable, reply::NO_HEALTHY, Flag::NoHealthy, report);
    };
    if exchange.connection.direction == Direction::Outbound {
        report.peer = host.peer.clone();
    }
    match upgrade::terminate(asked, &host, cluster, report, exchange).await {
        Ok(response) => response,
        Err((error, report)) => {
            tracing::debug!(endpoint = %host.address, %error, "connecting");
            let text = reply::disconnect("remote connection failure", false);
            let unavailable = StatusCode::SERVICE_UNAVAILABLE;
            reply::local(unavailable, text, Flag::ConnectFailure, report)
        }
    }
}

/// Tells the client how often its request was tried, where the virtual host says so.
fn count_attempts<B>(matched: &Matched<'_>, attempts: u32, response: &mut Response<B>) {
    if matched.host.response_attempt_count {
        let count = HeaderValue::from(attempts);
        response.headers_mut().insert(ATTEMPT_COUNT, count);
    }
}

/// What the request left for the response.
struct Extras {
    peer_exchange: bool,
    upgrade: Option<Asked>,
    origin: Option<Box<Origin>>,
    attempts: u32,
    timeouts: Timeouts,
}

fn pass_on(
    matched: &Matched<'_>,
    target: &ClusterTarget<'_>,
    manager: &HttpManager,
    exchange: &Exchange,
    mut done: attempt::Done,
    mut report: Box<Report>,
    extras: Extras,
) -> Response<ResponseBody> {
    let upgrade = extras
        .upgrade
        .filter(|upgrade| upgrade.is_accepted(&done.response));
    if upgrade.is_none() && done.response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let how = Failed {
            failure: Failure::Protocol,
            attempts: 1,
            timeouts: &extras.timeouts,
            transport: None,
        };
        let mut response = how.answer(report);
        let origin = extras.origin.as_deref();
        decorate(matched, Some(target), exchange, origin, &mut response);
        return finish_local(response, manager);
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
    decorate(
        matched,
        Some(target),
        exchange,
        extras.origin.as_deref(),
        &mut done.response,
    );
    count_attempts(matched, extras.attempts, &mut done.response);
    if let Some(upgrade) = upgrade {
        let mut response = done.response;
        upgrade.join(&mut response, done.lease, report, exchange);
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
    if exchange.version < Version::HTTP_2 && !report.flow.is_request_done() {
        // An early answer: the rest of the request is not waited for, so this is the last one on its connection, as with Envoy.
        let close = HeaderValue::from_static("close");
        head.headers.insert(CONNECTION, close);
    }
    let timeouts = &extras.timeouts;
    let limits = BodyLimits {
        timeout: timeouts.global,
        end: timeouts.end(),
        idle: match (timeouts.idle, timeouts.per_try_idle) {
            (Some(idle), Some(per_try)) => Some(idle.min(per_try)),
            (idle, per_try) => idle.or(per_try),
        },
    };
    let body = UpstreamBody::new(incoming, done.lease, *report, limits);
    Response::from_parts(head, ResponseBody::upstream(body))
}
