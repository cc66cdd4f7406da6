//! Objects and lists in the form that the client asked for.

use axum::body::Body;
use axum::response::Response;
use http::header::{CONTENT_TYPE, WARNING};
use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};

use crate::convert;
use crate::errors::ApiError;
use crate::request::{Form, Request};
use crate::table;

/// Answers one object, given as it is stored.
///
/// # Errors
/// 500 when it can't be written out.
pub fn object(
    request: &Request,
    code: u16,
    stored: &Value,
    warnings: &[String],
) -> Result<Response, ApiError> {
    let resource = &request.target.resource;
    let object = convert::to_version(resource, stored.clone());
    let value = match request.form {
        Form::Object => object,
        Form::Partial => partial(&object),
        Form::Table => {
            let revision = object["metadata"]["resourceVersion"].clone();
            table::table(
                resource,
                &[object],
                &include_object(request),
                json!({ "resourceVersion": revision }),
            )
        }
    };
    let mut response = send(code, &value, request.yaml)?;
    warnings
        .iter()
        .for_each(|warning| add_warning(&mut response, warning));
    Ok(response)
}

/// Answers a list of objects, given as they are stored.
///
/// # Errors
/// 500 when it can't be written out.
pub fn list(request: &Request, items: Vec<Value>, metadata: Value) -> Result<Response, ApiError> {
    let resource = &request.target.resource;
    let items: Vec<Value> = items
        .into_iter()
        .map(|item| convert::to_version(resource, item))
        .collect();
    let value = match request.form {
        Form::Table => table::table(resource, &items, &include_object(request), metadata),
        Form::Partial => json!({
            "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
            "items": items.iter().map(partial).collect::<Vec<_>>(),
        }),
        Form::Object => json!({
            "kind": resource.list_kind(), "apiVersion": resource.api_version(), "metadata": metadata, "items": items,
        }),
    };
    send(200, &value, request.yaml)
}

/// The object of one watch event.
pub fn event_object(request: &Request, stored: &Value) -> Value {
    let resource = &request.target.resource;
    let object = convert::to_version(resource, stored.clone());
    match request.form {
        Form::Object => object,
        Form::Partial => partial(&object),
        Form::Table => {
            let revision = object["metadata"]["resourceVersion"].clone();
            table::table(
                resource,
                &[object],
                &include_object(request),
                json!({ "resourceVersion": revision }),
            )
        }
    }
}

/// Which part of the objects the rows of a table carry.
pub fn include_object(request: &Request) -> String {
    request
        .query
        .get("includeObject")
        .unwrap_or("Metadata")
        .to_owned()
}

/// `PartialObjectMetadata` of an object.
pub fn partial(object: &Value) -> Value {
    json!({ "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"] })
}

/// Any value with a status code.
///
/// # Errors
/// 500 when it can't be written out.
pub fn send(code: u16, value: &Value, yaml: bool) -> Result<Response, ApiError> {
    let (media, text) = if yaml {
        (
            "application/yaml",
            serde_yaml::to_string(value).map_err(ApiError::internal)?,
        )
    } else {
        let mut text = value.to_string();
        text.push('\n');
        ("application/json", text)
    };
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::OK);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(media));
    Ok(response)
}

/// A `Warning` header (RFC 7234 section 5.5, code 299), which kubectl shows.
pub fn add_warning(response: &mut Response, text: &str) {
    let clean: String = text
        .chars()
        .filter(|c| (' '..='~').contains(c))
        .take(4096)
        .collect();
    let quoted = clean.replace('\\', "\\\\").replace('"', "\\\"");
    if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
        response.headers_mut().append(WARNING, value);
    }
}
