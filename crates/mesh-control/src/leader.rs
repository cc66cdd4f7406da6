//! Which of several control planes writes statuses: the holder of a Lease, as Kubernetes' own controllers elect theirs.
//!
//! Among control planes of several revisions it is one of the default revision, as in Istio: it takes the Lease from those of others.

use std::sync::Arc;
use std::time::Duration;

use kube::Api;
use kube::api::{ListParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::{DEFAULT_REVISION, Options};

/// Istio's name for the election of who writes statuses.
const LEASE: &str = "istio-status-leader";
/// A holder that has not renewed for so long has lost the lease.
const DURATION: Duration = Duration::from_secs(15);
/// Time from one look to the next; a holder renews so often.
const RETRY: Duration = Duration::from_secs(4);

/// Annotation of the Lease: the holder's revision.
const REVISION: &str = "istio.io/rev";

/// Where a leader is told so.
pub(crate) type Leading = watch::Sender<bool>;
/// Whether this control plane is the leader.
pub(crate) type Leader = watch::Receiver<bool>;

pub(crate) fn new() -> (Leading, Leader) {
    watch::channel(false)
}

/// What was last seen of the lease, and since when it has been so: clocks of other machines are not trusted, only that a renewal changes it.
struct Seen {
    record: Value,
    since: Instant,
}

/// Takes part in the election as `identity`, for ever.
pub(crate) async fn run(options: Arc<Options>, identity: String, leading: Leading) {
    let (api, resource) = leases(&options);
    let mut seen = None;
    let mut renewed = Instant::now();
    loop {
        let empty = DynamicObject::new(LEASE, &resource).within(&options.namespace);
        match attempt(&options, &api, empty, &identity, &mut seen).await {
            Ok(holds) => {
                renewed = Instant::now();
                if leading.send_if_modified(|state| std::mem::replace(state, holds) != holds) {
                    tracing::info!(identity, leader = holds, "election of who writes statuses");
                }
            }
            Err(kube::Error::Api(status)) if status.code == 403 || status.code == 404 => {
                // A cluster without leases, or an installation that may not use them, has one control plane.
                if leading.send_if_modified(|state| !std::mem::replace(state, true)) {
                    tracing::warn!(
                        reason = status.message,
                        "no Lease can be used; statuses are written without an election"
                    );
                }
            }
            Err(error) => {
                tracing::debug!(%error, "renewing the lease");
                if renewed.elapsed() > DURATION {
                    leading.send_replace(false);
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Gives the lease up, so that another control plane need not wait for it to run out.
pub(crate) async fn resign(options: &Options, identity: &str, leader: &Leader) {
    if !*leader.borrow() {
        return;
    }
    let (api, _) = leases(options);
    if let Ok(mut lease) = api.get(LEASE).await
        && lease.data["spec"]["holderIdentity"] == json!(identity)
    {
        lease.data["spec"]["holderIdentity"] = json!("");
        let _ = api.replace(LEASE, &PostParams::default(), &lease).await;
    }
}

fn leases(options: &Options) -> (Api<DynamicObject>, ApiResource) {
    let gvk = GroupVersionKind::gvk("coordination.k8s.io", "v1", "Lease");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "leases");
    let api = Api::namespaced_with(options.client.clone(), &options.namespace, &resource);
    (api, resource)
}

/// Takes or renews the lease; true if it is ours. Another's write between reading and writing is a conflict, and so another's lease.
async fn attempt(
    options: &Options,
    api: &Api<DynamicObject>,
    empty: DynamicObject,
    identity: &str,
    seen: &mut Option<Seen>,
) -> Result<bool, kube::Error> {
    let params = PostParams::default();
    let Some(mut lease) = api.get_opt(LEASE).await? else {
        let mut lease = empty;
        lease.data = json!({ "spec": spec(identity, 0) });
        sign(&mut lease, options);
        return unless_taken(api.create(&params, &lease).await);
    };
    let record = lease.data["spec"].clone();
    if seen.as_ref().is_none_or(|seen| seen.record != record) {
        *seen = Some(Seen {
            record: record.clone(),
            since: Instant::now(),
        });
    }
    let holder = record["holderIdentity"].as_str().unwrap_or_default();
    let run_out = seen
        .as_ref()
        .is_some_and(|seen| seen.since.elapsed() > DURATION);
    if holder != identity && !holder.is_empty() && !run_out {
        let theirs = lease.metadata.annotations.as_ref();
        let theirs = theirs.and_then(|all| all.get(REVISION));
        let other = theirs.is_some_and(|revision| *revision != options.revision);
        if !other || default_revision(options).await? != options.revision {
            return Ok(false);
        }
    }
    let transitions = record["leaseTransitions"].as_i64().unwrap_or(0);
    let mut next = spec(identity, transitions + i64::from(holder != identity));
    if holder == identity {
        next["acquireTime"] = record["acquireTime"].clone();
    }
    lease.data["spec"] = next;
    sign(&mut lease, options);
    unless_taken(api.replace(LEASE, &params, &lease).await)
}

fn sign(lease: &mut DynamicObject, options: &Options) {
    let annotations = lease.metadata.annotations.get_or_insert_default();
    annotations.insert(REVISION.to_owned(), options.revision.clone());
}

/// The revision that answers where none is named: the one that the tag of this name stands for, if there is one.
async fn default_revision(options: &Options) -> Result<String, kube::Error> {
    let gvk = GroupVersionKind::gvk(
        "admissionregistration.k8s.io",
        "v1",
        "MutatingWebhookConfiguration",
    );
    let resource = ApiResource::from_gvk_with_plural(&gvk, "mutatingwebhookconfigurations");
    let api: Api<DynamicObject> = Api::all_with(options.client.clone(), &resource);
    let tag = ListParams::default().labels(&format!("istio.io/tag={DEFAULT_REVISION}"));
    let found = api.list(&tag).await?.items.into_iter().next();
    let labels = found.and_then(|tag| tag.metadata.labels);
    let revision = labels.and_then(|mut labels| labels.remove(REVISION));
    Ok(revision.unwrap_or_else(|| DEFAULT_REVISION.to_owned()))
}

fn unless_taken(written: Result<DynamicObject, kube::Error>) -> Result<bool, kube::Error> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

fn spec(identity: &str, transitions: i64) -> Value {
    // MicroTime: six digits of fraction, always.
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ");
    let now = now.to_string();
    json!({
        "holderIdentity": identity,
        "leaseDurationSeconds": DURATION.as_secs(),
        "acquireTime": now,
        "renewTime": now,
        "leaseTransitions": transitions,
    })
}

/// The pod's name and a number, since a pod that was killed leaves its name to the next.
pub(crate) fn identity() -> String {
    use std::hash::{BuildHasher, RandomState};
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let number = RandomState::new().hash_one("election");
    format!("{}_{number:016x}", host.trim())
}
