//! The container of the proxy, and its environment.

use mesh_api::mesh_config::{InterceptionMode, ProxyConfig};
use serde_json::{Map, Value, json};

use super::{HEALTH_PORT, METRICS_PORT, PROXY_USER};
use crate::annotations::Settings;
use crate::{InjectContext, PROXY_CONTAINER, PodView, Workload};

/// Makes the container.
pub(super) fn container(
    view: &PodView<'_>,
    settings: &Settings<'_>,
    context: &InjectContext<'_>,
    workload: &Workload,
) -> Value {
    let config = context.config;
    let role = match settings.is_gateway() {
        true => "router",
        false => "sidecar",
    };
    let mut mounts = vec![
        json!({ "name": "workload-certs", "mountPath": "/var/run/secrets/workload-spiffe-credentials" }),
        json!({ "name": "istio-data", "mountPath": "/var/lib/istio/data" }),
        json!({ "name": "istio-podinfo", "mountPath": "/etc/istio/pod" }),
        json!({ "name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": true }),
        json!({ "name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio", "readOnly": true }),
    ];
    mounts.extend(settings.user_mounts.iter().cloned());
    let health = json!({ "path": "/healthz/ready", "port": HEALTH_PORT });
    let mut proxy = json!({
        "name": PROXY_CONTAINER,
        "image": settings.image,
        "args": [
            "proxy", role, "--domain", format!("$(POD_NAMESPACE).svc.{}", config.cluster_domain),
            format!("--proxyLogLevel={}", settings.log_level),
            format!("--proxyComponentLogLevel={}", settings.component_log_level),
            format!("--log_output_level={}", settings.agent_log_level),
        ],
        "env": env(view, settings, context, workload),
        "ports": [{ "name": "http-envoy-prom", "containerPort": METRICS_PORT, "protocol": "TCP" }],
        "readinessProbe": {
            "httpGet": health, "initialDelaySeconds": settings.readiness.initial_delay, "periodSeconds": settings.readiness.period,
            "timeoutSeconds": 3, "failureThreshold": settings.readiness.failure_threshold,
        },
        "resources": settings.resources,
        "securityContext": security(settings, config.privileged),
        "volumeMounts": mounts,
    });
    if let Some(failures) = config.startup_failures {
        proxy["startupProbe"] = json!({
            "httpGet": health, "initialDelaySeconds": 0, "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": failures,
        });
    }
    if let Some(hooks) = &config.lifecycle {
        proxy["lifecycle"] = hooks.clone();
    }
    if settings.hold && !settings.native && settings.is_sidecar() {
        // The next container is started only when this hook is done.
        proxy["lifecycle"]["postStart"] = json!({ "exec": { "command": ["mesh", "wait"] } });
    }
    let agent = settings.proxy.status_port;
    if config.lifecycle.is_none() && settings.native && settings.is_sidecar() && agent != 0 {
        // Called when the pod begins to end; the signal comes when the application's containers are gone (Istio's injection template).
        let port = format!("--debug-port={agent}");
        let command = json!(["pilot-agent", "request", port, "POST", "drain"]);
        proxy["lifecycle"]["preStop"] = json!({ "exec": { "command": command } });
    }
    super::common(&mut proxy, context);
    proxy
}

/// Who the proxy runs as. With TPROXY it needs a capability, which the kernel leaves a program at its start only where that is root; capture then
/// goes by the group (Istio's injection template).
fn security(settings: &Settings<'_>, privileged: bool) -> Value {
    let transparent = settings.is_sidecar() && settings.interception == InterceptionMode::Tproxy;
    let mut capabilities = json!({});
    if transparent {
        capabilities["add"] = json!(["NET_ADMIN"]);
    }
    if !privileged {
        capabilities["drop"] = json!(["ALL"]);
    }
    json!({
        "allowPrivilegeEscalation": privileged,
        "capabilities": capabilities,
        "privileged": privileged,
        "readOnlyRootFilesystem": true,
        "runAsGroup": PROXY_USER,
        "runAsNonRoot": !transparent,
        "runAsUser": if transparent { 0 } else { PROXY_USER },
    })
}

