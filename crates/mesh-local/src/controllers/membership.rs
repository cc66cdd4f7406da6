//! Which pods serve a Service, and on which ports: what Endpoints and EndpointSlices have in common. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;

use super::events::reference;
use super::pod;

/// One port as a client reaches it at a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) port: i32,
    pub(super) protocol: String,
    pub(super) app_protocol: Option<String>,
}

/// One pod behind a Service.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Member {
    pub(super) address: String,
    pub(super) hostname: Option<String>,
    pub(super) node: Option<String>,
    pub(super) target: ObjectReference,
    /// The pod's own readiness.
    pub(super) serving: bool,
    pub(super) terminating: bool,
    /// Whether clients may use it: serving and not terminating, or published all the same.
    pub(super) ready: bool,
}

/// The members of `service` among `pods` by the ports that they offer (a named target port may be another number in
/// another pod), in order of their names. Members of an empty list of ports belong to a headless Service without ports.
pub(super) fn members(service: &Service, pods: &[Arc<Pod>]) -> BTreeMap<Vec<Port>, Vec<Member>> {
    let mut groups: BTreeMap<Vec<Port>, Vec<Member>> = BTreeMap::new();
    let Some(spec) = &service.spec else {
        return groups;
    };
    let Some(selector) = spec
        .selector
        .as_ref()
        .filter(|selector| !selector.is_empty())
    else {
        return groups;
    };
    let selected = |pod: &&Arc<Pod>| {
        selector
            .iter()
            .all(|(key, value)| pod.labels().get(key) == Some(value))
    };
    for pod in pods.iter().filter(selected) {
        let Some(member) = member(service, pod) else {
            continue;
        };
        let ports: Vec<_> = spec
            .ports
            .iter()
            .flatten()
            .filter_map(|port| resolve(port, pod))
            .collect();
        if ports.is_empty() && spec.ports.as_ref().is_some_and(|ports| !ports.is_empty()) {
            continue; // a pod with none of the named ports
        }
        groups.entry(ports).or_default().push(member);
    }
    groups
}

fn member(service: &Service, pod: &Arc<Pod>) -> Option<Member> {
    let status = pod.status.as_ref()?;
    let address = status
        .pod_ip
        .clone()
        .filter(|address| !address.is_empty())?;
    if pod::is_finished(pod) {
        return None;
    }
    let pod_spec = pod.spec.as_ref();
    let publish = service
        .spec
        .as_ref()
        .and_then(|spec| spec.publish_not_ready_addresses)
        == Some(true);
    let serving = pod::is_ready(pod);
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let in_subdomain =
        pod_spec.and_then(|spec| spec.subdomain.as_deref()) == service.metadata.name.as_deref();
    Some(Member {
        address,
        hostname: pod_spec
            .and_then(|spec| spec.hostname.clone())
            .filter(|_| in_subdomain),
        node: pod_spec.and_then(|spec| spec.node_name.clone()),
        target: ObjectReference {
            resource_version: None,
            api_version: None,
            ..reference(&**pod)
        },
        serving,
        terminating,
        ready: publish || (serving && !terminating),
    })
}

/// The number that `port` leads to in `pod`; `None` where it names a port that the pod does not have.
fn resolve(port: &ServicePort, pod: &Pod) -> Option<Port> {
    let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
    let number = match &port.target_port {
        None | Some(IntOrString::Int(0)) => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => named_port(pod, name, &protocol)?,
    };
    Some(Port {
        name: port.name.clone().unwrap_or_default(),
        port: number,
        protocol,
        app_protocol: port.app_protocol.clone(),
    })
}

fn named_port(pod: &Pod, name: &str, protocol: &str) -> Option<i32> {
    let spec = pod.spec.as_ref()?;
    // Containers and native sidecars alike.
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|init| init.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .find(|port| {
            port.name.as_deref() == Some(name)
                && port.protocol.as_deref().unwrap_or("TCP") == protocol
        })
        .map(|port| port.container_port)
}

/// Whether the Service's endpoints are this controller's to keep.
pub(super) fn is_selecting(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| {
        spec.selector
            .as_ref()
            .is_some_and(|selector| !selector.is_empty())
            && spec.type_.as_deref() != Some("ExternalName")
    })
}

