//! The admin interface on 127.0.0.1:15000, in the form of Envoy's.

mod clusters;
mod dump;
mod secrets;
mod stats;
mod time;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::header::{HOST, ORIGIN};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use mesh_routing::listener::Direction;
use serde_json::json;
use tokio::sync::{oneshot, watch};

use crate::agent;
use crate::serve::Answer;
use crate::shared::Shared;

/// Path, whether it changes something, and what it is for; the index is made from it.
const PAGES: &[(&str, bool, &str)] = &[
    ("/", false, "this list"),
    ("/certs", false, "certificates in use"),
    ("/clusters", false, "clusters and endpoints (?format=json)"),
    (
        "/config_dump",
        false,
        "all resources in force as JSON (?include_eds)",
    ),
    (
        "/drain_listeners",
        true,
        "close listeners and report not ready (?inboundonly; ?graceful ends connections first, for the drain time; ?skip_exit)",
    ),
    ("/healthcheck/fail", true, "report not ready"),
    ("/healthcheck/ok", true, "report ready again"),
    ("/listeners", false, "listeners (?format=json)"),
    (
        "/logging",
        true,
        "the log filter; ?level=debug or ?filter=mesh_proxy=debug,info changes it",
    ),
    ("/quitquitquit", true, "end the process"),
    ("/ready", false, "readiness"),
    ("/server_info", false, "version, state, node"),
    (
        "/stats",
        false,
        "counters (?filter=REGEX, ?usedonly, ?format=json|prometheus)",
    ),
    (
        "/stats/prometheus",
        false,
        "counters in Prometheus' text format",
    ),
];

/// Answers a request.
pub async fn handle(
    shared: Arc<Shared>,
    quit: watch::Sender<bool>,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Answer {
    if let Err(refusal) = guard(&request, peer) {
        return refusal;
    }
    let path = request.uri().path();
    let query = request.uri().query().unwrap_or("");
    let Some((_, changes, _)) = PAGES.iter().find(|(page, ..)| *page == path) else {
        return Answer::status(
            StatusCode::NOT_FOUND,
            format!("invalid path {path}. The paths are:\n{}", index()),
        );
    };
    if *changes && request.method() != Method::POST {
        return Answer::status(
            StatusCode::METHOD_NOT_ALLOWED,
            format!("{path} changes something: use POST\n"),
        );
    }
    match path {
        "/config_dump" => config_dump(shared, parameter(query, "include_eds").is_some()).await,
        "/drain_listeners" => drain_listeners(&shared, query),
        _ => page(&shared, &quit, path, query),
    }
}

/// Envoy's drain: listeners are closed at once and connections left alone; with `graceful` connections are asked to end, and listeners are
/// closed when the drain time is over, or not at all (`skip_exit`). A second graceful drain changes nothing.
fn drain_listeners(shared: &Arc<Shared>, query: &str) -> Answer {
    let asks = |name| parameter(query, name).is_some();
    let inbound_only = asks("inboundonly");
    if !asks("graceful") {
        if asks("skip_exit") {
            let text = "skip_exit needs graceful: POST /drain_listeners?graceful&skip_exit\n";
            return Answer::status(StatusCode::BAD_REQUEST, text);
        }
        shared.stop_listeners(inbound_only);
        return Answer::text("OK\n");
    }
    let under_way = match inbound_only {
        true => shared.is_draining(Direction::Inbound),
        false => shared.is_draining(Direction::Outbound),
    };
    if under_way {
        return Answer::text("OK\n");
    }
    match inbound_only {
        true => shared.drain_inbound(),
        false => shared.drain(),
    }
    if !asks("skip_exit") {
        let shared = shared.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep(shared.options.drain).await;
            shared.stop_listeners(inbound_only);
        });
    }
    Answer::text("OK\n")
}

