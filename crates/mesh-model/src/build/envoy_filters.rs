//! EnvoyFilters: their patches are read once here, so that what is wrong with them stands on the object.

use std::sync::Arc;

use mesh_api::networking::envoy_filter::{
    ApplyTo, EnvoyConfigObjectMatch, EnvoyConfigObjectPatch, EnvoyFilter as Spec, FilterClass,
    Patch, PatchContext, PatchOperation,
};
use mesh_api::{AnyObject, Object};
use mesh_envoy_json::{Descriptors, JsonError};
use regex::RegexBuilder;

use super::created;
use crate::mesh::EnvoyFilters;
use crate::problem::Reporter;
use crate::rules::{EnvoyFilter, EnvoyPatch, VersionPattern};
use crate::{ObjectKey, Objects, Problem, Severity};

/// Longest regular expression that is compiled, and how large it may become, in bytes: anyone who may write an EnvoyFilter would otherwise slow
/// down everyone's configuration.
const MAX_PATTERN: usize = 1024;
const MAX_COMPILED: usize = 1 << 20;
/// API group of Kubernetes' gateways.
const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

pub(crate) fn build(objects: &Objects, problems: &mut Vec<Problem>) -> EnvoyFilters {
    let mut filters = EnvoyFilters::default();
    for (key, object) in &objects.istio {
        if let AnyObject::EnvoyFilter(object) = object.as_ref() {
            filters.descriptors.get_or_insert_with(Descriptors::hold);
            let mut report = Reporter::new(key, problems);
            filters
                .list
                .push(Arc::new(filter(key, object, &mut report)));
        }
    }
    filters
}

fn filter(key: &ObjectKey, object: &Object<Spec>, report: &mut Reporter<'_>) -> EnvoyFilter {
    let spec = &object.spec;
    let mut gateways = Vec::new();
    for (index, target) in spec.target_refs.iter().enumerate() {
        if target.group == GATEWAY_GROUP && target.kind == "Gateway" {
            gateways.push(target.name.clone());
        } else {
            report.not_applied(format!("spec.targetRefs[{index}]"));
        }
    }
    let patches = spec.config_patches.iter().enumerate();
    let patches = patches
        .filter_map(|(index, given)| patch(given, &format!("spec.configPatches[{index}]"), report));
    let patches = patches.collect();
    let selector = spec.workload_selector.as_ref();
    EnvoyFilter {
        key: key.clone(),
        priority: spec.priority,
        created: created(&object.meta),
        selector: selector
            .map(|selector| selector.labels.clone())
            .unwrap_or_default(),
        gateways,
        targeted: !spec.target_refs.is_empty(),
        patches,
    }
}

/// `None` for a patch that has no effect, which is reported. The others of the object are applied.
fn patch(
    given: &EnvoyConfigObjectPatch,
    field: &str,
    report: &mut Reporter<'_>,
) -> Option<EnvoyPatch> {
    let what = given.patch.as_ref()?;
    let none = EnvoyConfigObjectMatch::default();
    let matcher = given.matcher.as_ref().unwrap_or(&none);
    if matcher.context == PatchContext::Waypoint || matcher.waypoint.is_some() {
        report.not_applied(format!("{field}.match.context"));
        return None;
    }
    let Some(type_url) = type_of(given.apply_to) else {
        if given.apply_to != ApplyTo::Invalid {
            report.not_applied(format!("{field}.applyTo"));
        }
        return None;
    };
    if !is_possible(given.apply_to, what.operation) {
        if what.operation != PatchOperation::Invalid {
            refuse(
                report,
                format!("{field}.patch.operation"),
                format!("{:?} can't be done to {:?}", what.operation, given.apply_to),
            );
        }
        return None;
    }
    if matcher
        .listener
        .as_ref()
        .is_some_and(|listener| !listener.port_name.is_empty())
    {
        // Istio documents the condition and ignores it; a patch that reaches more than was meant would be worse than none.
        refuse(
            report,
            format!("{field}.match.listener.portName"),
            "listeners have no port names; use portNumber or name".to_owned(),
        );
        return None;
    }
    if what.filter_class != FilterClass::Unspecified {
        let message = "filters are put where the operation says (INSERT_BEFORE, INSERT_AFTER, INSERT_FIRST or at the end); the class has no effect";
        let field = format!("{field}.patch.filterClass");
        report.report(Severity::Warning, None, field, message);
    }
    let proxy = matcher.proxy.as_ref();
    let pattern = proxy.map_or("", |proxy| proxy.proxy_version.as_str());
    Some(EnvoyPatch {
        field: field.to_owned(),
        apply_to: given.apply_to,
        context: matcher.context,
        proxy_version: version(pattern, field, report)?,
        metadata: proxy
            .map(|proxy| proxy.metadata.clone())
            .unwrap_or_default(),
        listener: matcher.listener.clone(),
        route_configuration: matcher.route_configuration.clone(),
        cluster: matcher.cluster.clone(),
        operation: what.operation,
        value: value(type_url, what, field, report)?,
    })
}

