//! The filters of a connection manager at work: between the decision on the route and what the route does.
//!
//! A request that no filter is for does not come here. One that only passes pays for what its filters do; only waiting (for a delay, for
//! a service) is put on the heap.

pub mod bucket;
mod call;
mod check;
mod grpc;
pub mod guard;
pub mod jwt;
mod rbac;
pub mod stats;
mod throttle;

use std::sync::Arc;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::HeaderValue as PbHeader;
use envoy_types::pb::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor;
use envoy_types::pb::envoy::extensions::common::ratelimit::v3::rate_limit_descriptor::{
    Entry, RateLimitOverride,
};
use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_response::rate_limit::Unit;
use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_response::{Code, DescriptorStatus};
use envoy_types::pb::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use envoy_types::pb::google::protobuf::UInt64Value;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, request};
use mesh_routing::Snapshot;
use mesh_routing::action::{Action, ClusterTarget};
use mesh_routing::dynamic::Dynamic;
use mesh_routing::filter::cors::{self, CorsPolicy, Verdict};
use mesh_routing::filter::descriptor::Facts;
use mesh_routing::filter::fault::Fault;
use mesh_routing::filter::local_rate_limit::LocalRateLimit;
use mesh_routing::filter::rate_limit::{Question, RateLimit, RateLimitPerRoute};
use mesh_routing::filter::{Active, RouteFilters};
use mesh_routing::format::Facts as FormatFacts;
use mesh_routing::hcm::HttpManager;
use mesh_routing::headers::HeaderOps;
use mesh_routing::route::{Decision, Matched, RouteTable};

use crate::body::{Input, ResponseBody};
use crate::http::{Exchange, view};
use crate::reply;
use crate::report::{Flag, Flags, Report};
use bucket::{ActiveFault, Buckets};
pub use throttle::Throttle;

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
const RATE_LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");
/// gRPC's RESOURCE_EXHAUSTED.
const RESOURCE_EXHAUSTED: u16 = 8;
const SHOULD_RATE_LIMIT: &str = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";

/// What filters left for the response.
#[derive(Debug, Default)]
pub struct Pass {
    /// Take the place of the response's own.
    set: HeaderMap,
    /// Come beside them.
    add: HeaderMap,
    /// Come where the response has none of the name.
    add_if_absent: HeaderMap,
    /// Take the place of the response's own where it has some.
    set_if_present: HeaderMap,
    throttle: Option<Box<Throttle>>,
    fault: Option<ActiveFault>,
}

/// An answer of a filter in the endpoint's place.
#[derive(Debug)]
pub struct LocalReply<'a> {
    status: StatusCode,
    grpc: Option<u16>,
    body: Bytes,
    flag: Option<Flag>,
    headers: HeaderMap,
    ops: Option<&'a HeaderOps>,
    /// Without the route's mutations.
    plain: bool,
}

/// The outcome of all filters.
pub enum Outcome<'a> {
    /// On to what the route does.
    Continue(Option<Box<Pass>>),
    /// This is the answer.
    Reply(Box<LocalReply<'a>>, Option<Box<Pass>>),
}

impl Pass {
    /// Does to a response, whoever made it, what filters want done.
    pub fn on_response(self, response: &mut Response<ResponseBody>) {
        let headers = response.headers_mut();
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
        for (name, value) in &self.add_if_absent {
            headers.entry(name).or_insert_with(|| value.clone());
        }
        for (name, value) in &self.set_if_present {
            if headers.contains_key(name) {
                headers.insert(name, value.clone());
            }
        }
        if let Some(throttle) = self.throttle {
            response.body_mut().slow_down(throttle);
        }
    }
}

