//! Load balancing: one endpoint for one request.

use std::cell::Cell;

use crate::endpoint::EndpointSet;

/// The algorithm of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LbPolicy {
    /// In turn, by weight.
    RoundRobin,
    /// By chance, by weight.
    Random,
    /// The less busy of this many endpoints taken by chance (Envoy's default is two).
    LeastRequest(u32),
}

/// The position of a cluster's round robin. Lives beside the snapshot, so that a new snapshot does not begin again at the first endpoint.
#[derive(Debug, Default)]
pub struct Turn(Cell<u64>);

impl Turn {
    fn next(&self) -> u64 {
        let now = self.0.get();
        self.0.set(now.wrapping_add(1));
        now
    }
}

/// Picks an endpoint; `None` where none is usable. `random` gives uniformly distributed numbers, `active` the number of requests that
/// are under way to an endpoint.
pub fn pick(
    set: &EndpointSet,
    policy: LbPolicy,
    turn: &Turn,
    mut random: impl FnMut() -> u64,
    active: impl Fn(usize) -> u32,
) -> Option<usize> {
    let tier = set.tier(random())?;
    let by_chance = |random: u64| {
        tier.schedule
            .get((random % tier.schedule.len() as u64) as usize)
            .copied()
    };
    let index = match policy {
        _ if tier.members.is_empty() => None,
        LbPolicy::RoundRobin => by_chance(turn.next()),
        LbPolicy::Random => by_chance(random()),
        LbPolicy::LeastRequest(_) if tier.members.len() == 1 => tier.members.first().copied(),
        LbPolicy::LeastRequest(choices) => {
            // Two different ones where two are asked for, so that a pair is always balanced.
            let first = random();
            let step = 1 + random() % (tier.schedule.len() as u64 - 1).max(1);
            (0..u64::from(choices.max(2)))
                .filter_map(|k| by_chance(first.wrapping_add(k.wrapping_mul(step))))
                .min_by_key(|&i| active(i as usize))
        }
    };
    index.map(|i| i as usize)
}
