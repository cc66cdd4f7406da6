//! The spec of an IstioOperator as far as this mesh has it, typed. Every field is one of the table's, which has checked it before.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

/// What is installed, and how.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Spec {
    pub(super) profile: String,
    pub(super) hub: String,
    pub(super) tag: String,
    pub(super) revision: String,
    pub(super) namespace: String,
    pub(super) mesh_config: Map<String, Value>,
    pub(super) components: Components,
    pub(super) values: Values,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Components {
    pub(super) base: Switch,
    pub(super) pilot: Component,
    pub(super) istiod_remote: Switch,
    pub(super) ingress_gateways: Vec<Component>,
    pub(super) egress_gateways: Vec<Component>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Switch {
    pub(super) enabled: bool,
}

/// The control plane or a gateway.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Component {
    pub(super) name: String,
    pub(super) enabled: bool,
    pub(super) namespace: String,
    pub(super) label: BTreeMap<String, String>,
    pub(super) hub: String,
    pub(super) tag: String,
    pub(super) k8s: Value,
}

/// What Kubernetes is told about a Deployment and what belongs to it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct K8s {
    pub(super) affinity: Option<Value>,
    pub(super) env: Vec<Value>,
    pub(super) hpa_spec: Map<String, Value>,
    pub(super) image_pull_policy: String,
    pub(super) node_selector: BTreeMap<String, String>,
    pub(super) overlays: Vec<Overlay>,
    pub(super) pod_annotations: BTreeMap<String, String>,
    pub(super) pod_disruption_budget: Map<String, Value>,
    pub(super) pod_labels: BTreeMap<String, String>,
    pub(super) priority_class_name: String,
    pub(super) readiness_probe: Option<Value>,
    pub(super) replica_count: Option<i64>,
    pub(super) resources: Option<Value>,
    pub(super) security_context: Map<String, Value>,
    pub(super) service: Map<String, Value>,
    pub(super) service_annotations: BTreeMap<String, String>,
    pub(super) strategy: Option<Value>,
    pub(super) tolerations: Vec<Value>,
    pub(super) topology_spread_constraints: Vec<Value>,
    pub(super) volume_mounts: Vec<Value>,
    pub(super) volumes: Vec<Value>,
}

/// Changes to one object that was made.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Overlay {
    /// Only for people: the kind tells it.
    #[serde(default, rename = "apiVersion")]
    pub(super) _api_version: String,
    pub(super) kind: String,
    pub(super) name: String,
    #[serde(default)]
    pub(super) patches: Vec<OverlayPatch>,
}

