//! Rate limits counted in the process: the `envoy.filters.http.local_ratelimit` filter and its namesake for connections.
//!
//! What is compiled here is the rule; the buckets themselves are the proxy's.

use envoy_types::pb::envoy::extensions::common::ratelimit::v3 as common;
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::local_ratelimit::v3 as network;
use envoy_types::pb::envoy::r#type::v3::{HttpStatus, TokenBucket as PbTokenBucket};
use http::StatusCode;

use super::descriptor::{Descriptor, Facts, HostLimits, MOST_STAGES, RateLimits};
use super::{Percent, RouteFilters};
use crate::error::{CompileError, Result, Within, every_field, flag, nonzero_duration};
use crate::headers::HeaderOps;

/// Envoy refuses to fill faster.
const SHORTEST_FILL: f64 = 0.05;

/// A compiled `LocalRateLimit`.
#[derive(Debug)]
pub struct LocalRateLimit {
    /// Of the answer to a request beyond the limit.
    pub status: StatusCode,
    /// gRPC callers are told RESOURCE_EXHAUSTED instead of UNAVAILABLE.
    pub as_resource_exhausted: bool,
    /// The bucket of requests that no descriptor matches, and of all unless the configuration says otherwise.
    pub bucket: Option<TokenBucket>,
    /// Buckets for requests with certain descriptors.
    pub descriptors: Vec<DescriptorBucket>,
    /// Share of requests that are counted.
    pub enabled: Percent,
    /// Share of the requests beyond the limit that are refused.
    pub enforced: Percent,
    /// For requests beyond the limit that are let through.
    pub request_ops: HeaderOps,
    /// For the answer to refused ones.
    pub response_ops: HeaderOps,
    /// Every client connection has buckets of its own.
    pub per_connection: bool,
    /// Tell the client by `x-ratelimit-*` (draft-polli-ratelimit-headers-03).
    pub tell_limits: bool,
    /// Tell refused clients when to come again (`retry-after`).
    pub tell_retry: bool,
    always_default: bool,
    stage: u32,
    host_limits: HostLimits,
    own_limits: RateLimits,
}

/// A token bucket. It is full at first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenBucket {
    /// What it holds.
    pub max: f64,
    /// What comes in, all the time (Envoy does not fill in steps either).
    pub per_second: f64,
    fill_seconds: f64,
}

/// A bucket for requests with all of these entries.
#[derive(Debug)]
pub struct DescriptorBucket {
    entries: Vec<(String, String)>,
    /// Its bucket.
    pub bucket: TokenBucket,
    /// Counts, but refuses nobody.
    shadow: bool,
}

/// One of a limit's buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BucketId {
    /// [`LocalRateLimit::bucket`].
    Default,
    /// Index into [`LocalRateLimit::descriptors`].
    Descriptor(usize),
}

/// The outcome of counting a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judged {
    /// Within the limits?
    pub allowed: bool,
    /// The bucket that the client is to hear about.
    pub bucket: Option<BucketId>,
}

impl LocalRateLimit {
    /// A limit in the settings of a route must have a bucket; a connection manager's may have none, and then routes decide.
    pub(crate) fn compile(m: &pb::LocalRateLimit, of_route: bool) -> Result<Self> {
        every_field!(m, pb::LocalRateLimit,
            used {
                status, token_bucket, filter_enabled, filter_enforced, request_headers_to_add_when_not_enforced,
                response_headers_to_add, descriptors, stage, local_rate_limit_per_downstream_connection,
                enable_x_ratelimit_headers, vh_rate_limits, always_consume_default_token_bucket,
                rate_limited_as_resource_exhausted, rate_limits, enable_retry_after_header,
            }
            // stat_prefix names statistics; max_dynamic_descriptors bounds buckets for wildcards, which are refused.
            irrelevant { stat_prefix, max_dynamic_descriptors }
            refused { local_cluster_rate_limit });
        let bucket = m.token_bucket.as_ref().map(TokenBucket::compile);
        let bucket = bucket.transpose().within("token_bucket")?;
        if of_route && bucket.is_none() {
            return Err(CompileError::new("token_bucket", "is missing"));
        }
        if m.stage > MOST_STAGES {
            return Err(CompileError::new(
                "stage",
                format!("{} is above {MOST_STAGES}", m.stage),
            ));
        }
        let mut descriptors: Vec<DescriptorBucket> = Vec::with_capacity(m.descriptors.len());
        for (i, descriptor) in m.descriptors.iter().enumerate() {
            let at = format!("descriptors[{i}]");
            let new = DescriptorBucket::compile(descriptor, bucket.as_ref()).within(&at)?;
            if descriptors.iter().any(|d| d.entries == new.entries) {
                return Err(CompileError::new(at, "has the entries of another one"));
            }
            descriptors.push(new);
        }
        Ok(Self {
            status: status(m.status.as_ref(), StatusCode::TOO_MANY_REQUESTS),
            as_resource_exhausted: m.rate_limited_as_resource_exhausted,
            bucket,
            descriptors,
            enabled: Percent::of_runtime(m.filter_enabled.as_ref(), Percent::NONE)
                .within("filter_enabled")?,
            enforced: Percent::of_runtime(m.filter_enforced.as_ref(), Percent::NONE)
                .within("filter_enforced")?,
            request_ops: HeaderOps::compile(&m.request_headers_to_add_when_not_enforced, &[])
                .within("request_headers_to_add_when_not_enforced")?,
            response_ops: HeaderOps::compile(&m.response_headers_to_add, &[])
                .within("response_headers_to_add")?,
            per_connection: m.local_rate_limit_per_downstream_connection,
            tell_limits: tell_limits(m.enable_x_ratelimit_headers)?,
            tell_retry: m.enable_retry_after_header,
            always_default: flag(m.always_consume_default_token_bucket.as_ref(), true),
            stage: m.stage,
            host_limits: match common::VhRateLimitsOptions::try_from(m.vh_rate_limits) {
                Ok(common::VhRateLimitsOptions::Override) => HostLimits::Override,
                Ok(common::VhRateLimitsOptions::Include) => HostLimits::Include,
                Ok(common::VhRateLimitsOptions::Ignore) => HostLimits::Ignore,
                Err(_) => return Err(CompileError::new("vh_rate_limits", "is unknown")),
            },
            own_limits: RateLimits::compile(&m.rate_limits).within("rate_limits")?,
        })
    }

