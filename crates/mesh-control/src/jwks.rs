//! Keys of token issuers: fetched here, so that proxies need no way to the outside, and kept up to date. What can't be fetched is tried again; the last
//! good keys stay, and before there are any, proxies refuse every token of the issuer.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_model::KeySource;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::publish::Newest;
use crate::watch::Change;

mod fetch;

/// How often keys are looked at again (Istio's `PILOT_JWT_PUB_KEY_REFRESH_INTERVAL`).
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// Longest time for one fetch where no rule says (Istio's).
const TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses after failures: before the first success, and after it.
const FIRST_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
const LATER_RETRY: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// Fetches what the newest mesh refers to, for ever.
pub(crate) async fn keep(mut newest: Newest, changes: mpsc::Sender<Change>) {
    let fetcher = fetch::Fetcher::new();
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
    fetcher: fetch::Fetcher,
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
