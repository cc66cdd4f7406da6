//! The injected pod.

use mesh_api::mesh_config::InterceptionMode;
use serde_json::{Map, Value, json};

use crate::annotations::Settings;
use crate::{
    INIT_CONTAINER, InjectContext, InjectError, PROXY_CONTAINER, PodView, STATUS_ANNOTATION,
    Workload, metrics, overlay, probes,
};

mod init;
mod proxy;

/// Uid and gid of the proxy, whose connections are exempt from capture.
const PROXY_USER: i64 = 1337;
/// Ports of the proxy itself, never captured; the status port goes after them.
const HEALTH_PORT: u16 = 15021;
const METRICS_PORT: u16 = 15090;
/// For whom the token is meant, and how long it is valid (Istio's injection template).
const TOKEN_AUDIENCE: &str = "istio-ca";
const TOKEN_SECONDS: u32 = 43_200;

/// Makes the injected pod, and says what its people should know.
pub(crate) fn injected(
    pod: &Value,
    view: &PodView<'_>,
    mut settings: Settings<'_>,
    context: &InjectContext<'_>,
) -> Result<(Value, Vec<String>), InjectError> {
    let workload = context
        .workload
        .cloned()
        .unwrap_or_else(|| Workload::of(view));
    if settings.is_gateway() && view.container(PROXY_CONTAINER).is_none() {
        return Err(InjectError::NoProxyContainer);
    }
    let mut warnings = std::mem::take(&mut settings.warnings);
    let parts = Parts::of(view, &settings, context, &workload);
    let mut result = pod.clone();
    place(&mut result, &parts, &settings, &mut warnings);
    if let Some(fields) = result.as_object_mut() {
        for overlay in &settings.templates.overlays {
            overlay::merge(
                fields,
                &relocated(overlay, settings.native && !settings.is_gateway()),
            );
        }
    }
    own_over(&mut result, view, &settings);
    let merged = metrics::merged(view, &settings);
    if let Some(spec) = result.get_mut("spec").and_then(Value::as_object_mut) {
        pull_secrets(spec, context);
        let probes = probes::rewrite(spec, &settings, &mut warnings);
        let probes = probes.map(|text| (probes::VARIABLE, text));
        let metrics = merged.iter().filter_map(|merged| merged.variable.clone());
        variables(spec, probes.into_iter().chain(metrics));
    }
    let status = status(view, &result, &parts, context);
    let marks = Marks {
        view,
        settings: &settings,
        context,
        workload: &workload,
    };
    marks.set(&mut result, merged, status);
    Ok((result, warnings))
}

/// As the capture tool and the control plane know it.
fn mode_name(mode: InterceptionMode) -> &'static str {
    match mode {
        InterceptionMode::Redirect => "REDIRECT",
        InterceptionMode::Tproxy => "TPROXY",
        InterceptionMode::None => "NONE",
    }
}

/// What is added to the pod.
#[derive(Default)]
struct Parts {
    init: Vec<Value>,
    proxy: Option<Value>,
    volumes: Vec<Value>,
}

impl Parts {
    fn of(
        view: &PodView<'_>,
        settings: &Settings<'_>,
        context: &InjectContext<'_>,
        workload: &Workload,
    ) -> Self {
        let mut parts = Self::default();
        if settings.templates.builtin.is_none() {
            return parts;
        }
        parts.volumes = volumes(settings);
        let mut proxy = proxy::container(view, settings, context, workload);
        if settings.is_sidecar() && settings.interception != InterceptionMode::None {
            // Who lets the proxy run as somebody else means that one's connections.
            let user = view
                .container(PROXY_CONTAINER)
                .and_then(|own| own.get("securityContext")?.get("runAsUser")?.as_i64());
            let init = init::container(settings, context, user.unwrap_or(PROXY_USER));
            parts.init.push(init);
        }
        if settings.native && settings.is_sidecar() {
            proxy["restartPolicy"] = json!("Always");
            parts.init.push(proxy);
        } else {
            parts.proxy = Some(proxy);
        }
        parts
    }
}

fn is_ours(container: &Value) -> bool {
    container["name"] == PROXY_CONTAINER || container["name"] == INIT_CONTAINER
}

