//! The endpoints: each on a loopback address of its own, all on one port. They note what they get and do what the request says.
//!
//! The header `x-upstream` says what happens, try by try, with `|` between tries; the last stands for all that follow. A try is
//! words: a status, or `reset` (the connection ends without an answer); then `delay=MS`, `size=BYTES` (of the body), `cut` (the body
//! breaks off), `trailer:NAME=VALUE` and `NAME=VALUE` (headers).

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::authorizer;

/// Names a request and says who passed it on; the first letter is the proxy's.
pub(super) const ID: &str = "x-case-id";
/// Says what the endpoint does.
pub(super) const SCRIPT: &str = "x-upstream";
/// Endpoints of each kind.
const COUNT: u8 = 8;

/// What an endpoint got.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Received {
    pub(super) endpoint: String,
    pub(super) version: &'static str,
    pub(super) method: String,
    pub(super) target: String,
    /// In order of names; values in their order.
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
    pub(super) trailers: Vec<(String, String)>,
}

/// What was received, by the request's id.
#[derive(Clone, Default)]
pub(super) struct Log(Arc<Mutex<HashMap<String, Vec<Received>>>>);

impl Log {
    /// Notes a request and gives the number of its try, from 0.
    fn note(&self, id: &str, received: Received) -> usize {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tries = all.entry(id.to_owned()).or_default();
        tries.push(received);
        tries.len() - 1
    }

    /// How many requests came under an id so far.
    pub(super) fn count(&self, id: &str) -> usize {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(id).map_or(0, Vec::len)
    }

    /// What came under an id.
    pub(super) fn take(&self, id: &str) -> Vec<Received> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(id).unwrap_or_default()
    }
}

/// The endpoints' addresses and notes.
#[derive(Clone)]
pub(super) struct Upstream {
    pub(super) port: u16,
    pub(super) log: Log,
}

impl Upstream {
    /// Starts all endpoints on the current runtime.
    pub(super) async fn start() -> anyhow::Result<Self> {
        let log = Log::default();
        let first = TcpListener::bind((address(0, 1), 0)).await?;
        let port = first.local_addr()?.port();
        let mut listeners = vec![(String::from("1"), first)];
        for n in 2..=COUNT {
            listeners.push((
                n.to_string(),
                TcpListener::bind((address(0, n), port)).await?,
            ));
        }
        for (name, listener) in listeners {
            tokio::spawn(serve_http(listener, name, log.clone()));
        }
        for n in 1..=COUNT {
            let at = |kind| TcpListener::bind((address(kind, n), port));
            tokio::spawn(serve_tcp(at(1).await?, format!("tcp{n}"), false));
            tokio::spawn(serve_tcp(at(2).await?, format!("banner{n}"), true));
        }
        Ok(Self { port, log })
    }

    /// The address of an endpoint by its name.
    pub(super) fn address(&self, name: &str) -> anyhow::Result<SocketAddr> {
        let number = |text: &str| {
            text.parse()
                .ok()
                .filter(|n| (1..=COUNT).contains(n))
                .with_context(|| format!("no endpoint is called {name:?}"))
        };
        let ip = if name == "dead" {
            address(9, 1)
        } else if let Some(n) = name.strip_prefix("tcp") {
            address(1, number(n)?)
        } else if let Some(n) = name.strip_prefix("banner") {
            address(2, number(n)?)
        } else {
            address(0, number(name)?)
        };
        Ok((ip, self.port).into())
    }
}

fn address(kind: u8, n: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 3, kind, n)
}

