//! `fortio load`: a number of connections, each with one request at a time, at a rate or as fast as it goes; then the report.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Uri, Version};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::options::Options;
use super::ping;
use crate::serve;

/// What calls came to.
#[derive(Default)]
struct Results {
    /// Calls by status code; -1 where there was no answer, as Fortio counts it.
    codes: BTreeMap<i32, u64>,
    /// Milliseconds of each call.
    millis: Vec<f64>,
    /// Connections opened.
    sockets: u64,
    /// The first failures, for people.
    failures: Vec<String>,
}

/// Failures that the report shows.
const SHOWN: usize = 5;

/// Sends the load and gives the report. SIGTERM or SIGINT ends the load early, as with Fortio: what is under way is waited for and counted.
pub(super) async fn run(options: &Options) -> anyhow::Result<String> {
    let target = Target::of(options)?;
    let (stop, stopped) = watch::channel(false);
    let signal = serve::stop_signal()?;
    tokio::spawn(async move {
        signal.await;
        stop.send_replace(true);
        // Without it nobody could wait for the signal any more.
        std::future::pending::<()>().await;
    });
    let began = Instant::now();
    let workers = (0..options.connections)
        .map(|worker| connection(options, &target, worker, began, stopped.clone()));
    let mut all = Results::default();
    for results in futures::future::join_all(workers).await {
        for (code, count) in results.codes {
            *all.codes.entry(code).or_insert(0) += count;
        }
        all.millis.extend(results.millis);
        all.sockets += results.sockets;
        all.failures.extend(results.failures);
    }
    Ok(report(options, all, began.elapsed()))
}

/// `fortio curl`: one request; without `-quiet` the head as well.
pub(super) async fn curl(options: &Options) -> anyhow::Result<String> {
    let target = Target::of(options)?;
    let mut sender = Sender::open(&target).await?;
    let response = sender.send(target.request(options, 1)?).await?;
    let (head, body) = response.into_parts();
    let body = body.collect().await?.to_bytes();
    let mut text = String::new();
    if !options.quiet {
        let _ = writeln!(text, "{:?} {}", head.version, head.status);
        for (name, value) in &head.headers {
            let _ = writeln!(
                text,
                "{name}: {}",
                String::from_utf8_lossy(value.as_bytes())
            );
        }
        text.push('\n');
    }
    text.push_str(&String::from_utf8_lossy(&body));
    Ok(text)
}

/// Where requests go, and in which version.
struct Target {
    uri: Uri,
    address: String,
    http2: bool,
    grpc: bool,
}

impl Target {
    fn of(options: &Options) -> anyhow::Result<Self> {
        let text = options
            .target
            .as_deref()
            .context("a URL is missing, such as http://httpbin:8000/get")?;
        let url = if text.contains("://") {
            text.to_owned()
        } else {
            format!("http://{text}")
        };
        let mut uri: Uri = url
            .parse()
            .with_context(|| format!("{text:?} is not a URL"))?;
        if uri.scheme_str() != Some("http") {
            anyhow::bail!(
                "{text:?}: only http:// is supported; inside the mesh the proxies encrypt"
            );
        }
        let host = uri
            .host()
            .with_context(|| format!("{text:?} names no host"))?;
        let default = if options.grpc { 8079 } else { 80 };
        let address = format!("{host}:{}", uri.port_u16().unwrap_or(default));
        if options.grpc {
            let path = if options.ping {
                ping::PING
            } else {
                ping::HEALTH
            };
            uri = format!("http://{address}{path}").parse()?;
        }
        Ok(Self {
            uri,
            address,
            http2: options.http2 || options.grpc,
            grpc: options.grpc,
        })
    }

    fn request(&self, options: &Options, sequence: u64) -> anyhow::Result<Request<Full<Bytes>>> {
        let post = self.grpc || !options.payload.is_empty();
        let mut request = Request::builder().method(if post { "POST" } else { "GET" });
        let authority = self.uri.authority().map_or("", |a| a.as_str());
        request = if self.http2 {
            request.version(Version::HTTP_2).uri(self.uri.clone())
        } else {
            let path = self.uri.path_and_query().map_or("/", |p| p.as_str());
            request.uri(path).header("host", authority)
        };
        for (name, value) in &options.headers {
            request = request.header(name, value);
        }
        let body = if !self.grpc {
            Bytes::from(options.payload.clone())
        } else if options.ping {
            ping::message(sequence, &options.payload)
        } else {
            ping::framed(&[])
        };
        if self.grpc {
            request = request
                .header("content-type", "application/grpc")
                .header("te", "trailers");
        }
        request.body(Full::new(body)).context("making the request")
    }
}

/// One connection's requests.
enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn open(target: &Target) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(&target.address)
            .await
            .with_context(|| format!("connecting to {}", target.address))?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        if target.http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            Ok(Self::Http2(sender))
        } else {
            let (sender, connection) = http1::handshake(io).await?;
            tokio::spawn(connection);
            Ok(Self::Http1(sender))
        }
    }

    async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> anyhow::Result<hyper::Response<Incoming>> {
        Ok(match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
        })
    }

    /// Whether the peer said that this connection takes no more: an end that a client is told of, and no failure.
    fn ended(&self) -> bool {
        match self {
            Self::Http1(sender) => sender.is_closed(),
            Self::Http2(sender) => sender.is_closed(),
        }
    }
}

