//! Sending a request: endpoint, connection, try after try.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant};

use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, Version};
use hyper::body::Incoming;
use mesh_routing::action::{Forward, HostRewrite, RetryPolicy};
use mesh_routing::cluster::Cluster;
use mesh_routing::hcm::HttpManager;
use mesh_routing::listener::Direction;
use mesh_routing::route::Matched;
use mesh_telemetry::Peer;
use tokio::time::Instant;

use crate::body::{RequestBody, grpc_status};
use crate::http::{
    ATTEMPT_COUNT, Exchange, address_head, has_body, idle_limit, is_idempotent,
    original_destination, upstream_version,
};
use crate::node::{PEER_ID, PEER_METADATA};
use crate::pool::{ConnectError, Host, Lease, Sent, Version as Upstream};
use crate::upstream::ClusterState;

/// Everything that the tries of one request have in common.
pub struct Plan<'a> {
    exchange: &'a Exchange,
    route: &'a Forward,
    cluster: &'a Cluster,
    state: &'a ClusterState,
    count_attempts: bool,
    idle: Option<Duration>,
    deadline: Option<Instant>,
}

/// A response to pass on.
pub struct Done {
    /// It.
    pub response: Response<Incoming>,
    /// Its connection.
    pub lease: Lease,
    /// When the request was sent.
    pub sent_at: StdInstant,
    /// End of the route's timeout.
    pub deadline: Option<Instant>,
    /// Tries made.
    pub attempts: u32,
}

/// How it went.
pub enum Outcome {
    /// There is a response.
    Response(Box<Done>),
    /// There is none.
    Failed {
        /// Why.
        failure: Failure,
        /// The last endpoint's workload.
        peer: Option<Arc<Peer>>,
    },
}

/// Why there is no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No usable endpoint.
    NoHealthy,
    /// Connecting failed.
    Connect,
    /// Connecting took too long.
    ConnectTimeout,
    /// The connection ended.
    Closed,
    /// The endpoint refused the stream.
    Refused,
    /// The endpoint broke the protocol.
    Protocol,
    /// The route's timeout is over.
    Timeout,
    /// Nothing came within the idle timeout.
    Idle,
    /// The client's body broke off.
    Client,
}

/// The head of a request, kept for another try.
struct Spare {
    method: Method,
    uri: Uri,
    version: Version,
    headers: HeaderMap,
}

impl Spare {
    fn of(request: &Request<RequestBody>) -> Self {
        Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            headers: request.headers().clone(),
        }
    }

    fn into_request(self, exchange: &Exchange) -> Request<RequestBody> {
        let mut request = Request::new(RequestBody::new(None, exchange.flow.clone()));
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.version_mut() = self.version;
        *request.headers_mut() = self.headers;
        request
    }
}

/// What one try came to.
enum Try {
    Done(Response<Incoming>, Lease, StdInstant),
    /// Nothing was sent; the request is whole.
    Unsent(Box<Request<RequestBody>>, Failure),
    /// It may have been received. A spare head, if one was kept, makes another try possible.
    Lost(Option<Spare>, Failure, Retry),
}

/// May a lost try be repeated at all?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// If the policy says so.
    ByPolicy,
    /// At once: an idle connection was closed under a request that may be repeated.
    Always,
}

impl<'a> Plan<'a> {
    /// For a matched request.
    pub fn new(
        exchange: &'a Exchange,
        route: &'a Forward,
        manager: &HttpManager,
        matched: &Matched<'_>,
        cluster: &'a Cluster,
        state: &'a ClusterState,
    ) -> Self {
        Self {
            exchange,
            route,
            cluster,
            state,
            count_attempts: matched.host.request_attempt_count,
            idle: idle_limit(route, manager),
            deadline: route.timeout.map(|timeout| Instant::now() + timeout),
        }
    }

    fn policy(&self) -> Option<&RetryPolicy> {
        self.route.retry.as_ref()
    }

    fn pick(&self, tried: &[SocketAddr]) -> Option<Rc<Host>> {
        let worker = &self.exchange.connection.worker;
        let avoid = self
            .policy()
            .map_or(0, |policy| policy.avoid_previous_hosts);
        self.state.pick(
            self.cluster,
            original_destination(self.exchange),
            &worker.peers,
            || worker.random(),
            tried,
            avoid,
        )
    }

