//! Answers that come before the request was sent whole.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::SocketAddr;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::Http2ProtocolOptions;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::config::{action, cluster, http_listener, prefix, route_to, state, table};
use crate::servers;
use crate::stage::{Client, Proxy, free_port};

/// Much more than fits into the buffers on the way.
const UPLOAD: usize = 8 << 20;

/// Reads the head of a request, answers 413 and closes with the body unread, which the kernel makes a reset of.
fn refusing() -> SocketAddr {
    servers::with_threads(|mut stream| {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
            head.push(byte[0]);
        }
        let answer =
            "HTTP/1.1 413 Too Large\r\ncontent-length: 9\r\nconnection: close\r\n\r\ntoo large";
        let _ = stream.write_all(answer.as_bytes());
    })
}

/// The same over HTTP/2, where only the stream is reset.
fn refusing_http2() -> SocketAddr {
    servers::with_tasks(|stream| async move {
        let service = hyper::service::service_fn(|_: Request<Incoming>| async {
            let mut response = Response::new(Full::new(Bytes::from_static(b"too large")));
            *response.status_mut() = hyper::StatusCode::PAYLOAD_TOO_LARGE;
            Ok::<_, Infallible>(response)
        });
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service)
            .await;
    })
}

fn start(app: SocketAddr, http2: bool) -> (SocketAddr, Proxy) {
    let at = free_port();
    let mut upstream = cluster("a", &[app]);
    upstream.http2_protocol_options = http2.then(Http2ProtocolOptions::default);
    let routes = table(vec![route_to(prefix("/"), action("a"))]);
    let listener = http_listener(at, |_| {});
    let proxy = Proxy::start(&state(vec![listener], routes, vec![upstream]));
    (at, proxy)
}

/// The answer reaches a client of HTTP/1 that sends all of its body before it reads.
fn check_http1(at: SocketAddr, proxy: &Proxy) {
    for round in 0..20 {
        let mut client = Client::connect(at);
        client.send(&format!(
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {UPLOAD}\r\n\r\n"
        ));
        let mut writer = client.0.try_clone().expect("a second handle");
        let writing = std::thread::spawn(move || {
            let piece = vec![b'x'; 64 << 10];
            (0..UPLOAD / piece.len()).all(|_| writer.write_all(&piece).is_ok())
        });
        let reply = client.reply().expect("an answer, not a reset");
        assert_eq!(
            (reply.status, &*reply.body, reply.header("connection")),
            (413, "too large", Some("close")),
            "round {round}"
        );
        assert!(client.is_closed());
        drop(client);
        writing.join().expect("a thread");
    }
    let counted = |part| proxy.metric("istio_requests_total", &[part]);
    assert_eq!(counted("response_code=\"413\""), 20.0);
    assert_eq!(counted("response_flags=\"-\""), 20.0);
}

/// It reaches a client of HTTP/2, whose connection goes on.
async fn check_http2(at: SocketAddr) {
    let stream = tokio::net::TcpStream::connect(at)
        .await
        .expect("a connection");
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("a handshake");
    tokio::spawn(connection);
    for round in 0..20 {
        let body = Full::new(Bytes::from(vec![b'x'; UPLOAD]));
        let request = Request::post("http://app.test/").body(body);
        let answer = async {
            let response = sender.send_request(request.expect("a request")).await?;
            let status = response.status();
            let body = response.into_body().collect().await?;
            Ok::<_, hyper::Error>((status, body.to_bytes()))
        };
        let answer = tokio::time::timeout(std::time::Duration::from_secs(10), answer).await;
        let (status, body) = answer.expect("an answer in time").expect("an answer");
        assert_eq!(
            (status.as_u16(), &*body),
            (413, &b"too large"[..]),
            "round {round}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_answer_passes_from_http1() {
    let (at, proxy) = start(refusing(), false);
    tokio::task::spawn_blocking(move || check_http1(at, &proxy))
        .await
        .expect("every round");
    let (at, _proxy) = start(refusing(), false);
    check_http2(at).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_answer_passes_from_http2() {
    let (at, proxy) = start(refusing_http2(), true);
    tokio::task::spawn_blocking(move || check_http1(at, &proxy))
        .await
        .expect("every round");
    let (at, _proxy) = start(refusing_http2(), true);
    check_http2(at).await;
}

#[test]
fn a_head_that_is_much_too_large_is_answered() {
    let (at, _proxy) = start(free_port(), false);
    for round in 0..10 {
        let mut client = Client::connect(at);
        let mut writer = client.0.try_clone().expect("a second handle");
        let writing = std::thread::spawn(move || {
            let head = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}", "x".repeat(1 << 20));
            let _ = writer.write_all(head.as_bytes());
        });
        let reply = client.reply().expect("an answer, not a reset");
        assert_eq!(reply.status, 431, "round {round}");
        assert!(client.is_closed());
        drop(client);
        writing.join().expect("a thread");
    }
}
