//! The webhooks for injection and validation. The bundle of their certificate is filled in, and kept right, by the control plane.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::resolve::{DEFAULT_REVISION, Resolved};

/// Namespaces of Kubernetes' own parts.
const KUBERNETES: [&str; 4] = [
    "kube-system",
    "kube-public",
    "kube-node-lease",
    "local-path-storage",
];

/// Where a webhook is called.
fn client_config(settings: &Resolved, path: &str) -> Value {
    let remote = &settings.spec.values.istiod_remote;
    let mut config = match remote.injection_url.as_str() {
        url if settings.remote && !url.is_empty() && path == "/inject" => json!({ "url": url }),
        _ => json!({ "service": {
            "name": settings.revisioned("istiod"), "namespace": settings.namespace, "path": path, "port": 443,
        } }),
    };
    if settings.remote && !remote.injection_ca_bundle.is_empty() {
        config["caBundle"] = json!(remote.injection_ca_bundle);
    }
    config
}

/// The webhook that injects sidecars: one entry per way to ask for one (namespace or pod, by revision or by default).
pub(super) fn mutating(settings: &Resolved) -> Value {
    let term = |key: &str, operator: &str, values: &[&str]| match values {
        [] => json!({ "key": key, "operator": operator }),
        values => json!({ "key": key, "operator": operator, "values": values }),
    };
    let rev = settings.revision.as_str();
    let no_injection = term("istio-injection", "DoesNotExist", &[]);
    let no_rev = term("istio.io/rev", "DoesNotExist", &[]);
    let not_refused = term("sidecar.istio.io/inject", "NotIn", &["false"]);
    let webhook = &settings.spec.values.sidecar_injector_webhook;
    let again = match webhook.reinvocation_policy.as_str() {
        "" => "Never",
        policy => policy,
    };
    let entry = |name: &str, namespaces: &[&Value], pods: &[&Value]| {
        json!({
            "name": format!("{name}.sidecar-injector.istio.io"),
            "clientConfig": client_config(settings, "/inject"),
            "rules": [{ "operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"] }],
            "namespaceSelector": { "matchExpressions": namespaces },
            "objectSelector": { "matchExpressions": pods },
            "failurePolicy": "Fail", "sideEffects": "None", "reinvocationPolicy": again, "admissionReviewVersions": ["v1"],
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
    if rev == DEFAULT_REVISION {
        let enabled = term("istio-injection", "In", &["enabled"]);
        let asked = term("sidecar.istio.io/inject", "In", &["true"]);
        entries.push(entry("namespace", &[&enabled], &[&not_refused]));
        entries.push(entry(
            "object",
            &[&no_injection, &no_rev],
            &[&asked, &no_rev],
        ));
        if webhook.enable_namespaces_by_default {
            let ordinary = term("kubernetes.io/metadata.name", "NotIn", &KUBERNETES);
            let silent = term("sidecar.istio.io/inject", "DoesNotExist", &[]);
            entries.push(entry(
                "auto",
                &[&no_injection, &no_rev, &ordinary],
                &[&silent, &no_rev],
            ));
        }
    }
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": { "name": name(settings, "istio-sidecar-injector"), "labels": { "app": "sidecar-injector", "istio.io/rev": rev } },
        "webhooks": entries,
    })
}

/// Webhook configurations belong to no namespace: where the mesh is not in its usual one, their names carry it.
fn name(settings: &Resolved, name: &str) -> String {
    let name = settings.revisioned(name);
    match settings.namespace.as_str() {
        super::NAMESPACE => name,
        namespace => format!("{name}-{namespace}"),
    }
}

/// The webhook that validates Istio's kinds. It must not block anything before the control plane serves it; that sets `Fail` then.
pub(super) fn validating(settings: &Resolved) -> Value {
    let groups: BTreeSet<_> = mesh_api::KINDS.iter().map(|info| info.group).collect();
    let objects = match settings.revision.as_str() {
        DEFAULT_REVISION => json!({}),
        revision => {
            json!({ "matchExpressions": [{ "key": "istio.io/rev", "operator": "In", "values": [revision] }] })
        }
    };
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {
            "name": format!("{}-{}", settings.revisioned("istio-validator"), settings.namespace),
            "labels": { "app": "istiod", "istio": "istiod", "istio.io/rev": settings.revision },
        },
        "webhooks": [{
            "name": "rev.validation.istio.io",
            "clientConfig": client_config(settings, "/validate"),
            "rules": [{ "operations": ["CREATE", "UPDATE"], "apiGroups": groups, "apiVersions": ["*"], "resources": ["*"] }],
            "objectSelector": objects,
            "failurePolicy": "Ignore", "sideEffects": "None", "admissionReviewVersions": ["v1"],
        }],
    })
}
