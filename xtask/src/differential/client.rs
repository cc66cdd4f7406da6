//! Sending a request and noting what came back, as a flat list of named facts that can be compared.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::header::HeaderMap;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::case::{Request, Version, header};
use super::upstream::{ID, Received, SCRIPT, listed, shown};

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(15);
/// Silence after which what was sent byte by byte counts as answered.
const SILENCE: Duration = Duration::from_millis(400);

/// What is known of one request: `status`, `response.header.NAME`, `upstream.0.endpoint` and so on.
pub(super) type Facts = BTreeMap<String, String>;

type Body = UnsyncBoxBody<Bytes, std::convert::Infallible>;

/// Sends a request to a listener and notes what came back.
pub(super) async fn send(to: SocketAddr, request: &Request, id: &str) -> Facts {
    let mut facts = Facts::new();
    let began = Instant::now();
    let outcome = if !request.tcp.is_empty() {
        tokio::time::timeout(LIMIT, send_tcp(to, &request.tcp, &mut facts)).await
    } else if !request.raw.is_empty() {
        tokio::time::timeout(LIMIT, send_raw(to, request, id, &mut facts)).await
    } else {
        tokio::time::timeout(LIMIT, send_http(to, request, id, &mut facts)).await
    };
    let outcome = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(shorten(&error)),
        Err(_) => Some(format!("nothing in {} s", LIMIT.as_secs())),
    };
    if let Some(error) = outcome {
        facts.insert("error".to_owned(), error);
    }
    if request.timed {
        facts.insert("millis".to_owned(), began.elapsed().as_millis().to_string());
    }
    facts
}

/// What kind of failure: the two proxies need not fail in the same words.
fn shorten(error: &anyhow::Error) -> String {
    let text = format!("{error:#}").to_lowercase();
    for (sign, name) in [
        ("connection refused", "refused"),
        ("closed before message", "closed without an answer"),
        ("reset by peer", "closed without an answer"),
        ("end of file", "broke off"),
        ("error reading a body", "broke off"),
        ("stream error", "stream reset"),
    ] {
        if text.contains(sign) {
            return name.to_owned();
        }
    }
    text
}

async fn send_http(
    to: SocketAddr,
    request: &Request,
    id: &str,
    facts: &mut Facts,
) -> anyhow::Result<()> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let message = message(request, id)?;
    let response = match request.version {
        Version::Http11 => {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            sender.send_request(message).await?
        }
        Version::Http2 => {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                    .await?;
            tokio::spawn(connection);
            let response = sender.send_request(message).await?;
            // The connection must outlive the sender until the body is read.
            return note(response, facts, Some(sender)).await;
        }
    };
    note(response, facts, None::<()>).await
}

fn message(request: &Request, id: &str) -> anyhow::Result<hyper::Request<Body>> {
    let (method, target) = request.line();
    let host = request.host.as_deref().unwrap_or("case.test");
    let mut message = hyper::Request::builder().method(method);
    message = match request.version {
        Version::Http11 => message.uri(target).header("host", host),
        Version::Http2 => message.uri(format!("http://{host}{target}")),
    };
    for line in &request.headers {
        let (name, value) = header(line);
        message = message.header(name, value);
    }
    message = message.header(ID, id);
    if !request.upstream.is_empty() {
        message = message.header(SCRIPT, &request.upstream);
    }
    Ok(message.body(body(request)?)?)
}

fn body(request: &Request) -> anyhow::Result<Body> {
    let data = if request.size > 0 {
        Bytes::from(vec![b'y'; request.size])
    } else {
        Bytes::from(request.body.clone())
    };
    if !request.chunked && request.trailers.is_empty() {
        return Ok(http_body_util::Full::new(data).boxed_unsync());
    }
    let mut frames = vec![Ok(Frame::data(data))];
    if !request.trailers.is_empty() {
        let mut trailers = HeaderMap::new();
        for line in &request.trailers {
            let (name, value) = header(line);
            trailers.append(name.parse::<hyper::header::HeaderName>()?, value.parse()?);
        }
        frames.push(Ok(Frame::trailers(trailers)));
    }
    Ok(StreamBody::new(stream::iter(frames)).boxed_unsync())
}

async fn note<S>(
    response: hyper::Response<Incoming>,
    facts: &mut Facts,
    _sender: S,
) -> anyhow::Result<()> {
    let (head, body) = response.into_parts();
    facts.insert("status".to_owned(), head.status.as_u16().to_string());
    note_headers(facts, "response.header", &listed(&head.headers));
    let collected = body.collect().await?;
    if let Some(trailers) = collected.trailers() {
        note_headers(facts, "response.trailer", &listed(trailers));
    }
    facts.insert("response.body".to_owned(), shown(&collected.to_bytes()));
    Ok(())
}

