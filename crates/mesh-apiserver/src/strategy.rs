//! What is special about each built-in kind: defaults that depend on other fields, what the server fills in, what can't change, what is
//! wrong. One file for each family of kinds; here is only the choice between them.

pub mod autoscaler;
pub mod batch;
pub mod budget;
pub mod certificates;
pub mod config;
pub mod crd;
pub mod pod;
pub mod rbac;
pub mod service;
pub mod workload;

use serde_json::{Value, json};

use crate::ApiServer;
use crate::errors::{ApiError, FieldError};
use crate::rbac::{CLUSTER_ROLE_BINDINGS, GROUP, ROLE_BINDINGS};
use crate::registry::Resource;
use crate::schema::check;

/// Defaults that the schema can't say.
pub fn defaults(storage: &str, object: &mut Value) {
    match storage {
        "core/pods" if object["spec"].is_object() => pod::defaults(&mut object["spec"]),
        "core/services" => service::defaults(&mut object["spec"]),
        "apps/deployments" | "apps/replicasets" | "apps/statefulsets" | "apps/daemonsets"
            if object["spec"].is_object() =>
        {
            workload::defaults(storage, object)
        }
        "batch/jobs" if object["spec"].is_object() => batch::job_defaults(&mut object["spec"]),
        "batch/cronjobs" if object["spec"]["jobTemplate"]["spec"].is_object() => {
            batch::job_defaults(&mut object["spec"]["jobTemplate"]["spec"])
        }
        "core/secrets" => config::fold_string_data(object),
        ROLE_BINDINGS | CLUSTER_ROLE_BINDINGS => rbac::defaults(object),
        _ => {}
    }
}

/// The items of a list field for changing, none when there is no such list (writing through an index would leave a null behind).
pub fn items_mut<'a>(object: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> {
    object
        .get_mut(field)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
}

/// Admission that is part of the server; runs before the webhooks.
///
/// # Errors
/// 403 when the object may not be.
pub fn admit_create(
    api: &ApiServer,
    resource: &Resource,
    object: &mut Value,
) -> Result<(), ApiError> {
    match resource.storage.as_str() {
        "core/pods" => pod::admit_service_account(api, resource, object),
        _ => Ok(()),
    }
}

/// Whether the server counts generations of this kind.
pub fn has_generation(resource: &Resource) -> bool {
    resource.custom
        || matches!(
            resource.storage.as_str(),
            "core/pods"
                | "apps/deployments"
                | "apps/replicasets"
                | "apps/statefulsets"
                | "apps/daemonsets"
                | "batch/jobs"
                | "batch/cronjobs"
                | "policy/poddisruptionbudgets"
                | "discovery.k8s.io/endpointslices"
                | "apiextensions.k8s.io/customresourcedefinitions"
        )
        || resource.group == "admissionregistration.k8s.io"
}

/// Fills in what the server decides at creation.
///
/// # Errors
/// 422 when it can't, for example no address is free.
pub fn prepare_create(
    api: &ApiServer,
    resource: &Resource,
    object: &mut Value,
) -> Result<(), ApiError> {
    match resource.storage.as_str() {
        "core/pods" => {
            pod::admit_service_account(api, resource, object)?;
            pod::prepare_create(object);
        }
        "core/services" => {
            object["status"] = json!({ "loadBalancer": {} });
            service::allocate(api, resource, None, object)?;
        }
        "core/namespaces" => {
            object["spec"]["finalizers"] = json!(["kubernetes"]);
            object["status"] = json!({ "phase": "Active" });
            label_namespace(object);
        }
        "apps/deployments" | "apps/replicasets" | "apps/statefulsets" | "apps/daemonsets"
        | "batch/cronjobs" => object["status"] = json!({}),
        "autoscaling/horizontalpodautoscalers" | "policy/poddisruptionbudgets" => {
            object["status"] = json!({});
            // The numbers that are always there; else the next write, even one that changes nothing, would add them.
            check::fill_defaults(object, &resource.schema);
        }
        "batch/jobs" => batch::prepare_job(object),
        "apiextensions.k8s.io/customresourcedefinitions" => crd::prepare(None, object),
        _ if resource.custom && resource.has("status") => {
            if let Some(map) = object.as_object_mut() {
                map.shift_remove("status");
            }
        }
        _ => {}
    }
    Ok(())
}

/// Fills in what the server decides at an update.
///
/// # Errors
/// As [`prepare_create`].
pub fn prepare_update(
    api: &ApiServer,
    resource: &Resource,
    old: &Value,
    new: &mut Value,
) -> Result<(), ApiError> {
    match resource.storage.as_str() {
        "core/services" => service::allocate(api, resource, Some(old), new)?,
        "core/namespaces" => {
            label_namespace(new);
            // Only the finalize subresource removes them.
            if new["spec"].get("finalizers").is_none() {
                new["spec"]["finalizers"] = old["spec"]["finalizers"].clone();
            }
        }
        "core/pods" => pod::prepare_update(old, new),
        "apiextensions.k8s.io/customresourcedefinitions" => crd::prepare(Some(old), new),
        _ => {}
    }
    Ok(())
}

fn label_namespace(object: &mut Value) {
    let name = object["metadata"]["name"].clone();
    object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
}

/// Adds what the schema can't see to `errors`.
pub fn validate(
    resource: &Resource,
    subresource: Option<&str>,
    object: &Value,
    old: Option<&Value>,
    errors: &mut Vec<FieldError>,
) {
    match resource.storage.as_str() {
        "core/pods" => pod::validate(subresource, object, old, errors),
        "core/services" => service::validate(object, old, errors),
        "apps/deployments" | "apps/replicasets" | "apps/statefulsets" | "apps/daemonsets" => {
            workload::validate(resource, object, old, errors)
        }
        "apps/controllerrevisions" => workload::validate_revision(object, old, errors),
        "batch/jobs" => batch::validate_job(object, old, errors),
        "batch/cronjobs" => batch::validate_cron_job(object, errors),
        "policy/poddisruptionbudgets" => budget::validate(object, errors),
        certificates::REQUESTS => certificates::validate(object, old, errors),
        "autoscaling/horizontalpodautoscalers" => autoscaler::validate(resource, object, errors),
        _ if resource.group == GROUP => rbac::validate(&resource.storage, object, old, errors),
        "core/configmaps" | "core/secrets" => config::validate(object, old, errors),
        "apiextensions.k8s.io/customresourcedefinitions" => crd::validate(object, old, errors),
        _ if resource.group == "admissionregistration.k8s.io" => {
            config::validate_webhooks(object, errors)
        }
        _ => {}
    }
}