async fn connection(
    options: &Options,
    target: &Target,
    worker: usize,
    began: Instant,
    mut stopped: watch::Receiver<bool>,
) -> Results {
    let mut results = Results::default();
    let mut sender = None;
    let share = options.connections as u64;
    let calls = match options.calls {
        0 => u64::MAX,
        n => n / share + u64::from((worker as u64) < n % share),
    };
    let pause = (options.rate > 0.0)
        .then(|| Duration::from_secs_f64(options.connections as f64 / options.rate));
    for call in 0..calls {
        if let Some(pause) = pause {
            // The connections take turns; who is late catches up.
            let turn = pause.mul_f64(call as f64 + worker as f64 / options.connections as f64);
            tokio::select! {
                () = tokio::time::sleep_until((began + turn).into()) => {}
                _ = stopped.wait_for(|stopped| *stopped) => {}
            }
        }
        if *stopped.borrow() {
            break;
        }
        if options.calls == 0 && began.elapsed() >= options.duration {
            break;
        }
        let sent = Instant::now();
        let outcome = tokio::time::timeout(
            options.timeout,
            once(options, target, &mut sender, &mut results.sockets, call),
        );
        let code = match outcome.await {
            Ok(Ok(code)) => code,
            Ok(Err(error)) => {
                sender = None;
                note(&mut results.failures, format!("{error:#}"));
                -1
            }
            Err(_) => {
                sender = None;
                note(
                    &mut results.failures,
                    format!("no answer within {:?}", options.timeout),
                );
                -1
            }
        };
        results.millis.push(sent.elapsed().as_secs_f64() * 1000.0);
        *results.codes.entry(code).or_insert(0) += 1;
    }
    results
}

fn note(failures: &mut Vec<String>, failure: String) {
    if failures.len() < SHOWN {
        failures.push(failure);
    }
}

/// One call. For gRPC the code is 200 only where the status is OK.
async fn once(
    options: &Options,
    target: &Target,
    slot: &mut Option<Sender>,
    sockets: &mut u64,
    call: u64,
) -> anyhow::Result<i32> {
    if slot.as_ref().is_none_or(Sender::ended) {
        *sockets += 1;
        *slot = Some(Sender::open(target).await?);
    }
    let sender = slot.as_mut().context("there is a connection")?;
    let response = sender.send(target.request(options, call)?).await?;
    let (head, body) = response.into_parts();
    let body = body.collect().await.context("reading the body")?;
    if target.grpc && head.status == http::StatusCode::OK {
        let status = body
            .trailers()
            .and_then(|t| t.get("grpc-status"))
            .or_else(|| head.headers.get("grpc-status"));
        if status.map(|s| s.as_bytes()) != Some(b"0") {
            anyhow::bail!("the gRPC status is {status:?}");
        }
    }
    Ok(i32::from(head.status.as_u16()))
}

fn report(options: &Options, mut results: Results, took: Duration) -> String {
    let mut text = String::new();
    let calls = results.millis.len();
    results.millis.sort_by(f64::total_cmp);
    let of = |share: f64| {
        let at = (calls as f64 * share) as usize;
        results
            .millis
            .get(at.min(calls.saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    };
    for failure in results.failures.iter().take(SHOWN) {
        let _ = writeln!(text, "[W] {failure}");
    }
    for share in [50.0, 75.0, 90.0, 99.0, 99.9] {
        let _ = writeln!(text, "# target {share}% {:.6}", of(share / 100.0) / 1000.0);
    }
    let _ = writeln!(
        text,
        "Sockets used: {} (for perfect keepalive, would be {})",
        results.sockets, options.connections
    );
    for (code, count) in &results.codes {
        let percent = *count as f64 * 100.0 / calls.max(1) as f64;
        // Fortio writes gRPC results by the health status.
        let name = match (options.grpc, *code) {
            (false, code) => format!("Code {code:>3}"),
            (true, 200) => format!("{} SERVING", if options.ping { "Ping" } else { "Health" }),
            (true, _) => format!("{} ERROR", if options.ping { "Ping" } else { "Health" }),
        };
        let _ = writeln!(text, "{name} : {count} ({percent:.1} %)");
    }
    let sum: f64 = results.millis.iter().sum();
    let _ = writeln!(
        text,
        "All done {calls} calls (plus 0 warmup) {:.3} ms avg, {:.1} qps",
        sum / calls.max(1) as f64,
        calls as f64 / took.as_secs_f64().max(1e-9)
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_fortios_lines() {
        let options = Options {
            connections: 2,
            ..Options::default()
        };
        let results = Results {
            codes: BTreeMap::from([(200, 3), (503, 1)]),
            millis: vec![1.0, 2.0, 3.0, 4.0],
            sockets: 2,
            failures: Vec::new(),
        };
        let text = report(&options, results, Duration::from_secs(1));
        assert!(
            text.contains("Code 200 : 3 (75.0 %)\nCode 503 : 1 (25.0 %)\n"),
            "{text}"
        );
        assert!(
            text.contains("All done 4 calls (plus 0 warmup) 2.500 ms avg, 4.0 qps"),
            "{text}"
        );
    }
}
