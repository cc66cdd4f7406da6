//! Objects for the tests.

use serde_json::{Value, json};

use crate::api::Api;

/// Two namespaces, a node, our ConfigMaps, and a service `reviews` with two versions of one pod each.
pub fn bookinfo(api: &Api) {
    for (name, labels) in [
        ("default", json!({"istio-injection": "enabled"})),
        ("istio-system", json!({})),
    ] {
        api.apply("namespaces", json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}));
    }
    api.apply(
        "nodes",
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "mesh-node"}, "status": {"nodeInfo": {"kubeletVersion": "v1.36.0"}}}),
    );
    api.apply(
        "configmaps",
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": ""}}),
    );
    service(api, "reviews");
}

/// A service on port 9080 with pods of versions v1 and v2.
pub fn service(api: &Api, name: &str) {
    let number = name.len();
    api.apply(
        "services",
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"clusterIP": format!("10.96.1.{number}"), "clusterIPs": [format!("10.96.1.{number}")], "selector": {"app": name},
                "ports": [{"name": "http", "port": 9080, "targetPort": 9080, "protocol": "TCP"}]},
        }),
    );
    let mut endpoints = Vec::new();
    for (index, version) in ["v1", "v2"].iter().enumerate() {
        let pod = format!("{name}-{version}");
        let address = format!("10.244.{number}.{}", index + 10);
        api.apply(
            "pods",
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": pod, "namespace": "default", "labels": {"app": name, "version": version}},
                "spec": {"nodeName": "mesh-node", "serviceAccountName": "default", "containers": [{"name": "c", "image": "i"}]},
                "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
            }),
        );
        endpoints.push(json!({
            "addresses": [address], "conditions": {"ready": true}, "nodeName": "mesh-node",
            "targetRef": {"kind": "Pod", "name": pod, "namespace": "default"},
        }));
    }
    api.apply(
        "endpointslices",
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-x"), "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
            "endpoints": endpoints,
            "ports": [{"name": "http", "port": 9080, "protocol": "TCP"}],
        }),
    );
}

/// A VirtualService for `reviews` with this header added to responses, so that versions of it can be told apart.
pub fn virtual_service(marker: &str) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "reviews", "namespace": "default"},
        "spec": {"hosts": ["reviews"], "http": [{
            "name": marker,
            "match": [{"headers": {"end-user": {"exact": marker}}}],
            "route": [{"destination": {"host": "reviews"}}],
        }]},
    })
}

/// An object that no kind of ours can be read from.
pub fn broken() -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "broken", "namespace": "default"},
        "spec": {"hosts": "not a list"},
    })
}
