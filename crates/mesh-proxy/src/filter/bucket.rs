//! Token buckets, shared by all workers of the process.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use mesh_routing::filter::ext_authz::{ConnectionExtAuthz, ExtAuthz};
use mesh_routing::filter::jwt_authn::JwtAuthn;
use mesh_routing::filter::local_rate_limit::{
    BucketId, ConnectionLimit, LocalRateLimit, TokenBucket,
};
use mesh_routing::filter::rbac::{ConnectionRbac, Rbac};
use mesh_routing::hcm::HttpManager;

use super::check::CheckStats;
use super::jwt::{JwtStats, keys};
use super::rbac::RbacStats;
use super::stats::Stats;

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// A token bucket without a timer: what it holds follows from the time at which it would last have been empty.
#[derive(Debug)]
pub struct Bucket {
    rule: TokenBucket,
    /// That time, as the bits of an `f64` of seconds.
    empty_at: AtomicU64,
}

impl Bucket {
    /// A full one. Times are seconds on any clock that does not go back.
    pub fn full(rule: TokenBucket, now: f64) -> Self {
        let empty_at = now - rule.max / rule.per_second;
        Self {
            rule,
            empty_at: AtomicU64::new(empty_at.to_bits()),
        }
    }

    fn tokens(&self, empty_at: u64, now: f64) -> f64 {
        let tokens = (now - f64::from_bits(empty_at)) * self.rule.per_second;
        // Sums of fractions come out a little below the whole number that they stand for.
        let whole = tokens.round();
        let tokens = if (tokens - whole).abs() < 1e-6 {
            whole
        } else {
            tokens
        };
        tokens.clamp(0.0, self.rule.max)
    }

    /// Takes tokens, all or none.
    pub fn consume(&self, wanted: f64, now: f64) -> bool {
        let taken = self
            .empty_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empty_at| {
                let left = self.tokens(empty_at, now) - wanted;
                (left >= 0.0).then(|| (now - left / self.rule.per_second).to_bits())
            });
        taken.is_ok()
    }

    /// Whole tokens in it.
    pub fn remaining(&self, now: f64) -> u64 {
        // Between zero and `max`, which came from a 32-bit number.
        self.tokens(self.empty_at.load(Ordering::Relaxed), now) as u64
    }

    /// What it holds when full.
    pub fn most(&self) -> u64 {
        self.rule.max as u64
    }

    /// Seconds until there is a token; zero where there is one.
    pub fn next_token(&self, now: f64) -> f64 {
        let missing = 1.0 - self.tokens(self.empty_at.load(Ordering::Relaxed), now);
        missing.max(0.0) / self.rule.per_second
    }
}

/// The buckets of one local rate limit.
#[derive(Debug)]
pub struct Buckets {
    common: Option<Bucket>,
    descriptors: Vec<Bucket>,
}

impl Buckets {
    /// All full.
    pub fn full(rule: &LocalRateLimit, now: f64) -> Self {
        Self {
            common: rule.bucket.map(|bucket| Bucket::full(bucket, now)),
            descriptors: rule
                .descriptors
                .iter()
                .map(|d| Bucket::full(d.bucket, now))
                .collect(),
        }
    }

    /// One of them.
    pub fn get(&self, id: BucketId) -> Option<&Bucket> {
        match id {
            BucketId::Default => self.common.as_ref(),
            BucketId::Descriptor(at) => self.descriptors.get(at),
        }
    }
}

/// What the filters of all workers count together. It belongs to rules of the snapshot, lives as long as they do, and is found without a
/// lock.
#[derive(Debug, Default)]
pub struct Counters {
    limits: Kept<LocalRateLimit, Buckets>,
    connections: Kept<ConnectionLimit, Bucket>,
    shared: ArcSwap<Map<ShareKey, Weak<Bucket>>>,
    faults: Kept<HttpManager, AtomicU32>,
    rbac: Kept<Rbac, RbacStats>,
    connection_rbac: Kept<ConnectionRbac, RbacStats>,
    jwt: Kept<JwtAuthn, JwtStats>,
    checks: Kept<ExtAuthz, CheckStats>,
    connection_checks: Kept<ConnectionExtAuthz, CheckStats>,
    /// Statistics by name.
    pub stats: Stats,
    /// Keys of token providers.
    pub keys: keys::Store,
}

