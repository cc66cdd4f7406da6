//! Picking endpoints.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::address::Address as Kind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, HealthStatus, SocketAddress};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
};
use envoy_types::pb::google::protobuf::UInt32Value;
use mesh_routing::endpoint::EndpointSet;
use mesh_routing::lb::{LbPolicy, Turn, pick};
use proptest::prelude::*;

/// Port, weight, health, priority of each endpoint.
fn set(endpoints: &[(u16, u32, HealthStatus, u32)], panic_percent: u32) -> EndpointSet {
    let group = |(port, weight, health, priority): &(u16, u32, HealthStatus, u32)| {
        let socket = SocketAddress {
            address: "10.0.0.1".to_owned(),
            port_specifier: Some(PortSpecifier::PortValue((*port).into())),
            ..Default::default()
        };
        let endpoint = Endpoint {
            address: Some(Address {
                address: Some(Kind::SocketAddress(socket)),
            }),
            ..Default::default()
        };
        let endpoint = LbEndpoint {
            health_status: *health as i32,
            load_balancing_weight: Some(UInt32Value { value: *weight }),
            host_identifier: Some(HostIdentifier::Endpoint(endpoint)),
            ..Default::default()
        };
        LocalityLbEndpoints {
            lb_endpoints: vec![endpoint],
            priority: *priority,
            ..Default::default()
        }
    };
    let message = ClusterLoadAssignment {
        endpoints: endpoints.iter().map(group).collect(),
        ..Default::default()
    };
    EndpointSet::compile(&message, panic_percent).expect("a set")
}

/// How often each index is picked in `n` tries with an evenly spread sequence of random numbers.
fn counts(
    set: &EndpointSet,
    policy: LbPolicy,
    n: usize,
    active: impl Fn(usize) -> u32,
) -> BTreeMap<usize, usize> {
    let (turn, mut seed) = (Turn::default(), 88_172_645_463_325_252_u64);
    let mut counts = BTreeMap::new();
    for _ in 0..n {
        let random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        if let Some(index) = pick(set, policy, &turn, random, &active) {
            *counts.entry(index).or_default() += 1;
        }
    }
    counts
}

const UP: HealthStatus = HealthStatus::Healthy;
const DOWN: HealthStatus = HealthStatus::Unhealthy;

#[test]
fn round_robin_goes_strictly_in_turn() {
    let set = set(&[(1, 1, UP, 0), (2, 1, UP, 0), (3, 1, UP, 0)], 50);
    let turn = Turn::default();
    let order: Vec<_> = (0..7)
        .map(|_| pick(&set, LbPolicy::RoundRobin, &turn, || 0, |_| 0))
        .collect();
    assert_eq!(order, [0, 1, 2, 0, 1, 2, 0].map(Some));
}

#[test]
fn weights_are_kept_and_spread() {
    let set = set(&[(1, 3, UP, 0), (2, 1, UP, 0)], 50);
    let turn = Turn::default();
    let order: Vec<_> = (0..8)
        .filter_map(|_| pick(&set, LbPolicy::RoundRobin, &turn, || 0, |_| 0))
        .collect();
    assert_eq!(order, [0, 0, 1, 0, 0, 0, 1, 0]);
    let by_chance = counts(&set, LbPolicy::Random, 4000, |_| 0);
    assert!((2800..3200).contains(&by_chance[&0]), "{by_chance:?}");
}

#[test]
fn the_less_busy_of_two_is_taken() {
    let set = set(&[(1, 1, UP, 0), (2, 1, UP, 0)], 50);
    let all = counts(&set, LbPolicy::LeastRequest(2), 100, |i| {
        if i == 0 { 5 } else { 1 }
    });
    assert_eq!(all, [(1, 100)].into());
    let even = counts(&set, LbPolicy::LeastRequest(2), 1000, |_| 0);
    assert!((400..600).contains(&even[&0]), "{even:?}");
}

#[test]
fn unhealthy_ones_are_passed_over_unless_too_many_are() {
    let mostly_up = [(1, 1, UP, 0), (2, 1, DOWN, 0), (3, 1, UP, 0)];
    assert_eq!(
        counts(&set(&mostly_up, 50), LbPolicy::RoundRobin, 10, |_| 0),
        [(0, 5), (2, 5)].into()
    );
    let mostly_down = [(1, 1, UP, 0), (2, 1, DOWN, 0), (3, 1, DOWN, 0)];
    assert_eq!(
        counts(&set(&mostly_down, 50), LbPolicy::RoundRobin, 9, |_| 0).len(),
        3,
        "panic"
    );
    assert_eq!(
        counts(&set(&mostly_down, 0), LbPolicy::RoundRobin, 9, |_| 0),
        [(0, 9)].into()
    );
    let none = [(1, 1, DOWN, 0)];
    assert!(counts(&set(&none, 0), LbPolicy::RoundRobin, 9, |_| 0).is_empty());
    assert!(counts(&set(&[], 50), LbPolicy::Random, 9, |_| 0).is_empty());
    let degraded = [(1, 1, HealthStatus::Degraded, 0), (2, 1, UP, 0)];
    assert_eq!(
        counts(&set(&degraded, 0), LbPolicy::RoundRobin, 4, |_| 0),
        [(1, 4)].into()
    );
}

#[test]
fn priorities_spill_over() {
    let first_up = [(1, 1, UP, 0), (2, 1, UP, 1)];
    assert_eq!(
        counts(&set(&first_up, 50), LbPolicy::RoundRobin, 10, |_| 0),
        [(0, 10)].into()
    );
    let first_down = [(1, 1, DOWN, 0), (2, 1, UP, 1)];
    assert_eq!(
        counts(&set(&first_down, 50), LbPolicy::RoundRobin, 10, |_| 0),
        [(1, 10)].into()
    );
    // Half of the first level is down: 70 % stay there (140 % of a half), the rest spills.
    let half = [(1, 1, UP, 0), (2, 1, DOWN, 0), (3, 1, UP, 1)];
    let spread = counts(&set(&half, 50), LbPolicy::RoundRobin, 10_000, |_| 0);
    assert!(
        (6700..7300).contains(&spread[&0]) && !spread.contains_key(&1),
        "{spread:?}"
    );
}

proptest! {
    #[test]
    fn a_usable_endpoint_is_always_found(weights in proptest::collection::vec((1_u32..100_000, any::<bool>()), 1..20), policy in 0..3, random: u64) {
        let endpoints: Vec<_> = weights.iter().zip(1_u16..).map(|((w, up), port)| (port, *w, if *up { UP } else { DOWN }, 0)).collect();
        let set = set(&endpoints, 0);
        let policy = [LbPolicy::RoundRobin, LbPolicy::Random, LbPolicy::LeastRequest(2)][policy as usize];
        let picked = pick(&set, policy, &Turn::default(), || random, |_| 0);
        prop_assert_eq!(picked.is_some(), weights.iter().any(|(_, up)| *up));
        if let Some(index) = picked {
            prop_assert!(weights[index].1, "an unhealthy endpoint was picked");
        }
    }
}