    /// Can it refuse anything at all?
    pub fn acts(&self) -> bool {
        !self.enabled.is_zero() && (self.bucket.is_some() || !self.descriptors.is_empty())
    }

    /// What the request is counted under beside the common bucket.
    pub fn describe<'a>(
        &'a self,
        route: Option<&'a RouteFilters>,
        facts: &Facts<'a>,
    ) -> Vec<Descriptor<'a>> {
        if self.descriptors.is_empty() {
            return Vec::new();
        }
        if !self.own_limits.is_empty() {
            return self
                .own_limits
                .iter()
                .filter_map(|e| e.descriptor(facts))
                .collect();
        }
        let Some(route) = route else {
            return Vec::new();
        };
        let limits = route.limits().of_stage(self.stage, self.host_limits);
        limits
            .filter(|entry| !entry.has_key())
            .filter_map(|entry| entry.descriptor(facts))
            .collect()
    }

    /// Counts a request. `consume` takes tokens from a bucket, if there are enough. The slowest of the matching buckets comes first, so
    /// that a request that it refuses takes nothing from the others (not from all that follow, as in Envoy).
    pub fn judge(
        &self,
        request: &[Descriptor<'_>],
        mut consume: impl FnMut(BucketId, f64) -> bool,
    ) -> Judged {
        let found = request.iter().filter_map(|descriptor| {
            let at = self
                .descriptors
                .iter()
                .position(|d| d.matches(descriptor))?;
            Some((at, descriptor.hits.unwrap_or(1) as f64))
        });
        let mut matched: Vec<(usize, f64)> = found.collect();
        let rate = |(at, _): &(usize, f64)| {
            self.descriptors
                .get(*at)
                .map_or(f64::MAX, |d| d.bucket.per_second)
        };
        matched.sort_by(|a, b| rate(a).total_cmp(&rate(b)));
        let first = matched.first().map(|(at, _)| BucketId::Descriptor(*at));
        for (at, hits) in &matched {
            let id = BucketId::Descriptor(*at);
            let shadow = self.descriptors.get(*at).is_some_and(|d| d.shadow);
            if !consume(id, *hits) && !shadow {
                return Judged {
                    allowed: false,
                    bucket: Some(id),
                };
            }
        }
        let default = self.bucket.is_some() && (matched.is_empty() || self.always_default);
        if default && !consume(BucketId::Default, 1.0) {
            return Judged {
                allowed: false,
                bucket: Some(BucketId::Default),
            };
        }
        Judged {
            allowed: true,
            bucket: first.or(default.then_some(BucketId::Default)),
        }
    }

    /// The settings of one of its buckets.
    pub fn bucket_of(&self, id: BucketId) -> Option<TokenBucket> {
        match id {
            BucketId::Default => self.bucket,
            BucketId::Descriptor(at) => self.descriptors.get(at).map(|d| d.bucket),
        }
    }
}

