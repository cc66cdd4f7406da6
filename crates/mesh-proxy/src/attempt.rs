//! Sending a request: endpoint, connection, try after try.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version};
use hyper::body::Incoming;
use mesh_routing::action::{Forward, HostRewrite};
use mesh_routing::cluster::Cluster;
use mesh_routing::listener::Direction;
use mesh_routing::retry::{Loss, RetryPolicy};
use mesh_routing::route::Matched;
use mesh_telemetry::Peer;
use tokio::time::Instant;

use crate::body::{BodyError, Kept, RequestBody, grpc_status};
use crate::http::{
    ATTEMPT_COUNT, Exchange, Timeouts, address_head, has_body, is_idempotent, original_destination,
    upstream_version,
};
use crate::node::{PEER_ID, PEER_METADATA};
use crate::pool::{ConnectError, Host, Lease, Sent, Version as Upstream};
use crate::report::{Flag, Flags};
use crate::tls::connect::{Wish as TlsWish, failure_reason};
use crate::upstream::counters::Counter;
use crate::upstream::{ClusterState, Observation, RetryGuard, Wish};

const TIMEOUT_RETRY: HeaderName = HeaderName::from_static("x-envoy-is-timeout-retry");

/// Everything that the tries of one request have in common.
pub struct Plan<'a> {
    exchange: &'a Exchange,
    route: &'a Forward,
    cluster: &'a Cluster,
    state: &'a ClusterState,
    policy: Option<&'a RetryPolicy>,
    timeouts: Timeouts,
    version: Upstream,
    count_attempts: bool,
    tell_timeouts: bool,
    /// Could the request be tried again after it was sent?
    repeats_sent: bool,
    kept: Option<Rc<Kept>>,
    hash: Option<u64>,
    /// What it wants of TLS handshakes.
    wish: TlsWish,
    /// Why the last one failed, in Envoy's words.
    transport_failure: RefCell<Option<Box<str>>>,
}

/// A response to pass on.
pub struct Done {
    /// It.
    pub response: Response<Incoming>,
    /// Its connection.
    pub lease: Lease,
    /// When the request was sent.
    pub sent_at: StdInstant,
}

/// How it went.
pub struct Outcome {
    /// The response, or why there is none.
    pub result: Result<Box<Done>, Failure>,
    /// The last endpoint's workload, where one was found.
    pub peer: Option<Arc<Peer>>,
    /// Flags that retrying has set.
    pub flags: Flags,
    /// Tries made.
    pub attempts: u32,
    /// Times that it was sent again because a connection was closed while it was idle; they are told, but take nothing from the policy.
    pub repeats: u32,
    /// Why the last connection was not made (TLS), in Envoy's words.
    pub transport_failure: Option<Box<str>>,
}

impl Outcome {
    /// How often the request was sent, or was to be, as endpoint and client are told.
    pub fn sendings(&self) -> u32 {
        self.attempts + self.repeats
    }
}

/// Why there is no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No usable endpoint.
    NoHealthy,
    /// A limit of the cluster is reached.
    Overflow,
    /// Connecting failed.
    Connect,
    /// Connecting took too long.
    ConnectTimeout,
    /// The connection ended.
    Closed,
    /// The endpoint refused the stream.
    Refused,
    /// The endpoint reset the stream.
    Reset,
    /// The endpoint broke the protocol.
    Protocol,
    /// The route's timeout is over.
    Timeout,
    /// A try's timeout is over.
    PerTry,
    /// Nothing came within the idle timeout.
    Idle,
    /// The request did not come whole in time.
    Request,
    /// The exchange lasted too long.
    Duration,
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

    fn into_request(self, plan: &Plan<'_>) -> Request<RequestBody> {
        let body = RequestBody::again(plan.kept.as_ref(), &plan.exchange.flow);
        let mut request = Request::new(body);
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.version_mut() = self.version;
        *request.headers_mut() = self.headers;
        request
    }
}

