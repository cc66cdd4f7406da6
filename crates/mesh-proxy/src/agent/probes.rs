//! Probes of the application, made by the agent in the kubelet's stead: the kubelet has no certificate, and captured ports accept its connections
//! whatever the application does. The injector says in `ISTIO_KUBE_APP_PROBERS` which path stands for which probe.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_net::sockets::{ConnectOptions, connect};
use prost::Message;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::serve::Answer;
use crate::shared::Shared;

/// Most of an application's answer that is passed on, in bytes; the kubelet reads no more.
const LARGEST_ANSWER: usize = 10 << 10;
/// Redirections within the application that are followed (as the kubelet does).
const MOST_REDIRECTIONS: usize = 10;
/// Headers of the kubelet's own connection to us.
const OF_THE_CONNECTION: [HeaderName; 7] = [
    header::HOST,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// A probe of the application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppProbe {
    action: Action,
    /// How long the whole probe may take.
    timeout: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Http {
        port: u16,
        path: String,
        secure: bool,
        /// The value of the header `Host`, where the probe sets it.
        host: Option<String>,
    },
    Tcp {
        port: u16,
    },
    Grpc {
        port: u16,
        service: String,
    },
}

/// Reads the variable: a JSON map from path to `{"httpGet": {...}, "timeoutSeconds": 1}`, with `tcpSocket` and `grpc` likewise.
pub(crate) fn parse(text: &str) -> Result<BTreeMap<String, AppProbe>, String> {
    let all: BTreeMap<String, Value> =
        serde_json::from_str(text).map_err(|error| format!("is not a JSON map: {error}"))?;
    let each = all.into_iter().map(|(path, probe)| {
        let probe = one(&probe).map_err(|reason| format!("{path}: {reason}"))?;
        Ok((path, probe))
    });
    each.collect()
}