/// What values of a patch are; `None` for what this version does not patch.
fn type_of(apply_to: ApplyTo) -> Option<&'static str> {
    Some(match apply_to {
        ApplyTo::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
        ApplyTo::FilterChain => "type.googleapis.com/envoy.config.listener.v3.FilterChain",
        ApplyTo::NetworkFilter => "type.googleapis.com/envoy.config.listener.v3.Filter",
        ApplyTo::HttpFilter => {
            "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter"
        }
        ApplyTo::RouteConfiguration => {
            "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
        }
        ApplyTo::VirtualHost => "type.googleapis.com/envoy.config.route.v3.VirtualHost",
        ApplyTo::HttpRoute => "type.googleapis.com/envoy.config.route.v3.Route",
        ApplyTo::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
        ApplyTo::Invalid
        | ApplyTo::ExtensionConfig
        | ApplyTo::Bootstrap
        | ApplyTo::ListenerFilter => return None,
    })
}

/// The operations that Istio's control plane carries out for each kind; it ignores the others.
fn is_possible(apply_to: ApplyTo, operation: PatchOperation) -> bool {
    use PatchOperation::{
        Add, InsertAfter, InsertBefore, InsertFirst, Invalid, Merge, MergeAndReplaceList, Remove,
        Replace,
    };
    match operation {
        Invalid => false,
        Merge | MergeAndReplaceList => true,
        Add | Remove => apply_to != ApplyTo::RouteConfiguration,
        Replace => matches!(
            apply_to,
            ApplyTo::NetworkFilter | ApplyTo::HttpFilter | ApplyTo::VirtualHost
        ),
        InsertBefore | InsertAfter | InsertFirst => matches!(
            apply_to,
            ApplyTo::NetworkFilter | ApplyTo::HttpFilter | ApplyTo::HttpRoute
        ),
    }
}

/// The outer `None` is a pattern that can't be used.
fn version(
    pattern: &str,
    field: &str,
    report: &mut Reporter<'_>,
) -> Option<Option<VersionPattern>> {
    if pattern.is_empty() {
        return Some(None);
    }
    let compiled = if pattern.len() > MAX_PATTERN {
        Err(format!("longer than {MAX_PATTERN} bytes"))
    } else {
        RegexBuilder::new(pattern)
            .size_limit(MAX_COMPILED)
            .build()
            .map_err(|error| error.to_string())
    };
    match compiled {
        Ok(regex) => Some(Some(VersionPattern::new(regex))),
        Err(error) => {
            let field = format!("{field}.match.proxy.proxyVersion");
            refuse(report, field, format!("{pattern:?}: {error}"));
            None
        }
    }
}

fn value(type_url: &str, what: &Patch, field: &str, report: &mut Reporter<'_>) -> Option<Vec<u8>> {
    match encoded(type_url, what)? {
        Ok(bytes) => Some(bytes),
        Err((path, message)) => {
            refuse(report, format!("{field}.patch.value{path}"), message);
            None
        }
    }
}

/// The value of a patch as a message; `None` where there is none to be read. An error is the way into the value, with a dot before it, and what is
/// wrong there.
fn encoded(type_url: &str, what: &Patch) -> Option<Result<Vec<u8>, (String, String)>> {
    if what.operation == PatchOperation::Remove {
        return Some(Ok(Vec::new()));
    }
    if what.value.is_null() {
        return None;
    }
    let mut value = what.value.clone();
    mesh_envoy_json::resolve_typed_structs(&mut value);
    let read = mesh_envoy_json::from_json(type_url, &value);
    Some(match read {
        Ok(bytes) => Ok(mesh_envoy_json::ordered(type_url, &bytes)),
        Err(JsonError::Field { path, message }) if !path.is_empty() => {
            Err((format!(".{path}"), message))
        }
        Err(error) => Err((String::new(), error.to_string())),
    })
}

/// Fields of an EnvoyFilter, and what is wrong there, whose values are not messages of the types that they patch: what only this crate can tell, and
/// what Istio refuses at admission.
pub fn unreadable_patches(spec: &Spec) -> Vec<(String, String)> {
    let _held = Descriptors::hold();
    let patches = spec.config_patches.iter().enumerate();
    patches
        .filter_map(|(index, given)| {
            let read = encoded(type_of(given.apply_to)?, given.patch.as_ref()?)?;
            let (path, message) = read.err()?;
            Some((
                format!("spec.configPatches[{index}].patch.value{path}"),
                message,
            ))
        })
        .collect()
}

fn refuse(report: &mut Reporter<'_>, field: String, message: String) {
    report.report(
        Severity::Error,
        Some("IST0106"),
        field,
        format!("{message}; the patch has no effect, the object's others have"),
    );
}
