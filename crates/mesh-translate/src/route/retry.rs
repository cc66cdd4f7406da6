//! Retries.

use envoy_types::pb::envoy::config::route::v3::RetryPolicy;
use envoy_types::pb::envoy::config::route::v3::retry_policy::retry_host_predicate::ConfigType;
use envoy_types::pb::envoy::config::route::v3::retry_policy::{RetryBackOff, RetryHostPredicate};
use envoy_types::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use mesh_api::networking::virtual_service::HttpRetry;

use crate::pb::{any, duration, uint32};

/// Istio's default: failures to connect and answers of gRPC that say so. The list of status codes stays empty, so that an application's 503 is its own.
const DEFAULT_CONDITIONS: &str =
    "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
const DEFAULT_ATTEMPTS: u32 = 2;
/// How often another endpoint is picked before one that has failed already is taken again.
const HOST_SELECTION_ATTEMPTS: i64 = 5;

/// Of a rule: its own, none where it turns retries off, else the default.
pub(super) fn of(retries: Option<&HttpRetry>) -> Option<RetryPolicy> {
    let Some(retries) = retries else {
        return Some(default_policy());
    };
    let attempts = u32::try_from(retries.attempts)
        .ok()
        .filter(|attempts| *attempts > 0)?;
    let mut policy = default_policy();
    policy.num_retries = uint32(attempts);
    if !retries.retry_on.is_empty() {
        (policy.retry_on, policy.retriable_status_codes) = conditions(&retries.retry_on);
    }
    if retries.retry_ignore_previous_hosts == Some(false) {
        policy.retry_host_predicate.clear();
    }
    policy.per_try_timeout = retries.per_try_timeout.and_then(|limit| duration(limit.0));
    if let Some(base) = retries.backoff.filter(|base| !base.is_zero()) {
        policy.retry_back_off = Some(RetryBackOff {
            base_interval: duration(base.0),
            max_interval: None,
        });
    }
    Some(policy)
}

pub(super) fn default_policy() -> RetryPolicy {
    let predicate = RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(
            &PreviousHostsPredicate::default(),
        ))),
    };
    RetryPolicy {
        retry_on: DEFAULT_CONDITIONS.to_owned(),
        num_retries: uint32(DEFAULT_ATTEMPTS),
        retry_host_predicate: vec![predicate],
        host_selection_retry_max_attempts: HOST_SELECTION_ATTEMPTS,
        ..RetryPolicy::default()
    }
}

/// Toward the application: only where the request did not get through to it.
pub(super) fn inbound() -> RetryPolicy {
    RetryPolicy {
        retry_on: "reset-before-request".to_owned(),
        num_retries: uint32(DEFAULT_ATTEMPTS),
        ..RetryPolicy::default()
    }
}

/// Splits Istio's list into Envoy's conditions and status codes.
fn conditions(list: &str) -> (String, Vec<u32>) {
    let mut names = Vec::new();
    let mut codes = Vec::new();
    for entry in list
        .split(',')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
    {
        match entry.parse::<u32>() {
            Ok(code) if (100..600).contains(&code) => codes.push(code),
            _ => names.push(entry),
        }
    }
    if !codes.is_empty() && !names.contains(&"retriable-status-codes") {
        names.push("retriable-status-codes");
    }
    (names.join(","), codes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_status_codes() {
        assert_eq!(
            conditions("5xx, 409 ,reset"),
            ("5xx,reset,retriable-status-codes".to_owned(), vec![409])
        );
        assert_eq!(
            conditions("retriable-status-codes,503"),
            ("retriable-status-codes".to_owned(), vec![503])
        );
        assert_eq!(
            conditions("connect-failure"),
            ("connect-failure".to_owned(), vec![])
        );
    }

    #[test]
    fn zero_attempts_turn_retries_off() {
        assert_eq!(of(Some(&HttpRetry::default())), None);
        assert_eq!(of(None), Some(default_policy()));
        let twice = HttpRetry {
            attempts: 3,
            retry_ignore_previous_hosts: Some(false),
            ..HttpRetry::default()
        };
        let policy = of(Some(&twice)).unwrap();
        assert_eq!(policy.num_retries, uint32(3u32));
        assert_eq!(policy.retry_on, DEFAULT_CONDITIONS);
        assert!(policy.retry_host_predicate.is_empty());
    }
}
