//! From the table of objects to the mesh.

mod destination_rules;
mod envoy_filters;
mod gateways;
mod security;
mod services;
mod virtual_services;
mod workloads;

use std::sync::Arc;

use mesh_api::{AnyObject, Meta};

pub use envoy_filters::unreadable_patches;

use crate::mesh::DOMAIN;
use crate::problem::Reporter;
use crate::{Mesh, ObjectKey, Objects, Problem, Severity};

/// Builds in the order of dependence: services know pods, rules know services.
pub(crate) fn build(objects: &Objects) -> Mesh {
    let mut mesh = Mesh {
        config: objects.mesh_config.clone(),
        domain: DOMAIN.to_owned(),
        ..Mesh::default()
    };
    let mut problems = Vec::new();
    check_limits(&mut mesh, &mut problems);
    mesh.workloads = workloads::build(objects);
    mesh.services = services::build(objects, &mesh);
    mesh.destination_rules = destination_rules::build(objects, &mesh, &mut problems);
    mesh.envoy_filters = envoy_filters::build(objects, &mut problems);
    mesh.gateways = gateways::build(objects, &mesh.config.tls_defaults, &mut problems);
    mesh.security = security::build(objects, &mut problems);
    mesh.jwks = objects.jwks.clone();
    mesh.virtual_services = virtual_services::build(objects, &mesh, &mut problems);
    for (key, object) in &objects.istio {
        // Nothing that a user wrote is ignored in silence.
        if let Some(message) = without_effect(object) {
            Reporter::new(key, &mut problems).report(Severity::Error, None, "", message);
        }
    }
    let defaults = &mesh.config.default_traffic_policy;
    let codes = defaults
        .outlier_detection
        .as_ref()
        .is_some_and(|outlier| !outlier.outlier_detection_http_error_codes.is_empty());
    let codes = codes
        .then(|| "defaultTrafficPolicy.outlierDetection.outlierDetectionHttpErrorCodes".to_owned());
    for field in objects.mesh_config.unsupported().into_iter().chain(codes) {
        let key = ObjectKey::new("ConfigMap", mesh.config.root_namespace.clone(), "istio");
        Reporter::new(&key, &mut problems).not_applied(format!("data.mesh.{field}"));
    }
    problems.sort();
    problems.dedup();
    mesh.problems = problems;
    mesh
}

/// Takes suites and curves out of the mesh's configuration that are not served: one of them would cost every listener.
fn check_limits(mesh: &mut Mesh, problems: &mut Vec<Problem>) {
    let config = Arc::make_mut(&mut mesh.config);
    let key = ObjectKey::new("ConfigMap", config.root_namespace.clone(), "istio");
    let mut report = Reporter::new(&key, problems);
    gateways::mesh_limits(&mut config.mesh_mtls, "data.mesh.meshMTLS", &mut report);
    gateways::mesh_limits(
        &mut config.tls_defaults,
        "data.mesh.tlsDefaults",
        &mut report,
    );
}

/// Why an object has no effect at all: its kind is one that a later version applies.
pub fn without_effect(object: &AnyObject) -> Option<String> {
    let applied = matches!(
        object,
        AnyObject::VirtualService(_)
            | AnyObject::DestinationRule(_)
            | AnyObject::Gateway(_)
            | AnyObject::EnvoyFilter(_)
            | AnyObject::PeerAuthentication(_)
            | AnyObject::AuthorizationPolicy(_)
            | AnyObject::RequestAuthentication(_)
    );
    let kind = object.kind();
    (!applied).then(|| format!("{kind} is stored but not applied yet by this version of mesh"))
}

/// Seconds since 1970 at which an object was created; 0 if unknown.
fn created(meta: &Meta) -> i64 {
    meta.creation_timestamp.map_or(0, |time| time.as_second())
}
