//! All objects of one kind, kept current by a watch and by our own writes.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock};

use futures::{StreamExt as _, pin_mut};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::queue::Key;

/// Told about a change with the object before and after it.
type Listener<K> = Box<dyn Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync>;

/// The objects of kind `K` in all namespaces.
pub(super) struct Cache<K> {
    objects: RwLock<BTreeMap<Key, Arc<K>>>,
    listeners: RwLock<Vec<Listener<K>>>,
    synced: watch::Sender<bool>,
}

impl<K> Cache<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            objects: RwLock::default(),
            listeners: RwLock::default(),
            synced: watch::Sender::new(false),
        })
    }

    /// Calls `listener` at every later change.
    pub(super) fn subscribe(
        &self,
        listener: impl Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync + 'static,
    ) {
        self.listeners
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Box::new(listener));
    }

    pub(super) fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.objects
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned()
    }

    /// The objects of one namespace, in order of their names.
    pub(super) fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let first = Key::new(namespace, "");
        let objects = self.objects.read().unwrap_or_else(PoisonError::into_inner);
        objects
            .range((Bound::Included(first), Bound::Unbounded))
            .take_while(|(key, _)| key.namespace == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    pub(super) fn all(&self) -> Vec<Arc<K>> {
        self.objects
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// Takes in an object that the API answered or a watch reported, unless a newer one is known.
    pub(super) fn observe(&self, object: K) {
        let key = Key::of(&object);
        let new = Arc::new(object);
        let old = {
            let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
            if objects
                .get(&key)
                .is_some_and(|known| version(&**known) >= version(&*new))
            {
                return;
            }
            objects.insert(key, new.clone())
        };
        self.notify(old.as_ref(), Some(&new));
    }

    /// Takes in the end of `object`, unless another one of its name is there already.
    pub(super) fn forget(&self, object: &K) {
        let key = Key::of(object);
        let old = {
            let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
            if objects
                .get(&key)
                .is_none_or(|known| known.uid() != object.uid())
            {
                return;
            }
            objects.remove(&key)
        };
        self.notify(old.as_ref(), None);
    }

    /// Completes once the cache has held a whole list.
    pub(super) async fn synced(&self) {
        // The sender lives in self: waiting cannot fail.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// Keeps the cache current until `shutdown`.
    pub(super) async fn watch(self: Arc<Self>, client: Client, shutdown: CancellationToken) {
        let stream = watcher(Api::<K>::all(client), watcher::Config::default()).default_backoff();
        pin_mut!(stream);
        let mut listed = Vec::new();
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = stream.next() => event,
            };
            match event {
                None => return,
                Some(Ok(Event::Apply(object))) => self.observe(object),
                Some(Ok(Event::Delete(object))) => self.forget(&object),
                Some(Ok(Event::Init)) => listed.clear(),
                Some(Ok(Event::InitApply(object))) => listed.push(object),
                Some(Ok(Event::InitDone)) => self.replace(std::mem::take(&mut listed)),
                Some(Err(error)) => {
                    tracing::warn!(kind = %K::kind(&()), %error, "watching failed; trying again")
                }
            }
        }
    }

    /// Takes in a whole list. Objects that are newer than anything in it are our own writes since, and stay.
    fn replace(&self, listed: Vec<K>) {
        let newest = listed.iter().map(version).max().unwrap_or(0);
        let keys: std::collections::BTreeSet<_> = listed.iter().map(Key::of).collect();
        let gone: Vec<_> = self
            .all()
            .into_iter()
            .filter(|known| !keys.contains(&Key::of(&**known)) && version(&**known) <= newest)
            .collect();
        for object in gone {
            self.forget(&object);
        }
        for object in listed {
            self.observe(object);
        }
        self.synced.send_replace(true);
    }

    fn notify(&self, old: Option<&Arc<K>>, new: Option<&Arc<K>>) {
        for listener in self
            .listeners
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            listener(old, new);
        }
    }
}

/// The object's resource version; the API of the local cluster counts in decimal numbers.
fn version<K: Resource>(object: &K) -> u64 {
    object
        .meta()
        .resource_version
        .as_deref()
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;
    use std::sync::Mutex;

    fn object(name: &str, uid: &str, version: u64) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some("a".into());
        object.metadata.name = Some(name.into());
        object.metadata.uid = Some(uid.into());
        object.metadata.resource_version = Some(version.to_string());
        object
    }

    #[test]
    fn older_reports_do_not_overwrite_our_writes() {
        let cache = Cache::new();
        cache.observe(object("x", "1", 7));
        cache.observe(object("x", "1", 5));
        assert_eq!(version(&*cache.get(&Key::new("a", "x")).unwrap()), 7);
        cache.forget(&object("x", "other", 9));
        assert!(
            cache.get(&Key::new("a", "x")).is_some(),
            "the end of another object of that name"
        );
    }

    #[test]
    fn a_list_removes_what_it_lacks_but_not_what_is_newer() {
        let cache = Cache::new();
        cache.observe(object("old", "1", 3));
        cache.observe(object("ours", "2", 9));
        let changes = Arc::new(Mutex::new(Vec::new()));
        let seen = changes.clone();
        cache.subscribe(move |old, new| {
            let name = |object: Option<&Arc<ConfigMap>>| object.map(|object| object.name_any());
            seen.lock().unwrap().push((name(old), name(new)));
        });
        cache.replace(vec![object("listed", "3", 5)]);
        let names: Vec<_> = cache
            .in_namespace("a")
            .iter()
            .map(|object| object.name_any())
            .collect();
        assert_eq!(names, ["listed", "ours"]);
        assert_eq!(
            *changes.lock().unwrap(),
            [(Some("old".into()), None), (None, Some("listed".into()))]
        );
    }
}