fn one(probe: &Value) -> Result<AppProbe, String> {
    let seconds = probe["timeoutSeconds"].as_u64().unwrap_or(1).max(1);
    let port = |action: &Value| {
        let port = action["port"]
            .as_u64()
            .and_then(|port| port.try_into().ok());
        port.ok_or_else(|| format!("{} is not a port", action["port"]))
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let action = if let Some(get) = probe.get("httpGet") {
        let path = text(&get["path"]);
        let headers = get["httpHeaders"].as_array().into_iter().flatten();
        let mut hosts = headers.filter(|header| {
            let name = header["name"].as_str();
            name.is_some_and(|name| name.eq_ignore_ascii_case("host"))
        });
        Action::Http {
            port: port(get)?,
            path: match path.starts_with('/') {
                true => path,
                false => format!("/{path}"),
            },
            secure: get["scheme"] == "HTTPS",
            host: hosts.next().map(|header| text(&header["value"])),
        }
    } else if let Some(socket) = probe.get("tcpSocket") {
        Action::Tcp {
            port: port(socket)?,
        }
    } else if let Some(grpc) = probe.get("grpc") {
        Action::Grpc {
            port: port(grpc)?,
            service: text(&grpc["service"]),
        }
    } else {
        return Err("is neither httpGet, tcpSocket nor grpc".to_owned());
    };
    Ok(AppProbe {
        action,
        timeout: Duration::from_secs(seconds),
    })
}

/// Why a probe failed.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("connecting to {0}: {1}")]
    Connect(SocketAddr, std::io::Error),
    #[error("TLS with {0}: {1}")]
    Tls(SocketAddr, std::io::Error),
    #[error("TLS settings: {0}")]
    Settings(rustls::Error),
    #[error("request: {0}")]
    Request(#[from] http::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("body: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("more than {MOST_REDIRECTIONS} redirections")]
    Redirections,
    #[error("the service is not serving")]
    NotServing,
}

/// Makes the probe that stands behind the request.
pub(super) async fn answer(
    shared: &Shared,
    probe: &AppProbe,
    request: &Request<Incoming>,
) -> Answer {
    let ip = shared.options.ip;
    let target = Target {
        ip,
        mark: shared.mark,
    };
    let work = async {
        match &probe.action {
            Action::Http {
                port,
                path,
                secure,
                host,
            } => {
                let mut headers = request.headers().clone();
                OF_THE_CONNECTION.iter().for_each(|name| {
                    headers.remove(name);
                });
                let address = SocketAddr::new(ip, *port);
                let host = host.clone().unwrap_or_else(|| address.to_string());
                if let Ok(host) = HeaderValue::from_str(&host) {
                    headers.insert(header::HOST, host);
                }
                target.get(address, path, *secure, headers).await
            }
            Action::Tcp { port } => {
                target.open(*port).await?;
                Ok(Answer::text(""))
            }
            Action::Grpc { port, service } => target.health(*port, service).await,
        }
    };
    let failed = |reason: String| {
        tracing::debug!(path = request.uri().path(), reason, "probe");
        Answer::status(StatusCode::INTERNAL_SERVER_ERROR, format!("{reason}\n"))
    };
    match tokio::time::timeout(probe.timeout, Box::pin(work)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => failed(error.to_string()),
        Err(_) => failed(format!("no answer within {:?}", probe.timeout)),
    }
}

/// The application of this pod.
struct Target {
    ip: IpAddr,
    mark: Option<u32>,
}

impl Target {
    /// Connects by the pod's address, where applications listen, and from the one that capture leaves alone.
    async fn open(&self, port: u16) -> Result<TcpStream, ProbeError> {
        let address = SocketAddr::new(self.ip, port);
        let source = match self.ip {
            IpAddr::V4(_) => SocketAddr::from((Ipv4Addr::new(127, 0, 0, 6), 0)),
            IpAddr::V6(_) => SocketAddr::from((Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6), 0)),
        };
        let options = ConnectOptions {
            source: Some(source),
            mark: self.mark,
            ..ConnectOptions::default()
        };
        let connected = connect(address, options).await;
        connected.map_err(|error| ProbeError::Connect(address, error))
    }

    /// Asks and follows redirections within the application; others are the answer.
    async fn get(
        &self,
        address: SocketAddr,
        path: &str,
        secure: bool,
        headers: HeaderMap,
    ) -> Result<Answer, ProbeError> {
        let mut path = path.to_owned();
        for _ in 0..=MOST_REDIRECTIONS {
            let stream = self.open(address.port()).await?;
            let mut request = Request::get(&path).body(Empty::new())?;
            *request.headers_mut() = headers.clone();
            let response = if secure {
                let connector = TlsConnector::from(tls().map_err(ProbeError::Settings)?);
                let name = ServerName::IpAddress(self.ip.into());
                let stream = connector.connect(name, stream).await;
                let stream = stream.map_err(|error| ProbeError::Tls(address, error))?;
                exchange(stream, request).await?
            } else {
                exchange(stream, request).await?
            };
            match within(&response, &headers) {
                Some(next) => path = next,
                None => return Ok(Answer::status(response.status(), response.into_body())),
            }
        }
        Err(ProbeError::Redirections)
    }

    /// `grpc.health.v1.Health/Check`.
    async fn health(&self, port: u16, service: &str) -> Result<Answer, ProbeError> {
        let stream = self.open(port).await?;
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await?;
        let connection = tokio::spawn(connection);
        let request = Request::post(format!(
            "http://{}/grpc.health.v1.Health/Check",
            SocketAddr::new(self.ip, port)
        ))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Full::new(health_request(service)))?;
        let answered = async {
            let body = sender.send_request(request).await?.into_body();
            let body = Limited::new(body, LARGEST_ANSWER).collect().await;
            Ok(body.map_err(ProbeError::Body)?.to_bytes())
        };
        let body: Result<Bytes, ProbeError> = answered.await;
        connection.abort();
        match is_serving(&body?) {
            true => Ok(Answer::text("")),
            false => Err(ProbeError::NotServing),
        }
    }
}

/// `grpc.health.v1.HealthCheckRequest` (the gRPC health checking protocol).
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// The value of `ServingStatus` for a service that takes calls.
const SERVING: i32 = 1;
/// gRPC puts one byte for compression and four for the length before each message.
const GRPC_PREFIX: usize = 5;

/// The request behind gRPC's prefix, not compressed.
fn health_request(service: &str) -> Bytes {
    let message = HealthCheckRequest {
        service: service.to_owned(),
    };
    let mut body = vec![0];
    body.extend((message.encoded_len() as u32).to_be_bytes());
    body.extend(message.encode_to_vec());
    body.into()
}

