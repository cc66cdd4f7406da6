//! Probes of the application that the agent answers in its stead, since the kubelet has no certificate and the ports are captured.
//!
//! Each `httpGet`, `tcpSocket` and `grpc` probe, and each such lifecycle hook, becomes a GET on the agent's port; what it was goes into a variable
//! of the proxy (Istio: `ISTIO_KUBE_APP_PROBERS`), by path.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{PROXY_CONTAINER, annotations::Settings};

/// Variable of the proxy that holds the original probes: a JSON map by path.
pub(crate) const VARIABLE: &str = "ISTIO_KUBE_APP_PROBERS";

/// Fields of a container that hold probes, and the last part of their path.
const PROBES: &[(&str, &str)] = &[
    ("readinessProbe", "readyz"),
    ("livenessProbe", "livez"),
    ("startupProbe", "startupz"),
];
const HOOKS: &[(&str, &str)] = &[("preStop", "prestopz"), ("postStart", "poststartz")];
/// What the agent can do instead of the kubelet; `exec` stays.
const ACTIONS: &[&str] = &["httpGet", "tcpSocket", "grpc"];

/// Rewrites the probes of the application's containers; what they were, or `None` where there was nothing to do.
pub(crate) fn rewrite(
    spec: &mut Map<String, Value>,
    settings: &Settings,
    warnings: &mut Vec<String>,
) -> Option<String> {
    let port = settings.proxy.status_port;
    if !settings.rewrite_probes || port == 0 {
        return None;
    }
    // A map that is sorted by path, as the variable's text must not depend on the order of containers' fields.
    let mut found = BTreeMap::new();
    for list in ["containers", "initContainers"] {
        let containers = spec.get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            let Some(name) = container["name"].as_str().map(str::to_owned) else {
                continue;
            };
            if name != PROXY_CONTAINER {
                one(container, &name, port, &mut found, warnings);
            }
        }
    }
    (!found.is_empty()).then(|| json!(found).to_string())
}

fn one(
    container: &mut Value,
    name: &str,
    status_port: u16,
    found: &mut BTreeMap<String, Value>,
    warnings: &mut Vec<String>,
) {
    let ports = container.get("ports").cloned().unwrap_or_default();
    for (field, last) in PROBES {
        let Some(probe) = container.get_mut(*field).and_then(Value::as_object_mut) else {
            continue;
        };
        let timeout = probe.get("timeoutSeconds").cloned().unwrap_or(json!(1));
        let path = format!("/app-health/{name}/{last}");
        let place = format!("container {name}, {field}");
        if let Some(mut original) = moved(probe, &path, status_port, &ports, &place, warnings) {
            original.insert("timeoutSeconds".into(), timeout);
            found.insert(path, original.into());
        }
    }
    let Some(hooks) = container.get_mut("lifecycle") else {
        return;
    };
    for (field, last) in HOOKS {
        let Some(hook) = hooks.get_mut(*field).and_then(Value::as_object_mut) else {
            continue;
        };
        let path = format!("/app-lifecycle/{name}/{last}");
        let place = format!("container {name}, lifecycle.{field}");
        if let Some(original) = moved(hook, &path, status_port, &ports, &place, warnings) {
            found.insert(path, original.into());
        }
    }
}

/// Points one probe at the agent; what it was, with its port as a number.
fn moved(
    probe: &mut Map<String, Value>,
    path: &str,
    status_port: u16,
    ports: &Value,
    place: &str,
    warnings: &mut Vec<String>,
) -> Option<Map<String, Value>> {
    let action = ACTIONS.iter().find(|action| probe.contains_key(**action))?;
    let mut original = probe.get(*action)?.as_object()?.clone();
    let asked = original.get("port").cloned().unwrap_or_default();
    let Some(port) = number(&asked, ports) else {
        warnings.push(format!(
            "{place}: the port {asked} is none of the container's ports; the probe is left as it is and will not get through mutual TLS"
        ));
        return None;
    };
    // Somebody pointed it at the agent already.
    if port == i64::from(status_port) {
        return None;
    }
    original.insert("port".into(), port.into());
    let mut replaced = Map::new();
    if *action == "httpGet" {
        replaced = original.clone();
        if replaced
            .get("scheme")
            .is_some_and(|scheme| scheme == "HTTPS")
        {
            replaced.insert("scheme".into(), "HTTP".into());
        }
    }
    replaced.insert("path".into(), path.into());
    replaced.insert("port".into(), status_port.into());
    // In the place of what it was, so that the other fields keep theirs.
    *probe = std::mem::take(probe)
        .into_iter()
        .filter_map(|(field, value)| match field.as_str() {
            field if field == *action => Some(("httpGet".to_owned(), replaced.clone().into())),
            field if ACTIONS.contains(&field) => None,
            _ => Some((field, value)),
        })
        .collect();
    Some(Map::from_iter([(
        (*action).to_owned(),
        Value::Object(original),
    )]))
}

/// A port by number, or by its name among the container's.
fn number(port: &Value, ports: &Value) -> Option<i64> {
    if let Some(number) = port.as_i64() {
        return Some(number);
    }
    let name = port.as_str()?;
    let named = ports
        .as_array()?
        .iter()
        .find(|port| port.get("name").is_some_and(|n| n == name));
    named
        .and_then(|port| port.get("containerPort")?.as_i64())
        .or_else(|| name.parse().ok())
}
