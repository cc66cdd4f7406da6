//! The objects of an installation, in the waves in which they are applied.
//!
//! The same objects go to the local cluster and to any Kubernetes. Pure: nothing is applied here.

mod access;

use std::collections::BTreeMap;

use mesh_api::mesh_config::MeshConfig;
use mesh_api::yaml;
use mesh_inject::{InjectContext, InjectError, InjectorConfig, Outcome, Workload};
use serde_json::{Value, json};

/// Namespace of the mesh's own parts.
pub const NAMESPACE: &str = "istio-system";

/// What is installed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    /// Control plane and ingress gateway.
    #[default]
    Default,
    /// As default, and an egress gateway, with small resource requests.
    Demo,
    /// Control plane only.
    Minimal,
    /// Nothing.
    Empty,
}

/// How it is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstallOptions {
    /// What is installed.
    pub profile: Profile,
    /// Image of every part; default `mesh:<version>`.
    pub image: String,
    /// Revision of the control plane; `default`, or a name that all its objects carry.
    pub revision: String,
    /// Worker threads of each proxy; none leaves it to the proxy (by CPU limit). The local cluster sets 1.
    pub concurrency: Option<u32>,
}

impl Default for InstallOptions {
    fn default() -> Self {
        Self {
            profile: Profile::Default,
            image: concat!("mesh:", env!("CARGO_PKG_VERSION")).to_owned(),
            revision: "default".to_owned(),
            concurrency: None,
        }
    }
}

/// The objects, in waves: (1) namespace and CRDs, (2) the control plane, (3) gateways. A wave may only be applied once the one before it
/// is there; the gateways need a control plane that is ready. The profile `empty` has no wave.
///
/// # Errors
/// Settings from which no gateway pod can be made; a bug unless the image is empty.
pub fn manifests(options: &InstallOptions) -> Result<Vec<Vec<Value>>, InjectError> {
    let mut waves = Vec::new();
    if options.profile == Profile::Empty {
        return Ok(waves);
    }
    let mut first =
        vec![json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } })];
    first.extend(mesh_api::crds());
    waves.push(first);
    waves.push(control_plane(options));
    match options.profile {
        Profile::Default => waves.push(gateway(options, "ingressgateway", "LoadBalancer")?),
        Profile::Demo => {
            let mut gateways = gateway(options, "ingressgateway", "LoadBalancer")?;
            gateways.extend(gateway(options, "egressgateway", "ClusterIP")?);
            waves.push(gateways);
        }
        Profile::Minimal | Profile::Empty => {}
    }
    Ok(waves)
}

/// A name with the revision at its end, unless that is the default one.
fn revisioned(name: &str, options: &InstallOptions) -> String {
    if options.revision == "default" {
        name.to_owned()
    } else {
        format!("{name}-{}", options.revision)
    }
}

fn metadata(name: &str, labels: Value) -> Value {
    json!({ "name": name, "namespace": NAMESPACE, "labels": labels })
}

/// Service accounts, configuration, service, deployment and webhooks of the control plane.
fn control_plane(options: &InstallOptions) -> Vec<Value> {
    let labels = json!({ "app": "istiod", "istio": "pilot", "istio.io/rev": options.revision });
    let name = revisioned("istiod", options);
    let port = |name: &str, port: u16, target: u16| json!({ "name": name, "port": port, "targetPort": target, "protocol": "TCP" });
    let mut all = vec![
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(&name, labels.clone()) }),
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(&revisioned("istio", options), labels.clone()),
            "data": { "mesh": yaml::to_string(&mesh_settings(options)), "meshNetworks": "networks: {}\n" },
        }),
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(&revisioned("istio-sidecar-injector", options), labels.clone()),
            "data": { "config": "policy: enabled\nalwaysInjectSelector: []\nneverInjectSelector: []\ninjectedAnnotations: {}\n", "values": injector_values(options).to_string() },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata(&name, labels.clone()),
            "spec": {
                "selector": { "app": "istiod", "istio.io/rev": options.revision },
                "ports": [port("grpc-xds", 15010, 15010), port("https-dns", 15012, 15012), port("https-webhook", 443, 15017), port("http-monitoring", 15014, 15014)],
            },
        }),
        istiod(options, &name, labels.clone()),
        mutating_webhook(options),
        validating_webhook(options),
    ];
    // Before the pod that needs them.
    all.splice(1..1, access::control_plane(options, &name, &labels));
    all
}

/// Settings of the mesh, as the ConfigMap `istio` holds them.
fn mesh_settings(options: &InstallOptions) -> Value {
    let mut proxy = json!({ "discoveryAddress": format!("{}.{NAMESPACE}.svc:15012", revisioned("istiod", options)) });
    if let Some(threads) = options.concurrency {
        proxy["concurrency"] = json!(threads);
    }
    json!({ "rootNamespace": NAMESPACE, "trustDomain": "cluster.local", "defaultConfig": proxy })
}

