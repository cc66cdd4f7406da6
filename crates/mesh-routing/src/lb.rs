//! Load balancing: one endpoint for one request, by Envoy's rules.
//!
//! A [`Balancer`] is what can be worked out ahead from the endpoints, their health and the cluster's policy; it is immutable and shared by all
//! workers. What changes with every pick lies in a worker's [`Cursor`].

mod edf;
mod levels;
mod ring;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use crate::endpoint::{EndpointSet, Health};
use edf::Edf;
use levels::{Availability, Counts, Levels};
use ring::{Maglev, Ring, Share};

pub use ring::HashFunction;

/// How a cluster picks its endpoints.
#[derive(Debug, Clone, PartialEq)]
pub struct LbConfig {
    /// The algorithm.
    pub policy: LbPolicy,
    /// Below this share of usable endpoints of a priority health is ignored, in percent; 0 never.
    pub panic_percent: u32,
    /// In that case send nothing instead (`fail_traffic_on_panic`).
    pub fail_on_panic: bool,
    /// Localities share the load by the weights that the endpoint message gives them (`locality_weighted_lb_config`).
    pub locality_weighted: bool,
    /// Consistent hashing goes by the host name instead of the address.
    pub hash_hostnames: bool,
}

impl Default for LbConfig {
    /// Envoy's defaults: in turn, panic below 50 %.
    fn default() -> Self {
        Self {
            policy: LbPolicy::RoundRobin(None),
            panic_percent: 50,
            fail_on_panic: false,
            locality_weighted: false,
            hash_hostnames: false,
        }
    }
}

/// The algorithm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LbPolicy {
    /// In turn, by weight.
    RoundRobin(Option<SlowStart>),
    /// By chance. Weights of endpoints do not count, as in Envoy.
    Random,
    /// The less busy.
    LeastRequest(LeastRequest),
    /// A ring of points (ketama).
    RingHash {
        /// Points at least.
        smallest: u64,
        /// Points at most.
        largest: u64,
        /// What the points are made with.
        function: HashFunction,
    },
    /// Maglev with a table of so many slots, a prime.
    Maglev(u64),
}

impl LbPolicy {
    /// Does it look at the request's hash?
    pub fn is_hashing(&self) -> bool {
        matches!(self, Self::RingHash { .. } | Self::Maglev(_))
    }

    /// Its warm-up.
    pub fn slow_start(&self) -> Option<SlowStart> {
        match self {
            Self::RoundRobin(slow_start) => *slow_start,
            Self::LeastRequest(least) => least.slow_start,
            _ => None,
        }
    }

    /// Its name in Envoy's configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::RoundRobin(_) => "ROUND_ROBIN",
            Self::Random => "RANDOM",
            Self::LeastRequest(_) => "LEAST_REQUEST",
            Self::RingHash { .. } => "RING_HASH",
            Self::Maglev(_) => "MAGLEV",
        }
    }
}

/// `LEAST_REQUEST`: among equal weights the less busy of some taken by chance; else in turn by `weight / (active + 1)^bias`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LeastRequest {
    /// So many are compared; `None` all (`FULL_SCAN`).
    pub choices: Option<u32>,
    /// How much activity counts against weight; Envoy's default is 1.
    pub bias: f64,
    /// Warm-up.
    pub slow_start: Option<SlowStart>,
}

/// New endpoints get their full weight little by little.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    /// For so long.
    pub window: Duration,
    /// The weight grows with `(age / window)^(1 / aggression)`.
    pub aggression: f64,
    /// It begins with this share.
    pub least: f64,
}

impl SlowStart {
    fn factor(&self, age: Duration) -> f64 {
        if age >= self.window {
            return 1.0;
        }
        let passed = age.max(Duration::from_millis(1)).as_secs_f64() / self.window.as_secs_f64();
        passed.powf(1.0 / self.aggression).max(self.least)
    }
}

/// What the worker knows of the endpoints, by their index in the set.
pub trait Load {
    /// Requests under way.
    fn active(&self, index: usize) -> u32;
    /// Time since it was added; asked while [`Load::warming`].
    fn age(&self, _index: usize) -> Duration {
        Duration::MAX
    }
    /// Was an endpoint added within the warm-up window?
    fn warming(&self) -> bool {
        false
    }
}

impl<F: Fn(usize) -> u32> Load for F {
    fn active(&self, index: usize) -> u32 {
        self(index)
    }
}

