//! The injected pod.

use mesh_api::mesh_config::{InterceptionMode, ProxyConfig};
use serde_json::{Map, Value, json};

use crate::annotations::{Settings, Template};
use crate::{
    INIT_CONTAINER, InjectContext, InjectError, PROXY_CONTAINER, PodView, STATUS_ANNOTATION,
    Workload, overlay,
};

/// Uid and gid of the proxy, whose connections are exempt from capture.
const PROXY_USER: i64 = 1337;
/// Ports of the proxy itself, never captured; the status port goes after them.
const HEALTH_PORT: u16 = 15021;
const METRICS_PORT: u16 = 15090;
/// For whom the token is meant, and how long it is valid (Istio's injection template).
const TOKEN_AUDIENCE: &str = "istio-ca";
const TOKEN_SECONDS: u32 = 43_200;

/// Makes the injected pod.
pub(crate) fn injected(
    pod: &Value,
    view: &PodView<'_>,
    settings: &Settings,
    context: &InjectContext<'_>,
) -> Result<Value, InjectError> {
    let workload = context
        .workload
        .cloned()
        .unwrap_or_else(|| Workload::of(view));
    let mut parts = Parts {
        volumes: volumes(settings),
        ..Parts::default()
    };
    let mut proxy = proxy_container(view, settings, context, &workload);
    let own_proxy = view.container(PROXY_CONTAINER);
    if settings.template == Template::Gateway && own_proxy.is_none() {
        return Err(InjectError::NoProxyContainer);
    }
    if let Some(own) = own_proxy {
        overlay::container(&mut proxy, own);
    }
    let native = settings.native && settings.template == Template::Sidecar;
    if settings.template == Template::Sidecar && settings.interception != InterceptionMode::None {
        let mut init = init_container(settings, context, &proxy);
        if let Some(own) = view.container(INIT_CONTAINER) {
            overlay::container(&mut init, own);
        }
        parts.init.push(init);
    }
    if native {
        proxy["restartPolicy"] = json!("Always");
        parts.init.push(proxy);
    } else {
        parts.proxy = Some(proxy);
    }
    let mut result = pod.clone();
    place(&mut result, &parts, settings, native);
    mark(&mut result, view, &parts, settings, context, &workload);
    Ok(result)
}

/// What is added to the pod.
#[derive(Default)]
struct Parts {
    init: Vec<Value>,
    proxy: Option<Value>,
    volumes: Vec<Value>,
}

/// Puts containers and volumes in their order.
fn place(pod: &mut Value, parts: &Parts, settings: &Settings, native: bool) {
    let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) else {
        return;
    };
    let ours = |container: &Value| {
        container["name"] == PROXY_CONTAINER || container["name"] == INIT_CONTAINER
    };
    let mut containers = take(spec, "containers");
    let position = containers
        .iter()
        .position(|container| container["name"] == PROXY_CONTAINER);
    containers.retain(|container| !ours(container));
    if let Some(proxy) = &parts.proxy {
        // With hold the proxy has to be the first one, since containers are started in order. A gateway's own container keeps its place.
        let at = match (settings.template, position) {
            (Template::Gateway, Some(position)) => position.min(containers.len()),
            _ if settings.hold => 0,
            _ => containers.len(),
        };
        containers.insert(at, proxy.clone());
    }
    spec.insert("containers".into(), containers.into());
    let mut inits = take(spec, "initContainers");
    inits.retain(|container| !ours(container));
    // Classic: capture begins after the application's init containers. Native: the proxy runs before them, so they go through it.
    let at = if native { 0 } else { inits.len() };
    inits.splice(at..at, parts.init.iter().cloned());
    if !inits.is_empty() {
        spec.insert("initContainers".into(), inits.into());
    }
    let mut volumes = take(spec, "volumes");
    volumes.retain(|volume| {
        !parts
            .volumes
            .iter()
            .any(|ours| ours["name"] == volume["name"])
    });
    volumes.extend(parts.volumes.iter().cloned());
    spec.insert("volumes".into(), volumes.into());
    if settings.template == Template::Gateway {
        gateway_ports(spec);
    }
}

fn take(spec: &mut Map<String, Value>, list: &str) -> Vec<Value> {
    match spec.get_mut(list).map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => Vec::new(),
    }
}

/// Lets a gateway listen on ports below 1024 without a capability.
fn gateway_ports(spec: &mut Map<String, Value>) {
    let security = spec.entry("securityContext").or_insert_with(|| json!({}));
    if let Some(security) = security.as_object_mut() {
        security.entry("sysctls").or_insert_with(
            || json!([{ "name": "net.ipv4.ip_unprivileged_port_start", "value": "0" }]),
        );
    }
}

