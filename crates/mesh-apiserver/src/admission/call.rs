//! One HTTPS request to a webhook, by its service or URL.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio_rustls::TlsConnector;

use crate::ApiServer;
use crate::node::Duplex;

/// Largest answer that is read.
const MAX_ANSWER: usize = 3 << 20;

/// Where a webhook is.
struct Place {
    /// For the certificate and the `Host` header.
    host: String,
    port: u16,
    path: String,
    /// Connect here; for a URL, the name is resolved.
    address: Option<SocketAddr>,
}

/// Posts a review; the answer as JSON, or why there is none.
pub async fn post(api: &ApiServer, webhook: &Value, review: &Value) -> Result<Value, String> {
    let seconds = webhook["timeoutSeconds"]
        .as_u64()
        .unwrap_or(10)
        .clamp(1, 30);
    let config = &webhook["clientConfig"];
    let place = place(api, config)?;
    let url = format!(
        "https://{}:{}{}?timeout={seconds}s",
        place.host, place.port, place.path
    );
    let attempt = exchange(api, config, &place, seconds, review);
    match tokio::time::timeout(Duration::from_secs(seconds), attempt).await {
        Err(_) => Err(format!("Post \"{url}\": context deadline exceeded")),
        Ok(Err(reason)) => Err(format!("Post \"{url}\": {reason}")),
        Ok(Ok(answer)) => Ok(answer),
    }
}

fn place(api: &ApiServer, config: &Value) -> Result<Place, String> {
    let service = &config["service"];
    if let Some(url) = config["url"].as_str() {
        let uri: http::Uri = url
            .parse()
            .map_err(|e| format!("the URL {url:?} is wrong: {e}"))?;
        let host = uri
            .host()
            .ok_or_else(|| format!("the URL {url:?} has no host"))?;
        let path = uri.path().to_owned();
        return Ok(Place {
            host: host.to_owned(),
            port: uri.port_u16().unwrap_or(443),
            path,
            address: None,
        });
    }
    let text = |field: &str| service[field].as_str().unwrap_or_default();
    let (name, namespace) = (text("name"), text("namespace"));
    let port = service["port"]
        .as_u64()
        .and_then(|p| u16::try_from(p).ok())
        .unwrap_or(443);
    let found = api
        .storage()
        .get("core/services", &format!("{namespace}/{name}"));
    let found = found.ok_or_else(|| format!("service \"{name}\" not found"))?;
    let address: IpAddr = found.value["spec"]["clusterIP"]
        .as_str()
        .and_then(|ip| ip.parse().ok())
        .ok_or_else(|| {
            format!("service \"{name}\" in namespace {namespace} has no cluster address")
        })?;
    if nobody_ready(api, namespace, name) {
        return Err(format!("no endpoints available for service \"{name}\""));
    }
    let mut path = text("path").to_owned();
    if !path.starts_with('/') {
        path.insert(0, '/');
    }
    Ok(Place {
        host: format!("{name}.{namespace}.svc"),
        port,
        path,
        address: Some(SocketAddr::new(address, port)),
    })
}

/// The service has endpoint slices and none of them a ready endpoint: a connection could only hang.
fn nobody_ready(api: &ApiServer, namespace: &str, name: &str) -> bool {
    let slices = api
        .storage()
        .list("discovery.k8s.io/endpointslices", Some(namespace))
        .items;
    let ours = slices
        .iter()
        .filter(|(_, s)| s.value["metadata"]["labels"]["kubernetes.io/service-name"] == name);
    let (mut slices, mut ready) = (0, false);
    for (_, slice) in ours {
        slices += 1;
        let endpoints = slice.value["endpoints"].as_array();
        ready |= endpoints.is_some_and(|e| {
            e.iter()
                .any(|e| e["conditions"]["ready"] != Value::Bool(false))
        });
    }
    slices > 0 && !ready
}

async fn exchange(
    api: &ApiServer,
    config: &Value,
    place: &Place,
    seconds: u64,
    review: &Value,
) -> Result<Value, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let bundle = config["caBundle"].as_str().unwrap_or_default();
    if bundle.is_empty() {
        return Err(
            "the webhook configuration has no caBundle to check the server's certificate with"
                .to_owned(),
        );
    }
    let roots = STANDARD.decode(bundle).map_err(|e| text(&e))?;
    let roots = String::from_utf8(roots).map_err(|_| "caBundle is not PEM text".to_owned())?;
    let tls = mesh_identity::tls::client_config(&roots, &["http/1.1"])
        .map_err(|e| format!("caBundle: {e}"))?;
    let stream: Box<dyn Duplex> = match place.address {
        Some(address) => (api.options().service_dialer)(address)
            .await
            .map_err(|e| format!("dial tcp {address}: {e}"))?,
        None => {
            let host = place.host.trim_matches(['[', ']']);
            let stream = tokio::net::TcpStream::connect((host, place.port)).await;
            Box::new(stream.map_err(|e| format!("dial tcp {}:{}: {e}", place.host, place.port))?)
        }
    };
    let name = ServerName::try_from(place.host.trim_matches(['[', ']']).to_owned())
        .map_err(|e| text(&e))?;
    let stream = TlsConnector::from(tls)
        .connect(name, stream)
        .await
        .map_err(|e| format!("tls: {e}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| text(&e))?;
    let connection = tokio::spawn(connection);
    let request = http::Request::post(format!("{}?timeout={seconds}s", place.path))
        .header(http::header::HOST, format!("{}:{}", place.host, place.port))
        .header(http::header::CONTENT_TYPE, "application/json")
        .header(http::header::ACCEPT, "application/json")
        .header(http::header::USER_AGENT, "kube-apiserver-admission")
        .body(Full::new(bytes::Bytes::from(review.to_string())))
        .map_err(|e| text(&e))?;
    let response = sender.send_request(request).await.map_err(|e| text(&e));
    let answer = async {
        let response = response?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|e| text(&e))?
            .to_bytes();
        if !status.is_success() {
            let shown: String = String::from_utf8_lossy(&body).chars().take(500).collect();
            return Err(format!("the server answered {status}: {shown}"));
        }
        serde_json::from_slice(&body).map_err(|e| format!("the answer is not JSON: {e}"))
    }
    .await;
    connection.abort();
    answer
}
