//! Cluster messages: defaults, what they come to, what is refused.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::thresholds::RetryBudget;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, CommonLbConfig, DiscoveryType, LbConfig as PbLbConfig,
    LbPolicy as PbPolicy, LeastRequestLbConfig, MaglevLbConfig, RingHashLbConfig,
    RoundRobinLbConfig, SlowStartConfig, common_lb_config,
};
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{
    ProxyProtocolConfig, RuntimeDouble, TlvEntry, TransportSocket, TypedExtensionConfig,
};
use envoy_types::pb::envoy::extensions::load_balancing_policies as typed;
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf::{self, Any, UInt32Value, UInt64Value};
use mesh_routing::cluster::{
    Breakers, ClusterConfig, Discovery, Families, ProxyHeader, RetryLimit, Traits, Trigger,
};
use mesh_routing::lb::{HashFunction, LbPolicy, LeastRequest, SlowStart};
use prost::Message;

fn compiled(change: impl FnOnce(&mut pb::Cluster)) -> Result<ClusterConfig, String> {
    let mut m = pb::Cluster {
        name: "c".to_owned(),
        ..Default::default()
    };
    change(&mut m);
    ClusterConfig::compile(&m).map_err(|error| error.to_string())
}

fn good(change: impl FnOnce(&mut pb::Cluster)) -> ClusterConfig {
    compiled(change).expect("a good cluster")
}

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

