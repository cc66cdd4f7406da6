//! HTTP/2 with prior knowledge, before and behind the proxy.

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::Http2ProtocolOptions;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::config::{action, cluster, http_listener, prefix, route_to, state, table};
use crate::stage::{App, Proxy, free_port, wait};

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
