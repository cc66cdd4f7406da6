//! Settings of the injector: the ConfigMap `istio-sidecar-injector` with its keys `config` and `values`.

use std::collections::BTreeMap;

use mesh_api::{ParseError, yaml};
use serde::Deserialize;
use serde_json::{Value, json};

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
        }
    }
}

/// The key `config`. Templates are compiled in, so a text that brings its own is refused.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ConfigKey {
    policy: Option<Policy>,
    always_inject_selector: Vec<Selector>,
    never_inject_selector: Vec<Selector>,
    injected_annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Policy {
    Enabled,
    Disabled,
}

/// The key `values`: the part of the chart's values that injection uses.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ValuesKey {
    global: Global,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Global {
    hub: String,
    tag: String,
    image_pull_policy: String,
    #[serde(rename = "meshID")]
    mesh_id: String,
    network: String,
    multi_cluster: MultiCluster,
    proxy: Proxy,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct MultiCluster {
    cluster_name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Proxy {
    image: String,
    log_level: Option<String>,
    component_log_level: Option<String>,
    resources: Option<Value>,
    #[serde(rename = "includeIPRanges")]
    include_ip_ranges: Option<String>,
    #[serde(rename = "excludeIPRanges")]
    exclude_ip_ranges: Option<String>,
    include_inbound_ports: Option<String>,
    exclude_inbound_ports: Option<String>,
    include_outbound_ports: Option<String>,
    exclude_outbound_ports: Option<String>,
}

impl InjectorConfig {
    /// Reads the settings from the two keys of the ConfigMap, over the defaults; an empty text is no setting.
    ///
    /// # Errors
    /// A text that is not YAML or JSON, an unknown setting, or a value of the wrong form; the path begins with `config` or `values`.
    pub fn from_config_map(config: &str, values: &str) -> Result<Self, ParseError> {
        let config: ConfigKey = key(config, "config")?;
        let global = key::<ValuesKey>(values, "values")?.global;
        let proxy = global.proxy;
        let default = Self::default();
        let or = |value: String, default: String| if value.is_empty() { default } else { value };
        Ok(Self {
            enabled: config.policy != Some(Policy::Disabled),
            always_inject: config.always_inject_selector,
            never_inject: config.never_inject_selector,
            injected_annotations: config.injected_annotations,
            image: image(&global.hub, &proxy.image, &global.tag, default.image),
            image_pull_policy: global.image_pull_policy,
            resources: proxy.resources.unwrap_or(default.resources),
            log_level: proxy.log_level.unwrap_or(default.log_level),
            component_log_level: proxy
                .component_log_level
                .unwrap_or(default.component_log_level),
            cluster_id: or(global.multi_cluster.cluster_name, default.cluster_id),
            mesh_id: global.mesh_id,
            network: global.network,
            capture: Capture {
                include_ranges: proxy
                    .include_ip_ranges
                    .unwrap_or(default.capture.include_ranges),
                exclude_ranges: proxy.exclude_ip_ranges.unwrap_or_default(),
                include_inbound_ports: proxy
                    .include_inbound_ports
                    .unwrap_or(default.capture.include_inbound_ports),
                exclude_inbound_ports: proxy.exclude_inbound_ports.unwrap_or_default(),
                include_outbound_ports: proxy.include_outbound_ports.unwrap_or_default(),
                exclude_outbound_ports: proxy.exclude_outbound_ports.unwrap_or_default(),
            },
        })
    }
}

/// The image from its parts; an image with a registry or a tag stands for itself.
fn image(hub: &str, name: &str, tag: &str, default: String) -> String {
    if name.is_empty() && hub.is_empty() && tag.is_empty() {
        return default;
    }
    if name.contains(['/', ':']) {
        return name.to_owned();
    }
    let name = if name.is_empty() { "mesh" } else { name };
    let tag = if tag.is_empty() {
        env!("CARGO_PKG_VERSION")
    } else {
        tag
    };
    if hub.is_empty() {
        format!("{name}:{tag}")
    } else {
        format!("{hub}/{name}:{tag}")
    }
}

/// Reads one key of the ConfigMap.
fn key<T: serde::de::DeserializeOwned + Default>(text: &str, name: &str) -> Result<T, ParseError> {
    let wrong = |message: String| ParseError {
        path: name.to_owned(),
        message,
        expected: String::new(),
    };
    let documents = yaml::documents(text, name).map_err(|error| wrong(error.to_string()))?;
    match documents.as_slice() {
        [] => Ok(T::default()),
        [value] => T::deserialize(value).map_err(|error| wrong(error.to_string())),
        _ => Err(wrong("more than one document".to_owned())),
    }
}