/// Puts containers and volumes in their order.
fn place(pod: &mut Value, parts: &Parts, settings: &Settings<'_>, warnings: &mut Vec<String>) {
    let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) else {
        return;
    };
    if settings.templates.builtin.is_none() {
        return;
    }
    let mut containers = take(spec, "containers");
    let position = containers
        .iter()
        .position(|container| container["name"] == PROXY_CONTAINER);
    containers.retain(|container| !is_ours(container));
    if let Some(proxy) = &parts.proxy {
        // With hold the proxy has to be the first one, since containers are started in order. A gateway's own container keeps its place.
        let at = match position {
            Some(position) if settings.is_gateway() => position.min(containers.len()),
            _ if settings.hold => 0,
            _ => containers.len(),
        };
        containers.insert(at, proxy.clone());
    }
    spec.insert("containers".into(), containers.into());
    let mut inits = take(spec, "initContainers");
    inits.retain(|container| !is_ours(container));
    // Classic: capture begins after the application's init containers. Native: the proxy runs before them, so they go through it.
    let at = if settings.native { 0 } else { inits.len() };
    inits.splice(at..at, parts.init.iter().cloned());
    if !inits.is_empty() {
        spec.insert("initContainers".into(), inits.into());
    }
    let mut volumes = take(spec, "volumes");
    let is_taken = |volume: &Value| {
        let mut ours = parts.volumes.iter();
        ours.any(|ours| ours["name"] == volume["name"])
    };
    for volume in volumes.iter().filter(|volume| is_taken(volume)) {
        let name = volume["name"].as_str().unwrap_or_default();
        warnings.push(format!(
            "volume {name} is replaced: the proxy has a volume of this name; give the application's another one"
        ));
    }
    volumes.retain(|volume| !is_taken(volume));
    volumes.extend(parts.volumes.iter().cloned());
    spec.insert("volumes".into(), volumes.into());
    if settings.is_gateway() {
        gateway_ports(spec);
    }
}

/// The overlay with what it says of the proxy in the list where the proxy is: whoever writes one need not know which kind of sidecar it meets.
fn relocated(overlay: &Value, native: bool) -> Map<String, Value> {
    let mut overlay = overlay.as_object().cloned().unwrap_or_default();
    let (from, to) = match native {
        true => ("containers", "initContainers"),
        false => ("initContainers", "containers"),
    };
    let Some(spec) = overlay.get_mut("spec").and_then(Value::as_object_mut) else {
        return overlay;
    };
    let Some(items) = spec.get_mut(from).and_then(Value::as_array_mut) else {
        return overlay;
    };
    let (moved, rest): (Vec<Value>, Vec<Value>) = std::mem::take(items)
        .into_iter()
        .partition(|container| container["name"] == PROXY_CONTAINER);
    *items = rest;
    if !moved.is_empty() {
        let mut there = take(spec, to);
        there.extend(moved);
        spec.insert(to.into(), there.into());
    }
    overlay
}

fn take(spec: &mut Map<String, Value>, list: &str) -> Vec<Value> {
    match spec.get_mut(list).map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => Vec::new(),
    }
}

/// Lays the user's own versions of our containers over ours, last of all.
fn own_over(pod: &mut Value, view: &PodView<'_>, settings: &Settings<'_>) {
    if settings.templates.builtin.is_none() {
        return;
    }
    for name in [PROXY_CONTAINER, INIT_CONTAINER] {
        let Some(own) = view.container(name) else {
            continue;
        };
        if let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut)
            && let Some(made) = find(spec, name)
        {
            overlay::container(made, own);
        }
    }
}

/// The container of any list with a name.
fn find<'a>(spec: &'a mut Map<String, Value>, name: &str) -> Option<&'a mut Value> {
    spec.iter_mut()
        .filter(|(list, _)| ["containers", "initContainers"].contains(&list.as_str()))
        .filter_map(|(_, items)| items.as_array_mut())
        .flatten()
        .find(|container| container["name"] == name)
}

