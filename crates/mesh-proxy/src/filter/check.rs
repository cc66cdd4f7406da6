//! External authorization at work: a service is asked whether a request or connection may pass, and its answer is carried out.

mod ask;
mod verdict;

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse};
use envoy_types::pb::google::protobuf::value::Kind;
use http::{HeaderName, HeaderValue, StatusCode, request};
use mesh_routing::filter::ext_authz::{
    Authorizer, BodyPart, ConnectionExtAuthz, ExtAuthz, ExtAuthzPerRoute, HTTP_SECTION, Turn,
};

use super::rbac::one;
use super::stats::{Counter, Stats, inc};
use super::{LocalReply, Notes, Pass, Request, grpc};
use crate::body::{Input, Peeked};
use crate::listener::Downstream;
use crate::report::Flag;
use verdict::Verdict;

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
const FAILURE_ALLOWED: HeaderName = HeaderName::from_static("x-envoy-auth-failure-mode-allowed");
/// Wait for a body where the connection manager sets no limit.
const BODY_WAIT: Duration = Duration::from_secs(300);

/// What one filter counts.
#[derive(Debug)]
pub struct CheckStats {
    ok: Counter,
    denied: Counter,
    error: Counter,
    failure_allowed: Counter,
    disabled: Counter,
    total: Counter,
}

impl CheckStats {
    fn new(stats: &Stats, prefix: &str) -> Self {
        let of = |name: &str| stats.counter(format!("{prefix}{name}"));
        Self {
            ok: of("ok"),
            denied: of("denied"),
            error: of("error"),
            failure_allowed: of("failure_mode_allowed"),
            disabled: of("disabled"),
            total: of("total"),
        }
    }
}

/// What comes of asking.
pub(super) struct Checked<'a> {
    pub(super) reply: Option<LocalReply<'a>>,
    /// The route is to be looked for again.
    pub(super) reroute: bool,
}

impl Checked<'_> {
    const PASS: Self = Self {
        reply: None,
        reroute: false,
    };
}

/// What goes along of a body.
#[derive(Debug, Default)]
struct Part {
    bytes: Bytes,
    /// There is more than that.
    partial: bool,
}

