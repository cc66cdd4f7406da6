//! When a request is tried again, and how long to wait before it (`envoy.config.route.v3.RetryPolicy` and the `x-envoy-retry-*` headers).

use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::retry_policy::retry_priority::ConfigType;
use envoy_types::pb::envoy::config::route::v3::retry_policy::{
    RateLimitedRetryBackOff, ResetHeaderFormat, RetryPriority,
};
use envoy_types::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;
use http::{HeaderMap, HeaderName, StatusCode};
use prost::Message;

use crate::error::{CompileError, Result, Within, duration, every_field, nonzero_duration};
use crate::matcher::HeaderMatch;
use crate::route::RequestView;

/// Envoy's base interval of retries.
const DEFAULT_BASE: Duration = Duration::from_millis(25);
/// The longest wait that a rate limited answer may ask for, unless configured.
const DEFAULT_RATE_LIMITED_MAX: Duration = Duration::from_secs(300);
/// Marks answers of rate limits.
const RATE_LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");
const RETRY_ON: HeaderName = HeaderName::from_static("x-envoy-retry-on");
const RETRY_GRPC_ON: HeaderName = HeaderName::from_static("x-envoy-retry-grpc-on");
const MAX_RETRIES: HeaderName = HeaderName::from_static("x-envoy-max-retries");
const STATUS_CODES: HeaderName = HeaderName::from_static("x-envoy-retriable-status-codes");
const HEADER_NAMES: HeaderName = HeaderName::from_static("x-envoy-retriable-header-names");

/// When and how often a request is tried again.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Tries after the first one.
    pub retries: u32,
    /// Limit of each try.
    pub per_try_timeout: Option<Duration>,
    /// Longest silence within a try.
    pub per_try_idle_timeout: Option<Duration>,
    /// Conditions.
    pub on: RetryOn,
    /// Statuses for [`RetryOn::statuses`].
    pub statuses: Vec<u16>,
    /// Response headers for [`RetryOn::headers`]; one of them is enough.
    headers: Vec<HeaderMatch>,
    /// Only requests with one of these are tried again; empty takes all.
    request_headers: Vec<HeaderMatch>,
    /// First back-off; doubled with every try, randomised from zero up.
    pub base_interval: Duration,
    /// Cap of the back-off.
    pub max_interval: Duration,
    rate_limited: Option<RateLimited>,
    /// How often an endpoint that was tried already may be passed over; 0 turns that off.
    pub avoid_previous_hosts: u32,
    /// Priorities that were tried are left out, judged anew after so many tries (`previous_priorities`); `None` does not look at them.
    pub avoid_previous_priorities: Option<u32>,
}

impl Default for RetryPolicy {
    /// Nothing is tried again; what headers of a request add to it is tried once (Envoy's defaults).
    fn default() -> Self {
        Self {
            retries: 1,
            per_try_timeout: None,
            per_try_idle_timeout: None,
            on: RetryOn::default(),
            statuses: Vec::new(),
            headers: Vec::new(),
            request_headers: Vec::new(),
            base_interval: DEFAULT_BASE,
            max_interval: DEFAULT_BASE * 10,
            rate_limited: None,
            avoid_previous_hosts: 0,
            avoid_previous_priorities: None,
        }
    }
}

/// Conditions of a retry (`x-envoy-retry-on` and `x-envoy-retry-grpc-on`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RetryOn {
    /// No connection could be made.
    pub connect_failure: bool,
    /// HTTP/2 REFUSED_STREAM.
    pub refused_stream: bool,
    /// The stream ended before response headers.
    pub reset: bool,
    /// It ended before the request was sent.
    pub reset_before_request: bool,
    /// Any 5xx, or no answer at all.
    pub server_error: bool,
    /// 502, 503, 504, or no answer at all.
    pub gateway_error: bool,
    /// 409.
    pub retriable_4xx: bool,
    /// The statuses listed in the policy.
    pub statuses: bool,
    /// The response headers listed in the policy.
    pub headers: bool,
    /// An answer with `x-envoy-ratelimited`, which is otherwise never tried again.
    pub rate_limited: bool,
    /// gRPC statuses, one bit for each code.
    pub grpc: u32,
}

