//! The request as its cluster and endpoint are to get it.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::rc::Rc;

use http::header::{CONNECTION, HOST, UPGRADE};
use http::uri::{Authority, Scheme};
use http::{HeaderName, HeaderValue, Method, Request, Uri, Version, request};
use hyper::body::Body;
use mesh_routing::Snapshot;
use mesh_routing::action::{ClusterTarget, Forward};
use mesh_routing::cluster::{Cluster, UpstreamProtocol};
use mesh_routing::format::Facts;
use mesh_routing::hcm::HttpManager;
use mesh_routing::retry::RetryPolicy;
use mesh_routing::route::Matched;

use super::facts::{facts, path};
use super::prepare::view;
use super::{Exchange, Timeouts};
use crate::body::RequestBody;
use crate::listener::Downstream;
use crate::message;
use crate::pool::Version as Upstream;
use crate::upstream::ClusterState;

const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
const ORIGINAL_HOST: HeaderName = HeaderName::from_static("x-envoy-original-host");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

pub(super) fn find_cluster<'a>(
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

/// What limits the request and when it is tried again: what the route says, and what the request's own headers say, which end here.
pub(super) fn limits<'a>(
    route: &'a Forward,
    manager: &HttpManager,
    exchange: &Exchange,
    parts: &mut request::Parts,
) -> (Option<Cow<'a, RetryPolicy>>, Timeouts) {
    let controls = parts
        .headers
        .keys()
        .any(|name| name.as_str().starts_with("x-envoy-"));
    let mut policy = route.retry.as_ref().map(Cow::Borrowed);
    if controls && RetryPolicy::is_changed_by(&parts.headers) {
        policy = RetryPolicy::of_request(route.retry.as_ref(), &mut parts.headers).map(Cow::Owned);
    }
    let policy = policy.filter(|policy| policy.takes(&view(exchange, parts)));
    let timeouts = Timeouts::of(
        route,
        policy.as_deref(),
        manager,
        &mut parts.headers,
        exchange.is_grpc,
        controls,
    );
    (policy, timeouts)
}

/// Headers, authority and path as the route wants them, in Envoy's order: what mutations ask for is the request as it came.
pub(super) fn rewrite(
    matched: &Matched<'_>,
    route: &Forward,
    target: &ClusterTarget<'_>,
    exchange: &Exchange,
    parts: &mut request::Parts,
) {
    mutate(matched, target, exchange, parts);
    let path = path(parts);
    // Nothing to rewrite with leaves the authority as it is, as in Envoy.
    let authority = route
        .rewritten_host(target, &parts.headers, path)
        .filter(|authority| !authority.is_empty());
    let path = route.rewritten_path(path, matched.matched_len);
    if let Some(path) = path
        && let Some(uri) = message::with_path(&parts.uri, &path)
    {
        let original = HeaderValue::from_str(self::path(parts));
        if let Ok(original) = original {
            parts.headers.insert(ORIGINAL_PATH, original);
        }
        parts.uri = uri;
    }
    if authority.is_some() {
        let original = exchange.authority.clone();
        if route.append_forwarded_host {
            message::append_to_list(&mut parts.headers, &FORWARDED_HOST, &original);
        }
        if route.replaces_host(target) {
            parts.headers.insert(ORIGINAL_HOST, original);
        }
    }
    parts.headers.insert(
        HOST,
        authority.unwrap_or_else(|| exchange.authority.clone()),
    );
}

fn mutate(
    matched: &Matched<'_>,
    target: &ClusterTarget<'_>,
    exchange: &Exchange,
    parts: &mut request::Parts,
) {
    let entry = match target {
        ClusterTarget::Entry(entry) => Some(&entry.request_ops).filter(|ops| !ops.is_empty()),
        _ => None,
    };
    let route = Some(&matched.route.request_ops).filter(|ops| !ops.is_empty());
    if entry.is_none() && route.is_none() {
        return;
    }
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    let facts = Facts {
        method: parts.method.as_str(),
        path,
        ..facts(exchange, matched, Some(target))
    };
    for ops in [entry, route].into_iter().flatten() {
        ops.apply_to_request(&mut parts.headers, &facts);
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

/// Brings the request's head into the form of the version: origin form and `Host`, or an absolute URI without it; CONNECT has only an
/// authority in both. False where HTTP/2 cannot name the authority that a rewrite has made.
#[must_use]
pub fn address_head(request: &mut Request<RequestBody>, version: Upstream) -> bool {
    let connect = request.method() == Method::CONNECT;
    match version {
        Upstream::Http1 => {
            if connect {
                let host = request.headers().get(HOST).map(HeaderValue::as_bytes);
                if let Some(authority) = host.and_then(|h| Authority::try_from(h).ok()) {
                    *request.uri_mut() = Uri::from(authority);
                }
            } else if request.uri().authority().is_some() {
                let path = request.uri().path_and_query().cloned();
                *request.uri_mut() = path.map_or_else(|| Uri::from_static("/"), Uri::from);
            }
            *request.version_mut() = Version::HTTP_11;
            true
        }
        Upstream::Http2 => {
            *request.version_mut() = Version::HTTP_2;
            address_http2(request, connect)
        }
    }
}

fn address_http2(request: &mut Request<RequestBody>, connect: bool) -> bool {
    let path = request.uri().path_and_query().cloned();
    let host = request.headers_mut().remove(HOST);
    let authority = host.and_then(|h| Authority::try_from(h.as_bytes()).ok());
    let named = authority.is_some();
    // Connection-specific headers have no place in HTTP/2 (RFC 9113 section 8.2.2); an upgrade is a CONNECT with a protocol (RFC 8441).
    request.headers_mut().remove(CONNECTION);
    let upgrade = request.headers_mut().remove(UPGRADE);
    let mut parts = http::uri::Parts::default();
    if !connect {
        parts.scheme = Some(Scheme::HTTP);
        parts.path_and_query = path.or(Some(http::uri::PathAndQuery::from_static("/")));
    }
    parts.authority = authority;
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
    if let Some(kind) = upgrade.as_ref().and_then(|kind| kind.to_str().ok()) {
        *request.method_mut() = Method::CONNECT;
        request
            .extensions_mut()
            .insert(hyper::ext::Protocol::from(kind));
    }
    named
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

/// Where the connection was going, for clusters that follow it.
pub fn original_destination(exchange: &Exchange) -> Option<SocketAddr> {
    exchange
        .connection
        .redirected
        .then_some(exchange.connection.destination)
}
