//! `pods/exec`, `pods/attach` and `pods/portforward`: finds the pod and hands the connection to `streams.rs`.

use axum::body::Body;
use axum::response::Response;
use http::Method;

use crate::access::Action;
use crate::errors::ApiError;
use crate::logs::choose_container;
use crate::node::ExecRequest;
use crate::request::Request;
use crate::{ApiServer, read, streams};

/// Whether a subresource is a connection rather than an object.
pub fn is_connection(subresource: Option<&str>) -> bool {
    matches!(subresource, Some("exec" | "attach" | "portforward"))
}

/// Opens the connection.
///
/// # Errors
/// 404 for the pod, 400 for the container or the query.
pub async fn connect(
    api: &ApiServer,
    request: &Request,
    name: &str,
    http_request: http::Request<Body>,
) -> Result<Response, ApiError> {
    if !matches!(*http_request.method(), Method::GET | Method::POST) {
        return Err(ApiError::method_not_allowed());
    }
    // A WebSocket begins as GET; it needs the same permission as the POST of others (Kubernetes since 1.35).
    if *http_request.method() == Method::GET {
        api.authorize(
            &request.identity,
            &Action::of(&Method::POST, http_request.uri().path(), ""),
        )?;
    }
    let pod = read::find(api, request, name)?;
    let query = &request.query;
    let namespace = request.target.namespace.clone().unwrap_or_default();
    let node = api.options().node.clone();
    if request.target.subresource.as_deref() == Some("portforward") {
        let numbers = query
            .all("ports")
            .flat_map(|p| p.split(','))
            .filter(|p| !p.is_empty());
        let parse = |text: &str| {
            text.parse::<u16>()
                .map_err(|_| ApiError::bad_request(format!("unable to parse {text:?} as a port")))
        };
        let ports = numbers.map(parse).collect::<Result<Vec<u16>, _>>()?;
        return Ok(
            streams::port_forward(node, namespace, name.to_owned(), ports, http_request).await,
        );
    }
    let attach = request.target.subresource.as_deref() == Some("attach");
    let command: Vec<String> = query.all("command").map(str::to_owned).collect();
    if command.is_empty() && !attach {
        return Err(ApiError::bad_request(
            "you must specify at least 1 command for the container",
        ));
    }
    let order = ExecRequest {
        namespace,
        pod: name.to_owned(),
        container: choose_container(&pod.value, query.get("container"))?,
        command,
        stdin: query.flag("stdin"),
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr") && !query.flag("tty"),
        tty: query.flag("tty"),
        attach,
    };
    Ok(streams::exec(node, order, http_request).await)
}
