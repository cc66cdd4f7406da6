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

/// Istio's label of a tag's webhooks.
pub(crate) const TAG: &str = "istio.io/tag";
/// Name of the injector's configuration of the default revision.
pub(crate) const INJECTOR: &str = "istio-sidecar-injector";

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

/// The injector behind a configuration: all its entries call the same.
pub(crate) struct Injector {
    /// Where it is called.
    pub(crate) client_config: Value,
    /// When Kubernetes calls it again for a pod that others changed after it.
    pub(crate) reinvocation: String,
    /// Whether pods are injected for which neither they nor their namespace say anything.
    pub(crate) auto: bool,
}

impl Injector {
    fn of(settings: &Resolved) -> Self {
        let webhook = &settings.spec.values.sidecar_injector_webhook;
        Self {
            client_config: client_config(settings, "/inject"),
            reinvocation: match webhook.reinvocation_policy.as_str() {
                "" => "Never".to_owned(),
                policy => policy.to_owned(),
            },
            auto: webhook.enable_namespaces_by_default,
        }
    }

    /// One entry per way to ask for injection by a revision or tag: namespace or pod, and for `default` also without naming one.
    pub(crate) fn entries(&self, name: &str) -> Vec<Value> {
        let ways = ways(name, self.auto);
        let entry = |(way, selectors): (&str, Selectors)| {
            json!({
                "name": format!("{way}.sidecar-injector.istio.io"),
                "clientConfig": self.client_config,
                "rules": [{ "operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"] }],
                "namespaceSelector": selectors.namespace,
                "objectSelector": selectors.object,
                "failurePolicy": "Fail", "sideEffects": "None", "reinvocationPolicy": self.reinvocation, "admissionReviewVersions": ["v1"],
            })
        };
        ways.into_iter().map(entry).collect()
    }
}

/// Which namespaces and pods an entry is for.
pub(crate) struct Selectors {
    pub(crate) namespace: Value,
    pub(crate) object: Value,
}

/// The entries by the beginnings of their names.
pub(crate) fn ways(name: &str, auto: bool) -> Vec<(&'static str, Selectors)> {
    let term = |key: &str, operator: &str, values: &[&str]| match values {
        [] => json!({ "key": key, "operator": operator }),
        values => json!({ "key": key, "operator": operator, "values": values }),
    };
    let no_injection = term("istio-injection", "DoesNotExist", &[]);
    let no_rev = term("istio.io/rev", "DoesNotExist", &[]);
    let not_refused = term("sidecar.istio.io/inject", "NotIn", &["false"]);
    let this = term("istio.io/rev", "In", &[name]);
    let way = |namespaces: &[&Value], pods: &[&Value]| Selectors {
        namespace: json!({ "matchExpressions": namespaces }),
        object: json!({ "matchExpressions": pods }),
    };
    let mut all = vec![
        (
            "rev.namespace",
            way(&[&this, &no_injection], &[&not_refused]),
        ),
        (
            "rev.object",
            way(&[&no_rev, &no_injection], &[&not_refused, &this]),
        ),
    ];
    if name == DEFAULT_REVISION {
        let enabled = term("istio-injection", "In", &["enabled"]);
        let asked = term("sidecar.istio.io/inject", "In", &["true"]);
        all.push(("namespace", way(&[&enabled], &[&not_refused])));
        all.push(("object", way(&[&no_injection, &no_rev], &[&asked, &no_rev])));
        if auto {
            let ordinary = term("kubernetes.io/metadata.name", "NotIn", &KUBERNETES);
            let silent = term("sidecar.istio.io/inject", "DoesNotExist", &[]);
            all.push((
                "auto",
                way(&[&no_injection, &no_rev, &ordinary], &[&silent, &no_rev]),
            ));
        }
    }
    all
}

/// Istio's selector of what is switched off for another revision's sake.
pub(crate) fn never() -> Value {
    json!({ "matchLabels": { "istio.io/deactivated": "never-match" } })
}

/// The webhook that injects sidecars.
pub(super) fn mutating(settings: &Resolved) -> Value {
    let rev = settings.revision.as_str();
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": { "name": name(settings, INJECTOR), "labels": { "app": "sidecar-injector", "istio.io/rev": rev } },
        "webhooks": Injector::of(settings).entries(rev),
    })
}