/// Several values of one name stand one after the other.
fn note_headers(facts: &mut Facts, prefix: &str, headers: &[(String, String)]) {
    for (name, value) in headers {
        let fact = facts.entry(format!("{prefix}.{name}")).or_default();
        if !fact.is_empty() {
            fact.push_str(" | ");
        }
        fact.push_str(value);
    }
}

/// What came under the request's id, try by try.
pub(super) fn note_received(facts: &mut Facts, received: &[Received]) {
    facts.insert("upstream.count".to_owned(), received.len().to_string());
    for (i, one) in received.iter().enumerate() {
        let mut put = |name: &str, value: &str| {
            facts.insert(format!("upstream.{i}.{name}"), value.to_owned())
        };
        put("endpoint", &one.endpoint);
        put("version", one.version);
        put("method", &one.method);
        put("target", &one.target);
        put("body", &one.body);
        note_headers(facts, &format!("upstream.{i}.header"), &one.headers);
        note_headers(facts, &format!("upstream.{i}.trailer"), &one.trailers);
    }
}

/// Status lines, what follows the last head, and whether the connection was closed.
async fn send_raw(
    to: SocketAddr,
    request: &Request,
    id: &str,
    facts: &mut Facts,
) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let named = format!("{ID}: {id}\r\n{SCRIPT}: {}\r\n", request.upstream);
    let mut read = Vec::new();
    let mut open = true;
    for part in &request.raw {
        let part = part.replace("ID\r\n", &named);
        // A proxy that has answered with an error need not read on.
        if stream.write_all(part.as_bytes()).await.is_err() {
            break;
        }
        open = read_on(&mut stream, &mut read).await;
    }
    let text = String::from_utf8_lossy(&read).into_owned();
    let statuses: Vec<&str> = text
        .split("HTTP/1.")
        .skip(1)
        .filter_map(|answer| answer.get(2..5))
        .collect();
    facts.insert("statuses".to_owned(), statuses.join(" "));
    facts.insert(
        "connection".to_owned(),
        if open { "open" } else { "closed" }.to_owned(),
    );
    if let Some((_, tail)) = text.rsplit_once("\r\n\r\n")
        && statuses.last() == Some(&"101")
    {
        facts.insert("tail".to_owned(), tail.to_owned());
    }
    Ok(())
}

async fn send_tcp(to: SocketAddr, parts: &[String], facts: &mut Facts) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    let mut read = Vec::new();
    let mut open = true;
    for part in parts {
        if part == "END" {
            stream.shutdown().await?;
        } else {
            stream.write_all(part.as_bytes()).await?;
        }
        open = read_on(&mut stream, &mut read).await;
    }
    mask_ends(&mut read);
    facts.insert(
        "answer".to_owned(),
        String::from_utf8_lossy(&read).into_owned(),
    );
    facts.insert(
        "connection".to_owned(),
        if open { "open" } else { "closed" }.to_owned(),
    );
    Ok(())
}

/// Takes the addresses and ports, which are other ones each time, out of a PROXY protocol header that was sent back.
fn mask_ends(answer: &mut Vec<u8>) {
    let find = |what: &[u8], within: &[u8]| within.windows(what.len()).position(|w| w == what);
    if let Some(at) = find(b"PROXY TCP4 ", answer)
        && let Some(end) = find(b"\r\n", &answer[at..])
    {
        let line = String::from_utf8_lossy(&answer[at..at + end]).into_owned();
        let masked = format!("PROXY TCP4, {} words", line.split(' ').count());
        answer.splice(at..at + end, masked.into_bytes());
    }
    // Version, command, family and length stay, then come two addresses and two ports.
    if let Some(at) = find(b"\r\n\r\n\0\r\nQUIT\n", answer)
        && let Some(ends) = answer.get_mut(at + 16..at + 28)
    {
        ends.fill(b'x');
    }
}

/// Reads until silence or the end; says whether the connection is still open.
async fn read_on(stream: &mut TcpStream, into: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 8192];
    loop {
        match tokio::time::timeout(SILENCE, stream.read(&mut buffer)).await {
            Err(_) => return true,
            Ok(Ok(0) | Err(_)) => return false,
            Ok(Ok(n)) => into.extend_from_slice(&buffer[..n]),
        }
    }
}
