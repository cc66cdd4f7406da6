//! Counting requests in fixed windows of time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use envoy_types::pb::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor;
use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_response::rate_limit::Unit as PbUnit;
use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_response::{
    Code, DescriptorStatus, RateLimit,
};
use envoy_types::pb::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use envoy_types::pb::envoy::r#type::v3::RateLimitUnit;
use envoy_types::pb::google::protobuf::Duration;

use super::config::{Config, Rule, Unit};

/// Counters kept at most; windows that are over are forgotten first.
const MOST_COUNTERS: usize = 100_000;

/// The counters of all windows.
#[derive(Debug, Default)]
pub struct Limiter(Mutex<HashMap<String, Window>>);

#[derive(Debug)]
struct Window {
    /// Second at which it is over.
    end: u64,
    hits: u64,
}

impl Limiter {
    /// Counts a request and says whether it is within its limits. Every descriptor is counted, also where another one refuses.
    pub fn judge(
        &self,
        config: &Config,
        question: &RateLimitRequest,
        now: u64,
    ) -> RateLimitResponse {
        let hits = u64::from(question.hits_addend.max(1));
        let statuses: Vec<DescriptorStatus> = question
            .descriptors
            .iter()
            .map(|descriptor| self.status(config, &question.domain, descriptor, hits, now))
            .collect();
        let over = statuses.iter().any(|s| s.code == Code::OverLimit as i32);
        RateLimitResponse {
            overall_code: if over { Code::OverLimit } else { Code::Ok } as i32,
            statuses,
            ..RateLimitResponse::default()
        }
    }

    fn status(
        &self,
        config: &Config,
        domain: &str,
        descriptor: &RateLimitDescriptor,
        hits: u64,
        now: u64,
    ) -> DescriptorStatus {
        let entries = || {
            descriptor
                .entries
                .iter()
                .map(|e| (e.key.as_str(), e.value.as_str()))
        };
        let own = descriptor.limit.as_ref().and_then(|limit| {
            Some(Rule {
                requests: limit.requests_per_unit,
                unit: unit_of(RateLimitUnit::try_from(limit.unit).ok()?)?,
                name: String::new(),
                unlimited: false,
                shadow: false,
            })
        });
        let ok = DescriptorStatus {
            code: Code::Ok as i32,
            ..DescriptorStatus::default()
        };
        let Some(rule) = own.as_ref().or_else(|| config.rule(domain, entries())) else {
            return ok;
        };
        if rule.unlimited {
            return DescriptorStatus {
                limit_remaining: u32::MAX,
                ..ok
            };
        }
        let hits = descriptor.hits_addend.as_ref().map_or(hits, |h| h.value);
        let length = rule.unit.seconds();
        let end = now - now % length + length;
        let key = entries().fold(format!("{domain}_{length}"), |key, (k, v)| {
            format!("{key}\u{0}{k}\u{0}{v}")
        });
        let after = self.count(key, end, hits, now);
        let limit = u64::from(rule.requests);
        let over = after > limit && !rule.shadow;
        DescriptorStatus {
            code: if over { Code::OverLimit } else { Code::Ok } as i32,
            current_limit: Some(RateLimit {
                name: rule.name.clone(),
                requests_per_unit: rule.requests,
                unit: told_as(rule.unit) as i32,
            }),
            limit_remaining: u32::try_from(limit.saturating_sub(after)).unwrap_or(u32::MAX),
            duration_until_reset: Some(Duration {
                seconds: i64::try_from(end - now).unwrap_or(i64::MAX),
                nanos: 0,
            }),
            ..DescriptorStatus::default()
        }
    }

    fn count(&self, key: String, end: u64, hits: u64, now: u64) -> u64 {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if windows.len() >= MOST_COUNTERS && !windows.contains_key(&key) {
            windows.retain(|_, window| window.end > now);
            if windows.len() >= MOST_COUNTERS {
                // Somebody sends ever new values: memory stays bounded, counting begins again.
                windows.clear();
            }
        }
        let window = windows.entry(key).or_insert(Window { end, hits: 0 });
        if window.end != end {
            *window = Window { end, hits: 0 };
        }
        window.hits = window.hits.saturating_add(hits);
        window.hits
    }
}

fn unit_of(unit: RateLimitUnit) -> Option<Unit> {
    Some(match unit {
        RateLimitUnit::Unknown => return None,
        RateLimitUnit::Second => Unit::Second,
        RateLimitUnit::Minute => Unit::Minute,
        RateLimitUnit::Hour => Unit::Hour,
        RateLimitUnit::Day => Unit::Day,
        RateLimitUnit::Month => Unit::Month,
        RateLimitUnit::Year => Unit::Year,
    })
}

fn told_as(unit: Unit) -> PbUnit {
    match unit {
        Unit::Second => PbUnit::Second,
        Unit::Minute => PbUnit::Minute,
        Unit::Hour => PbUnit::Hour,
        Unit::Day => PbUnit::Day,
        Unit::Week => PbUnit::Week,
        Unit::Month => PbUnit::Month,
        Unit::Year => PbUnit::Year,
    }
}