impl LocalReply<'_> {
    /// As a response. `decorate` makes the route's mutations, before the filter's own; only the answer to a preflight goes without them.
    pub fn into_response(
        self,
        mut report: Box<Report>,
        decorate: impl FnOnce(&mut Response<ResponseBody>),
    ) -> Response<ResponseBody> {
        report.flags.add(self.flag.map_or(Flags::NONE, Flags::from));
        let mut response =
            reply::with_grpc_status(self.status, self.body, Flags::NONE, self.grpc, report);
        if !self.plain {
            decorate(&mut response);
        }
        let headers = response.headers_mut();
        for name in self.headers.keys() {
            headers.remove(name);
        }
        merge(headers, self.headers);
        if let Some(ops) = self.ops {
            ops.apply_to_response(headers, &FormatFacts::default());
        }
        response
    }
}

/// A request before its filters.
pub struct Request<'a> {
    /// The configuration in force for it.
    pub snapshot: &'a Snapshot,
    /// The connection manager.
    pub manager: &'a Arc<HttpManager>,
    /// The request.
    pub exchange: &'a Exchange,
    /// The routes.
    pub table: &'a RouteTable,
}

/// What filters of one request tell each other.
#[derive(Debug, Default)]
struct Notes {
    metadata: Option<Box<Dynamic>>,
}

/// What the route says to the filters, the most specific level first.
struct Said<'a> {
    filters: Option<&'a RouteFilters>,
    /// The cluster that the route leads to; `None` where it does not forward.
    cluster: Option<Arc<str>>,
}

/// May any filter be for a request of this route? A null check in most cases.
pub fn wanted(manager: &HttpManager, matched: Option<&Matched<'_>>) -> bool {
    let said = matched.and_then(|matched| matched.route.filters.as_deref());
    manager.filters.wanted(said)
}

