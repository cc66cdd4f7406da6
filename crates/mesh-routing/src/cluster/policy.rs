//! The load balancing of a cluster: `lb_policy` with `lb_config`, or the typed extensions of `load_balancing_policy`.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::common_lb_config::LocalityConfigSpecifier;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    CommonLbConfig, LbConfig as PbConfig, LbPolicy as PbPolicy, SlowStartConfig,
};
use envoy_types::pb::envoy::extensions::load_balancing_policies as typed;
use envoy_types::pb::google::protobuf::{Any, UInt32Value, UInt64Value};
use prost::Message;

use crate::error::{CompileError, Result, Within, duration, every_field};
use crate::lb::{HashFunction, LbConfig, LbPolicy, LeastRequest, SlowStart};

/// Envoy's largest ring and largest Maglev table.
const MOST_POINTS: u64 = 8 * 1024 * 1024;
const MOST_SLOTS: u64 = 5_000_011;
const DEFAULT_POINTS: u64 = 1024;
const DEFAULT_SLOTS: u64 = 65_537;
const TYPED: &str = "type.googleapis.com/envoy.extensions.load_balancing_policies.";

/// Compiles what the cluster says about it.
pub(crate) fn compile(m: &pb::Cluster) -> Result<LbConfig> {
    let mut config = LbConfig::default();
    if let Some(common) = &m.common_lb_config {
        compile_common(common, &mut config).within("common_lb_config")?;
    }
    if let Some(policy) = &m.load_balancing_policy {
        compile_typed(policy, &mut config).within("load_balancing_policy")?;
        return Ok(config);
    }
    config.policy = match PbPolicy::try_from(m.lb_policy) {
        Ok(PbPolicy::RoundRobin) => LbPolicy::RoundRobin(match &m.lb_config {
            Some(PbConfig::RoundRobinLbConfig(c)) => {
                slow_start(c.slow_start_config.as_ref()).within("round_robin_lb_config")?
            }
            _ => None,
        }),
        Ok(PbPolicy::LeastRequest) => match &m.lb_config {
            Some(PbConfig::LeastRequestLbConfig(c)) => LbPolicy::LeastRequest(
                least_request(
                    c.choice_count,
                    c.active_request_bias.as_ref().map(|b| b.default_value),
                    slow_start(c.slow_start_config.as_ref())?,
                )
                .within("least_request_lb_config")?,
            ),
            _ => LbPolicy::LeastRequest(least_request(None, None, None)?),
        },
        // CLUSTER_PROVIDED: of an ORIGINAL_DST cluster, where there is nothing to choose.
        Ok(PbPolicy::Random | PbPolicy::ClusterProvided) => LbPolicy::Random,
        Ok(PbPolicy::RingHash) => match &m.lb_config {
            Some(PbConfig::RingHashLbConfig(c)) => {
                // XX_HASH is 0 here, MURMUR_HASH_2 is 1.
                let function = match c.hash_function {
                    1 => HashFunction::Murmur2,
                    _ => HashFunction::Xx,
                };
                ring(c.minimum_ring_size, c.maximum_ring_size, function)
                    .within("ring_hash_lb_config")?
            }
            _ => ring(None, None, HashFunction::Xx)?,
        },
        Ok(PbPolicy::Maglev) => match &m.lb_config {
            Some(PbConfig::MaglevLbConfig(c)) => maglev(c.table_size).within("maglev_lb_config")?,
            _ => maglev(None)?,
        },
        Ok(PbPolicy::LoadBalancingPolicyConfig) => {
            return Err(CompileError::new("load_balancing_policy", "is missing"));
        }
        Err(_) => return Err(CompileError::new("lb_policy", "is unknown")),
    };
    Ok(config)
}

fn compile_common(m: &CommonLbConfig, config: &mut LbConfig) -> Result<()> {
    every_field!(m, CommonLbConfig,
        used { healthy_panic_threshold, locality_config_specifier, consistent_hashing_lb_config }
        // Updates are merged by the publisher; the rest concerns active health checks, which are refused.
        irrelevant { update_merge_window, ignore_new_hosts_until_first_hc }
        refused { override_host_status, close_connections_on_host_set_change });
    if let Some(threshold) = &m.healthy_panic_threshold {
        // Envoy rounds it.
        config.panic_percent = threshold.value.clamp(0.0, 100.0).round() as u32;
    }
    match &m.locality_config_specifier {
        Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => {
            config.locality_weighted = true;
        }
        // Zone aware routing needs a local cluster in the bootstrap, which this proxy does not have; Envoy does nothing then either.
        Some(LocalityConfigSpecifier::ZoneAwareLbConfig(zone)) => {
            config.fail_on_panic = zone.fail_traffic_on_panic;
        }
        None => {}
    }
    if let Some(hashing) = &m.consistent_hashing_lb_config {
        if hashing.hash_balance_factor.is_some_and(|f| f.value > 0) {
            return Err(CompileError::unsupported(
                "consistent_hashing_lb_config.hash_balance_factor",
            ));
        }
        config.hash_hostnames = hashing.use_hostname_for_hashing;
    }
    Ok(())
}

