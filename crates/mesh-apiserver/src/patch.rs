//! The four kinds of patch: JSON patch (RFC 6902; `patch/json.rs`), merge patch (RFC 7386), strategic merge (`patch/strategic.rs`) and server-side apply
//! (`patch/apply.rs`).

pub mod apply;
pub mod fieldset;
pub mod json;
pub mod strategic;

use axum::response::Response;
use serde_json::Value;

use crate::dispatch::{parse_body, parse_object};
use crate::errors::ApiError;
use crate::managed::Manager;
use crate::request::Request;
use crate::schema::Schema;
use crate::write::{Writer, now};
use crate::{ApiServer, respond};

/// Serves PATCH.
///
/// # Errors
/// 415 for an unknown kind of patch, 409 for conflicts, and what an update can say.
pub async fn patch(
    api: &ApiServer,
    request: &Request,
    name: &str,
    body: &[u8],
) -> Result<Response, ApiError> {
    if request.content_type.starts_with("application/apply-patch") {
        return apply_patch(api, request, name, body).await;
    }
    let resource = &request.target.resource;
    let strategic = request.content_type == "application/strategic-merge-patch+json";
    if resource.custom && strategic {
        return Err(unsupported(&request.content_type, ""));
    }
    // What does not parse is said before the object is looked for.
    parse_body(&request.content_type, body).map_err(|error| match error.code {
        415 => unsupported(
            &request.content_type,
            "application/strategic-merge-patch+json, ",
        ),
        _ => error,
    })?;
    let mut writer = Writer::new(api, request)?;
    let stored = writer
        .update(name, |current| {
            plain(&request.content_type, body, current, &resource.schema)
        })
        .await?;
    respond::object(request, 200, &stored, &writer.warnings)
}

fn unsupported(found: &str, strategic: &str) -> ApiError {
    ApiError::new(
        415,
        "UnsupportedMediaType",
        format!(
            "the body of the request was in an unknown format - accepted media types include: application/json-patch+json, \
             application/merge-patch+json, {strategic}application/apply-patch+yaml (not {found})"
        ),
    )
}

/// Applies a patch other than server-side apply.
///
/// # Errors
/// 422 when the patch does not fit the object, 415 for an unknown kind.
pub fn plain(
    content_type: &str,
    body: &[u8],
    current: &Value,
    schema: &Schema,
) -> Result<Value, ApiError> {
    let mut object = current.clone();
    match content_type {
        "application/json-patch+json" => json::apply(&mut object, body)?,
        "application/merge-patch+json" => {
            let patch = parse_body(content_type, body)?;
            require_object(&patch)?;
            json_patch::merge(&mut object, &patch);
        }
        "application/strategic-merge-patch+json" => {
            let patch = parse_body(content_type, body)?;
            require_object(&patch)?;
            strategic::merge(&mut object, &patch, schema)?;
        }
        other => {
            return Err(unsupported(
                other,
                "application/strategic-merge-patch+json, ",
            ));
        }
    }
    if !object.is_object() || !object["metadata"].is_object() {
        return Err(ApiError::bad_request(
            "after the patch the object has no metadata",
        ));
    }
    Ok(object)
}

fn require_object(patch: &Value) -> Result<(), ApiError> {
    if patch.is_object() {
        Ok(())
    } else {
        Err(ApiError::bad_request("a merge patch must be an object"))
    }
}

async fn apply_patch(
    api: &ApiServer,
    request: &Request,
    name: &str,
    body: &[u8],
) -> Result<Response, ApiError> {
    let resource = &request.target.resource;
    let config = parse_object(request, body)?;
    let Some(manager_name) = request.query.get("fieldManager") else {
        let field =
            crate::errors::FieldError::required("fieldManager", "is required for apply patch");
        let mut error = ApiError::invalid(resource, name, std::slice::from_ref(&field));
        error.message = format!("PatchOptions.meta.k8s.io \"\" is invalid: {field}");
        return Err(error);
    };
    let in_body = config["metadata"]["name"].as_str().unwrap_or_default();
    if !in_body.is_empty() && in_body != name {
        let message = format!(
            "the name of the object ({in_body}) does not match the name on the URL ({name})"
        );
        return Err(ApiError::bad_request(message));
    }
    if config["metadata"]["managedFields"]
        .as_array()
        .is_some_and(|m| !m.is_empty())
    {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let manager = Manager {
        name: manager_name.to_owned(),
        operation: "Apply",
        api_version: resource.api_version(),
        subresource: request.target.subresource.clone().unwrap_or_default(),
        time: now(),
    };
    let force = request.query.flag("force");
    let mut writer = Writer::new(api, request)?;
    writer.applied = true;
    for _ in 0..2 {
        let found = api
            .storage()
            .get(&resource.storage, &request.target.key(name));
        let outcome = if found.is_some() {
            let stored = writer
                .update(name, |current| {
                    apply::apply(resource, Some(current), &config, &manager, force)
                })
                .await;
            stored.map(|stored| (200, stored))
        } else if request.target.subresource.is_some() {
            Err(ApiError::not_found(resource, name))
        } else {
            if config["metadata"]["uid"]
                .as_str()
                .is_some_and(|uid| !uid.is_empty())
            {
                return Err(ApiError::conflict(
                    resource,
                    name,
                    "uid mismatch: the object does not exist",
                ));
            }
            // Whoever may patch may not make a new object by that alone.
            api.authorize(&request.identity, &request.creation(name))?;
            let mut config = config.clone();
            config["metadata"]["name"] = name.into();
            let object = apply::apply(resource, None, &config, &manager, force)?;
            writer
                .create(object, Some(name))
                .await
                .map(|stored| (201, stored))
        };
        match outcome {
            // Somebody else created or deleted it meanwhile.
            Err(error)
                if matches!(error.reason, "AlreadyExists" | "NotFound")
                    && request.target.subresource.is_none() => {}
            other => {
                let (code, stored) = other?;
                return respond::object(request, code, &stored, &writer.warnings);
            }
        }
    }
    Err(ApiError::modified(resource, name))
}
