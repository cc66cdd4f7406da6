//! Waiting longer after each failure, with jitter, so that a fleet does not come back all at once.

use std::time::Duration;

/// An exponential back-off. Each wait is drawn evenly from the upper half of the current step.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
    seed: u64,
}

impl Backoff {
    /// Waits from `first` (doubling) up to `max`. `seed` varies the jitter; give each client its own.
    #[must_use]
    pub fn new(first: Duration, max: Duration, seed: u64) -> Self {
        Self {
            first,
            max,
            next: first,
            seed: seed | 1,
        }
    }

    /// How long to wait now; the next wait is about twice as long.
    pub fn wait(&mut self) -> Duration {
        let step = self.next.min(self.max);
        self.next = (step * 2).min(self.max);
        // xorshift64: good enough to spread clients, and it needs no dependency.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let half = step / 2;
        half + half.mul_f64((self.seed % 1024) as f64 / 1024.0)
    }

    /// Starts again from the first step, after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_the_limit_and_resets() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1), 7);
        for step in [100, 200, 400, 800, 1000, 1000] {
            let wait = backoff.wait().as_millis();
            assert!((step / 2..=step).contains(&wait), "{wait} in step {step}");
        }
        backoff.reset();
        assert!(backoff.wait() <= Duration::from_millis(100));
    }
}
