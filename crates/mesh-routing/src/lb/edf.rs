//! Weighted turns: earliest deadline first, as Envoy's `EdfScheduler`.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Entries that are due in proportion to their weights, which may change from pick to pick.
#[derive(Debug, Default)]
pub(crate) struct Edf {
    heap: BinaryHeap<Due>,
    order: u64,
}

#[derive(Debug, Clone, Copy)]
struct Due {
    deadline: f64,
    /// Breaks ties: who was added first comes first.
    order: u64,
    index: u32,
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the greatest first; the earliest is wanted.
        let by_time = other.deadline.total_cmp(&self.deadline);
        by_time.then(other.order.cmp(&self.order))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

impl Edf {
    /// All members with a weight above zero. The first deadlines are spread by chance, so that not every worker, nor every new
    /// configuration, begins with the same endpoint.
    pub(crate) fn new(
        members: impl Iterator<Item = u32>,
        weight: impl Fn(u32) -> f64,
        mut random: impl FnMut() -> u64,
    ) -> Self {
        let mut edf = Self::default();
        for index in members {
            let share = (random() >> 11) as f64 / (1_u64 << 53) as f64;
            edf.add(index, share, weight(index));
        }
        edf
    }

    fn add(&mut self, index: u32, wait: f64, weight: f64) {
        if weight > 0.0 {
            self.order += 1;
            self.heap.push(Due {
                deadline: wait / weight,
                order: self.order,
                index,
            });
        }
    }

    /// Whose turn it is; it gets its next turn by its present weight.
    pub(crate) fn pick(&mut self, weight: impl Fn(u32) -> f64) -> Option<u32> {
        let mut top = self.heap.peek_mut()?;
        let index = top.index;
        self.order += 1;
        // A weight that fell to zero must not stop the clock.
        top.deadline += 1.0 / weight(index).max(1e-9);
        top.order = self.order;
        Some(index)
    }
}
