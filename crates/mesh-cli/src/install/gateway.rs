//! Gateways: service account, rights, deployment, service.

use std::collections::BTreeMap;

use mesh_inject::{InjectContext, InjectError, Outcome, Workload};
use serde_json::{Value, json};

use super::resolve::{Gateway, Resolved};
use super::{InstallError, access, account, metadata, workload};

/// Where a proxy says that it is ready.
const HEALTH_PORT: u64 = 15021;

/// Objects of a gateway.
pub(super) fn objects(settings: &Resolved, gateway: &Gateway) -> Result<Vec<Value>, InstallError> {
    let name = &gateway.name;
    let labels = labels(gateway);
    let own = |name: &str| metadata(name, &gateway.namespace, labels.clone());
    let account_name = format!("{name}-service-account");
    let mut all = access::gateway(name, &gateway.namespace, &account_name, &labels).to_vec();
    let global = &settings.spec.values.global;
    all.push(account(
        own(&account_name),
        &global.image_pull_secrets,
        &BTreeMap::new(),
    ));
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": own(name),
        "spec": { "selector": labels },
    });
    workload::tune_service(&mut service, &gateway.part.k8s);
    let template = pod(settings, gateway, &labels, &account_name, &service)?;
    let mut deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": own(name),
        "spec": { "selector": { "matchLabels": labels }, "template": template },
    });
    workload::tune(&mut deployment, mesh_inject::PROXY_CONTAINER, &gateway.part);
    if settings.platform_chooses_user() {
        workload::without_user(&mut deployment);
    }
    all.push(deployment);
    all.push(service);
    let budget = global.default_pod_disruption_budget.enabled;
    all.extend(workload::companions(
        &own(name),
        &labels,
        &gateway.part,
        budget,
    ));
    workload::overlay(&mut all, &gateway.part.k8s)?;
    Ok(all)
}

fn labels(gateway: &Gateway) -> Value {
    let kind = if gateway.ingress {
        "ingressgateway"
    } else {
        "egressgateway"
    };
    let mut labels = json!({ "app": gateway.name, "istio": kind });
    for (key, value) in &gateway.labels {
        labels[key] = value.clone();
    }
    labels
}

/// The pod template of a gateway, filled in by the injector's own code: so it does not need the webhook, and has the sidecar's environment.
fn pod(
    settings: &Resolved,
    gateway: &Gateway,
    labels: &Value,
    account: &str,
    service: &Value,
) -> Result<Value, InstallError> {
    let mut pod_labels = labels.clone();
    pod_labels["sidecar.istio.io/inject"] = json!("false");
    let pod = json!({
        "metadata": {
            "labels": pod_labels,
            "annotations": { "inject.istio.io/templates": "gateway" },
        },
        "spec": {
            "serviceAccountName": account,
            // What its account may read is asked by the control plane; the gateway itself, which faces strangers, needs no token for the API.
            "automountServiceAccountToken": false,
            "containers": [{
                "name": mesh_inject::PROXY_CONTAINER,
                "image": "auto",
                "ports": container_ports(service),
                "readinessProbe": { "httpGet": { "path": "/healthz/ready", "port": HEALTH_PORT }, "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 4 },
                "securityContext": { "seccompProfile": { "type": "RuntimeDefault" } },
            }],
        },
    });
    let mut config = settings.injector.clone();
    config.image.clone_from(&gateway.part.image);
    let workload = Workload {
        api_version: "apps/v1".to_owned(),
        kind: "Deployment".to_owned(),
        name: gateway.name.clone(),
    };
    let context = InjectContext {
        namespace: &gateway.namespace,
        namespace_labels: &BTreeMap::new(),
        mesh: &settings.mesh_config,
        config: &config,
        revision: &settings.revision,
        native_sidecars: false,
        workload: Some(&workload),
    };
    match mesh_inject::fill(&pod, &context)? {
        Outcome::Patched(patched) => Ok(patched.pod),
        Outcome::Skipped(_) => Err(InjectError::NoProxyContainer.into()),
    }
}

/// The ports that the Service leads to, and that of the health check.
fn container_ports(service: &Value) -> Vec<Value> {
    let mut ports = vec![json!({ "containerPort": HEALTH_PORT, "protocol": "TCP" })];
    for port in service["spec"]["ports"].as_array().into_iter().flatten() {
        let target = match &port["targetPort"] {
            Value::Null => &port["port"],
            target => target,
        };
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        let entry = json!({ "containerPort": target, "protocol": protocol });
        if target.is_u64() && !ports.contains(&entry) {
            ports.push(entry);
        }
    }
    ports
}
