//! The two keys of the ConfigMap as users write them.

use std::collections::BTreeMap;

use mesh_api::{ParseError, yaml};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{InjectorConfig, Selector};

/// Templates that are compiled in; a ConfigMap can't replace them.
const BUILT_IN: &[&str] = &["sidecar", "gateway"];

/// The key `config`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ConfigKey {
    policy: Option<Policy>,
    always_inject_selector: Vec<Selector>,
    never_inject_selector: Vec<Selector>,
    injected_annotations: BTreeMap<String, String>,
    templates: BTreeMap<String, String>,
    default_templates: Option<Vec<String>>,
    aliases: BTreeMap<String, Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Policy {
    Enabled,
    Disabled,
}

/// The key `values`: the part of the chart's values that injection uses.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ValuesKey {
    global: Global,
    sidecar_injector_webhook: InjectorWebhook,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct InjectorWebhook {
    #[serde(rename = "rewriteAppHTTPProbe")]
    rewrite_app_http_probe: Option<bool>,
    injected_annotations: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Global {
    hub: String,
    /// A number is a tag, too (`--set global.tag=1`).
    tag: Value,
    image_pull_policy: String,
    image_pull_secrets: Vec<String>,
    ca_address: String,
    #[serde(rename = "meshID")]
    mesh_id: String,
    network: String,
    multi_cluster: MultiCluster,
    logging: Logging,
    proxy: Proxy,
    #[serde(rename = "proxy_init")]
    proxy_init: ProxyInit,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct MultiCluster {
    cluster_name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Logging {
    level: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ProxyInit {
    resources: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Proxy {
    image: String,
    log_level: Option<String>,
    component_log_level: Option<String>,
    resources: Option<Value>,
    cluster_domain: Option<String>,
    privileged: bool,
    lifecycle: Map<String, Value>,
    seccomp_profile: Map<String, Value>,
    readiness_initial_delay_seconds: Option<u32>,
    readiness_period_seconds: Option<u32>,
    readiness_failure_threshold: Option<u32>,
    startup_probe: StartupProbe,
    #[serde(rename = "includeIPRanges")]
    include_ip_ranges: Option<String>,
    #[serde(rename = "excludeIPRanges")]
    exclude_ip_ranges: Option<String>,
    include_inbound_ports: Option<String>,
    exclude_inbound_ports: Option<String>,
    include_outbound_ports: Option<String>,
    exclude_outbound_ports: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct StartupProbe {
    enabled: bool,
    failure_threshold: u32,
}

impl Default for StartupProbe {
    fn default() -> Self {
        Self {
            enabled: true,
            failure_threshold: 600,
        }
    }
}

/// Lays the key `config` over the settings.
pub(super) fn config_key(text: &str, into: &mut InjectorConfig) -> Result<(), ParseError> {
    let config: ConfigKey = key(text, "config")?;
    into.enabled = config.policy != Some(Policy::Disabled);
    into.always_inject = config.always_inject_selector;
    into.never_inject = config.never_inject_selector;
    into.injected_annotations = config.injected_annotations;
    for (name, text) in config.templates {
        let overlay = template(&name, &text)?;
        into.templates.insert(name, overlay);
    }
    if let Some(names) = config.default_templates {
        into.default_templates = names;
    }
    into.aliases = config.aliases;
    Ok(())
}

/// A pod overlay in YAML. Istio runs its templates through a text engine; here only such texts work as need none.
fn template(name: &str, text: &str) -> Result<Value, ParseError> {
    let wrong = |message: String, expected: &str| ParseError {
        path: format!("config.templates.{name}"),
        message,
        expected: expected.to_owned(),
    };
    if BUILT_IN.contains(&name) {
        let message = "this template is built in and can't be replaced".to_owned();
        return Err(wrong(
            message,
            "a template of another name, listed beside it in defaultTemplates",
        ));
    }
    if text.contains("{{") {
        let message = "template actions ({{ ... }}) are not supported".to_owned();
        return Err(wrong(
            message,
            "a plain overlay such as \"spec: {containers: [{name: istio-proxy, env: [...]}]}\"",
        ));
    }
    let documents =
        yaml::documents(text, name).map_err(|error| wrong(error.to_string(), "YAML"))?;
    let known = |key: &String| ["metadata", "spec"].contains(&key.as_str());
    match documents.as_slice() {
        [overlay]
            if overlay
                .as_object()
                .is_some_and(|fields| fields.keys().all(known)) =>
        {
            Ok(overlay.clone())
        }
        _ => Err(wrong(
            "not an overlay of a pod".to_owned(),
            "one document with the fields metadata and spec",
        )),
    }
}

/// Lays the key `values` over the settings.
pub(super) fn values_key(text: &str, into: &mut InjectorConfig) -> Result<(), ParseError> {
    let ValuesKey {
        global,
        sidecar_injector_webhook: webhook,
    } = key(text, "values")?;
    let tag = match &global.tag {
        Value::Null => String::new(),
        Value::String(tag) => tag.clone(),
        other => other.to_string(),
    };
    if let Some(image) = image(&global.hub, &global.proxy.image, &tag) {
        into.image = image;
    }
    set(&mut into.rewrite_probes, webhook.rewrite_app_http_probe);
    into.injected_annotations
        .extend(webhook.injected_annotations);
    into.image_pull_policy = global.image_pull_policy;
    into.image_pull_secrets = global.image_pull_secrets;
    into.ca_address = global.ca_address;
    into.mesh_id = global.mesh_id;
    into.network = global.network;
    into.init_resources = global.proxy_init.resources;
    let given = |text: String| Some(text).filter(|text| !text.is_empty());
    set(
        &mut into.cluster_id,
        given(global.multi_cluster.cluster_name),
    );
    set(&mut into.agent_log_level, given(global.logging.level));
    proxy(global.proxy, into);
    Ok(())
}

fn proxy(proxy: Proxy, into: &mut InjectorConfig) {
    set(&mut into.resources, proxy.resources);
    set(&mut into.log_level, proxy.log_level);
    set(&mut into.component_log_level, proxy.component_log_level);
    set(&mut into.cluster_domain, proxy.cluster_domain);
    into.privileged = proxy.privileged;
    into.lifecycle = filled(proxy.lifecycle);
    into.seccomp = filled(proxy.seccomp_profile);
    let readiness = &mut into.readiness;
    set(
        &mut readiness.initial_delay,
        proxy.readiness_initial_delay_seconds,
    );
    set(&mut readiness.period, proxy.readiness_period_seconds);
    set(
        &mut readiness.failure_threshold,
        proxy.readiness_failure_threshold,
    );
    into.startup_failures = proxy
        .startup_probe
        .enabled
        .then_some(proxy.startup_probe.failure_threshold);
    let capture = &mut into.capture;
    set(&mut capture.include_ranges, proxy.include_ip_ranges);
    set(&mut capture.exclude_ranges, proxy.exclude_ip_ranges);
    set(
        &mut capture.include_inbound_ports,
        proxy.include_inbound_ports,
    );
    set(
        &mut capture.exclude_inbound_ports,
        proxy.exclude_inbound_ports,
    );
    set(
        &mut capture.include_outbound_ports,
        proxy.include_outbound_ports,
    );
    set(
        &mut capture.exclude_outbound_ports,
        proxy.exclude_outbound_ports,
    );
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

/// Charts write `{}` for "not set".
fn filled(map: Map<String, Value>) -> Option<Value> {
    (!map.is_empty()).then(|| map.into())
}

/// The image from its parts, `None` where nothing is said; an image with a registry or a tag stands for itself.
fn image(hub: &str, name: &str, tag: &str) -> Option<String> {
    if name.is_empty() && hub.is_empty() && tag.is_empty() {
        return None;
    }
    if name.contains(['/', ':']) {
        return Some(name.to_owned());
    }
    let name = if name.is_empty() { "mesh" } else { name };
    let tag = if tag.is_empty() {
        env!("CARGO_PKG_VERSION")
    } else {
        tag
    };
    Some(if hub.is_empty() {
        format!("{name}:{tag}")
    } else {
        format!("{hub}/{name}:{tag}")
    })
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
