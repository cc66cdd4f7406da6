//! The ends of a request: the answers that the proxy gives itself, and what it adds to those of others.

use std::time::Instant;

use http::header::{CONNECTION, SERVER};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version, request};
use mesh_routing::action::{Action, ClusterTarget};
use mesh_routing::hcm::{HttpManager, ServerHeader};
use mesh_routing::route::Matched;

use super::facts::{Origin, facts};
use super::prepare::view;
use super::{Exchange, Timeouts};
use crate::attempt::Failure;
use crate::body::ResponseBody;
use crate::message::Refusal;
use crate::reply;
use crate::report::{Flag, Flags, Report};

/// gRPC's status for a deadline that is over (Envoy: `onStreamMaxDurationReached`; a route's own timeout is a 504, which stands for 14).
const DEADLINE_EXCEEDED: u16 = 4;
const OVERLOADED: HeaderName = HeaderName::from_static("x-envoy-overloaded");
const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");

pub(super) fn refuse(
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

pub(super) fn finish_local(
    mut response: Response<ResponseBody>,
    manager: &HttpManager,
) -> Response<ResponseBody> {
    if manager.server_header != ServerHeader::PassThrough {
        response
            .headers_mut()
            .insert(SERVER, manager.server_name.clone());
    }
    response
}

/// The answer of a route that does not forward.
pub(super) fn answer(
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
            reply::local(direct.status, direct.body.clone(), Flags::NONE, report)
        }
        // The caller forwards these.
        Action::Forward(_) => {
            reply::local(StatusCode::INTERNAL_SERVER_ERROR, "", Flags::NONE, report)
        }
    }
}

/// Makes the route's mutations of a response.
pub(super) fn decorate<B>(
    matched: &Matched<'_>,
    target: Option<&ClusterTarget<'_>>,
    exchange: &Exchange,
    origin: Option<&Origin>,
    response: &mut Response<B>,
) {
    let entry = match target {
        Some(ClusterTarget::Entry(entry)) => {
            Some(&entry.response_ops).filter(|ops| !ops.is_empty())
        }
        _ => None,
    };
    let route = Some(&matched.route.response_ops).filter(|ops| !ops.is_empty());
    if entry.is_none() && route.is_none() {
        return;
    }
    let mut facts = facts(exchange, matched, target);
    facts.status = response.status().as_u16();
    if let Some(origin) = origin {
        origin.add_to(&mut facts);
    }
    for ops in [entry, route].into_iter().flatten() {
        ops.apply_to_response(response.headers_mut(), &facts);
    }
}

pub(super) fn finish_headers(headers: &mut HeaderMap, manager: &HttpManager, sent_at: &Instant) {
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

/// A request that got no response.
pub(super) struct Failed<'a> {
    /// Why.
    pub failure: Failure,
    /// Tries made.
    pub attempts: u32,
    /// The limits that it had.
    pub timeouts: &'a Timeouts,
    /// Why a TLS handshake failed, where one did.
    pub transport: Option<&'a str>,
}

impl Failed<'_> {
    /// Envoy's answer (`Filter::onUpstreamReset`, `onUpstreamTimeoutAbort`, `ActiveStream::onIdleTimeout`).
    pub(super) fn answer(&self, report: Box<Report>) -> Response<ResponseBody> {
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        let bad_gateway = StatusCode::BAD_GATEWAY;
        let (status, reason, flag) = match self.failure {
            Failure::NoHealthy => {
                return reply::local(unavailable, reply::NO_HEALTHY, Flag::NoHealthy, report);
            }
            Failure::Overflow => return self.overflow(report),
            Failure::Connect if self.transport.is_some() => {
                let reason = self.transport.unwrap_or_default();
                let text = reply::disconnect("remote connection failure", self.attempts > 1);
                let text = format!("{text}, transport failure reason: {reason}");
                return reply::local(unavailable, text, Flag::ConnectFailure, report);
            }
            Failure::Connect => (
                unavailable,
                "remote connection failure",
                Flag::ConnectFailure,
            ),
            Failure::ConnectTimeout => (unavailable, "connection timeout", Flag::ConnectFailure),
            Failure::Closed => (unavailable, "connection termination", Flag::UpstreamClosed),
            Failure::Refused => (
                unavailable,
                "remote refused stream reset",
                Flag::UpstreamReset,
            ),
            Failure::Reset => (unavailable, "remote reset", Flag::UpstreamReset),
            Failure::Protocol => (bad_gateway, "protocol error", Flag::UpstreamProtocol),
            Failure::Timeout | Failure::PerTry => return self.timed_out(report),
            Failure::Idle => {
                let status = late(&report);
                return reply::local(status, reply::STREAM_TIMEOUT, Flag::Idle, report);
            }
            Failure::Request => {
                let status = StatusCode::REQUEST_TIMEOUT;
                return reply::local(status, reply::REQUEST_TIMEOUT, Flags::NONE, report);
            }
            Failure::Duration => {
                let status = late(&report);
                return reply::with_grpc_status(
                    status,
                    reply::DURATION_TIMEOUT,
                    Flags::NONE,
                    Some(DEADLINE_EXCEEDED),
                    report,
                );
            }
            Failure::Client => {
                return reply::local(StatusCode::BAD_REQUEST, "", Flag::BadRequest, report);
            }
        };
        let text = reply::disconnect(reason, self.attempts > 1);
        reply::local(status, text, flag, report)
    }

    fn overflow(&self, report: Box<Report>) -> Response<ResponseBody> {
        let text = reply::disconnect("overflow", self.attempts > 1);
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        let mut response = reply::local(unavailable, text, Flag::Overflow, report);
        let yes = HeaderValue::from_static("true");
        response.headers_mut().insert(OVERLOADED, yes);
        response
    }

    fn timed_out(&self, report: Box<Report>) -> Response<ResponseBody> {
        match self.timeouts.no_content {
            true => reply::local(StatusCode::NO_CONTENT, "", Flag::Timeout, report),
            false => reply::local(
                StatusCode::GATEWAY_TIMEOUT,
                reply::TIMEOUT,
                Flag::Timeout,
                report,
            ),
        }
    }
}

/// Who is late: the client, as long as its request is not there whole, else the endpoint.
fn late(report: &Report) -> StatusCode {
    match report.flow.is_request_done() {
        true => StatusCode::GATEWAY_TIMEOUT,
        false => StatusCode::REQUEST_TIMEOUT,
    }
}
