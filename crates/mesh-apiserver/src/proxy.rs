//! `pods/NAME:PORT/proxy` and `services/NAME:PORT/proxy`: an HTTP request handed on to a pod, as `kubectl get --raw` and
//! `kubectl proxy` use them.
//!
//! The connection is made inside the pod, as for a port-forward. Answers are passed on as they are: links in pages are not rewritten,
//! and protocol upgrades are refused (`kubectl port-forward` carries any protocol).

use axum::body::Body;
use axum::response::Response;
use http::header::{AUTHORIZATION, CONNECTION, COOKIE, HOST, UPGRADE};
use http::{HeaderName, HeaderValue, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::ApiServer;
use crate::errors::ApiError;
use crate::node::Duplex;

/// Headers of one connection (RFC 9110 section 7.6.1), which end here.
const HOP_BY_HOP: [&str; 7] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Where a request goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Target<'a> {
    namespace: &'a str,
    /// `pods` or `services`.
    plural: &'a str,
    name: &'a str,
    /// Number or name; empty for the only one.
    port: &'a str,
    /// The path behind `proxy`, with its slash; empty where there is none.
    path: &'a str,
}

/// Reads `/api/v1/namespaces/NAMESPACE/(pods|services)/[SCHEME:]NAME[:PORT]/proxy[/PATH]`.
pub fn target(path: &str) -> Option<Target<'_>> {
    let rest = path.strip_prefix("/api/v1/namespaces/")?;
    let (namespace, rest) = rest.split_once('/')?;
    let (plural, rest) = rest.split_once('/')?;
    let (name, rest) = rest.split_once('/')?;
    let path = rest.strip_prefix("proxy")?;
    if !matches!(plural, "pods" | "services") || !(path.is_empty() || path.starts_with('/')) {
        return None;
    }
    let parts: Vec<&str> = name.split(':').collect();
    let (name, port) = match parts.as_slice() {
        [name] => (*name, ""),
        [name, port] => (*name, *port),
        // Plain HTTP is the only scheme; `https:` is told below by its port not answering as HTTP.
        ["" | "http", name, port] => (*name, *port),
        _ => return None,
    };
    Some(Target {
        namespace,
        plural,
        name,
        port,
        path,
    })
}

