//! Sidecar injection.
//!
//! **What**: decides whether a pod gets a sidecar, and makes the JSON patch that adds it.
//! **In**: a pod as raw JSON, the labels and settings around it ([`InjectContext`]).
//! **Out**: [`Outcome`]: a JSON patch (RFC 6902) with warnings, or the reason why the pod stays as it is.
//! **Never**: no IO, no clock, no typed round trip of the pod (a field that we don't know must not be lost).
//! **Start here**: [`inject`], then `decision.rs`, then `sidecar.rs`.

pub mod config;

mod annotations;
mod decision;
mod manifest;
mod metrics;
mod overlay;
mod probes;
mod sidecar;
mod template;
mod workload;

use std::collections::BTreeMap;

use mesh_api::mesh_config::MeshConfig;
use serde_json::{Map, Value};

pub use annotations::{HONOURED, NOT_IMPLEMENTED};
pub use config::InjectorConfig;
pub use decision::webhook_revision;
pub use manifest::{Injected, inject_manifest};
pub use workload::Workload;

/// Annotation that tells what was injected; a pod that has it and the proxy is left alone.
pub const STATUS_ANNOTATION: &str = "sidecar.istio.io/status";
/// Name of the proxy's container.
pub const PROXY_CONTAINER: &str = "istio-proxy";
/// Name of the init container that sets the capture rules.
pub const INIT_CONTAINER: &str = "istio-init";

/// What injection needs to know beside the pod.
#[derive(Debug, Clone, Copy)]
pub struct InjectContext<'a> {
    /// Namespace of the pod (an admitted pod may not say its own).
    pub namespace: &'a str,
    /// Labels of the namespace.
    pub namespace_labels: &'a BTreeMap<String, String>,
    /// Settings of the mesh.
    pub mesh: &'a MeshConfig,
    /// Settings of the injector.
    pub config: &'a InjectorConfig,
    /// Revision of the control plane that injects, normally `default`.
    pub revision: &'a str,
    /// True if every kubelet can run native sidecars (1.33 or later); the annotation `sidecar.istio.io/nativeSidecar` wins.
    pub native_sidecars: bool,
    /// The workload to which the pod belongs; `None` finds it from the pod's owner.
    pub workload: Option<&'a Workload>,
}

/// What became of a pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The pod gets a sidecar.
    Patched(Patched),
    /// The pod stays as it is.
    Skipped(Skip),
}

/// An injected pod.
#[derive(Debug, Clone, PartialEq)]
pub struct Patched {
    /// Operations that turn the pod into the injected one (RFC 6902).
    pub patch: json_patch::Patch,
    /// The injected pod.
    pub pod: Value,
    /// What the person should know, for instance annotations that this version does not implement.
    pub warnings: Vec<String>,
}

/// Why a pod stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skip {
    /// The pod shares the node's network, where capture would hit the node.
    HostNetwork,
    /// The pod runs on Windows, where the proxy does not.
    Windows,
    /// Pods of this namespace belong to the cluster itself.
    SystemNamespace,
    /// The label or annotation `sidecar.istio.io/inject` says no.
    AskedNotTo,
    /// A selector of `neverInjectSelector` matches.
    NeverSelected,
    /// The injector's policy is `disabled`, and nothing says otherwise.
    PolicyDisabled,
    /// The pod has been injected before.
    AlreadyInjected,
}

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HostNetwork => "the pod uses host networking",
            Self::Windows => "the pod is for nodes with Windows",
            Self::SystemNamespace => "the namespace belongs to the cluster itself",
            Self::AskedNotTo => "sidecar.istio.io/inject is false",
            Self::NeverSelected => "a selector of neverInjectSelector matches",
            Self::PolicyDisabled => {
                "the injection policy is disabled and the pod does not ask for a sidecar"
            }
            Self::AlreadyInjected => "the pod has a sidecar already",
        })
    }
}