async fn serve_http(listener: TcpListener, name: String, log: Log) {
    while let Ok((stream, _)) = listener.accept().await {
        let (name, log) = (name.clone(), log.clone());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let service = service_fn(|request| answer(request, name.clone(), log.clone()));
            let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            // A connection that ends early is what many cases are about.
            let _ = builder
                .serve_connection_with_upgrades(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// Ends the connection (HTTP/1) or the stream (HTTP/2).
#[derive(Debug, thiserror::Error)]
#[error("as the request asked")]
struct Broken;

type Body = UnsyncBoxBody<Bytes, Broken>;

async fn answer(
    mut request: hyper::Request<Incoming>,
    endpoint: String,
    log: Log,
) -> Result<hyper::Response<Body>, Broken> {
    let (parts, body) = {
        let upgrade = request.headers().contains_key("upgrade");
        let on = upgrade.then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        if let Some(on) = on {
            tokio::spawn(echo_upgraded(on));
        }
        (parts, body)
    };
    let text = |name: &str| {
        parts
            .headers
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned()
    };
    let (id, script) = (text(ID), text(SCRIPT));
    let upgrade = parts.headers.contains_key("upgrade");
    if parts.uri.path() == authorizer::PATH {
        let body = body.collect().await.map_err(|_| Broken)?.to_bytes();
        return authorize(&body, &endpoint, &log).await;
    }
    let (body, trailers) = if upgrade {
        (String::new(), Vec::new())
    } else {
        match body.collect().await {
            Ok(collected) => {
                let trailers = collected.trailers().map(listed).unwrap_or_default();
                (shown(&collected.to_bytes()), trailers)
            }
            Err(_) => ("broke off".to_owned(), Vec::new()),
        }
    };
    let received = Received {
        endpoint,
        version: if parts.version == hyper::Version::HTTP_2 {
            "2"
        } else {
            "1.1"
        },
        method: parts.method.to_string(),
        target: parts
            .uri
            .path_and_query()
            .map_or_else(|| parts.uri.to_string(), ToString::to_string),
        headers: with_authority(listed(&parts.headers), &parts.uri),
        body,
        trailers,
    };
    let number = log.note(&id, received);
    let mut response = follow(step(&script, number), upgrade).await?;
    if parts.method == hyper::Method::HEAD && parts.version == hyper::Version::HTTP_2 {
        leave_out_body(&mut response);
    }
    Ok(response)
}

/// What the codec does for HEAD in HTTP/1 only.
fn leave_out_body(response: &mut hyper::Response<Body>) {
    let length = response.body().size_hint().exact().filter(|n| *n > 0);
    *response.body_mut() = http_body_util::Empty::new().map_err(never).boxed_unsync();
    if let Some(length) = length {
        let length = HeaderValue::from(length);
        response.headers_mut().insert("content-length", length);
    }
}

/// What a script says of a try, by its number.
fn step(script: &str, number: usize) -> &str {
    let step = script.split('|').nth(number);
    let step = step.or_else(|| script.split('|').next_back());
    step.unwrap_or_default().trim()
}

/// Answers as an external authorization service.
async fn authorize(
    body: &[u8],
    endpoint: &str,
    log: &Log,
) -> Result<hyper::Response<Body>, Broken> {
    let question = authorizer::read(body, endpoint).ok_or(Broken)?;
    let number = log.note(&question.id, question.received);
    let answer = authorizer::answer(step(&question.script, number));
    let answer = answer.await.ok_or(Broken)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Ok(Frame::data(answer)), Ok(Frame::trailers(trailers))];
    let body = BodyExt::boxed_unsync(StreamBody::new(stream::iter(frames)));
    let mut response = hyper::Response::new(body);
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert("content-type", kind);
    Ok(response)
}

/// HTTP/2 has the authority in the target.
fn with_authority(mut headers: Vec<(String, String)>, uri: &hyper::Uri) -> Vec<(String, String)> {
    if let Some(authority) = uri.authority() {
        headers.push(("host".to_owned(), authority.to_string()));
        headers.sort_by(|a, b| a.0.cmp(&b.0));
    }
    headers
}

/// A body short enough to read, else its length and a checksum.
pub(super) fn shown(bytes: &[u8]) -> String {
    if bytes.len() <= 300 {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    let sum = bytes.iter().fold(0_u64, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
    });
    format!("{} bytes, checksum {sum:x}", bytes.len())
}

/// Headers in order of their names.
pub(super) fn listed(headers: &HeaderMap) -> Vec<(String, String)> {
    let mut all: Vec<_> = headers
        .iter()
        .map(|(name, value)| {
            (
                name.to_string(),
                String::from_utf8_lossy(value.as_bytes()).into_owned(),
            )
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

async fn follow(step: &str, upgrade: bool) -> Result<hyper::Response<Body>, Broken> {
    let mut words = step.split_whitespace();
    let status = words.next().unwrap_or(if upgrade { "101" } else { "200" });
    let mut headers = HeaderMap::new();
    let mut trailers = HeaderMap::new();
    let (mut size, mut cut) = (None, false);
    for word in words {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        match name {
            "delay" => tokio::time::sleep(Duration::from_millis(value.parse().unwrap_or(0))).await,
            "size" => size = value.parse::<usize>().ok(),
            "cut" => cut = true,
            _ => {
                let (into, name) = match name.strip_prefix("trailer:") {
                    Some(name) => (&mut trailers, name),
                    None => (&mut headers, name),
                };
                if let (Ok(name), Ok(value)) =
                    (name.parse::<HeaderName>(), HeaderValue::from_str(value))
                {
                    into.append(name, value);
                }
            }
        }
    }
    if status == "reset" {
        return Err(Broken);
    }
    if status == "101" {
        headers.insert("connection", HeaderValue::from_static("upgrade"));
        headers.insert("upgrade", HeaderValue::from_static("websocket"));
    }
    let status = hyper::StatusCode::from_bytes(status.as_bytes())
        .unwrap_or(hyper::StatusCode::NOT_IMPLEMENTED);
    let bodiless = status.is_informational() || status.as_u16() == 204 || status.as_u16() == 304;
    let mut frames: Vec<Result<Frame<Bytes>, Broken>> = Vec::new();
    match size {
        Some(0) => {}
        _ if bodiless => {}
        Some(size) => frames.push(Ok(Frame::data(vec![b'x'; size].into()))),
        None => frames.push(Ok(Frame::data(Bytes::from_static(b"from upstream\n")))),
    }
    let plain = !cut && trailers.is_empty();
    if !trailers.is_empty() {
        frames.push(Ok(Frame::trailers(trailers)));
    }
    let body = if plain {
        let whole: Vec<u8> = frames
            .into_iter()
            .filter_map(|f| f.ok()?.into_data().ok())
            .flatten()
            .collect();
        http_body_util::Full::new(Bytes::from(whole))
            .map_err(never)
            .boxed_unsync()
    } else if cut {
        // What was sent must be on its way before the end.
        let late = stream::once(async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            Err(Broken)
        });
        BodyExt::boxed_unsync(StreamBody::new(stream::StreamExt::chain(
            stream::iter(frames),
            Box::pin(late),
        )))
    } else {
        BodyExt::boxed_unsync(StreamBody::new(stream::iter(frames)))
    };
    let mut response = hyper::Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Ok(response)
}

fn never(never: Infallible) -> Broken {
    match never {}
}

async fn echo_upgraded(on: hyper::upgrade::OnUpgrade) {
    if let Ok(upgraded) = on.await {
        let mut io = TokioIo::new(upgraded);
        let mut buffer = [0; 1024];
        while let Ok(n) = io.read(&mut buffer).await {
            if n == 0 || io.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    }
}

/// Sends its name before what it got; with `banner` first a line by itself.
async fn serve_tcp(listener: TcpListener, name: String, banner: bool) {
    while let Ok((stream, _)) = listener.accept().await {
        let name = name.clone();
        tokio::spawn(async move {
            // A peer that breaks off ends its own connection only.
            let _ = echo(stream, &name, banner).await;
        });
    }
}

async fn echo(mut stream: TcpStream, name: &str, banner: bool) -> std::io::Result<()> {
    if banner {
        stream
            .write_all(format!("{name} is here\n").as_bytes())
            .await?;
    }
    let mut buffer = [0; 4096];
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return stream
                .write_all(format!("{name} saw the end\n").as_bytes())
                .await;
        }
        stream.write_all(format!("{name} got ").as_bytes()).await?;
        stream.write_all(&buffer[..n]).await?;
    }
}