fn large(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn seconds(seconds: i64) -> Option<protobuf::Duration> {
    Some(protobuf::Duration { seconds, nanos: 0 })
}

#[test]
fn defaults_are_envoys() {
    let config = good(|_| {});
    assert_eq!(config.breakers, Breakers::default());
    assert_eq!(
        (config.breakers.connections, config.breakers.retries),
        (1024, RetryLimit::Count(3))
    );
    assert!(config.outlier.is_none() && config.keepalive.is_none());
    assert_eq!(
        (config.lb.policy, config.lb.panic_percent),
        (LbPolicy::RoundRobin(None), 50)
    );
    assert_eq!(config.connect_timeout, Duration::from_secs(5));
    let outlier = good(|m| m.outlier_detection = Some(Default::default())).outlier;
    let outlier = outlier.expect("detection");
    let five = |enforcing| Trigger {
        count: 5,
        enforcing,
    };
    assert_eq!(
        [
            outlier.consecutive_5xx,
            outlier.consecutive_gateway_failure,
            outlier.consecutive_local_origin_failure
        ],
        [five(100), five(0), five(100)]
    );
    assert_eq!(
        (outlier.interval, outlier.base_ejection),
        (Duration::from_secs(10), Duration::from_secs(30))
    );
    assert_eq!(
        (outlier.max_ejection, outlier.max_percent),
        (Duration::from_secs(300), 10)
    );
    assert!(
        outlier.wants_rates(),
        "success rate is on in Envoy unless it is turned off"
    );
    let least = good(|m| m.lb_policy = PbPolicy::LeastRequest as i32)
        .lb
        .policy;
    assert_eq!(
        least,
        LbPolicy::LeastRequest(LeastRequest {
            choices: Some(2),
            bias: 1.0,
            slow_start: None
        })
    );
}

#[test]
fn limits_and_budgets() {
    let with = |thresholds: Vec<Thresholds>| {
        good(|m| {
            m.circuit_breakers = Some(pb::CircuitBreakers {
                thresholds,
                ..Default::default()
            });
        })
        .breakers
    };
    let high = Thresholds {
        priority: 1,
        max_connections: number(1),
        ..Default::default()
    };
    let own = Thresholds {
        max_connections: number(7),
        max_pending_requests: number(8),
        max_requests: number(9),
        max_retries: number(10),
        ..Default::default()
    };
    let found = with(vec![high, own]);
    assert_eq!(
        (found.connections, found.pending, found.requests),
        (7, 8, 9)
    );
    assert_eq!(found.retries, RetryLimit::Count(10));
    let budget = Thresholds {
        retry_budget: Some(RetryBudget::default()),
        ..Default::default()
    };
    assert_eq!(
        with(vec![budget]).retries,
        RetryLimit::Budget {
            percent: 20.0,
            least: 3,
            interval: None,
        }
    );
    let over_time = Thresholds {
        retry_budget: Some(RetryBudget {
            budget_interval: seconds(10),
            ..RetryBudget::default()
        }),
        ..Default::default()
    };
    let RetryLimit::Budget { interval, .. } = with(vec![over_time]).retries else {
        panic!("a budget");
    };
    assert_eq!(interval, Some(Duration::from_secs(10)));
}

#[test]
fn headers_of_the_proxy_protocol_stand_before_the_transport() {
    let any = |kind: &str, value: Vec<u8>| {
        ConfigType::TypedConfig(Any {
            type_url: format!("type.googleapis.com/envoy.extensions.transport_sockets.{kind}"),
            value,
        })
    };
    let raw = |value: Vec<u8>| TransportSocket {
        name: "inner".to_owned(),
        config_type: Some(any("raw_buffer.v3.RawBuffer", value)),
    };
    let announced = |m: &ProxyProtocolUpstreamTransport| {
        let kind = "proxy_protocol.v3.ProxyProtocolUpstreamTransport";
        let socket = TransportSocket {
            name: "outer".to_owned(),
            config_type: Some(any(kind, m.encode_to_vec())),
        };
        compiled(|cluster| cluster.transport_socket = Some(socket))
    };
    let config = |version: i32| ProxyProtocolConfig {
        version,
        ..ProxyProtocolConfig::default()
    };
    let whole = |config: ProxyProtocolConfig| ProxyProtocolUpstreamTransport {
        config: Some(config),
        transport_socket: Some(raw(Vec::new())),
        ..ProxyProtocolUpstreamTransport::default()
    };
    let header = |m: &ProxyProtocolUpstreamTransport| {
        let cluster = announced(m).expect("a cluster");
        cluster.transports.of(&Traits::default()).header
    };
    assert_eq!(header(&whole(config(0))), Some(ProxyHeader::V1));
    assert_eq!(header(&whole(config(1))), Some(ProxyHeader::V2));
    assert!(
        good(|_| {})
            .transports
            .of(&Traits::default())
            .header
            .is_none()
    );
    let refused = |m: &ProxyProtocolUpstreamTransport| announced(m).expect_err("refused");
    let tlvs = ProxyProtocolConfig {
        added_tlvs: vec![TlvEntry::default()],
        ..config(1)
    };
    assert!(refused(&whole(tlvs)).contains("transport_socket.added_tlvs"));
    assert!(refused(&whole(config(7))).contains("transport_socket.config.version"));
    let without = ProxyProtocolUpstreamTransport {
        transport_socket: None,
        ..whole(config(1))
    };
    assert!(refused(&without).contains("transport_socket.transport_socket"));
}

#[test]
fn policies_of_both_kinds() {
    let legacy = |policy: PbPolicy, config: Option<PbLbConfig>| {
        good(|m| {
            m.lb_policy = policy as i32;
            m.lb_config = config;
        })
        .lb
        .policy
    };
    let slow = SlowStartConfig {
        slow_start_window: seconds(30),
        aggression: Some(RuntimeDouble {
            default_value: 2.0,
            ..Default::default()
        }),
        min_weight_percent: None,
    };
    let warm = Some(SlowStart {
        window: Duration::from_secs(30),
        aggression: 2.0,
        least: 0.1,
    });
    let config = RoundRobinLbConfig {
        slow_start_config: Some(slow.clone()),
    };
    assert_eq!(
        legacy(
            PbPolicy::RoundRobin,
            Some(PbLbConfig::RoundRobinLbConfig(config))
        ),
        LbPolicy::RoundRobin(warm)
    );
    let config = LeastRequestLbConfig {
        choice_count: number(4),
        active_request_bias: Some(RuntimeDouble {
            default_value: 0.5,
            ..Default::default()
        }),
        slow_start_config: Some(slow),
    };
    let least = LeastRequest {
        choices: Some(4),
        bias: 0.5,
        slow_start: warm,
    };
    assert_eq!(
        legacy(
            PbPolicy::LeastRequest,
            Some(PbLbConfig::LeastRequestLbConfig(config))
        ),
        LbPolicy::LeastRequest(least)
    );
    let config = RingHashLbConfig {
        minimum_ring_size: large(64),
        hash_function: 1,
        maximum_ring_size: large(128),
    };
    let ring = LbPolicy::RingHash {
        smallest: 64,
        largest: 128,
        function: HashFunction::Murmur2,
    };
    assert_eq!(
        legacy(
            PbPolicy::RingHash,
            Some(PbLbConfig::RingHashLbConfig(config))
        ),
        ring
    );
    assert_eq!(legacy(PbPolicy::Maglev, None), LbPolicy::Maglev(65_537));

    let extension = |kind: &str, value: Vec<u8>| pb::load_balancing_policy::Policy {
        typed_extension_config: Some(TypedExtensionConfig {
            name: kind.to_owned(),
            typed_config: Some(Any {
                type_url: format!(
                    "type.googleapis.com/envoy.extensions.load_balancing_policies.{kind}"
                ),
                value,
            }),
        }),
    };
    let by_extension = |policies| {
        compiled(|m| m.load_balancing_policy = Some(pb::LoadBalancingPolicy { policies }))
    };
    let weighted = typed::common::v3::LocalityLbConfig {
        locality_config_specifier: Some(typed::common::v3::locality_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(Default::default())),
    };
    let round_robin = typed::round_robin::v3::RoundRobin {
        locality_lb_config: Some(weighted),
        ..Default::default()
    };
    let unknown = || extension("pick_first.v3.PickFirst", Vec::new());
    let found = by_extension(vec![
        unknown(),
        extension("round_robin.v3.RoundRobin", round_robin.encode_to_vec()),
    ]);
    let found = found.expect("the first known one").lb;
    assert_eq!(
        (found.policy, found.locality_weighted),
        (LbPolicy::RoundRobin(None), true)
    );
    let maglev = typed::maglev::v3::Maglev {
        table_size: large(1009),
        ..Default::default()
    };
    let found = by_extension(vec![extension("maglev.v3.Maglev", maglev.encode_to_vec())]);
    assert_eq!(found.expect("Maglev").lb.policy, LbPolicy::Maglev(1009));
    assert!(
        by_extension(vec![unknown()])
            .expect_err("unknown")
            .contains("pick_first")
    );
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    type Change = fn(&mut pb::Cluster);
    let cases: [(Change, &str); 9] = [
        (
            |m| {
                m.lb_policy = PbPolicy::Maglev as i32;
                m.lb_config = Some(PbLbConfig::MaglevLbConfig(MaglevLbConfig {
                    table_size: large(65_536),
                }));
            },
            "maglev_lb_config.table_size: 65536 is not a prime",
        ),
        (
            |m| {
                m.lb_policy = PbPolicy::RingHash as i32;
                m.lb_config = Some(PbLbConfig::RingHashLbConfig(RingHashLbConfig {
                    minimum_ring_size: large(10),
                    maximum_ring_size: large(5),
                    ..Default::default()
                }));
            },
            "minimum_ring_size",
        ),
        (
            |m| {
                m.common_lb_config = Some(CommonLbConfig {
                    consistent_hashing_lb_config: Some(
                        common_lb_config::ConsistentHashingLbConfig {
                            hash_balance_factor: number(120),
                            ..Default::default()
                        },
                    ),
                    ..Default::default()
                })
            },
            "hash_balance_factor",
        ),
        (
            |m| m.health_checks = vec![Default::default()],
            "health_checks",
        ),
        (
            |m| m.close_connections_on_host_health_failure = true,
            "close_connections_on_host_health_failure",
        ),
        (
            |m| {
                m.outlier_detection = Some(pb::OutlierDetection {
                    interval: seconds(-1),
                    ..Default::default()
                })
            },
            "outlier_detection.interval",
        ),
        (
            |m| {
                m.circuit_breakers = Some(pb::CircuitBreakers {
                    per_host_thresholds: vec![Default::default()],
                    ..Default::default()
                })
            },
            "per_host_thresholds",
        ),
        (
            |m| {
                m.cluster_discovery_type =
                    Some(ClusterDiscoveryType::Type(DiscoveryType::StrictDns as i32))
            },
            "load_assignment: is missing",
        ),
        (
            |m| {
                m.cluster_discovery_type =
                    Some(ClusterDiscoveryType::Type(DiscoveryType::StrictDns as i32));
                m.dns_resolvers = vec![Default::default()];
            },
            "dns_resolvers",
        ),
    ];
    for (change, expected) in cases {
        let error = compiled(change).expect_err(expected);
        assert!(
            error.contains(expected),
            "{error:?} should name {expected:?}"
        );
    }
    let rounded = good(|m| {
        m.common_lb_config = Some(CommonLbConfig {
            healthy_panic_threshold: Some(Percent { value: 33.6 }),
            ..Default::default()
        })
    });
    assert_eq!(rounded.lb.panic_percent, 34);
}

#[test]
fn names_become_endpoints_once_they_are_looked_up() {
    use envoy_types::pb::envoy::config::core::v3::address::Address as Kind;
    use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
    use envoy_types::pb::envoy::config::core::v3::{Address, SocketAddress};
    use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
    use envoy_types::pb::envoy::config::endpoint::v3::{
        ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
    };
    let endpoint = |host: &str| LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(Address {
                address: Some(Kind::SocketAddress(SocketAddress {
                    address: host.to_owned(),
                    port_specifier: Some(PortSpecifier::PortValue(80)),
                    ..Default::default()
                })),
            }),
            ..Default::default()
        })),
        ..Default::default()
    };
    let config = good(|m| {
        m.cluster_discovery_type =
            Some(ClusterDiscoveryType::Type(DiscoveryType::StrictDns as i32));
        m.dns_lookup_family = pb::cluster::DnsLookupFamily::V4Only as i32;
        m.dns_refresh_rate = seconds(60);
        m.load_assignment = Some(ClusterLoadAssignment {
            endpoints: vec![LocalityLbEndpoints {
                lb_endpoints: ["a.test", "b.test", "10.0.0.9", "a.test"]
                    .map(endpoint)
                    .into(),
                ..Default::default()
            }],
            ..Default::default()
        });
    });
    let Discovery::Dns(dns) = &config.discovery else {
        panic!("{:?}", config.discovery);
    };
    assert_eq!(
        (dns.families, dns.refresh),
        (Families::V4, Duration::from_secs(60))
    );
    assert_eq!(dns.endpoints.names(), ["a.test", "b.test"]);
    let answers = |name: &str| match name {
        "a.test" => vec![
            "10.0.0.1".parse().expect("an address"),
            "10.0.0.2".parse().expect("an address"),
        ],
        _ => Vec::new(),
    };
    let found = |first_only| {
        let set = dns.endpoints.resolve(answers, first_only);
        let one = |e: &mesh_routing::endpoint::Endpoint| format!("{} {}", e.hostname, e.address);
        set.endpoints().iter().map(one).collect::<Vec<_>>()
    };
    assert_eq!(
        found(false),
        ["a.test 10.0.0.1:80", "a.test 10.0.0.2:80", " 10.0.0.9:80"]
    );
    assert_eq!(found(true), ["a.test 10.0.0.1:80", " 10.0.0.9:80"]);
}