/// Why a pod that should get a sidecar can't be created as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InjectError {
    /// The JSON is not a pod.
    #[error("injecting a sidecar: not a pod: {0}")]
    NotAPod(&'static str),
    /// An annotation or label has a value that can't be used.
    #[error("injecting a sidecar: {name}: {value:?} is not {expected}; correct it or remove it")]
    Annotation {
        /// Name of the annotation or label.
        name: String,
        /// Its value.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// A template that there is not.
    #[error(
        "injecting a sidecar: inject.istio.io/templates: there is no template {name:?}; available are {available}"
    )]
    Template {
        /// The template.
        name: String,
        /// Those that there are.
        available: String,
    },
    /// A gateway pod without the container that is to be filled in.
    #[error(
        "injecting a gateway: the pod has no container named \"istio-proxy\"; add one with image \"auto\""
    )]
    NoProxyContainer,
}

/// Decides about a pod, and injects the sidecar (or fills in the gateway's proxy).
///
/// # Errors
/// JSON that is not a pod, an annotation with a value that can't be used, an unknown template.
pub fn inject(pod: &Value, context: &InjectContext<'_>) -> Result<Outcome, InjectError> {
    let view = PodView::new(pod)?;
    match decision::skip(&view, context)? {
        Some(skip) => Ok(Outcome::Skipped(skip)),
        None => fill(pod, context),
    }
}

/// Injects without asking whether the pod wants it: for installers, whose pods must not be injected a second time by the webhook.
///
/// # Errors
/// As [`inject`].
pub fn fill(pod: &Value, context: &InjectContext<'_>) -> Result<Outcome, InjectError> {
    let view = PodView::new(pod)?;
    let settings = annotations::Settings::read(&view, context)?;
    let (injected, warnings) = sidecar::injected(pod, &view, settings, context)?;
    Ok(Outcome::Patched(Patched {
        patch: json_patch::diff(pod, &injected),
        pod: injected,
        warnings,
    }))
}

/// A pod with the parts that injection looks at.
pub(crate) struct PodView<'a> {
    metadata: Option<&'a Map<String, Value>>,
    spec: &'a Map<String, Value>,
}

impl<'a> PodView<'a> {
    fn new(pod: &'a Value) -> Result<Self, InjectError> {
        let spec = pod
            .get("spec")
            .and_then(Value::as_object)
            .ok_or(InjectError::NotAPod("it has no spec"))?;
        if !spec.get("containers").is_some_and(Value::is_array) {
            return Err(InjectError::NotAPod("spec.containers is not a list"));
        }
        Ok(Self {
            metadata: pod.get("metadata").and_then(Value::as_object),
            spec,
        })
    }

    fn text(&self, field: &str) -> &'a str {
        self.metadata
            .and_then(|metadata| metadata.get(field))
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    fn label(&self, name: &str) -> Option<&'a str> {
        self.metadata?.get("labels")?.get(name)?.as_str()
    }

    fn annotation(&self, name: &str) -> Option<&'a str> {
        self.metadata?.get("annotations")?.get(name)?.as_str()
    }

    fn annotations(&self) -> impl Iterator<Item = &'a str> {
        let annotations = self
            .metadata
            .and_then(|metadata| metadata.get("annotations"))
            .and_then(Value::as_object);
        annotations
            .into_iter()
            .flat_map(|map| map.keys().map(String::as_str))
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let labels = self
            .metadata
            .and_then(|metadata| metadata.get("labels"))
            .and_then(Value::as_object);
        labels
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect()
    }

    /// Containers of a list (`containers`, `initContainers`).
    fn containers(&self, list: &str) -> impl Iterator<Item = &'a Value> {
        self.spec
            .get(list)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
    }

    /// The container of any list with a name.
    fn container(&self, name: &str) -> Option<&'a Value> {
        self.containers("containers")
            .chain(self.containers("initContainers"))
            .find(|container| container["name"] == name)
    }

    /// Containers of the application.
    fn app_containers(&self) -> impl Iterator<Item = &'a Value> {
        self.containers("containers")
            .filter(|container| container["name"] != PROXY_CONTAINER)
    }
}
