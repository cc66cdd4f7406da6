//! The control loops of the local cluster: what Kubernetes' controller manager and scheduler do, for the kinds that are
//! served here.
//!
//! Every loop has the same three places: a [`cache`] of watched objects (gather), a pure function that says what is missing
//! (plan; these have the tests), and a `reconcile` that writes it (execute). A change of an object puts the keys that it
//! concerns into the loop's [`queue`]; nothing is polled. Writes go back into the cache at once, so a loop sees its own
//! writes before the watch brings them.
//!
//! The certificate of the cluster's root reaches pods through the ConfigMap `kube-root-ca.crt`, which [`namespace`] copies
//! from `kube-system` to every namespace: whoever starts the API server puts it there.

mod cache;
mod deployment;
mod endpoints;
mod endpointslice;
mod events;
mod garbage;
mod membership;
mod namespace;
mod pod;
mod podgc;
mod queue;
mod replicaset;
mod scheduler;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use tokio_util::sync::CancellationToken;

use cache::Cache;
use events::Recorder;

/// A write that the API refused, or that did not reach it.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {source}")]
pub(crate) struct Error {
    doing: String,
    #[source]
    source: kube::Error,
}

impl Error {
    /// Whether another writer was faster: the newer object is on its way and brings a fresh try.
    fn is_conflict(&self) -> bool {
        matches!(&self.source, kube::Error::Api(status) if status.code == 409)
    }
}

/// What a reconcile asks for: nothing more until the next change, or another look after a time.
type Outcome = Result<Option<Duration>, Error>;

/// Adds to an API error what was being done.
trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> Doing<T> for Result<T, kube::Error> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error {
            doing: what(),
            source,
        })
    }
}

fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// What all loops share.
struct Context {
    client: Client,
    events: Recorder,
    deployments: Arc<Cache<Deployment>>,
    replica_sets: Arc<Cache<ReplicaSet>>,
    pods: Arc<Cache<Pod>>,
    services: Arc<Cache<Service>>,
    endpoints: Arc<Cache<Endpoints>>,
    slices: Arc<Cache<EndpointSlice>>,
    nodes: Arc<Cache<Node>>,
    namespaces: Arc<Cache<Namespace>>,
    service_accounts: Arc<Cache<ServiceAccount>>,
    config_maps: Arc<Cache<ConfigMap>>,
}

impl Context {
    fn new(client: Client, shutdown: &CancellationToken) -> Self {
        Self {
            events: Recorder::start(client.clone(), shutdown.clone()),
            client,
            deployments: Cache::new(),
            replica_sets: Cache::new(),
            pods: Cache::new(),
            services: Cache::new(),
            endpoints: Cache::new(),
            slices: Cache::new(),
            nodes: Cache::new(),
            namespaces: Cache::new(),
            service_accounts: Cache::new(),
            config_maps: Cache::new(),
        }
    }
}

/// Runs all controllers until `shutdown`. `client` needs full access; it may be an in-process one.
///
/// Failed writes are retried with growing pauses and logged; the function itself does not fail.
pub async fn run(client: Client, shutdown: CancellationToken) {
    let context = Arc::new(Context::new(client.clone(), &shutdown));
    // Loops subscribe to the caches before these begin to fill, so that no object is missed.
    let queues = [
        deployment::queue(&context),
        replicaset::queue(&context),
        scheduler::queue(&context),
        endpoints::queue(&context),
        endpointslice::queue(&context),
        endpointslice::mirror_queue(&context),
        namespace::queue(&context),
        podgc::queue(&context),
    ];
    let mut tasks = vec![
        tokio::spawn(
            context
                .deployments
                .clone()
                .watch(client.clone(), shutdown.clone()),
        ),
        tokio::spawn(
            context
                .replica_sets
                .clone()
                .watch(client.clone(), shutdown.clone()),
        ),
        tokio::spawn(context.pods.clone().watch(client.clone(), shutdown.clone())),
        tokio::spawn(
            context
                .services
                .clone()
                .watch(client.clone(), shutdown.clone()),
        ),
        tokio::spawn(
            context
                .endpoints
                .clone()
                .watch(client.clone(), shutdown.clone()),
        ),
        tokio::spawn(
            context
                .slices
                .clone()
                .watch(client.clone(), shutdown.clone()),
        ),
        tokio::spawn(
            context
                .nodes
                .clone()
                .watch(client.clone(), shutdown.clone()),
        ),
        tokio::spawn(
            context
                .namespaces
                .clone()
                .watch(client.clone(), shutdown.clone()),
        ),
        tokio::spawn(
            context
                .service_accounts
                .clone()
                .watch(client.clone(), shutdown.clone()),
        ),
        tokio::spawn(
            context
                .config_maps
                .clone()
                .watch(client.clone(), shutdown.clone()),
        ),
        tokio::spawn(garbage::run(client.clone(), shutdown.clone())),
    ];
    // A loop that decides on half a list would create what exists already.
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = context.synced() => {
            let [deployment, replicaset, scheduler, endpoints, slices, mirror, namespace, podgc] = queues;
            endpoints::publish_api_server(&context).await;
            tasks.push(tokio::spawn(queue::run(deployment, context.clone(), shutdown.clone(), deployment::reconcile)));
            tasks.push(tokio::spawn(queue::run(replicaset, context.clone(), shutdown.clone(), replicaset::reconcile)));
            tasks.push(tokio::spawn(queue::run(scheduler, context.clone(), shutdown.clone(), scheduler::reconcile)));
            tasks.push(tokio::spawn(queue::run(endpoints, context.clone(), shutdown.clone(), endpoints::reconcile)));
            tasks.push(tokio::spawn(queue::run(slices, context.clone(), shutdown.clone(), endpointslice::reconcile)));
            tasks.push(tokio::spawn(queue::run(mirror, context.clone(), shutdown.clone(), endpointslice::mirror)));
            tasks.push(tokio::spawn(queue::run(namespace, context.clone(), shutdown.clone(), namespace::reconcile)));
            tasks.push(tokio::spawn(queue::run(podgc, context.clone(), shutdown.clone(), podgc::reconcile)));
        }
    }
    join_all(tasks).await;
}

impl Context {
    async fn synced(&self) {
        self.deployments.synced().await;
        self.replica_sets.synced().await;
        self.pods.synced().await;
        self.services.synced().await;
        self.endpoints.synced().await;
        self.slices.synced().await;
        self.nodes.synced().await;
        self.namespaces.synced().await;
        self.service_accounts.synced().await;
        self.config_maps.synced().await;
    }
}
