//! Picking endpoints.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::address::Address as Kind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, HealthStatus, Locality, SocketAddress};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
};
use envoy_types::pb::google::protobuf::UInt32Value;
use mesh_routing::endpoint::EndpointSet;
use mesh_routing::lb::{
    Balancer, Cursor, HashFunction, LbConfig, LbPolicy, LeastRequest, Load, SlowStart, Wanted,
};
use proptest::prelude::*;

const ROUND_ROBIN: LbPolicy = LbPolicy::RoundRobin(None);
const LEAST: LbPolicy = LbPolicy::LeastRequest(LeastRequest {
    choices: Some(2),
    bias: 1.0,
    slow_start: None,
});
const RING: LbPolicy = LbPolicy::RingHash {
    smallest: 1024,
    largest: 8 << 20,
    function: HashFunction::Xx,
};
const MAGLEV: LbPolicy = LbPolicy::Maglev(65_537);

fn endpoint(port: u16, weight: u32, health: HealthStatus) -> LbEndpoint {
    let socket = SocketAddress {
        address: "10.0.0.1".to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(port.into())),
        ..Default::default()
    };
    let endpoint = Endpoint {
        address: Some(Address {
            address: Some(Kind::SocketAddress(socket)),
        }),
        ..Default::default()
    };
    LbEndpoint {
        health_status: health as i32,
        load_balancing_weight: Some(UInt32Value { value: weight }),
        host_identifier: Some(HostIdentifier::Endpoint(endpoint)),
        ..Default::default()
    }
}

fn compiled(endpoints: Vec<LocalityLbEndpoints>) -> Arc<EndpointSet> {
    let message = ClusterLoadAssignment {
        endpoints,
        ..Default::default()
    };
    Arc::new(EndpointSet::compile(&message).expect("a set"))
}

/// Port, weight, health, priority of each endpoint.
fn set(endpoints: &[(u16, u32, HealthStatus, u32)]) -> Arc<EndpointSet> {
    let group =
        |(port, weight, health, priority): &(u16, u32, HealthStatus, u32)| LocalityLbEndpoints {
            lb_endpoints: vec![endpoint(*port, *weight, *health)],
            priority: *priority,
            ..Default::default()
        };
    compiled(endpoints.iter().map(group).collect())
}

fn balancer(set: &Arc<EndpointSet>, policy: LbPolicy, panic_percent: u32) -> Balancer {
    let config = LbConfig {
        policy,
        panic_percent,
        ..LbConfig::default()
    };
    Balancer::new(set.clone(), &config, |_| false)
}