impl<'a> Request<'a> {
    /// Leads the request through its filters. They may have its route looked for again: `decision` is the last word.
    pub async fn run(
        &self,
        decision: &mut Decision<'a>,
        parts: &mut request::Parts,
        body: &mut Input,
        report: &mut Report,
    ) -> Outcome<'a> {
        let mut said = self.said(decision, parts);
        let mut pass = None;
        let mut notes = Notes::default();
        let mut place = 0;
        // Where a service would have been asked, had there been a route already.
        let mut unasked = Vec::new();
        while let Some(filter) = self.manager.filters.next_active(&mut place, said.filters) {
            let mut reroute = false;
            let reply = match filter {
                Active::Rbac(filter, rules) => self.rbac(filter, rules, parts, &mut notes),
                Active::Jwt(filter, route) => {
                    let (reply, anew) = self.jwt(filter, route, parts, &mut notes).await;
                    reroute = anew;
                    reply
                }
                // Envoy asks nothing about requests without a route; what finds one later is asked then.
                Active::ExtAuthz(filter, route) if matches!(decision, Decision::Matched(_)) => {
                    let kept = (&mut notes, &mut pass);
                    let asked = self.check(filter, route, (&mut *parts, &mut *body), kept);
                    let checked = Box::pin(asked).await;
                    reroute = checked.reroute;
                    checked.reply
                }
                Active::ExtAuthz(..) => {
                    unasked.push(place - 1);
                    None
                }
                Active::Fault(fault) => self.fault(fault, &said, parts, report, &mut pass).await,
                Active::Cors(policies) => self.cors(policies, &said, parts, &mut pass),
                Active::LocalRateLimit(rule, _) => self.local(rule, &said, parts, &mut pass),
                Active::RateLimit(rule, route, settings) => {
                    match self.to_ask(rule, (route, settings), &said, parts) {
                        Some(question) => {
                            Box::pin(self.ask(rule, question, parts, &mut pass)).await
                        }
                        None => None,
                    }
                }
            };
            if let Some(reply) = reply {
                self.attribute(&said, report);
                return Outcome::Reply(Box::new(reply), pass);
            }
            while std::mem::take(&mut reroute) {
                let view = view(self.exchange, parts);
                *decision = self.table.decide_with(&view, notes.metadata.as_deref());
                said = self.said(decision, parts);
                if !matches!(decision, Decision::Matched(_)) {
                    break;
                }
                for mut skipped in std::mem::take(&mut unasked) {
                    let filters = &self.manager.filters;
                    let again = filters.next_active(&mut skipped, said.filters);
                    let Some(Active::ExtAuthz(filter, route)) = again else {
                        continue;
                    };
                    let kept = (&mut notes, &mut pass);
                    let asked = self.check(filter, route, (&mut *parts, &mut *body), kept);
                    let checked = Box::pin(asked).await;
                    if let Some(reply) = checked.reply {
                        self.attribute(&said, report);
                        return Outcome::Reply(Box::new(reply), pass);
                    }
                    reroute |= checked.reroute;
                }
            }
        }
        Outcome::Continue(pass)
    }

    fn cors(
        &self,
        policies: &[Arc<CorsPolicy>],
        said: &Said<'_>,
        parts: &request::Parts,
        pass: &mut Option<Box<Pass>>,
    ) -> Option<LocalReply<'a>> {
        said.cluster.as_ref()?;
        match cors::judge(policies, &view(self.exchange, parts), self.random()) {
            Verdict::Pass => None,
            Verdict::Decorate(headers) => {
                merge(&mut passed(pass).set, headers);
                None
            }
            Verdict::Answer(headers) => Some(LocalReply {
                headers,
                plain: true,
                ..LocalReply::new(StatusCode::OK, None)
            }),
        }
    }

    /// What to ask the rate limit service; `None` where it is not to be asked.
    fn to_ask(
        &self,
        rule: &RateLimit,
        (route, settings): (Option<&RouteFilters>, Option<&RateLimitPerRoute>),
        said: &Said<'_>,
        parts: &request::Parts,
    ) -> Option<RateLimitRequest> {
        let view = view(self.exchange, parts);
        let facts = self.facts(&view, said.cluster.as_deref()?);
        let question = rule.question(route, settings, &facts).map(encode)?;
        rule.enabled.covers(self.random()).then_some(question)
    }

    /// An answer in the endpoint's place counts for the service that the route leads to.
    fn attribute(&self, said: &Said<'_>, report: &mut Report) {
        let cluster = said.cluster.as_deref();
        if let Some(cluster) = cluster.and_then(|name| self.snapshot.cluster(name)) {
            let worker = &self.exchange.connection.worker;
            report.reports = worker.cluster_state(cluster).reports();
            if report.reports.follows_host() {
                report.host = Some(self.exchange.authority.clone());
            }
        }
    }

    fn said(&self, decision: &Decision<'a>, parts: &request::Parts) -> Said<'a> {
        let Decision::Matched(matched) = *decision else {
            return Said {
                filters: None,
                cluster: None,
            };
        };
        let of_route = matched.route.filters.as_deref();
        let Action::Forward(forward) = &matched.route.action else {
            return Said {
                filters: of_route,
                cluster: None,
            };
        };
        match forward.target(&view(self.exchange, parts)) {
            ClusterTarget::Entry(entry) => Said {
                filters: entry.filters.as_deref().or(of_route),
                cluster: Some(entry.name.clone()),
            },
            ClusterTarget::Named(name) => Said {
                filters: of_route,
                cluster: Some(name),
            },
            ClusterTarget::Missing => Said {
                filters: of_route,
                cluster: Some("".into()),
            },
        }
    }

    fn random(&self) -> u64 {
        self.exchange.connection.worker.random()
    }

    fn now(&self) -> f64 {
        let shared = &self.exchange.connection.worker.shared;
        shared.started.elapsed().as_secs_f64()
    }

    fn facts<'f>(
        &'f self,
        view: &'f mesh_routing::route::RequestView<'f>,
        destination_cluster: &'f str,
    ) -> Facts<'f> {
        let connection = &self.exchange.connection;
        Facts {
            request: view,
            remote: connection.remote.ip(),
            source_cluster: &connection.worker.shared.identity.node.cluster,
            destination_cluster,
        }
    }

    /// Delay first, then abort; both are drawn for themselves.
    async fn fault(
        &self,
        fault: &'a Fault,
        said: &Said<'_>,
        parts: &request::Parts,
        report: &mut Report,
        pass: &mut Option<Box<Pass>>,
    ) -> Option<LocalReply<'a>> {
        let counters = &self.exchange.connection.worker.shared.counters;
        let full = |most| counters.active_faults(self.manager) >= most;
        if fault.max_active.is_some_and(full)
            || !fault.applies(&view(self.exchange, parts), said.cluster.as_deref())
        {
            return None;
        }
        if let Some(rate) = fault.response_kib_per_second(&parts.headers, self.random()) {
            let active = counters.begin_fault(self.manager);
            passed(pass).throttle = Some(Box::new(Throttle::new(rate, active)));
        }
        if let Some(delay) = fault.delay(&parts.headers, self.random()) {
            passed(pass).fault = Some(counters.begin_fault(self.manager));
            report.flags.add(Flag::DelayInjected);
            Box::pin(tokio::time::sleep(delay)).await;
        }
        let abort = fault.abort(&parts.headers, self.random())?;
        Some(LocalReply {
            grpc: abort.grpc,
            body: abort.body.into(),
            ..LocalReply::new(abort.status, Some(Flag::FaultInjected))
        })
    }

    fn local(
        &self,
        rule: &'a Arc<LocalRateLimit>,
        said: &Said<'_>,
        parts: &mut request::Parts,
        pass: &mut Option<Box<Pass>>,
    ) -> Option<LocalReply<'a>> {
        if !rule.enabled.covers(self.random()) {
            return None;
        }
        let now = self.now();
        let buckets = self.buckets(rule, now);
        let judged = {
            let view = view(self.exchange, parts);
            let route = said.filters.filter(|_| said.cluster.is_some());
            let facts = self.facts(&view, said.cluster.as_deref().unwrap_or(""));
            let descriptors = rule.describe(route, &facts);
            rule.judge(&descriptors, |id, tokens| {
                buckets.get(id).is_some_and(|b| b.consume(tokens, now))
            })
        };
        let bucket = judged.bucket.and_then(|id| buckets.get(id));
        if let Some(bucket) = bucket.filter(|_| rule.tell_limits) {
            let add = &mut passed(pass).add;
            add.append(LIMIT, HeaderValue::from(bucket.most()));
            add.append(REMAINING, HeaderValue::from(bucket.remaining(now)));
            // Whole seconds of whole milliseconds, as Envoy counts them.
            let wait = (bucket.next_token(now) * 1000.0).round() / 1000.0;
            add.append(RESET, HeaderValue::from(wait as u64));
        }
        if judged.allowed {
            return None;
        }
        if !rule.enforced.covers(self.random()) {
            rule.request_ops
                .apply_to_request(&mut parts.headers, &FormatFacts::default());
            return None;
        }
        let mut reply = LocalReply::new(rule.status, Some(Flag::RateLimited));
        reply.body = Bytes::from_static(b"local_rate_limited");
        reply.grpc = rule.as_resource_exhausted.then_some(RESOURCE_EXHAUSTED);
        reply.ops = Some(&rule.response_ops);
        if rule.tell_retry && rule.status == StatusCode::TOO_MANY_REQUESTS {
            let wait = bucket.map_or(0.0, |bucket| bucket.next_token(now).ceil());
            reply
                .headers
                .insert(RETRY_AFTER, HeaderValue::from((wait as u64).max(1)));
        }
        Some(reply)
    }

    fn buckets(&self, rule: &Arc<LocalRateLimit>, now: f64) -> Arc<Buckets> {
        let connection = &self.exchange.connection;
        if !rule.per_connection {
            return connection.worker.shared.counters.buckets(rule, now);
        }
        let mut own = connection.buckets.borrow_mut();
        if let Some((_, buckets)) = own.iter().find(|(known, _)| Arc::ptr_eq(known, rule)) {
            return buckets.clone();
        }
        let buckets = Arc::new(Buckets::full(rule, now));
        own.push((rule.clone(), buckets.clone()));
        buckets
    }

    /// Asks the service. Whatever it does, there is an answer within the timeout: its failure means yes or no as configured.
    async fn ask(
        &self,
        rule: &'a RateLimit,
        question: RateLimitRequest,
        parts: &mut request::Parts,
        pass: &mut Option<Box<Pass>>,
    ) -> Option<LocalReply<'a>> {
        let call = grpc::call::<_, RateLimitResponse>(
            &self.exchange.connection.worker,
            self.snapshot,
            &rule.service,
            SHOULD_RATE_LIMIT,
            &question,
        );
        let answer = match rule.timeout {
            None => call.await.map_err(|error| error.to_string()),
            Some(timeout) => match tokio::time::timeout(timeout, call).await {
                Ok(answer) => answer.map_err(|error| error.to_string()),
                Err(_) => Err(format!("no answer within {timeout:?}")),
            },
        };
        let code = |answer: &RateLimitResponse| Code::try_from(answer.overall_code);
        match answer {
            Ok(answer) if code(&answer) == Ok(Code::Ok) => {
                self.allowed(rule, answer, parts, pass);
                None
            }
            Ok(answer) if code(&answer) == Ok(Code::OverLimit) => {
                if rule.enforced.covers(self.random()) {
                    return Some(refuse(rule, answer));
                }
                self.allowed(rule, answer, parts, pass);
                None
            }
            failed => {
                let reason = failed
                    .err()
                    .unwrap_or_else(|| "the answer has no code".to_owned());
                tracing::debug!(
                    service = &*rule.service.cluster,
                    reason,
                    "rate limit service"
                );
                let deny = rule.deny_on_failure.covers(self.random());
                deny.then(|| LocalReply::new(rule.status_on_error, Some(Flag::RateLimitService)))
            }
        }
    }

    fn allowed(
        &self,
        rule: &RateLimit,
        answer: RateLimitResponse,
        parts: &mut request::Parts,
        pass: &mut Option<Box<Pass>>,
    ) {
        for (name, value) in headers(&answer.request_headers_to_add) {
            parts.headers.append(name, value);
        }
        let over = answer.overall_code == Code::OverLimit as i32;
        let add = tell(rule, &answer, over);
        if !add.is_empty() {
            merge(&mut passed(pass).add, add);
        }
    }
}