/// How a try ended without response headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// There was no connection.
    Connect,
    /// The endpoint refused the stream, so it has not worked on the request.
    Refused,
    /// The stream or the connection broke, or a try's own limit was reached.
    Reset,
}

/// Waits that a rate limited answer asks for.
#[derive(Debug, Clone)]
struct RateLimited {
    headers: Vec<(HeaderName, ResetHeaderFormat)>,
    max: Duration,
}

impl RetryPolicy {
    pub(crate) fn compile(m: &pb::RetryPolicy) -> Result<Self> {
        every_field!(m, pb::RetryPolicy,
        used {
            retry_on, num_retries, per_try_timeout, per_try_idle_timeout, retry_host_predicate, retry_priority,
            host_selection_retry_max_attempts, retriable_status_codes, retry_back_off, rate_limited_retry_back_off,
            retriable_headers, retriable_request_headers,
        }
        // refresh_cluster_on_retry: needs a cluster specifier plugin, which is refused.
        irrelevant { refresh_cluster_on_retry }
        refused { retry_options_predicates });
        let mut previous_hosts = false;
        for predicate in &m.retry_host_predicate {
            match predicate.name.as_str() {
                "envoy.retry_host_predicates.previous_hosts" => previous_hosts = true,
                other => {
                    return Err(CompileError::unsupported(format!(
                        "retry_host_predicate {other}"
                    )));
                }
            }
        }
        let attempts = u32::try_from(m.host_selection_retry_max_attempts)
            .unwrap_or(0)
            .max(1);
        let (base_interval, max_interval) = compile_back_off(m.retry_back_off.as_ref())?;
        Ok(Self {
            retries: m.num_retries.map_or(1, |n| n.value),
            per_try_timeout: nonzero_duration("per_try_timeout", m.per_try_timeout.as_ref())?,
            per_try_idle_timeout: nonzero_duration(
                "per_try_idle_timeout",
                m.per_try_idle_timeout.as_ref(),
            )?,
            on: RetryOn::parse(&m.retry_on)?,
            statuses: m
                .retriable_status_codes
                .iter()
                .filter_map(|c| u16::try_from(*c).ok())
                .collect(),
            headers: compile_headers("retriable_headers", &m.retriable_headers)?,
            request_headers: compile_headers(
                "retriable_request_headers",
                &m.retriable_request_headers,
            )?,
            base_interval,
            max_interval,
            rate_limited: m
                .rate_limited_retry_back_off
                .as_ref()
                .map(RateLimited::compile)
                .transpose()
                .within("rate_limited_retry_back_off")?,
            avoid_previous_hosts: if previous_hosts { attempts } else { 0 },
            avoid_previous_priorities: m
                .retry_priority
                .as_ref()
                .map(compile_priority)
                .transpose()
                .within("retry_priority")?,
        })
    }

    /// Has a request headers of its own that change when it is tried again?
    pub fn is_changed_by(headers: &HeaderMap) -> bool {
        [
            &RETRY_ON,
            &RETRY_GRPC_ON,
            &MAX_RETRIES,
            &STATUS_CODES,
            &HEADER_NAMES,
        ]
        .into_iter()
        .any(|name| headers.contains_key(name))
    }

    /// The policy for one request: what its own headers say is added, and taken off the request. `None` where nothing is left to try
    /// again. `policy` is the route's, if it has one.
    pub fn of_request(policy: Option<&Self>, headers: &mut HeaderMap) -> Option<Self> {
        let take = |headers: &mut HeaderMap, name: &HeaderName| {
            let value = headers.remove(name)?;
            value.to_str().ok().map(str::to_owned)
        };
        let on = take(headers, &RETRY_ON);
        let grpc_on = take(headers, &RETRY_GRPC_ON);
        let retries = take(headers, &MAX_RETRIES);
        let statuses = take(headers, &STATUS_CODES);
        let names = take(headers, &HEADER_NAMES);
        let mut own = policy.cloned().unwrap_or_default();
        for list in [on, grpc_on].into_iter().flatten() {
            own.on.merge(RetryOn::parse_known(&list));
        }
        if let Some(retries) = retries.and_then(|text| text.trim().parse().ok()) {
            own.retries = retries;
        }
        for code in list_of(statuses.as_deref()) {
            own.statuses.extend(code.parse::<u16>().ok());
        }
        for name in list_of(names.as_deref()) {
            own.headers
                .extend(name.parse().ok().map(HeaderMatch::present));
        }
        (own.on != RetryOn::default()).then_some(own)
    }

