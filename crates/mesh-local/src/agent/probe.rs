//! Probes and lifecycle hooks: HTTP, TCP, gRPC and commands, from the node's namespace to the pod's address.
//!
//! Faster than the kubelet at the start: until a probe has succeeded once it is tried after 25, 50, 100, 100 ms ..., after some seconds less
//! and less often, up to `periodSeconds`.
//! Only failures that are a whole period apart count towards `failureThreshold`, so that nothing is killed sooner than on Kubernetes.

mod tls;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::{
    Container, ExecAction, GRPCAction, HTTPGetAction, Probe, TCPSocketAction,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_apiserver::node::Duplex;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::process::Target;

/// The first pause after a failure of a probe that has not succeeded yet.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
/// The longest pause in the first seconds: most programs come up then, and others wait for them.
const SHORT_PAUSE: Duration = Duration::from_millis(100);
const FIRST_SECONDS: Duration = Duration::from_secs(3);
/// What of an answer is read.
const MAX_ANSWER: usize = 10 << 10;

/// Which probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `startupProbe`
    Startup,
    /// `readinessProbe`
    Readiness,
    /// `livenessProbe`
    Liveness,
}

impl Kind {
    /// The word that stands in Events.
    pub fn word(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
        }
    }
}

/// What a probe found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It passes now.
    Passing,
    /// One failure that counts; for the Event.
    Unhealthy(String),
    /// The failure threshold is reached; for the Event, and the probe's own grace period in seconds for the container to end, if it has one.
    Failing(String, Option<i64>),
}

/// Runs the probes of a started container until the task is aborted; verdicts go to `out`.
pub async fn run_all(container: Container, target: Target, out: mpsc::Sender<(Kind, Verdict)>) {
    if let Some(probe) = &container.startup_probe {
        run(Kind::Startup, probe, &container, &target, &out).await;
    }
    let readiness = async {
        if let Some(probe) = &container.readiness_probe {
            run(Kind::Readiness, probe, &container, &target, &out).await;
        }
    };
    let liveness = async {
        if let Some(probe) = &container.liveness_probe {
            run(Kind::Liveness, probe, &container, &target, &out).await;
        }
    };
    tokio::join!(readiness, liveness);
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default))
}

async fn run(
    kind: Kind,
    probe: &Probe,
    container: &Container,
    target: &Target,
    out: &mpsc::Sender<(Kind, Verdict)>,
) {
    let period = seconds(probe.period_seconds, 10).max(Duration::from_secs(1));
    let limit = seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1));
    let (needed, allowed) = (
        probe.success_threshold.unwrap_or(1).max(1),
        probe.failure_threshold.unwrap_or(3).max(1),
    );
    let (mut successes, mut failures, mut pause) = (0, 0, FIRST_PAUSE);
    let (mut passed_once, mut counted) = (false, None::<Instant>);
    tokio::time::sleep(seconds(probe.initial_delay_seconds, 0)).await;
    let began = Instant::now();
    loop {
        let result = check(probe, container, target, limit).await;
        let verdict = match result {
            Ok(()) => {
                (successes, failures, counted) = (successes + 1, 0, None);
                (successes == needed).then_some(Verdict::Passing)
            }
            Err(message) => {
                successes = 0;
                let due = counted.is_none_or(|at| at.elapsed() + FIRST_PAUSE >= period);
                if due {
                    counted = Some(Instant::now());
                    failures += 1;
                }
                // The very first failure of a program that has not come up yet is no news.
                match (due, failures >= allowed) {
                    (true, true) => Some(Verdict::Failing(
                        message,
                        probe.termination_grace_period_seconds,
                    )),
                    (true, false) if passed_once || failures > 1 => {
                        Some(Verdict::Unhealthy(message))
                    }
                    _ => None,
                }
            }
        };
        let passing = verdict == Some(Verdict::Passing);
        if let Some(verdict) = verdict
            && out.send((kind, verdict)).await.is_err()
        {
            return;
        }
        if passing && kind == Kind::Startup {
            return;
        }
        passed_once |= passing;
        let wait = if passed_once || pause >= period {
            period
        } else {
            pause
        };
        let longest = if began.elapsed() < FIRST_SECONDS {
            SHORT_PAUSE
        } else {
            period
        };
        pause = (pause * 2).min(longest);
        tokio::time::sleep(wait).await;
    }
}

/// One attempt.
async fn check(
    probe: &Probe,
    container: &Container,
    target: &Target,
    limit: Duration,
) -> Result<(), String> {
    if let Some(exec) = &probe.exec {
        return run_exec(exec, target, limit).await;
    }
    let network = async {
        if let Some(get) = &probe.http_get {
            return http_get(get, container, target).await;
        }
        if let Some(tcp) = &probe.tcp_socket {
            return tcp_connect(tcp, container, target).await;
        }
        match &probe.grpc {
            Some(grpc) => grpc_health(grpc, target).await,
            None => Ok(()),
        }
    };
    tokio::time::timeout(limit, network)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} s", limit.as_secs())))
}

/// Runs the command of a probe or hook; a code other than 0 is an error with the output.
pub async fn run_exec(exec: &ExecAction, target: &Target, limit: Duration) -> Result<(), String> {
    match target
        .run(exec.command.clone().unwrap_or_default(), limit)
        .await?
    {
        (0, _) => Ok(()),
        (code, output) => Err(format!(
            "command ended with exit code {code}: {}",
            output.trim()
        )),
    }
}