/// Adds variables to the proxy, unless the user set them.
fn variables(
    spec: &mut Map<String, Value>,
    variables: impl Iterator<Item = (&'static str, String)>,
) {
    let Some(env) = find(spec, PROXY_CONTAINER)
        .and_then(|proxy| proxy.get_mut("env"))
        .and_then(Value::as_array_mut)
    else {
        return;
    };
    for (name, value) in variables {
        if !env.iter().any(|there| there["name"] == name) {
            env.push(json!({ "name": name, "value": value }));
        }
    }
}

/// What both of our containers have from the configuration.
fn common(container: &mut Value, context: &InjectContext<'_>) {
    if !context.config.image_pull_policy.is_empty() {
        container["imagePullPolicy"] = json!(context.config.image_pull_policy);
    }
    if let Some(profile) = &context.config.seccomp {
        container["securityContext"]["seccompProfile"] = profile.clone();
    }
}

/// Names the secrets by which the kubelet gets our image.
fn pull_secrets(spec: &mut Map<String, Value>, context: &InjectContext<'_>) {
    if context.config.image_pull_secrets.is_empty() {
        return;
    }
    let mut secrets = take(spec, "imagePullSecrets");
    for name in &context.config.image_pull_secrets {
        if !secrets.iter().any(|secret| secret["name"] == name.as_str()) {
            secrets.push(json!({ "name": name }));
        }
    }
    spec.insert("imagePullSecrets".into(), secrets.into());
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

/// Labels and annotations by which others know what happened.
struct Marks<'a> {
    view: &'a PodView<'a>,
    settings: &'a Settings<'a>,
    context: &'a InjectContext<'a>,
    workload: &'a Workload,
}

impl Marks<'_> {
    fn set(&self, pod: &mut Value, merged: Option<metrics::Merged>, status: String) {
        let Some(metadata) = pod.as_object_mut().and_then(|pod| {
            pod.entry("metadata")
                .or_insert_with(|| json!({}))
                .as_object_mut()
        }) else {
            return;
        };
        edit(metadata, "labels", |labels| self.labels(labels));
        edit(metadata, "annotations", |annotations| {
            self.annotations(annotations, merged);
            annotations.insert(STATUS_ANNOTATION.into(), status.into());
        });
    }

    fn labels(&self, labels: &mut Map<String, Value>) {
        let (name, revision) = canonical(self.view, self.workload);
        // By this others know that the pod's proxy takes mutual TLS on every port; a gateway takes what its Gateways say. Who sets it to
        // something else keeps that.
        if self.settings.is_sidecar() {
            set_default(labels, "security.istio.io/tlsMode", "istio");
        }
        set_default(labels, "service.istio.io/canonical-name", &name);
        set_default(labels, "service.istio.io/canonical-revision", &revision);
        let network = &self.context.config.network;
        if !network.is_empty() {
            set_default(labels, "topology.istio.io/network", network);
        }
    }

    fn annotations(&self, annotations: &mut Map<String, Value>, merged: Option<metrics::Merged>) {
        annotations.insert("istio.io/rev".into(), self.context.revision.into());
        let first = self
            .view
            .app_containers()
            .next()
            .and_then(|container| container["name"].as_str())
            .unwrap_or(PROXY_CONTAINER);
        for name in ["default-container", "default-logs-container"] {
            let name = format!("kubectl.kubernetes.io/{name}");
            set_default(annotations, &name, first);
        }
        for (name, value) in merged.into_iter().flat_map(|merged| merged.annotations) {
            annotations.insert(name.into(), value.into());
        }
        for (name, value) in &self.context.config.injected_annotations {
            annotations.insert(name.clone(), value.as_str().into());
        }
        if let Some(overrides) = overrides(self.view, self.settings) {
            annotations.insert("proxy.istio.io/overrides".into(), overrides.into());
        }
    }
}

/// The user's own containers that were laid over ours, as they were.
fn overrides(view: &PodView<'_>, settings: &Settings<'_>) -> Option<String> {
    let mut overrides = Map::new();
    for list in ["containers", "initContainers"] {
        let own: Vec<_> = view
            .containers(list)
            .filter(|container| is_ours(container))
            .collect();
        if !own.is_empty() {
            overrides.insert(list.into(), json!(own));
        }
    }
    (settings.is_sidecar() && !overrides.is_empty()).then(|| Value::Object(overrides).to_string())
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

/// The value of the status annotation: what is there now and was not before, and what is ours in any case.
fn status(view: &PodView<'_>, pod: &Value, parts: &Parts, context: &InjectContext<'_>) -> String {
    let added = |list: &str, ours: &[Value]| {
        let was = |name: &Value| view.containers(list).any(|item| item["name"] == *name);
        let is_ours = |name: &Value| ours.iter().any(|item| item["name"] == *name);
        let items = pod["spec"].get(list).and_then(Value::as_array);
        let names: Vec<Value> = items
            .into_iter()
            .flatten()
            .map(|item| item["name"].clone())
            .filter(|name| is_ours(name) || !was(name))
            .collect();
        match names.is_empty() {
            true => Value::Null,
            false => Value::Array(names),
        }
    };
    json!({
        "initContainers": added("initContainers", &parts.init),
        "containers": added("containers", parts.proxy.as_slice()),
        "volumes": added("volumes", &parts.volumes),
        "imagePullSecrets": added("imagePullSecrets", &[]),
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
fn volumes(settings: &Settings<'_>) -> Vec<Value> {
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