fn chance() -> impl FnMut() -> u64 {
    let mut seed = 88_172_645_463_325_252_u64;
    move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// How often each index is picked in `n` tries.
fn counts(balancer: &Balancer, n: usize, load: &impl Load) -> BTreeMap<usize, usize> {
    let (cursor, mut random) = (Cursor::default(), chance());
    let mut counts = BTreeMap::new();
    for _ in 0..n {
        if let Some(i) = balancer.pick(&cursor, &Wanted::default(), &mut random, load) {
            *counts.entry(i).or_default() += 1;
        }
    }
    counts
}

fn idle(_: usize) -> u32 {
    0
}

/// What a balancer makes of hashes.
fn by_hash(balancer: &Balancer, hash: u64) -> usize {
    let wanted = Wanted {
        hash: Some(hash),
        ..Wanted::default()
    };
    let cursor = Cursor::default();
    balancer
        .pick(&cursor, &wanted, || 0, &idle)
        .expect("an endpoint")
}

const UP: HealthStatus = HealthStatus::Healthy;
const DOWN: HealthStatus = HealthStatus::Unhealthy;

fn close(found: usize, expected: f64, total: usize) -> bool {
    let share = found as f64 / total as f64;
    // More than four standard deviations.
    (share - expected).abs() < 4.5 * (expected * (1.0 - expected) / total as f64).sqrt() + 0.002
}

#[test]
fn round_robin_goes_strictly_in_turn_also_after_a_change() {
    let set = set(&[(1, 1, UP, 0), (2, 1, UP, 0), (3, 1, UP, 0)]);
    let balancer = balancer(&set, ROUND_ROBIN, 50);
    let cursor = Cursor::default();
    let next = || balancer.pick(&cursor, &Wanted::default(), || 0, &idle);
    let mut order: Vec<_> = (0..4).map(|_| next()).collect();
    cursor.renew();
    order.extend((0..3).map(|_| next()));
    assert_eq!(order, [0, 1, 2, 0, 1, 2, 0].map(Some));
}

#[test]
fn weights_are_kept_and_spread() {
    let set = set(&[(1, 3, UP, 0), (2, 1, UP, 0)]);
    let weighted = balancer(&set, ROUND_ROBIN, 50);
    let (cursor, mut random) = (Cursor::default(), chance());
    let order: Vec<_> = (0..40)
        .filter_map(|_| weighted.pick(&cursor, &Wanted::default(), &mut random, &idle))
        .collect();
    for four in order.chunks(4) {
        assert_eq!(four.iter().filter(|i| **i == 1).count(), 1, "{order:?}");
    }
    let least = counts(&balancer(&set, LEAST, 50), 4000, &idle);
    assert_eq!(least, [(0, 3000), (1, 1000)].into());
    // As in Envoy, weights do not count where chance decides.
    let random = counts(&balancer(&set, LbPolicy::Random, 50), 10_000, &idle);
    assert!(close(random[&0], 0.5, 10_000), "{random:?}");
}

#[test]
fn the_less_busy_is_taken() {
    let even = set(&[(1, 1, UP, 0), (2, 1, UP, 0)]);
    let busy = |i: usize| if i == 0 { 5 } else { 1 };
    assert_eq!(
        counts(&balancer(&even, LEAST, 50), 100, &busy),
        [(1, 100)].into()
    );
    let spread = counts(&balancer(&even, LEAST, 50), 10_000, &idle);
    assert!(close(spread[&0], 0.5, 10_000), "{spread:?}");
    // Weight against activity: 4 / (1 + 1) to 1 / (0 + 1).
    let weighted = set(&[(1, 4, UP, 0), (2, 1, UP, 0)]);
    let one_busy = |i: usize| u32::from(i == 0);
    let shares = counts(&balancer(&weighted, LEAST, 50), 3000, &one_busy);
    assert!((1999..=2001).contains(&shares[&0]), "{shares:?}");
    // A bias of zero leaves the weights, a full scan finds the least of all.
    let least = |choices, bias| {
        LbPolicy::LeastRequest(LeastRequest {
            choices,
            bias,
            slow_start: None,
        })
    };
    let shares = counts(
        &balancer(&weighted, least(Some(2), 0.0), 50),
        3000,
        &one_busy,
    );
    assert!((2399..=2401).contains(&shares[&0]), "{shares:?}");
    let many = set(&(1..=50).map(|port| (port, 1, UP, 0)).collect::<Vec<_>>());
    let all_but_one = |i: usize| u32::from(i != 17);
    assert_eq!(
        counts(&balancer(&many, least(None, 1.0), 50), 20, &all_but_one),
        [(17, 20)].into()
    );
}

/// The second endpoint is new.
struct Warming(Duration);

impl Load for Warming {
    fn active(&self, _: usize) -> u32 {
        0
    }
    fn age(&self, index: usize) -> Duration {
        if index == 1 {
            self.0
        } else {
            Duration::from_secs(3600)
        }
    }
    fn warming(&self) -> bool {
        self.0 < Duration::from_secs(60)
    }
}

#[test]
fn new_endpoints_warm_up() {
    let set = set(&[(1, 1, UP, 0), (2, 1, UP, 0)]);
    let slow = |aggression| SlowStart {
        window: Duration::from_secs(60),
        aggression,
        least: 0.1,
    };
    // Age in seconds, aggression, weight of the new one beside 1.
    let cases = [
        (1, 1.0, 0.1),
        (30, 1.0, 0.5),
        (30, 2.0, 0.5_f64.sqrt()),
        (15, 0.5, 0.1),
        (60, 1.0, 1.0),
    ];
    for (age, aggression, weight) in cases {
        for policy in [
            LbPolicy::RoundRobin(Some(slow(aggression))),
            LbPolicy::LeastRequest(LeastRequest {
                choices: Some(2),
                bias: 1.0,
                slow_start: Some(slow(aggression)),
            }),
        ] {
            let load = Warming(Duration::from_secs(age));
            let found = counts(&balancer(&set, policy, 50), 10_000, &load)[&1];
            let expected = weight / (1.0 + weight);
            assert!(
                close(found, expected, 10_000),
                "{age} s, {policy:?}: {found}"
            );
        }
    }
}

#[test]
fn hashes_find_their_endpoint_again_and_few_move() {
    let endpoints: Vec<_> = (1..=10).map(|port| (port, 1, UP, 0)).collect();
    let (all, less) = (set(&endpoints), set(&endpoints[..9]));
    // Envoy's ring keeps its size, so that the points of all others change in number, too: up to twice the share of the one that left
    // moves. Maglev moves little more than that share.
    for (policy, most_moved) in [(RING, 2.0), (MAGLEV, 1.5)] {
        let (before, after) = (balancer(&all, policy, 50), balancer(&less, policy, 50));
        let mut random = chance();
        let (mut moved, mut shares) = (0, BTreeMap::<usize, usize>::new());
        for _ in 0..20_000 {
            let hash = random();
            let first = by_hash(&before, hash);
            assert_eq!(first, by_hash(&before, hash));
            *shares.entry(first).or_default() += 1;
            moved += usize::from(by_hash(&after, hash) != first);
        }
        assert!(
            moved as f64 <= 20_000.0 * most_moved / 10.0,
            "{policy:?}: {moved} moved"
        );
        let (least, most) = (shares.values().min(), shares.values().max());
        assert!(
            least > Some(&1000) && most < Some(&3000),
            "{policy:?}: {shares:?}"
        );
    }
}

#[test]
fn hashing_keeps_weights_and_takes_others_for_other_attempts() {
    let set = set(&[(1, 3, UP, 0), (2, 1, UP, 0), (3, 1, DOWN, 0)]);
    for policy in [RING, MAGLEV] {
        let balancer = balancer(&set, policy, 0);
        let mut random = chance();
        let first = (0..10_000)
            .filter(|_| by_hash(&balancer, random()) == 0)
            .count();
        assert!((7000..8000).contains(&first), "{policy:?}: {first}");
        let cursor = Cursor::default();
        let attempt = |hash, attempt| {
            let wanted = Wanted {
                hash: Some(hash),
                attempt,
                ..Wanted::default()
            };
            balancer.pick(&cursor, &wanted, || 0, &idle)
        };
        let other = (0..1000).filter(|_| {
            let hash = random();
            attempt(hash, 0) != attempt(hash, 1)
        });
        assert!(other.count() > 100, "{policy:?}");
    }
}

/// 127.0.0.1:90 to :95, the hosts of Envoy's own tests.
fn envoys_hosts() -> Arc<EndpointSet> {
    let local = |port: u16| {
        let mut one = endpoint(port, 1, UP);
        if let Some(HostIdentifier::Endpoint(e)) = &mut one.host_identifier
            && let Some(Kind::SocketAddress(s)) =
                e.address.as_mut().and_then(|a| a.address.as_mut())
        {
            s.address = "127.0.0.1".to_owned();
        }
        one
    };
    compiled(vec![LocalityLbEndpoints {
        lb_endpoints: (90..96).map(local).collect(),
        ..Default::default()
    }])
}

/// The expectations of Envoy's `maglev_lb_test.cc`, "Basic".
#[test]
fn maglev_fills_its_table_as_envoy_does() {
    let balancer = balancer(&envoys_hosts(), LbPolicy::Maglev(7), 50);
    let found: Vec<usize> = (0..14).map(|hash| by_hash(&balancer, hash)).collect();
    let table = [2, 4, 0, 1, 5, 0, 3];
    assert_eq!(found, [table, table].concat());
}

/// The expectations of Envoy's `ring_hash_lb_test.cc`, "Basic": the points and their ports.
#[test]
fn a_ring_has_its_points_where_envoys_has_them() {
    let policy = LbPolicy::RingHash {
        smallest: 12,
        largest: 8 << 20,
        function: HashFunction::Xx,
    };
    let balancer = balancer(&envoys_hosts(), policy, 50);
    let points: [(u64, usize); 12] = [
        (833_437_586_790_550_860, 94),
        (928_266_305_478_181_108, 92),
        (1_033_482_794_131_418_490, 90),
        (3_551_244_743_356_806_947, 95),
        (3_851_675_632_748_031_481, 93),
        (5_583_722_120_771_150_861, 91),
        (6_311_230_543_546_372_928, 91),
        (7_700_377_290_971_790_572, 93),
        (13_144_177_310_400_110_813, 95),
        (13_444_792_449_719_432_967, 92),
        (15_516_499_411_664_133_160, 94),
        (16_117_243_373_044_804_889, 90),
    ];
    for (i, (point, port)) in points.iter().enumerate() {
        assert_eq!(by_hash(&balancer, *point) + 90, *port, "at the point");
        let next = points[(i + 1) % points.len()].1;
        assert_eq!(by_hash(&balancer, point + 1) + 90, next, "after it");
    }
    assert_eq!(
        [by_hash(&balancer, 0), by_hash(&balancer, u64::MAX)],
        [4, 4]
    );
}

#[test]
fn unhealthy_ones_are_passed_over_unless_too_many_are() {
    let run = |endpoints: &[(u16, u32, HealthStatus, u32)], panic, n| {
        counts(&balancer(&set(endpoints), ROUND_ROBIN, panic), n, &idle)
    };
    let mostly_up = [(1, 1, UP, 0), (2, 1, DOWN, 0), (3, 1, UP, 0)];
    assert_eq!(run(&mostly_up, 50, 10), [(0, 5), (2, 5)].into());
    let mostly_down = [(1, 1, UP, 0), (2, 1, DOWN, 0), (3, 1, DOWN, 0)];
    assert_eq!(run(&mostly_down, 50, 9).len(), 3, "panic");
    assert_eq!(run(&mostly_down, 0, 9), [(0, 9)].into());
    assert!(run(&[(1, 1, DOWN, 0)], 0, 9).is_empty());
    assert!(run(&[], 50, 9).is_empty());
    for gone in [HealthStatus::Draining, HealthStatus::Timeout] {
        let one_gone = [(1, 1, gone, 0), (2, 1, UP, 0)];
        assert_eq!(run(&one_gone, 0, 4), [(1, 4)].into());
    }
    let degraded = [
        (1, 1, HealthStatus::Degraded, 0),
        (2, 1, UP, 0),
        (3, 1, UP, 0),
        (4, 1, UP, 0),
    ];
    assert!(
        !run(&degraded, 0, 100).contains_key(&0),
        "140 % of three quarters are enough"
    );
    let fail = LbConfig {
        fail_on_panic: true,
        ..LbConfig::default()
    };
    let failing = Balancer::new(set(&mostly_down), &fail, |_| false);
    assert!(counts(&failing, 9, &idle).is_empty());
}

#[test]
fn what_is_ejected_counts_as_unhealthy() {
    let set = set(&[(1, 1, UP, 0), (2, 1, UP, 0), (3, 1, UP, 0)]);
    for policy in [ROUND_ROBIN, LbPolicy::Random, LEAST, RING, MAGLEV] {
        let config = LbConfig {
            policy,
            ..LbConfig::default()
        };
        let balancer = Balancer::new(set.clone(), &config, |i| i == 1);
        assert_eq!(balancer.healthy(), 2);
        assert!(
            !counts(&balancer, 300, &idle).contains_key(&1),
            "{policy:?}"
        );
    }
}

/// Istio's locality failover: priorities by locality, outlier detection, no panic.
#[test]
fn what_is_ejected_fails_over_to_the_next_priority() {
    let endpoints = [(1, 1, UP, 0), (2, 1, UP, 0), (3, 1, UP, 1), (4, 1, UP, 2)];
    let set = set(&endpoints);
    for policy in [ROUND_ROBIN, LEAST, RING, MAGLEV] {
        let config = LbConfig {
            policy,
            panic_percent: 0,
            ..LbConfig::default()
        };
        let run = |ejected: &[usize]| {
            let balancer = Balancer::new(set.clone(), &config, |i| ejected.contains(&i));
            counts(&balancer, 1000, &idle)
                .into_keys()
                .collect::<Vec<_>>()
        };
        assert_eq!(run(&[]), [0, 1], "{policy:?}");
        assert_eq!(run(&[0]), [1, 2], "{policy:?}: 70 % of the load stays");
        assert_eq!(run(&[0, 1]), [2], "{policy:?}");
        assert_eq!(run(&[0, 1, 2]), [3], "{policy:?}");
        assert!(run(&[0, 1, 2, 3]).is_empty(), "{policy:?}");
    }
}

#[test]
fn priorities_spill_over() {
    let run = |endpoints: &[(u16, u32, HealthStatus, u32)], n| {
        counts(&balancer(&set(endpoints), ROUND_ROBIN, 0), n, &idle)
    };
    assert_eq!(run(&[(1, 1, UP, 0), (2, 1, UP, 1)], 10), [(0, 10)].into());
    assert_eq!(run(&[(1, 1, DOWN, 0), (2, 1, UP, 1)], 10), [(1, 10)].into());
    // Half of the first level is down: 70 % stay there (140 % of a half), the rest spills.
    let half = [(1, 1, UP, 0), (2, 1, DOWN, 0), (3, 1, UP, 1)];
    let spread = run(&half, 10_000);
    assert!(
        close(spread[&0], 0.7, 10_000) && !spread.contains_key(&1),
        "{spread:?}"
    );
    // Not enough anywhere: what there is is scaled up. 46 and 46 % become one half each.
    let scarce: Vec<_> = (0..6)
        .map(|i| {
            (
                i + 1,
                1,
                if i % 3 == 0 { UP } else { DOWN },
                u32::from(i > 2),
            )
        })
        .collect();
    let spread = run(&scarce, 10_000);
    assert!(
        close(spread[&0], 0.5, 10_000) && spread.len() == 2,
        "{spread:?}"
    );
    // Degraded ones take what healthy ones of all levels cannot.
    let degraded = [
        (1, 1, HealthStatus::Degraded, 0),
        (2, 1, DOWN, 0),
        (3, 1, UP, 1),
        (4, 1, DOWN, 1),
    ];
    let spread = run(&degraded, 10_000);
    assert!(
        close(spread[&2], 0.7, 10_000) && close(spread[&0], 0.3, 10_000),
        "{spread:?}"
    );
}

#[test]
fn priorities_that_were_tried_are_avoided_while_others_are_left() {
    let set = set(&[(1, 1, UP, 0), (2, 1, UP, 1)]);
    let balancer = balancer(&set, ROUND_ROBIN, 50);
    let (cursor, mut random) = (Cursor::default(), chance());
    let mut pick = |avoided_priorities: &[u32]| {
        let wanted = Wanted {
            avoided_priorities,
            ..Wanted::default()
        };
        balancer.pick(&cursor, &wanted, &mut random, &idle)
    };
    assert_eq!(
        [pick(&[]), pick(&[0]), pick(&[1]), pick(&[0, 1])],
        [0, 1, 0, 0].map(Some)
    );
}

#[test]
fn localities_share_by_weight_and_lose_with_their_endpoints() {
    let group = |zone: &str, weight: u32, endpoints: Vec<LbEndpoint>| LocalityLbEndpoints {
        locality: Some(Locality {
            zone: zone.to_owned(),
            ..Default::default()
        }),
        load_balancing_weight: Some(UInt32Value { value: weight }),
        lb_endpoints: endpoints,
        ..Default::default()
    };
    let weighted = |policy| LbConfig {
        policy,
        locality_weighted: true,
        ..LbConfig::default()
    };
    let run = |groups: Vec<LocalityLbEndpoints>, policy| {
        let balancer = Balancer::new(compiled(groups), &weighted(policy), |_| false);
        counts(&balancer, 10_000, &idle)
    };
    for policy in [ROUND_ROBIN, LbPolicy::Random, LEAST, RING, MAGLEV] {
        // Two endpoints with 80, one with 20, none where the weight is zero.
        let spread = run(
            vec![
                group("a", 80, vec![endpoint(1, 1, UP), endpoint(2, 1, UP)]),
                group("b", 20, vec![endpoint(3, 1, UP)]),
                group("c", 0, vec![endpoint(4, 1, UP)]),
            ],
            policy,
        );
        let b = spread[&2];
        assert!(
            (1750..2250).contains(&b) && !spread.contains_key(&3),
            "{policy:?}: {spread:?}"
        );
    }
    // One of two endpoints is down: 0.7 of its weight is left, 70 to 100.
    let spread = run(
        vec![
            group("a", 100, vec![endpoint(1, 1, UP), endpoint(2, 1, DOWN)]),
            group("b", 100, vec![endpoint(3, 1, UP), endpoint(4, 1, UP)]),
        ],
        ROUND_ROBIN,
    );
    assert!(close(spread[&0], 70.0 / 170.0, 10_000), "{spread:?}");
}

proptest! {
    #[test]
    fn a_usable_endpoint_is_always_found(weights in proptest::collection::vec((1_u32..100_000, any::<bool>()), 1..20), policy in 0_usize..5, random: u64) {
        let endpoints: Vec<_> = weights.iter().zip(1_u16..).map(|((w, up), port)| (port, *w, if *up { UP } else { DOWN }, 0)).collect();
        let policy = [ROUND_ROBIN, LbPolicy::Random, LEAST, RING, LbPolicy::Maglev(1009)][policy];
        let balancer = balancer(&set(&endpoints), policy, 0);
        let picked = balancer.pick(&Cursor::default(), &Wanted::default(), || random, &idle);
        prop_assert_eq!(picked.is_some(), weights.iter().any(|(_, up)| *up));
        if let Some(index) = picked {
            prop_assert!(weights[index].1, "an unhealthy endpoint was picked");
        }
    }
}