/// Sets the labels and annotations by which others know what happened.
fn mark(
    pod: &mut Value,
    view: &PodView<'_>,
    parts: &Parts,
    settings: &Settings,
    context: &InjectContext<'_>,
    workload: &Workload,
) {
    let Some(metadata) = pod.as_object_mut().and_then(|pod| {
        pod.entry("metadata")
            .or_insert_with(|| json!({}))
            .as_object_mut()
    }) else {
        return;
    };
    let (name, revision) = canonical(view, workload);
    edit(metadata, "labels", |labels| {
        // By this others know that the pod's proxy takes mutual TLS on every port; a gateway takes what its Gateways say. Who sets it to
        // something else keeps that.
        if settings.template != Template::Gateway {
            set_default(labels, "security.istio.io/tlsMode", "istio");
        }
        set_default(labels, "service.istio.io/canonical-name", &name);
        set_default(labels, "service.istio.io/canonical-revision", &revision);
        if !context.config.network.is_empty() {
            set_default(labels, "topology.istio.io/network", &context.config.network);
        }
    });
    edit(metadata, "annotations", |annotations| {
        annotations.insert("istio.io/rev".into(), context.revision.into());
        let first = view
            .app_containers()
            .next()
            .and_then(|container| container["name"].as_str())
            .unwrap_or(PROXY_CONTAINER);
        set_default(
            annotations,
            "kubectl.kubernetes.io/default-container",
            first,
        );
        set_default(
            annotations,
            "kubectl.kubernetes.io/default-logs-container",
            first,
        );
        if context.mesh.enable_prometheus_merge
            && settings.proxy.status_port != 0
            && view.annotation("prometheus.io/scrape").is_none()
        {
            annotations.insert("prometheus.io/scrape".into(), "true".into());
            annotations.insert(
                "prometheus.io/port".into(),
                settings.proxy.status_port.to_string().into(),
            );
            annotations.insert("prometheus.io/path".into(), "/stats/prometheus".into());
        }
        for (name, value) in &context.config.injected_annotations {
            annotations.insert(name.clone(), value.as_str().into());
        }
        if let Some(overrides) = overrides(view, settings) {
            annotations.insert("proxy.istio.io/overrides".into(), overrides.into());
        }
        annotations.insert(STATUS_ANNOTATION.into(), status(parts, context).into());
    });
}

/// The user's own containers that were laid over ours, as they were.
fn overrides(view: &PodView<'_>, settings: &Settings) -> Option<String> {
    let mut overrides = Map::new();
    for list in ["containers", "initContainers"] {
        let own: Vec<_> = view
            .containers(list)
            .filter(|container| {
                container["name"] == PROXY_CONTAINER || container["name"] == INIT_CONTAINER
            })
            .collect();
        if !own.is_empty() {
            overrides.insert(list.into(), json!(own));
        }
    }
    (settings.template == Template::Sidecar && !overrides.is_empty())
        .then(|| Value::Object(overrides).to_string())
}

/// Changes a map below the metadata, which is made where it is missing.
fn edit(
    metadata: &mut Map<String, Value>,
    field: &str,
    change: impl FnOnce(&mut Map<String, Value>),
) {
    let mut map = match metadata.get_mut(field).map(Value::take) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    };
    change(&mut map);
    metadata.insert(field.into(), map.into());
}

fn set_default(map: &mut Map<String, Value>, name: &str, value: &str) {
    map.entry(name).or_insert_with(|| value.into());
}

/// The value of the status annotation.
fn status(parts: &Parts, context: &InjectContext<'_>) -> String {
    let names = |items: &[Value]| match items {
        [] => Value::Null,
        items => items.iter().map(|item| item["name"].clone()).collect(),
    };
    json!({
        "initContainers": names(&parts.init),
        "containers": names(parts.proxy.as_slice()),
        "volumes": names(&parts.volumes),
        "imagePullSecrets": null,
        "revision": context.revision,
    })
    .to_string()
}

/// Canonical service and revision: by labels, else the workload's name and `latest`. A label holds 63 characters.
fn canonical(view: &PodView<'_>, workload: &Workload) -> (String, String) {
    let first = |names: [&str; 3]| {
        names
            .iter()
            .find_map(|name| view.label(name))
            .map(str::to_owned)
    };
    let mut name = first([
        "service.istio.io/canonical-name",
        "app.kubernetes.io/name",
        "app",
    ])
    .unwrap_or_else(|| workload.name.clone());
    name.truncate(name.floor_char_boundary(63));
    let name = name.trim_end_matches(['-', '_', '.']).to_owned();
    let revision = first([
        "service.istio.io/canonical-revision",
        "app.kubernetes.io/version",
        "version",
    ]);
    (name, revision.unwrap_or_else(|| "latest".to_owned()))
}

