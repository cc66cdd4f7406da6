//! HTTP/2 with prior knowledge, before and behind the proxy.

use std::convert::Infallible;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::Http2ProtocolOptions;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::config::{action, cluster, http_listener, prefix, route_to, state, table};
use crate::stage::{App, Client, Proxy, free_port, wait};

#[tokio::test]
async fn streams_share_one_upstream_connection() {
    let (at, app) = (free_port(), App::start("a"));
    let mut upstream = cluster("a", &[app.address]);
    upstream.http2_protocol_options = Some(Http2ProtocolOptions::default());
    let routes = table(vec![route_to(prefix("/"), action("a"))]);
    let proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        routes,
        vec![upstream],
    ));
    let stream = tokio::net::TcpStream::connect(at)
        .await
        .expect("a connection");
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("a handshake");
    tokio::spawn(connection);
    let requests = (0..50).map(|i| {
        let mut sender = sender.clone();
        tokio::spawn(async move {
            let request = Request::post(format!("http://app.test/{i}"))
                .body(Full::new(Bytes::from(format!("body {i}"))));
            let response = sender
                .send_request(request.expect("a request"))
                .await
                .expect("a response");
            assert_eq!(response.status(), 200);
            let body = response
                .into_body()
                .collect()
                .await
                .expect("a body")
                .to_bytes();
            let text = String::from_utf8(body.to_vec()).expect("text");
            assert!(
                text.contains(&format!("POST http://app.test/{i} HTTP/2.0")),
                "{text}"
            );
            assert!(text.contains(&format!("body: body {i}\n")), "{text}");
        })
    });
    for request in requests.collect::<Vec<_>>() {
        request.await.expect("no failure");
    }
    assert_eq!(
        app.connections.load(std::sync::atomic::Ordering::Relaxed),
        1
    );
    wait(|| proxy.metric("istio_requests_total", &["response_code=\"200\""]) == 50.0);
}

#[tokio::test]
async fn http2_before_and_http1_behind() {
    let (at, app) = (free_port(), App::start("a"));
    let routes = table(vec![route_to(prefix("/"), action("a"))]);
    let _proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        routes,
        vec![cluster("a", &[app.address])],
    ));
    let stream = tokio::net::TcpStream::connect(at)
        .await
        .expect("a connection");
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("a handshake");
    tokio::spawn(connection);
    let request = Request::get("http://app.test/x?y=1")
        .body(Full::<Bytes>::default())
        .expect("a request");
    let response = sender.send_request(request).await.expect("a response");
    let body = response
        .into_body()
        .collect()
        .await
        .expect("a body")
        .to_bytes();
    let text = String::from_utf8(body.to_vec()).expect("text");
    assert!(
        text.contains("GET /x?y=1 HTTP/1.1\n") && text.contains("host: app.test\n"),
        "{text}"
    );
}

/// The client of HTTP/1 has all that its response announced before the endpoint's empty frame at the end comes: it has not gone away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_of_known_length_is_whole_before_its_last_frame() {
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let socket = socket.expect("a port");
    let mut upstream = cluster("a", &[socket.local_addr().expect("its address")]);
    upstream.http2_protocol_options = Some(Http2ProtocolOptions::default());
    tokio::spawn(async move {
        let service = hyper::service::service_fn(|_: Request<Incoming>| async {
            let data = Frame::data(Bytes::from_static(b"hello"));
            let frames = tokio_stream::iter([Ok::<_, Infallible>(data)]);
            let response = Response::builder().header("content-length", "5");
            response.body(StreamBody::new(frames))
        });
        let (stream, _) = socket.accept().await.expect("a connection");
        hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service)
            .await
    });
    let at = free_port();
    let routes = table(vec![route_to(prefix("/"), action("a"))]);
    let listener = http_listener(at, |_| {});
    let proxy = Proxy::start(&state(vec![listener], routes, vec![upstream]));
    let check = move || {
        let mut client = Client::connect(at);
        for _ in 0..5 {
            assert_eq!(client.get("/", "").body, "hello");
        }
        wait(|| proxy.metric("istio_requests_total", &["response_flags=\"-\""]) == 5.0);
    };
    tokio::task::spawn_blocking(check)
        .await
        .expect("no failure");
}
