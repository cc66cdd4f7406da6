//! Rate limits counted by a service: the `envoy.filters.http.ratelimit` filter.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::grpc_service::{EnvoyGrpc, TargetSpecifier};
use envoy_types::pb::envoy::config::core::v3::{ApiVersion, GrpcService};
use envoy_types::pb::envoy::extensions::filters::http::ratelimit::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::http::ratelimit::v3::rate_limit::XRateLimitHeadersRfcVersion;
use envoy_types::pb::envoy::extensions::filters::http::ratelimit::v3::rate_limit_per_route::{
    OverrideOptions, VhRateLimitsOptions,
};
use http::{HeaderName, HeaderValue, StatusCode};

use super::descriptor::{Descriptor, Facts, HostLimits, MOST_STAGES, RateLimits};
use super::local_rate_limit::status;
use super::{Percent, RouteFilters};
use crate::error::{CompileError, Result, Within, duration, every_field};
use crate::headers::HeaderOps;
use crate::route::RequestView;

/// Envoy's limit for the service's answer.
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(20);

/// A compiled `RateLimit` filter.
#[derive(Debug)]
pub struct RateLimit {
    /// Which service to ask.
    pub service: Service,
    /// Longest wait for it; `None` waits.
    pub timeout: Option<Duration>,
    /// Of the answer to requests beyond the limit.
    pub status: StatusCode,
    /// Of the answer where the service fails and that means no.
    pub status_on_error: StatusCode,
    /// gRPC callers are told RESOURCE_EXHAUSTED instead of UNAVAILABLE.
    pub as_resource_exhausted: bool,
    /// Share of the failures of the service that mean no.
    pub deny_on_failure: Percent,
    /// Share of requests that are counted.
    pub enabled: Percent,
    /// Share of the requests beyond the limit that are refused.
    pub enforced: Percent,
    /// Tell the client by `x-ratelimit-*` (draft-polli-ratelimit-headers-03).
    pub tell_limits: bool,
    /// Mark the answer by `x-envoy-ratelimited`.
    pub tell_refusal: bool,
    /// Tell refused clients when to come again (`retry-after`).
    pub tell_retry: bool,
    /// For the answer to refused requests.
    pub response_ops: HeaderOps,
    domain: String,
    stage: u32,
    requests: Requests,
    own_limits: RateLimits,
}

/// Which requests are counted (`x-envoy-internal` tells them apart).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Requests {
    Both,
    Internal,
    External,
}

/// A gRPC service of the mesh's own clusters.
#[derive(Debug)]
pub struct Service {
    /// The cluster.
    pub cluster: Arc<str>,
    /// The authority to send.
    pub authority: HeaderValue,
    /// Further headers.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// What to ask the service.
#[derive(Debug)]
pub struct Question<'a> {
    /// The domain.
    pub domain: &'a str,
    /// The descriptors; never empty.
    pub descriptors: Vec<Descriptor<'a>>,
}

impl RateLimit {
    pub(crate) fn compile(m: &pb::RateLimit) -> Result<Self> {
        every_field!(m, pb::RateLimit,
            used {
                domain, stage, request_type, timeout, failure_mode_deny, rate_limited_as_resource_exhausted, rate_limit_service,
                enable_x_ratelimit_headers, disable_x_envoy_ratelimited_header, rate_limited_status, response_headers_to_add,
                status_on_error, filter_enabled, filter_enforced, failure_mode_deny_percent, rate_limits,
                enable_retry_after_header,
            }
            // Statistics; metadata that only other filters could read.
            irrelevant { stat_prefix, metadata_namespace }
            refused {});
        if m.domain.is_empty() {
            return Err(CompileError::new("domain", "is empty"));
        }
        if m.stage > MOST_STAGES {
            return Err(CompileError::new(
                "stage",
                format!("{} is above {MOST_STAGES}", m.stage),
            ));
        }
        let service = m
            .rate_limit_service
            .as_ref()
            .ok_or_else(|| CompileError::new("rate_limit_service", "is missing"))?;
        if service.transport_api_version != ApiVersion::V3 as i32 {
            return Err(CompileError::new(
                "rate_limit_service.transport_api_version",
                "is not V3, the only one there is",
            ));
        }
        let service = service
            .grpc_service
            .as_ref()
            .ok_or_else(|| CompileError::new("rate_limit_service.grpc_service", "is missing"))?;
        let deny = match m.failure_mode_deny {
            true => Percent::ALL,
            false => Percent::NONE,
        };
        Ok(Self {
            service: Service::compile(service).within("rate_limit_service.grpc_service")?,
            timeout: Some(duration("timeout", m.timeout.as_ref())?.unwrap_or(DEFAULT_TIMEOUT))
                .filter(|timeout| !timeout.is_zero()),
            status: status(
                m.rate_limited_status.as_ref(),
                StatusCode::TOO_MANY_REQUESTS,
            ),
            status_on_error: status(
                m.status_on_error.as_ref(),
                StatusCode::INTERNAL_SERVER_ERROR,
            ),
            as_resource_exhausted: m.rate_limited_as_resource_exhausted,
            deny_on_failure: Percent::of_runtime(m.failure_mode_deny_percent.as_ref(), deny)
                .within("failure_mode_deny_percent")?,
            enabled: Percent::of_runtime(m.filter_enabled.as_ref(), Percent::ALL)
                .within("filter_enabled")?,
            enforced: Percent::of_runtime(m.filter_enforced.as_ref(), Percent::ALL)
                .within("filter_enforced")?,
            tell_limits: match XRateLimitHeadersRfcVersion::try_from(m.enable_x_ratelimit_headers) {
                Ok(XRateLimitHeadersRfcVersion::Off) => false,
                Ok(XRateLimitHeadersRfcVersion::DraftVersion03) => true,
                Err(_) => {
                    return Err(CompileError::new(
                        "enable_x_ratelimit_headers",
                        "is unknown",
                    ));
                }
            },
            tell_refusal: !m.disable_x_envoy_ratelimited_header,
            tell_retry: m.enable_retry_after_header,
            response_ops: HeaderOps::compile(&m.response_headers_to_add, &[])
                .within("response_headers_to_add")?,
            domain: m.domain.clone(),
            stage: m.stage,
            requests: match m.request_type.as_str() {
                "" | "both" => Requests::Both,
                "internal" => Requests::Internal,
                "external" => Requests::External,
                other => {
                    return Err(CompileError::new(
                        "request_type",
                        format!("{other:?} is none of internal, external, both"),
                    ));
                }
            },
            own_limits: RateLimits::compile(&m.rate_limits).within("rate_limits")?,
        })
    }

