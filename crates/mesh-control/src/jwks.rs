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

use crate::Options;
use crate::publish::Newest;
use crate::watch::Change;

mod fetch;
mod kept;
mod range;

use fetch::{FetchError, Fetcher};
use kept::Kept;
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

/// Where keys come from: the network, and the last good ones from the cluster. Clones share both.
#[derive(Clone)]
pub(crate) struct Keys {
    fetcher: Fetcher,
    kept: Kept,
}

impl Keys {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            fetcher: Fetcher::new(&options.blocked_key_ranges),
            kept: Kept::new(options),
        }
    }
}

/// Fetches all keys that objects refer to, before the first mesh is published: proxies must not lose the keys that they have only because the control
/// plane was started anew. What can't be had in a moment is as good as it was last, and left to [`keep`].
pub(crate) async fn prefetch(keys: &Keys, objects: &mut Objects) {
    let mut sources = BTreeSet::new();
    for (_, object) in objects.istio_objects() {
        if let AnyObject::RequestAuthentication(policy) = object.as_ref() {
            sources.extend(policy.spec.jwt_rules.iter().filter_map(KeySource::of));
        }
    }
    if sources.is_empty() {
        return;
    }
    let mut missing = sources.clone();
    let fetch = |source: KeySource| async move {
        let fetched = keys.fetcher.keys(&source).await;
        (source, fetched)
    };
    let mut running: FuturesUnordered<_> = sources.into_iter().map(fetch).collect();
    let mut limit = std::pin::pin!(tokio::time::sleep(PREFETCH));
    loop {
        tokio::select! {
            fetched = running.next() => match fetched {
                Some((source, Ok(keys))) => {
                    missing.remove(&source);
                    objects.set_jwks(source, &keys);
                }
                // An address that may not be asked (any more) is none whose keys count.
                Some((source, Err(FetchError::Blocked { .. }))) => {
                    missing.remove(&source);
                }
                // It is told when it is tried again.
                Some((_, Err(_))) => {}
                None => break,
            },
            () = &mut limit => break,
        }
    }
    for (source, found) in keys.kept.read(&missing).await {
        tracing::warn!(
            ?source,
            "the keys of an issuer can't be fetched; those that were good when they were fetched last are used"
        );
        objects.set_jwks(source, &found);
    }
}

