//! What a DestinationRule and the mesh's defaults make of a cluster, as Istio's pilot does it
//! (pilot/pkg/networking/core/cluster_traffic_policy.go).

use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::thresholds::RetryBudget;
use envoy_types::pb::envoy::config::cluster::v3::cluster::common_lb_config::{
    LocalityConfigSpecifier, LocalityWeightedLbConfig,
};
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    LbConfig, LbPolicy, LeastRequestLbConfig, MaglevLbConfig, RingHashLbConfig, RoundRobinLbConfig,
    SlowStartConfig,
};
use envoy_types::pb::envoy::config::cluster::v3::{
    CircuitBreakers, Cluster, OutlierDetection, UpstreamConnectionOptions,
};
use envoy_types::pb::envoy::config::core::v3::{
    Http1ProtocolOptions, Http2ProtocolOptions, KeepaliveSettings, RuntimeDouble, TcpKeepalive,
};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::{
    ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
};
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf::UInt64Value;
use mesh_api::Duration;
use mesh_api::networking::destination_rule::{
    self as api, ConsistentHashLb, H2UpgradePolicy, LocalityLbSetting, SimpleLb, TcpSettings,
};
use mesh_model::{DestinationRule, Mesh, Protocol};

use crate::pb::{duration, uint32};

/// No limit: Istio's default of all circuit breakers.
const NO_LIMIT: u32 = u32::MAX;
/// Least size of a hash ring where the rule names none.
const RING_SIZE: u64 = 1024;
/// Share of traffic with which a new endpoint begins, in percent.
const WARMUP_START: f64 = 10.0;
/// Envoy insists on a runtime key beside the value; nobody sets it.
const AGGRESSION_KEY: &str = "mesh.slow_start.aggression";
/// Retries allowed at a time, in percent of active requests and at least, where a budget leaves them out.
const RETRY_PERCENT: f64 = 20.0;
const RETRY_CONCURRENCY: u32 = 3;

/// What holds for one cluster: the rule's policy with the mesh's defaults.
pub(crate) struct Policy<'a> {
    pub(super) rule: mesh_model::Policy<'a>,
    mesh: &'a Mesh,
}

impl<'a> Policy<'a> {
    /// The policy for a subset (empty for the whole host) and port.
    pub(crate) fn new(
        mesh: &'a Mesh,
        rule: Option<&'a DestinationRule>,
        subset: &str,
        port: u16,
    ) -> Self {
        let mut policy = rule
            .map(|rule| rule.policy(subset, port))
            .unwrap_or_default();
        let defaults = &mesh.config().default_traffic_policy;
        policy.connection_pool = policy.connection_pool.or(defaults.connection_pool.as_ref());
        policy.outlier_detection = policy
            .outlier_detection
            .or(defaults.outlier_detection.as_ref());
        Self { rule: policy, mesh }
    }

    /// True if connections go where the client wanted them to, whatever the endpoints.
    pub(super) fn passes_through(&self) -> bool {
        self.simple() == SimpleLb::Passthrough
    }

