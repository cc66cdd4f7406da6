//! Fault injection: the `envoy.filters.http.fault` filter.

use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::common::fault::v3::fault_delay::FaultDelaySecifier;
use envoy_types::pb::envoy::extensions::filters::common::fault::v3::fault_rate_limit::LimitType;
use envoy_types::pb::envoy::extensions::filters::common::fault::v3::{FaultDelay, FaultRateLimit};
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::fault_abort::ErrorType;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use http::{HeaderMap, StatusCode};

use super::Percent;
use crate::error::{CompileError, Result, Within, duration, every_field};
use crate::matcher::HeaderMatch;
use crate::route::RequestView;

/// The body of an injected answer, where the configuration has none.
const ABORT_BODY: &str = "fault filter abort";

/// A compiled `HTTPFault`.
#[derive(Debug, Default)]
pub struct Fault {
    delay: Option<Delay>,
    abort: Option<Abort>,
    rate: Option<Rate>,
    cluster: String,
    nodes: Vec<String>,
    headers: Vec<HeaderMatch>,
    /// No further fault begins while this many are under way.
    pub max_active: Option<u32>,
}

#[derive(Debug)]
struct Delay {
    percent: Percent,
    /// `None`: the request's header says how long.
    fixed: Option<Duration>,
}

#[derive(Debug)]
struct Abort {
    percent: Percent,
    /// `None`: the request's headers say which.
    fixed: Option<Status>,
    body: String,
}

#[derive(Debug)]
struct Rate {
    percent: Percent,
    /// `None`: the request's header says how fast.
    fixed: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
enum Status {
    Http(StatusCode),
    Grpc(u16),
}

/// An answer in the endpoint's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AbortWith {
    /// Its status.
    pub status: StatusCode,
    /// The gRPC status, where that is what was asked for (gRPC callers get it in the headers).
    pub grpc: Option<u16>,
    /// Its body.
    pub body: String,
}

impl Fault {
    pub(crate) fn compile(m: &pb::HttpFault) -> Result<Self> {
        every_field!(m, pb::HttpFault,
            used {
                delay, abort, upstream_cluster, headers, downstream_nodes, max_active_faults, response_rate_limit,
            }
            // Keys of runtime files, which do not exist here; a statistic that is not kept; metadata that only logs would show.
            irrelevant {
                delay_percent_runtime, abort_percent_runtime, delay_duration_runtime, abort_http_status_runtime,
                max_active_faults_runtime, response_rate_limit_percent_runtime, abort_grpc_status_runtime,
                disable_downstream_cluster_stats, filter_metadata,
            }
            refused {});
        let mut headers = Vec::with_capacity(m.headers.len());
        for (i, header) in m.headers.iter().enumerate() {
            headers.push(HeaderMatch::compile(header).within(format_args!("headers[{i}]"))?);
        }
        Ok(Self {
            delay: m
                .delay
                .as_ref()
                .map(Delay::compile)
                .transpose()
                .within("delay")?,
            abort: m
                .abort
                .as_ref()
                .map(Abort::compile)
                .transpose()
                .within("abort")?,
            rate: m
                .response_rate_limit
                .as_ref()
                .map(Rate::compile)
                .transpose()
                .within("response_rate_limit")?,
            cluster: m.upstream_cluster.clone(),
            nodes: m.downstream_nodes.clone(),
            headers,
            max_active: m.max_active_faults.map(|n| n.value),
        })
    }

    /// Can it do anything at all?
    pub fn acts(&self) -> bool {
        let percents = [
            self.delay.as_ref().map(|d| d.percent),
            self.abort.as_ref().map(|a| a.percent),
            self.rate.as_ref().map(|r| r.percent),
        ];
        percents
            .into_iter()
            .flatten()
            .any(|percent| !percent.is_zero())
    }

    /// Is the request, on its way to `cluster`, one of those that faults are for?
    pub fn applies(&self, request: &RequestView<'_>, cluster: Option<&str>) -> bool {
        (self.cluster.is_empty() || cluster == Some(&*self.cluster))
            && (self.nodes.is_empty()
                || text(request.headers, "x-envoy-downstream-service-node")
                    .is_some_and(|node| self.nodes.iter().any(|n| n == node)))
            && self.headers.iter().all(|header| header.matches(request))
    }

    /// How long to hold the request back.
    pub fn delay(&self, headers: &HeaderMap, random: u64) -> Option<Duration> {
        let delay = self.delay.as_ref()?;
        let percent = match delay.fixed {
            Some(_) => delay.percent,
            None => delay
                .percent
                .at_most(number(headers, "x-envoy-fault-delay-request-percentage")),
        };
        if !percent.covers(random) {
            return None;
        }
        let duration = match delay.fixed {
            Some(fixed) => fixed,
            None => Duration::from_millis(number(headers, "x-envoy-fault-delay-request")?),
        };
        (!duration.is_zero()).then_some(duration)
    }

