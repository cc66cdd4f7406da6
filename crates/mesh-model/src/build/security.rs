//! PeerAuthentications, AuthorizationPolicies and RequestAuthentications.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::mesh_config::MeshConfig;
use mesh_api::security::authorization_policy::{Action, AuthorizationPolicy as AuthorizationSpec};
use mesh_api::security::peer_authentication::{MutualTlsMode, PeerAuthentication as PeerSpec};
use mesh_api::security::request_authentication::RequestAuthentication as RequestSpec;
use mesh_api::{AnyObject, LabelSelector, Object, PolicyTargetReference};

use serde_json::Value;

use super::created;
use crate::mesh::Security;
use crate::problem::Reporter;
use crate::rules::{
    AuthorizationPolicy, MtlsMode, NamespaceMtls, PeerAuthentication, RequestAuthentication, Scope,
};
use crate::{ObjectKey, Objects, Problem, Severity};

/// A key set without keys.
const NO_KEYS: &str = r#"{"keys":[]}"#;
/// Annotation that makes a policy one to try out.
const DRY_RUN: &str = "istio.io/dry-run";

pub(crate) fn build(objects: &Objects, problems: &mut Vec<Problem>) -> Security {
    let config = &objects.mesh_config;
    let mut security = Security::default();
    let mut peers: Vec<(&ObjectKey, &Object<PeerSpec>)> = Vec::new();
    for (key, object) in &objects.istio {
        let mut report = Reporter::new(key, problems);
        match object.as_ref() {
            AnyObject::PeerAuthentication(object) => peers.push((key, object)),
            AnyObject::AuthorizationPolicy(object) => {
                let policy = authorization(key, object, config, &mut report);
                let of_namespace = security.authorization.entry(key.namespace.clone());
                of_namespace.or_default().push(Arc::new(policy));
            }
            AnyObject::RequestAuthentication(object) => {
                let policy = request(key, object, &mut report);
                let of_namespace = security.authentication.entry(key.namespace.clone());
                of_namespace.or_default().push(Arc::new(policy));
            }
            _ => {}
        }
    }
    for policies in security.authorization.values_mut() {
        policies.sort_by(|a, b| (a.created, &a.key).cmp(&(b.created, &b.key)));
    }
    for policies in security.authentication.values_mut() {
        policies.sort_by(|a, b| (a.created, &a.key).cmp(&(b.created, &b.key)));
    }
    peers.sort_by_key(|(key, object)| (created(&object.meta), *key));
    security.peers = peer_table(&peers, &config.root_namespace, problems);
    security
}

/// The oldest policy without a selector counts in its namespace, the oldest that selects a workload for the workload.
fn peer_table(
    sorted: &[(&ObjectKey, &Object<PeerSpec>)],
    root: &str,
    problems: &mut Vec<Problem>,
) -> BTreeMap<String, NamespaceMtls> {
    let mut table: BTreeMap<String, NamespaceMtls> = BTreeMap::new();
    let mut whole: BTreeMap<&str, &ObjectKey> = BTreeMap::new();
    for (key, object) in sorted {
        let mut report = Reporter::new(key, problems);
        let spec = &object.spec;
        let mode = spec.mtls.as_ref().and_then(|mtls| mode(mtls.mode));
        let selector = spec
            .selector
            .as_ref()
            .map(|selector| selector.match_labels.clone())
            .unwrap_or_default();
        let ports = ports(spec, &selector, &mut report);
        let of_namespace = table.entry(key.namespace.clone()).or_default();
        if !selector.is_empty() && key.namespace == root {
            report.report(
                Severity::Error,
                None,
                "spec.selector",
                format!(
                    "{root} is the root namespace, whose policies are for the whole mesh: one with a selector has no effect"
                ),
            );
        } else if !selector.is_empty() {
            of_namespace.workloads.push(PeerAuthentication {
                key: (*key).clone(),
                selector,
                mode,
                ports,
            });
        } else if let Some(first) = whole.get(key.namespace.as_str()) {
            report.report(
                Severity::Warning,
                None,
                "spec",
                format!(
                    "{first} is for the same namespace and older; it counts, this one has no effect"
                ),
            );
        } else {
            whole.insert(&key.namespace, key);
            of_namespace.mode = mode;
        }
    }
    table
}

