//! What Kubernetes' settings of a component change in its objects, and the objects that go with a Deployment.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::InstallError;
use super::path::{self, merge};
use super::resolve::Part;
use super::spec::K8s;

/// Applies the settings to a Deployment, whose main container is called `container`.
pub(super) fn tune(deployment: &mut Value, container: &str, part: &Part) {
    let k8s = &part.k8s;
    let spec = &mut deployment["spec"];
    // With an autoscaler the number is the autoscaler's: applying one would undo its work.
    if part.autoscale.is_none() && k8s.hpa_spec.is_empty() {
        spec["replicas"] = json!(k8s.replica_count.unwrap_or(1));
    }
    if let Some(strategy) = &k8s.strategy {
        spec["strategy"] = strategy.clone();
    }
    let template = &mut spec["template"];
    texts(
        &mut template["metadata"],
        "annotations",
        &k8s.pod_annotations,
    );
    texts(&mut template["metadata"], "labels", &k8s.pod_labels);
    let pod = &mut template["spec"];
    texts(pod, "nodeSelector", &k8s.node_selector);
    if let Some(affinity) = &k8s.affinity {
        pod["affinity"] = affinity.clone();
    }
    if !k8s.priority_class_name.is_empty() {
        pod["priorityClassName"] = json!(k8s.priority_class_name);
    }
    if !k8s.security_context.is_empty() {
        over(pod, "securityContext", &k8s.security_context);
    }
    append(pod, "tolerations", &k8s.tolerations);
    append(
        pod,
        "topologySpreadConstraints",
        &k8s.topology_spread_constraints,
    );
    append(pod, "volumes", &k8s.volumes);
    let containers = pod["containers"].as_array_mut().into_iter().flatten();
    for main in containers.filter(|entry| entry["name"] == container) {
        tune_container(main, k8s);
    }
}

fn tune_container(container: &mut Value, k8s: &K8s) {
    if !k8s.image_pull_policy.is_empty() {
        container["imagePullPolicy"] = json!(k8s.image_pull_policy);
    }
    if let Some(resources) = &k8s.resources {
        container["resources"] = resources.clone();
    }
    if let Some(probe) = &k8s.readiness_probe {
        container["readinessProbe"] = probe.clone();
    }
    append(container, "volumeMounts", &k8s.volume_mounts);
    if !k8s.env.is_empty() {
        merge(container, json!({ "env": k8s.env }));
    }
}

fn texts(parent: &mut Value, field: &str, map: &BTreeMap<String, String>) {
    if !map.is_empty() {
        let map = map.iter().map(|(key, value)| (key.clone(), json!(value)));
        over(parent, field, &map.collect());
    }
}

fn over(parent: &mut Value, field: &str, map: &Map<String, Value>) {
    merge(parent, json!({ field: map }));
}

fn append(parent: &mut Value, field: &str, items: &[Value]) {
    if items.is_empty() {
        return;
    }
    match parent[field].as_array_mut() {
        Some(present) => present.extend(items.iter().cloned()),
        None => parent[field] = json!(items),
    }
}

/// Lays the settings of a Service over it.
pub(super) fn tune_service(service: &mut Value, k8s: &K8s) {
    over(service, "spec", &k8s.service);
    texts(
        &mut service["metadata"],
        "annotations",
        &k8s.service_annotations,
    );
}

/// The autoscaler of a Deployment, and how many of its pods a drain leaves.
pub(super) fn companions(
    metadata: &Value,
    selector: &Value,
    part: &Part,
    budget: bool,
) -> Vec<Value> {
    let mut all = Vec::new();
    let scale = part.autoscale.as_ref();
    if scale.is_some() || !part.k8s.hpa_spec.is_empty() {
        let (min, max, cpu) = scale.map_or((1, 5, 80), |scale| (scale.min, scale.max, scale.cpu));
        let target = json!({ "type": "Utilization", "averageUtilization": cpu });
        let mut spec = json!({
            "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": metadata["name"] },
            "minReplicas": min,
            "maxReplicas": max,
            "metrics": [{ "type": "Resource", "resource": { "name": "cpu", "target": target } }],
        });
        merge(&mut spec, Value::Object(part.k8s.hpa_spec.clone()));
        all.push(json!({
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": spec,
        }));
    }
    let own = &part.k8s.pod_disruption_budget;
    if budget || !own.is_empty() {
        let mut spec = json!({ "minAvailable": 1, "selector": { "matchLabels": selector } });
        if own.contains_key("maxUnavailable") {
            // One of the two.
            spec.as_object_mut()
                .and_then(|spec| spec.shift_remove("minAvailable"));
        }
        merge(&mut spec, Value::Object(own.clone()));
        all.push(json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata, "spec": spec,
        }));
    }
    all
}

/// Leaves user and group to the platform.
pub(super) fn without_user(deployment: &mut Value) {
    let pod = &mut deployment["spec"]["template"]["spec"];
    for list in ["containers", "initContainers"] {
        for container in pod[list].as_array_mut().into_iter().flatten() {
            if let Some(context) = container["securityContext"].as_object_mut() {
                context.shift_remove("runAsUser");
                context.shift_remove("runAsGroup");
            }
        }
        if pod[list].is_null() {
            pod.as_object_mut().and_then(|pod| pod.shift_remove(list));
        }
    }
}

/// Applies the overlays of a component to its objects.
///
/// # Errors
/// An object that is not made, and a path that leads nowhere.
pub(super) fn overlay(objects: &mut [Value], k8s: &K8s) -> Result<(), InstallError> {
    for overlay in &k8s.overlays {
        let wrong = |reason: String| InstallError::Overlay {
            kind: overlay.kind.clone(),
            name: overlay.name.clone(),
            reason,
        };
        let object = objects
            .iter_mut()
            .find(|object| {
                object["kind"] == overlay.kind.as_str()
                    && object["metadata"]["name"] == overlay.name.as_str()
            })
            .ok_or_else(|| wrong("this component has no such object".to_owned()))?;
        for patch in &overlay.patches {
            let steps = path::parse(&patch.path).map_err(wrong)?;
            match &patch.value {
                Some(value) => path::set(object, &steps, value.clone()).map_err(wrong)?,
                None if path::remove(object, &steps).map_err(wrong)? => {}
                None => return Err(wrong(format!("{} is not there", patch.path))),
            }
        }
    }
    Ok(())
}
