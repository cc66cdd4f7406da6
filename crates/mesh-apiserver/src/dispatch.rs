//! From a request to the verb that serves it.

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::Method;
use serde_json::Value;

use crate::access::Action;
use crate::auth::Identity;
use crate::errors::ApiError;
use crate::request::{self, Query, Request};
use crate::write::Writer;
use crate::{
    ApiServer, connect, delete, discovery, documents, limits, logs, patch, protobuf, proxy, read,
    respond, reviews, scale, watch,
};

/// Largest request body (as in Kubernetes).
const MAX_BODY: usize = 3 << 20;

/// Serves everything that has no route of its own.
pub async fn handle(
    State(api): State<ApiServer>,
    Extension(identity): Extension<Identity>,
    http_request: axum::extract::Request,
) -> Response {
    let answer = serve(&api, identity, http_request).await;
    answer.unwrap_or_else(IntoResponse::into_response)
}

async fn serve(
    api: &ApiServer,
    identity: Identity,
    http_request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let (parts, body) = http_request.into_parts();
    let uri = parts.uri.clone();
    let path = uri.path();
    let action = Action::of(&parts.method, path, uri.query().unwrap_or_default());
    api.authorize(&identity, &action)?;
    let plain = documents::answer(api, path, &parts.headers);
    if let Some(answer) =
        plain.or_else(|| discovery::answer(api, &parts.method, path, &parts.headers))
    {
        return Ok(answer);
    }
    if let Some(target) = proxy::target(path) {
        return proxy::proxy(api, target, http::Request::from_parts(parts, body)).await;
    }
    let target = request::target(path, &api.registry())?.ok_or_else(ApiError::no_resource)?;
    let (form, yaml, content_type, mut agent) = request::read_headers(&parts.headers)?;
    if agent.is_empty() {
        identity.component().clone_into(&mut agent);
    }
    let query = Query::parse(parts.uri.query().unwrap_or_default());
    let request = Request {
        identity,
        target,
        query,
        form,
        yaml,
        content_type,
        agent,
    };
    if let Some(subresource) = request.target.subresource.as_deref()
        && !request.target.resource.has(subresource)
    {
        return Err(ApiError::no_resource());
    }
    if let Some(name) = request.target.name.as_deref()
        && connect::is_connection(request.target.subresource.as_deref())
    {
        return connect::connect(api, &request, name, http::Request::from_parts(parts, body)).await;
    }
    let body = read_body(body).await?;
    let warning = request.target.resource.deprecation.clone();
    let mut answer = if matches!(parts.method, Method::GET | Method::HEAD) {
        verb(api, &request, &parts.method, body).await?
    } else {
        // A write that has begun is finished, with all that follows from it, also when the client has gone meanwhile.
        let api = api.clone();
        let write = async move { verb(&api, &request, &parts.method, body).await };
        tokio::spawn(write).await.map_err(ApiError::internal)??
    };
    if let Some(warning) = &warning {
        respond::add_warning(&mut answer, warning);
    }
    Ok(answer)
}

async fn read_body(body: Body) -> Result<Bytes, ApiError> {
    axum::body::to_bytes(body, MAX_BODY).await.map_err(|error| {
        let limit = std::error::Error::source(&error)
            .is_some_and(|e| e.is::<http_body_util::LengthLimitError>());
        if limit {
            let message = format!("Request entity too large: limit is {MAX_BODY}");
            ApiError::new(413, "RequestEntityTooLarge", message)
        } else {
            ApiError::bad_request(format!("reading the request's body: {error}"))
        }
    })
}

async fn verb(
    api: &ApiServer,
    request: &Request,
    method: &Method,
    body: Bytes,
) -> Result<Response, ApiError> {
    let target = &request.target;
    if target.resource.virtual_only {
        return match (method.as_str(), &target.name) {
            ("POST", None) => reviews::review(api, request, &body),
            _ => Err(ApiError::method_not_allowed()),
        };
    }
    match (method.as_str(), &target.name, target.subresource.as_deref()) {
        ("GET" | "HEAD", None, _) if request.query.flag("watch") => watch::watch(api, request),
        ("GET" | "HEAD", None, _) => read::list(api, request),
        ("GET" | "HEAD", Some(name), None | Some("status")) if request.query.flag("watch") => {
            watch::watch_one(api, request, name)
        }
        ("GET" | "HEAD", Some(name), None | Some("status" | "approval")) => {
            read::get(api, request, name)
        }
        ("GET", Some(name), Some("log")) => logs::logs(api, request, name).await,
        ("POST", None, _) => create(api, request, &body).await,
        ("POST", Some(name), Some("token")) => reviews::token_request(api, request, name, &body),
        ("POST", Some(name), Some("eviction")) => delete::evict(api, request, name, &body).await,
        ("POST", Some(name), Some("binding")) => scale::bind(api, request, name, &body).await,
        (_, Some(name), Some("scale")) => scale::scale(api, request, method, name, &body).await,
        ("PUT", Some(name), None | Some("status" | "finalize" | "approval")) => {
            replace(api, request, name, &body).await
        }
        ("PATCH", Some(name), None | Some("status" | "approval")) => {
            patch::patch(api, request, name, &body).await
        }
        ("DELETE", Some(name), None) => delete::delete(api, request, name, &body).await,
        ("DELETE", None, None) => delete::delete_collection(api, request, &body).await,
        _ => Err(ApiError::method_not_allowed()),
    }
}