/// Settings of the injector, as the ConfigMap `istio-sidecar-injector` holds them.
fn injector_values(options: &InstallOptions) -> Value {
    let mut proxy = json!({ "image": options.image });
    if options.profile == Profile::Demo {
        proxy["resources"] = json!({ "requests": { "cpu": "10m", "memory": "40Mi" }, "limits": { "cpu": "2000m", "memory": "1024Mi" } });
    }
    json!({ "global": { "proxy": proxy } })
}

fn istiod(options: &InstallOptions, name: &str, labels: Value) -> Value {
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let requests = match options.profile {
        Profile::Demo => json!({ "cpu": "10m", "memory": "100Mi" }),
        _ => json!({ "cpu": "100m", "memory": "128Mi" }),
    };
    let mut pod_labels = labels.clone();
    pod_labels["sidecar.istio.io/inject"] = json!("false");
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(name, labels),
        "spec": {
            "replicas": 1,
            "selector": { "matchLabels": { "app": "istiod", "istio.io/rev": options.revision } },
            "strategy": { "rollingUpdate": { "maxSurge": "100%", "maxUnavailable": "25%" } },
            "template": {
                "metadata": { "labels": pod_labels, "annotations": { "prometheus.io/scrape": "true", "prometheus.io/port": "15014" } },
                "spec": {
                    "serviceAccountName": name,
                    "containers": [{
                        "name": "discovery",
                        "image": options.image,
                        "args": ["control"],
                        "env": [
                            { "name": "REVISION", "value": options.revision },
                            field("POD_NAME", "metadata.name"),
                            field("POD_NAMESPACE", "metadata.namespace"),
                            field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
                            { "name": "CLUSTER_ID", "value": "Kubernetes" },
                        ],
                        "ports": [
                            { "name": "http-debug", "containerPort": 8080, "protocol": "TCP" },
                            { "name": "grpc-xds", "containerPort": 15010, "protocol": "TCP" },
                            { "name": "tls-xds", "containerPort": 15012, "protocol": "TCP" },
                            { "name": "https-webhooks", "containerPort": 15017, "protocol": "TCP" },
                            { "name": "http-monitoring", "containerPort": 15014, "protocol": "TCP" },
                        ],
                        "readinessProbe": { "httpGet": { "path": "/ready", "port": 8080 }, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 3 },
                        "resources": { "requests": requests },
                        "securityContext": {
                            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsNonRoot": true, "runAsUser": 1337, "runAsGroup": 1337,
                            "capabilities": { "drop": ["ALL"] },
                        },
                    }],
                },
            },
        },
    })
}

/// Where a webhook is called. The bundle of its certificate is filled in by the control plane.
fn client_config(options: &InstallOptions, path: &str) -> Value {
    json!({ "service": { "name": revisioned("istiod", options), "namespace": NAMESPACE, "path": path, "port": 443 } })
}

/// The webhook that injects sidecars: one entry per way to ask for one (namespace or pod, by revision or by default).
fn mutating_webhook(options: &InstallOptions) -> Value {
    let term = |key: &str, operator: &str, values: &[&str]| match values {
        [] => json!({ "key": key, "operator": operator }),
        values => json!({ "key": key, "operator": operator, "values": values }),
    };
    let rev = options.revision.as_str();
    let no_injection = term("istio-injection", "DoesNotExist", &[]);
    let no_rev = term("istio.io/rev", "DoesNotExist", &[]);
    let not_refused = term("sidecar.istio.io/inject", "NotIn", &["false"]);
    let entry = |name: &str, namespaces: &[&Value], pods: &[&Value]| {
        json!({
            "name": format!("{name}.sidecar-injector.istio.io"),
            "clientConfig": client_config(options, "/inject"),
            "rules": [{ "operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"] }],
            "namespaceSelector": { "matchExpressions": namespaces },
            "objectSelector": { "matchExpressions": pods },
            "failurePolicy": "Fail", "sideEffects": "None", "reinvocationPolicy": "Never", "admissionReviewVersions": ["v1"],
        })
    };
    let this_rev = term("istio.io/rev", "In", &[rev]);
    let mut entries = vec![
        entry(
            "rev.namespace",
            &[&this_rev, &no_injection],
            &[&not_refused],
        ),
        entry(
            "rev.object",
            &[&no_rev, &no_injection],
            &[&not_refused, &this_rev],
        ),
    ];
    if rev == "default" {
        let enabled = term("istio-injection", "In", &["enabled"]);
        let asked = term("sidecar.istio.io/inject", "In", &["true"]);
        entries.push(entry("namespace", &[&enabled], &[&not_refused]));
        entries.push(entry(
            "object",
            &[&no_injection, &no_rev],
            &[&asked, &no_rev],
        ));
    }
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": { "name": revisioned("istio-sidecar-injector", options), "labels": { "app": "sidecar-injector", "istio.io/rev": rev } },
        "webhooks": entries,
    })
}

