//! Settings of the injector: the ConfigMap `istio-sidecar-injector` with its keys `config` and `values`.

use std::collections::BTreeMap;

use mesh_api::ParseError;
use serde::Deserialize;
use serde_json::{Value, json};

mod read;

/// Settings of the injector.
#[derive(Debug, Clone, PartialEq)]
pub struct InjectorConfig {
    /// Whether a pod that says nothing gets a sidecar; default yes.
    pub enabled: bool,
    /// Pods that get a sidecar although the policy is disabled.
    pub always_inject: Vec<Selector>,
    /// Pods that never get one.
    pub never_inject: Vec<Selector>,
    /// Annotations that every injected pod gets.
    pub injected_annotations: BTreeMap<String, String>,
    /// Image of proxy and init container; default `mesh:<version>`.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`; empty leaves it to Kubernetes.
    pub image_pull_policy: String,
    /// Resources of proxy and init container.
    pub resources: Value,
    /// Log level of the proxy; default `warning`.
    pub log_level: String,
    /// Log levels of parts of the proxy; default `misc:error`.
    pub component_log_level: String,
    /// Name of the cluster; default `Kubernetes`.
    pub cluster_id: String,
    /// Name of the mesh; empty is the trust domain.
    pub mesh_id: String,
    /// Network of the cluster; empty is none.
    pub network: String,
    /// What is captured where the pod does not say otherwise.
    pub capture: Capture,
    /// Pod overlays of users by name, for `inject.istio.io/templates` and [`Self::default_templates`].
    pub templates: BTreeMap<String, Value>,
    /// Templates of a pod that names none; default `sidecar`.
    pub default_templates: Vec<String>,
    /// Names that stand for several templates.
    pub aliases: BTreeMap<String, Vec<String>>,
    /// Whether probes of the application are answered by the agent in its stead; default yes.
    pub rewrite_probes: bool,
    /// Timing of the readiness probe; default 0 s, 15 s, 4 failures.
    pub readiness: Readiness,
    /// How many times a second apart the proxy may fail to start; default 600, `None` is no startup probe.
    pub startup_failures: Option<u32>,
    /// Seccomp profile of proxy and init container.
    pub seccomp: Option<Value>,
    /// Secrets to pull the image with; each pod must have them in its own namespace.
    pub image_pull_secrets: Vec<String>,
    /// Resources of the init container where they differ from the proxy's.
    pub init_resources: Option<Value>,
    /// Whether the containers run privileged; default no.
    pub privileged: bool,
    /// Lifecycle hooks of the proxy.
    pub lifecycle: Option<Value>,
    /// DNS domain of the cluster; default `cluster.local`.
    pub cluster_domain: String,
    /// `host:port` of the authority; empty is the control plane.
    pub ca_address: String,
    /// Level of the agent's log; default `default:info`.
    pub agent_log_level: String,
}

/// Timing of the readiness probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// Seconds before the first probe.
    pub initial_delay: u32,
    /// Seconds between probes.
    pub period: u32,
    /// Failures after which the pod is not ready.
    pub failure_threshold: u32,
}

impl Default for Readiness {
    fn default() -> Self {
        Self {
            initial_delay: 0,
            period: 15,
            failure_threshold: 4,
        }
    }
}

/// What is captured. Lists are separated by commas; `*` is everything, an empty list is nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capture {
    /// Destination ranges to capture; default `*`.
    pub include_ranges: String,
    /// Destination ranges not to capture.
    pub exclude_ranges: String,
    /// Incoming ports to capture; default `*`.
    pub include_inbound_ports: String,
    /// Incoming ports not to capture, beside the proxy's own.
    pub exclude_inbound_ports: String,
    /// Outgoing ports to capture in any case.
    pub include_outbound_ports: String,
    /// Outgoing ports not to capture.
    pub exclude_outbound_ports: String,
}

/// A Kubernetes label selector.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Selector {
    /// Labels with exactly these values.
    pub match_labels: BTreeMap<String, String>,
    /// Conditions on labels.
    pub match_expressions: Vec<Requirement>,
}

/// A condition on a label.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requirement {
    /// Key of the label.
    pub key: String,
    /// What is asked.
    pub operator: Operator,
    /// Values, for `In` and `NotIn`.
    #[serde(default)]
    pub values: Vec<String>,
}

/// What a condition asks of a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Operator {
    /// One of the values.
    In,
    /// None of the values, or no such label.
    NotIn,
    /// There at all.
    Exists,
    /// Not there.
    DoesNotExist,
}

impl Selector {
    /// True if labels fulfil all conditions. A selector without conditions matches nothing here, as in Istio's injector.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        if self.match_labels.is_empty() && self.match_expressions.is_empty() {
            return false;
        }
        self.match_labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(|requirement| {
                let value = labels.get(&requirement.key);
                let listed = value.is_some_and(|value| requirement.values.contains(value));
                match requirement.operator {
                    Operator::In => listed,
                    Operator::NotIn => !listed,
                    Operator::Exists => value.is_some(),
                    Operator::DoesNotExist => value.is_none(),
                }
            })
    }
}

impl Default for Capture {
    fn default() -> Self {
        Self {
            include_ranges: "*".to_owned(),
            exclude_ranges: String::new(),
            include_inbound_ports: "*".to_owned(),
            exclude_inbound_ports: String::new(),
            include_outbound_ports: String::new(),
            exclude_outbound_ports: String::new(),
        }
    }
}

impl Default for InjectorConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            always_inject: Vec::new(),
            never_inject: Vec::new(),
            injected_annotations: BTreeMap::new(),
            image: concat!("mesh:", env!("CARGO_PKG_VERSION")).to_owned(),
            image_pull_policy: String::new(),
            resources: json!({ "limits": { "cpu": "2000m", "memory": "1024Mi" }, "requests": { "cpu": "100m", "memory": "128Mi" } }),
            log_level: "warning".to_owned(),
            component_log_level: "misc:error".to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            mesh_id: String::new(),
            network: String::new(),
            capture: Capture::default(),
            templates: BTreeMap::new(),
            default_templates: vec!["sidecar".to_owned()],
            aliases: BTreeMap::new(),
            rewrite_probes: true,
            readiness: Readiness::default(),
            startup_failures: Some(600),
            seccomp: None,
            image_pull_secrets: Vec::new(),
            init_resources: None,
            privileged: false,
            lifecycle: None,
            cluster_domain: "cluster.local".to_owned(),
            ca_address: String::new(),
            agent_log_level: "default:info".to_owned(),
        }
    }
}

impl InjectorConfig {
    /// Reads the settings from the two keys of the ConfigMap, over the defaults; an empty text is no setting.
    ///
    /// # Errors
    /// A text that is not YAML or JSON, an unknown setting, or a value of the wrong form; the path begins with `config` or `values`.
    pub fn from_config_map(config: &str, values: &str) -> Result<Self, ParseError> {
        let mut result = Self::default();
        read::config_key(config, &mut result)?;
        read::values_key(values, &mut result)?;
        Ok(result)
    }
}