/// What a request wants.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted<'a> {
    /// Its hash, for consistent hashing.
    pub hash: Option<u64>,
    /// How often a pick for it was refused already (another endpoint than the last one is wanted).
    pub attempt: u32,
    /// Priorities to avoid while others are left.
    pub avoided_priorities: &'a [u32],
}

/// The position of a worker in the turns of a balancer. Lives beside the snapshot, so that a new snapshot does not begin again at the first
/// endpoint.
#[derive(Debug, Default)]
pub struct Cursor {
    start: u64,
    turns: RefCell<Vec<Turn>>,
}

#[derive(Debug, Default)]
struct Turn {
    next: u64,
    edf: Option<Edf>,
    /// The weights were made during a warm-up.
    warming: bool,
}

impl Cursor {
    /// Begins at the given place, so that not all proxies begin with the same endpoint.
    pub fn starting_at(start: u64) -> Self {
        Self {
            start,
            turns: RefCell::default(),
        }
    }

    /// To be called before the first pick from another balancer: weights are taken anew, plain turns go on.
    pub fn renew(&self) {
        self.turns
            .borrow_mut()
            .iter_mut()
            .for_each(|turn| turn.edf = None);
    }

    fn with<T>(&self, slot: usize, act: impl FnOnce(&mut Turn) -> T) -> Option<T> {
        let mut turns = self.turns.borrow_mut();
        if turns.len() <= slot {
            let start = self.start;
            turns.resize_with(slot + 1, || Turn {
                next: start,
                ..Turn::default()
            });
        }
        turns.get_mut(slot).map(act)
    }
}

/// The endpoints arranged for picking.
#[derive(Debug)]
pub struct Balancer {
    set: Arc<EndpointSet>,
    config: LbConfig,
    levels: Levels,
    priorities: Vec<Priority>,
}

#[derive(Debug, Default)]
struct Priority {
    panic: bool,
    healthy: Choice,
    degraded: Choice,
    table: Option<Table>,
}

/// Groups of endpoints, with the weights of their localities where these count.
#[derive(Debug, Default)]
struct Choice {
    /// Where the cursor keeps the turn among the groups.
    slot: usize,
    groups: Vec<(f64, Group)>,
}

#[derive(Debug)]
struct Group {
    slot: usize,
    members: Vec<u32>,
    /// Not all weights are equal.
    weighted: bool,
}

#[derive(Debug)]
enum Table {
    Ring(Ring),
    Maglev(Maglev),
}

impl Balancer {
    /// `ejected` tells which endpoints outlier detection has taken out.
    pub fn new(set: Arc<EndpointSet>, config: &LbConfig, ejected: impl Fn(usize) -> bool) -> Self {
        let health: Vec<Health> = set
            .endpoints()
            .iter()
            .enumerate()
            .map(|(i, endpoint)| match ejected(i) {
                true => Health::Unhealthy,
                false => endpoint.health,
            })
            .collect();
        let levels = Levels::new(
            &count(&set, &health),
            set.overprovisioning(),
            config.panic_percent,
        );
        let mut builder = Builder {
            set: &set,
            config,
            health: &health,
            slots: 0,
        };
        let priorities = (0..levels.count())
            .map(|priority| builder.priority(priority as u32, levels.panics(priority)))
            .collect();
        Self {
            levels,
            priorities,
            config: config.clone(),
            set,
        }
    }

    /// The endpoints that it was made for.
    pub fn set(&self) -> &Arc<EndpointSet> {
        &self.set
    }

    /// An endpoint's index; `None` where none is usable. `random` gives uniformly distributed numbers.
    pub fn pick(
        &self,
        cursor: &Cursor,
        wanted: &Wanted<'_>,
        mut random: impl FnMut() -> u64,
        load: &impl Load,
    ) -> Option<usize> {
        let hashing = self.config.policy.is_hashing();
        let hash = wanted.hash.filter(|_| hashing).unwrap_or_else(&mut random);
        let (level, availability) = self.levels.choose(hash, wanted.avoided_priorities)?;
        let priority = self.priorities.get(level)?;
        if priority.panic && self.config.fail_on_panic {
            return None;
        }
        if let Some(table) = &priority.table {
            let index = match table {
                Table::Ring(ring) => ring.pick(hash, wanted.attempt),
                Table::Maglev(maglev) => maglev.pick(hash, wanted.attempt),
            };
            return index.map(|i| i as usize);
        }
        let choice = match availability {
            Availability::Healthy => &priority.healthy,
            Availability::Degraded => &priority.degraded,
        };
        let group = match choice.groups.as_slice() {
            [] => return None,
            [(_, group)] => group,
            groups => {
                let weight = |i: u32| groups.get(i as usize).map_or(0.0, |(weight, _)| *weight);
                let at = cursor.with(choice.slot, |turn| {
                    let all = 0..groups.len() as u32;
                    let edf = turn
                        .edf
                        .get_or_insert_with(|| Edf::new(all, weight, &mut random));
                    edf.pick(weight)
                })??;
                &groups.get(at as usize)?.1
            }
        };
        let index = self.pick_member(group, cursor, random, load);
        index.map(|i| i as usize)
    }

