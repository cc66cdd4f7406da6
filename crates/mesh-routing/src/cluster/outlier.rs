//! Outlier detection: when an endpoint is taken out for a while. Defaults are Envoy's.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::OutlierDetection as Pb;
use envoy_types::pb::google::protobuf::UInt32Value;

use crate::error::{CompileError, Result, every_field, flag, nonzero_duration};

/// A compiled `OutlierDetection` message.
#[derive(Debug, Clone, PartialEq)]
pub struct OutlierDetection {
    /// Responses of 5xx (or connection failures) in a row.
    pub consecutive_5xx: Trigger,
    /// Of 502, 503, 504 in a row.
    pub consecutive_gateway_failure: Trigger,
    /// Failures on this side (connecting, timeouts) in a row; counts only where sources are told apart.
    pub consecutive_local_origin_failure: Trigger,
    /// Tell apart what the endpoint answered and what failed on the way to it.
    pub split_local_origin: bool,
    /// Time between looks at the statistics, and at who may come back.
    pub interval: Duration,
    /// An endpoint stays out for this long times the number of its ejections.
    pub base_ejection: Duration,
    /// But no longer than this.
    pub max_ejection: Duration,
    /// Up to this is added by chance.
    pub jitter: Duration,
    /// This part of the cluster may be out at once, in percent.
    pub max_percent: u32,
    /// One may be out whatever the percentage says.
    pub always_one: bool,
    /// Endpoints that succeed much less often than the others.
    pub success_rate: SuccessRate,
    /// Endpoints that fail more often than a percentage.
    pub failure_percentage: FailurePercentage,
}

/// A number in a row, and in how many percent of the cases it has consequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trigger {
    /// 0 never.
    pub count: u32,
    /// 0 to 100.
    pub enforcing: u32,
}

/// Success rate below `mean - factor * standard deviation`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SuccessRate {
    /// Percent of the cases that have consequences.
    pub enforcing: u32,
    /// The same for local origin failures.
    pub enforcing_local: u32,
    /// Endpoints with enough requests that there must be.
    pub hosts: usize,
    /// What is enough in an interval.
    pub volume: u64,
    /// Of the standard deviation.
    pub factor: f64,
}

/// Failures in percent at or above a threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailurePercentage {
    /// Percent of the cases that have consequences.
    pub enforcing: u32,
    /// The same for local origin failures.
    pub enforcing_local: u32,
    /// Endpoints with enough requests that there must be.
    pub hosts: usize,
    /// What is enough in an interval.
    pub volume: u64,
    /// The threshold.
    pub threshold: u32,
}

impl OutlierDetection {
    pub(crate) fn compile(m: &Pb) -> Result<Self> {
        every_field!(m, Pb,
            used {
                consecutive_5xx, interval, base_ejection_time, max_ejection_percent, enforcing_consecutive_5xx, enforcing_success_rate,
                success_rate_minimum_hosts, success_rate_request_volume, success_rate_stdev_factor, consecutive_gateway_failure,
                enforcing_consecutive_gateway_failure, split_external_local_origin_errors, consecutive_local_origin_failure,
                enforcing_consecutive_local_origin_failure, enforcing_local_origin_success_rate, failure_percentage_threshold,
                enforcing_failure_percentage, enforcing_failure_percentage_local_origin, failure_percentage_minimum_hosts,
                failure_percentage_request_volume, max_ejection_time, max_ejection_time_jitter, always_eject_one_host, detect_degraded_hosts,
            }
            // successful_active_health_check_uneject_host: there is no active health checking.
            irrelevant { successful_active_health_check_uneject_host }
            refused { monitors });
        if flag(m.detect_degraded_hosts.as_ref(), false) {
            return Err(CompileError::unsupported("detect_degraded_hosts"));
        }
        let time = |field, value, default| {
            nonzero_duration(field, value).map(|time| time.unwrap_or(Duration::from_secs(default)))
        };
        let base_ejection = time("base_ejection_time", m.base_ejection_time.as_ref(), 30)?;
        let max_ejection = time("max_ejection_time", m.max_ejection_time.as_ref(), 300)?;
        let trigger = |count, enforcing, default| Trigger {
            count: or(count, 5),
            enforcing: or(enforcing, default).min(100),
        };
        Ok(Self {
            consecutive_5xx: trigger(m.consecutive_5xx, m.enforcing_consecutive_5xx, 100),
            consecutive_gateway_failure: trigger(
                m.consecutive_gateway_failure,
                m.enforcing_consecutive_gateway_failure,
                0,
            ),
            consecutive_local_origin_failure: trigger(
                m.consecutive_local_origin_failure,
                m.enforcing_consecutive_local_origin_failure,
                100,
            ),
            split_local_origin: m.split_external_local_origin_errors,
            interval: time("interval", m.interval.as_ref(), 10)?,
            base_ejection,
            max_ejection: max_ejection.max(base_ejection),
            jitter: nonzero_duration(
                "max_ejection_time_jitter",
                m.max_ejection_time_jitter.as_ref(),
            )?
            .unwrap_or_default(),
            max_percent: or(m.max_ejection_percent, 10).min(100),
            always_one: flag(m.always_eject_one_host.as_ref(), false),
            success_rate: SuccessRate {
                enforcing: or(m.enforcing_success_rate, 100),
                enforcing_local: or(m.enforcing_local_origin_success_rate, 100),
                hosts: or(m.success_rate_minimum_hosts, 5) as usize,
                volume: or(m.success_rate_request_volume, 100).into(),
                factor: f64::from(or(m.success_rate_stdev_factor, 1900)) / 1000.0,
            },
            failure_percentage: FailurePercentage {
                enforcing: or(m.enforcing_failure_percentage, 0),
                enforcing_local: or(m.enforcing_failure_percentage_local_origin, 0),
                hosts: or(m.failure_percentage_minimum_hosts, 5) as usize,
                volume: or(m.failure_percentage_request_volume, 50).into(),
                threshold: or(m.failure_percentage_threshold, 85),
            },
        })
    }

    /// Must rates be measured?
    pub fn wants_rates(&self) -> bool {
        self.success_rate.enforcing > 0
            || self.failure_percentage.enforcing > 0
            || (self.split_local_origin
                && (self.success_rate.enforcing_local > 0
                    || self.failure_percentage.enforcing_local > 0))
    }
}

fn or(value: Option<UInt32Value>, default: u32) -> u32 {
    value.map_or(default, |v| v.value)
}