/// The first policy that is known, as in Envoy.
fn compile_typed(m: &pb::LoadBalancingPolicy, config: &mut LbConfig) -> Result<()> {
    let mut unknown = Vec::new();
    for policy in &m.policies {
        let Some(any) = policy
            .typed_extension_config
            .as_ref()
            .and_then(|c| c.typed_config.as_ref())
        else {
            continue;
        };
        let Some(kind) = any.type_url.strip_prefix(TYPED) else {
            unknown.push(any.type_url.clone());
            continue;
        };
        match kind {
            "round_robin.v3.RoundRobin" => typed_round_robin(any, config),
            "least_request.v3.LeastRequest" => typed_least_request(any, config),
            "random.v3.Random" => typed_random(any, config),
            "ring_hash.v3.RingHash" => typed_ring(any, config),
            "maglev.v3.Maglev" => typed_maglev(any, config),
            "cluster_provided.v3.ClusterProvided" => {
                config.policy = LbPolicy::Random;
                Ok(())
            }
            other => {
                unknown.push(other.to_owned());
                continue;
            }
        }
        .within(kind)?;
        return Ok(());
    }
    Err(CompileError::new(
        "policies",
        format!("none is implemented: {}", unknown.join(", ")),
    ))
}

fn decode<M: Message + Default>(any: &Any) -> Result<M> {
    M::decode(any.value.as_slice()).map_err(|error| CompileError::new("value", error.to_string()))
}

fn typed_round_robin(any: &Any, config: &mut LbConfig) -> Result<()> {
    let m: typed::round_robin::v3::RoundRobin = decode(any)?;
    every_field!(&m, typed::round_robin::v3::RoundRobin, used { slow_start_config, locality_lb_config } irrelevant {} refused {});
    typed_locality(m.locality_lb_config.as_ref(), config);
    config.policy = LbPolicy::RoundRobin(typed_slow_start(m.slow_start_config.as_ref())?);
    Ok(())
}

fn typed_least_request(any: &Any, config: &mut LbConfig) -> Result<()> {
    use typed::least_request::v3::LeastRequest as Pb;
    let m: Pb = decode(any)?;
    every_field!(&m, Pb,
        used { choice_count, active_request_bias, slow_start_config, locality_lb_config, enable_full_scan, selection_method }
        irrelevant {} refused {});
    typed_locality(m.locality_lb_config.as_ref(), config);
    let bias = m.active_request_bias.as_ref().map(|b| b.default_value);
    let mut least = least_request(
        m.choice_count,
        bias,
        typed_slow_start(m.slow_start_config.as_ref())?,
    )?;
    if m.selection_method == 1 || m.enable_full_scan.is_some_and(|scan| scan.value) {
        least.choices = None;
    }
    config.policy = LbPolicy::LeastRequest(least);
    Ok(())
}

fn typed_random(any: &Any, config: &mut LbConfig) -> Result<()> {
    let m: typed::random::v3::Random = decode(any)?;
    every_field!(&m, typed::random::v3::Random, used { locality_lb_config } irrelevant {} refused {});
    typed_locality(m.locality_lb_config.as_ref(), config);
    config.policy = LbPolicy::Random;
    Ok(())
}

fn typed_ring(any: &Any, config: &mut LbConfig) -> Result<()> {
    use typed::ring_hash::v3::RingHash as Pb;
    let m: Pb = decode(any)?;
    every_field!(&m, Pb,
        used {
            hash_function, minimum_ring_size, maximum_ring_size, use_hostname_for_hashing, hash_balance_factor,
            consistent_hashing_lb_config, locality_weighted_lb_config,
        }
        irrelevant {} refused {});
    typed_hashing(
        m.consistent_hashing_lb_config.as_ref(),
        m.hash_balance_factor,
        config,
    )?;
    config.hash_hostnames |= m.use_hostname_for_hashing;
    config.locality_weighted = m.locality_weighted_lb_config.is_some();
    // DEFAULT_HASH 0 and XX_HASH 1 are the same.
    let function = match m.hash_function {
        2 => HashFunction::Murmur2,
        _ => HashFunction::Xx,
    };
    config.policy = ring(m.minimum_ring_size, m.maximum_ring_size, function)?;
    Ok(())
}

fn typed_maglev(any: &Any, config: &mut LbConfig) -> Result<()> {
    use typed::maglev::v3::Maglev as Pb;
    let m: Pb = decode(any)?;
    every_field!(&m, Pb, used { table_size, consistent_hashing_lb_config, locality_weighted_lb_config } irrelevant {} refused {});
    typed_hashing(m.consistent_hashing_lb_config.as_ref(), None, config)?;
    config.locality_weighted = m.locality_weighted_lb_config.is_some();
    config.policy = maglev(m.table_size)?;
    Ok(())
}