/// The webhook that validates Istio's kinds. It must not block anything before the control plane serves it; that sets `Fail` then.
fn validating_webhook(options: &InstallOptions) -> Value {
    let groups: std::collections::BTreeSet<_> =
        mesh_api::KINDS.iter().map(|info| info.group).collect();
    let objects = match options.revision.as_str() {
        "default" => json!({}),
        revision => {
            json!({ "matchExpressions": [{ "key": "istio.io/rev", "operator": "In", "values": [revision] }] })
        }
    };
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {
            "name": format!("{}-{NAMESPACE}", revisioned("istio-validator", options)),
            "labels": { "app": "istiod", "istio": "istiod", "istio.io/rev": options.revision },
        },
        "webhooks": [{
            "name": "rev.validation.istio.io",
            "clientConfig": client_config(options, "/validate"),
            "rules": [{ "operations": ["CREATE", "UPDATE"], "apiGroups": groups, "apiVersions": ["*"], "resources": ["*"] }],
            "objectSelector": objects,
            "failurePolicy": "Ignore", "sideEffects": "None", "admissionReviewVersions": ["v1"],
        }],
    })
}

/// Service account, deployment and service of a gateway; `kind` is `ingressgateway` or `egressgateway`.
fn gateway(
    options: &InstallOptions,
    kind: &str,
    service_type: &str,
) -> Result<Vec<Value>, InjectError> {
    let name = format!("istio-{kind}");
    let labels = json!({ "app": name, "istio": kind });
    let template = gateway_pod(options, &name, kind)?;
    let port = |name: &str, port: u16, target: u16| json!({ "name": name, "port": port, "targetPort": target, "protocol": "TCP" });
    let mut ports = vec![port("http2", 80, 8080), port("https", 443, 8443)];
    if service_type == "LoadBalancer" {
        ports.insert(0, port("status-port", 15021, 15021));
    }
    let account = format!("{name}-service-account");
    let mut all = access::gateway(&name, &account, &labels).to_vec();
    all.extend([
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(&account, labels.clone()) }),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(&name, labels.clone()),
            "spec": { "replicas": 1, "selector": { "matchLabels": labels }, "template": template },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata(&name, labels.clone()),
            "spec": { "type": service_type, "selector": labels, "ports": ports },
        }),
    ]);
    Ok(all)
}

/// The pod template of a gateway, filled in by the injector's own code: so it does not need the webhook, and has the sidecar's environment.
fn gateway_pod(options: &InstallOptions, name: &str, kind: &str) -> Result<Value, InjectError> {
    let pod = json!({
        "metadata": {
            "labels": { "app": name, "istio": kind, "sidecar.istio.io/inject": "false" },
            "annotations": { "inject.istio.io/templates": "gateway" },
        },
        "spec": {
            "serviceAccountName": format!("{name}-service-account"),
            // What its account may read is asked by the control plane; the gateway itself, which faces strangers, needs no token for the API.
            "automountServiceAccountToken": false,
            "containers": [{
                "name": mesh_inject::PROXY_CONTAINER,
                "image": "auto",
                "ports": [
                    { "containerPort": 15021, "protocol": "TCP" },
                    { "containerPort": 8080, "protocol": "TCP" },
                    { "containerPort": 8443, "protocol": "TCP" },
                ],
                "readinessProbe": { "httpGet": { "path": "/healthz/ready", "port": 15021 }, "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 4 },
            }],
        },
    });
    let wrong = |error: mesh_api::ParseError| InjectError::Annotation {
        name: "installation".to_owned(),
        value: error.path.clone(),
        expected: format!("a valid setting ({error})"),
    };
    let mesh = MeshConfig::from_value(&mesh_settings(options)).map_err(wrong)?;
    let config = InjectorConfig::from_config_map("", &injector_values(options).to_string())
        .map_err(wrong)?;
    let workload = Workload {
        api_version: "apps/v1".to_owned(),
        kind: "Deployment".to_owned(),
        name: name.to_owned(),
    };
    let context = InjectContext {
        namespace: NAMESPACE,
        namespace_labels: &BTreeMap::new(),
        mesh: &mesh,
        config: &config,
        revision: &options.revision,
        native_sidecars: false,
        workload: Some(&workload),
    };
    match mesh_inject::fill(&pod, &context)? {
        Outcome::Patched(patched) => Ok(patched.pod),
        Outcome::Skipped(_) => Err(InjectError::NoProxyContainer),
    }
}