    pub(super) fn consistent_hash(&self) -> Option<&'a ConsistentHashLb> {
        self.rule
            .load_balancer
            .and_then(|settings| settings.consistent_hash.as_ref())
    }

    pub(super) fn tcp(&self) -> Option<&'a TcpSettings> {
        self.rule.connection_pool.and_then(|pool| pool.tcp.as_ref())
    }

    /// How localities are preferred; `None` where the rule, or without one the mesh, turns it off.
    pub(crate) fn locality(&self) -> Option<&'a LocalityLbSetting> {
        let of_rule = self
            .rule
            .load_balancer
            .and_then(|settings| settings.locality_lb_setting.as_ref());
        of_rule
            .or(self.mesh.config().locality_lb_setting.as_ref())
            .filter(|setting| setting.enabled != Some(false))
    }

    /// Endpoints of lower priority are used only if those of higher priority are found to fail, which takes outlier detection.
    pub(crate) fn fails_over(&self) -> bool {
        self.rule.outlier_detection.is_some()
    }

    fn simple(&self) -> SimpleLb {
        self.rule
            .load_balancer
            .and_then(|settings| settings.simple)
            .unwrap_or_default()
    }

    /// Circuit breakers, timeouts and keep-alive; `options` are the cluster's HTTP options, made where something needs them.
    pub(super) fn apply_pool(
        &self,
        cluster: &mut Cluster,
        options: &mut Option<HttpProtocolOptions>,
    ) {
        let mut limits = unlimited();
        let http = self
            .rule
            .connection_pool
            .and_then(|pool| pool.http.as_ref());
        let tcp = self.tcp();
        if let Some(http) = http {
            set_limit(&mut limits.max_requests, http.http2_max_requests);
            set_limit(
                &mut limits.max_pending_requests,
                http.http1_max_pending_requests,
            );
            set_limit(&mut limits.max_retries, http.max_retries);
        }
        if let Some(tcp) = tcp {
            set_limit(&mut limits.max_connections, tcp.max_connections);
            if let Some(limit) = tcp.connect_timeout {
                cluster.connect_timeout = duration(limit.0);
            }
        }
        limits.retry_budget = self.rule.retry_budget.map(retry_budget);
        cluster.circuit_breakers = Some(breakers(limits));
        cluster.upstream_connection_options = keepalive(
            self.mesh.config().tcp_keepalive.as_ref(),
            tcp.and_then(|tcp| tcp.tcp_keepalive.as_ref()),
        );
        let idle = http
            .and_then(|http| http.idle_timeout)
            .or(tcp.and_then(|tcp| tcp.idle_timeout));
        let longest = tcp.and_then(|tcp| tcp.max_connection_duration);
        let requests = http.map_or(0, |http| positive(http.max_requests_per_connection));
        if idle.is_some() || longest.is_some() || requests > 0 {
            let options = options.get_or_insert_default();
            let common = options.common_http_protocol_options.get_or_insert_default();
            common.idle_timeout = idle.and_then(|limit| duration(limit.0));
            common.max_connection_duration = longest.and_then(|limit| duration(limit.0));
            if requests > 0 {
                common.max_requests_per_connection = uint32(requests);
            }
        }
        if http.is_some_and(|http| http.use_client_protocol) {
            options.get_or_insert_default().upstream_protocol_options = Some(as_client());
        }
        self.apply_http2(options);
    }

    /// What holds for HTTP/2 connections, where there are any.
    fn apply_http2(&self, options: &mut Option<HttpProtocolOptions>) {
        let http = self
            .rule
            .connection_pool
            .and_then(|pool| pool.http.as_ref());
        let (Some(http), Some(options)) = (http, options) else {
            return;
        };
        let http2 = match &mut options.upstream_protocol_options {
            Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => {
                match &mut explicit.protocol_config {
                    Some(ProtocolConfig::Http2ProtocolOptions(http2)) => http2,
                    _ => return,
                }
            }
            Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(as_client)) => {
                as_client.http2_protocol_options.get_or_insert_default()
            }
            _ => return,
        };
        let streams = positive(http.max_concurrent_streams);
        if streams > 0 {
            http2.max_concurrent_streams = uint32(streams);
        }
        http2.connection_keepalive =
            http.http2_keep_alive
                .as_ref()
                .map(|given| KeepaliveSettings {
                    interval: given.interval.and_then(|time| duration(time.0)),
                    timeout: given.timeout.and_then(|time| duration(time.0)),
                    ..KeepaliveSettings::default()
                });
    }

    /// Sends HTTP/1.1 as HTTP/2 where the rule says so, or the mesh for ports that are declared HTTP.
    pub(super) fn apply_upgrade(
        &self,
        options: &mut Option<HttpProtocolOptions>,
        protocol: Protocol,
    ) {
        let http = self
            .rule
            .connection_pool
            .and_then(|pool| pool.http.as_ref());
        if http.is_some_and(|http| http.use_client_protocol) {
            return;
        }
        let upgrade = match http.map(|http| http.h2_upgrade_policy).unwrap_or_default() {
            H2UpgradePolicy::Upgrade => true,
            H2UpgradePolicy::DoNotUpgrade => false,
            H2UpgradePolicy::Default => {
                protocol.is_http()
                    && self.mesh.config().h2_upgrade_policy == H2UpgradePolicy::Upgrade
            }
        };
        if upgrade && !protocol.is_http2() {
            let http2 = ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default());
            options.get_or_insert_default().upstream_protocol_options = Some(
                UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
                    protocol_config: Some(http2),
                }),
            );
            self.apply_http2(options);
        }
    }

    /// Envoy's success-rate detection, which is on by default, is always off with Istio.
    pub(super) fn apply_outlier_detection(&self, cluster: &mut Cluster) {
        let Some(given) = self.rule.outlier_detection else {
            return;
        };
        // consecutiveErrors is the older form, which the newer one beats.
        let older = Some(positive(given.consecutive_errors)).filter(|count| *count > 0);
        let gateway_errors = given.consecutive_gateway_errors.or(older);
        let enforcing =
            |count: Option<u32>| count.and_then(|v| uint32(if v > 0 { 100u32 } else { 0 }));
        let mut detection = OutlierDetection {
            enforcing_success_rate: uint32(0u32),
            consecutive_5xx: given.consecutive_5xx_errors.and_then(uint32),
            enforcing_consecutive_5xx: enforcing(given.consecutive_5xx_errors),
            consecutive_gateway_failure: gateway_errors.and_then(uint32),
            enforcing_consecutive_gateway_failure: enforcing(gateway_errors),
            interval: given.interval.and_then(|time| duration(time.0)),
            base_ejection_time: given.base_ejection_time.and_then(|time| duration(time.0)),
            ..OutlierDetection::default()
        };
        set_limit(
            &mut detection.max_ejection_percent,
            given.max_ejection_percent,
        );
        if given.split_external_local_origin_errors {
            detection.split_external_local_origin_errors = true;
            detection.enforcing_local_origin_success_rate = uint32(0u32);
            let failures = given.consecutive_local_origin_failures.filter(|v| *v > 0);
            detection.consecutive_local_origin_failure = failures.and_then(uint32);
            detection.enforcing_consecutive_local_origin_failure = enforcing(failures);
        }
        cluster.outlier_detection = Some(detection);
        // 0, the default, turns Envoy's panic mode off, which is of no use with the few pods of a service.
        if given.min_health_percent >= 0 {
            cluster
                .common_lb_config
                .get_or_insert_default()
                .healthy_panic_threshold = Some(Percent {
                value: f64::from(given.min_health_percent),
            });
        }
    }

    /// The balancer of a cluster with endpoints.
    pub(super) fn apply_load_balancer(&self, cluster: &mut Cluster) {
        if self.weighs_localities() {
            cluster
                .common_lb_config
                .get_or_insert_default()
                .locality_config_specifier = Some(
                LocalityConfigSpecifier::LocalityWeightedLbConfig(LocalityWeightedLbConfig {}),
            );
        }
        if let Some(hash) = self.consistent_hash() {
            apply_hash(cluster, hash);
            return;
        }
        let slow_start_config = self.rule.load_balancer.and_then(slow_start);
        match self.simple() {
            SimpleLb::Random => cluster.lb_policy = LbPolicy::Random as i32,
            SimpleLb::RoundRobin => {
                cluster.lb_policy = LbPolicy::RoundRobin as i32;
                cluster.lb_config = slow_start_config.map(|config| {
                    LbConfig::RoundRobinLbConfig(RoundRobinLbConfig {
                        slow_start_config: Some(config),
                    })
                });
            }
            _ => {
                cluster.lb_policy = LbPolicy::LeastRequest as i32;
                cluster.lb_config = slow_start_config.map(|config| {
                    LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
                        slow_start_config: Some(config),
                        ..LeastRequestLbConfig::default()
                    })
                });
            }
        }
    }

    /// Weights of localities count only where someone asked for them: they would disturb the balancer.
    fn weighs_localities(&self) -> bool {
        self.locality().is_some_and(|setting| {
            let failover = !setting.failover.is_empty() || !setting.failover_priority.is_empty();
            !setting.distribute.is_empty() || (self.fails_over() && failover)
        })
    }
}

