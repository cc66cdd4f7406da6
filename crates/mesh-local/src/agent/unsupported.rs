//! What of a pod's spec this node can't do: told as Warning Events by field name, never ignored silently. Pure.

use k8s_openapi::api::core::v1::{Container, Pod};

/// One sentence a field; empty when everything is supported.
pub fn unsupported(pod: &Pod, uids_mapped: bool, cgroups: bool) -> Vec<String> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut add = |wrong: bool, field: &str, why: &str| {
        if wrong {
            found.push(format!("{field} is not applied: {why}"));
        }
    };
    let injected = injected(pod);
    let isolated = "every container has its own PID namespace on this node";
    add(spec.host_pid == Some(true), "spec.hostPID", isolated);
    add(
        spec.share_process_namespace == Some(true),
        "spec.shareProcessNamespace",
        isolated,
    );
    add(
        spec.host_ipc == Some(true),
        "spec.hostIPC",
        "every pod has its own IPC namespace on this node",
    );
    add(
        spec.active_deadline_seconds.is_some(),
        "spec.activeDeadlineSeconds",
        "this node does not watch the deadline",
    );
    add(
        spec.dns_policy.as_deref() == Some("Default"),
        "spec.dnsPolicy: Default",
        "the node has no resolvers of its own, the pod asks the cluster's",
    );
    add(
        spec.runtime_class_name.is_some(),
        "spec.runtimeClassName",
        "containers run as processes of this machine",
    );
    for container in spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
        .filter(|container| !injected.contains(&container.name))
    {
        for (wrong, field, why) in container_fields(container, cgroups) {
            add(
                wrong,
                &format!("{field} of container {}", container.name),
                why,
            );
        }
    }
    if !uids_mapped {
        found.push(
            "user ids are not mapped: without root this machine gives mesh one user only, so all containers run as that one; runAsUser, \
             runAsGroup and fsGroup have no effect"
                .to_owned(),
        );
    }
    found
}

/// Containers that sidecar injection added: nobody wrote their fields who could change them.
fn injected(pod: &Pod) -> Vec<String> {
    let annotations = pod.metadata.annotations.as_ref();
    let status = annotations.and_then(|all| all.get("sidecar.istio.io/status"));
    let status: serde_json::Value = status
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    let names = ["initContainers", "containers"].map(|list| status[list].as_array().cloned());
    let names = names.into_iter().flatten().flatten();
    names
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect()
}

fn container_fields(
    container: &Container,
    cgroups: bool,
) -> Vec<(bool, &'static str, &'static str)> {
    let context = container.security_context.as_ref();
    let limits = container
        .resources
        .as_ref()
        .is_some_and(|r| r.limits.as_ref().is_some_and(|l| !l.is_empty()));
    vec![
        (
            limits && !cgroups,
            "resources.limits",
            "mesh can't write control groups (version 2) here",
        ),
        (
            container.volume_devices.is_some(),
            "volumeDevices",
            "this node has no block devices",
        ),
        (
            container
                .ports
                .iter()
                .flatten()
                .any(|p| p.host_port.is_some_and(|p| p != 0)),
            "hostPort",
            "use a Service of type NodePort or LoadBalancer",
        ),
        (
            context.is_some_and(|c| {
                c.seccomp_profile
                    .as_ref()
                    .is_some_and(|p| p.type_ == "Localhost")
            }),
            "seccompProfile",
            "no profile is loaded",
        ),
        (
            context.is_some_and(|c| c.app_armor_profile.is_some()),
            "appArmorProfile",
            "no profile is loaded",
        ),
        (
            context.is_some_and(|c| c.se_linux_options.is_some()),
            "seLinuxOptions",
            "no label is set",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_named() {
        let pod: Pod = serde_json::from_value(json!({"spec": {"hostPID": true, "containers": [
            {"name": "app", "resources": {"limits": {"cpu": "1"}}}]}}))
        .unwrap();
        let found = unsupported(&pod, true, false);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("spec.hostPID is not applied"));
        assert!(found[1].starts_with("resources.limits of container app is not applied"));
        assert_eq!(unsupported(&pod, true, true).len(), 1);
        let mut injected = pod;
        let status = json!({"initContainers": [], "containers": ["app"]}).to_string();
        injected.metadata.annotations =
            Some([("sidecar.istio.io/status".to_owned(), status)].into());
        assert_eq!(unsupported(&injected, true, false).len(), 1);
    }
}
