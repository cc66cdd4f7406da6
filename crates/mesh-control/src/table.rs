//! The table of objects as the watches tell it, with what is wrong with single ones.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_api::mesh_config::MeshConfig;
use mesh_api::{AnyObject, ParseError};
use mesh_model::{Item, ObjectKey, Objects, Problem, Severity};
use serde_json::Value;

use crate::revisioned;
use crate::watch::{Change, Reading, Seen};

/// Name of the ConfigMap with the mesh configuration, in its key `mesh` (as Istio installs it).
const MESH_CONFIG: &str = "istio";
/// Name of the ConfigMap of the injector.
pub(crate) const INJECTOR_CONFIG: &str = "istio-sidecar-injector";

/// What was last seen of an Istio object, beside its meaning.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) api_version: String,
    pub(crate) generation: i64,
    pub(crate) status: Value,
    /// Findings about the object alone.
    pub(crate) findings: Vec<Problem>,
}

/// Everything that was seen.
#[derive(Default)]
pub(crate) struct Table {
    /// Names of the ConfigMaps of this installation's revision.
    mesh_config: String,
    injector_config: String,
    pub(crate) objects: Objects,
    pub(crate) istio: BTreeMap<ObjectKey, View>,
    /// Labels by namespace, for the injector.
    pub(crate) namespaces: Arc<BTreeMap<String, BTreeMap<String, String>>>,
    /// Data of the injector's ConfigMap.
    pub(crate) injector: Arc<BTreeMap<String, String>>,
    /// Kubelet version by node: what pods may be made of.
    kubelets: BTreeMap<String, String>,
    listed: BTreeSet<usize>,
}

impl Table {
    /// An empty table of an installation of this revision.
    pub(crate) fn new(revision: &str) -> Self {
        Self {
            mesh_config: revisioned(MESH_CONFIG, revision),
            injector_config: revisioned(INJECTOR_CONFIG, revision),
            ..Self::default()
        }
    }

    /// Whether every node runs native sidecars (Kubernetes 1.33, where they are generally available; Istio's
    /// `ENABLE_NATIVE_SIDECARS=auto`).
    pub(crate) fn native_sidecars(&self) -> bool {
        !self.kubelets.is_empty()
            && self.kubelets.values().all(|version| {
                let mut parts = version.trim_start_matches('v').split('.');
                let mut next = || parts.next().and_then(|part| part.parse::<u32>().ok());
                matches!((next(), next()), (Some(major), Some(minor)) if (major, minor) >= (1, 33))
            })
    }

    /// How many kinds have been listed.
    pub(crate) fn listed(&self) -> usize {
        self.listed.len()
    }

    /// Takes a change in. True if a new mesh has to be built.
    pub(crate) fn apply(&mut self, change: Change) -> bool {
        match change {
            Change::Listed(index) => self.listed.insert(index),
            Change::Remove(key) => self.remove(&key),
            Change::Upsert(seen) => self.upsert(*seen),
            Change::Keys(source, keys) => self.objects.set_jwks(source, &keys),
            Change::ForgetKeys(source) => {
                self.objects.retain_jwks(|known| *known != source);
                false
            }
        }
    }

    fn remove(&mut self, key: &ObjectKey) -> bool {
        match key.kind.as_str() {
            "ConfigMap" if key.name == self.mesh_config => {
                return self.objects.set_mesh_config(MeshConfig::default());
            }
            "ConfigMap" if key.name == self.injector_config => self.injector = Arc::default(),
            "Namespace" => {
                Arc::make_mut(&mut self.namespaces).remove(&key.name);
            }
            "Node" => {
                self.kubelets.remove(&key.name);
            }
            _ => {}
        }
        self.istio.remove(key).is_some() | self.objects.remove(key)
    }

    fn upsert(&mut self, seen: Seen) -> bool {
        match seen.reading {
            Ok(Reading::Config(config)) => self.config(config),
            Ok(Reading::Item(Item::Istio(object))) => {
                let findings = findings(&seen.key, &object);
                let view = View {
                    api_version: seen.api_version,
                    generation: seen.generation,
                    status: seen.status,
                    findings,
                };
                self.istio.insert(seen.key, view);
                self.objects.upsert(object)
            }
            Ok(Reading::Item(item)) => {
                if let Item::Node(node) = &item {
                    let version = seen.status["nodeInfo"]["kubeletVersion"].as_str();
                    self.kubelets.insert(
                        node.meta.name.clone(),
                        version.unwrap_or_default().to_owned(),
                    );
                }
                if let Item::Namespace(namespace) = &item {
                    Arc::make_mut(&mut self.namespaces)
                        .insert(namespace.meta.name.clone(), namespace.meta.labels.clone());
                }
                self.objects.upsert(item)
            }
            Err(error) => {
                tracing::warn!(object = %seen.key, %error, "an object can't be read and has no effect");
                let view = View {
                    api_version: seen.api_version,
                    generation: seen.generation,
                    status: seen.status,
                    findings: vec![unreadable(&seen.key, &error)],
                };
                let removed = self.objects.remove(&seen.key);
                // Only Istio's kinds have a status of ours.
                if mesh_api::KINDS
                    .iter()
                    .any(|info| info.kind == seen.key.kind)
                {
                    let generation = view.generation;
                    let before = self.istio.insert(seen.key, view);
                    return removed || before.is_none_or(|before| before.generation != generation);
                }
                removed
            }
        }
    }

    fn config(&mut self, config: mesh_api::core::ConfigMap) -> bool {
        match config.meta.name.as_str() {
            name if name == self.mesh_config => {
                let text = config.data.get("mesh").map_or("", String::as_str);
                match MeshConfig::from_yaml(text) {
                    Ok(config) => {
                        for field in config.unsupported() {
                            tracing::warn!(
                                field,
                                "the mesh configuration sets a field that is not applied yet"
                            );
                        }
                        self.objects.set_mesh_config(config)
                    }
                    Err(error) => {
                        // The mesh goes on with what it had: a typing error must not change everything to defaults.
                        tracing::error!(%error, "ConfigMap {name}, key mesh, can't be read; the configuration before it stays");
                        false
                    }
                }
            }
            name if name == self.injector_config => {
                self.injector = Arc::new(config.data);
                false
            }
            _ => false,
        }
    }
}

fn findings(key: &ObjectKey, object: &AnyObject) -> Vec<Problem> {
    mesh_api::validate(object)
        .into_iter()
        .map(|finding| Problem {
            object: key.clone(),
            field: finding.field,
            severity: match finding.severity {
                mesh_api::Severity::Error => Severity::Error,
                mesh_api::Severity::Warning => Severity::Warning,
            },
            message: finding.message,
            // Istio's SchemaValidationError or SchemaWarning, by severity.
            code: None,
        })
        .collect()
}

fn unreadable(key: &ObjectKey, error: &ParseError) -> Problem {
    let mut message = error.message.clone();
    if !error.expected.is_empty() {
        message.push_str("; expected ");
        message.push_str(&error.expected);
    }
    Problem {
        object: key.clone(),
        field: error.path.clone(),
        severity: Severity::Error,
        message: format!("{message} (the object has no effect)"),
        code: Some("IST0106"),
    }
}