    /// Must the head be kept, since the policy may want another try after this one was sent? Only requests without a body can be repeated,
    /// as bodies are not buffered.
    fn keeps_head(&self, request: &Request<RequestBody>, lease: &Lease, version: Upstream) -> bool {
        if has_body(request) {
            return false;
        }
        let by_policy = self.policy().is_some_and(|policy| {
            let on = policy.on;
            policy.may_judge_responses(self.exchange.is_grpc)
                || on.reset
                || (on.refused_stream && version == Upstream::Http2)
        });
        by_policy || (lease.suspect && is_idempotent(request.method()))
    }
}

/// Tries until there is a response to pass on, or nothing is left to try.
pub async fn run(plan: Plan<'_>, mut request: Request<RequestBody>) -> Outcome {
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut attempts = 0;
    let (mut fresh, mut peer) = (false, None);
    loop {
        attempts += 1;
        let Some(host) = plan.pick(&tried) else {
            return Outcome::Failed {
                failure: Failure::NoHealthy,
                peer,
            };
        };
        peer = Some(host.peer.clone());
        dress(&plan, &mut request, &host, attempts);
        let more = plan
            .policy()
            .is_some_and(|policy| attempts <= policy.retries);
        let (spare, failure) =
            match with_deadline(&plan, once(&plan, request, &host, fresh, more)).await {
                Ok(Try::Done(response, lease, sent_at)) => {
                    let done = Done {
                        response,
                        lease,
                        sent_at,
                        deadline: plan.deadline,
                        attempts,
                    };
                    return Outcome::Response(Box::new(done));
                }
                Ok(Try::Unsent(whole, Failure::Closed)) if !fresh => {
                    // A pooled connection that was closed meanwhile: the endpoint saw nothing.
                    (request, fresh, attempts) = (*whole, true, attempts - 1);
                    continue;
                }
                Ok(Try::Lost(Some(spare), _, Retry::Always)) => {
                    (request, fresh, attempts) =
                        (spare.into_request(plan.exchange), true, attempts - 1);
                    continue;
                }
                Ok(Try::Unsent(whole, failure)) => (Ok(*whole), failure),
                Ok(Try::Lost(Some(spare), failure, Retry::ByPolicy)) => (Err(spare), failure),
                Ok(Try::Lost(None, failure, _)) => return Outcome::Failed { failure, peer },
                Err(failure) => return Outcome::Failed { failure, peer },
            };
        if !more || !wants(&plan, failure, spare.is_ok()) {
            return Outcome::Failed { failure, peer };
        }
        tried.push(host.address);
        back_off(&plan, attempts).await;
        fresh = false;
        request = spare.unwrap_or_else(|spare| spare.into_request(plan.exchange));
    }
}

/// Puts the headers on that depend on the endpoint and the try.
fn dress(plan: &Plan<'_>, request: &mut Request<RequestBody>, host: &Host, attempts: u32) {
    let connection = &plan.exchange.connection;
    if plan.count_attempts {
        request
            .headers_mut()
            .insert(ATTEMPT_COUNT, HeaderValue::from(attempts));
    }
    if let Some(HostRewrite::Endpoint) = plan.route.host_rewrite
        && let Some(endpoint) = plan
            .cluster
            .endpoints
            .endpoints()
            .iter()
            .find(|e| e.address == host.address)
        && let Ok(name) = HeaderValue::from_str(&endpoint.hostname)
        && !name.is_empty()
    {
        request.headers_mut().insert(http::header::HOST, name);
    }
    // Only workloads of the mesh are told who we are; others would pass it on to who knows whom.
    let known = !Arc::ptr_eq(&host.peer, connection.worker.peers.unknown());
    if connection.direction == Direction::Outbound && known {
        let identity = &connection.worker.shared.identity;
        request
            .headers_mut()
            .insert(PEER_ID, identity.id_header.clone());
        request
            .headers_mut()
            .insert(PEER_METADATA, identity.metadata_header.clone());
    }
}

async fn with_deadline(plan: &Plan<'_>, trying: impl Future<Output = Try>) -> Result<Try, Failure> {
    match plan.deadline {
        None => Ok(trying.await),
        Some(deadline) => tokio::time::timeout_at(deadline, trying)
            .await
            .map_err(|_| Failure::Timeout),
    }
}

