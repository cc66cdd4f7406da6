//! Retries.

use envoy_types::pb::envoy::config::route::v3::RetryPolicy;
use envoy_types::pb::envoy::config::route::v3::retry_policy::retry_host_predicate::ConfigType as HostConfig;
use envoy_types::pb::envoy::config::route::v3::retry_policy::retry_priority::ConfigType as PriorityConfig;
use envoy_types::pb::envoy::config::route::v3::retry_policy::{
    RetryBackOff, RetryHostPredicate, RetryPriority,
};
use envoy_types::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use envoy_types::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;
use mesh_api::mesh_config::MeshConfig;
use mesh_api::networking::virtual_service::HttpRetry;

use crate::pb::{any, duration, uint32};

/// Istio's default: failures to connect and answers of gRPC that say so. The list of status codes stays empty, so that an application's 503 is its own.
const DEFAULT_CONDITIONS: &str =
    "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
const DEFAULT_ATTEMPTS: u32 = 2;
/// How often another endpoint is picked before one that has failed already is taken again.
const HOST_SELECTION_ATTEMPTS: i64 = 5;
/// How many tries stay in one priority, where retries may leave the locality.
const TRIES_PER_PRIORITY: i32 = 2;

/// Of a rule: its own, else the mesh's, else the default; none where that turns retries off. Where requests are `hashed` to one endpoint, no other
/// is looked for unless the rule asks for it.
pub(super) fn of(
    retries: Option<&HttpRetry>,
    mesh: &MeshConfig,
    hashed: bool,
) -> Option<RetryPolicy> {
    let mut policy = default_policy();
    if hashed {
        policy.retry_host_predicate.clear();
    }
    let Some(retries) = retries.or(mesh.default_http_retry_policy.as_ref()) else {
        return Some(policy);
    };
    let attempts = u32::try_from(retries.attempts)
        .ok()
        .filter(|attempts| *attempts > 0)?;
    policy.num_retries = uint32(attempts);
    if !retries.retry_on.is_empty() {
        (policy.retry_on, policy.retriable_status_codes) = conditions(&retries.retry_on);
    }
    match retries.retry_ignore_previous_hosts {
        Some(true) => policy.retry_host_predicate = vec![other_hosts()],
        Some(false) => policy.retry_host_predicate.clear(),
        None => {}
    }
    if retries.retry_remote_localities == Some(true) {
        policy.retry_priority = Some(other_priorities());
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

/// Prefers endpoints that have not been tried.
fn other_hosts() -> RetryHostPredicate {
    RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(HostConfig::TypedConfig(any(
            &PreviousHostsPredicate::default(),
        ))),
    }
}

/// Goes on to the next priority after two tries in one.
fn other_priorities() -> RetryPriority {
    let config = PreviousPrioritiesConfig {
        update_frequency: TRIES_PER_PRIORITY,
    };
    RetryPriority {
        name: "envoy.retry_priorities.previous_priorities".to_owned(),
        config_type: Some(PriorityConfig::TypedConfig(any(&config))),
    }
}

fn default_policy() -> RetryPolicy {
    RetryPolicy {
        retry_on: DEFAULT_CONDITIONS.to_owned(),
        num_retries: uint32(DEFAULT_ATTEMPTS),
        retry_host_predicate: vec![other_hosts()],
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
    fn the_rule_wins_over_the_mesh_and_zero_attempts_turn_retries_off() {
        let mesh = MeshConfig::default();
        assert_eq!(of(Some(&HttpRetry::default()), &mesh, false), None);
        assert_eq!(of(None, &mesh, false), Some(default_policy()));
        let often = HttpRetry {
            attempts: 3,
            retry_ignore_previous_hosts: Some(false),
            ..HttpRetry::default()
        };
        let policy = of(Some(&often), &mesh, false).unwrap();
        assert_eq!(policy.num_retries, uint32(3u32));
        assert_eq!(policy.retry_on, DEFAULT_CONDITIONS);
        assert!(policy.retry_host_predicate.is_empty());
        let mut mesh = MeshConfig::default();
        mesh.default_http_retry_policy = Some(often);
        assert_eq!(of(None, &mesh, false), Some(policy));
        assert_eq!(of(Some(&HttpRetry::default()), &mesh, false), None);
    }

    #[test]
    fn hashed_requests_stay_unless_the_rule_says_otherwise() {
        let mesh = MeshConfig::default();
        let policy = of(None, &mesh, true).unwrap();
        assert!(policy.retry_host_predicate.is_empty());
        let leave = HttpRetry {
            attempts: 1,
            retry_ignore_previous_hosts: Some(true),
            retry_remote_localities: Some(true),
            ..HttpRetry::default()
        };
        let policy = of(Some(&leave), &mesh, true).unwrap();
        assert_eq!(policy.retry_host_predicate, [other_hosts()]);
        assert_eq!(policy.retry_priority, Some(other_priorities()));
    }
}
