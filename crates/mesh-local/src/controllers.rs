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

mod autoscaler;
mod cache;
mod control;
mod cronjob;
mod daemonset;
mod deployment;
mod disruption;
mod endpoints;
mod endpointslice;
pub(crate) mod events;
mod garbage;
mod history;
mod job;
mod membership;
mod namespace;
mod pod;
mod podgc;
mod queue;
mod replicaset;
mod scheduler;
mod statefulset;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::apps::v1::{
    ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet,
};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::Client;
use tokio::task::JoinHandle;
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

    /// Whether the object's namespace is ending: what could not be created is not wanted any more.
    fn is_namespace_ending(&self) -> bool {
        let kube::Error::Api(status) = &self.source else {
            return false;
        };
        let causes = status.details.iter().flat_map(|details| &details.causes);
        status.code == 403
            && causes
                .into_iter()
                .any(|cause| cause.reason == "NamespaceTerminating")
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

/// The caches of all kinds that the loops look at: one line here and the kind is watched and waited for.
macro_rules! context {
    ($($field:ident: $kind:ty,)*) => {
        /// What all loops share.
        struct Context {
            client: Client,
            events: Recorder,
            $($field: Arc<Cache<$kind>>,)*
        }

        impl Context {
            fn new(client: Client, shutdown: &CancellationToken) -> Self {
                Self {
                    events: Recorder::start(client.clone(), shutdown.clone()),
                    client,
                    $($field: Cache::new(),)*
                }
            }

            /// Begins to fill the caches.
            fn watch(&self, shutdown: &CancellationToken) -> Vec<JoinHandle<()>> {
                vec![$(tokio::spawn(
                    self.$field.clone().watch(self.client.clone(), shutdown.clone()),
                ),)*]
            }

            /// Completes once every cache has held a whole list.
            async fn synced(&self) {
                $(self.$field.synced().await;)*
            }
        }
    };
}

context! {
    deployments: Deployment,
    replica_sets: ReplicaSet,
    stateful_sets: StatefulSet,
    daemon_sets: DaemonSet,
    revisions: ControllerRevision,
    jobs: Job,
    cron_jobs: CronJob,
    budgets: PodDisruptionBudget,
    autoscalers: HorizontalPodAutoscaler,
    pods: Pod,
    services: Service,
    endpoints: Endpoints,
    slices: EndpointSlice,
    nodes: Node,
    namespaces: Namespace,
    service_accounts: ServiceAccount,
    config_maps: ConfigMap,
}

/// Runs all controllers until `shutdown`. `client` needs full access; it may be an in-process one.
///
/// Failed writes are retried with growing pauses and logged; the function itself does not fail.
pub async fn run(client: Client, shutdown: CancellationToken) {
    let context = Arc::new(Context::new(client.clone(), &shutdown));
    let mut tasks = Vec::new();
    let starts = start_all(&context, &shutdown);
    tasks.extend(context.watch(&shutdown));
    tasks.push(tokio::spawn(garbage::run(client, shutdown.clone())));
    // A loop that decides on half a list would create what exists already.
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = context.synced() => {
            endpoints::publish_api_server(&context).await;
            tasks.extend(starts.into_iter().map(|start| start()));
        }
    }
    join_all(tasks).await;
}

/// Starts one loop.
type Start = Box<dyn FnOnce() -> JoinHandle<()> + Send>;

/// All loops, ready to be started. They subscribe to the caches here, before these begin to fill, so that no object is missed.
fn start_all(context: &Arc<Context>, shutdown: &CancellationToken) -> Vec<Start> {
    macro_rules! starts {
        ($($queue:path => $reconcile:path,)*) => {
            vec![$({
                let (queue, context, shutdown) = ($queue(context), context.clone(), shutdown.clone());
                Box::new(move || tokio::spawn(queue::run(queue, context, shutdown, $reconcile))) as Start
            },)*]
        };
    }
    starts![
        deployment::queue => deployment::reconcile,
        replicaset::queue => replicaset::reconcile,
        statefulset::queue => statefulset::reconcile,
        daemonset::queue => daemonset::reconcile,
        job::queue => job::reconcile,
        cronjob::queue => cronjob::reconcile,
        disruption::queue => disruption::reconcile,
        autoscaler::queue => autoscaler::reconcile,
        scheduler::queue => scheduler::reconcile,
        endpoints::queue => endpoints::reconcile,
        endpointslice::queue => endpointslice::reconcile,
        endpointslice::mirror_queue => endpointslice::mirror,
        namespace::queue => namespace::reconcile,
        podgc::queue => podgc::reconcile,
    ]
}