fn ports(
    spec: &PeerSpec,
    selector: &BTreeMap<String, String>,
    report: &mut Reporter<'_>,
) -> BTreeMap<u16, Option<MtlsMode>> {
    if selector.is_empty() && !spec.port_level_mtls.is_empty() {
        report.report(
            Severity::Error,
            Some("IST0106"),
            "spec.portLevelMtls",
            "settings of single ports need a selector with labels; they have no effect",
        );
        return BTreeMap::new();
    }
    let mut ports = BTreeMap::new();
    for (port, mtls) in &spec.port_level_mtls {
        match port.parse::<u16>() {
            Ok(number) if number > 0 => {
                ports.insert(number, mode(mtls.mode));
            }
            _ => report.report(
                Severity::Error,
                Some("IST0106"),
                format!("spec.portLevelMtls[{port}]"),
                "a port is a number from 1 to 65535; this one has no effect",
            ),
        }
    }
    ports
}

fn mode(mode: MutualTlsMode) -> Option<MtlsMode> {
    match mode {
        MutualTlsMode::Unset => None,
        MutualTlsMode::Disable => Some(MtlsMode::Disable),
        MutualTlsMode::Permissive => Some(MtlsMode::Permissive),
        MutualTlsMode::Strict => Some(MtlsMode::Strict),
    }
}

fn authorization(
    key: &ObjectKey,
    object: &Object<AuthorizationSpec>,
    config: &MeshConfig,
    report: &mut Reporter<'_>,
) -> AuthorizationPolicy {
    let spec = &object.spec;
    let provider = spec
        .provider
        .as_ref()
        .map(|provider| provider.name.clone())
        .unwrap_or_default();
    let known = config
        .extension_providers
        .iter()
        .any(|known| known.name == provider);
    if spec.action == Action::Custom && !known {
        report.not_found(
            "spec.provider.name",
            format!(
                "provider {provider:?} is not among extensionProviders of the mesh configuration; what the rules match is refused"
            ),
        );
    }
    AuthorizationPolicy {
        key: key.clone(),
        created: created(&object.meta),
        scope: scope(
            spec.selector.as_ref(),
            spec.target_ref.as_ref(),
            &spec.target_refs,
            report,
        ),
        action: spec.action,
        rules: spec.rules.clone(),
        provider,
        dry_run: object
            .meta
            .annotations
            .get(DRY_RUN)
            .is_some_and(|value| is_true(value)),
    }
}

/// What Go's `strconv.ParseBool` takes for true, as Istio reads the annotation.
fn is_true(text: &str) -> bool {
    matches!(text, "1" | "t" | "T" | "true" | "TRUE" | "True")
}

fn request(
    key: &ObjectKey,
    object: &Object<RequestSpec>,
    report: &mut Reporter<'_>,
) -> RequestAuthentication {
    let spec = &object.spec;
    let mut rules = spec.jwt_rules.clone();
    for (index, rule) in rules.iter_mut().enumerate() {
        if !rule.jwks.is_empty() && !has_keys(&rule.jwks) {
            let message = "not a JSON Web Key Set with at least one key; every token of the issuer is refused";
            let field = format!("spec.jwtRules[{index}].jwks");
            report.report(Severity::Error, Some("IST0106"), field, message);
            NO_KEYS.clone_into(&mut rule.jwks);
        }
    }
    RequestAuthentication {
        key: key.clone(),
        created: created(&object.meta),
        scope: scope(
            spec.selector.as_ref(),
            spec.target_ref.as_ref(),
            &spec.target_refs,
            report,
        ),
        rules,
    }
}

/// True for a JSON Web Key Set that is not empty.
fn has_keys(text: &str) -> bool {
    let set: Option<Value> = serde_json::from_str(text).ok();
    set.as_ref()
        .and_then(|set| set.get("keys")?.as_array())
        .is_some_and(|keys| !keys.is_empty())
}

/// Targets that only waypoints serve are reported.
fn scope(
    selector: Option<&LabelSelector>,
    target: Option<&PolicyTargetReference>,
    targets: &[PolicyTargetReference],
    report: &mut Reporter<'_>,
) -> Scope {
    if target.is_none() && targets.is_empty() {
        return match selector {
            Some(selector) if !selector.match_labels.is_empty() => {
                Scope::Labels(selector.match_labels.clone())
            }
            _ => Scope::All,
        };
    }
    let fields = targets
        .iter()
        .enumerate()
        .map(|(index, target)| (format!("spec.targetRefs[{index}]"), target));
    let mut gateways = Vec::new();
    for (field, target) in target
        .map(|target| ("spec.targetRef".to_owned(), target))
        .into_iter()
        .chain(fields)
    {
        if target.kind == "Gateway" {
            gateways.push(target.name.clone());
        } else {
            let message = format!(
                "a policy for a {} is applied by waypoints, which this version of mesh does not have; it has no effect there",
                target.kind
            );
            report.report(Severity::Warning, None, field, message);
        }
    }
    if gateways.is_empty() {
        Scope::Nothing
    } else {
        Scope::Gateways(gateways)
    }
}
