//! `pods/log`: the node agent's stream as plain text.

use axum::body::Body;
use axum::response::Response;
use futures::StreamExt;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use serde_json::Value;

use crate::errors::ApiError;
use crate::node::{LogRequest, NodeError, NodeErrorKind};
use crate::request::Request;
use crate::{ApiServer, read};

/// Streams a container's log.
///
/// # Errors
/// 404 for the pod, 400 for the container, what the agent says.
pub async fn logs(api: &ApiServer, request: &Request, name: &str) -> Result<Response, ApiError> {
    let pod = read::find(api, request, name)?;
    let query = &request.query;
    let container = choose_container(&pod.value, query.get("container"))?;
    let order = LogRequest {
        namespace: request.target.namespace.clone().unwrap_or_default(),
        pod: name.to_owned(),
        container,
        follow: query.flag("follow"),
        previous: query.flag("previous"),
        tail_lines: query.number("tailLines")?,
        since_time: query.get("sinceTime").map(str::to_owned),
        since_seconds: query.number("sinceSeconds")?,
        timestamps: query.flag("timestamps"),
        limit_bytes: query.number("limitBytes")?,
    };
    let stream = api.options().node.logs(order).await.map_err(node_error)?;
    let stop = api.closing();
    let stream = stream.take_until(async move { stop.cancelled().await });
    let mut response = Response::new(Body::from_stream(
        stream.map(Ok::<_, std::convert::Infallible>),
    ));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    Ok(response)
}

/// The container that a log, exec or attach request means: the named one, the one of the pod's default annotation, or the only one.
///
/// # Errors
/// 400 as Kubernetes words it.
pub fn choose_container(pod: &Value, asked: Option<&str>) -> Result<String, ApiError> {
    let names = |list: &str| -> Vec<&str> {
        pod["spec"][list]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|c| c["name"].as_str())
            .collect()
    };
    let (main, init) = (names("containers"), names("initContainers"));
    let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
    if let Some(asked) = asked {
        let known = main.contains(&asked)
            || init.contains(&asked)
            || names("ephemeralContainers").contains(&asked);
        return if known {
            Ok(asked.to_owned())
        } else {
            Err(ApiError::bad_request(format!(
                "container {asked} is not valid for pod {pod_name}"
            )))
        };
    }
    let default =
        pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
    match (default, main.as_slice()) {
        (Some(default), _) if main.contains(&default) => Ok(default.to_owned()),
        (_, [one]) => Ok((*one).to_owned()),
        _ => {
            let mut text = format!(
                "a container name must be specified for pod {pod_name}, choose one of: [{}]",
                main.join(" ")
            );
            if !init.is_empty() {
                text.push_str(&format!(
                    " or one of the init containers: [{}]",
                    init.join(" ")
                ));
            }
            Err(ApiError::bad_request(text))
        }
    }
}

/// The agent's refusal as a Status.
pub fn node_error(error: NodeError) -> ApiError {
    match error.kind {
        NodeErrorKind::NotFound => ApiError::new(404, "NotFound", error.message),
        NodeErrorKind::BadRequest => ApiError::bad_request(error.message),
        NodeErrorKind::Internal => ApiError::internal(error.message),
    }
}
