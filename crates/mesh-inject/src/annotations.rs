//! What a pod asks for by annotations: read, checked, and laid over the injector's settings.

use mesh_api::mesh_config::{InterceptionMode, ProxyConfig};
use serde_json::{Map, Value, json};

use crate::config::Capture;
use crate::{InjectContext, InjectError, PodView};

/// Annotations and labels of Istio that injection reads.
pub const HONOURED: &[&str] = &[
    "inject.istio.io/templates",
    "istio.io/rev",
    "kubectl.kubernetes.io/default-container",
    "kubectl.kubernetes.io/default-logs-container",
    "proxy.istio.io/config",
    "proxy.istio.io/overrides",
    "readiness.status.sidecar.istio.io/failureThreshold",
    "readiness.status.sidecar.istio.io/initialDelaySeconds",
    "readiness.status.sidecar.istio.io/periodSeconds",
    "sidecar.istio.io/agentLogLevel",
    "sidecar.istio.io/componentLogLevel",
    "sidecar.istio.io/inject",
    "sidecar.istio.io/interceptionMode",
    "sidecar.istio.io/logLevel",
    "sidecar.istio.io/nativeSidecar",
    "sidecar.istio.io/proxyCPU",
    "sidecar.istio.io/proxyCPULimit",
    "sidecar.istio.io/proxyImage",
    "sidecar.istio.io/proxyMemory",
    "sidecar.istio.io/proxyMemoryLimit",
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
    "prometheus.istio.io/merge-metrics",
    "readiness.status.sidecar.istio.io/applicationPorts",
    "sidecar.istio.io/bootstrapOverride",
    "sidecar.istio.io/discoveryAddress",
    "sidecar.istio.io/extraStatTags",
    "sidecar.istio.io/proxyImageType",
    "sidecar.istio.io/rewriteAppHTTPProbers",
    "sidecar.istio.io/statsCompression",
    "sidecar.istio.io/statsEvictionInterval",
    "sidecar.istio.io/statsFlushInterval",
    "sidecar.istio.io/statsHistogramBins",
    "sidecar.istio.io/statsHistogramBuckets",
    "sidecar.istio.io/statsInclusionPrefixes",
    "sidecar.istio.io/statsInclusionRegexps",
    "sidecar.istio.io/statsInclusionSuffixes",
];

/// Which template a pod asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Template {
    Sidecar,
    Gateway,
}

/// What is injected, after all annotations.
pub(crate) struct Settings {
    pub(crate) template: Template,
    pub(crate) native: bool,
    pub(crate) hold: bool,
    pub(crate) proxy: ProxyConfig,
    /// The pod's own proxy settings, as they were written.
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
    pub(crate) user_volumes: Vec<Value>,
    pub(crate) user_mounts: Vec<Value>,
    pub(crate) warnings: Vec<String>,
}

/// Timing of the readiness probe, in seconds and failures.
pub(crate) struct Readiness {
    pub(crate) initial_delay: u32,
    pub(crate) period: u32,
    pub(crate) failure_threshold: u32,
}

impl Settings {
    /// Reads the annotations of a pod.
    pub(crate) fn read(
        pod: &PodView<'_>,
        context: &InjectContext<'_>,
    ) -> Result<Self, InjectError> {
        let config = context.config;
        let mut warnings: Vec<String> = pod
            .annotations()
            .filter(|name| NOT_IMPLEMENTED.contains(name))
            .map(|name| {
                format!(
                    "annotation {name} is not implemented by this version of mesh and has no effect"
                )
            })
            .collect();
        let proxy = proxy_config(pod, context, &mut warnings)?;
        let text = |name: &str, default: &str| pod.annotation(name).unwrap_or(default).to_owned();
        let number = |name: &str, default: u32| match pod.annotation(name) {
            Some(value) => value
                .parse()
                .map_err(|_| wrong(name, value, "a whole number")),
            None => Ok(default),
        };
        let native = match pod.annotation("sidecar.istio.io/nativeSidecar") {
            Some(value) => parse_bool("sidecar.istio.io/nativeSidecar", value)?,
            None => context.native_sidecars,
        };
        Ok(Self {
            template: template(pod, &mut warnings)?,
            native,
            hold: proxy.hold_application_until_proxy_starts,
            capture: capture(pod, &config.capture)?,
            reroute_interfaces: text(
                "istio.io/reroute-virtual-interfaces",
                pod.annotation("traffic.sidecar.istio.io/kubevirtInterfaces")
                    .unwrap_or_default(),
            ),
            exclude_interfaces: text("traffic.sidecar.istio.io/excludeInterfaces", ""),
            interception: interception(pod, &proxy, &mut warnings)?,
            proxy,
            image: text("sidecar.istio.io/proxyImage", &config.image),
            resources: resources(pod, &config.resources)?,
            log_level: text("sidecar.istio.io/logLevel", &config.log_level),
            component_log_level: text(
                "sidecar.istio.io/componentLogLevel",
                &config.component_log_level,
            ),
            agent_log_level: text("sidecar.istio.io/agentLogLevel", "default:info"),
            readiness: Readiness {
                initial_delay: number("readiness.status.sidecar.istio.io/initialDelaySeconds", 0)?,
                period: number("readiness.status.sidecar.istio.io/periodSeconds", 15)?,
                failure_threshold: number("readiness.status.sidecar.istio.io/failureThreshold", 4)?,
            },
            user_volumes: named_list(pod, "sidecar.istio.io/userVolume")?,
            user_mounts: named_list(pod, "sidecar.istio.io/userVolumeMount")?,
            warnings,
        })
    }
}

