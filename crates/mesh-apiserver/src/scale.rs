//! The subresources `scale` and `binding`.

use axum::response::Response;
use http::Method;
use serde_json::{Value, json};

use crate::dispatch::parse_body;
use crate::errors::{ApiError, FieldError};
use crate::patch;
use crate::registry::{Resource, ScalePaths};
use crate::request::Request;
use crate::write::Writer;
use crate::{ApiServer, read, respond};

/// get, update and patch of `scale`.
///
/// # Errors
/// As an update of the object.
pub async fn scale(
    api: &ApiServer,
    request: &Request,
    method: &Method,
    name: &str,
    body: &[u8],
) -> Result<Response, ApiError> {
    let resource = request.target.resource.clone();
    let Some(paths) = resource.scale.clone() else {
        return Err(ApiError::no_resource());
    };
    if method == Method::GET {
        let stored = read::find(api, request, name)?;
        return respond::send(200, &view(&paths, &stored.value), request.yaml);
    }
    // Scale is written through the object itself: the subresource of the request is not one that is stored.
    let mut on_object = request.clone();
    on_object.target.subresource = None;
    let mut writer = Writer::new(api, &on_object)?;
    let sent = match *method {
        Method::PUT => Some(parse_body(&request.content_type, body)?),
        Method::PATCH => None,
        _ => return Err(ApiError::method_not_allowed()),
    };
    let stored = writer
        .update(name, |current| {
            let old = view(&paths, current);
            let new = match &sent {
                Some(sent) => sent.clone(),
                None => patch::plain(&request.content_type, body, &old, &scale_schema())?,
            };
            with_replicas(&resource, &paths, current, &new, name)
        })
        .await?;
    respond::send(200, &view(&paths, &stored), request.yaml)
}

fn scale_schema() -> std::sync::Arc<crate::schema::Schema> {
    crate::schema::builtin::lookup("Scale").unwrap_or_else(crate::schema::Schema::any)
}

fn with_replicas(
    resource: &Resource,
    paths: &ScalePaths,
    current: &Value,
    scale: &Value,
    name: &str,
) -> Result<Value, ApiError> {
    let replicas = scale["spec"]["replicas"].as_i64().unwrap_or_default();
    if !(0..=i64::from(i32::MAX)).contains(&replicas) {
        let error = FieldError::invalid(
            "spec.replicas",
            replicas,
            "must be greater than or equal to 0",
        );
        return Err(ApiError::invalid(resource, name, &[error]));
    }
    let mut new = current.clone();
    new["metadata"]["resourceVersion"] = scale["metadata"]["resourceVersion"].clone();
    let mut at = &mut new;
    for key in &paths.spec {
        at = &mut at[key.as_str()];
    }
    *at = replicas.into();
    Ok(new)
}

fn view(paths: &ScalePaths, object: &Value) -> Value {
    let dig = |path: &[String]| {
        path.iter()
            .fold(object, |value, key| &value[key.as_str()])
            .clone()
    };
    let metadata = &object["metadata"];
    let mut status = json!({ "replicas": dig(&paths.status).as_i64().unwrap_or_default() });
    let selector = paths
        .selector
        .as_deref()
        .map(dig)
        .map_or(String::new(), |s| selector_text(&s));
    if !selector.is_empty() {
        status["selector"] = selector.into();
    }
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"], "creationTimestamp": metadata["creationTimestamp"],
        },
        "spec": { "replicas": dig(&paths.spec).as_i64().unwrap_or_default() },
        "status": status,
    })
}

/// A selector, text or object, as text.
pub fn selector_text(selector: &Value) -> String {
    if let Some(text) = selector.as_str() {
        return text.to_owned();
    }
    let plain = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut parts: Vec<String> = Vec::new();
    for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
        parts.push(format!("{key}={}", plain(value)));
    }
    for expression in selector["matchExpressions"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let key = plain(&expression["key"]);
        let values: Vec<String> = expression["values"]
            .as_array()
            .into_iter()
            .flatten()
            .map(plain)
            .collect();
        parts.push(match expression["operator"].as_str() {
            Some("In") => format!("{key} in ({})", values.join(",")),
            Some("NotIn") => format!("{key} notin ({})", values.join(",")),
            Some("DoesNotExist") => format!("!{key}"),
            _ => key,
        });
    }
    parts.join(",")
}

/// `pods/binding`: gives the pod its node.
///
/// # Errors
/// 409 when it has one already.
pub async fn bind(
    api: &ApiServer,
    request: &Request,
    name: &str,
    body: &[u8],
) -> Result<Response, ApiError> {
    let binding = parse_body(&request.content_type, body)?;
    let node = binding["target"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let resource = request.target.resource.clone();
    if node.is_empty() {
        return Err(ApiError::invalid(
            &resource,
            name,
            &[FieldError::required("target.name", "")],
        ));
    }
    let mut writer = Writer::new(api, request)?;
    let update = writer.update(name, |pod| {
        let found = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        if !found.is_empty() {
            return Err(ApiError::conflict(
                &resource,
                name,
                &format!("pod {name} is already assigned to node \"{found}\""),
            ));
        }
        let mut bound = pod.clone();
        bound["spec"]["nodeName"] = node.as_str().into();
        Ok(bound)
    });
    update.await?;
    let status = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201 });
    respond::send(201, &status, request.yaml)
}
