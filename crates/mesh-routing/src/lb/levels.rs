//! Priorities: how much load each takes, and when health is ignored (Envoy: "Priority levels", "Panic threshold").

/// Endpoints of one priority.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) all: u32,
    pub(crate) healthy: u32,
    pub(crate) degraded: u32,
}

/// Which endpoints of a priority are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Availability {
    Healthy,
    Degraded,
}

/// The shares of all priorities, in percent.
#[derive(Debug)]
pub(crate) struct Levels {
    load: Load,
    panic: Vec<bool>,
    /// What each could take, in percent of the whole: healthy endpoints' part times the overprovisioning factor, at most 100.
    availability: Load,
    /// Healthy endpoints altogether.
    pub(crate) healthy: usize,
}

#[derive(Debug, Clone, Default)]
struct Load {
    healthy: Vec<u32>,
    degraded: Vec<u32>,
}

impl Load {
    fn total(&self) -> u32 {
        let sum: u32 = self.healthy.iter().chain(&self.degraded).sum();
        sum.min(100)
    }
}

impl Levels {
    pub(crate) fn new(counts: &[Counts], overprovisioning: u32, panic_percent: u32) -> Self {
        let share = |part: u32, all: u32| {
            let share = u64::from(part) * u64::from(overprovisioning) / u64::from(all.max(1));
            share.min(100) as u32
        };
        let availability = Load {
            healthy: counts.iter().map(|c| share(c.healthy, c.all)).collect(),
            degraded: counts.iter().map(|c| share(c.degraded, c.all)).collect(),
        };
        let total = availability.total();
        let panics = |c: &Counts| {
            let usable = f64::from(c.healthy + c.degraded) * 100.0 / f64::from(c.all.max(1));
            total < 100 && usable < f64::from(panic_percent)
        };
        let panic: Vec<bool> = counts.iter().map(panics).collect();
        let load = match panic.iter().all(|panic| *panic) {
            true => by_size(counts),
            false => distribute(&availability),
        };
        Self {
            load,
            panic,
            availability,
            healthy: counts.iter().map(|c| c.healthy as usize).sum(),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.panic.len()
    }

    pub(crate) fn panics(&self, priority: usize) -> bool {
        self.panic.get(priority).copied().unwrap_or(false)
    }

    /// The priority for a number (the request's hash, or a random one). Priorities to avoid take nothing while others can.
    pub(crate) fn choose(&self, number: u64, avoided: &[u32]) -> Option<(usize, Availability)> {
        if !avoided.is_empty()
            && let Some(load) = self.without(avoided)
        {
            return find(&load, number);
        }
        find(&self.load, number)
    }

    fn without(&self, avoided: &[u32]) -> Option<Load> {
        let mut left = self.availability.clone();
        for &priority in avoided {
            for shares in [&mut left.healthy, &mut left.degraded] {
                if let Some(share) = shares.get_mut(priority as usize) {
                    *share = 0;
                }
            }
        }
        (left.total() > 0).then(|| distribute(&left))
    }
}

fn find(load: &Load, number: u64) -> Option<(usize, Availability)> {
    let point = (number % 100) as u32;
    let mut until = 0;
    let kinds = [
        (&load.healthy, Availability::Healthy),
        (&load.degraded, Availability::Degraded),
    ];
    for (shares, availability) in kinds {
        for (priority, share) in shares.iter().enumerate() {
            until += share;
            if point < until {
                return Some((priority, availability));
            }
        }
    }
    None
}

/// Healthy endpoints first, from the first priority on; then degraded ones. What is left of rounding goes to the first that takes anything.
fn distribute(availability: &Load) -> Load {
    let total = availability.total();
    let mut left = 100;
    let mut spread = |shares: &[u32]| -> Vec<u32> {
        let share = |available: &u32| {
            let share = (available * 100).checked_div(total).unwrap_or(0).min(left);
            left -= share;
            share
        };
        shares.iter().map(share).collect()
    };
    let mut load = Load {
        healthy: spread(&availability.healthy),
        degraded: spread(&availability.degraded),
    };
    let first = |available: &[u32]| available.iter().position(|a| *a > 0);
    if let Some(share) = first(&availability.healthy).and_then(|i| load.healthy.get_mut(i)) {
        *share += left;
    } else if let Some(share) = first(&availability.degraded).and_then(|i| load.degraded.get_mut(i))
    {
        *share += left;
    }
    load
}

/// When all priorities ignore health, each takes what its number of endpoints allows.
fn by_size(counts: &[Counts]) -> Load {
    let total: u32 = counts.iter().map(|c| c.all).sum();
    let mut healthy: Vec<u32> = counts
        .iter()
        .map(|c| (c.all * 100).checked_div(total).unwrap_or(0))
        .collect();
    let left = 100 - healthy.iter().sum::<u32>();
    let first = counts.iter().position(|c| c.all > 0);
    if let Some(share) = first.and_then(|i| healthy.get_mut(i)) {
        *share += left;
    }
    Load {
        degraded: vec![0; healthy.len()],
        healthy,
    }
}
