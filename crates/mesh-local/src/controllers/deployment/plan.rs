//! The arithmetic of a rollout. Pure.

use k8s_openapi::api::apps::v1::DeploymentSpec;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::super::control::resolve;

/// What a set should have and has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) wanted: i32,
    pub(super) actual: i32,
    pub(super) available: i32,
}

/// How far a rollout may stray from the wanted number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) is_recreate: bool,
    /// Pods beyond the wanted number.
    pub(super) surge: i32,
    /// Pods that may be unavailable.
    pub(super) unavailable: i32,
}

impl Limits {
    /// By the strategy of `spec`; percentages of the replicas, surge rounded up, unavailable rounded down, both 25 % where
    /// nothing is said.
    pub(super) fn of(spec: &DeploymentSpec) -> Self {
        let replicas = spec.replicas.unwrap_or(1);
        let strategy = spec.strategy.as_ref();
        if strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate") {
            return Self {
                is_recreate: true,
                surge: 0,
                unavailable: replicas,
            };
        }
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let quarter = IntOrString::String("25%".into());
        let surge = rolling
            .and_then(|rolling| rolling.max_surge.as_ref())
            .unwrap_or(&quarter);
        let unavailable = rolling
            .and_then(|rolling| rolling.max_unavailable.as_ref())
            .unwrap_or(&quarter);
        let surge = resolve(surge, replicas, true);
        let mut unavailable = resolve(unavailable, replicas, false).min(replicas);
        // With neither allowed nothing could ever move.
        if surge == 0 && unavailable == 0 {
            unavailable = 1;
        }
        Self {
            is_recreate: false,
            surge,
            unavailable,
        }
    }
}

/// The size that the new set takes, of which there are `current` pods among `total` of all sets.
pub(super) fn scale_new(current: i32, total: i32, wanted: i32, limits: &Limits) -> i32 {
    if limits.is_recreate {
        return wanted;
    }
    if current >= wanted {
        return wanted;
    }
    let room = wanted + limits.surge - total;
    if room <= 0 {
        current
    } else {
        current + room.min(wanted - current)
    }
}

/// The sizes that the old sets (oldest first) take now: what is not available goes first, then as much as may be
/// unavailable.
pub(super) fn scale_old(old: &[Counts], new: Counts, wanted: i32, limits: &Limits) -> Vec<i32> {
    let mut targets: Vec<i32> = old.iter().map(|set| set.wanted).collect();
    let total: i32 = new.wanted + targets.iter().sum::<i32>();
    let least = wanted - limits.unavailable;
    let mut surplus = total - least - (new.wanted - new.available).max(0);
    for (target, set) in targets.iter_mut().zip(old) {
        let unhealthy = (set.wanted - set.available).max(0);
        let gone = unhealthy.min(surplus.max(0)).min(*target);
        *target -= gone;
        surplus -= gone;
    }
    // A set's status is behind its size: of the pods that it counted last, those that it was told to delete serve no more.
    let serving = old.iter().zip(&targets);
    let serving: i32 = serving.map(|(set, left)| set.available.min(*left)).sum();
    let mut surplus = new.available.min(new.wanted) + serving - least;
    for target in &mut targets {
        let gone = (*target).min(surplus.max(0));
        *target -= gone;
        surplus -= gone;
    }
    targets
}

