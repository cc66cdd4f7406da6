//! Keys of providers: from the configuration, from files, or fetched; kept for all workers together and found without a lock.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use http::header::{ACCEPT, HOST};
use http::{HeaderValue, Request, StatusCode, Uri};
use mesh_identity::jwt::{Jwks, JwtError};
use mesh_routing::Snapshot;
use mesh_routing::filter::jwt_authn::{KeySource, Provider, RemoteKeys};
use mesh_routing::filter::service::HttpService;
use tokio::time::Instant;

use crate::body::RequestBody;
use crate::filter::bucket::Kept;
use crate::filter::call::{self, CallError};
use crate::filter::stats::{Counter, Stats, inc};
use crate::worker::Worker;

/// Longer key sets are not read.
const LONGEST: usize = 1 << 20;
/// Sources of fetched keys that are remembered also while no provider asks for them.
const MOST_SOURCES: usize = 256;
/// After a fetch that failed, requests do not wait for another one so soon.
const PAUSE: Duration = Duration::from_secs(1);
/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// A set of keys in use.
#[derive(Debug)]
pub struct Keys {
    /// Tells sets apart: what one has verified, another one has not.
    pub id: u64,
    /// The keys.
    pub jwks: Jwks,
}

/// What there is for a provider.
pub enum Lookup {
    /// Its keys.
    Ready(Arc<Keys>),
    /// None, for this reason.
    Failed(JwtError),
    /// They have to be fetched ([`fetch`]).
    Fetch,
}

/// The keys of all providers.
#[derive(Debug, Default)]
pub struct Store {
    providers: Kept<Provider, State>,
    remote: Mutex<HashMap<HttpService, Arc<Remote>>>,
}

#[derive(Debug)]
enum State {
    Fixed(Read),
    File(ArcSwap<Read>, AtomicBool),
    Remote(Arc<Remote>),
}

type Read = Result<Arc<Keys>, JwtError>;

fn read(text: &str) -> Read {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let jwks = Jwks::parse(text)?;
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    Ok(Arc::new(Keys { id, jwks }))
}

/// Fetched keys.
#[derive(Debug, Default)]
struct Remote {
    last: ArcSwapOption<Fetched>,
    /// When a fetch last failed.
    failed: ArcSwapOption<Instant>,
    /// One fetch at a time, whichever worker makes it.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Fetched {
    keys: Arc<Keys>,
    /// Then they are fetched again.
    fresh_until: Instant,
    /// Then they are not used any more, whatever fetching says.
    good_until: Instant,
}

impl Store {
    /// What there is for a provider now.
    pub fn lookup(&self, provider: &Arc<Provider>) -> Lookup {
        let state = self.providers.of(provider, || self.state(provider));
        let ready = |read: &Read| match read {
            Ok(keys) => Lookup::Ready(keys.clone()),
            Err(error) => Lookup::Failed(*error),
        };
        match &*state {
            State::Fixed(read) => ready(read),
            State::File(read, watched) => match watched.load(Ordering::Relaxed) {
                true => ready(&read.load()),
                // Fetching a file is looking after it from then on.
                false => Lookup::Fetch,
            },
            State::Remote(remote) => remote.lookup(),
        }
    }

    fn state(&self, provider: &Provider) -> State {
        match &provider.keys {
            KeySource::Inline(text) => {
                let read = read(text);
                if let Err(error) = &read {
                    tracing::warn!(provider = &*provider.name, %error, "the key set in the configuration cannot be used; all tokens are refused");
                }
                State::Fixed(read)
            }
            KeySource::File(_) => State::File(
                ArcSwap::from_pointee(Err(JwtError::JwksNoValidKeys)),
                AtomicBool::new(false),
            ),
            KeySource::Remote(remote) => State::Remote(self.remote(&remote.service)),
        }
    }

    /// Keys of one address are one thing, also for the providers of the next configuration.
    fn remote(&self, service: &HttpService) -> Arc<Remote> {
        let mut all = self.remote.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MOST_SOURCES {
            all.retain(|_, remote| Arc::strong_count(remote) > 1);
        }
        all.entry(service.clone()).or_default().clone()
    }
}

impl Remote {
    fn lookup(&self) -> Lookup {
        let (last, now) = (self.last.load(), Instant::now());
        let good = last.as_ref().filter(|last| now < last.good_until);
        let fresh = good.is_some_and(|last| now < last.fresh_until);
        let failed = self.failed.load();
        let paused = failed.as_ref().is_some_and(|at| now < **at + PAUSE);
        match good {
            Some(last) if fresh || paused => Lookup::Ready(last.keys.clone()),
            None if paused => Lookup::Failed(JwtError::FetchFail),
            _ => Lookup::Fetch,
        }
    }
}