async fn create(api: &ApiServer, request: &Request, body: &[u8]) -> Result<Response, ApiError> {
    let object = parse_object(request, body)?;
    let mut writer = Writer::new(api, request)?;
    writer.note_duplicates(body);
    let stored = writer.create(object, None).await?;
    respond::object(request, 201, &stored, &writer.warnings)
}

async fn replace(
    api: &ApiServer,
    request: &Request,
    name: &str,
    body: &[u8],
) -> Result<Response, ApiError> {
    let object = parse_object(request, body)?;
    let mut writer = Writer::new(api, request)?;
    writer.note_duplicates(body);
    let in_body = object["metadata"]["name"].as_str().unwrap_or_default();
    if !in_body.is_empty() && in_body != name {
        let message = format!(
            "the name of the object ({in_body}) does not match the name on the URL ({name})"
        );
        return Err(ApiError::bad_request(message));
    }
    let stored = writer.update(name, |_| Ok(object.clone())).await?;
    respond::object(request, 200, &stored, &writer.warnings)
}

/// The body as an object of the target's kind.
///
/// # Errors
/// 400 or 415 with what is wrong.
pub fn parse_object(request: &Request, body: &[u8]) -> Result<Value, ApiError> {
    let resource = &request.target.resource;
    let mut object = parse_body(&request.content_type, body)?;
    if !object.is_object() {
        return Err(ApiError::bad_request("the request's body is not an object"));
    }
    for (field, expected) in [
        ("kind", resource.kind.clone()),
        ("apiVersion", resource.api_version()),
    ] {
        match object[field].as_str() {
            None | Some("") => object[field] = expected.into(),
            Some(found) if found == expected => {}
            Some(found) => {
                let what = if field == "kind" {
                    "kind"
                } else {
                    "API version"
                };
                return Err(ApiError::bad_request(format!(
                    "the {what} in the data ({found}) does not match the expected {what} ({expected})"
                )));
            }
        }
    }
    if object.get("metadata").is_none_or(Value::is_null) {
        object["metadata"] = Value::Object(serde_json::Map::new());
    }
    if !object["metadata"].is_object() {
        return Err(ApiError::bad_request(format!(
            "{} in version {:?} cannot be handled as a {}: metadata must be an object",
            resource.kind, resource.version, resource.kind
        )));
    }
    Ok(object)
}

/// A JSON or YAML body as a value, nested at most [`MAX_DEPTH`](crate::limits::MAX_DEPTH) levels deep.
///
/// # Errors
/// 415 for other media types, 400 when it does not parse.
pub fn parse_body(content_type: &str, body: &[u8]) -> Result<Value, ApiError> {
    let value = match content_type {
        ""
        | "application/json"
        | "application/json-patch+json"
        | "application/merge-patch+json"
        | "application/strategic-merge-patch+json"
        | "application/apply-patch+json" => parse_json(body)?,
        "application/yaml" | "application/apply-patch+yaml" => parse_yaml(body)?,
        protobuf::MEDIA => protobuf::decode(body)
            .map_err(|reason| ApiError::new(415, "UnsupportedMediaType", reason))?,
        other => {
            return Err(ApiError::new(
                415,
                "UnsupportedMediaType",
                format!(
                    "the body of the request was in an unknown format - accepted media types include: application/json, \
                     application/yaml (not {other})"
                ),
            ));
        }
    };
    if limits::depth(&value) > limits::MAX_DEPTH {
        return Err(ApiError::bad_request(format!(
            "the object provided is {}",
            limits::TooDeep
        )));
    }
    Ok(value)
}

fn parse_json(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body)
        .map_err(|e| ApiError::bad_request(format!("the object provided is not valid JSON: {e}")))
}

fn parse_yaml(body: &[u8]) -> Result<Value, ApiError> {
    // What clients apply is nearly always JSON, which is YAML too and much faster to read.
    if body.trim_ascii_start().starts_with(b"{")
        && let Ok(value) = serde_json::from_slice(body)
    {
        return Ok(value);
    }
    let bad =
        |e: &dyn std::fmt::Display| ApiError::bad_request(format!("error decoding YAML: {e}"));
    let text = std::str::from_utf8(body).map_err(|e| bad(&e))?;
    limits::check_yaml(text).map_err(|e| bad(&e))?;
    serde_yaml::from_str(text).map_err(|e| bad(&e))
}
