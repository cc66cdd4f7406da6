//! Pod garbage: pods that no node agent will ever end.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use kube::api::DeleteParams;
use kube::{Api, ResourceExt as _};

use super::queue::{Key, Queue};
use super::{Context, Doing as _, Outcome};

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("podgc");
    let own = queue.clone();
    context.pods.subscribe(move |_, new| {
        if let Some(pod) = new.filter(|pod| pod.metadata.deletion_timestamp.is_some()) {
            own.add(Key::of(&**pod));
        }
    });
    let (own, pods) = (queue.clone(), context.pods.clone());
    context.nodes.subscribe(move |old, new| {
        if let (Some(node), None) = (old, new) {
            for pod in pods
                .all()
                .iter()
                .filter(|pod| node_of(pod) == Some(&node.name_any()))
            {
                own.add(Key::of(&**pod));
            }
        }
    });
    queue
}

fn node_of(pod: &Pod) -> Option<&String> {
    pod.spec.as_ref()?.node_name.as_ref()
}

/// Deletes the pod at once where it was to end before it had a node, or where its node is gone.
pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(pod) = context.pods.get(&key) else {
        return Ok(None);
    };
    let orphaned = match node_of(&pod) {
        None => pod.metadata.deletion_timestamp.is_some(),
        Some(node) => context.nodes.get(&Key::new("", node.clone())).is_none(),
    };
    if !orphaned {
        return Ok(None);
    }
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    match api
        .delete(&key.name, &DeleteParams::default().grace_period(0))
        .await
    {
        Ok(_) => Ok(None),
        Err(error) if super::is_not_found(&error) => Ok(None),
        Err(error) => Err(error).doing(|| format!("deleting the orphaned pod {key}")),
    }
}
