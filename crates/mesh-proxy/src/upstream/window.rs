//! How many requests began lately, counted by all workers without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Parts of the interval. What a part holds is forgotten at once, so that a request counts for the interval and at most one part more.
const PARTS: u32 = 10;
/// Places, more than the parts that count: the oldest are free to be written.
const PLACES: usize = 16;

/// Requests that began within an interval that slides (`budget_interval` of Envoy's retry budgets).
#[derive(Debug)]
pub struct Window {
    origin: Instant,
    /// Length of a part in microseconds.
    part: AtomicU64,
    /// Each the number of its part in the upper half, the count in the lower.
    places: [AtomicU64; PLACES],
}

impl Default for Window {
    fn default() -> Self {
        Self {
            origin: Instant::now(),
            part: AtomicU64::new(0),
            places: [const { AtomicU64::new(0) }; PLACES],
        }
    }
}

impl Window {
    /// One that begins now.
    pub fn note(&self, interval: Duration, now: Instant) {
        let part = self.part_at(interval, now);
        let Some(place) = self.places.get(part as usize % PLACES) else {
            return;
        };
        let add = |held: u64| match (held >> 32) as u32 == part {
            true => held.saturating_add(u64::from(held as u32 != u32::MAX)),
            false => (u64::from(part) << 32) | 1,
        };
        let mut held = place.load(Ordering::Relaxed);
        while let Err(other) =
            place.compare_exchange_weak(held, add(held), Ordering::Relaxed, Ordering::Relaxed)
        {
            held = other;
        }
    }

    /// So many began within the interval.
    pub fn count(&self, interval: Duration, now: Instant) -> u32 {
        let part = self.part_at(interval, now);
        let held = self
            .places
            .iter()
            .map(|place| place.load(Ordering::Relaxed));
        held.filter(|held| part.wrapping_sub((held >> 32) as u32) <= PARTS)
            .fold(0, |sum, held| sum.saturating_add(held as u32))
    }

    /// The number of the part that is now. With another interval counting begins anew.
    fn part_at(&self, interval: Duration, now: Instant) -> u32 {
        let micros = (interval.as_micros() as u64 / u64::from(PARTS)).max(1);
        if self.part.swap(micros, Ordering::Relaxed) != micros {
            for place in &self.places {
                place.store(0, Ordering::Relaxed);
            }
        }
        let since = now.saturating_duration_since(self.origin).as_micros() as u64;
        // From one up: a place that holds nothing is of part 0.
        (since / micros) as u32 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(100);

    #[test]
    fn what_began_counts_for_the_interval_and_no_longer() {
        let window = Window::default();
        let at = |millis| window.origin + Duration::from_millis(millis);
        let count = |millis| window.count(INTERVAL, at(millis));
        for _ in 0..10 {
            window.note(INTERVAL, at(0));
        }
        window.note(INTERVAL, at(55));
        assert_eq!(count(55), 11);
        assert_eq!(count(100), 11, "a whole interval later");
        assert_eq!(count(111), 1);
        assert_eq!(count(155), 1);
        assert_eq!(count(170), 0);
        // The places are used again.
        window.note(INTERVAL, at(1000));
        assert_eq!(count(1000), 1);
        assert_eq!(count(1111), 0);
    }

    #[test]
    fn another_interval_begins_anew() {
        let window = Window::default();
        let now = window.origin;
        window.note(INTERVAL, now);
        assert_eq!(window.count(2 * INTERVAL, now), 0);
        window.note(2 * INTERVAL, now);
        assert_eq!(window.count(2 * INTERVAL, now), 1);
    }

    #[test]
    fn workers_count_together() {
        let window = Window::default();
        let now = window.origin;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| window.note(INTERVAL, now)));
            }
        });
        assert_eq!(window.count(INTERVAL, now), 4000);
    }
}