/// What one try came to.
enum Try {
    Done(Box<Done>, Option<Spare>),
    /// Nothing was sent; the request is whole.
    Unsent(Box<Request<RequestBody>>, Failure),
    /// The same, on a connection that had been used before and was closed meanwhile, or the first time; that does not count as a try.
    Gone(Box<Request<RequestBody>>),
    /// It may have been received. A spare head, if one was kept, makes another try possible.
    Lost(Option<Spare>, Failure),
    /// An idle connection was closed under a request that may be repeated; that does not count as a try.
    Stale(Spare),
}

/// What the next try begins with.
enum Again {
    Whole(Box<Request<RequestBody>>),
    Spare(Spare),
}

/// A try that the policy would repeat: what it ended with if it is not, and what is needed to repeat it.
struct Unwanted {
    result: Result<Box<Done>, Failure>,
    again: Option<Again>,
    wait: Option<Duration>,
}

impl<'a> Plan<'a> {
    /// For a matched request. Its body is remembered where it may have to be sent again.
    pub fn new(
        exchange: &'a Exchange,
        route: &'a Forward,
        matched: &Matched<'_>,
        (cluster, state): (&'a Cluster, &'a ClusterState),
        (policy, timeouts): (Option<&'a RetryPolicy>, Timeouts),
        request: &mut Request<RequestBody>,
    ) -> Self {
        let version = upstream_version(cluster, request.version());
        let http2 = version == Upstream::Http2;
        let repeats_sent = policy.is_some_and(|p| p.repeats_sent(exchange.is_grpc, http2));
        if !timeouts.are_none(&exchange.flow) {
            exchange.flow.watch();
        }
        Self {
            kept: repeats_sent
                .then(|| request.body_mut().keep(route.buffer_limit))
                .flatten(),
            exchange,
            route,
            cluster,
            state,
            policy,
            timeouts,
            version,
            count_attempts: matched.host.request_attempt_count,
            tell_timeouts: matched.host.tell_timeouts,
            repeats_sent,
            hash: None,
            wish: tls_wish(exchange, cluster, version, request.headers()),
            transport_failure: RefCell::default(),
        }
    }

    /// The request goes where its hash leads, where the cluster looks at it.
    pub fn hashed(mut self, hash: Option<u64>) -> Self {
        self.hash = hash;
        self
    }

    fn pick(&self, tried: &Tried) -> Option<Rc<Host>> {
        let worker = &self.exchange.connection.worker;
        let policy = self.policy;
        let wish = Wish {
            destination: original_destination(self.exchange),
            hash: self.hash,
            tried: &tried.hosts,
            avoid: policy.map_or(0, |policy| policy.avoid_previous_hosts),
            tried_priorities: &tried.priorities,
            update_frequency: policy
                .and_then(|policy| policy.avoid_previous_priorities)
                .unwrap_or(0),
        };
        self.state.pick(&wish, &worker.peers, || worker.random())
    }

    /// Can what was sent of the body be sent again?
    fn body_repeats(&self) -> bool {
        self.kept.as_ref().is_none_or(|kept| kept.may_repeat())
    }

    /// Waits for something, as long as the limits allow.
    async fn within<T>(
        &self,
        tried: Instant,
        waiting: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        let flow = &self.exchange.flow;
        if self.timeouts.are_none(flow) {
            return Ok(waiting.await);
        }
        tokio::select! {
            biased;
            done = waiting => Ok(done),
            failure = self.timeouts.expire(flow, tried) => Err(failure),
        }
    }
}

/// The endpoints of the tries that were made.
#[derive(Debug, Default)]
struct Tried {
    hosts: Vec<SocketAddr>,
    priorities: Vec<u32>,
}

/// Tries until there is a response to pass on, or nothing is left to try.
pub async fn run(plan: &Plan<'_>, mut request: Request<RequestBody>) -> Outcome {
    let mut tried = Tried::default();
    let mut outcome = Outcome {
        result: Err(Failure::NoHealthy),
        peer: None,
        flags: Flags::NONE,
        attempts: 0,
        repeats: 0,
        transport_failure: None,
    };
    let mut fresh = false;
    let mut retrying = None;
    loop {
        outcome.attempts += 1;
        let Some(host) = plan.pick(&tried) else {
            outcome.result = Err(Failure::NoHealthy);
            break;
        };
        outcome.peer = Some(host.peer.clone());
        dress(plan, &mut request, &host, outcome.sendings());
        let unwanted = match once(plan, request, &host, fresh).await {
            Try::Done(done, spare) => match unwanted_response(plan, done, spare) {
                Ok(done) => {
                    if outcome.attempts > 1 {
                        plan.state.count(Counter::RqRetrySuccess);
                    }
                    outcome.result = Ok(done);
                    break;
                }
                Err(unwanted) => unwanted,
            },
            // However many there are: a shared connection is found again by the next pick, and several endpoints may end at once.
            Try::Gone(whole) => {
                (request, fresh) = (*whole, true);
                outcome.attempts -= 1;
                continue;
            }
            Try::Stale(spare) => {
                (request, fresh) = (spare.into_request(plan), true);
                outcome.attempts -= 1;
                outcome.repeats += 1;
                continue;
            }
            Try::Unsent(whole, failure) => unwanted_loss(failure, Some(Again::Whole(whole))),
            Try::Lost(spare, failure) => unwanted_loss(failure, spare.map(Again::Spare)),
        };
        let timed_out = unwanted.result.as_ref().err() == Some(&Failure::PerTry);
        // The last retry is over before the next one is counted.
        drop(retrying.take());
        match another(plan, unwanted, &mut outcome).await {
            Some((again, guard)) => (request, retrying) = (again, Some(guard)),
            None => break,
        }
        if timed_out && plan.tell_timeouts {
            let yes = HeaderValue::from_static("true");
            request.headers_mut().insert(TIMEOUT_RETRY, yes);
        }
        tried.hosts.push(host.address);
        tried.priorities.push(host.priority());
        fresh = false;
    }
    if let Some(kept) = &plan.kept {
        kept.forget();
    }
    outcome.transport_failure = plan.transport_failure.take();
    outcome
}

/// What the request wants of the connection that it goes out on, and of its TLS handshake.
pub(crate) fn tls_wish(
    exchange: &Exchange,
    cluster: &Cluster,
    version: Upstream,
    headers: &HeaderMap,
) -> TlsWish {
    let source = exchange.connection.source;
    let transports = &cluster.config.transports;
    let ends = exchange.connection.ends_for(transports);
    if !transports.is_tls() {
        return TlsWish {
            ends,
            source,
            ..TlsWish::default()
        };
    }
    let alpn = match version {
        _ if transports.fixed_alpn => None,
        Upstream::Http1 => exchange.alpn.0.clone(),
        Upstream::Http2 => exchange.alpn.1.clone(),
    };
    let names = &transports.names;
    let server_name = names.sni.then(|| {
        let header = names.header.as_ref().and_then(|name| headers.get(name));
        let host = header.unwrap_or(&exchange.authority).to_str().unwrap_or("");
        without_port(host).into()
    });
    TlsWish {
        ends,
        alpn,
        server_name,
        source,
    }
}

/// The host of an authority, also of an IPv6 address in brackets.
fn without_port(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    authority
        .rsplit_once(':')
        .map_or(authority, |(host, _)| host)
}

/// A response that the policy wants to try again, or that which is passed on.
fn unwanted_response(
    plan: &Plan<'_>,
    done: Box<Done>,
    spare: Option<Spare>,
) -> Result<Box<Done>, Unwanted> {
    let headers = done.response.headers();
    let policy = plan
        .policy
        .filter(|policy| policy.wants_response(done.response.status(), headers));
    let Some(policy) = policy else {
        return Ok(done);
    };
    let random = plan.exchange.connection.worker.random();
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_secs());
    let wait = policy.back_off_by(headers, now, random);
    Err(Unwanted {
        result: Ok(done),
        again: spare.map(Again::Spare),
        wait,
    })
}