impl LocalReply<'_> {
    fn new(status: StatusCode, flag: Option<Flag>) -> Self {
        Self {
            status,
            grpc: None,
            body: Bytes::new(),
            flag,
            headers: HeaderMap::new(),
            ops: None,
            plain: false,
        }
    }
}

fn passed(pass: &mut Option<Box<Pass>>) -> &mut Pass {
    pass.get_or_insert_default()
}

fn merge(into: &mut HeaderMap, from: HeaderMap) {
    let mut last = None;
    for (name, value) in from {
        if name.is_some() {
            last = name;
        }
        if let Some(name) = &last {
            into.append(name, value);
        }
    }
}

fn encode(question: Question<'_>) -> RateLimitRequest {
    let descriptors = question
        .descriptors
        .into_iter()
        .map(|d| RateLimitDescriptor {
            entries: d
                .entries
                .into_iter()
                .map(|(key, value)| Entry {
                    key: key.to_owned(),
                    value: value.into_owned(),
                })
                .collect(),
            limit: d.limit.map(|limit| RateLimitOverride {
                requests_per_unit: limit.requests,
                unit: limit.unit,
            }),
            hits_addend: d.hits.map(|value| UInt64Value { value }),
            ..RateLimitDescriptor::default()
        });
    RateLimitRequest {
        domain: question.domain.to_owned(),
        descriptors: descriptors.collect(),
        hits_addend: 0,
    }
}