/// Filters for connections with the same key and settings count together.
type ShareKey = (Box<str>, u64, u64);

impl Counters {
    /// What an access control filter counts.
    pub fn rbac(&self, filter: &Arc<Rbac>, make: impl FnOnce() -> RbacStats) -> Arc<RbacStats> {
        self.rbac.of(filter, make)
    }

    /// The same for one of connections.
    pub fn connection_rbac(
        &self,
        filter: &Arc<ConnectionRbac>,
        make: impl FnOnce() -> RbacStats,
    ) -> Arc<RbacStats> {
        self.connection_rbac.of(filter, make)
    }

    /// What a token filter counts.
    pub fn jwt(&self, filter: &Arc<JwtAuthn>, make: impl FnOnce() -> JwtStats) -> Arc<JwtStats> {
        self.jwt.of(filter, make)
    }

    /// What an external authorization filter counts.
    pub fn checks(
        &self,
        filter: &Arc<ExtAuthz>,
        make: impl FnOnce() -> CheckStats,
    ) -> Arc<CheckStats> {
        self.checks.of(filter, make)
    }

    /// The same for one of connections.
    pub fn connection_checks(
        &self,
        filter: &Arc<ConnectionExtAuthz>,
        make: impl FnOnce() -> CheckStats,
    ) -> Arc<CheckStats> {
        self.connection_checks.of(filter, make)
    }

    /// The buckets of a limit.
    pub fn buckets(&self, rule: &Arc<LocalRateLimit>, now: f64) -> Arc<Buckets> {
        self.limits.of(rule, || Buckets::full(rule, now))
    }

    /// The bucket of a limit for connections.
    pub fn connections(&self, rule: &Arc<ConnectionLimit>, now: f64) -> Arc<Bucket> {
        if rule.share_key.is_empty() {
            return self.connections.of(rule, || Bucket::full(rule.bucket, now));
        }
        // The rule holds on to the bucket; the key only leads other rules to it.
        self.connections.of_arc(rule, || self.shared(rule, now))
    }

    fn shared(&self, rule: &ConnectionLimit, now: f64) -> Arc<Bucket> {
        let bucket = rule.bucket;
        let key = (
            rule.share_key.clone(),
            bucket.max.to_bits(),
            bucket.per_second.to_bits(),
        );
        let new = Arc::new(Bucket::full(bucket, now));
        let mut found = new.clone();
        self.shared.rcu(|map| {
            let mut map = Map::clone(map);
            map.retain(|_, bucket| bucket.strong_count() > 0);
            match map.get(&key).and_then(Weak::upgrade) {
                Some(old) => found = old,
                None => {
                    found = new.clone();
                    map.insert(key.clone(), Arc::downgrade(&new));
                }
            }
            map
        });
        found
    }

    /// One more fault under way, until the answer is dropped; `None` where there are `most` already.
    pub fn begin_fault(&self, manager: &Arc<HttpManager>) -> ActiveFault {
        let count = self.faults.of(manager, AtomicU32::default);
        count.fetch_add(1, Ordering::Relaxed);
        ActiveFault(count)
    }

    /// Faults under way.
    pub fn active_faults(&self, manager: &Arc<HttpManager>) -> u32 {
        self.faults
            .of(manager, AtomicU32::default)
            .load(Ordering::Relaxed)
    }
}

/// A fault under way.
#[derive(Debug)]
pub struct ActiveFault(Arc<AtomicU32>);

