//! Garbage collector: an object goes when all its owners are gone, whatever its kind.
//!
//! It watches the metadata of every kind that the API serves, custom ones included, and keeps the graph of owners
//! (`garbage/graph.rs`, pure). An owner that the graph lacks is looked up in the API before anything is deleted, since the
//! watches of two kinds are not in step.

mod graph;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::{StreamExt as _, pin_mut};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{
    DeleteParams, DynamicObject, Patch, PatchParams, Preconditions, PropagationPolicy,
};
use kube::core::{ApiResource, PartialObjectMeta};
use kube::discovery::{Discovery, Scope, verbs};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Doing as _, Error};
use graph::{FOREGROUND, Graph, Node, ORPHAN, Verdict};

/// Time from a new custom kind to the discovery that finds it: a set of them comes in one go.
const SETTLE: Duration = Duration::from_millis(200);
/// Pause before a failed step is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Changes that may wait for the collector; a watch that is faster waits.
const WAITING: usize = 1024;

/// A kind that is watched.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kind {
    resource: ApiResource,
    namespaced: bool,
}

/// What the watch of a kind reports.
enum Report {
    Seen(Kind, ObjectMeta),
    Gone(Kind, ObjectMeta),
    /// A whole list has been reported; objects of the kind that are not in it are gone.
    Listed(Kind, HashSet<String>),
    /// Look at the object with this uid again.
    Again(String),
}

struct Collector {
    client: Client,
    graph: Graph<Kind>,
    watches: HashMap<Kind, CancellationToken>,
    reports: mpsc::Sender<Report>,
    shutdown: CancellationToken,
}

/// Collects until `shutdown`.
pub(super) async fn run(client: Client, shutdown: CancellationToken) {
    let (reports, mut receiver) = mpsc::channel(WAITING);
    let mut collector = Collector {
        client,
        graph: Graph::default(),
        watches: HashMap::new(),
        reports,
        shutdown: shutdown.clone(),
    };
    let discover = tokio::time::sleep(Duration::ZERO);
    pin_mut!(discover);
    let mut discovering = true;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = &mut discover, if discovering => {
                discovering = false;
                if let Err(error) = collector.discover().await {
                    tracing::warn!(%error, "the garbage collector could not list the API's kinds; trying again");
                    discovering = true;
                    discover.as_mut().reset(tokio::time::Instant::now() + RETRY);
                }
            }
            Some(report) = receiver.recv() => {
                if is_custom_kind(&report) {
                    discovering = true;
                    discover.as_mut().reset(tokio::time::Instant::now() + SETTLE);
                }
                collector.take(report).await;
            }
        }
    }
}

/// Whether the report is about a CustomResourceDefinition, and so about the list of kinds.
fn is_custom_kind(report: &Report) -> bool {
    match report {
        Report::Seen(kind, _) | Report::Gone(kind, _) => {
            kind.resource.kind == "CustomResourceDefinition"
        }
        Report::Listed(..) | Report::Again(_) => false,
    }
}

impl Collector {
    /// Starts a watch for each new kind and ends those of kinds that are served no more.
    async fn discover(&mut self) -> Result<(), Error> {
        let discovery = Discovery::new(self.client.clone())
            .run()
            .await
            .doing(|| "listing the API's kinds".into())?;
        let mut served = HashSet::new();
        for group in discovery.groups() {
            for (resource, capabilities) in group.recommended_resources() {
                let watchable = [verbs::LIST, verbs::WATCH, verbs::DELETE];
                // Events own nothing and are owned by nobody, and there are many.
                if resource.kind == "Event"
                    || !watchable
                        .iter()
                        .all(|verb| capabilities.supports_operation(verb))
                {
                    continue;
                }
                served.insert(Kind {
                    resource,
                    namespaced: capabilities.scope == Scope::Namespaced,
                });
            }
        }
        self.watches.retain(|kind, watch| {
            let stays = served.contains(kind);
            if !stays {
                watch.cancel();
            }
            stays
        });
        for kind in served {
            self.watches.entry(kind.clone()).or_insert_with(|| {
                let stop = self.shutdown.child_token();
                let api = Api::all_with(self.client.clone(), &kind.resource);
                tokio::spawn(watch(api, kind, self.reports.clone(), stop.clone()));
                stop
            });
        }
        Ok(())
    }