/// Hands the request on and the answer back.
///
/// # Errors
/// 404 for the object, 400 for the port, 503 when nobody is ready or answers.
pub async fn proxy(
    api: &ApiServer,
    target: Target<'_>,
    mut request: http::Request<Body>,
) -> Result<Response, ApiError> {
    if request.headers().contains_key(UPGRADE) {
        return Err(ApiError::bad_request(
            "the proxy subresource passes on plain HTTP requests only: use kubectl port-forward for WebSocket and other upgrades",
        ));
    }
    let stream = connect(api, &target).await?;
    let path = if target.path.is_empty() {
        "/"
    } else {
        target.path
    };
    let query = request.uri().query().map(|query| format!("?{query}"));
    let uri = format!("{path}{}", query.unwrap_or_default());
    *request.uri_mut() = uri
        .parse::<Uri>()
        .map_err(|error| ApiError::bad_request(format!("the path {uri:?}: {error}")))?;
    *request.version_mut() = http::Version::HTTP_11;
    let host = format!("{}.{}", target.name, target.namespace);
    let headers = request.headers_mut();
    // The caller's credentials are for this server.
    for name in [AUTHORIZATION, COOKIE] {
        headers.remove(name);
    }
    let acting = |name: &&HeaderName| name.as_str().starts_with("impersonate-");
    let acting: Vec<HeaderName> = headers.keys().filter(acting).cloned().collect();
    for name in acting {
        headers.remove(name);
    }
    remove_hop_by_hop(headers);
    let host = HeaderValue::from_str(&host).map_err(ApiError::internal)?;
    headers.insert(HOST, host);
    let unreachable = |error: hyper::Error| {
        let (plural, name) = (target.plural, target.name);
        unavailable(format!("error trying to reach {plural} {name:?}: {error}"))
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(unreachable)?;
    // It ends with the answer's body, or with the client that leaves.
    tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(unreachable)?;
    let mut answer = answer.map(Body::new);
    remove_hop_by_hop(answer.headers_mut());
    Ok(answer)
}

fn remove_hop_by_hop(headers: &mut http::HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in listed {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

fn unavailable(message: String) -> ApiError {
    ApiError::new(503, "ServiceUnavailable", message)
}

async fn connect(api: &ApiServer, target: &Target<'_>) -> Result<Box<dyn Duplex>, ApiError> {
    let storage = format!("core/{}", target.plural);
    let key = format!("{}/{}", target.namespace, target.name);
    let found = api.storage().get(&storage, &key).ok_or_else(|| {
        let registry = api.registry();
        match registry.by_storage(&storage) {
            Some(resource) => ApiError::not_found(resource, target.name),
            None => ApiError::no_resource(),
        }
    })?;
    let (pod, port) = if target.plural == "pods" {
        (target.name.to_owned(), pod_port(&found.value, target.port)?)
    } else {
        endpoint(api, target, &found.value)?
    };
    let node = api.options().node.clone();
    node.port_forward(target.namespace.to_owned(), pod, port)
        .await
        .map_err(|error| unavailable(error.to_string()))
}

/// The port of a pod by number or name; without either its first.
fn pod_port(pod: &Value, asked: &str) -> Result<u16, ApiError> {
    if let Ok(number) = asked.parse() {
        return Ok(number);
    }
    let containers = pod["spec"]["containers"].as_array();
    let mut ports = containers
        .into_iter()
        .flatten()
        .flat_map(|container| container["ports"].as_array().into_iter().flatten());
    let port = ports.find(|port| asked.is_empty() || port["name"] == asked);
    number(port.map(|port| &port["containerPort"])).ok_or_else(|| {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        ApiError::bad_request(format!(
            "pod {name:?} has no port {asked:?}: use pods/{name}:PORT/proxy with a number or the name of a container's port"
        ))
    })
}

fn number(port: Option<&Value>) -> Option<u16> {
    u16::try_from(port?.as_u64()?).ok()
}

/// A pod behind a service that is ready, with its port.
fn endpoint(
    api: &ApiServer,
    target: &Target<'_>,
    service: &Value,
) -> Result<(String, u16), ApiError> {
    let all = service["spec"]["ports"].as_array();
    let mut ports = all.into_iter().flatten();
    let port = ports.find(|port| {
        port["name"] == target.port
            || target
                .port
                .parse()
                .is_ok_and(|asked| number(Some(&port["port"])) == Some(asked))
            || (target.port.is_empty() && all.is_some_and(|all| all.len() == 1))
    });
    let Some(port) = port else {
        let (name, asked) = (target.name, target.port);
        return Err(ApiError::bad_request(format!(
            "service {name:?} has no port {asked:?}: use services/{name}:PORT/proxy with a number or name of its ports"
        )));
    };
    let name = port["name"].as_str().unwrap_or_default();
    let slices = api
        .storage()
        .list("discovery.k8s.io/endpointslices", Some(target.namespace))
        .items;
    let ours = slices.iter().filter(|(_, slice)| {
        slice.value["metadata"]["labels"]["kubernetes.io/service-name"] == target.name
    });
    for (_, slice) in ours {
        let ports = slice.value["ports"].as_array();
        let port = ports
            .into_iter()
            .flatten()
            .find(|port| port["name"].as_str().unwrap_or_default() == name);
        let Some(port) = number(port.map(|port| &port["port"])) else {
            continue;
        };
        let endpoints = slice.value["endpoints"].as_array();
        let ready = endpoints.into_iter().flatten().find(|endpoint| {
            endpoint["conditions"]["ready"] != false && endpoint["targetRef"]["kind"] == "Pod"
        });
        if let Some(pod) = ready.and_then(|endpoint| endpoint["targetRef"]["name"].as_str()) {
            return Ok((pod.to_owned(), port));
        }
    }
    Err(unavailable(format!(
        "no endpoints available for service \"{}\"",
        target.name
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_object_port_and_rest() {
        let read = |rest: &str| {
            let path = format!("/api/v1/namespaces/a/{rest}");
            target(&path).map(|t| format!("{} {} {} {}", t.plural, t.name, t.port, t.path))
        };
        for (path, expected) in [
            ("services/web/proxy", Some("services web  ")),
            ("services/web:http/proxy/", Some("services web http /")),
            (
                "services/http:web:80/proxy/a//b/",
                Some("services web 80 /a//b/"),
            ),
            ("pods/p:8080/proxy/x", Some("pods p 8080 /x")),
            ("pods/p/proxied", None),
            ("configmaps/p/proxy", None),
            ("services/https:web:443/proxy", None),
        ] {
            assert_eq!(read(path).as_deref(), expected, "{path}");
        }
    }
}