    fn pick_member(
        &self,
        group: &Group,
        cursor: &Cursor,
        mut random: impl FnMut() -> u64,
        load: &impl Load,
    ) -> Option<u32> {
        let members = group.members.as_slice();
        let at = |n: u64| members.get((n % members.len() as u64) as usize).copied();
        if let ([only], _) | ([only, ..], LbPolicy::Random) = (members, self.config.policy) {
            return if members.len() == 1 {
                Some(*only)
            } else {
                at(random())
            };
        }
        let warm_up = self.config.policy.slow_start();
        let warming = warm_up.is_some() && load.warming();
        if group.weighted || warming {
            let weight = |i: u32| self.weight(i, load, warm_up.filter(|_| warming));
            return cursor.with(group.slot, |turn| {
                if turn.warming != warming {
                    turn.edf = None;
                    turn.warming = warming;
                }
                turn.edf
                    .get_or_insert_with(|| Edf::new(members.iter().copied(), weight, random))
                    .pick(weight)
            })?;
        }
        match self.config.policy {
            LbPolicy::LeastRequest(least) => {
                // Two different ones where two are asked for, so that a pair is always balanced.
                let first = random();
                let step = match least.choices {
                    Some(_) => 1 + random() % (members.len() as u64 - 1).max(1),
                    None => 1,
                };
                let choices = least.choices.map_or(members.len() as u64, u64::from);
                (0..choices)
                    .filter_map(|k| {
                        at((first % members.len() as u64).wrapping_add(k.wrapping_mul(step)))
                    })
                    .min_by_key(|&i| load.active(i as usize))
            }
            _ => cursor.with(group.slot, |turn| {
                let now = turn.next;
                turn.next = now.wrapping_add(1);
                at(now)
            })?,
        }
    }

    fn weight(&self, index: u32, load: &impl Load, warm_up: Option<SlowStart>) -> f64 {
        let index = index as usize;
        let given = self.set.endpoints().get(index).map_or(1, |e| e.weight);
        let mut weight = f64::from(given);
        if let LbPolicy::LeastRequest(least) = self.config.policy {
            let busy = f64::from(load.active(index)) + 1.0;
            weight /= if least.bias == 1.0 {
                busy
            } else {
                busy.powf(least.bias)
            };
        }
        weight * warm_up.map_or(1.0, |slow| slow.factor(load.age(index)))
    }

    /// Endpoints that take requests while health is not ignored.
    pub fn healthy(&self) -> usize {
        self.levels.healthy
    }

    /// Is health ignored somewhere?
    pub fn in_panic(&self) -> bool {
        self.priorities.iter().any(|priority| priority.panic)
    }
}

/// Endpoints of every priority, by health.
fn count(set: &EndpointSet, health: &[Health]) -> Vec<Counts> {
    let last = set.endpoints().iter().map(|e| e.priority).max();
    let mut counts = vec![Counts::default(); last.map_or(0, |p| p as usize + 1)];
    for (endpoint, health) in set.endpoints().iter().zip(health) {
        if let Some(counts) = counts.get_mut(endpoint.priority as usize) {
            counts.all += 1;
            match health {
                Health::Healthy => counts.healthy += 1,
                Health::Degraded => counts.degraded += 1,
                Health::Unhealthy => {}
            }
        }
    }
    counts
}

struct Builder<'a> {
    set: &'a EndpointSet,
    config: &'a LbConfig,
    health: &'a [Health],
    slots: usize,
}

