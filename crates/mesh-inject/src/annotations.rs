//! What a pod asks for by annotations: read, checked, and laid over the injector's settings.

use mesh_api::mesh_config::{InterceptionMode, ProxyConfig};
use serde_json::{Map, Value, json};

use crate::config::{Capture, Readiness};
use crate::metrics;
use crate::template::{Builtin, Chosen};
use crate::{InjectContext, InjectError, PodView};

mod check;

use check::{Lists, interfaces, named_list, quantity};

/// Annotations and labels of Istio that injection reads.
pub const HONOURED: &[&str] = &[
    "inject.istio.io/templates",
    "istio.io/rev",
    "kubectl.kubernetes.io/default-container",
    "kubectl.kubernetes.io/default-logs-container",
    "prometheus.io/path",
    "prometheus.io/port",
    "prometheus.io/scrape",
    "prometheus.istio.io/merge-metrics",
    "proxy.istio.io/config",
    "proxy.istio.io/overrides",
    "readiness.status.sidecar.istio.io/failureThreshold",
    "readiness.status.sidecar.istio.io/initialDelaySeconds",
    "readiness.status.sidecar.istio.io/periodSeconds",
    "sidecar.istio.io/agentLogLevel",
    "sidecar.istio.io/componentLogLevel",
    "sidecar.istio.io/discoveryAddress",
    "sidecar.istio.io/inject",
    "sidecar.istio.io/interceptionMode",
    "sidecar.istio.io/logLevel",
    "sidecar.istio.io/nativeSidecar",
    "sidecar.istio.io/proxyCPU",
    "sidecar.istio.io/proxyCPULimit",
    "sidecar.istio.io/proxyImage",
    "sidecar.istio.io/proxyMemory",
    "sidecar.istio.io/proxyMemoryLimit",
    "sidecar.istio.io/rewriteAppHTTPProbers",
    "sidecar.istio.io/status",
    "sidecar.istio.io/userVolume",
    "sidecar.istio.io/userVolumeMount",
    "status.sidecar.istio.io/port",
    "traffic.sidecar.istio.io/excludeInboundPorts",
    "traffic.sidecar.istio.io/excludeInterfaces",
    "traffic.sidecar.istio.io/excludeOutboundIPRanges",
    "traffic.sidecar.istio.io/excludeOutboundPorts",
    "traffic.sidecar.istio.io/includeInboundPorts",
    "traffic.sidecar.istio.io/includeOutboundIPRanges",
    "traffic.sidecar.istio.io/includeOutboundPorts",
    "traffic.sidecar.istio.io/kubevirtInterfaces",
    "istio.io/reroute-virtual-interfaces",
];

/// Annotations of Istio that this version does not implement; a pod with one gets a warning.
pub const NOT_IMPLEMENTED: &[&str] = &[
    "ambient.istio.io/bypass-inbound-capture",
    "ambient.istio.io/dns-capture",
    "ambient.istio.io/redirection",
    "readiness.status.sidecar.istio.io/applicationPorts",
    "sidecar.istio.io/bootstrapOverride",
    "sidecar.istio.io/extraStatTags",
    "sidecar.istio.io/proxyImageType",
    "sidecar.istio.io/statsCompression",
    "sidecar.istio.io/statsEvictionInterval",
    "sidecar.istio.io/statsFlushInterval",
    "sidecar.istio.io/statsHistogramBins",
    "sidecar.istio.io/statsHistogramBuckets",
    "sidecar.istio.io/statsInclusionPrefixes",
    "sidecar.istio.io/statsInclusionRegexps",
    "sidecar.istio.io/statsInclusionSuffixes",
];

/// What is injected, after all annotations.
pub(crate) struct Settings<'a> {
    pub(crate) templates: Chosen<'a>,
    pub(crate) native: bool,
    pub(crate) hold: bool,
    pub(crate) proxy: ProxyConfig,
    pub(crate) capture: Capture,
    pub(crate) reroute_interfaces: String,
    pub(crate) exclude_interfaces: String,
    pub(crate) interception: InterceptionMode,
    pub(crate) image: String,
    pub(crate) resources: Value,
    pub(crate) log_level: String,
    pub(crate) component_log_level: String,
    pub(crate) agent_log_level: String,
    pub(crate) readiness: Readiness,
    pub(crate) rewrite_probes: bool,
    /// Whether the agent shows the application's metrics with the proxy's.
    pub(crate) merge_metrics: bool,
    pub(crate) user_volumes: Vec<Value>,
    pub(crate) user_mounts: Vec<Value>,
    pub(crate) warnings: Vec<String>,
}

