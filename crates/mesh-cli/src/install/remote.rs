//! The parts of a cluster whose control plane is elsewhere: webhooks, and a Service that stands for the control plane.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::resolve::Resolved;
use super::{metadata, webhooks};

/// Objects of a remote cluster.
pub(super) fn objects(settings: &Resolved) -> Vec<Value> {
    let labels =
        json!({ "app": "istiod", "istio": "istiod-remote", "istio.io/rev": settings.revision });
    let name = settings.revisioned("istiod");
    let mut all = service(settings, &name, labels);
    all.push(webhooks::mutating(settings));
    // Validation has no URL of its own: it needs the Service.
    if !settings.spec.values.global.remote_pilot_address.is_empty() {
        all.push(webhooks::validating(settings));
    }
    all.extend(webhooks::tags(settings));
    all
}

/// A name becomes an alias, an address an endpoint.
fn service(settings: &Resolved, name: &str, labels: Value) -> Vec<Value> {
    let address = settings.spec.values.global.remote_pilot_address.as_str();
    if address.is_empty() {
        return Vec::new();
    }
    let port = |name: &str, port: u16| json!({ "name": name, "port": port, "protocol": "TCP" });
    let ports = [port("tcp-istiod", 15012), port("tcp-webhook", 15017)];
    let own = metadata(name, &settings.namespace, labels);
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": own,
        "spec": { "ports": [
            { "name": "tcp-istiod", "port": 15012, "targetPort": 15012, "protocol": "TCP" },
            { "name": "tcp-webhook", "port": 443, "targetPort": 15017, "protocol": "TCP" },
        ] },
    });
    let Ok(ip) = address.parse::<IpAddr>() else {
        service["spec"]["type"] = json!("ExternalName");
        service["spec"]["externalName"] = json!(address);
        return vec![service];
    };
    let mut of = own;
    of["labels"]["kubernetes.io/service-name"] = json!(name);
    of["labels"]["endpointslice.kubernetes.io/managed-by"] = json!("mesh");
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": of,
        "addressType": if ip.is_ipv4() { "IPv4" } else { "IPv6" },
        "endpoints": [{ "addresses": [address], "conditions": { "ready": true } }],
        "ports": ports,
    });
    vec![service, slice]
}