impl Builder<'_> {
    fn slot(&mut self) -> usize {
        self.slots += 1;
        self.slots - 1
    }

    fn priority(&mut self, priority: u32, panic: bool) -> Priority {
        if self.config.policy.is_hashing() {
            return Priority {
                panic,
                table: Some(self.table(priority, panic)),
                ..Priority::default()
            };
        }
        if panic {
            let all = self.members(priority, None, |_| true);
            return Priority {
                panic,
                healthy: self.choice(vec![(1.0, all)]),
                ..Priority::default()
            };
        }
        let [healthy, degraded] = [Health::Healthy, Health::Degraded].map(|wanted| {
            let groups = self.groups(priority, wanted);
            self.choice(groups)
        });
        Priority {
            healthy,
            degraded,
            ..Priority::default()
        }
    }

    fn members(
        &self,
        priority: u32,
        locality: Option<u32>,
        fits: impl Fn(Health) -> bool,
    ) -> Vec<u32> {
        (0_u32..)
            .zip(self.set.endpoints())
            .zip(self.health)
            .filter(|((_, e), health)| {
                e.priority == priority
                    && locality.is_none_or(|l| l == e.locality_index)
                    && fits(**health)
            })
            .map(|((i, _), _)| i)
            .collect()
    }

    /// The endpoints of one health, by locality where localities have weights. A locality that lost endpoints loses weight (Envoy:
    /// "effective locality weight").
    fn groups(&self, priority: u32, wanted: Health) -> Vec<(f64, Vec<u32>)> {
        let localities = self.set.localities().iter().zip(0_u32..);
        let own: Vec<_> = localities.filter(|(l, _)| l.priority == priority).collect();
        let weighted = self.config.locality_weighted && own.iter().any(|(l, _)| l.weight > 0);
        if !weighted {
            return vec![(1.0, self.members(priority, None, |health| health == wanted))];
        }
        let group = |(locality, index): &(&crate::endpoint::Locality, u32)| {
            let members = self.members(priority, Some(*index), |health| health == wanted);
            let all = self.members(priority, Some(*index), |_| true).len().max(1);
            let available = members.len() as f64 / all as f64;
            let extra = f64::from(self.set.overprovisioning()) / 100.0;
            (
                f64::from(locality.weight) * (extra * available).min(1.0),
                members,
            )
        };
        own.iter().map(group).collect()
    }

    fn choice(&mut self, groups: Vec<(f64, Vec<u32>)>) -> Choice {
        let slot = self.slot();
        let kept = groups
            .into_iter()
            .filter(|(weight, members)| *weight > 0.0 && !members.is_empty());
        let weight = |i: &u32| self.set.endpoints().get(*i as usize).map(|e| e.weight);
        let kept: Vec<_> = kept
            .map(|(share, members)| {
                let weighted = members.windows(2).any(|pair| match pair {
                    [a, b] => weight(a) != weight(b),
                    _ => false,
                });
                (share, members, weighted)
            })
            .collect();
        let groups = kept
            .into_iter()
            .map(|(share, members, weighted)| {
                let slot = self.slot();
                let group = Group {
                    slot,
                    members,
                    weighted,
                };
                (share, group)
            })
            .collect();
        Choice { slot, groups }
    }

    fn table(&self, priority: u32, panic: bool) -> Table {
        let usable = |health: Health| panic || health == Health::Healthy;
        let mut members: Vec<Vec<u32>> = vec![self.members(priority, None, usable)];
        let mut weights = vec![1.0];
        let localities = || {
            self.set
                .localities()
                .iter()
                .filter(|l| l.priority == priority)
        };
        let total: u64 = localities().map(|l| u64::from(l.weight)).sum();
        if self.config.locality_weighted && total > 0 {
            let indexes = (0_u32..).zip(self.set.localities());
            (weights, members) = indexes
                .filter(|(_, l)| l.priority == priority && l.weight > 0)
                .map(|(i, l)| {
                    let share = f64::from(l.weight) / total as f64;
                    (share, self.members(priority, Some(i), usable))
                })
                .unzip();
        }
        let mut shares = Vec::new();
        for (share, members) in weights.into_iter().zip(&members) {
            let endpoints = || {
                members
                    .iter()
                    .filter_map(|&i| Some((i, self.set.endpoints().get(i as usize)?)))
            };
            let sum: u64 = endpoints().map(|(_, e)| u64::from(e.weight)).sum();
            shares.extend(endpoints().map(|(index, e)| Share {
                index,
                key: e.hash_key(self.config.hash_hostnames),
                weight: f64::from(e.weight) * share / sum as f64,
            }));
        }
        match self.config.policy {
            LbPolicy::Maglev(size) => Table::Maglev(Maglev::build(&shares, size)),
            LbPolicy::RingHash {
                smallest,
                largest,
                function,
            } => Table::Ring(Ring::build(&shares, smallest, largest, function)),
            _ => Table::Maglev(Maglev::build(&[], 1)),
        }
    }
}