fn wrong(name: &str, value: &str, expected: &str) -> InjectError {
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

fn template(pod: &PodView<'_>, warnings: &mut Vec<String>) -> Result<Template, InjectError> {
    let asked = pod
        .annotation("inject.istio.io/templates")
        .unwrap_or("sidecar");
    let mut found = Template::Sidecar;
    for name in asked
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
    {
        match name {
            "sidecar" => {}
            "gateway" => found = Template::Gateway,
            other => return Err(InjectError::Template(other.to_owned())),
        }
    }
    if found == Template::Gateway && asked.contains("sidecar") {
        warnings.push("inject.istio.io/templates: a gateway needs no sidecar; only the template \"gateway\" is used".to_owned());
    }
    Ok(found)
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
    if let Some(port) = pod.annotation("status.sidecar.istio.io/port") {
        proxy.status_port = port
            .parse()
            .map_err(|_| wrong("status.sidecar.istio.io/port", port, "a port"))?;
    }
    Ok(proxy)
}

fn interception(
    pod: &PodView<'_>,
    proxy: &ProxyConfig,
    warnings: &mut Vec<String>,
) -> Result<InterceptionMode, InjectError> {
    let name = "sidecar.istio.io/interceptionMode";
    let mode = match pod.annotation(name) {
        None => proxy.interception_mode,
        Some("REDIRECT") => InterceptionMode::Redirect,
        Some("TPROXY") => InterceptionMode::Tproxy,
        Some("NONE") => InterceptionMode::None,
        Some(value) => return Err(wrong(name, value, "REDIRECT, TPROXY or NONE")),
    };
    if mode == InterceptionMode::Tproxy {
        warnings.push("interception mode TPROXY is not implemented by this version of mesh; REDIRECT is used, so applications see the proxy's address".to_owned());
        return Ok(InterceptionMode::Redirect);
    }
    Ok(mode)
}

fn capture(pod: &PodView<'_>, default: &Capture) -> Result<Capture, InjectError> {
    let ports = |name: &str, default: &str| {
        let name = format!("traffic.sidecar.istio.io/{name}");
        let value = pod.annotation(&name).unwrap_or(default);
        let right = value == "*"
            || value
                .split(',')
                .filter(|port| !port.is_empty())
                .all(|port| port.trim().parse::<u16>().is_ok());
        if right {
            Ok(compact(value))
        } else {
            Err(wrong(
                &name,
                value,
                "a list of ports separated by commas, or \"*\"",
            ))
        }
    };
    let ranges = |name: &str, default: &str| {
        let name = format!("traffic.sidecar.istio.io/{name}");
        let value = pod.annotation(&name).unwrap_or(default);
        let right = value == "*"
            || value
                .split(',')
                .filter(|range| !range.is_empty())
                .all(|range| is_cidr(range.trim()));
        if right {
            Ok(compact(value))
        } else {
            Err(wrong(
                &name,
                value,
                "a list of ranges such as 10.0.0.0/8 separated by commas, or \"*\"",
            ))
        }
    };
    Ok(Capture {
        include_ranges: ranges("includeOutboundIPRanges", &default.include_ranges)?,
        exclude_ranges: ranges("excludeOutboundIPRanges", &default.exclude_ranges)?,
        include_inbound_ports: ports("includeInboundPorts", &default.include_inbound_ports)?,
        exclude_inbound_ports: ports("excludeInboundPorts", &default.exclude_inbound_ports)?,
        include_outbound_ports: ports("includeOutboundPorts", &default.include_outbound_ports)?,
        exclude_outbound_ports: ports("excludeOutboundPorts", &default.exclude_outbound_ports)?,
    })
}

/// The list without blanks and empty entries.
fn compact(list: &str) -> String {
    list.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .collect::<Vec<_>>()
        .join(",")
}

fn is_cidr(text: &str) -> bool {
    let Some((address, bits)) = text.split_once('/') else {
        return false;
    };
    let limit = match address.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(_)) => 32,
        Ok(std::net::IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    bits.parse::<u8>().is_ok_and(|bits| bits <= limit)
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
        if !is_quantity(value) {
            return Err(wrong(&name, value, "an amount such as 100m or 128Mi"));
        }
        own.entry(kind).or_insert_with(|| json!({}))[resource] = json!(value);
    }
    Ok(if own.is_empty() {
        default.clone()
    } else {
        Value::Object(own)
    })
}

/// A Kubernetes quantity: a decimal number with a suffix.
fn is_quantity(text: &str) -> bool {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = &text[number.len()..];
    let exponent = number.contains(['e', 'E']);
    number
        .parse::<f64>()
        .is_ok_and(|value| value.is_finite() && value >= 0.0)
        && !exponent
        && matches!(
            suffix,
            "" | "n"
                | "u"
                | "m"
                | "k"
                | "M"
                | "G"
                | "T"
                | "P"
                | "E"
                | "Ki"
                | "Mi"
                | "Gi"
                | "Ti"
                | "Pi"
                | "Ei"
        )
}

/// A list of volumes or mounts as JSON: a list, or a map by name.
fn named_list(pod: &PodView<'_>, name: &str) -> Result<Vec<Value>, InjectError> {
    let Some(text) = pod.annotation(name) else {
        return Ok(Vec::new());
    };
    let expected = "a JSON list of objects with a name, or a JSON map of them by name";
    match serde_json::from_str(text) {
        Ok(Value::Array(items))
            if items
                .iter()
                .all(|item| item.get("name").is_some_and(Value::is_string)) =>
        {
            Ok(items)
        }
        Ok(Value::Object(map)) if map.values().all(Value::is_object) => Ok(map
            .into_iter()
            .map(|(key, mut item)| {
                item["name"] = json!(key);
                item
            })
            .collect()),
        _ => Err(wrong(name, text, expected)),
    }
}