/// Circuit breakers for requests of normal priority; Istio sets no others.
pub(super) fn breakers(limits: Thresholds) -> CircuitBreakers {
    CircuitBreakers {
        thresholds: vec![limits],
        ..CircuitBreakers::default()
    }
}

pub(super) fn unlimited() -> Thresholds {
    Thresholds {
        max_connections: uint32(NO_LIMIT),
        max_pending_requests: uint32(NO_LIMIT),
        max_requests: uint32(NO_LIMIT),
        max_retries: uint32(NO_LIMIT),
        ..Thresholds::default()
    }
}

/// 0 is "not given" in all of Istio's numbers.
fn positive(value: i32) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

fn set_limit(limit: &mut Option<envoy_types::pb::google::protobuf::UInt32Value>, value: i32) {
    if value > 0 {
        *limit = uint32(positive(value));
    }
}

fn retry_budget(given: &api::RetryBudget) -> RetryBudget {
    RetryBudget {
        budget_percent: Some(Percent {
            value: given.percent.unwrap_or(RETRY_PERCENT),
        }),
        min_retry_concurrency: uint32(match given.min_retry_concurrency {
            0 => RETRY_CONCURRENCY,
            least => least,
        }),
        budget_interval: given.budget_interval.and_then(|time| duration(time.0)),
    }
}