    /// May a request with these headers be tried again?
    pub fn takes(&self, request: &RequestView<'_>) -> bool {
        self.on != RetryOn::default()
            && (self.request_headers.is_empty()
                || self.request_headers.iter().any(|h| h.matches(request)))
    }

    /// Does this response ask for another try?
    pub fn wants_response(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        if headers.contains_key(&RATE_LIMITED) {
            return self.on.rate_limited;
        }
        let (on, code) = (self.on, status.as_u16());
        (on.server_error && (500..600).contains(&code))
            || (on.gateway_error && (502..=504).contains(&code))
            || (on.retriable_4xx && code == 409)
            || (on.statuses && self.statuses.contains(&code))
            || (on.headers
                && self
                    .headers
                    .iter()
                    .any(|h| h.matches_response(status, headers)))
            || (on.grpc != 0 && grpc_status(headers).is_some_and(|code| on.covers_grpc(code)))
    }

    /// Does a try that ended like this ask for another one? `begun`: the endpoint may have seen something of the request.
    pub fn wants_loss(&self, loss: Loss, begun: bool) -> bool {
        let on = self.on;
        on.reset
            || on.server_error
            || on.gateway_error
            || (on.reset_before_request && !begun)
            || (on.connect_failure && loss == Loss::Connect)
            || (on.refused_stream && loss == Loss::Refused)
    }

    /// Could a request be tried again after it was sent? `http2`: whether the endpoint is spoken to in HTTP/2, where streams can be refused.
    pub fn repeats_sent(&self, grpc: bool, http2: bool) -> bool {
        let on = self.on;
        on.server_error
            || on.gateway_error
            || on.retriable_4xx
            || on.reset
            || on.rate_limited
            || (on.statuses && !self.statuses.is_empty())
            || (on.headers && !self.headers.is_empty())
            || (grpc && on.grpc != 0)
            || (on.refused_stream && http2)
    }

    /// The wait before try number `attempt` (1 = first retry): random up to base × 2^(n-1), capped.
    pub fn back_off(&self, attempt: u32, random: u64) -> Duration {
        let ceiling = self
            .base_interval
            .saturating_mul(1 << attempt.saturating_sub(1).min(16))
            .min(self.max_interval);
        Duration::from_nanos(random % nanos(ceiling).max(1))
    }

