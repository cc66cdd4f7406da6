//! The table of objects as the watches tell it, with what is wrong with single ones.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_api::mesh_config::MeshConfig;
use mesh_api::{AnyObject, ParseError};
use mesh_model::{Item, ObjectKey, Objects, Problem, Severity};
use serde_json::Value;

use crate::revisioned;
use crate::stand_in;
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
    /// Those of which `objects` has a stand-in, since no version could be read.
    stand_ins: BTreeSet<ObjectKey>,
    /// Labels by namespace, for the injector.
    pub(crate) namespaces: Arc<BTreeMap<String, BTreeMap<String, String>>>,
    /// Data of the injector's ConfigMap.
    pub(crate) injector: Arc<BTreeMap<String, String>>,
    /// Kubelet version by node: what pods may be made of.
    kubelets: BTreeMap<String, String>,
    listed: BTreeSet<usize>,
    /// Whether the mesh's settings were read once.
    configured: bool,
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
        self.stand_ins.remove(key);
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
                self.stand_ins.remove(&seen.key);
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
                let guards = stand_in::guards(&seen.api_version);
                let (effect, changed) = self.instead(&seen.key, seen.stand_in, guards);
                tracing::warn!(object = %seen.key, %error, "an object can't be read: {effect}");
                let view = View {
                    api_version: seen.api_version,
                    generation: seen.generation,
                    status: seen.status,
                    findings: vec![unreadable(&seen.key, &error, effect)],
                };
                // Only Istio's kinds have a status of ours.
                if mesh_api::KINDS
                    .iter()
                    .any(|info| info.kind == seen.key.kind)
                {
                    let generation = view.generation;
                    let before = self.istio.insert(seen.key, view);
                    return changed || before.is_none_or(|before| before.generation != generation);
                }
                changed
            }
        }
    }

    /// What holds now that an object can't be read, in words, and whether that is something else than before.
    fn instead(
        &mut self,
        key: &ObjectKey,
        stand_in: Option<AnyObject>,
        guards: bool,
    ) -> (&'static str, bool) {
        if guards && self.objects.istio(key).is_some() && !self.stand_ins.contains(key) {
            return ("the version before it stays in force", false);
        }
        if let Some(object) = stand_in {
            self.stand_ins.insert(key.clone());
            let effect = match &object {
                AnyObject::PeerAuthentication(_) => {
                    "until it can be, mutual TLS is STRICT for all that it selects"
                }
                AnyObject::RequestAuthentication(_) => {
                    "until it can be, every token is refused by all that it selects"
                }
                _ => "until it can be, everything that it selects is refused",
            };
            return (effect, self.objects.upsert(object));
        }
        self.stand_ins.remove(key);
        ("the object has no effect", self.objects.remove(key))
    }

    fn config(&mut self, config: mesh_api::core::ConfigMap) -> bool {
        match config.meta.name.as_str() {
            name if name == self.mesh_config => {
                let text = config.data.get("mesh").map_or("", String::as_str);
                match MeshConfig::from_newer_yaml(text) {
                    // What a newer version set is no reason to start with defaults; but what holds is not changed by half, as by a typing error.
                    Ok((_, left_out)) if self.configured && !left_out.is_empty() => {
                        for error in left_out {
                            tracing::error!(%error, "ConfigMap {name}, key mesh; the configuration before it stays");
                        }
                        false
                    }
                    Ok((config, left_out)) => {
                        self.configured = true;
                        for error in left_out {
                            tracing::error!(%error, "ConfigMap {name}, key mesh: the field is left out, the rest holds");
                        }
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

fn unreadable(key: &ObjectKey, error: &ParseError, effect: &str) -> Problem {
    let mut message = error.message.clone();
    if !error.expected.is_empty() {
        message.push_str("; expected ");
        message.push_str(&error.expected);
    }
    Problem {
        object: key.clone(),
        field: error.path.clone(),
        severity: Severity::Error,
        message: format!("{message} ({effect})"),
        code: Some("IST0106"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::{kinds, read};
    use serde_json::json;

    fn key(kind: &str) -> ObjectKey {
        ObjectKey::new(kind, "default", "x")
    }

    /// Sees a version of an object; what then holds, and what its status tells.
    fn see(table: &mut Table, kind: &str, spec: Value) -> (Option<AnyObject>, String) {
        let info = mesh_api::KINDS.iter().find(|info| info.kind == kind);
        let info = info.expect("one of Istio's kinds");
        let api_version = format!("{}/{}", info.group, info.storage_version());
        let object = serde_json::from_value(json!({
            "apiVersion": api_version, "kind": kind, "metadata": { "name": "x", "namespace": "default" }, "spec": spec,
        }));
        let kinds = kinds("istio-system", "default");
        let watched = kinds.iter().find(|known| known.kind() == kind);
        let seen = read(
            watched.expect("a kind that is watched"),
            object.expect("an object"),
        );
        table.apply(Change::Upsert(Box::new(seen)));
        let findings = &table.istio[&key(kind)].findings;
        let told = findings.iter().map(|problem| problem.message.clone());
        let told = told.collect::<Vec<_>>().join("; ");
        let object = table.objects.istio(&key(kind));
        (object.map(|object| object.as_ref().clone()), told)
    }

    #[test]
    fn an_unreadable_edit_leaves_the_policy_before_it_in_force() {
        for (kind, good) in [
            (
                "AuthorizationPolicy",
                json!({ "selector": { "matchLabels": { "app": "a" } } }),
            ),
            (
                "PeerAuthentication",
                json!({ "mtls": { "mode": "STRICT" } }),
            ),
            (
                "RequestAuthentication",
                json!({ "jwtRules": [{ "issuer": "a" }] }),
            ),
        ] {
            let mut table = Table::new("");
            let (first, _) = see(&mut table, kind, good.clone());
            assert!(first.is_some(), "{kind}");
            let (kept, told) = see(&mut table, kind, json!({ "typo": 1 }));
            assert_eq!(kept, first, "{kind}");
            assert!(told.contains("the version before it stays"), "{told}");
            // What is deleted is gone.
            table.apply(Change::Remove(key(kind)));
            assert!(table.objects.istio(&key(kind)).is_none(), "{kind}");
        }
    }

    #[test]
    fn an_unreadable_policy_without_a_version_before_it_refuses() {
        let mut table = Table::new("");
        let selector = json!({ "matchLabels": { "app": "a" }, "typo": 1 });
        let bad = json!({ "selector": selector, "action": "ALLOW", "rules": [{ "form": [] }] });
        let (found, told) = see(&mut table, "AuthorizationPolicy", bad);
        let Some(AnyObject::AuthorizationPolicy(found)) = found else {
            panic!("no stand-in");
        };
        let labels = found.spec.selector.expect("its selector").match_labels;
        assert_eq!(labels["app"], "a");
        assert_eq!(
            found.spec.action,
            mesh_api::security::authorization_policy::Action::Deny
        );
        assert_eq!(found.spec.rules, [Default::default()]);
        assert!(
            told.contains("everything that it selects is refused"),
            "{told}"
        );
        // The next one is no version to be kept either: the stand-in goes after what is there now.
        let target =
            json!([{ "group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "g" }]);
        let bad = json!({ "targetRefs": target, "typo": 1 });
        let (found, _) = see(&mut table, "AuthorizationPolicy", bad);
        let Some(AnyObject::AuthorizationPolicy(found)) = found else {
            panic!("no stand-in");
        };
        assert!(found.spec.selector.is_none() && found.spec.target_refs.len() == 1);
        // One that can be read takes its place.
        let (found, told) = see(&mut table, "AuthorizationPolicy", json!({}));
        assert!(
            matches!(found, Some(AnyObject::AuthorizationPolicy(p)) if p.spec.rules.is_empty())
        );
        assert!(!told.contains("until it can be"), "{told}");
    }

    #[test]
    fn unreadable_objects_without_a_version_before_them() {
        let mut table = Table::new("");
        let bad =
            json!({ "selector": { "matchLabels": { "app": "a" } }, "mtls": { "mode": "Strict" } });
        let (found, told) = see(&mut table, "PeerAuthentication", bad);
        let Some(AnyObject::PeerAuthentication(found)) = found else {
            panic!("no stand-in");
        };
        let mode = found.spec.mtls.expect("a mode").mode;
        assert_eq!(
            mode,
            mesh_api::security::peer_authentication::MutualTlsMode::Strict
        );
        assert!(
            found.spec.selector.is_some() && told.contains("STRICT"),
            "{told}"
        );
        let bad = json!({ "selector": { "matchLabels": { "app": "a" } }, "typo": 1, "jwtRules": [
            { "issuer": "i", "jwksUri": "https://i/keys", "fromHeaders": [{ "name": "x-token" }], "fromParams": 7, "audience": "typo" }, 5,
        ] });
        let (found, told) = see(&mut table, "RequestAuthentication", bad);
        let Some(AnyObject::RequestAuthentication(found)) = found else {
            panic!("no stand-in");
        };
        assert!(
            found.spec.selector.is_some() && told.contains("every token is refused"),
            "{told}"
        );
        let [first, second] = &found.spec.jwt_rules[..] else {
            panic!("{:?}", found.spec.jwt_rules);
        };
        assert_eq!(
            (first.issuer.as_str(), first.from_headers[0].name.as_str()),
            ("i", "x-token")
        );
        assert_eq!(second.issuer, "unreadable.invalid");
        for rule in [first, second] {
            assert!(rule.jwks_uri.is_empty() && rule.jwks.contains("keys"));
        }
        // Those that refuse nothing, or that have no such meaning, have no effect, and say so.
        let audit = json!({ "action": "AUDIT", "typo": 1 });
        for (kind, bad) in [
            ("AuthorizationPolicy", audit),
            ("VirtualService", json!({ "typo": 1 })),
        ] {
            let (found, told) = see(&mut table, kind, bad);
            assert!(found.is_none(), "{kind}");
            assert!(told.contains("the object has no effect"), "{told}");
        }
        // Of all other kinds an edit that can't be read takes the object away.
        let good =
            json!({ "hosts": ["a"], "tcp": [{ "route": [{ "destination": { "host": "a" } }] }] });
        assert!(see(&mut table, "VirtualService", good).0.is_some());
        assert!(
            see(&mut table, "VirtualService", json!({ "typo": 1 }))
                .0
                .is_none()
        );
    }
}
