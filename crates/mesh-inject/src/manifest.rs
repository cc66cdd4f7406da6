//! Objects that have a pod in them: what `kube-inject` changes in a manifest.

use serde_json::Value;

use crate::{InjectContext, InjectError, Outcome, Workload, inject};

/// Lists may hold lists, this deep.
const DEPTH: usize = 8;

/// An object of a manifest after injection.
#[derive(Debug, Clone, PartialEq)]
pub struct Injected {
    /// The object, changed or as it was.
    pub object: Value,
    /// What the person should know, with the object's kind and name: why it was left alone, and warnings.
    pub notes: Vec<String>,
}

/// Injects the pods in an object: pods, workloads with a pod template, and lists of them. Everything else comes back as it was.
///
/// The object's own namespace counts before that of the context, and each workload is the one that its pods belong to.
///
/// # Errors
/// As [`inject`], where a pod is to be injected and can't be; the error is that of the first such pod.
pub fn inject_manifest(
    object: &Value,
    context: &InjectContext<'_>,
) -> Result<Injected, (String, InjectError)> {
    let mut injected = Injected {
        object: object.clone(),
        notes: Vec::new(),
    };
    walk(&mut injected.object, context, DEPTH, &mut injected.notes)?;
    Ok(injected)
}

fn walk(
    object: &mut Value,
    context: &InjectContext<'_>,
    depth: usize,
    notes: &mut Vec<String>,
) -> Result<(), (String, InjectError)> {
    let text = |pointer: &str| {
        let text = object.pointer(pointer).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let (api_version, kind) = (text("/apiVersion"), text("/kind"));
    let (name, namespace) = (text("/metadata/name"), text("/metadata/namespace"));
    if depth > 0
        && kind.ends_with("List")
        && let Some(items) = object.get_mut("items").and_then(Value::as_array_mut)
    {
        return items
            .iter_mut()
            .try_for_each(|item| walk(item, context, depth - 1, notes));
    }
    let Some(path) = pod_path(&api_version, &kind) else {
        return Ok(());
    };
    let Some(pod) = object.pointer_mut(path).filter(|pod| !pod.is_null()) else {
        return Ok(());
    };
    let namespace = match namespace.as_str() {
        "" => context.namespace,
        own => own,
    };
    let place = format!("{kind} {namespace}/{name}");
    let workload = Workload {
        api_version,
        kind: kind.clone(),
        name,
    };
    let context = InjectContext {
        namespace,
        workload: (kind != "Pod").then_some(&workload),
        ..*context
    };
    match inject(pod, &context).map_err(|error| (place.clone(), error))? {
        Outcome::Patched(patched) => {
            let warnings = patched.warnings.iter();
            notes.extend(warnings.map(|warning| format!("{place}: {warning}")));
            *pod = patched.pod;
        }
        Outcome::Skipped(skip) => notes.push(format!("{place}: left as it is: {skip}")),
    }
    Ok(())
}

/// Where the pod of a kind is, as a JSON pointer; `None` for kinds without one.
fn pod_path(api_version: &str, kind: &str) -> Option<&'static str> {
    let group = match api_version.split_once('/') {
        Some((group, _)) => group,
        None => "",
    };
    Some(match (group, kind) {
        ("", "Pod") => "",
        ("batch", "CronJob") => "/spec/jobTemplate/spec/template",
        ("", "ReplicationController")
        | ("apps" | "extensions", "Deployment" | "ReplicaSet" | "DaemonSet")
        | ("apps", "StatefulSet")
        | ("batch", "Job")
        | ("apps.openshift.io", "DeploymentConfig") => "/spec/template",
        _ => return None,
    })
}