fn is_serving(answer: &[u8]) -> bool {
    let message = answer.get(GRPC_PREFIX..);
    let answer = message.and_then(|message| HealthCheckResponse::decode(message).ok());
    answer.is_some_and(|answer| answer.status == SERVING)
}

async fn exchange<S>(
    stream: S,
    request: Request<Empty<Bytes>>,
) -> Result<Response<String>, ProbeError>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::task::spawn_local(connection);
    let response = sender.send_request(request).await;
    let read = async {
        let (head, mut body) = response?.into_parts();
        let mut text = Vec::new();
        // What is longer is cut off, which is no failure.
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                text.extend_from_slice(&data);
            }
            if text.len() >= LARGEST_ANSWER {
                text.truncate(LARGEST_ANSWER);
                break;
            }
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        Ok(Response::from_parts(head, text))
    };
    let answer = read.await;
    connection.abort();
    answer
}

/// Where a redirection leads, if it stays with this application: by the path alone, or by the host that was asked for.
fn within(response: &Response<String>, asked: &HeaderMap) -> Option<String> {
    let followed = [301, 302, 303, 307, 308].contains(&response.status().as_u16());
    let location: Uri = response
        .headers()
        .get(header::LOCATION)
        .filter(|_| followed)?
        .to_str()
        .ok()?
        .parse()
        .ok()?;
    let same = match location.authority() {
        None => true,
        Some(to) => asked
            .get(header::HOST)
            .is_some_and(|host| host == to.as_str()),
    };
    let path = location.path_and_query()?.as_str();
    (same && path.starts_with('/')).then(|| path.to_owned())
}

/// TLS that asks nobody who they are, as the kubelet's (Kubernetes: "the kubelet skips the certificate verification").
fn tls() -> Result<Arc<rustls::ClientConfig>, rustls::Error> {
    static CONFIG: LazyLock<Result<Arc<rustls::ClientConfig>, rustls::Error>> =
        LazyLock::new(|| {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let anyone = mesh_identity::verify::any_server(&provider, None);
            let config = rustls::ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .dangerous()
                .with_custom_certificate_verifier(anyone)
                .with_no_client_auth();
            Ok(Arc::new(config))
        });
    CONFIG.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_injector_writes_is_read() {
        let text = r#"{"/app-health/a/livez":{"httpGet":{"path":"x","port":8443,"scheme":"HTTPS","httpHeaders":[{"name":"host","value":"h"}]},"timeoutSeconds":3},
            "/app-health/a/readyz":{"tcpSocket":{"port":9000}},"/app-health/a/startupz":{"grpc":{"port":1,"service":"s"},"timeoutSeconds":0}}"#;
        let probes = parse(text).expect("probes");
        let http = Action::Http {
            port: 8443,
            path: "/x".to_owned(),
            secure: true,
            host: Some("h".to_owned()),
        };
        let expected = [
            (http, 3),
            (Action::Tcp { port: 9000 }, 1),
            (
                Action::Grpc {
                    port: 1,
                    service: "s".to_owned(),
                },
                1,
            ),
        ]
        .map(|(action, seconds)| AppProbe {
            action,
            timeout: Duration::from_secs(seconds),
        });
        assert_eq!(probes.into_values().collect::<Vec<_>>(), expected);
        for (wrong, named) in [
            ("[]", "JSON map"),
            (r#"{"/a":{"exec":{}}}"#, "/a"),
            (r#"{"/a":{"tcpSocket":{"port":70000}}}"#, "70000"),
        ] {
            let error = parse(wrong).expect_err(wrong);
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn only_redirections_within_the_application_are_followed() {
        let redirection = |status: u16, to: &str| {
            Response::builder()
                .status(status)
                .header(header::LOCATION, to)
                .body(String::new())
                .expect("a response")
        };
        let asked = HeaderMap::from_iter([(header::HOST, HeaderValue::from_static("10.0.0.1:80"))]);
        for (status, to, followed) in [
            (302, "/other?a=b", Some("/other?a=b")),
            (308, "http://10.0.0.1:80/other", Some("/other")),
            (302, "http://example.org/", None),
            (200, "/other", None),
            (304, "/other", None),
        ] {
            let next = within(&redirection(status, to), &asked);
            assert_eq!(next.as_deref(), followed, "{status} {to}");
        }
    }
}
