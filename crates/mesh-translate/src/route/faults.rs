//! Faults, cross-origin rules and mirrors of a rule.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::core::v3::RuntimeFractionalPercent;
use envoy_types::pb::envoy::config::route::v3::route_action::RequestMirrorPolicy;
use envoy_types::pb::envoy::extensions::filters::common::fault::v3::FaultDelay as DelayMessage;
use envoy_types::pb::envoy::extensions::filters::common::fault::v3::fault_delay::FaultDelaySecifier;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::CorsPolicy as CorsMessage;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::fault_abort::ErrorType;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::{
    FaultAbort as AbortMessage, HttpFault,
};
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use envoy_types::pb::google::protobuf::Any;
use mesh_api::networking::virtual_service::{
    CorsPolicy, Destination, FaultAbort, FaultDelay, HttpFaultInjection, HttpRoute, Percent,
    UnmatchedPreflights,
};

use super::{Client, matching};
use crate::names;
use crate::pb::{any, boolean, duration, ordered_map};

/// Settings of a rule for single HTTP filters.
pub(super) fn per_filter(http: &HttpRoute) -> HashMap<String, Any> {
    let fault = http.fault.as_ref().map(|fault| {
        let message = any(&fault_message(fault));
        (names::FAULT_FILTER.to_owned(), message)
    });
    let cors = http.cors_policy.as_ref().map(|policy| {
        let message = any(&cors_message(policy));
        (names::CORS_FILTER.to_owned(), message)
    });
    ordered_map(cors.into_iter().chain(fault))
}

fn fault_message(fault: &HttpFaultInjection) -> HttpFault {
    HttpFault {
        delay: fault.delay.as_ref().and_then(delay),
        abort: fault.abort.as_ref().and_then(abort),
        ..HttpFault::default()
    }
}

fn delay(given: &FaultDelay) -> Option<DelayMessage> {
    let length = duration(given.fixed_delay?.0)?;
    let share = match &given.percentage {
        Some(share) => millionths(share),
        None => hundredths(u32::try_from(given.percent).unwrap_or(0)),
    };
    Some(DelayMessage {
        percentage: Some(share),
        fault_delay_secifier: Some(FaultDelaySecifier::FixedDelay(length)),
    })
}

/// Without a share no request is ended: an absent one is 0 to Envoy, too.
fn abort(given: &FaultAbort) -> Option<AbortMessage> {
    let error = match given.http_status {
        Some(status) => ErrorType::HttpStatus(status.unsigned_abs()),
        None => ErrorType::GrpcStatus(given.grpc_code()?),
    };
    Some(AbortMessage {
        percentage: given.percentage.as_ref().map(millionths),
        error_type: Some(error),
        ..AbortMessage::default()
    })
}

fn cors_message(policy: &CorsPolicy) -> CorsMessage {
    let exact = |origin: &String| StringMatcher {
        match_pattern: Some(MatchPattern::Exact(origin.clone())),
        ignore_case: false,
    };
    let allow_origin_string_match = if policy.allow_origins.is_empty() {
        policy.allow_origin.iter().map(exact).collect()
    } else {
        let patterns = policy.allow_origins.iter().filter_map(matching::pattern);
        patterns.collect()
    };
    let forward = policy.unmatched_preflights != UnmatchedPreflights::Ignore;
    CorsMessage {
        allow_origin_string_match,
        allow_methods: policy.allow_methods.join(","),
        allow_headers: policy.allow_headers.join(","),
        expose_headers: policy.expose_headers.join(","),
        max_age: policy
            .max_age
            .map(|age| age.0.as_secs().to_string())
            .unwrap_or_default(),
        allow_credentials: policy.allow_credentials.and_then(boolean),
        filter_enabled: Some(runtime(hundredths(100))),
        forward_not_matching_preflights: boolean(forward),
        ..CorsMessage::default()
    }
}

/// Where copies of requests go. Without a share all requests are copied, with 0 none.
pub(super) fn mirrors(http: &HttpRoute, client: &Client<'_>) -> Vec<RequestMirrorPolicy> {
    let single = http.mirror.as_ref().map(|destination| {
        let share = match (&http.mirror_percentage, http.mirror_percent) {
            (Some(share), _) => millionths(share),
            (None, Some(percent)) => hundredths(percent),
            (None, None) => hundredths(100),
        };
        (destination, share)
    });
    let several = http.mirrors.iter().map(|mirror| {
        let share = mirror.percentage.as_ref().map(millionths);
        (&mirror.destination, share.unwrap_or(hundredths(100)))
    });
    let all = single.into_iter().chain(several);
    all.filter(|(_, share)| share.numerator > 0)
        .map(|(destination, share)| mirror(destination, share, client))
        .collect()
}

/// Copies keep the host as it is and are not traced, as Istio has it.
fn mirror(
    destination: &Destination,
    share: FractionalPercent,
    client: &Client<'_>,
) -> RequestMirrorPolicy {
    RequestMirrorPolicy {
        cluster: client.cluster(destination),
        runtime_fraction: Some(runtime(share)),
        trace_sampled: boolean(false),
        disable_shadow_host_suffix_append: true,
        ..RequestMirrorPolicy::default()
    }
}

fn runtime(share: FractionalPercent) -> RuntimeFractionalPercent {
    RuntimeFractionalPercent {
        default_value: Some(share),
        ..RuntimeFractionalPercent::default()
    }
}

fn hundredths(percent: u32) -> FractionalPercent {
    FractionalPercent {
        numerator: percent,
        denominator: DenominatorType::Hundred as i32,
    }
}

/// Istio's resolution is 0.0001 percent.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "shares are from 0 to 100, the model lets no other through"
)]
fn millionths(percent: &Percent) -> FractionalPercent {
    FractionalPercent {
        numerator: (percent.value * 10_000.0).round() as u32,
        denominator: DenominatorType::Million as i32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_istios_resolution() {
        for (value, numerator) in [(0.0, 0), (0.0001, 1), (0.57, 5700), (100.0, 1_000_000)] {
            assert_eq!(millionths(&Percent { value }).numerator, numerator);
        }
    }
}
