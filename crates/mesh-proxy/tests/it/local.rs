//! Answers that the proxy gives itself, and what it tells of tries and limits: as Envoy does.

use std::io::Read;
use std::net::TcpListener;
use std::time::Duration as StdDuration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::{
    HeaderValue, HeaderValueOption, Http2ProtocolOptions,
};
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::google::protobuf::Duration;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::config::{action, cluster, http_listener, prefix, route_to, state, table};
use crate::stage::{App, Client, Proxy, free_port};

fn header(name: &str, value: &str) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: name.to_owned(),
            value: value.to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The route with a header of its own on every answer.
fn marked(mut route: route::Route) -> route::Route {
    route.response_headers_to_add = vec![header("x-route", "mine")];
    route
}

#[test]
fn what_a_route_adds_to_answers_it_adds_to_the_proxys_own() {
    let at = free_port();
    let routes = table(vec![
        marked(route_to(prefix("/unknown"), action("unknown"))),
        marked(route_to(prefix("/"), action("a"))),
    ]);
    let clusters = vec![cluster("a", &[])];
    let _proxy = Proxy::start(&state(vec![http_listener(at, |_| {})], routes, clusters));
    for (path, headers, status) in [
        ("/unknown", "", 503),
        ("/", "connection: upgrade\r\nupgrade: websocket\r\n", 403),
        ("/", "", 503),
    ] {
        let reply = Client::connect(at).get(path, headers);
        assert_eq!(reply.status, status, "{path}");
        assert_eq!(reply.header("x-route"), Some("mine"), "{path} {status}");
    }
}

#[test]
fn only_requests_that_are_sent_have_a_count_of_tries() {
    let (at, app) = (free_port(), App::start("a"));
    let answer = |action: route::route::Action, path: &str| route::Route {
        r#match: Some(prefix(path)),
        action: Some(action),
        ..Default::default()
    };
    let direct = route::DirectResponseAction {
        status: 403,
        ..Default::default()
    };
    let redirect = route::RedirectAction {
        host_redirect: "other.test".to_owned(),
        ..Default::default()
    };
    let mut routes = table(vec![
        answer(route::route::Action::DirectResponse(direct), "/direct"),
        answer(route::route::Action::Redirect(redirect), "/redirect"),
        route_to(prefix("/unknown"), action("unknown")),
        route_to(prefix("/"), action("a")),
    ]);
    routes.virtual_hosts[0].include_attempt_count_in_response = true;
    let clusters = vec![cluster("a", &[app.address])];
    let _proxy = Proxy::start(&state(vec![http_listener(at, |_| {})], routes, clusters));
    for (path, status, count) in [
        ("/direct", 403, None),
        ("/redirect", 301, None),
        ("/unknown", 503, None),
        ("/", 200, Some("1")),
    ] {
        let reply = Client::connect(at).get(path, "");
        let told = reply.header("x-envoy-attempt-count");
        assert_eq!((reply.status, told), (status, count), "{path}");
    }
}

#[test]
fn a_repeat_after_an_idle_close_is_counted() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = socket.local_addr().expect("its address");
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for (turn, stream) in socket.incoming().enumerate() {
            let mut app = Client(stream.expect("a connection"));
            let mut seen = [0; 4096];
            let n = app.0.read(&mut seen).expect("a request");
            let _ = tell.send(String::from_utf8_lossy(&seen[..n]).into_owned());
            app.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
            if turn == 0 {
                // It ends the connection just when it is used again.
                let _ = app.0.read(&mut seen);
            }
        }
    });
    let at = free_port();
    let mut routes = table(vec![route_to(prefix("/"), action("a"))]);
    routes.virtual_hosts[0].include_attempt_count_in_response = true;
    let clusters = vec![cluster("a", &[endpoint])];
    let _proxy = Proxy::start(&state(vec![http_listener(at, |_| {})], routes, clusters));
    let mut client = Client::connect(at);
    let first = client.get("/", "");
    assert_eq!(
        (first.status, first.header("x-envoy-attempt-count")),
        (200, Some("1"))
    );
    // Longer than the proxy trusts a connection that nobody uses.
    std::thread::sleep(StdDuration::from_millis(3100));
    let second = client.get("/", "");
    assert_eq!(
        (second.status, second.header("x-envoy-attempt-count")),
        (200, Some("2"))
    );
    let heads: Vec<String> = told.try_iter().collect();
    assert_eq!(heads.len(), 2, "{heads:?}");
    assert!(
        heads[1].contains("x-envoy-attempt-count: 2\r\n"),
        "{heads:?}"
    );
}

