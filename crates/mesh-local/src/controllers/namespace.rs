//! Namespace: what every namespace has from the start (the account `default`, the cluster's root certificate), and its end.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::discovery::{Discovery, Scope, verbs};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::queue::{Key, Queue};
use super::{Context, Doing as _, Error, Outcome};

const ACCOUNT: &str = "default";
const ROOT_CERTIFICATE: &str = "kube-root-ca.crt";
/// The namespace from which [`ROOT_CERTIFICATE`] is copied.
const SOURCE: &str = "kube-system";
/// The finalizer (of the spec) that this loop answers for.
const FINALIZER: &str = "kubernetes";
/// Pause between looks at a namespace that still holds something of a kind that is not watched here.
const EMPTYING: Duration = Duration::from_millis(100);

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("namespace");
    let own = queue.clone();
    context.namespaces.subscribe(move |_, new| {
        if let Some(namespace) = new {
            own.add(Key::of(&**namespace));
        }
    });
    let own = queue.clone();
    context.service_accounts.subscribe(move |old, new| {
        if let (Some(account), None) = (old, new) {
            own.add(Key::new("", account.namespace().unwrap_or_default()));
        }
    });
    let (own, namespaces) = (queue.clone(), context.namespaces.clone());
    context.config_maps.subscribe(move |old, new| {
        let Some(map) = new.or(old).filter(|map| map.name_any() == ROOT_CERTIFICATE) else {
            return;
        };
        match map.namespace().unwrap_or_default() {
            source if source == SOURCE => {
                for namespace in namespaces.all() {
                    own.add(Key::of(&*namespace));
                }
            }
            namespace => own.add(Key::new("", namespace)),
        }
    });
    // A pod takes its time to end; its end may be what a namespace waits for.
    let (own, namespaces) = (queue.clone(), context.namespaces.clone());
    context.pods.subscribe(move |old, new| {
        if let (Some(pod), None) = (old, new) {
            let key = Key::new("", pod.namespace().unwrap_or_default());
            if namespaces
                .get(&key)
                .is_some_and(|namespace| namespace.metadata.deletion_timestamp.is_some())
            {
                own.add(key);
            }
        }
    });
    queue
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(namespace) = context.namespaces.get(&key) else {
        return Ok(None);
    };
    if namespace.metadata.deletion_timestamp.is_some() {
        return end(&context, &namespace).await;
    }
    ensure_account(&context, &key.name).await?;
    ensure_certificate(&context, &key.name).await?;
    Ok(None)
}

async fn ensure_account(context: &Context, namespace: &str) -> Result<(), Error> {
    if context
        .service_accounts
        .get(&Key::new(namespace, ACCOUNT))
        .is_some()
    {
        return Ok(());
    }
    let api: Api<ServiceAccount> = Api::namespaced(context.client.clone(), namespace);
    let account = ServiceAccount {
        metadata: meta(namespace, ACCOUNT),
        ..ServiceAccount::default()
    };
    match api.create(&PostParams::default(), &account).await {
        Ok(account) => context.service_accounts.observe(account),
        Err(error) => {
            return unless_settled(error, || {
                format!("creating the service account {namespace}/{ACCOUNT}")
            });
        }
    }
    Ok(())
}

fn meta(namespace: &str, name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.into()),
        namespace: Some(namespace.into()),
        ..ObjectMeta::default()
    }
}

/// No failure where the object is there already, or the namespace has ended meanwhile.
fn unless_settled(error: kube::Error, doing: impl FnOnce() -> String) -> Result<(), Error> {
    match &error {
        kube::Error::Api(status) if matches!(status.code, 403 | 404) => Ok(()),
        kube::Error::Api(status) if status.code == 409 && status.reason == "AlreadyExists" => {
            Ok(())
        }
        _ => Err(error).doing(doing),
    }
}

