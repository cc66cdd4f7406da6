//! Statistics of filters under Envoy's names. A name is looked up once for each compiled filter; counting is an addition.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A statistic.
pub type Counter = Arc<AtomicU64>;

/// All statistics of filters. They outlive the configuration that asked for them, so that they never go back.
#[derive(Debug, Default)]
pub struct Stats(Mutex<BTreeMap<String, Counter>>);

impl Stats {
    /// The statistic of this name.
    pub fn counter(&self, name: String) -> Counter {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(name).or_default().clone()
    }

    /// All of them with their values.
    pub fn values(&self) -> Vec<(String, u64)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let value = |(name, counter): (&String, &Counter)| (name.clone(), get(counter));
        all.iter().map(value).collect()
    }
}

/// One more.
pub fn inc(counter: &Counter) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn get(counter: &Counter) -> u64 {
    counter.load(Ordering::Relaxed)
}