/// What the service gives for the response, what of it is none is left out.
fn headers(list: &[PbHeader]) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    list.iter().filter_map(|header| {
        let value = match header.raw_value.is_empty() {
            true => HeaderValue::from_str(&header.value),
            false => HeaderValue::from_bytes(&header.raw_value),
        };
        header.key.parse().ok().zip(value.ok())
    })
}

fn refuse<'a>(rule: &'a RateLimit, answer: RateLimitResponse) -> LocalReply<'a> {
    let mut reply = LocalReply::new(rule.status, Some(Flag::RateLimited));
    reply.headers = tell(rule, &answer, true);
    if rule.tell_retry
        && rule.status == StatusCode::TOO_MANY_REQUESTS
        && !reply.headers.contains_key(RETRY_AFTER)
        && let Some(wait) = retry_after(&answer.statuses)
    {
        reply.headers.insert(RETRY_AFTER, HeaderValue::from(wait));
    }
    reply.grpc = rule.as_resource_exhausted.then_some(RESOURCE_EXHAUSTED);
    reply.body = answer.raw_body.into();
    reply.ops = Some(&rule.response_ops);
    if reply.body.is_empty() {
        reply.headers.remove(CONTENT_TYPE);
    }
    reply
}

/// Headers of the response that come from the service's answer.
fn tell(rule: &RateLimit, answer: &RateLimitResponse, over: bool) -> HeaderMap {
    let mut all: HeaderMap = HeaderMap::new();
    for (name, value) in headers(&answer.response_headers_to_add) {
        all.append(name, value);
    }
    if over && rule.tell_refusal {
        all.insert(RATE_LIMITED, HeaderValue::from_static("true"));
    }
    if rule.tell_limits {
        tell_limits(&answer.statuses, &mut all);
    }
    all
}