/// Fetches what the newest mesh refers to, for ever.
pub(crate) async fn keep(mut newest: Newest, changes: mpsc::Sender<Change>, keys: Keys) {
    let mut tasks = JoinSet::new();
    let mut running: BTreeMap<KeySource, (Option<Duration>, tokio::task::AbortHandle)> =
        BTreeMap::new();
    loop {
        let wanted = newest
            .borrow_and_update()
            .as_ref()
            .map(|published| published.mesh.key_sources())
            .unwrap_or_default();
        if newest.borrow().is_some() {
            keys.kept.retain(wanted.keys()).await;
        }
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
                let one = one(keys.clone(), source, limit, changes.clone());
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
    keys: Keys,
    source: KeySource,
    limit: Option<Duration>,
    changes: mpsc::Sender<Change>,
) {
    let mut pause = Pause::default();
    loop {
        let fetched = match tokio::time::timeout(
            limit.unwrap_or(TIMEOUT),
            keys.fetcher.keys(&source),
        )
        .await
        {
            Ok(fetched) => fetched,
            Err(_) => Err(fetch::FetchError::Slow),
        };
        let wait = match fetched {
            Ok(fetched) => {
                // They are in force before they are kept: the API may be slow.
                let change = Change::Keys(source.clone(), fetched.clone());
                if changes.send(change).await.is_err() {
                    return;
                }
                keys.kept.write(&source, &fetched).await;
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
    use std::net::SocketAddr;
    use std::sync::{Arc, Mutex};

    use axum::response::IntoResponse;
    use serde_json::{Value, json};

    use super::fetch::fake::{everywhere, ok, server};
    use super::*;

    type Map = Arc<Mutex<Option<Value>>>;

    /// A cluster that has one ConfigMap.
    fn cluster(map: &Map) -> Options {
        let map = Arc::clone(map);
        let handle = move |method: axum::http::Method, body: axum::body::Bytes| {
            let map = Arc::clone(&map);
            async move {
                let mut map = map.lock().expect("no panic");
                let body: Value = serde_json::from_slice(&body).unwrap_or_default();
                match (method.as_str(), map.as_mut()) {
                    ("POST", None) => *map = Some(body),
                    ("PATCH", Some(map)) => json_patch::merge(map, &body),
                    ("GET", Some(_)) => {}
                    _ => {
                        let gone = json!({ "kind": "Status", "status": "Failure", "message": "none", "reason": "NotFound", "code": 404 });
                        return (axum::http::StatusCode::NOT_FOUND, axum::Json(gone))
                            .into_response();
                    }
                }
                axum::Json(map.clone()).into_response()
            }
        };
        let router = axum::Router::new().fallback(handle);
        Options::new(kube::Client::new(router, "default"), "0.1.0")
    }

    fn keys(options: &Options) -> Keys {
        Keys {
            fetcher: everywhere(),
            ..Keys::new(options)
        }
    }

    /// Objects with a rule whose keys are there.
    fn objects(uri: &str) -> Objects {
        let policy = json!({
            "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
            "metadata": { "name": "r", "namespace": "default" },
            "spec": { "jwtRules": [{ "issuer": "i", "jwksUri": uri }] },
        });
        let mut objects = Objects::default();
        objects.upsert(mesh_model::Item::Istio(
            mesh_api::parse(&policy).expect("a policy"),
        ));
        objects
    }

    #[tokio::test]
    async fn the_last_good_keys_outlive_the_control_plane_while_the_issuer_is_away() {
        const KEYS: &str = r#"{"keys":[{"kty":"EC","kid":"last"}]}"#;
        let map = Map::default();
        let options = cluster(&map);
        let address = server(ok(KEYS)).await;
        let source = KeySource::Jwks(format!("http://{address}/"));
        let fetched = everywhere().keys(&source).await.expect("keys");
        keys(&options).kept.write(&source, &fetched).await;

        // The issuer is away from here on: nothing listens on that port of that address.
        let away = |address: SocketAddr| format!("http://127.0.0.2:{}/", address.port());
        let entry = |uri: &str| KeySource::Jwks(uri.to_owned());
        let uri = away(address);
        keys(&options).kept.write(&entry(&uri), KEYS).await;
        let known = async |uri: &str| {
            let mut objects = objects(uri);
            prefetch(&keys(&options), &mut objects).await;
            let mesh = mesh_model::Mesh::build(&objects);
            mesh.jwks(&entry(uri)).map(str::to_owned)
        };
        assert_eq!(known(&uri).await.as_deref(), Some(KEYS));
        // Those of another source are none.
        assert_eq!(known(&format!("{uri}other")).await, None);
        // A source that may not be asked has no keys, whatever is kept of it.
        let mut forbidden = objects(&uri);
        prefetch(&Keys::new(&options), &mut forbidden).await;
        assert_eq!(mesh_model::Mesh::build(&forbidden).jwks(&entry(&uri)), None);
        // What is not referred to any more is forgotten, what is stays.
        let later = keys(&options);
        later.kept.retain([entry(&uri)].iter()).await;
        let count = |map: &Map| {
            let map = map.lock().expect("no panic");
            let data = map
                .as_ref()
                .and_then(|map| map["data"].as_object().cloned());
            data.map_or(0, |data| data.len())
        };
        assert_eq!(count(&map), 1);
        // What somebody broke counts for nothing.
        let broken = map.lock().expect("no panic").clone().map(|mut map| {
            for (_, text) in map["data"].as_object_mut().expect("data") {
                *text = json!(text.as_str().expect("text").replace("keys\\\"", "no\\\""));
            }
            map
        });
        *map.lock().expect("no panic") = broken;
        assert_eq!(known(&uri).await, None);
    }

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