async fn once(
    plan: &Plan<'_>,
    mut request: Request<RequestBody>,
    host: &Rc<Host>,
    fresh: bool,
    more: bool,
) -> Try {
    let shared = &plan.exchange.connection.worker.shared;
    let version = upstream_version(plan.cluster, request.version());
    let mut lease = match host
        .lease(shared, &plan.cluster.config, version, fresh)
        .await
    {
        Ok(lease) => lease,
        Err(error) => {
            tracing::debug!(endpoint = %host.address, %error, "connecting");
            let timeout = matches!(error, ConnectError::Timeout);
            return Try::Unsent(
                Box::new(request),
                if timeout {
                    Failure::ConnectTimeout
                } else {
                    Failure::Connect
                },
            );
        }
    };
    let spare = plan
        .keeps_head(&request, &lease, version)
        .then(|| Spare::of(&request));
    address_head(&mut request, version);
    let repeat_at_once = lease.suspect && !fresh && is_idempotent(request.method());
    let sent_at = StdInstant::now();
    let per_try = plan.policy().and_then(|policy| policy.per_try_timeout);
    let sent = match limited(per_try, plan.idle, lease.send(request)).await {
        Ok(sent) => sent,
        Err(failure) => return Try::Lost(spare, failure, Retry::ByPolicy),
    };
    match sent {
        Some(Sent::Response(response)) => judge(plan, response, lease, sent_at, spare, more),
        Some(Sent::Unsent(request, error)) => {
            tracing::debug!(endpoint = %host.address, %error, "not sent");
            Try::Unsent(request, Failure::Closed)
        }
        Some(Sent::Lost(error)) => {
            tracing::debug!(endpoint = %host.address, %error, "lost");
            let failure = classify(&error);
            let always = repeat_at_once && failure == Failure::Closed;
            Try::Lost(
                spare,
                failure,
                if always {
                    Retry::Always
                } else {
                    Retry::ByPolicy
                },
            )
        }
        None => Try::Lost(spare, Failure::Closed, Retry::ByPolicy),
    }
}

/// Waits no longer than the per-try timeout and the stream's idle timeout.
async fn limited<T>(
    per_try: Option<Duration>,
    idle: Option<Duration>,
    waiting: impl Future<Output = T>,
) -> Result<T, Failure> {
    let (limit, failure) = match (per_try, idle) {
        (None, None) => return Ok(waiting.await),
        (Some(per_try), Some(idle)) if idle < per_try => (idle, Failure::Idle),
        (Some(per_try), _) => (per_try, Failure::Timeout),
        (None, Some(idle)) => (idle, Failure::Idle),
    };
    tokio::time::timeout(limit, waiting)
        .await
        .map_err(|_| failure)
}

/// A response that the policy wants to try again is dropped, where that is possible.
fn judge(
    plan: &Plan<'_>,
    response: Response<Incoming>,
    lease: Lease,
    sent_at: StdInstant,
    spare: Option<Spare>,
    more: bool,
) -> Try {
    let again = more
        && plan.policy().is_some_and(|policy| {
            policy.wants_status(response.status().as_u16())
                || (plan.exchange.is_grpc
                    && grpc_status(response.headers())
                        .is_some_and(|code| policy.wants_grpc_status(u32::from(code))))
        });
    match spare {
        Some(spare) if again => Try::Lost(Some(spare), Failure::Refused, Retry::ByPolicy),
        _ => Try::Done(response, lease, sent_at),
    }
}

fn classify(error: &hyper::Error) -> Failure {
    if error.is_parse() || error.is_parse_too_large() {
        return Failure::Protocol;
    }
    if error.is_user() {
        return Failure::Client;
    }
    // The text of h2's reason is the only way to it without depending on that crate.
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if inner.to_string().contains("refused stream") {
            return Failure::Refused;
        }
        source = inner.source();
    }
    Failure::Closed
}

/// Does the policy want another try after this failure?
fn wants(plan: &Plan<'_>, failure: Failure, unsent: bool) -> bool {
    let Some(policy) = plan.policy() else {
        return false;
    };
    let on = policy.on;
    match failure {
        Failure::Connect | Failure::ConnectTimeout => {
            on.connect_failure || on.server_error || on.gateway_error || on.reset
        }
        Failure::Refused => true,
        Failure::Closed => {
            on.reset
                || on.server_error
                || on.gateway_error
                || (unsent && (on.reset_before_request || on.connect_failure))
        }
        Failure::Protocol => on.reset || on.server_error,
        Failure::Timeout => on.server_error || on.gateway_error,
        Failure::NoHealthy | Failure::Idle | Failure::Client => false,
    }
}

async fn back_off(plan: &Plan<'_>, attempts: u32) {
    let random = plan.exchange.connection.worker.random();
    let wait = plan
        .policy()
        .map_or(Duration::ZERO, |policy| policy.back_off(attempts, random));
    match plan.deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.min(Instant::now() + wait)).await,
        None => tokio::time::sleep(wait).await,
    }
}