    /// The answer to give instead of the endpoint's.
    pub fn abort(&self, headers: &HeaderMap, random: u64) -> Option<AbortWith> {
        let abort = self.abort.as_ref()?;
        let percent = match abort.fixed {
            Some(_) => abort.percent,
            None => abort
                .percent
                .at_most(number(headers, "x-envoy-fault-abort-request-percentage")),
        };
        if !percent.covers(random) {
            return None;
        }
        let (status, grpc) = match abort.fixed.or_else(|| Status::asked(headers))? {
            Status::Http(status) => (status, None),
            Status::Grpc(code) => (StatusCode::OK, Some(code)),
        };
        Some(AbortWith {
            status,
            grpc,
            body: abort.body.clone(),
        })
    }

    /// The speed that the response's body is limited to, in KiB per second.
    pub fn response_kib_per_second(&self, headers: &HeaderMap, random: u64) -> Option<u64> {
        let rate = self.rate.as_ref()?;
        let percent = match rate.fixed {
            Some(_) => rate.percent,
            None => rate.percent.at_most(number(
                headers,
                "x-envoy-fault-throughput-response-percentage",
            )),
        };
        let asked = || number(headers, "x-envoy-fault-throughput-response").filter(|n| *n > 0);
        percent
            .covers(random)
            .then(|| rate.fixed.or_else(asked))
            .flatten()
    }
}

impl Delay {
    fn compile(m: &FaultDelay) -> Result<Self> {
        every_field!(m, FaultDelay, used { percentage, fault_delay_secifier } irrelevant {} refused {});
        Ok(Self {
            percent: percentage(m.percentage.as_ref())?,
            fixed: match &m.fault_delay_secifier {
                Some(FaultDelaySecifier::FixedDelay(fixed)) => {
                    duration("fixed_delay", Some(fixed))?
                }
                Some(FaultDelaySecifier::HeaderDelay(_)) => None,
                None => return Err(CompileError::new("fixed_delay", "is missing")),
            },
        })
    }
}

impl Abort {
    fn compile(m: &pb::FaultAbort) -> Result<Self> {
        every_field!(m, pb::FaultAbort, used { percentage, response_body, error_type } irrelevant {} refused {});
        Ok(Self {
            percent: percentage(m.percentage.as_ref())?,
            fixed: match &m.error_type {
                Some(ErrorType::HttpStatus(status)) => {
                    Some(Status::http(*status).ok_or_else(|| {
                        CompileError::new(
                            "http_status",
                            format!("{status} is not a status from 200 to 599"),
                        )
                    })?)
                }
                Some(ErrorType::GrpcStatus(code)) => {
                    Some(Status::grpc(*code).ok_or_else(|| {
                        CompileError::new("grpc_status", format!("{code} is not a gRPC status"))
                    })?)
                }
                Some(ErrorType::HeaderAbort(_)) => None,
                None => return Err(CompileError::new("error_type", "is missing")),
            },
            body: match m.response_body.as_str() {
                "" => ABORT_BODY.to_owned(),
                body => body.to_owned(),
            },
        })
    }
}

impl Rate {
    fn compile(m: &FaultRateLimit) -> Result<Self> {
        every_field!(m, FaultRateLimit, used { percentage, limit_type } irrelevant {} refused {});
        Ok(Self {
            percent: percentage(m.percentage.as_ref())?,
            fixed: match &m.limit_type {
                Some(LimitType::FixedLimit(fixed)) if fixed.limit_kbps > 0 => {
                    Some(fixed.limit_kbps)
                }
                Some(LimitType::FixedLimit(_)) => {
                    return Err(CompileError::new(
                        "fixed_limit.limit_kbps",
                        "must be above zero",
                    ));
                }
                Some(LimitType::HeaderLimit(_)) => None,
                None => return Err(CompileError::new("limit_type", "is missing")),
            },
        })
    }
}

impl Status {
    fn http(status: u32) -> Option<Self> {
        let status = u16::try_from(status)
            .ok()
            .filter(|s| (200..600).contains(s))?;
        StatusCode::from_u16(status).ok().map(Self::Http)
    }

    fn grpc(code: u32) -> Option<Self> {
        u16::try_from(code).ok().map(Self::Grpc)
    }

    /// What the request's own headers ask for; the HTTP status comes first.
    fn asked(headers: &HeaderMap) -> Option<Self> {
        let http = number(headers, "x-envoy-fault-abort-request").and_then(Self::http);
        http.or_else(|| number(headers, "x-envoy-fault-abort-grpc-request").and_then(Self::grpc))
    }
}

/// A missing percentage is zero, unlike elsewhere.
fn percentage(m: Option<&FractionalPercent>) -> Result<Percent> {
    m.map_or(Ok(Percent::NONE), Percent::compile)
        .within("percentage")
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn number<T: std::str::FromStr>(headers: &HeaderMap, name: &str) -> Option<T> {
    text(headers, name)?.parse().ok()
}