    /// Does it ask about requests whose route says nothing of rate limits?
    pub(super) fn asks_always(&self) -> bool {
        !self.own_limits.is_empty()
    }

    /// What to ask about a request; `None` where nothing is to be asked. `settings` are the route's for this filter.
    pub fn question<'a>(
        &'a self,
        route: Option<&'a RouteFilters>,
        settings: Option<&'a RateLimitPerRoute>,
        facts: &Facts<'a>,
    ) -> Option<Question<'a>> {
        if !self.counts(facts.request) {
            return None;
        }
        let own = settings
            .map(|settings| &settings.limits)
            .filter(|limits| !limits.is_empty())
            .unwrap_or(&self.own_limits);
        let host = settings.map_or(HostLimits::Override, |settings| settings.host);
        let of_route = route.filter(|_| own.is_empty());
        let of_route = of_route.into_iter();
        let of_route = of_route.flat_map(|route| route.limits().of_stage(self.stage, host));
        let all = own.iter().chain(of_route);
        let descriptors: Vec<_> = all.filter_map(|entry| entry.descriptor(facts)).collect();
        let domain = settings
            .map(|settings| settings.domain.as_str())
            .filter(|domain| !domain.is_empty())
            .unwrap_or(&self.domain);
        (!descriptors.is_empty()).then_some(Question {
            domain,
            descriptors,
        })
    }

    fn counts(&self, request: &RequestView<'_>) -> bool {
        let internal = request
            .headers
            .get("x-envoy-internal")
            .is_some_and(|v| v.as_bytes() == b"true");
        match self.requests {
            Requests::Both => true,
            Requests::Internal => internal,
            Requests::External => !internal,
        }
    }
}

impl Service {
    pub(super) fn compile(m: &GrpcService) -> Result<Self> {
        every_field!(m, GrpcService,
            used { initial_metadata, target_specifier }
            // The filter's own timeout counts.
            irrelevant { timeout }
            refused { retry_policy });
        let target = match &m.target_specifier {
            Some(TargetSpecifier::EnvoyGrpc(target)) => target,
            Some(TargetSpecifier::GoogleGrpc(_)) => {
                return Err(CompileError::unsupported("google_grpc"));
            }
            None => return Err(CompileError::new("envoy_grpc", "is missing")),
        };
        every_field!(target, EnvoyGrpc,
            used { cluster_name, authority }
            // Longer answers than our own limit are refused in any case; no `x-envoy-` headers are added to these requests.
            irrelevant { max_receive_message_length, skip_envoy_headers }
            refused { retry_policy });
        let authority = match target.authority.as_str() {
            "" => &target.cluster_name,
            authority => authority,
        };
        let mut headers = Vec::with_capacity(m.initial_metadata.len());
        for (i, header) in m.initial_metadata.iter().enumerate() {
            let pair = header
                .key
                .parse()
                .ok()
                .zip(HeaderValue::from_str(&header.value).ok());
            headers.push(pair.ok_or_else(|| {
                CompileError::new(format!("initial_metadata[{i}]"), "is not a header")
            })?);
        }
        Ok(Self {
            cluster: target.cluster_name.as_str().into(),
            authority: HeaderValue::from_str(authority)
                .map_err(|_| CompileError::new("authority", "is not a header value"))?,
            headers,
        })
    }
}

/// A compiled `RateLimitPerRoute`.
#[derive(Debug)]
pub struct RateLimitPerRoute {
    host: HostLimits,
    limits: RateLimits,
    domain: String,
}

impl RateLimitPerRoute {
    pub(crate) fn compile(m: &pb::RateLimitPerRoute) -> Result<Self> {
        every_field!(m, pb::RateLimitPerRoute, used { vh_rate_limits, override_option, rate_limits, domain } irrelevant {} refused {});
        let host = match OverrideOptions::try_from(m.override_option) {
            Ok(OverrideOptions::OverridePolicy) => HostLimits::Override,
            Ok(OverrideOptions::IncludePolicy) => HostLimits::Include,
            Ok(OverrideOptions::IgnorePolicy) => HostLimits::Ignore,
            Ok(OverrideOptions::Default) => match VhRateLimitsOptions::try_from(m.vh_rate_limits) {
                Ok(VhRateLimitsOptions::Override) => HostLimits::Override,
                Ok(VhRateLimitsOptions::Include) => HostLimits::Include,
                Ok(VhRateLimitsOptions::Ignore) => HostLimits::Ignore,
                Err(_) => return Err(CompileError::new("vh_rate_limits", "is unknown")),
            },
            Err(_) => return Err(CompileError::new("override_option", "is unknown")),
        };
        Ok(Self {
            host,
            limits: RateLimits::compile(&m.rate_limits).within("rate_limits")?,
            domain: m.domain.clone(),
        })
    }
}