/// On a thread of its own: what it needs (the descriptors of all messages above all) goes back to the system when that ends.
async fn config_dump(shared: Arc<Shared>, with_endpoints: bool) -> Answer {
    let (tell, told) = oneshot::channel();
    let thread = std::thread::Builder::new().name("config-dump".to_owned());
    let started = thread.spawn(move || {
        let answer = match dump::config(&shared, with_endpoints) {
            Ok(value) => Answer::json(&value),
            Err(error) => failed(&error),
        };
        // Who asked may have gone.
        let _ = tell.send(answer);
    });
    match started {
        Ok(_) => told.await.unwrap_or_else(|error| failed(&error)),
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::error::Error) -> Answer {
    Answer::status(
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("writing the configuration as JSON: {error}\n"),
    )
}

fn page(shared: &Shared, quit: &watch::Sender<bool>, path: &str, query: &str) -> Answer {
    let json_wanted = parameter(query, "format") == Some("json");
    match path {
        "/certs" => Answer::json(&secrets::certificates(shared)),
        "/clusters" if json_wanted => Answer::json(&clusters::json(shared)),
        "/clusters" => Answer::text(clusters::text(shared)),
        "/listeners" if json_wanted => Answer::json(&dump::listeners_json(shared)),
        "/listeners" => Answer::text(dump::listeners_text(shared)),
        "/healthcheck/fail" => set(&shared.failing, true),
        "/healthcheck/ok" => set(&shared.failing, false),
        "/quitquitquit" => {
            quit.send_replace(true);
            Answer::text("OK\n")
        }
        "/logging" => logging(query),
        "/ready" => match shared.is_ready() {
            true => Answer::text("LIVE\n"),
            false => Answer::status(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{}\n", state(shared)),
            ),
        },
        "/server_info" => Answer::json(&server_info(shared)),
        "/stats" if parameter(query, "format") == Some("prometheus") => agent::metrics(shared),
        "/stats" => stats::answer(
            shared,
            parameter(query, "filter"),
            query
                .split('&')
                .any(|pair| pair.split('=').next() == Some("usedonly")),
            json_wanted,
        ),
        "/stats/prometheus" => agent::metrics(shared),
        _ => Answer::text(index()),
    }
}

/// Only programs of this machine may ask, and no page of a browser: the name in `Host` must be this machine's (DNS rebinding), and where a
/// page asks, it must be ours.
fn guard(request: &Request<Incoming>, peer: SocketAddr) -> Result<(), Answer> {
    let refuse = |why: &str| Err(Answer::status(StatusCode::FORBIDDEN, format!("{why}\n")));
    if !peer.ip().is_loopback() {
        return refuse("the admin interface is for this machine only");
    }
    let text = |name| {
        request
            .headers()
            .get(name)
            .and_then(|v: &http::HeaderValue| v.to_str().ok())
    };
    if !text(HOST).is_some_and(is_local) {
        return refuse("the Host header must name this machine (localhost, 127.0.0.1 or [::1])");
    }
    match text(ORIGIN) {
        Some(origin) if !origin.strip_prefix("http://").is_some_and(is_local) => {
            refuse("pages of other sites may not ask")
        }
        _ => Ok(()),
    }
}

fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    ["localhost", "127.0.0.1", "[::1]"]
        .iter()
        .any(|local| name.eq_ignore_ascii_case(local))
}

fn index() -> String {
    let mut text = String::new();
    for (path, changes, purpose) in PAGES {
        let method = if *changes { "POST" } else { "GET" };
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "{method:4} {path:20} {purpose}");
    }
    text
}

fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

fn set(flag: &std::sync::atomic::AtomicBool, value: bool) -> Answer {
    flag.store(value, Ordering::Release);
    Answer::text("OK\n")
}

fn logging(query: &str) -> Answer {
    let wanted = parameter(query, "filter").or(parameter(query, "level"));
    let done = wanted.map_or(Ok(()), |filter| {
        mesh_telemetry::log::set_filter(&filter.replace("%3D", "=").replace("%2C", ","))
    });
    match done {
        Ok(()) => Answer::text(format!(
            "active filter: {}\n",
            mesh_telemetry::log::filter()
        )),
        Err(error) => Answer::status(StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

fn state(shared: &Shared) -> &'static str {
    match () {
        () if shared.is_leaving() => "DRAINING",
        () if shared.is_ready() => "LIVE",
        () if shared.configured.load(Ordering::Acquire) => "INITIALIZING",
        () => "PRE_INITIALIZING",
    }
}

fn server_info(shared: &Shared) -> serde_json::Value {
    let uptime = format!("{}s", shared.started.elapsed().as_secs());
    json!({
        "version": format!("mesh/{}", env!("CARGO_PKG_VERSION")),
        "state": state(shared),
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "command_line_options": { "concurrency": shared.options.concurrency },
        "node": {
            "id": shared.options.node_id(),
            "cluster": shared.identity.node.cluster,
            "metadata": shared.options.metadata,
        },
    })
}