    /// The wait that the response itself asks for: its time and up to half as much again. `now`: seconds since the Unix epoch.
    pub fn back_off_by(&self, response: &HeaderMap, now: u64, random: u64) -> Option<Duration> {
        let limited = self.rate_limited.as_ref()?;
        let wait = limited.headers.iter().find_map(|(name, format)| {
            let number: u64 = response.get(name)?.to_str().ok()?.trim().parse().ok()?;
            let seconds = match format {
                ResetHeaderFormat::Seconds => number,
                ResetHeaderFormat::UnixTimestamp => number.checked_sub(now)?,
            };
            Some(Duration::from_secs(seconds)).filter(|wait| *wait <= limited.max)
        })?;
        Some(wait + Duration::from_nanos(random % (nanos(wait) / 2).max(1)))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn list_of(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.into_iter()
        .flat_map(|text| text.split(','))
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

fn compile_headers(field: &str, matchers: &[pb::HeaderMatcher]) -> Result<Vec<HeaderMatch>> {
    matchers
        .iter()
        .enumerate()
        .map(|(i, m)| HeaderMatch::compile(m).within(format_args!("{field}[{i}]")))
        .collect()
}

fn compile_back_off(m: Option<&pb::retry_policy::RetryBackOff>) -> Result<(Duration, Duration)> {
    let mut base = DEFAULT_BASE;
    let mut max = None;
    if let Some(m) = m {
        base = nonzero_duration("base_interval", m.base_interval.as_ref())
            .within("retry_back_off")?
            .unwrap_or(base)
            .max(Duration::from_millis(1));
        max = duration("max_interval", m.max_interval.as_ref()).within("retry_back_off")?;
    }
    match max {
        Some(max) if max < base => Err(CompileError::new(
            "retry_back_off.max_interval",
            "is shorter than the base interval",
        )),
        max => Ok((base, max.unwrap_or(base * 10))),
    }
}

fn compile_priority(m: &RetryPriority) -> Result<u32> {
    if m.name != "envoy.retry_priorities.previous_priorities" {
        return Err(CompileError::unsupported(m.name.clone()));
    }
    let Some(ConfigType::TypedConfig(any)) = &m.config_type else {
        return Err(CompileError::new("typed_config", "is missing"));
    };
    let config = PreviousPrioritiesConfig::decode(any.value.as_slice())
        .map_err(|error| CompileError::new("typed_config", error.to_string()))?;
    match u32::try_from(config.update_frequency) {
        Ok(frequency) if frequency > 0 => Ok(frequency),
        _ => Err(CompileError::new(
            "typed_config.update_frequency",
            "must be above zero",
        )),
    }
}

impl RateLimited {
    fn compile(m: &RateLimitedRetryBackOff) -> Result<Self> {
        let mut headers = Vec::with_capacity(m.reset_headers.len());
        for (i, header) in m.reset_headers.iter().enumerate() {
            let at = format!("reset_headers[{i}]");
            let name = header.name.parse().map_err(|_| {
                CompileError::new("name", format!("{:?} is not a header name", header.name))
            });
            let format = ResetHeaderFormat::try_from(header.format)
                .map_err(|_| CompileError::new("format", "is unknown"));
            headers.push((name.within(&at)?, format.within(&at)?));
        }
        Ok(Self {
            headers,
            max: nonzero_duration("max_interval", m.max_interval.as_ref())?
                .unwrap_or(DEFAULT_RATE_LIMITED_MAX),
        })
    }
}

impl RetryOn {
    fn parse(list: &str) -> Result<Self> {
        let mut on = Self::default();
        for token in list_of(Some(list)) {
            if !on.add(token) {
                return Err(CompileError::new(
                    "retry_on",
                    format!("{token:?} is not a condition that is known here"),
                ));
            }
        }
        Ok(on)
    }

    /// The conditions of a request's own header; those that are not known are left out, as in Envoy.
    fn parse_known(list: &str) -> Self {
        let mut on = Self::default();
        for token in list_of(Some(list)) {
            on.add(token);
        }
        on
    }

    fn add(&mut self, token: &str) -> bool {
        match token {
            "connect-failure" => self.connect_failure = true,
            "refused-stream" => self.refused_stream = true,
            "reset" => self.reset = true,
            "reset-before-request" => self.reset_before_request = true,
            "5xx" => self.server_error = true,
            "gateway-error" => self.gateway_error = true,
            "retriable-4xx" => self.retriable_4xx = true,
            "retriable-status-codes" => self.statuses = true,
            "retriable-headers" => self.headers = true,
            "envoy-ratelimited" => self.rate_limited = true,
            "cancelled" => self.grpc |= 1 << 1,
            "deadline-exceeded" => self.grpc |= 1 << 4,
            "resource-exhausted" => self.grpc |= 1 << 8,
            "internal" => self.grpc |= 1 << 13,
            "unavailable" => self.grpc |= 1 << 14,
            // Endpoints are never spoken to in HTTP/3, so this can never apply; Istio lists it.
            "http3-post-connect-failure" => {}
            _ => return false,
        }
        true
    }

    fn merge(&mut self, other: Self) {
        self.connect_failure |= other.connect_failure;
        self.refused_stream |= other.refused_stream;
        self.reset |= other.reset;
        self.reset_before_request |= other.reset_before_request;
        self.server_error |= other.server_error;
        self.gateway_error |= other.gateway_error;
        self.retriable_4xx |= other.retriable_4xx;
        self.statuses |= other.statuses;
        self.headers |= other.headers;
        self.rate_limited |= other.rate_limited;
        self.grpc |= other.grpc;
    }

    fn covers_grpc(self, code: u32) -> bool {
        code < 32 && self.grpc & (1 << code) != 0
    }
}

fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}