/// Shares `total` among sets in proportion to their `sizes`; what rounding leaves goes to the largest.
pub(super) fn share(sizes: &[i32], total: i32) -> Vec<i32> {
    let sum: i64 = sizes.iter().map(|size| i64::from(*size)).sum();
    if sum == 0 {
        return sizes.to_vec();
    }
    let part =
        |size: &i32| i32::try_from(i64::from(*size) * i64::from(total) / sum).unwrap_or(i32::MAX);
    let mut shares: Vec<i32> = sizes.iter().map(part).collect();
    let left = total - shares.iter().sum::<i32>();
    let largest = sizes
        .iter()
        .enumerate()
        .max_by_key(|(_, size)| **size)
        .map(|(index, _)| index);
    if let Some(share) = largest.and_then(|index| shares.get_mut(index)) {
        *share += left;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn limits(replicas: i32, strategy: serde_json::Value) -> Limits {
        let spec =
            json!({ "replicas": replicas, "selector": {}, "template": {}, "strategy": strategy });
        Limits::of(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn limits_come_from_the_strategy() {
        let rolling = |surge, unavailable| json!({ "type": "RollingUpdate", "rollingUpdate": { "maxSurge": surge, "maxUnavailable": unavailable } });
        let cases = [
            (limits(1, json!({})), (1, 0)),
            (limits(4, json!({})), (1, 1)),
            (limits(10, rolling(json!("25%"), json!("25%"))), (3, 2)),
            (limits(3, rolling(json!(0), json!(0))), (0, 1)),
            (limits(3, rolling(json!(2), json!(9))), (2, 3)),
        ];
        for (limits, expected) in cases {
            assert_eq!((limits.surge, limits.unavailable), expected);
        }
        assert!(limits(3, json!({ "type": "Recreate" })).is_recreate);
    }

    fn set(wanted: i32, available: i32) -> Counts {
        Counts {
            wanted,
            actual: wanted,
            available,
        }
    }

    #[test]
    fn one_replica_rolls_without_a_gap() {
        let limits = Limits {
            is_recreate: false,
            surge: 1,
            unavailable: 0,
        };
        assert_eq!(scale_new(0, 1, 1, &limits), 1);
        assert_eq!(
            scale_old(&[set(1, 1)], set(1, 0), 1, &limits),
            [1],
            "the old pod serves until the new one does"
        );
        assert_eq!(scale_old(&[set(1, 1)], set(1, 1), 1, &limits), [0]);
    }

    #[test]
    fn a_status_that_is_behind_ends_no_pod_twice() {
        let limits = Limits {
            is_recreate: false,
            surge: 1,
            unavailable: 0,
        };
        let behind = Counts {
            wanted: 2,
            actual: 3,
            available: 3,
        };
        assert_eq!(scale_old(&[set(3, 3)], set(1, 1), 3, &limits), [2]);
        assert_eq!(scale_old(&[behind], set(1, 1), 3, &limits), [2]);
    }

    #[test]
    fn broken_old_pods_go_first() {
        let limits = Limits {
            is_recreate: false,
            surge: 1,
            unavailable: 1,
        };
        assert_eq!(scale_old(&[set(4, 2)], set(1, 0), 4, &limits), [3]);
        assert_eq!(
            scale_old(&[set(2, 2), set(2, 2)], set(1, 1), 4, &limits),
            [0, 2]
        );
    }

    /// Plays whole rollouts, with pods that become available at random moments, and checks the promises at each step.
    #[test]
    fn rollouts_end_and_keep_their_limits() {
        for (wanted, surge, unavailable) in [
            (1, 1, 0),
            (4, 1, 1),
            (10, 3, 2),
            (10, 0, 1),
            (7, 0, 7),
            (5, 5, 0),
        ] {
            let limits = Limits {
                is_recreate: false,
                surge,
                unavailable,
            };
            let (mut new, mut old) = (Counts::default(), set(wanted, wanted));
            let mut steps = 0;
            while (new.available, old.wanted) != (wanted, 0) {
                new.wanted = scale_new(new.wanted, new.wanted + old.wanted, wanted, &limits);
                old.wanted = scale_old(&[old], new, wanted, &limits)[0];
                old.available = old.available.min(old.wanted);
                assert!(new.wanted + old.wanted <= wanted + surge, "{limits:?}");
                assert!(
                    new.available + old.available >= wanted - unavailable,
                    "{limits:?}"
                );
                new.available += i32::from(new.available < new.wanted);
                steps += 1;
                assert!(steps < 100, "{limits:?} is stuck at {new:?} {old:?}");
            }
        }
    }

    #[test]
    fn shares_add_up() {
        assert_eq!(share(&[5, 5], 13), [6, 7]);
        assert_eq!(share(&[8, 2], 20), [16, 4]);
        assert_eq!(share(&[1, 3], 0), [0, 0]);
    }
}