    async fn take(&mut self, report: Report) {
        let mut concerned = match report {
            Report::Seen(kind, meta) => self.graph.insert(node(kind, meta)),
            Report::Gone(_, meta) => self.graph.remove(meta.uid.as_deref().unwrap_or_default()),
            Report::Listed(kind, uids) => self.graph.retain(&kind, &uids),
            Report::Again(uid) => vec![uid],
        };
        while let Some(uid) = concerned.pop() {
            if let Err(error) = self.settle(&uid).await {
                if !error.is_conflict() {
                    tracing::warn!(%error, "collecting garbage failed; trying again");
                }
                let (reports, shutdown) = (self.reports.clone(), self.shutdown.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = shutdown.cancelled() => {}
                        () = tokio::time::sleep(RETRY) => { let _ = reports.send(Report::Again(uid)).await; }
                    }
                });
            }
        }
    }

    /// Does what the object's place in the graph asks for.
    async fn settle(&mut self, uid: &str) -> Result<(), Error> {
        let Some(node) = self.graph.get(uid).cloned() else {
            return Ok(());
        };
        if node.ending {
            if node.has_finalizer(ORPHAN) {
                return self.orphan(&node).await;
            }
            if node.has_finalizer(FOREGROUND) {
                return self.end_in_foreground(&node).await;
            }
            return Ok(());
        }
        let mut absent = HashSet::new();
        for owner in &node.owners {
            if self.graph.get(&owner.uid).is_none() && !self.exists(&node, owner).await? {
                absent.insert(owner.uid.clone());
            }
        }
        match graph::judge(&node.owners, &absent) {
            Verdict::Keep => Ok(()),
            Verdict::Delete => self.delete(&node, PropagationPolicy::Background).await,
            Verdict::Detach(owners) => {
                self.patch(&node, json!({ "uid": node.uid, "ownerReferences": owners }))
                    .await
            }
        }
    }

    /// Asks the API whether the owner that a reference names exists. A kind that is not served counts as existing: it may
    /// come, and deleting cannot be undone.
    async fn exists(&self, node: &Node<Kind>, owner: &OwnerReference) -> Result<bool, Error> {
        let group = owner
            .api_version
            .split_once('/')
            .map_or("", |(group, _)| group);
        let matches =
            |kind: &&Kind| kind.resource.group == group && kind.resource.kind == owner.kind;
        let Some(kind) = self.watches.keys().find(matches) else {
            return Ok(true);
        };
        let namespace = if kind.namespaced {
            node.namespace.as_deref()
        } else {
            None
        };
        let found = api(&self.client, kind, namespace)
            .get_metadata_opt(&owner.name)
            .await;
        let found =
            found.doing(|| format!("looking for the owner {} {}", owner.kind, owner.name))?;
        Ok(found.is_some_and(|found| found.metadata.uid.as_deref() == Some(&owner.uid)))
    }

    /// Frees the dependents, then lets the owner go.
    async fn orphan(&self, node: &Node<Kind>) -> Result<(), Error> {
        for dependent in self.graph.dependents(&node.uid) {
            let owners: Vec<_> = dependent
                .owners
                .iter()
                .filter(|owner| owner.uid != node.uid)
                .collect();
            self.patch(
                dependent,
                json!({ "uid": dependent.uid, "ownerReferences": owners }),
            )
            .await?;
        }
        self.drop_finalizer(node, ORPHAN).await
    }

    /// Ends the dependents, and lets the owner go once none that blocks it is left.
    async fn end_in_foreground(&self, node: &Node<Kind>) -> Result<(), Error> {
        let dependents: Vec<_> = self.graph.dependents(&node.uid).collect();
        if !dependents
            .iter()
            .any(|dependent| dependent.blocks(&node.uid))
        {
            return self.drop_finalizer(node, FOREGROUND).await;
        }
        for dependent in dependents.into_iter().filter(|dependent| !dependent.ending) {
            let has_own = self.graph.dependents(&dependent.uid).next().is_some();
            let policy = if has_own {
                PropagationPolicy::Foreground
            } else {
                PropagationPolicy::Background
            };
            self.delete(dependent, policy).await?;
        }
        Ok(())
    }

    async fn drop_finalizer(&self, node: &Node<Kind>, finalizer: &str) -> Result<(), Error> {
        let left: Vec<_> = node
            .finalizers
            .iter()
            .filter(|name| *name != finalizer)
            .collect();
        self.patch(
            node,
            json!({ "resourceVersion": node.version, "finalizers": left }),
        )
        .await
    }

    async fn patch(&self, node: &Node<Kind>, metadata: serde_json::Value) -> Result<(), Error> {
        let api = api(&self.client, &node.kind, node.namespace.as_deref());
        let patch = Patch::Merge(json!({ "metadata": metadata }));
        match api
            .patch_metadata(&node.name, &PatchParams::default(), &patch)
            .await
        {
            Ok(_) => Ok(()),
            Err(error) if super::is_not_found(&error) => Ok(()),
            Err(error) => Err(error).doing(|| format!("changing {node}")),
        }
    }

    async fn delete(&self, node: &Node<Kind>, policy: PropagationPolicy) -> Result<(), Error> {
        let params = DeleteParams {
            propagation_policy: Some(policy),
            preconditions: Some(Preconditions {
                uid: Some(node.uid.clone()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match api(&self.client, &node.kind, node.namespace.as_deref())
            .delete(&node.name, &params)
            .await
        {
            Ok(_) => Ok(()),
            // Gone, or another object of that name.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            Err(error) => Err(error).doing(|| format!("deleting {node}")),
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.resource.kind)
    }
}

fn api(client: &Client, kind: &Kind, namespace: Option<&str>) -> Api<DynamicObject> {
    match namespace.filter(|_| kind.namespaced) {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &kind.resource),
        None => Api::all_with(client.clone(), &kind.resource),
    }
}

fn node(kind: Kind, meta: ObjectMeta) -> Node<Kind> {
    Node {
        kind,
        uid: meta.uid.unwrap_or_default(),
        namespace: meta.namespace,
        name: meta.name.unwrap_or_default(),
        version: meta.resource_version,
        owners: meta.owner_references.unwrap_or_default(),
        finalizers: meta.finalizers.unwrap_or_default(),
        ending: meta.deletion_timestamp.is_some(),
    }
}

/// Reports the changes of one kind until `stop`.
async fn watch(
    api: Api<PartialObjectMeta<DynamicObject>>,
    kind: Kind,
    reports: mpsc::Sender<Report>,
    stop: CancellationToken,
) {
    let stream = watcher(api, watcher::Config::default()).default_backoff();
    pin_mut!(stream);
    let mut listed = HashSet::new();
    loop {
        let event = tokio::select! {
            () = stop.cancelled() => return,
            event = stream.next() => event,
        };
        let report = match event {
            None => return,
            Some(Ok(Event::Init)) => {
                listed.clear();
                continue;
            }
            Some(Ok(Event::InitApply(object))) => {
                listed.extend(object.metadata.uid.clone());
                Report::Seen(kind.clone(), object.metadata)
            }
            Some(Ok(Event::InitDone)) => Report::Listed(kind.clone(), std::mem::take(&mut listed)),
            Some(Ok(Event::Apply(object))) => Report::Seen(kind.clone(), object.metadata),
            Some(Ok(Event::Delete(object))) => Report::Gone(kind.clone(), object.metadata),
            Some(Err(error)) => {
                tracing::debug!(kind = %kind, %error, "watching failed; trying again");
                continue;
            }
        };
        if reports.send(report).await.is_err() {
            return;
        }
    }
}