/// Fetches a provider's keys, unless somebody else just has. What comes of it, [`Store::lookup`] tells.
pub async fn fetch(worker: &Rc<Worker>, snapshot: &Snapshot, provider: &Arc<Provider>) {
    let counters = &worker.shared.counters;
    let store = &counters.keys;
    let state = store.providers.of(provider, || store.state(provider));
    match (&*state, &provider.keys) {
        (State::File(current, watched), KeySource::File(path)) => {
            load(provider, path, current).await;
            if !watched.swap(true, Ordering::Relaxed) {
                tokio::task::spawn_local(watch(
                    Arc::downgrade(provider),
                    path.clone(),
                    state.clone(),
                ));
            }
        }
        (State::Remote(remote), KeySource::Remote(source)) => {
            let _turn = remote.turn.lock().await;
            if !matches!(remote.lookup(), Lookup::Fetch) {
                return;
            }
            let outcome = fetch_remote(worker, snapshot, source).await;
            let count = |name: &str| inc(&fetches(&counters.stats, name));
            match outcome {
                Ok(keys) => {
                    let now = Instant::now();
                    count("jwks_fetch_success");
                    remote.failed.store(None);
                    remote.last.store(Some(Arc::new(Fetched {
                        keys,
                        fresh_until: now + source.keep,
                        // The last good keys outlive a failing source, but not for ever.
                        good_until: now + source.keep.saturating_mul(2),
                    })));
                }
                Err(error) => {
                    count("jwks_fetch_failed");
                    tracing::warn!(provider = &*provider.name, error, "fetching keys");
                    remote.failed.store(Some(Arc::new(Instant::now())));
                }
            }
        }
        _ => {}
    }
}

fn fetches(stats: &Stats, name: &str) -> Counter {
    stats.counter(format!("jwt_authn.{name}"))
}

async fn fetch_remote(
    worker: &Rc<Worker>,
    snapshot: &Snapshot,
    source: &RemoteKeys,
) -> Result<Arc<Keys>, String> {
    let mut wait = source.back_off;
    let mut tries = source.retries.min(10) + 1;
    loop {
        let once = fetch_once(worker, snapshot, &source.service);
        let error = match tokio::time::timeout(source.service.timeout, once).await {
            Ok(Ok(text)) => match std::str::from_utf8(&text) {
                Ok(text) => return read(text).map_err(|error| error.to_string()),
                Err(_) => return Err(JwtError::JwksJson.to_string()),
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {:?}", source.service.timeout),
        };
        tries -= 1;
        if tries == 0 {
            return Err(error);
        }
        tokio::time::sleep(wait).await;
        wait = wait.saturating_mul(2).min(Duration::from_secs(10));
    }
}

async fn fetch_once(
    worker: &Rc<Worker>,
    snapshot: &Snapshot,
    service: &HttpService,
) -> Result<bytes::Bytes, CallError> {
    let mut request = Request::new(RequestBody::empty(Rc::default()));
    *request.uri_mut() = service
        .path
        .parse()
        .unwrap_or_else(|_| Uri::from_static("/"));
    let headers = request.headers_mut();
    headers.insert(HOST, service.authority.clone());
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    let (head, body) = call::whole(worker, snapshot, &service.cluster, request, LONGEST).await?;
    match head.status {
        // Redirects are not followed: keys come from where the configuration says.
        StatusCode::OK => Ok(body),
        other => Err(CallError::Status(other)),
    }
}

async fn load(provider: &Provider, path: &Path, current: &ArcSwap<Read>) {
    let text = match tokio::fs::read_to_string(path).await {
        Ok(text) => text,
        Err(error) => {
            tracing::warn!(provider = &*provider.name, path = %path.display(), %error, "reading keys");
            return;
        }
    };
    match read(&text) {
        Ok(keys) => current.store(Arc::new(Ok(keys))),
        // The last good ones stay.
        Err(error) => {
            tracing::warn!(provider = &*provider.name, path = %path.display(), %error, "reading keys");
        }
    }
}

/// Looks after a file as long as there is its provider.
async fn watch(provider: Weak<Provider>, path: PathBuf, state: Arc<State>) {
    let mut seen = modified(&path).await;
    loop {
        tokio::time::sleep(LOOK).await;
        let (Some(provider), State::File(current, _)) = (provider.upgrade(), &*state) else {
            return;
        };
        let now = modified(&path).await;
        if now != seen {
            seen = now;
            load(&provider, &path, current).await;
        }
    }
}

async fn modified(path: &Path) -> Option<(SystemTime, u64)> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

/// Fetches in advance what the snapshot asks to be fetched so, and again each time before it gets old.
pub fn fetch_ahead<'p>(worker: &Rc<Worker>, providers: impl Iterator<Item = &'p Arc<Provider>>) {
    thread_local! {
        /// Providers that are looked after already.
        static KNOWN: RefCell<HashSet<u64>> = RefCell::default();
    }
    for provider in providers {
        let KeySource::Remote(source) = &provider.keys else {
            continue;
        };
        if !KNOWN.with_borrow_mut(|known| known.insert(provider.id)) {
            continue;
        }
        let (worker, id, pause) = (worker.clone(), provider.id, source.keep.max(PAUSE));
        let provider = Arc::downgrade(provider);
        tokio::task::spawn_local(async move {
            while let Some(provider) = provider.upgrade() {
                let snapshot = worker.snapshot();
                fetch(&worker, &snapshot, &provider).await;
                drop((provider, snapshot));
                tokio::time::sleep(pause).await;
            }
            KNOWN.with_borrow_mut(|known| known.remove(&id));
        });
    }
}
