//! The end of a CustomResourceDefinition: its objects are deleted first, each with its finalizers honoured, and only then the
//! definition. The finalizer, the condition and its reasons are Kubernetes' (`apiextensions-apiserver`, `crd_finalizer.go`).

use serde_json::{Value, json};

use crate::auth::Identity;
use crate::errors::ApiError;
use crate::request::{Form, Query, Request, Target};
use crate::storage::{Expect, WriteError};
use crate::write::now;
use crate::{ApiServer, delete, registry};

/// Storage key of the definitions.
pub const CRDS: &str = "apiextensions.k8s.io/customresourcedefinitions";
const FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";

/// Storage key of the objects that a definition is about.
pub fn storage_of(definition: &Value) -> String {
    let spec = &definition["spec"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!(
        "{}/{}",
        text(&spec["group"]),
        text(&spec["names"]["plural"])
    )
}

/// The definition with the marks of its deletion, while there are objects to delete; `marked` is what a plain deletion makes of it.
pub fn mark(api: &ApiServer, current: &Value, marked: Option<Value>) -> Option<Value> {
    let empty = api
        .storage()
        .list(&storage_of(current), None)
        .items
        .is_empty();
    let already = has_finalizer(current);
    if empty || already {
        return marked;
    }
    let mut marked = marked.unwrap_or_else(|| {
        let mut marked = current.clone();
        marked["metadata"]["deletionTimestamp"] = now().into();
        marked["metadata"]["deletionGracePeriodSeconds"] = 0.into();
        marked
    });
    push(&mut marked["metadata"]["finalizers"], FINALIZER.into());
    let message = "CustomResource deletion is in progress";
    push(
        &mut marked["status"]["conditions"],
        json!({ "type": "Terminating", "status": "True", "reason": "InstanceDeletionInProgress", "message": message,
                "lastTransitionTime": now() }),
    );
    Some(marked)
}

fn push(list: &mut Value, item: Value) {
    if !list.is_array() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut() {
        list.push(item);
    }
}

fn has_finalizer(definition: &Value) -> bool {
    let finalizers = definition["metadata"]["finalizers"].as_array();
    finalizers.is_some_and(|list| list.iter().any(|name| name == FINALIZER))
}

/// Begins (or, after a restart, resumes) the deletion of the objects of a definition that ends.
pub fn start(api: &ApiServer, definition: &Value) {
    let uid = definition["metadata"]["uid"].as_str().unwrap_or_default();
    let ends = !definition["metadata"]["deletionTimestamp"].is_null();
    if !ends || !has_finalizer(definition) || !api.cleaning().insert(uid.to_owned()) {
        return;
    }
    let (api, definition, uid) = (api.clone(), definition.clone(), uid.to_owned());
    tokio::spawn(async move {
        let closing = api.closing();
        tokio::select! {
            () = closing.cancelled() => {}
            result = clean(&api, &definition) => if let Err(error) = result {
                let name = definition["metadata"]["name"].as_str().unwrap_or_default();
                tracing::error!(
                    %name, %error,
                    "deleting the objects of a definition failed; delete the definition again to resume"
                );
            }
        }
        api.cleaning().remove(&uid);
    });
}

async fn clean(api: &ApiServer, definition: &Value) -> Result<(), ApiError> {
    let storage = storage_of(definition);
    let Some(resource) = registry::custom(definition).into_iter().next() else {
        return let_go(api, definition).await;
    };
    let mut request = Request {
        identity: Identity::admin(),
        target: Target {
            resource: resource.into(),
            namespace: None,
            name: None,
            subresource: None,
        },
        query: Query::default(),
        form: Form::Object,
        yaml: false,
        content_type: String::new(),
        agent: "apiextensions".to_owned(),
    };
    loop {
        let (snapshot, mut changes) = api.storage().list_and_watch(&storage, None);
        if snapshot.items.is_empty() {
            return let_go(api, definition).await;
        }
        for (key, stored) in &snapshot.items {
            if !stored.value["metadata"]["deletionTimestamp"].is_null() {
                continue;
            }
            let (namespace, name) = key.split_once('/').unwrap_or(("", key));
            let namespaced = request.target.resource.namespaced;
            request.target.namespace = namespaced.then(|| namespace.to_owned());
            match delete::remove_unasked(api, &request, name).await {
                Ok(()) => {}
                Err(error) if error.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        // The rest goes when its finalizers are removed. A lag only means that there was a change.
        let _ = changes.receiver.recv().await;
    }
}

/// Takes the finalizer off the definition, which is the end of it when nothing else holds it.
async fn let_go(api: &ApiServer, definition: &Value) -> Result<(), ApiError> {
    let registry = api.registry();
    let Some(resource) = registry.by_storage(CRDS) else {
        return Ok(());
    };
    let name = definition["metadata"]["name"].as_str().unwrap_or_default();
    let key = format!("/{name}");
    loop {
        let Some(current) = api.storage().get(CRDS, &key) else {
            return Ok(());
        };
        if current.value["metadata"]["uid"] != definition["metadata"]["uid"]
            || !has_finalizer(&current.value)
        {
            return Ok(());
        }
        let mut new = current.value.clone();
        if let Some(list) = new["metadata"]["finalizers"].as_array_mut() {
            list.retain(|name| name != FINALIZER);
        }
        if let Some(conditions) = new["status"]["conditions"].as_array_mut() {
            for condition in conditions.iter_mut().filter(|c| c["type"] == "Terminating") {
                condition["status"] = "False".into();
                condition["reason"] = "InstanceDeletionCompleted".into();
                condition["message"] = "removed all instances".into();
                condition["lastTransitionTime"] = now().into();
            }
        }
        let written = if crate::write::is_finished(resource, &new) {
            api.storage().delete(CRDS, &key, current.revision).await
        } else {
            let expect = Expect::Revision(current.revision);
            api.storage().put(CRDS, &key, expect, new).await
        };
        match written {
            Ok(stored) => {
                api.wrote(resource, &stored.value);
                return Ok(());
            }
            Err(WriteError::Changed) => {}
            Err(error) => return Err(ApiError::internal(error)),
        }
    }
}