/// The mesh's keep-alive with the rule's values over it.
fn keepalive(
    of_mesh: Option<&api::TcpKeepalive>,
    of_rule: Option<&api::TcpKeepalive>,
) -> Option<UpstreamConnectionOptions> {
    if of_mesh.is_none() && of_rule.is_none() {
        return None;
    }
    let mut keepalive = TcpKeepalive::default();
    for given in [of_mesh, of_rule].into_iter().flatten() {
        if given.probes > 0 {
            keepalive.keepalive_probes = uint32(given.probes);
        }
        let seconds = |time: Duration| u32::try_from(time.0.as_secs()).unwrap_or(u32::MAX);
        if let Some(time) = given.time {
            keepalive.keepalive_time = uint32(seconds(time));
        }
        if let Some(interval) = given.interval {
            keepalive.keepalive_interval = uint32(seconds(interval));
        }
    }
    Some(UpstreamConnectionOptions {
        tcp_keepalive: Some(keepalive),
        ..UpstreamConnectionOptions::default()
    })
}

fn as_client() -> UpstreamProtocolOptions {
    UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
        http_protocol_options: Some(Http1ProtocolOptions::default()),
        http2_protocol_options: Some(Http2ProtocolOptions::default()),
        ..UseDownstreamHttpConfig::default()
    })
}

fn slow_start(settings: &api::LoadBalancerSettings) -> Option<SlowStartConfig> {
    if let Some(warmup) = &settings.warmup {
        return Some(SlowStartConfig {
            slow_start_window: warmup.duration.and_then(|time| duration(time.0)),
            aggression: Some(RuntimeDouble {
                default_value: warmup.aggression.unwrap_or(1.0),
                runtime_key: AGGRESSION_KEY.to_owned(),
            }),
            min_weight_percent: Some(Percent {
                value: warmup.minimum_percent.unwrap_or(WARMUP_START),
            }),
        });
    }
    let time = settings.warmup_duration_secs?;
    Some(SlowStartConfig {
        slow_start_window: duration(time.0),
        ..SlowStartConfig::default()
    })
}

fn apply_hash(cluster: &mut Cluster, hash: &ConsistentHashLb) {
    let number = |value: u64| Some(UInt64Value { value });
    if let Some(maglev) = &hash.maglev {
        cluster.lb_policy = LbPolicy::Maglev as i32;
        cluster.lb_config = (maglev.table_size != 0).then(|| {
            LbConfig::MaglevLbConfig(MaglevLbConfig {
                table_size: number(maglev.table_size),
            })
        });
        return;
    }
    cluster.lb_policy = LbPolicy::RingHash as i32;
    let least = match &hash.ring_hash {
        Some(ring) => ring.minimum_ring_size,
        None if hash.minimum_ring_size == 0 => RING_SIZE,
        None => hash.minimum_ring_size,
    };
    cluster.lb_config = (least != 0).then(|| {
        LbConfig::RingHashLbConfig(RingHashLbConfig {
            minimum_ring_size: number(least),
            ..RingHashLbConfig::default()
        })
    });
}
