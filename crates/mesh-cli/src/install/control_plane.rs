//! The control plane: service accounts, configuration, service, deployment.

use mesh_api::yaml;
use serde_json::{Value, json};

use super::resolve::{Part, Resolved};
use super::{InstallError, access, account, metadata, webhooks, workload};

/// The container of the control plane.
const CONTAINER: &str = "discovery";

/// Objects of the control plane, in the order in which they are needed.
pub(super) fn objects(settings: &Resolved, part: &Part) -> Result<Vec<Value>, InstallError> {
    let revision = &settings.revision;
    let labels = json!({ "app": "istiod", "istio": "pilot", "istio.io/rev": revision });
    let selector = json!({ "app": "istiod", "istio.io/rev": revision });
    let name = settings.revisioned("istiod");
    let own = |name: &str| metadata(name, &settings.namespace, labels.clone());
    let pilot = &settings.spec.values.pilot;
    let mut all = vec![account(
        own(&name),
        &settings.spec.values.global.image_pull_secrets,
        &pilot.service_account_annotations,
    )];
    // Before the pod that needs them.
    all.extend(access::control_plane(
        settings,
        &name,
        &labels,
        &part.k8s.env,
    ));
    all.push(json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": own(&settings.revisioned("istio")),
        "data": { "mesh": yaml::to_string(&settings.mesh), "meshNetworks": "networks: {}\n" },
    }));
    all.push(json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": own(&settings.revisioned("istio-sidecar-injector")),
        "data": { "config": yaml::to_string(&settings.injector_config), "values": settings.injector_values.to_string() },
    }));
    let port = |name: &str, port: u16, target: u16| json!({ "name": name, "port": port, "targetPort": target, "protocol": "TCP" });
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": own(&name),
        "spec": {
            "selector": selector,
            "ports": [
                port("grpc-xds", 15010, 15010), port("https-dns", 15012, 15012), port("https-webhook", 443, 15017),
                port("http-monitoring", 15014, 15014),
            ],
        },
    });
    workload::tune_service(&mut service, &part.k8s);
    all.push(service);
    all.push(deployment(settings, part, &name, &labels, &selector)?);
    let budget = settings
        .spec
        .values
        .global
        .default_pod_disruption_budget
        .enabled;
    all.extend(workload::companions(&own(&name), &selector, part, budget));
    all.push(webhooks::mutating(settings));
    if settings.spec.values.global.config_validation != Some(false) {
        all.push(webhooks::validating(settings));
    }
    all.extend(webhooks::tags(settings));
    workload::overlay(&mut all, &part.k8s)?;
    Ok(all)
}

fn deployment(
    settings: &Resolved,
    part: &Part,
    name: &str,
    labels: &Value,
    selector: &Value,
) -> Result<Value, InstallError> {
    let mut pod_labels = labels.clone();
    pod_labels["sidecar.istio.io/inject"] = json!("false");
    let mut own_labels = labels.clone();
    for (key, value) in &settings.spec.values.pilot.deployment_labels {
        own_labels[key] = json!(value);
    }
    let mut deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(name, &settings.namespace, own_labels),
        "spec": {
            "selector": { "matchLabels": selector },
            "template": {
                "metadata": { "labels": pod_labels, "annotations": { "prometheus.io/scrape": "true", "prometheus.io/port": "15014" } },
                "spec": { "serviceAccountName": name, "containers": [container(settings, part)?] },
            },
        },
    });
    workload::tune(&mut deployment, CONTAINER, part);
    if settings.platform_chooses_user() {
        workload::without_user(&mut deployment);
    }
    Ok(deployment)
}

/// It keeps nothing on disk, so that its root is read-only; and it meets Pod Security's level `restricted`.
fn container(settings: &Resolved, part: &Part) -> Result<Value, InstallError> {
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let global = &settings.spec.values.global;
    let cluster = match global.multi_cluster.cluster_name.as_str() {
        "" => "Kubernetes",
        name => name,
    };
    let mut args = vec!["control".to_owned()];
    if settings.namespace != super::NAMESPACE {
        args.push(format!("--istioNamespace={}", settings.namespace));
    }
    if let Some(level) = log_level(&global.logging.level)? {
        args.push(format!("--log={level}"));
    }
    Ok(json!({
        "name": CONTAINER,
        "image": part.image,
        "args": args,
        "env": [
            { "name": "REVISION", "value": settings.revision },
            field("POD_NAME", "metadata.name"),
            field("POD_NAMESPACE", "metadata.namespace"),
            field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
            { "name": "CLUSTER_ID", "value": cluster },
        ],
        "ports": [
            { "name": "http-debug", "containerPort": 8080, "protocol": "TCP" },
            { "name": "grpc-xds", "containerPort": 15010, "protocol": "TCP" },
            { "name": "tls-xds", "containerPort": 15012, "protocol": "TCP" },
            { "name": "https-webhooks", "containerPort": 15017, "protocol": "TCP" },
            { "name": "http-monitoring", "containerPort": 15014, "protocol": "TCP" },
        ],
        "readinessProbe": { "httpGet": { "path": "/ready", "port": 8080 }, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 3 },
        "securityContext": {
            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsNonRoot": true, "runAsUser": 1337, "runAsGroup": 1337,
            "capabilities": { "drop": ["ALL"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        },
    }))
}

/// Istio writes `SCOPE:LEVEL,...`; here all scopes have one level, that of `default`.
fn log_level(text: &str) -> Result<Option<&str>, InstallError> {
    if text.is_empty() {
        return Ok(None);
    }
    let level = text.strip_prefix("default:").unwrap_or(text);
    match level {
        "debug" | "info" | "error" => Ok(Some(level)),
        "warn" | "warning" => Ok(Some("warn")),
        "none" => Ok(Some("off")),
        "fatal" => Ok(Some("error")),
        _ => Err(InstallError::Invalid(
            "values.global.logging.level",
            format!(
                "{text:?}: write default:LEVEL with debug, info, warn, error, fatal or none; there are no other scopes"
            ),
        )),
    }
}