fn typed_hashing(
    m: Option<&typed::common::v3::ConsistentHashingLbConfig>,
    balance: Option<UInt32Value>,
    config: &mut LbConfig,
) -> Result<()> {
    let balance = m.and_then(|m| m.hash_balance_factor).or(balance);
    if balance.is_some_and(|factor| factor.value > 0) {
        return Err(CompileError::unsupported("hash_balance_factor"));
    }
    if m.is_some_and(|m| !m.hash_policy.is_empty()) {
        return Err(CompileError::unsupported(
            "consistent_hashing_lb_config.hash_policy",
        ));
    }
    config.hash_hostnames = m.is_some_and(|m| m.use_hostname_for_hashing);
    Ok(())
}

fn typed_locality(m: Option<&typed::common::v3::LocalityLbConfig>, config: &mut LbConfig) {
    use typed::common::v3::locality_lb_config::LocalityConfigSpecifier as Specifier;
    match m.and_then(|m| m.locality_config_specifier.as_ref()) {
        Some(Specifier::LocalityWeightedLbConfig(_)) => config.locality_weighted = true,
        Some(Specifier::ZoneAwareLbConfig(zone)) => {
            config.locality_weighted = false;
            config.fail_on_panic = zone.fail_traffic_on_panic;
        }
        None => config.locality_weighted = false,
    }
}

fn least_request(
    choices: Option<UInt32Value>,
    bias: Option<f64>,
    slow_start: Option<SlowStart>,
) -> Result<LeastRequest> {
    let bias = bias.unwrap_or(1.0);
    if !(bias >= 0.0 && bias.is_finite()) {
        let reason = format!("{bias} is not a number of zero or more");
        return Err(CompileError::new("active_request_bias", reason));
    }
    Ok(LeastRequest {
        choices: Some(choices.map_or(2, |n| n.value.max(2))),
        bias,
        slow_start,
    })
}

fn ring(
    smallest: Option<UInt64Value>,
    largest: Option<UInt64Value>,
    function: HashFunction,
) -> Result<LbPolicy> {
    let smallest = smallest.map_or(DEFAULT_POINTS, |v| v.value);
    let largest = largest.map_or(MOST_POINTS, |v| v.value);
    if smallest > largest || largest > MOST_POINTS {
        let reason = format!(
            "{smallest} to {largest} points: the first must not be above the second, nor this above {MOST_POINTS}"
        );
        return Err(CompileError::new("minimum_ring_size", reason));
    }
    Ok(LbPolicy::RingHash {
        smallest: smallest.max(1),
        largest: largest.max(1),
        function,
    })
}

fn maglev(size: Option<UInt64Value>) -> Result<LbPolicy> {
    let size = size.map_or(DEFAULT_SLOTS, |v| v.value);
    let is_prime = size >= 2
        && (2..)
            .take_while(|d| d * d <= size)
            .all(|d| !size.is_multiple_of(d));
    if size > MOST_SLOTS || !is_prime {
        let reason = format!("{size} is not a prime number up to {MOST_SLOTS}");
        return Err(CompileError::new("table_size", reason));
    }
    Ok(LbPolicy::Maglev(size))
}

fn slow_start(m: Option<&SlowStartConfig>) -> Result<Option<SlowStart>> {
    let Some(m) = m else { return Ok(None) };
    every_field!(m, SlowStartConfig, used { slow_start_window, aggression, min_weight_percent } irrelevant {} refused {});
    warm_up(
        duration("slow_start_window", m.slow_start_window.as_ref())?,
        m.aggression.as_ref().map(|a| a.default_value),
        m.min_weight_percent.as_ref().map(|p| p.value),
    )
}

fn typed_slow_start(m: Option<&typed::common::v3::SlowStartConfig>) -> Result<Option<SlowStart>> {
    let Some(m) = m else { return Ok(None) };
    every_field!(m, typed::common::v3::SlowStartConfig,
        used { slow_start_window, aggression, min_weight_percent } irrelevant {} refused {});
    warm_up(
        duration("slow_start_window", m.slow_start_window.as_ref())?,
        m.aggression.as_ref().map(|a| a.default_value),
        m.min_weight_percent.as_ref().map(|p| p.value),
    )
}

/// Envoy's defaults: aggression 1, 10 % at least.
fn warm_up(
    window: Option<Duration>,
    aggression: Option<f64>,
    least: Option<f64>,
) -> Result<Option<SlowStart>> {
    let aggression = aggression.unwrap_or(1.0);
    if !(aggression > 0.0 && aggression.is_finite()) {
        let reason = format!("{aggression} is not a number above zero");
        return Err(CompileError::new("slow_start_config.aggression", reason));
    }
    Ok(window.filter(|w| !w.is_zero()).map(|window| SlowStart {
        window,
        aggression,
        least: least.unwrap_or(10.0).clamp(0.0, 100.0) / 100.0,
    }))
}