/// Volumes of the proxy: what the pod knows about itself, the last good configuration, and its identity: the token by which the authority
/// knows it, the roots that it trusts, and in memory alone the key and certificate, for the case that the proxy starts again while the authority is away.
fn volumes(settings: &Settings) -> Vec<Value> {
    let item = |path: &str| json!({ "path": path, "fieldRef": { "fieldPath": format!("metadata.{path}") } });
    let mut volumes = vec![
        json!({ "name": "workload-certs", "emptyDir": { "medium": "Memory" } }),
        json!({ "name": "istio-data", "emptyDir": {} }),
        json!({ "name": "istio-podinfo", "downwardAPI": { "items": [item("labels"), item("annotations")] } }),
        json!({ "name": "istio-token", "projected": { "sources": [
            { "serviceAccountToken": { "path": "istio-token", "expirationSeconds": TOKEN_SECONDS, "audience": TOKEN_AUDIENCE } },
        ] } }),
        json!({ "name": "istiod-ca-cert", "configMap": { "name": "istio-ca-root-cert" } }),
    ];
    volumes.extend(settings.user_volumes.iter().cloned());
    volumes
}

/// The init container that sets the capture rules.
fn init_container(settings: &Settings, context: &InjectContext<'_>, proxy: &Value) -> Value {
    let capture = &settings.capture;
    let user = proxy["securityContext"]["runAsUser"]
        .as_i64()
        .unwrap_or(PROXY_USER);
    let mut excluded = vec![METRICS_PORT.to_string(), HEALTH_PORT.to_string()];
    if settings.proxy.status_port != 0 {
        excluded.push(settings.proxy.status_port.to_string());
    }
    excluded.extend(Some(capture.exclude_inbound_ports.clone()).filter(|ports| !ports.is_empty()));
    let mut args: Vec<String> = ["istio-iptables", "-p"].map(str::to_owned).to_vec();
    args.push(context.mesh.proxy_listen_port.to_string());
    args.extend([
        "-z".to_owned(),
        context.mesh.proxy_inbound_listen_port.to_string(),
    ]);
    args.extend([
        "-u".to_owned(),
        user.to_string(),
        "-m".to_owned(),
        "REDIRECT".to_owned(),
    ]);
    args.extend([
        "-i".to_owned(),
        capture.include_ranges.clone(),
        "-x".to_owned(),
        capture.exclude_ranges.clone(),
    ]);
    args.extend([
        "-b".to_owned(),
        capture.include_inbound_ports.clone(),
        "-d".to_owned(),
        excluded.join(","),
    ]);
    for (flag, value) in [
        ("-q", &capture.include_outbound_ports),
        ("-o", &capture.exclude_outbound_ports),
        ("-k", &settings.reroute_interfaces),
        ("-c", &settings.exclude_interfaces),
    ] {
        if !value.is_empty() {
            args.extend([flag.to_owned(), value.clone()]);
        }
    }
    args.push(format!("--log_output_level={}", settings.agent_log_level));
    let mut init = json!({
        "name": INIT_CONTAINER,
        "image": settings.image,
        "args": args,
        "resources": settings.resources,
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "add": ["NET_ADMIN", "NET_RAW"], "drop": ["ALL"] },
            "privileged": false,
            "readOnlyRootFilesystem": false,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "runAsUser": 0,
        },
    });
    pull_policy(&mut init, context);
    init
}

fn pull_policy(container: &mut Value, context: &InjectContext<'_>) {
    if !context.config.image_pull_policy.is_empty() {
        container["imagePullPolicy"] = json!(context.config.image_pull_policy);
    }
}

/// The proxy.
fn proxy_container(
    view: &PodView<'_>,
    settings: &Settings,
    context: &InjectContext<'_>,
    workload: &Workload,
) -> Value {
    let role = match settings.template {
        Template::Sidecar => "sidecar",
        Template::Gateway => "router",
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
            "proxy", role, "--domain", "$(POD_NAMESPACE).svc.cluster.local",
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
        "startupProbe": { "httpGet": health, "initialDelaySeconds": 0, "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 600 },
        "resources": settings.resources,
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "privileged": false,
            "readOnlyRootFilesystem": true,
            "runAsGroup": PROXY_USER,
            "runAsNonRoot": true,
            "runAsUser": PROXY_USER,
        },
        "volumeMounts": mounts,
    });
    if settings.hold && !settings.native && settings.template == Template::Sidecar {
        // The next container is started only when this hook is done.
        proxy["lifecycle"] = json!({ "postStart": { "exec": { "command": ["mesh", "wait"] } } });
    }
    pull_policy(&mut proxy, context);
    proxy
}

/// Environment of the proxy.
fn env(
    view: &PodView<'_>,
    settings: &Settings,
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
    let mode = if settings.interception == InterceptionMode::None {
        "NONE"
    } else {
        "REDIRECT"
    };
    let mut env = vec![
        value(
            "CA_ADDR",
            &authority_address(&settings.proxy.discovery_address),
        ),
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
        value("ISTIO_META_INTERCEPTION_MODE", mode),
        value("ISTIO_META_WORKLOAD_NAME", &workload.name),
        value("ISTIO_META_OWNER", &workload.reference(context.namespace)),
        value("ISTIO_META_MESH_ID", mesh_id),
        value("TRUST_DOMAIN", &context.mesh.trust_domain),
    ];
    if !context.config.network.is_empty() {
        env.push(value("ISTIO_META_NETWORK", &context.config.network));
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