/// A tag: a name by which namespaces and pods ask for a revision, so that what they ask for can be another one later without them.
pub(crate) struct Tag<'a> {
    /// The name.
    pub(crate) name: &'a str,
    /// What it stands for.
    pub(crate) revision: &'a str,
    /// The namespace of the control plane.
    pub(crate) namespace: &'a str,
}

impl Tag<'_> {
    /// The webhook configuration that makes the tag, with Istio's name and labels.
    pub(crate) fn injection(&self, injector: &Injector) -> Value {
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
            "metadata": {
                "name": in_namespace(format!("istio-revision-tag-{}", self.name), self.namespace),
                "labels": { "app": "sidecar-injector", "istio.io/rev": self.revision, TAG: self.name },
            },
            "webhooks": injector.entries(self.name),
        })
    }

    /// The tag `default` also says who validates objects that name no revision. `client_config` is that of the revision's injector.
    pub(crate) fn validation(&self, client_config: &Value) -> Option<Value> {
        let mut client = client_config.clone();
        client.get("service")?;
        client["service"]["path"] = json!("/validate");
        (self.name == DEFAULT_REVISION).then(|| {
            let unnamed = json!({ "matchExpressions": [{ "key": "istio.io/rev", "operator": "DoesNotExist" }] });
            json!({
                "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
                "metadata": {
                    "name": in_namespace("istiod-default-validator".to_owned(), self.namespace),
                    "labels": { "app": "istiod", "istio": "istiod", "istio.io/rev": self.revision, TAG: self.name },
                },
                "webhooks": [validator("validation.istio.io", &client, &unnamed)],
            })
        })
    }
}

/// The tags that the settings ask for.
pub(super) fn tags(settings: &Resolved) -> Vec<Value> {
    let injector = Injector::of(settings);
    let of_tag = |name: &String| {
        let tag = Tag {
            name,
            revision: &settings.revision,
            namespace: &settings.namespace,
        };
        let validation = match settings.spec.values.global.config_validation {
            Some(false) => None,
            _ => tag.validation(&injector.client_config),
        };
        [Some(tag.injection(&injector)), validation]
    };
    let all = settings.tags.iter().flat_map(of_tag);
    all.flatten().collect()
}

fn name(settings: &Resolved, name: &str) -> String {
    in_namespace(settings.revisioned(name), &settings.namespace)
}

/// Webhook configurations belong to no namespace: where the mesh is not in its usual one, their names carry it.
fn in_namespace(name: String, namespace: &str) -> String {
    match namespace {
        super::NAMESPACE => name,
        namespace => format!("{name}-{namespace}"),
    }
}

/// The webhook that validates Istio's kinds. It must not block anything before the control plane serves it; that sets `Fail` then.
pub(super) fn validating(settings: &Resolved) -> Value {
    let objects = match settings.revision.as_str() {
        DEFAULT_REVISION => json!({}),
        revision => of_revision(revision),
    };
    let client = client_config(settings, "/validate");
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {
            "name": format!("{}-{}", settings.revisioned("istio-validator"), settings.namespace),
            "labels": { "app": "istiod", "istio": "istiod", "istio.io/rev": settings.revision },
        },
        "webhooks": [validator("rev.validation.istio.io", &client, &objects)],
    })
}

/// Selects objects that name a revision.
pub(crate) fn of_revision(revision: &str) -> Value {
    json!({ "matchExpressions": [{ "key": "istio.io/rev", "operator": "In", "values": [revision] }] })
}

fn validator(name: &str, client: &Value, objects: &Value) -> Value {
    let groups: BTreeSet<_> = mesh_api::KINDS.iter().map(|info| info.group).collect();
    json!({
        "name": name,
        "clientConfig": client,
        "rules": [{ "operations": ["CREATE", "UPDATE"], "apiGroups": groups, "apiVersions": ["*"], "resources": ["*"] }],
        "objectSelector": objects,
        "failurePolicy": "Ignore", "sideEffects": "None", "admissionReviewVersions": ["v1"],
    })
}