/// Environment of the proxy.
fn env(
    view: &PodView<'_>,
    settings: &Settings<'_>,
    context: &InjectContext<'_>,
    workload: &Workload,
) -> Vec<Value> {
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let value = |name: &str, value: &str| json!({ "name": name, "value": value });
    let names: Vec<_> = view
        .app_containers()
        .filter_map(|container| container["name"].as_str())
        .collect();
    let mesh_id = if context.config.mesh_id.is_empty() {
        &context.mesh.trust_domain
    } else {
        &context.config.mesh_id
    };
    let authority = match context.config.ca_address.as_str() {
        "" => authority_address(&settings.proxy.discovery_address),
        address => address.to_owned(),
    };
    let mut env = vec![
        value("CA_ADDR", &authority),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("INSTANCE_IP", "status.podIP"),
        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        field("HOST_IP", "status.hostIP"),
        json!({ "name": "ISTIO_CPU_LIMIT", "valueFrom": { "resourceFieldRef": { "resource": "limits.cpu" } } }),
        value("PROXY_CONFIG", &proxy_config(&settings.proxy)),
        value("ISTIO_META_POD_PORTS", &pod_ports(view)),
        value("ISTIO_META_APP_CONTAINERS", &names.join(",")),
        value("ISTIO_META_CLUSTER_ID", &context.config.cluster_id),
        field("ISTIO_META_NODE_NAME", "spec.nodeName"),
        value(
            "ISTIO_META_INTERCEPTION_MODE",
            super::mode_name(settings.interception),
        ),
        value("ISTIO_META_WORKLOAD_NAME", &workload.name),
        value("ISTIO_META_OWNER", &workload.reference(context.namespace)),
        value("ISTIO_META_MESH_ID", mesh_id),
        value("TRUST_DOMAIN", &context.mesh.trust_domain),
    ];
    let network = view
        .label("topology.istio.io/network")
        .unwrap_or(&context.config.network);
    if !network.is_empty() {
        env.push(value("ISTIO_META_NETWORK", network));
    }
    env.extend(
        settings
            .proxy
            .proxy_metadata
            .iter()
            .map(|(name, text)| value(name, text)),
    );
    env
}

/// The authority is served by the control plane, on its secure port.
fn authority_address(discovery: &str) -> String {
    let host = discovery
        .rsplit_once(':')
        .map_or(discovery, |(host, _)| host);
    format!("{host}:15012")
}

/// Ports of the application's containers, as JSON with the keys in Kubernetes' order.
fn pod_ports(view: &PodView<'_>) -> String {
    let ports = view
        .app_containers()
        .flat_map(|container| container["ports"].as_array().into_iter().flatten());
    let entries: Vec<Value> = ports
        .map(|port| {
            let mut entry = Map::new();
            for key in ["name", "hostPort", "containerPort", "protocol", "hostIP"] {
                if let Some(value) = port.get(key) {
                    entry.insert(key.into(), value.clone());
                }
            }
            entry.entry("protocol").or_insert_with(|| "TCP".into());
            Value::Object(entry)
        })
        .collect();
    Value::Array(entries).to_string()
}

/// Settings of the proxy as JSON: the address of the control plane, and what differs from the defaults.
fn proxy_config(proxy: &ProxyConfig) -> String {
    let default = ProxyConfig::default();
    let mut fields = Map::new();
    fields.insert(
        "discoveryAddress".into(),
        proxy.discovery_address.as_str().into(),
    );
    let mut differs = |name: &str, different: bool, value: Value| {
        if different {
            fields.insert(name.into(), value);
        }
    };
    differs(
        "proxyAdminPort",
        proxy.proxy_admin_port != default.proxy_admin_port,
        proxy.proxy_admin_port.into(),
    );
    differs(
        "statusPort",
        proxy.status_port != default.status_port,
        proxy.status_port.into(),
    );
    differs(
        "concurrency",
        proxy.concurrency.is_some(),
        json!(proxy.concurrency),
    );
    differs(
        "terminationDrainDuration",
        proxy.termination_drain_duration != default.termination_drain_duration,
        proxy.termination_drain_duration.to_string().into(),
    );
    differs(
        "drainDuration",
        proxy.drain_duration != default.drain_duration,
        proxy.drain_duration.to_string().into(),
    );
    differs(
        "serviceCluster",
        proxy.service_cluster != default.service_cluster,
        proxy.service_cluster.as_str().into(),
    );
    differs(
        "holdApplicationUntilProxyStarts",
        proxy.hold_application_until_proxy_starts,
        true.into(),
    );
    differs(
        "proxyMetadata",
        !proxy.proxy_metadata.is_empty(),
        json!(proxy.proxy_metadata),
    );
    Value::Object(fields).to_string()
}