fn resolve(
    host: Option<&str>,
    port: &IntOrString,
    container: &Container,
    target: &Target,
) -> Result<SocketAddr, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let named = container
                .ports
                .iter()
                .flatten()
                .find(|p| p.name.as_deref() == Some(name))
                .map(|p| p.container_port);
            named.or_else(|| name.parse().ok())
        }
    };
    let port = number
        .and_then(|n| u16::try_from(n).ok())
        .ok_or_else(|| format!("the container has no port {port:?}"))?;
    let ip = match host.filter(|h| !h.is_empty()) {
        Some(host) => host
            .parse()
            .map_err(|_| format!("host \"{host}\" of the probe is not an address"))?,
        None => target.sandbox.ip.into(),
    };
    Ok(SocketAddr::new(ip, port))
}

async fn tcp_connect(
    tcp: &TCPSocketAction,
    container: &Container,
    target: &Target,
) -> Result<(), String> {
    let address = resolve(tcp.host.as_deref(), &tcp.port, container, target)?;
    TcpStream::connect(address)
        .await
        .map(drop)
        .map_err(|e| format!("dial tcp {address}: {e}"))
}

/// GETs the action's URL; a status from 200 to 399 is success (Kubernetes, "Define a liveness HTTP request").
pub async fn http_get(
    get: &HTTPGetAction,
    container: &Container,
    target: &Target,
) -> Result<(), String> {
    let address = resolve(get.host.as_deref(), &get.port, container, target)?;
    let secure = get
        .scheme
        .as_deref()
        .is_some_and(|s| s.eq_ignore_ascii_case("https"));
    let base = format!("{}://{address}", if secure { "https" } else { "http" });
    let failed = |error: String| format!("Get \"{base}\": {error}");
    let stream = TcpStream::connect(address)
        .await
        .map_err(|e| failed(e.to_string()))?;
    let stream: Box<dyn Duplex> = if secure {
        let secured = tls::connect(stream, address.ip()).await;
        Box::new(secured.map_err(failed)?)
    } else {
        Box::new(stream)
    };
    get_over(stream, get, address, &base).await
}

async fn get_over(
    stream: Box<dyn Duplex>,
    get: &HTTPGetAction,
    address: SocketAddr,
    base: &str,
) -> Result<(), String> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
            .await
            .map_err(|e| e.to_string())?;
    let connection = tokio::spawn(connection);
    let path = get.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
    let path = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    };
    let mut request = http::Request::get(&path)
        .header("user-agent", "kube-probe/1.36")
        .header("accept", "*/*")
        .header("connection", "close");
    let headers = get.http_headers.as_deref().unwrap_or_default();
    if !headers.iter().any(|h| h.name.eq_ignore_ascii_case("host")) {
        request = request.header("host", address.to_string());
    }
    for header in headers {
        request = request.header(&header.name, &header.value);
    }
    let request = request
        .body(Empty::new())
        .map_err(|e| format!("the probe's request can't be made: {e}"))?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(|e| format!("Get \"{base}{path}\": {e}"));
    let result = match answer {
        Ok(answer) if (200..400).contains(&answer.status().as_u16()) => Ok(()),
        Ok(answer) => {
            let status = answer.status().as_u16();
            let body = Limited::new(answer.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map(|b| b.to_bytes())
                .unwrap_or_default();
            let text = String::from_utf8_lossy(&body);
            Err(format!(
                "HTTP probe failed with statuscode: {status} {}",
                text.chars().take(200).collect::<String>()
            )
            .trim()
            .to_owned())
        }
        Err(error) => Err(error),
    };
    connection.abort();
    result
}

/// grpc.health.v1.Health/Check over plain HTTP/2, the two small messages made by hand.
async fn grpc_health(grpc: &GRPCAction, target: &Target) -> Result<(), String> {
    let port = u16::try_from(grpc.port).map_err(|_| format!("{} is not a port", grpc.port))?;
    let address = SocketAddr::new(target.sandbox.ip.into(), port);
    let stream = TcpStream::connect(address)
        .await
        .map_err(|e| format!("dial tcp {address}: {e}"))?;
    let handshake =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|e| e.to_string())?;
    let connection = tokio::spawn(connection);
    // HealthCheckRequest { string service = 1 }, behind the gRPC prefix (not compressed, length).
    let service = grpc.service.as_deref().unwrap_or_default().as_bytes();
    let service = &service[..service.len().min(127)];
    let mut message = Vec::new();
    if !service.is_empty() {
        message.extend([0x0a, service.len() as u8]);
        message.extend(service);
    }
    let mut body = vec![0, 0, 0, 0, message.len() as u8];
    body.extend(message);
    let request = http::Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| e.to_string())?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(|e| format!("health check of {address}: {e}"));
    let result = match answer {
        Ok(answer) => {
            let body = Limited::new(answer.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map(|b| b.to_bytes())
                .unwrap_or_default();
            // HealthCheckResponse { ServingStatus status = 1 }, SERVING = 1.
            if body.get(5..).is_some_and(|m| m.starts_with(&[0x08, 0x01])) {
                Ok(())
            } else {
                Err(format!("{address} is not serving"))
            }
        }
        Err(error) => Err(error),
    };
    connection.abort();
    result
}