/// Without a value, what is at the path is removed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OverlayPatch {
    pub(super) path: String,
    #[serde(default)]
    pub(super) value: Option<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Values {
    pub(super) global: Global,
    pub(super) pilot: Pilot,
    /// By the gateway's name.
    pub(super) gateways: BTreeMap<String, GatewayValues>,
    pub(super) sidecar_injector_webhook: Injector,
    pub(super) istiod_remote: Remote,
    pub(super) revision_tags: Vec<String>,
    pub(super) default_revision: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Global {
    pub(super) hub: String,
    pub(super) tag: String,
    pub(super) image_pull_policy: String,
    pub(super) image_pull_secrets: Vec<String>,
    pub(super) istio_namespace: String,
    pub(super) logging: Logging,
    pub(super) multi_cluster: MultiCluster,
    pub(super) default_pod_disruption_budget: Switch,
    pub(super) priority_class_name: String,
    pub(super) platform: String,
    pub(super) remote_pilot_address: String,
    pub(super) config_validation: Option<bool>,
    pub(super) proxy: Proxy,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Logging {
    pub(super) level: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct MultiCluster {
    pub(super) cluster_name: String,
}

/// Everything else of the proxy's goes to the injector as it is.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Proxy {
    pub(super) image: String,
    pub(super) auto_inject: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Cpu {
    pub(super) target_average_utilization: Option<i64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Pilot {
    pub(super) hub: String,
    pub(super) tag: String,
    pub(super) image: String,
    pub(super) deployment_labels: BTreeMap<String, String>,
    pub(super) service_account_annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    pub(super) workload: WorkloadValues,
}

/// The chart's older names for what [`K8s`] holds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct WorkloadValues {
    pub(super) affinity: Option<Value>,
    pub(super) autoscale_enabled: bool,
    pub(super) autoscale_max: Option<i64>,
    pub(super) autoscale_min: Option<i64>,
    pub(super) cpu: Cpu,
    pub(super) env: BTreeMap<String, String>,
    pub(super) node_selector: Option<Value>,
    pub(super) pod_annotations: Option<Value>,
    pub(super) pod_labels: Option<Value>,
    pub(super) replica_count: Option<i64>,
    pub(super) resources: Option<Value>,
    pub(super) rolling_max_surge: Option<Value>,
    pub(super) rolling_max_unavailable: Option<Value>,
    pub(super) service_annotations: Option<Value>,
    pub(super) tolerations: Option<Value>,
    pub(super) topology_spread_constraints: Option<Value>,
}

/// The older names for what a gateway's Service holds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct GatewayValues {
    #[serde(rename = "externalIPs")]
    pub(super) external_ips: Option<Value>,
    pub(super) external_traffic_policy: Option<Value>,
    pub(super) load_balancer_class: Option<Value>,
    #[serde(rename = "loadBalancerIP")]
    pub(super) load_balancer_ip: Option<Value>,
    pub(super) load_balancer_source_ranges: Option<Value>,
    pub(super) ports: Option<Value>,
    #[serde(rename = "type")]
    pub(super) kind: Option<Value>,
    #[serde(flatten)]
    pub(super) workload: WorkloadValues,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Injector {
    pub(super) aliases: Option<Value>,
    pub(super) always_inject_selector: Vec<Value>,
    pub(super) default_templates: Option<Value>,
    pub(super) enable_namespaces_by_default: bool,
    pub(super) injected_annotations: BTreeMap<String, String>,
    pub(super) never_inject_selector: Vec<Value>,
    pub(super) reinvocation_policy: String,
    #[serde(rename = "rewriteAppHTTPProbe")]
    pub(super) rewrite_app_http_probe: Option<bool>,
    pub(super) templates: Option<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Remote {
    #[serde(rename = "injectionURL")]
    pub(super) injection_url: String,
    #[serde(rename = "injectionCABundle")]
    pub(super) injection_ca_bundle: String,
}

impl WorkloadValues {
    /// In the form of [`K8s`], with the rest of what there is to say below them.
    pub(super) fn as_k8s(&self) -> Value {
        let mut k8s = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                k8s.insert(name.to_owned(), value);
            }
        };
        put("affinity", self.affinity.clone());
        put("nodeSelector", self.node_selector.clone());
        put("podAnnotations", self.pod_annotations.clone());
        put("podLabels", self.pod_labels.clone());
        put("replicaCount", self.replica_count.map(Value::from));
        put("resources", self.resources.clone());
        put("serviceAnnotations", self.service_annotations.clone());
        put("tolerations", self.tolerations.clone());
        put(
            "topologySpreadConstraints",
            self.topology_spread_constraints.clone(),
        );
        if !self.env.is_empty() {
            let list = self.env.iter();
            let list =
                list.map(|(name, value)| serde_json::json!({ "name": name, "value": value }));
            put("env", Some(list.collect()));
        }
        let rolling = [
            ("maxSurge", &self.rolling_max_surge),
            ("maxUnavailable", &self.rolling_max_unavailable),
        ];
        for (name, value) in rolling {
            if let Some(value) = value {
                k8s.entry("strategy")
                    .or_insert_with(|| serde_json::json!({}))["rollingUpdate"][name] =
                    percent(value);
            }
        }
        Value::Object(k8s)
    }
}

/// A number that came as a text is a number.
fn percent(value: &Value) -> Value {
    match value.as_str().and_then(|text| text.parse::<i64>().ok()) {
        Some(number) => Value::from(number),
        None => value.clone(),
    }
}

impl GatewayValues {
    /// In the form of [`K8s`].
    pub(super) fn as_k8s(&self) -> Value {
        let mut k8s = self.workload.as_k8s();
        for (name, value) in [
            ("externalIPs", &self.external_ips),
            ("externalTrafficPolicy", &self.external_traffic_policy),
            ("loadBalancerClass", &self.load_balancer_class),
            ("loadBalancerIP", &self.load_balancer_ip),
            (
                "loadBalancerSourceRanges",
                &self.load_balancer_source_ranges,
            ),
            ("ports", &self.ports),
            ("type", &self.kind),
        ] {
            if let Some(value) = value {
                k8s["service"][name] = value.clone();
            }
        }
        k8s
    }
}
