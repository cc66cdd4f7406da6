//! What all servers of this crate share: their runtime, listening, access lines, stopping.

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum::Router;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{FromRequestParts, Request};
use axum::middleware::Next;
use axum::response::Response;
use axum::serve::IncomingStream;
use http::header::CONNECTION;
use http::request::Parts;
use http::{HeaderValue, Version};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

/// How often a server that was told to stop looks for requests.
const LOOK: Duration = Duration::from_millis(50);
/// A pod is told to end at the same moment as those who call it, so requests still come: a server goes on for so many looks at least,
const LINGER: u32 = 10;
/// one that is in use until so many in a row have found nothing (looks and no time, as a machine that stands still brings no requests),
const QUIET: u32 = 30;
/// but no longer than so many.
const MOST_LINGER: u32 = 200;
/// A server is in use if a request came so short a time before.
const RECENT: Duration = Duration::from_secs(5);

static STOPPING: AtomicBool = AtomicBool::new(false);
static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);
/// When the last request came, in milliseconds after [`STARTED`]; 0 before there was one.
static LAST_REQUEST: AtomicU64 = AtomicU64::new(0);

/// Address of the client of a connection, as handlers see it (port 0 where a router runs without a listener).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) SocketAddr);

impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let unknown = SocketAddr::from(([127, 0, 0, 1], 0));
        Ok(parts
            .extensions
            .get::<ConnectInfo<Peer>>()
            .map_or(Peer(unknown), |info| info.0))
    }
}

impl Connected<IncomingStream<'_, Listener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Self {
        Peer(*stream.remote_addr())
    }
}

/// A TCP listener whose connections send small answers at once.
struct Listener(TcpListener);

impl axum::serve::Listener for Listener {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.0.accept().await {
                Ok((stream, peer)) => {
                    // Best effort: a connection that is gone already shows that on its first read.
                    let _ = stream.set_nodelay(true);
                    // An IPv4 client on a dual-stack socket is reported as the address that it has.
                    return (
                        stream,
                        SocketAddr::new(peer.ip().to_canonical(), peer.port()),
                    );
                }
                // Out of file descriptors or a connection that died in the queue: neither may end the server, and the
                // first must not spin.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Runs `work` on a single-threaded runtime: a sample is one small process among many on the machine.
pub(crate) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the sample's runtime")?;
    runtime.block_on(work)
}

/// Serves `router` on `port` of all addresses until SIGTERM or SIGINT and a moment longer ([`linger`]), then finishes the requests that are
/// under way.
pub(crate) async fn serve(name: &str, port: u16, router: Router) -> anyhow::Result<()> {
    let stop = stop_signal()?;
    let listener = listen(port).await?;
    say(&format!("{name} listens on port {port}"));
    let end = async {
        stop.await;
        linger().await;
    };
    serve_on(listener, router, end).await
}

/// Takes note of a request, for [`linger`].
pub(crate) fn note_request() {
    let now = u64::try_from(STARTED.elapsed().as_millis()).unwrap_or(u64::MAX);
    LAST_REQUEST.store(now.max(1), Ordering::Relaxed);
}

/// To be waited for between the signal to stop and the end of listening: until those who call have heard that the pod goes.
pub(crate) async fn linger() {
    STOPPING.store(true, Ordering::Relaxed);
    let mut last = LAST_REQUEST.load(Ordering::Relaxed);
    let in_use = last > 0 && STARTED.elapsed() < Duration::from_millis(last) + RECENT;
    let mut quiet = 0;
    for look in 1..=MOST_LINGER {
        tokio::time::sleep(LOOK).await;
        let newest = LAST_REQUEST.load(Ordering::Relaxed);
        quiet = if newest == last { quiet + 1 } else { 0 };
        last = newest;
        if look >= LINGER && (quiet >= QUIET || !in_use && quiet >= LINGER) {
            return;
        }
    }
}

/// Tells the client of a response in the last moments that this connection ends with it (HTTP/2 has its own way).
pub(crate) fn say_goodbye<B>(version: Version, response: &mut http::Response<B>) {
    if version < Version::HTTP_2 && STOPPING.load(Ordering::Relaxed) {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
}

/// As [`serve`], on a listener that is there already, until `stop` completes.
pub(crate) async fn serve_on(
    listener: TcpListener,
    router: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let router = router.layer(axum::middleware::from_fn(access_line));
    axum::serve(
        Listener(listener),
        router.into_make_service_with_connect_info::<Peer>(),
    )
    .with_graceful_shutdown(stop)
    .await
    .context("serving HTTP")
}

/// Listens on all addresses of both families, or of IPv4 alone where there is no IPv6.
pub(crate) async fn listen(port: u16) -> anyhow::Result<TcpListener> {
    match TcpListener::bind(("::", port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(("0.0.0.0", port))
            .await
            .with_context(|| format!("listening on port {port}; another process may hold it")),
    }
}

/// Completes at the first SIGTERM or SIGINT. Handlers are set before this returns: a container's first process has no
/// default action for these signals.
pub(crate) fn stop_signal() -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate =
        signal(SignalKind::terminate()).context("setting the handler of SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("setting the handler of SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Writes one line to standard output; a log that nobody reads any more is no reason to end.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
}

async fn access_line(peer: Peer, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let (method, uri, version) = (
        request.method().clone(),
        request.uri().clone(),
        request.version(),
    );
    if uri.path() != "/health" {
        note_request();
    }
    let mut response = next.run(request).await;
    say_goodbye(version, &mut response);
    // Probes come every few seconds and would bury what people look for.
    if uri.path() != "/health" {
        say(&format!(
            "{} \"{method} {uri} {version:?}\" {} {:.1}ms",
            peer.0.ip(),
            response.status().as_u16(),
            started.elapsed().as_secs_f64() * 1000.0
        ));
    }
    response
}

/// The one option of samples that listen on one port.
#[derive(clap::Parser)]
#[command(no_binary_name = true)]
pub(crate) struct PortArgs {
    /// Port to listen on instead of the usual one.
    #[arg(long)]
    port: Option<u16>,
    /// Port as a bare argument, as the field's own programs take it.
    #[arg(value_name = "PORT", conflicts_with = "port")]
    bare_port: Option<u16>,
}

impl PortArgs {
    /// The port that `args` ask for, else `default`.
    pub(crate) fn port(args: &[String], default: u16) -> anyhow::Result<u16> {
        let parsed = <Self as clap::Parser>::try_parse_from(args)?;
        Ok(parsed.port.or(parsed.bare_port).unwrap_or(default))
    }
}

/// The environment variable `name`, unless it is unset or empty.
pub(crate) fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Flags with values, `-name value` or `--name=value`, as programs written in Go take them.
pub(crate) fn flags(args: &[String]) -> anyhow::Result<Vec<(&str, &str)>> {
    let mut flags = Vec::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let name = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'));
        let name = name.with_context(|| format!("{arg:?} is not a flag (-name value)"))?;
        let pair = match name.split_once('=') {
            Some(pair) => pair,
            None => {
                let value = rest.next();
                (
                    name,
                    value
                        .with_context(|| format!("-{name} has no value"))?
                        .as_str(),
                )
            }
        };
        flags.push(pair);
    }
    Ok(flags)
}

/// The pod's name, as applications learn it.
pub(crate) fn hostname() -> String {
    env("HOSTNAME")
        .or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok())
        .map_or_else(|| "unknown".into(), |name| name.trim().to_owned())
}