async fn ensure_certificate(context: &Context, namespace: &str) -> Result<(), Error> {
    let Some(source) = context.config_maps.get(&Key::new(SOURCE, ROOT_CERTIFICATE)) else {
        return Ok(());
    };
    let current = context
        .config_maps
        .get(&Key::new(namespace, ROOT_CERTIFICATE));
    if current
        .as_ref()
        .is_some_and(|current| current.data == source.data)
    {
        return Ok(());
    }
    let api: Api<ConfigMap> = Api::namespaced(context.client.clone(), namespace);
    let result = if current.is_some() {
        let patch = Patch::Merge(json!({ "data": source.data }));
        api.patch(ROOT_CERTIFICATE, &PatchParams::default(), &patch)
            .await
    } else {
        let map = ConfigMap {
            metadata: meta(namespace, ROOT_CERTIFICATE),
            data: source.data.clone(),
            ..ConfigMap::default()
        };
        api.create(&PostParams::default(), &map).await
    };
    match result {
        Ok(map) => context.config_maps.observe(map),
        Err(error) => {
            return unless_settled(error, || {
                format!("writing the ConfigMap {namespace}/{ROOT_CERTIFICATE}")
            });
        }
    }
    Ok(())
}

/// Empties the namespace, then gives up our finalizer so that the API removes it.
async fn end(context: &Context, namespace: &Namespace) -> Outcome {
    let name = namespace.name_any();
    let finalizers = namespace
        .spec
        .as_ref()
        .and_then(|spec| spec.finalizers.clone())
        .unwrap_or_default();
    if !finalizers.iter().any(|finalizer| finalizer == FINALIZER) {
        return Ok(None);
    }
    if empty(context, &name).await? > 0 {
        return Ok(Some(EMPTYING));
    }
    let others: Vec<_> = finalizers
        .into_iter()
        .filter(|finalizer| finalizer != FINALIZER)
        .collect();
    let mut finalized = namespace.clone();
    finalized.spec.get_or_insert_default().finalizers = Some(others);
    let api: Api<Namespace> = Api::all(context.client.clone());
    match api
        .replace_subresource("finalize", &name, &PostParams::default(), &finalized)
        .await
    {
        Ok(_) => Ok(None),
        Err(error) if super::is_not_found(&error) => Ok(None),
        Err(error) => Err(error).doing(|| format!("finalizing the namespace {name}")),
    }
}

/// Deletes everything in the namespace; the number of objects that are still there.
async fn empty(context: &Context, namespace: &str) -> Result<usize, Error> {
    let discovery = Discovery::new(context.client.clone())
        .run()
        .await
        .doing(|| "listing the API's kinds".into())?;
    let mut left = 0;
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let deletable = capabilities.supports_operation(verbs::DELETE)
                && capabilities.supports_operation(verbs::LIST);
            if capabilities.scope != Scope::Namespaced || !deletable {
                continue;
            }
            let api: Api<DynamicObject> =
                Api::namespaced_with(context.client.clone(), namespace, &resource);
            left += empty_kind(&api, &resource.plural, namespace).await?;
        }
    }
    Ok(left)
}

async fn empty_kind(
    api: &Api<DynamicObject>,
    plural: &str,
    namespace: &str,
) -> Result<usize, Error> {
    let list = || async {
        api.list_metadata(&ListParams::default())
            .await
            .doing(|| format!("listing {plural} of {namespace}"))
    };
    let found = list().await?.items;
    for object in found
        .iter()
        .filter(|object| object.metadata.deletion_timestamp.is_none())
    {
        let params = DeleteParams::background();
        match api.delete(&object.name_any(), &params).await {
            Ok(_) => {}
            Err(error) if super::is_not_found(&error) => {}
            Err(error) => {
                return Err(error)
                    .doing(|| format!("deleting {plural} {namespace}/{}", object.name_any()));
            }
        }
    }
    if found.is_empty() {
        Ok(0)
    } else {
        Ok(list().await?.items.len())
    }
}