/// Whether the Service has no address of its own.
pub(super) fn is_headless(service: &Service) -> bool {
    service
        .spec
        .as_ref()
        .and_then(|spec| spec.cluster_ip.as_deref())
        == Some("None")
}

/// Whether anything of `old` and `new` differs that a member is made of.
pub(super) fn member_changed(old: &Pod, new: &Pod) -> bool {
    let relevant = |pod: &Pod| {
        (
            pod.metadata.labels.clone(),
            pod.metadata.deletion_timestamp.is_some(),
            pod.status.as_ref().and_then(|status| status.pod_ip.clone()),
            pod::is_ready(pod),
            pod::is_finished(pod),
            pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            pod.metadata.uid.clone(),
        )
    };
    relevant(old) != relevant(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(spec: Value) -> Service {
        serde_json::from_value(
            json!({ "metadata": { "name": "web", "namespace": "a", "uid": "s" }, "spec": spec }),
        )
        .unwrap()
    }

    fn pod(name: &str, port: i32, ready: bool, extra: Value) -> Arc<Pod> {
        let mut pod = json!({
            "metadata": { "name": name, "namespace": "a", "labels": { "app": "web" } },
            "spec": { "nodeName": "n", "containers": [{ "name": "c", "ports": [{ "name": "http", "containerPort": port }] }] },
            "status": { "podIP": format!("10.244.0.{port}"), "phase": "Running",
                        "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }] },
        });
        merge(&mut pod, extra);
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn merge(target: &mut Value, patch: Value) {
        match (target, patch) {
            (Value::Object(target), Value::Object(patch)) => {
                for (key, value) in patch {
                    merge(target.entry(key).or_insert(Value::Null), value);
                }
            }
            (target, patch) => *target = patch,
        }
    }

    fn states(service: &Service, pods: &[Arc<Pod>]) -> Vec<(i32, String, bool, bool, bool)> {
        members(service, pods)
            .into_iter()
            .flat_map(|(ports, members)| {
                let port = ports.first().map_or(0, |port| port.port);
                members.into_iter().map(move |m| {
                    (
                        port,
                        m.target.name.unwrap(),
                        m.ready,
                        m.serving,
                        m.terminating,
                    )
                })
            })
            .collect()
    }

    #[test]
    fn members_are_grouped_by_resolved_ports() {
        let service = service(
            json!({ "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": "http" }] }),
        );
        let other_name = json!({ "spec": { "containers": [{ "name": "c", "ports": [{ "name": "x", "containerPort": 1 }] }] } });
        let pods = [
            pod("a", 81, true, json!({})),
            pod("b", 82, false, json!({})),
            pod(
                "c",
                81,
                true,
                json!({ "metadata": { "deletionTimestamp": "2026-01-01T00:00:00Z" } }),
            ),
            pod(
                "finished",
                81,
                true,
                json!({ "status": { "phase": "Succeeded" } }),
            ),
            pod(
                "unaddressed",
                81,
                true,
                json!({ "status": { "podIP": null } }),
            ),
            pod(
                "other",
                81,
                true,
                json!({ "metadata": { "labels": { "app": "x" } } }),
            ),
            pod("portless", 81, true, other_name),
        ];
        assert_eq!(
            states(&service, &pods),
            [
                (81, "a".into(), true, true, false),
                (81, "c".into(), false, true, true),
                (82, "b".into(), false, false, false),
            ]
        );
    }

    #[test]
    fn unready_members_are_ready_where_published() {
        let spec = json!({ "selector": { "app": "web" }, "publishNotReadyAddresses": true, "clusterIP": "None" });
        let service = service(spec);
        assert!(is_headless(&service));
        assert_eq!(
            states(&service, &[pod("b", 82, false, json!({}))]),
            [(0, "b".into(), true, false, false)]
        );
    }

    #[test]
    fn services_without_selector_have_no_members() {
        let service = service(json!({ "ports": [{ "port": 80 }] }));
        assert!(!is_selecting(&service));
        assert!(members(&service, &[pod("a", 80, true, json!({}))]).is_empty());
    }
}
