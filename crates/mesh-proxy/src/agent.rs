//! The agent's ports: readiness, health, metrics (with the application's own), probes of the application, the end of the process.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header::HOST};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use mesh_telemetry::istio::{CONTENT_TYPE, expose};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::filter::stats;
use crate::serve::Answer;
use crate::shared::Shared;

pub(crate) mod probes;

/// The application gets this long to answer a scrape.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer of an application that is passed on, in bytes.
const LARGEST_SCRAPE: usize = 16 << 20;

/// What the agent's log lines are filed under: their level is Istio's `--log_output_level`, whereas that of the data plane is
/// `--proxyLogLevel`, by default `warning`.
pub(crate) const AGENT: &str = "agent";
/// How often is looked whether a proxy that starts has become ready.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often a proxy says why it is not.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// The last line of OpenMetrics.
const END: &str = "# EOF\n";

/// `/healthz/ready` (also for the health port).
pub fn ready(shared: &Shared) -> Answer {
    match shared.is_ready() {
        true => Answer::status(StatusCode::OK, ""),
        false => Answer::status(StatusCode::SERVICE_UNAVAILABLE, not_ready(shared)),
    }
}

fn not_ready(shared: &Shared) -> String {
    use std::sync::atomic::Ordering::Acquire;
    let reason = match () {
        () if shared.is_leaving() => "draining",
        () if shared.failing.load(Acquire) => "health was failed by POST /healthcheck/fail",
        () if !shared.configured.load(Acquire) => {
            "no configuration yet: waiting for the control plane"
        }
        () if !shared.identified.load(Acquire) => {
            "no valid certificate: waiting for the certificate authority"
        }
        () if !shared.knows_names() => "no table of names yet: waiting for the control plane",
        () => "listeners are not open yet",
    };
    format!("not ready: {reason}\n")
}

/// Says when the proxy is ready for the first time, and until then what it waits for.
pub async fn tell_when_ready(shared: Arc<Shared>) {
    let started = Instant::now();
    let mut told = started;
    while !shared.is_ready() {
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let reason = not_ready(&shared);
            tracing::warn!(target: AGENT, "{}", reason.trim_end());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    tracing::info!(target: AGENT, after = ?started.elapsed(), "ready");
}

/// Our own metrics.
pub fn metrics(shared: &Shared) -> Answer {
    Answer {
        content_type: CONTENT_TYPE,
        ..Answer::text(exposed(shared))
    }
}

/// The registry's metrics and the statistics of filters.
fn exposed(shared: &Shared) -> String {
    let mut text = expose(&shared.registry);
    text.truncate(text.strip_suffix(END).map_or(text.len(), str::len));
    stats::expose(&shared.counters.stats.values(), &mut text);
    text.push_str(END);
    text
}

/// The health port.
pub async fn health(shared: Arc<Shared>, request: Request<Incoming>) -> Answer {
    match request.uri().path() {
        "/healthz/ready" => ready(&shared),
        _ => Answer::status(StatusCode::NOT_FOUND, ""),
    }
}

/// The metrics port.
pub async fn prometheus(shared: Arc<Shared>, request: Request<Incoming>) -> Answer {
    match request.uri().path() {
        "/stats/prometheus" | "/metrics" => metrics(&shared),
        _ => Answer::status(StatusCode::NOT_FOUND, ""),
    }
}

/// The agent's port.
pub async fn agent(
    shared: Arc<Shared>,
    quit: watch::Sender<bool>,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Answer {
    match (request.method(), request.uri().path()) {
        (_, "/healthz/ready") => ready(&shared),
        (_, "/stats/prometheus" | "/metrics") => merged(&shared).await,
        (&Method::POST, "/quitquitquit") if peer.ip().is_loopback() => {
            quit.send_replace(true);
            Answer::text("OK\n")
        }
        (&Method::POST, "/drain") if peer.ip().is_loopback() => {
            shared.drain_ahead();
            tracing::info!(target: AGENT, "asked to drain: the end of the pod is near");
            Answer::text("OK\n")
        }
        (&Method::POST, "/quitquitquit" | "/drain") => {
            Answer::status(StatusCode::FORBIDDEN, "only from this pod\n")
        }
        (_, "/quitquitquit" | "/drain") => {
            Answer::status(StatusCode::METHOD_NOT_ALLOWED, "use POST\n")
        }
        (_, "/debug/ndsz") if !peer.ip().is_loopback() => {
            Answer::status(StatusCode::FORBIDDEN, "only from this pod\n")
        }
        (_, "/debug/ndsz") => match crate::dns::table(&shared) {
            Some(table) => Answer::json(&table),
            None => Answer::status(StatusCode::NOT_FOUND, "{}"),
        },
        (_, path) => match shared.options.app_probes.get(path) {
            Some(probe) => probes::answer(&shared, probe, &request).await,
            None => Answer::status(StatusCode::NOT_FOUND, ""),
        },
    }
}

/// Ours and the application's metrics in one text, as Istio's metrics merging does.
async fn merged(shared: &Shared) -> Answer {
    let Some((port, path)) = &shared.options.app_metrics else {
        return metrics(shared);
    };
    let scraped = tokio::time::timeout(SCRAPE_TIMEOUT, scrape(*port, path)).await;
    let theirs = match scraped {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => {
            tracing::warn!(port, path, %error, "scraping the application's metrics");
            return metrics(shared);
        }
        Err(_) => {
            tracing::warn!(port, path, "the application's metrics took too long");
            return metrics(shared);
        }
    };
    // OpenMetrics ends with a marker; what comes together of two sources is in the older format.
    let ours = exposed(shared);
    let ours = ours.strip_suffix(END).unwrap_or(&ours);
    let theirs = theirs.strip_suffix(END).unwrap_or(&theirs);
    Answer {
        content_type: "text/plain; version=0.0.4; charset=utf-8",
        ..Answer::text(format!("{ours}{theirs}"))
    }
}

/// Why a scrape failed.
#[derive(Debug, thiserror::Error)]
enum ScrapeError {
    #[error("connecting: {0}")]
    Connect(#[from] std::io::Error),
    #[error("request: {0}")]
    Request(#[from] http::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("body: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("status {0}")]
    Status(StatusCode),
}

async fn scrape(port: u16, path: &str) -> Result<String, ScrapeError> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    let request = Request::get(path)
        .header(HOST, "localhost")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    if !response.status().is_success() {
        return Err(ScrapeError::Status(response.status()));
    }
    let body = Limited::new(response.into_body(), LARGEST_SCRAPE)
        .collect()
        .await
        .map_err(ScrapeError::Body)?;
    Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
}
