//! Keys of token issuers: fetched here, so that proxies need no way to the outside, and kept up to date. What can't be fetched is tried again; the last
//! good keys stay, and before there are any, proxies refuse every token of the issuer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use mesh_api::AnyObject;
use mesh_model::{KeySource, Objects};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::publish::Newest;
use crate::watch::Change;

mod fetch;
mod range;

pub(crate) use fetch::Fetcher;
pub use range::{Range, RangeError};

/// How often keys are looked at again (Istio's `PILOT_JWT_PUB_KEY_REFRESH_INTERVAL`).
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// Longest time for one fetch where no rule says (Istio's).
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long the first mesh may wait for keys.
const PREFETCH: Duration = Duration::from_secs(2);
/// Pauses after failures: before the first success, and after it.
const FIRST_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
const LATER_RETRY: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// Fetches all keys that objects refer to, before the first mesh is published: proxies must not lose the keys that they have only because the control
/// plane was started anew. What takes longer than a moment is left to [`keep`].
pub(crate) async fn prefetch(fetcher: &Fetcher, objects: &mut Objects) {
    let mut sources = BTreeSet::new();
    for (_, object) in objects.istio_objects() {
        if let AnyObject::RequestAuthentication(policy) = object.as_ref() {
            sources.extend(policy.spec.jwt_rules.iter().filter_map(KeySource::of));
        }
    }
    let fetch = |source: KeySource| async move {
        let keys = fetcher.keys(&source).await;
        (source, keys)
    };
    let mut running: FuturesUnordered<_> = sources.into_iter().map(fetch).collect();
    let mut limit = std::pin::pin!(tokio::time::sleep(PREFETCH));
    loop {
        tokio::select! {
            fetched = running.next() => match fetched {
                Some((source, Ok(keys))) => {
                    objects.set_jwks(source, &keys);
                }
                // It is told when it is tried again.
                Some((_, Err(_))) => {}
                None => return,
            },
            () = &mut limit => return,
        }
    }
}

/// Fetches what the newest mesh refers to, for ever.
pub(crate) async fn keep(mut newest: Newest, changes: mpsc::Sender<Change>, fetcher: Fetcher) {
    let mut tasks = JoinSet::new();
    let mut running: BTreeMap<KeySource, (Option<Duration>, tokio::task::AbortHandle)> =
        BTreeMap::new();
    loop {
        let wanted = newest
            .borrow_and_update()
            .as_ref()
            .map(|published| published.mesh.key_sources())
            .unwrap_or_default();
        let gone: Vec<KeySource> = running
            .iter()
            .filter(|(source, (limit, _))| wanted.get(*source) != Some(limit))
            .map(|(source, _)| source.clone())
            .collect();
        for source in gone {
            if let Some((_, task)) = running.remove(&source) {
                task.abort();
            }
            let forgotten = Change::ForgetKeys(source.clone());
            if !wanted.contains_key(&source) && changes.send(forgotten).await.is_err() {
                return;
            }
        }
        for (source, limit) in wanted {
            running.entry(source.clone()).or_insert_with(|| {
                let one = one(fetcher.clone(), source, limit, changes.clone());
                (limit, tasks.spawn(one))
            });
        }
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            // Ended tasks are only taken away.
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// Keeps the keys of one source up to date.
async fn one(
    fetcher: Fetcher,
    source: KeySource,
    limit: Option<Duration>,
    changes: mpsc::Sender<Change>,
) {
    let mut pause = Pause::default();
    loop {
        let fetched =
            match tokio::time::timeout(limit.unwrap_or(TIMEOUT), fetcher.keys(&source)).await {
                Ok(fetched) => fetched,
                Err(_) => Err(fetch::FetchError::Slow),
            };
        let wait = match fetched {
            Ok(keys) => {
                let change = Change::Keys(source.clone(), keys);
                if changes.send(change).await.is_err() {
                    return;
                }
                pause.succeeded()
            }
            Err(error) => {
                let wait = pause.failed();
                tracing::warn!(
                    ?source, %error, retry_in = ?wait,
                    "fetching the keys of an issuer; its tokens are judged by the last good keys, and refused while there are none"
                );
                wait
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// How long to wait until the next fetch.
#[derive(Default)]
struct Pause {
    known: bool,
    failures: u32,
}

impl Pause {
    fn succeeded(&mut self) -> Duration {
        self.known = true;
        self.failures = 0;
        REFRESH
    }

    fn failed(&mut self) -> Duration {
        let (first, longest) = if self.known { LATER_RETRY } else { FIRST_RETRY };
        let wait = first
            .saturating_mul(1 << self.failures.min(12))
            .min(longest);
        self.failures += 1;
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        let mut pause = Pause::default();
        let secs: Vec<u64> = (0..8).map(|_| pause.failed().as_secs()).collect();
        assert_eq!(secs, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(pause.succeeded(), REFRESH);
        let secs: Vec<u64> = (0..8).map(|_| pause.failed().as_secs()).collect();
        assert_eq!(secs, [60, 120, 240, 480, 960, 1920, 3600, 3600]);
    }
}
