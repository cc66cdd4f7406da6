//! What filters, hash policies and mirrors do on the way of a request. Requests that none of them is for pay for a look at three fields.

use std::sync::Arc;

use http::{HeaderValue, Request, Response, request};
use mesh_routing::action::{Action, ClusterTarget, Forward};
use mesh_routing::cluster::Cluster;
use mesh_routing::hash::RequestHash;
use mesh_routing::mirror::Mirror;
use mesh_routing::route::{Decision, Matched};

use super::Exchange;
use super::facts::{Origin, facts, path};
use super::prepare::view;
use super::respond::decorate;
use crate::body::{RequestBody, ResponseBody};
use crate::filter::Pass;
use crate::mirror;

/// The request's route, if it has one.
pub(super) fn matched<'d, 'a>(decision: &'d Decision<'a>) -> Option<&'d Matched<'a>> {
    match decision {
        Decision::Matched(matched) => Some(matched),
        _ => None,
    }
}

/// Does to the response what filters have left to do.
pub(super) fn leave(
    pass: Option<Box<Pass>>,
    mut response: Response<ResponseBody>,
) -> Response<ResponseBody> {
    if let Some(pass) = pass {
        pass.on_response(&mut response);
    }
    response
}

/// Makes the mutations of a route that forwards also on the answer that a filter gives in the endpoint's place.
pub(super) fn decorate_reply(
    matched: Option<&Matched<'_>>,
    exchange: &Exchange,
    parts: &request::Parts,
    response: &mut Response<ResponseBody>,
) {
    if let Some(matched) = matched
        && let Action::Forward(route) = &matched.route.action
    {
        let target = route.target(&view(exchange, parts));
        let origin = Origin::keep(matched, Some(&target), parts);
        decorate(
            matched,
            Some(&target),
            exchange,
            origin.as_deref(),
            response,
        );
    }
}

/// The request's hash, where the route says what to hash and the cluster looks at it. It is made before the request is rewritten, as in
/// Envoy.
pub(super) fn hash(
    route: &Forward,
    cluster: &Cluster,
    exchange: &Exchange,
    parts: &request::Parts,
) -> RequestHash {
    let connection = &exchange.connection;
    match &route.hash {
        Some(policy) if cluster.config.lb.policy.is_hashing() => policy.hash(
            &view(exchange, parts),
            connection.remote,
            connection.destination,
        ),
        _ => RequestHash::default(),
    }
}

/// Gives the client the cookies that its next requests are hashed by.
pub(super) fn give_cookies(
    cookies: Vec<HeaderValue>,
    mut response: Response<ResponseBody>,
) -> Response<ResponseBody> {
    for cookie in cookies {
        response
            .headers_mut()
            .append(http::header::SET_COOKIE, cookie);
    }
    response
}

/// The mirrors that get a copy of this request.
pub(super) fn mirrors<'a>(
    route: &'a Forward,
    exchange: &Exchange,
    parts: &request::Parts,
) -> Vec<(&'a Mirror, Arc<str>)> {
    let worker = &exchange.connection.worker;
    let wanted = |mirror: &'a Mirror| {
        let cluster = mirror.target(&view(exchange, parts), worker.random())?;
        Some((mirror, cluster))
    };
    route.mirrors.iter().filter_map(wanted).collect()
}

/// Sends the copies of a request that is ready to be sent itself.
pub(super) fn copy(
    mirrors: &[(&Mirror, Arc<str>)],
    timeout: Option<std::time::Duration>,
    (exchange, matched, target): (&Exchange, &Matched<'_>, &ClusterTarget<'_>),
    parts: request::Parts,
    body: RequestBody,
) -> Request<RequestBody> {
    if mirrors.is_empty() {
        return Request::from_parts(parts, body);
    }
    let mut facts = facts(exchange, matched, Some(target));
    let (method, path) = (parts.method.clone(), path(&parts).to_owned());
    (facts.method, facts.path) = (method.as_str(), &path);
    let request = Request::from_parts(parts, body);
    mirror::start(exchange, mirrors, timeout, &facts, &request);
    request
}