/// The status of refused requests; what is no error is not taken (as in Envoy).
pub(super) fn status(m: Option<&HttpStatus>, default: StatusCode) -> StatusCode {
    m.and_then(|m| u16::try_from(m.code).ok())
        .and_then(|code| StatusCode::from_u16(code).ok())
        .filter(|status| (400..600).contains(&status.as_u16()))
        .unwrap_or(default)
}

fn tell_limits(version: i32) -> Result<bool> {
    match common::XRateLimitHeadersRfcVersion::try_from(version) {
        Ok(common::XRateLimitHeadersRfcVersion::Off) => Ok(false),
        Ok(common::XRateLimitHeadersRfcVersion::DraftVersion03) => Ok(true),
        Err(_) => Err(CompileError::new(
            "enable_x_ratelimit_headers",
            "is unknown",
        )),
    }
}

impl TokenBucket {
    /// A rule made by hand.
    pub fn new(max: f64, per_second: f64) -> Self {
        Self {
            max,
            per_second,
            fill_seconds: 1.0,
        }
    }

    pub(crate) fn compile(m: &PbTokenBucket) -> Result<Self> {
        every_field!(m, PbTokenBucket, used { max_tokens, tokens_per_fill, fill_interval } irrelevant {} refused {});
        let fill = nonzero_duration("fill_interval", m.fill_interval.as_ref())?
            .ok_or_else(|| CompileError::new("fill_interval", "is missing"))?
            .as_secs_f64();
        if fill < SHORTEST_FILL {
            return Err(CompileError::new(
                "fill_interval",
                "is shorter than 50 milliseconds",
            ));
        }
        let per_fill = m.tokens_per_fill.map_or(1, |n| n.value);
        if m.max_tokens == 0 || per_fill == 0 {
            return Err(CompileError::new(
                "max_tokens",
                "max_tokens and tokens_per_fill must be above zero",
            ));
        }
        Ok(Self {
            max: f64::from(m.max_tokens),
            per_second: f64::from(per_fill) / fill,
            fill_seconds: fill,
        })
    }
}

impl DescriptorBucket {
    fn compile(
        m: &common::LocalRateLimitDescriptor,
        default: Option<&TokenBucket>,
    ) -> Result<Self> {
        every_field!(m, common::LocalRateLimitDescriptor, used { entries, token_bucket, shadow_mode } irrelevant {} refused {});
        let bucket = m
            .token_bucket
            .as_ref()
            .ok_or_else(|| CompileError::new("token_bucket", "is missing"))?;
        let bucket = TokenBucket::compile(bucket).within("token_bucket")?;
        let multiple = default.is_none_or(|default| {
            let times = bucket.fill_seconds / default.fill_seconds;
            (times - times.round()).abs() < 1e-6
        });
        if !multiple {
            return Err(CompileError::new(
                "token_bucket.fill_interval",
                "is not a multiple of the filter's own fill_interval (Envoy refuses that, too)",
            ));
        }
        if m.entries.is_empty() {
            return Err(CompileError::new("entries", "is empty"));
        }
        if let Some(entry) = m.entries.iter().find(|entry| entry.value.is_empty()) {
            return Err(CompileError::new(
                "entries",
                format!(
                    "{:?} has no value: a bucket for each value is not implemented",
                    entry.key
                ),
            ));
        }
        Ok(Self {
            entries: m
                .entries
                .iter()
                .map(|entry| (entry.key.clone(), entry.value.clone()))
                .collect(),
            bucket,
            shadow: m.shadow_mode,
        })
    }

    fn matches(&self, request: &Descriptor<'_>) -> bool {
        self.entries.len() == request.entries.len()
            && self
                .entries
                .iter()
                .zip(&request.entries)
                .all(|((key, value), (k, v))| key == k && value == v)
    }
}

/// The filter for connections: those beyond the limit are closed as they come.
#[derive(Debug)]
pub struct ConnectionLimit {
    /// Its bucket; every new connection takes one token.
    pub bucket: TokenBucket,
    /// Filters with the same key count together; empty counts alone.
    pub share_key: Box<str>,
}

impl ConnectionLimit {
    /// `None` where it is switched off.
    pub(crate) fn compile(m: &network::LocalRateLimit) -> Result<Option<Self>> {
        every_field!(m, network::LocalRateLimit, used { token_bucket, runtime_enabled, share_key } irrelevant { stat_prefix } refused {});
        let bucket = m
            .token_bucket
            .as_ref()
            .ok_or_else(|| CompileError::new("token_bucket", "is missing"))?;
        let bucket = TokenBucket::compile(bucket).within("token_bucket")?;
        let default = m.runtime_enabled.as_ref().and_then(|m| m.default_value);
        let enabled = flag(default.as_ref(), true);
        Ok(enabled.then(|| Self {
            bucket,
            share_key: m.share_key.as_str().into(),
        }))
    }
}