impl<'a> Settings<'a> {
    /// Reads the annotations of a pod.
    pub(crate) fn read(
        pod: &PodView<'_>,
        context: &InjectContext<'a>,
    ) -> Result<Self, InjectError> {
        let config = context.config;
        let mut warnings = warnings(pod);
        let proxy = proxy_config(pod, context, &mut warnings)?;
        let text = |name: &str, default: &str| pod.annotation(name).unwrap_or(default).to_owned();
        let switch = |name: &str, default: bool| match pod.annotation(name) {
            Some(value) => parse_bool(name, value),
            None => Ok(default),
        };
        Ok(Self {
            templates: Chosen::of(pod, context, &mut warnings)?,
            native: switch("sidecar.istio.io/nativeSidecar", context.native_sidecars)?,
            hold: proxy.hold_application_until_proxy_starts,
            capture: capture(pod, &config.capture)?,
            reroute_interfaces: match interfaces(pod, "istio.io/reroute-virtual-interfaces")? {
                list if list.is_empty() => {
                    interfaces(pod, "traffic.sidecar.istio.io/kubevirtInterfaces")?
                }
                list => list,
            },
            exclude_interfaces: interfaces(pod, "traffic.sidecar.istio.io/excludeInterfaces")?,
            interception: interception(pod, &proxy)?,
            proxy,
            image: text("sidecar.istio.io/proxyImage", &config.image),
            resources: resources(pod, &config.resources)?,
            log_level: text("sidecar.istio.io/logLevel", &config.log_level),
            component_log_level: text(
                "sidecar.istio.io/componentLogLevel",
                &config.component_log_level,
            ),
            agent_log_level: text("sidecar.istio.io/agentLogLevel", &config.agent_log_level),
            readiness: readiness(pod, config.readiness)?,
            rewrite_probes: switch(
                "sidecar.istio.io/rewriteAppHTTPProbers",
                config.rewrite_probes,
            )?,
            merge_metrics: switch(metrics::SWITCH, context.mesh.enable_prometheus_merge)?,
            user_volumes: named_list(pod, "sidecar.istio.io/userVolume")?,
            user_mounts: named_list(pod, "sidecar.istio.io/userVolumeMount")?,
            warnings,
        })
    }

    /// Whether the proxy stands beside an application.
    pub(crate) fn is_sidecar(&self) -> bool {
        self.templates.builtin == Some(Builtin::Sidecar)
    }

    /// Whether the proxy is the application.
    pub(crate) fn is_gateway(&self) -> bool {
        self.templates.builtin == Some(Builtin::Gateway)
    }
}

/// What is asked for and has no effect, and what will not go well.
fn warnings(pod: &PodView<'_>) -> Vec<String> {
    let mut warnings: Vec<String> = pod
        .annotations()
        .filter(|name| NOT_IMPLEMENTED.contains(name))
        .map(|name| {
            format!(
                "annotation {name} is not implemented by this version of mesh and has no effect"
            )
        })
        .collect();
    let user = |owner: Option<&Value>| {
        owner.and_then(|owner| owner.get("securityContext")?.get("runAsUser")?.as_i64())
    };
    let pod_user = pod.spec.get("securityContext");
    let pod_user = pod_user.and_then(|security| security.get("runAsUser")?.as_i64());
    for container in pod.app_containers() {
        if user(Some(container)).or(pod_user) == Some(1337) {
            let name = container["name"].as_str().unwrap_or_default();
            warnings.push(format!(
                "container {name} runs as user 1337, which is the proxy's: its traffic is not captured; let it run as another user"
            ));
        }
    }
    warnings
}

fn readiness(pod: &PodView<'_>, default: Readiness) -> Result<Readiness, InjectError> {
    let number = |name: &str, default: u32| {
        let name = format!("readiness.status.sidecar.istio.io/{name}");
        match pod.annotation(&name) {
            Some(value) => value
                .parse()
                .map_err(|_| wrong(&name, value, "a whole number")),
            None => Ok(default),
        }
    };
    Ok(Readiness {
        initial_delay: number("initialDelaySeconds", default.initial_delay)?,
        period: number("periodSeconds", default.period)?,
        failure_threshold: number("failureThreshold", default.failure_threshold)?,
    })
}