fn unwanted_loss(failure: Failure, again: Option<Again>) -> Unwanted {
    Unwanted {
        result: Err(failure),
        again,
        wait: None,
    }
}

/// The request for another try, after the wait before it; `None` where what there is has to do.
async fn another(
    plan: &Plan<'_>,
    unwanted: Unwanted,
    outcome: &mut Outcome,
) -> Option<(Request<RequestBody>, RetryGuard)> {
    let wanted = match (&unwanted.result, plan.policy) {
        (_, None) => None,
        (Ok(_), policy) => policy,
        (Err(failure), Some(policy)) => {
            let begun = !matches!(unwanted.again, Some(Again::Whole(_)));
            let loss = failure.loss();
            Some(policy).filter(|p| loss.is_some_and(|loss| p.wants_loss(loss, begun)))
        }
    };
    let again = match unwanted.again {
        Some(Again::Spare(_)) if !plan.body_repeats() => None,
        again => again,
    };
    let (Some(policy), Some(again)) = (wanted, again) else {
        outcome.result = unwanted.result;
        return None;
    };
    if outcome.attempts > policy.retries {
        plan.state.count(Counter::RqRetryLimitExceeded);
        outcome.flags.add(Flag::RetryLimit);
        outcome.result = unwanted.result;
        return None;
    }
    let Some(guard) = plan.state.admit_retry() else {
        outcome.flags.add(Flag::Overflow);
        outcome.result = unwanted.result;
        return None;
    };
    if let Ok(done) = unwanted.result {
        let_go(plan, *done);
    }
    let random = plan.exchange.connection.worker.random();
    let wait = unwanted
        .wait
        .unwrap_or_else(|| policy.back_off(outcome.attempts, random));
    let waiting = tokio::time::sleep(wait);
    // A try's own limit does not count between tries.
    let far = Instant::now() + wait + Duration::from_secs(1);
    if let Err(failure) = plan.within(far, waiting).await {
        outcome.result = Err(failure);
        return None;
    }
    let request = match again {
        Again::Whole(request) => *request,
        Again::Spare(spare) => spare.into_request(plan),
    };
    Some((request, guard))
}

