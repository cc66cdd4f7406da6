//! `fortio server`: an HTTP echo on 8080 and gRPC on 8079, HTTP/1.1 and HTTP/2 alike.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;

use super::options::Options;
use super::ping;
use crate::serve;

/// Largest body that is echoed.
const MAX_BODY: usize = 4 << 20;
/// Longest delay that a request may ask for.
const MAX_DELAY: Duration = Duration::from_secs(30);
/// How long requests may finish after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Serves both ports until SIGTERM or SIGINT and a moment longer, then lets what is under way finish.
pub(super) async fn run(options: &Options) -> anyhow::Result<()> {
    let stop = serve::stop_signal()?;
    let http = serve::listen(options.http_port).await?;
    let grpc = serve::listen(options.grpc_port).await?;
    serve::say(&format!(
        "fortio server: HTTP echo on port {}, gRPC ping on port {}",
        options.http_port, options.grpc_port
    ));
    let end = async {
        stop.await;
        serve::linger().await;
    };
    tokio::pin!(end);
    let graceful = GracefulShutdown::new();
    loop {
        tokio::select! {
            () = &mut end => break,
            () = accept(&http, &graceful) => {}
            () = accept(&grpc, &graceful) => {}
        }
    }
    drop((http, grpc));
    // What is not done by then is cut off, as the kubelet would do a little later.
    let _ = tokio::time::timeout(GRACE, graceful.shutdown()).await;
    Ok(())
}

async fn accept(listener: &TcpListener, graceful: &GracefulShutdown) {
    match listener.accept().await {
        Ok((stream, _)) => {
            // Best effort: a connection that is gone shows that on its first read.
            let _ = stream.set_nodelay(true);
            let builder = Builder::new(TokioExecutor::new());
            let connection = builder.serve_connection(TokioIo::new(stream), service_fn(answer));
            let watched = graceful.watch(connection.into_owned());
            tokio::spawn(async move {
                // A peer that breaks off ends its own connection only.
                let _ = watched.await;
            });
        }
        // Out of file descriptors: the server must go on, and must not spin.
        Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    serve::note_request();
    let version = request.version();
    let mut response = respond(request).await;
    serve::say_goodbye(version, &mut response);
    Ok(response)
}

async fn respond(request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let content_type = parts.headers.get("content-type").cloned();
    let is_grpc = content_type
        .as_ref()
        .is_some_and(|v| v.as_bytes().starts_with(b"application/grpc"));
    let body = match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return plain(StatusCode::PAYLOAD_TOO_LARGE, Bytes::new(), None),
    };
    if is_grpc {
        return match parts.uri.path() {
            ping::PING => grpc(Some(body), "0"),
            ping::HEALTH => grpc(Some(ping::serving()), "0"),
            // UNIMPLEMENTED (gRPC status codes).
            _ => grpc(None, "12"),
        };
    }
    let query = parts.uri.query().unwrap_or_default();
    let parameter = |name: &str| {
        query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find_map(|(key, value)| (key == name).then_some(value))
    };
    if let Some(delay) = parameter("delay").and_then(|text| text.strip_suffix("ms")?.parse().ok()) {
        tokio::time::sleep(Duration::from_millis(delay).min(MAX_DELAY)).await;
    }
    let status = parameter("status").and_then(|text| StatusCode::from_bytes(text.as_bytes()).ok());
    let body = match parameter("size").and_then(|text| text.parse::<usize>().ok()) {
        Some(size) => Bytes::from(vec![b'x'; size.min(MAX_BODY)]),
        None => body,
    };
    plain(status.unwrap_or(StatusCode::OK), body, content_type)
}

fn plain(status: StatusCode, body: Bytes, content_type: Option<HeaderValue>) -> Response<Body> {
    let mut response = Response::new(Full::new(body).boxed_unsync());
    *response.status_mut() = status;
    if let Some(content_type) = content_type {
        response.headers_mut().insert("content-type", content_type);
    }
    response
}

/// A gRPC answer: the message, if there is one, then the status as a trailer.
fn grpc(message: Option<Bytes>, status: &'static str) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    let frames = message
        .map(Frame::data)
        .into_iter()
        .chain([Frame::trailers(trailers)])
        .map(Ok);
    let body = StreamBody::new(stream::iter(frames)).boxed_unsync();
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}