pub(crate) fn wrong(name: &str, value: &str, expected: &str) -> InjectError {
    InjectError::Annotation {
        name: name.to_owned(),
        value: value.to_owned(),
        expected: expected.to_owned(),
    }
}

/// Reads a boolean as Go does.
pub(crate) fn parse_bool(name: &str, value: &str) -> Result<bool, InjectError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(wrong(name, value, "\"true\" or \"false\"")),
    }
}

/// The mesh's proxy settings with the pod's own over them.
fn proxy_config(
    pod: &PodView<'_>,
    context: &InjectContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<ProxyConfig, InjectError> {
    let name = "proxy.istio.io/config";
    let mut proxy = context.mesh.default_config.clone();
    if let Some(text) = pod.annotation(name) {
        let own = proxy
            .overlaid(text)
            .map_err(|error| wrong(name, text, &format!("a proxy configuration ({error})")))?;
        warnings.extend(own.unsupported().iter().filter(|field| !proxy.unsupported().contains(field)).map(|field| {
            format!("annotation {name}: {field} is not implemented by this version of mesh and has no effect")
        }));
        proxy = own;
    }
    if let Some(address) = pod.annotation("sidecar.istio.io/discoveryAddress") {
        let (host, port) = address.rsplit_once(':').unwrap_or_default();
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(wrong(
                "sidecar.istio.io/discoveryAddress",
                address,
                "a host and a port such as istiod.istio-system.svc:15012",
            ));
        }
        proxy.discovery_address = address.to_owned();
    }
    if let Some(port) = pod.annotation("status.sidecar.istio.io/port") {
        proxy.status_port = port
            .parse()
            .map_err(|_| wrong("status.sidecar.istio.io/port", port, "a port"))?;
    }
    Ok(proxy)
}

fn interception(pod: &PodView<'_>, proxy: &ProxyConfig) -> Result<InterceptionMode, InjectError> {
    let name = "sidecar.istio.io/interceptionMode";
    let mode = match pod.annotation(name) {
        None => proxy.interception_mode,
        Some("REDIRECT") => InterceptionMode::Redirect,
        Some("TPROXY") => InterceptionMode::Tproxy,
        Some("NONE") => InterceptionMode::None,
        Some(value) => return Err(wrong(name, value, "REDIRECT, TPROXY or NONE")),
    };
    Ok(mode)
}

fn capture(pod: &PodView<'_>, default: &Capture) -> Result<Capture, InjectError> {
    let lists = Lists(pod);
    Ok(Capture {
        include_ranges: lists.ranges("includeOutboundIPRanges", &default.include_ranges, true)?,
        exclude_ranges: lists.ranges("excludeOutboundIPRanges", &default.exclude_ranges, false)?,
        include_inbound_ports: lists.ports(
            "includeInboundPorts",
            &default.include_inbound_ports,
            true,
        )?,
        exclude_inbound_ports: lists.ports(
            "excludeInboundPorts",
            &default.exclude_inbound_ports,
            false,
        )?,
        include_outbound_ports: lists.ports(
            "includeOutboundPorts",
            &default.include_outbound_ports,
            false,
        )?,
        exclude_outbound_ports: lists.ports(
            "excludeOutboundPorts",
            &default.exclude_outbound_ports,
            false,
        )?,
    })
}

/// Resources from the annotations alone if there is one, else the injector's.
fn resources(pod: &PodView<'_>, default: &Value) -> Result<Value, InjectError> {
    let names = [
        ("requests", "cpu", "proxyCPU"),
        ("requests", "memory", "proxyMemory"),
        ("limits", "cpu", "proxyCPULimit"),
        ("limits", "memory", "proxyMemoryLimit"),
    ];
    let mut own = Map::new();
    for (kind, resource, name) in names {
        let name = format!("sidecar.istio.io/{name}");
        let Some(value) = pod.annotation(&name) else {
            continue;
        };
        quantity(&name, value)?;
        own.entry(kind).or_insert_with(|| json!({}))[resource] = json!(value);
    }
    Ok(if own.is_empty() {
        default.clone()
    } else {
        Value::Object(own)
    })
}