/// A response that is not passed on: its connection is used again where nothing of it is left to come.
fn let_go(plan: &Plan<'_>, done: Done) {
    if http_body::Body::is_end_stream(done.response.body()) {
        done.lease.give_back(plan.exchange.flow.request_sent.get());
    }
}

impl Failure {
    /// What retry conditions take it for; `None` where nothing is tried again.
    fn loss(self) -> Option<Loss> {
        match self {
            Self::Connect | Self::ConnectTimeout => Some(Loss::Connect),
            Self::Refused => Some(Loss::Refused),
            Self::Closed | Self::Reset | Self::Protocol | Self::PerTry => Some(Loss::Reset),
            Self::NoHealthy
            | Self::Overflow
            | Self::Timeout
            | Self::Idle
            | Self::Request
            | Self::Duration
            | Self::Client => None,
        }
    }
}

impl Failure {
    /// What the endpoint is to be held responsible for.
    fn observed(self) -> Option<Observation> {
        match self {
            Self::Closed | Self::Refused | Self::Reset | Self::Protocol => Some(Observation::Reset),
            Self::PerTry => Some(Observation::TryTimeout),
            Self::Timeout => Some(Observation::Timeout),
            _ => None,
        }
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
    if let Some(HostRewrite::Endpoint) = plan.route.host_rewrite {
        let name = host.hostname();
        if let Ok(name) = HeaderValue::from_str(&name)
            && !name.is_empty()
        {
            request.headers_mut().insert(http::header::HOST, name);
        }
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

async fn once(
    plan: &Plan<'_>,
    mut request: Request<RequestBody>,
    host: &Rc<Host>,
    fresh: bool,
) -> Try {
    let shared = &plan.exchange.connection.worker.shared;
    let tried = Instant::now();
    let how = (plan.version, &plan.wish);
    let leasing = host.lease_for(shared, &plan.cluster.config, how, fresh);
    let mut lease = match plan.within(tried, leasing).await {
        Ok(Ok(lease)) => lease,
        Ok(Err(error)) => {
            tracing::debug!(endpoint = %host.address, %error, "connecting");
            if let ConnectError::Tls(error) = &error {
                plan.transport_failure
                    .replace(Some(failure_reason(error).into()));
            }
            let failure = match error {
                ConnectError::Timeout => Failure::ConnectTimeout,
                ConnectError::Overflow => Failure::Overflow,
                _ => Failure::Connect,
            };
            return Try::Unsent(Box::new(request), failure);
        }
        Err(failure) => return Try::Unsent(Box::new(request), failure),
    };
    let stale = lease.suspect && !fresh && is_idempotent(request.method()) && !has_body(&request);
    let mut spare = (plan.repeats_sent || stale).then(|| Spare::of(&request));
    if !address_head(&mut request, plan.version) {
        // Nothing that any endpoint would take.
        return Try::Lost(None, Failure::Protocol);
    }
    let sent_at = StdInstant::now();
    let sent = match plan.within(tried, lease.send(request)).await {
        Ok(sent) => sent,
        Err(failure) => {
            note(host, failure);
            return Try::Lost(spare, failure);
        }
    };
    match sent {
        Some(Sent::Response(response)) => {
            host.observe(judge(&response));
            let done = Done {
                response,
                lease,
                sent_at,
            };
            Try::Done(Box::new(done), spare)
        }
        Some(Sent::Unsent(request, error)) => {
            tracing::debug!(endpoint = %host.address, %error, "not sent");
            match lease.reused || !fresh {
                true => Try::Gone(request),
                false => Try::Unsent(request, Failure::Closed),
            }
        }
        Some(Sent::Lost(error)) => {
            tracing::debug!(endpoint = %host.address, %error, "lost");
            let failure = classify(&error);
            match spare.take_if(|_| stale && failure == Failure::Closed) {
                Some(spare) => Try::Stale(spare),
                None => {
                    note(host, failure);
                    Try::Lost(spare, failure)
                }
            }
        }
        None => Try::Lost(spare, Failure::Closed),
    }
}

fn note(host: &Host, failure: Failure) {
    if let Some(what) = failure.observed() {
        host.observe(what);
    }
}

/// What outlier detection takes a response for; a gRPC status in the headers counts as the HTTP status that stands for it (Envoy's
/// `grpcToHttpStatus`).
pub(crate) fn judge(response: &Response<Incoming>) -> Observation {
    let status = response.status().as_u16();
    let judged = match grpc_status(response.headers()) {
        None => status,
        Some(0) => 200,
        Some(1) => 499,
        Some(3 | 9 | 11) => 400,
        Some(4) => 504,
        Some(5) => 404,
        Some(6 | 10) => 409,
        Some(7) => 403,
        Some(8) => 429,
        Some(12) => 501,
        Some(14) => 503,
        Some(16) => 401,
        Some(_) => 500,
    };
    Observation::Response { status, judged }
}

fn classify(error: &hyper::Error) -> Failure {
    if error.is_parse() || error.is_parse_too_large() {
        return Failure::Protocol;
    }
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(error) = inner.downcast_ref::<h2::Error>() {
            return classify_http2(error);
        }
        if inner.downcast_ref::<BodyError>().is_some() {
            return Failure::Client;
        }
        source = inner.source();
    }
    if error.is_user() {
        Failure::Client
    } else {
        Failure::Closed
    }
}

/// Streams that a GOAWAY leaves out, and refused ones, were not worked on (RFC 9113 section 8.7).
fn classify_http2(error: &h2::Error) -> Failure {
    match error.reason() {
        Some(h2::Reason::REFUSED_STREAM) => Failure::Refused,
        _ if error.is_go_away() && error.is_remote() => Failure::Refused,
        Some(_) if error.is_reset() && error.is_remote() => Failure::Reset,
        Some(_) if error.is_library() => Failure::Protocol,
        _ => Failure::Closed,
    }
}