/// The limit that is nearest, and all limits with their windows (draft-polli-ratelimit-headers-03).
fn tell_limits(statuses: &[DescriptorStatus], headers: &mut HeaderMap) {
    let mut policies = String::new();
    let mut nearest: Option<(&DescriptorStatus, u32)> = None;
    for status in statuses {
        let Some(limit) = &status.current_limit else {
            continue;
        };
        if nearest.is_none_or(|(near, _)| status.limit_remaining < near.limit_remaining) {
            nearest = Some((status, limit.requests_per_unit));
        }
        if let Some(window) = seconds(limit.unit) {
            policies.push_str(&format!(", {};w={window}", limit.requests_per_unit));
            if !limit.name.is_empty() {
                policies.push_str(&format!(";name=\"{}\"", limit.name));
            }
        }
    }
    let Some((status, limit)) = nearest else {
        return;
    };
    let reset = status
        .duration_until_reset
        .as_ref()
        .map_or(0, |d| d.seconds);
    headers.insert(REMAINING, HeaderValue::from(status.limit_remaining));
    headers.insert(RESET, HeaderValue::from(reset));
    if let Ok(value) = HeaderValue::try_from(format!("{limit}{policies}")) {
        headers.insert(LIMIT, value);
    }
}

/// The length of the window; months and years as Envoy has them.
fn seconds(unit: i32) -> Option<u32> {
    Some(match Unit::try_from(unit).ok()? {
        Unit::Unknown => return None,
        Unit::Second => 1,
        Unit::Minute => 60,
        Unit::Hour => 3600,
        Unit::Day => 86_400,
        Unit::Week => 7 * 86_400,
        Unit::Month => 2_592_000,
        Unit::Year => 31_536_000,
    })
}

/// The longest wait among the limits that were passed.
fn retry_after(statuses: &[DescriptorStatus]) -> Option<u64> {
    statuses
        .iter()
        .filter(|status| status.code == Code::OverLimit as i32)
        .map(|status| {
            status
                .duration_until_reset
                .as_ref()
                .map_or(0, |d| d.seconds)
        })
        .max()
        .map(|wait| u64::try_from(wait).unwrap_or(0).max(1))
}