impl<'a> Request<'a> {
    /// Asks about a request.
    pub(super) async fn check(
        &self,
        filter: &'a Arc<ExtAuthz>,
        route: Option<&ExtAuthzPerRoute>,
        (parts, body): (&mut request::Parts, &mut Input),
        (notes, pass): (&mut Notes, &mut Option<Box<Pass>>),
    ) -> Checked<'a> {
        let stats = self.check_stats(filter);
        match filter.turn(self.random(), notes.metadata.as_deref()) {
            Turn::Ask => {}
            turn => {
                inc(&stats.disabled);
                let refused = turn == Turn::Refuse;
                return Checked {
                    reply: refused.then(|| unauthorized(filter.status_on_error)),
                    reroute: false,
                };
            }
        }
        let part = match filter.body_for(route).filter(|_| !body.is_empty()) {
            None => None,
            Some(limit) => match self.read(limit, body).await {
                Ok(part) => Some(part),
                Err(status) => {
                    let mut reply = LocalReply::new(status, None);
                    let text = status.canonical_reason().unwrap_or_default();
                    reply.body = Bytes::from_static(text.as_bytes());
                    return refused(reply);
                }
            },
        };
        let began = Instant::now();
        let asked = self.ask_authorizer(filter, route, parts, part, notes);
        let answer = match filter.timeout {
            None => asked.await,
            Some(timeout) => match tokio::time::timeout(timeout, asked).await {
                Ok(answer) => answer,
                Err(_) => Err(format!("no answer within {timeout:?}")),
            },
        };
        match answer {
            Ok(verdict) => {
                let counter = if verdict.allowed {
                    &stats.ok
                } else {
                    &stats.denied
                };
                inc(counter);
                self.carry_out(filter, verdict, began, parts, (notes, pass))
            }
            Err(reason) => {
                inc(&stats.error);
                tracing::debug!(reason, "authorization service");
                if !filter.fail_open {
                    return refused(unauthorized(filter.status_on_error));
                }
                inc(&stats.failure_allowed);
                if filter.mark_fail_open {
                    let yes = HeaderValue::from_static("true");
                    parts.headers.append(FAILURE_ALLOWED, yes);
                }
                Checked::PASS
            }
        }
    }

    fn check_stats(&self, filter: &Arc<ExtAuthz>) -> Arc<CheckStats> {
        let counters = &self.exchange.connection.worker.shared.counters;
        counters.checks(filter, || {
            let manager = &self.manager.filters.stats;
            let prefix = match &*filter.stats {
                "" => format!("http.{manager}.ext_authz."),
                own => format!("http.{manager}.ext_authz.{own}."),
            };
            CheckStats::new(&counters.stats, &prefix)
        })
    }

    /// Reads as much of the body as goes along. What was read stays in it.
    async fn read(&self, limit: BodyPart, body: &mut Input) -> Result<Part, StatusCode> {
        let wait = self.manager.request_timeout;
        let wait = wait
            .or(self.manager.stream_idle_timeout)
            .unwrap_or(BODY_WAIT);
        // One more byte tells a body that is too long from one that just fits.
        let most = limit.most + usize::from(!limit.partial);
        let peeked = match tokio::time::timeout(wait, body.peek(most)).await {
            Ok(Ok(peeked)) => peeked,
            Ok(Err(_)) => return Err(StatusCode::BAD_REQUEST),
            Err(_) => return Err(StatusCode::REQUEST_TIMEOUT),
        };
        let Peeked { mut bytes, ended } = peeked;
        let too_long = bytes.len() > limit.most;
        if too_long && !limit.partial {
            return Err(StatusCode::PAYLOAD_TOO_LARGE);
        }
        bytes.truncate(limit.most);
        Ok(Part {
            bytes,
            partial: too_long || !ended,
        })
    }

    async fn ask_authorizer(
        &self,
        filter: &ExtAuthz,
        route: Option<&ExtAuthzPerRoute>,
        parts: &request::Parts,
        part: Option<Part>,
        notes: &Notes,
    ) -> Result<Verdict, String> {
        let worker = &self.exchange.connection.worker;
        match &filter.service {
            Authorizer::Grpc(service) => {
                let question = self.question(filter, route, parts, part, notes);
                let answer: CheckResponse =
                    grpc::call(worker, self.snapshot, service, CHECK, &question)
                        .await
                        .map_err(|error| error.to_string())?;
                Ok(Verdict::of_grpc(answer))
            }
            Authorizer::Http(service) => {
                self.ask_http(filter, service, parts, part.unwrap_or_default())
                    .await
            }
        }
    }

    fn carry_out(
        &self,
        filter: &'a ExtAuthz,
        mut verdict: Verdict,
        began: Instant,
        parts: &mut request::Parts,
        (notes, pass): (&mut Notes, &mut Option<Box<Pass>>),
    ) -> Checked<'a> {
        if let Some(metadata) = verdict.metadata.take().filter(|_| filter.takes_metadata) {
            notes.add(HTTP_SECTION, metadata);
            if verdict.allowed {
                let millis = began.elapsed().as_millis() as f64;
                let duration = one("ext_authz_duration", Kind::NumberValue(millis));
                notes.add(HTTP_SECTION, duration);
            }
        }
        if !verdict.allowed {
            return refused(verdict.refusal(filter.longest_refusal));
        }
        let changed = verdict.change(parts, pass);
        Checked {
            reply: None,
            reroute: filter.clear_route && changed,
        }
    }
}

fn refused(reply: LocalReply<'_>) -> Checked<'_> {
    Checked {
        reply: Some(reply),
        reroute: false,
    }
}

fn unauthorized<'a>(status: StatusCode) -> LocalReply<'a> {
    LocalReply::new(status, Some(Flag::Unauthorized))
}

/// Asks about a connection.
pub(super) async fn connection(
    connection: &Rc<Downstream>,
    filter: &Arc<ConnectionExtAuthz>,
    notes: &Notes,
) -> bool {
    let worker = &connection.worker;
    let counters = &worker.shared.counters;
    let stats = counters.connection_checks(filter, || {
        CheckStats::new(&counters.stats, &format!("ext_authz.{}.", filter.stats))
    });
    inc(&stats.total);
    let question: CheckRequest = ask::about_connection(connection, filter, notes);
    let snapshot = worker.snapshot();
    let call = grpc::call::<_, CheckResponse>(worker, &snapshot, &filter.service, CHECK, &question);
    let answer = match filter.timeout {
        None => call.await.map_err(|error| error.to_string()),
        Some(timeout) => match tokio::time::timeout(timeout, call).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {timeout:?}")),
        },
    };
    match answer.map(Verdict::of_grpc) {
        Ok(verdict) if verdict.allowed => {
            inc(&stats.ok);
            true
        }
        Ok(_) => {
            inc(&stats.denied);
            false
        }
        Err(reason) => {
            inc(&stats.error);
            tracing::debug!(reason, "authorization service");
            if filter.fail_open {
                inc(&stats.failure_allowed);
            }
            filter.fail_open
        }
    }
}