#[tokio::test]
async fn an_answer_to_head_has_a_length_and_no_body_in_http2() {
    let at = free_port();
    let routes = table(vec![route_to(prefix("/"), action("a"))]);
    let clusters = vec![cluster("a", &[])];
    let _proxy = Proxy::start(&state(vec![http_listener(at, |_| {})], routes, clusters));
    let stream = tokio::net::TcpStream::connect(at)
        .await
        .expect("a connection");
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("a handshake");
    tokio::spawn(connection);
    let request = Request::head("http://app.test/").body(Full::<Bytes>::default());
    let response = sender.send_request(request.expect("a request")).await;
    let response = response.expect("a response");
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["content-length"], "19");
    let body = response.into_body().collect().await;
    assert!(body.expect("an end").to_bytes().is_empty());
}

#[test]
fn an_authority_that_http2_cannot_carry_is_a_bad_gateway() {
    let (at, app) = (free_port(), App::start("a"));
    let mut upstream = cluster("a", &[app.address]);
    upstream.http2_protocol_options = Some(Http2ProtocolOptions::default());
    let to = route::RouteAction {
        host_rewrite_specifier: Some(
            route::route_action::HostRewriteSpecifier::HostRewriteHeader("x-host".to_owned()),
        ),
        ..action("a")
    };
    let routes = table(vec![route_to(prefix("/"), to)]);
    let listener = http_listener(at, |_| {});
    let proxy = Proxy::start(&state(vec![listener], routes, vec![upstream]));
    let mut client = Client::connect(at);
    let reply = client.get("/", "x-host: /no%20name-1\r\n");
    assert_eq!(reply.status, 502);
    assert!(
        reply.body.ends_with("reset reason: protocol error"),
        "{}",
        reply.body
    );
    assert_eq!(client.get("/", "x-host: good.test\r\n").status, 200);
    crate::stage::wait(|| proxy.flags("UPE") == 1.0);
}

#[test]
fn a_limit_for_the_whole_exchange_is_the_only_one() {
    let (at, app) = (free_port(), App::start("a"));
    let seconds = |seconds| Some(Duration { seconds, nanos: 0 });
    let exchange = route::RouteAction {
        timeout: seconds(15),
        max_grpc_timeout: seconds(7),
        max_stream_duration: Some(route::route_action::MaxStreamDuration {
            grpc_timeout_header_max: seconds(1),
            ..Default::default()
        }),
        ..action("a")
    };
    let grpc = route::RouteAction {
        max_grpc_timeout: seconds(1),
        ..action("a")
    };
    let routes = table(vec![
        route_to(prefix("/exchange"), exchange),
        route_to(prefix("/"), grpc),
    ]);
    let clusters = vec![cluster("a", &[app.address])];
    let _proxy = Proxy::start(&state(vec![http_listener(at, |_| {})], routes, clusters));
    let mut client = Client::connect(at);
    let headers = "content-type: application/grpc\r\ngrpc-timeout: 2S\r\n";
    let body = client.get("/exchange", headers).body;
    assert!(
        body.contains("grpc-timeout: 2S\n") && !body.contains("x-envoy-expected-rq-timeout-ms"),
        "{body}"
    );
    let body = client.get("/", headers).body;
    assert!(
        body.contains("grpc-timeout: 1000m\n")
            && body.contains("x-envoy-expected-rq-timeout-ms: 1000\n"),
        "{body}"
    );
}
