//! Every annotation and label of Istio that pods carry: it has an effect, or it is named.

use std::collections::BTreeSet;

use mesh_inject::{HONOURED, NOT_IMPLEMENTED, Outcome};
use serde_json::{Value, json};

use crate::{Settings, golden};

/// Annotations on pods (istio.io/api, annotation.gen.go), with a value that differs from the default.
const ANNOTATIONS: &[(&str, &str)] = &[
    ("ambient.istio.io/bypass-inbound-capture", "true"),
    ("ambient.istio.io/dns-capture", "true"),
    ("ambient.istio.io/redirection", "enabled"),
    ("inject.istio.io/templates", "gateway"),
    ("istio.io/reroute-virtual-interfaces", "net1"),
    ("istio.io/rev", "old"),
    ("prometheus.istio.io/merge-metrics", "false"),
    ("proxy.istio.io/config", "{concurrency: 3}"),
    // Written by the injector, whatever was there.
    ("proxy.istio.io/overrides", "{}"),
    ("readiness.status.sidecar.istio.io/applicationPorts", "80"),
    ("readiness.status.sidecar.istio.io/failureThreshold", "9"),
    ("readiness.status.sidecar.istio.io/initialDelaySeconds", "9"),
    ("readiness.status.sidecar.istio.io/periodSeconds", "9"),
    ("sidecar.istio.io/agentLogLevel", "default:debug"),
    ("sidecar.istio.io/bootstrapOverride", "x"),
    ("sidecar.istio.io/componentLogLevel", "misc:debug"),
    ("sidecar.istio.io/discoveryAddress", "other:15012"),
    ("sidecar.istio.io/extraStatTags", "x"),
    ("sidecar.istio.io/inject", "false"),
    ("sidecar.istio.io/interceptionMode", "NONE"),
    ("sidecar.istio.io/logLevel", "debug"),
    ("sidecar.istio.io/nativeSidecar", "false"),
    ("sidecar.istio.io/proxyCPU", "7m"),
    ("sidecar.istio.io/proxyCPULimit", "7"),
    ("sidecar.istio.io/proxyImage", "other:1"),
    ("sidecar.istio.io/proxyImageType", "debug"),
    ("sidecar.istio.io/proxyMemory", "7Mi"),
    ("sidecar.istio.io/proxyMemoryLimit", "7Gi"),
    ("sidecar.istio.io/rewriteAppHTTPProbers", "false"),
    ("sidecar.istio.io/statsCompression", "true"),
    ("sidecar.istio.io/statsEvictionInterval", "1s"),
    ("sidecar.istio.io/statsFlushInterval", "1s"),
    ("sidecar.istio.io/statsHistogramBins", "1"),
    ("sidecar.istio.io/statsHistogramBuckets", "{}"),
    ("sidecar.istio.io/statsInclusionPrefixes", "x"),
    ("sidecar.istio.io/statsInclusionRegexps", "x"),
    ("sidecar.istio.io/statsInclusionSuffixes", "x"),
    (
        "sidecar.istio.io/status",
        r#"{"containers":["app"],"revision":"default"}"#,
    ),
    (
        "sidecar.istio.io/userVolume",
        r#"[{"name":"v","emptyDir":{}}]"#,
    ),
    (
        "sidecar.istio.io/userVolumeMount",
        r#"[{"name":"v","mountPath":"/v"}]"#,
    ),
    ("status.sidecar.istio.io/port", "15029"),
    ("traffic.sidecar.istio.io/excludeInboundPorts", "22"),
    ("traffic.sidecar.istio.io/excludeInterfaces", "net1"),
    (
        "traffic.sidecar.istio.io/excludeOutboundIPRanges",
        "10.0.0.0/8",
    ),
    ("traffic.sidecar.istio.io/excludeOutboundPorts", "25"),
    ("traffic.sidecar.istio.io/includeInboundPorts", "80"),
    (
        "traffic.sidecar.istio.io/includeOutboundIPRanges",
        "10.0.0.0/8",
    ),
    ("traffic.sidecar.istio.io/includeOutboundPorts", "443"),
    ("traffic.sidecar.istio.io/kubevirtInterfaces", "net1"),
];

/// Annotations of others that injection reads.
const OF_OTHERS: &[&str] = &[
    "kubectl.kubernetes.io/default-container",
    "kubectl.kubernetes.io/default-logs-container",
    "prometheus.io/path",
    "prometheus.io/port",
    "prometheus.io/scrape",
];

/// What became of a pod, without the annotations themselves.
fn outcome(annotation: Option<(&str, &str)>) -> (Value, Vec<String>) {
    let mut pod = json!({
        "metadata": { "name": "a", "annotations": { "prometheus.io/port": "9" } },
        "spec": { "containers": [
            { "name": "app", "readinessProbe": { "httpGet": { "port": 80 } } },
            { "name": "istio-proxy", "image": "auto" },
        ] },
    });
    if let Some((name, value)) = annotation {
        pod["metadata"]["annotations"][name] = json!(value);
    }
    match Settings::read(&golden().join("native")).inject(&pod) {
        Ok(Outcome::Patched(mut patched)) => {
            if let Some((name, value)) = annotation {
                let now = patched.pod["metadata"]["annotations"][name].take();
                // One that the injector writes itself counts by what it says now.
                if now != value {
                    return (json!([patched.pod, now]), patched.warnings);
                }
            }
            patched.pod["metadata"]["annotations"][annotation.map_or("none", |(name, _)| name)] =
                Value::Null;
            let annotations = patched.pod["metadata"]["annotations"]
                .as_object_mut()
                .expect("annotations");
            annotations.retain(|_, value| !value.is_null());
            (patched.pod, patched.warnings)
        }
        Ok(Outcome::Skipped(skip)) => (json!(skip.to_string()), Vec::new()),
        Err(error) => panic!("{annotation:?}: {error}"),
    }
}

#[test]
fn each_has_an_effect_or_is_named() {
    let (plain, none) = outcome(None);
    assert_eq!(none, Vec::<String>::new());
    for (name, value) in ANNOTATIONS {
        let (pod, warnings) = outcome(Some((name, value)));
        let named = warnings.iter().any(|warning| warning.contains(name));
        let changed = pod != plain;
        if NOT_IMPLEMENTED.contains(name) {
            assert!(named && !changed, "{name}: {warnings:?}");
        } else {
            assert!(HONOURED.contains(name), "{name} is in no table");
            assert!(changed, "{name}: {warnings:?}");
        }
    }
}

#[test]
fn the_tables_hold_these_and_no_others() {
    let known: BTreeSet<&str> = ANNOTATIONS
        .iter()
        .map(|(name, _)| *name)
        .chain(OF_OTHERS.iter().copied())
        .collect();
    let tables: BTreeSet<&str> = HONOURED.iter().chain(NOT_IMPLEMENTED).copied().collect();
    assert_eq!(tables, known);
    assert_eq!(tables.len(), HONOURED.len() + NOT_IMPLEMENTED.len());
}
