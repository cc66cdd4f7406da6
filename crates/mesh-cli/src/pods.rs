//! Finding the pod and container that a person means.

use anyhow::Context as _;
use serde_json::Value;

use crate::cluster::{Cluster, query};
use crate::resources::Resources;

/// Finds the pod of `NAME`, `pod/NAME` or `TYPE/NAME` (the first pod that the object selects).
pub(crate) async fn find(cluster: &Cluster, target: &str) -> anyhow::Result<Value> {
    let (kind, name) = target.split_once('/').unwrap_or(("pods", target));
    if matches!(kind, "pods" | "pod" | "po") {
        return cluster
            .read(&format!(
                "/api/v1/namespaces/{}/pods/{name}",
                cluster.namespace
            ))
            .await;
    }
    let resources = Resources::discover(cluster).await?;
    let resource = resources
        .named(kind)?
        .into_iter()
        .next()
        .with_context(|| format!("no resource type {kind:?}"))?;
    let object = cluster
        .read(&resource.object(&cluster.namespace, name))
        .await?;
    let labels = object
        .pointer("/spec/selector/matchLabels")
        .or_else(|| object.pointer("/spec/selector"))
        .and_then(Value::as_object);
    let labels = labels
        .filter(|labels| !labels.is_empty())
        .with_context(|| format!("{target} selects no pods; name a pod"))?;
    let selector = labels
        .iter()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect::<Vec<_>>()
        .join(",");
    let mut pods = list(cluster, &selector).await?;
    // One that is ready first; else any.
    pods.sort_by_key(|pod| !is_ready(pod));
    pods.into_iter()
        .next()
        .with_context(|| format!("{target} has no pods in namespace {}", cluster.namespace))
}

/// Pods with labels.
pub(crate) async fn list(cluster: &Cluster, selector: &str) -> anyhow::Result<Vec<Value>> {
    let list = cluster
        .read(&format!(
            "/api/v1/namespaces/{}/pods?labelSelector={}",
            cluster.namespace,
            query(selector)
        ))
        .await?;
    Ok(list["items"].as_array().cloned().unwrap_or_default())
}

/// The container that is meant: the one named, else the pod's default, else the first.
pub(crate) fn container(pod: &Value, named: Option<&str>) -> anyhow::Result<String> {
    let names = |list: &str| {
        pod["spec"][list]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|container| container["name"].as_str())
            .collect::<Vec<_>>()
    };
    let (containers, inits) = (names("containers"), names("initContainers"));
    let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
    if let Some(name) = named {
        if containers.contains(&name) || inits.contains(&name) {
            return Ok(name.to_owned());
        }
        anyhow::bail!(
            "pod {pod_name} has no container {name:?}; it has {}",
            [containers, inits].concat().join(", ")
        );
    }
    let default =
        pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
    if let Some(default) = default.filter(|default| containers.contains(default)) {
        return Ok(default.to_owned());
    }
    let first = containers
        .first()
        .with_context(|| format!("pod {pod_name} has no containers"))?;
    if containers.len() > 1 {
        eprintln!(
            "Defaulted container {first:?} out of: {}",
            containers.join(", ")
        );
    }
    Ok((*first).to_owned())
}

fn is_ready(pod: &Value) -> bool {
    pod["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_container_that_is_meant() {
        let mut pod = json!({ "metadata": { "name": "p" }, "spec": { "containers": [{ "name": "a" }, { "name": "b" }], "initContainers": [{ "name": "istio-proxy" }] } });
        assert_eq!(container(&pod, None).expect("first"), "a");
        assert_eq!(
            container(&pod, Some("istio-proxy")).expect("init"),
            "istio-proxy"
        );
        let error = container(&pod, Some("c")).expect_err("unknown").to_string();
        assert!(error.contains("it has a, b, istio-proxy"), "{error}");
        pod["metadata"]["annotations"] = json!({ "kubectl.kubernetes.io/default-container": "b" });
        assert_eq!(container(&pod, None).expect("default"), "b");
    }
}