impl Drop for ActiveFault {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Something kept for each rule, found by the rule's identity.
#[derive(Debug)]
pub struct Kept<R, T>(ArcSwap<Map<usize, Entry<R, T>>>);

/// The weak reference keeps the rule's address from being given to another one while it serves as the key.
#[derive(Debug)]
struct Entry<R, T> {
    rule: Weak<R>,
    kept: Arc<T>,
}

impl<R, T> Clone for Entry<R, T> {
    fn clone(&self) -> Self {
        Self {
            rule: self.rule.clone(),
            kept: self.kept.clone(),
        }
    }
}

impl<R, T> Default for Kept<R, T> {
    fn default() -> Self {
        Self(ArcSwap::from_pointee(Map::default()))
    }
}

impl<R, T> Kept<R, T> {
    /// What is kept for a rule, made where there is nothing yet.
    pub fn of(&self, rule: &Arc<R>, make: impl FnOnce() -> T) -> Arc<T> {
        self.of_arc(rule, || Arc::new(make()))
    }

    fn of_arc(&self, rule: &Arc<R>, make: impl FnOnce() -> Arc<T>) -> Arc<T> {
        let key = Arc::as_ptr(rule) as usize;
        if let Some(entry) = self.0.load().get(&key) {
            return entry.kept.clone();
        }
        let new = make();
        let mut found = new.clone();
        // Another thread may have been faster: what is there already counts.
        self.0.rcu(|map| {
            let mut map = Map::clone(map);
            map.retain(|_, entry| entry.rule.strong_count() > 0);
            let entry = map.entry(key).or_insert_with(|| Entry {
                rule: Arc::downgrade(rule),
                kept: new.clone(),
            });
            found = entry.kept.clone();
            map
        });
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(max: f64, per_second: f64) -> Bucket {
        Bucket::full(TokenBucket::new(max, per_second), 100.0)
    }

    #[test]
    fn a_bucket_is_full_at_first_and_fills_all_the_time() {
        let bucket = bucket(4.0, 4.0 / 60.0);
        for left in [3, 2, 1, 0] {
            assert!(bucket.consume(1.0, 100.0));
            assert_eq!(bucket.remaining(100.0), left);
        }
        assert!(!bucket.consume(1.0, 100.0));
        assert!((bucket.next_token(100.0) - 15.0).abs() < 1e-3);
        assert!(!bucket.consume(1.0, 114.9), "a token takes 15 seconds");
        assert!(bucket.consume(1.0, 115.0));
        assert!(!bucket.consume(1.0, 115.0));
        assert_eq!(bucket.remaining(1000.0), 4, "never more than it holds");
    }

    #[test]
    fn all_tokens_are_taken_or_none() {
        let bucket = bucket(5.0, 1.0);
        assert!(!bucket.consume(6.0, 100.0));
        assert!(bucket.consume(5.0, 100.0));
        assert!(!bucket.consume(2.0, 101.0));
        assert!(bucket.consume(1.0, 101.0));
    }

    #[test]
    fn threads_together_get_no_more_than_there_is() {
        let bucket = Arc::new(bucket(1000.0, 1e-9));
        let count = |bucket: Arc<Bucket>| {
            std::thread::spawn(move || (0..2000).filter(|_| bucket.consume(1.0, 100.0)).count())
        };
        let threads: Vec<_> = (0..4).map(|_| count(bucket.clone())).collect();
        let taken: usize = threads
            .into_iter()
            .map(|t| t.join().expect("a count"))
            .sum();
        assert_eq!(taken, 1000);
    }

    #[test]
    fn what_is_kept_goes_with_its_rule() {
        let kept = Kept::<String, u32>::default();
        let first = Arc::new("a".to_owned());
        let a = kept.of(&first, || 1);
        assert!(Arc::ptr_eq(&a, &kept.of(&first, || 2)));
        drop(first);
        let second = Arc::new("b".to_owned());
        assert_eq!(*kept.of(&second, || 3), 3);
        assert_eq!(kept.0.load().len(), 1, "that of the dropped rule is gone");
    }
}
