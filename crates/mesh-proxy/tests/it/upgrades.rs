//! Upgrades and tunnels, routes that change under open connections, and the names that traffic is counted under.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{
    HeaderValue, HeaderValueOption, Http2ProtocolOptions,
};
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    RouteSpecifier, UpgradeConfig,
};
use envoy_types::pb::google::protobuf::BoolValue;
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_routing::XdsState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::config::{action, cluster, http_listener, prefix, route_to, state, table};
use crate::stage::{App, Client, Proxy, free_port, wait};

/// An endpoint that agrees to every upgrade and CONNECT, and then says in capitals what it hears. `/no` is not agreed to.
fn loud() -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in socket.incoming() {
            let mut stream = stream.expect("a connection");
            std::thread::spawn(move || {
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") {
                    if stream.read(&mut byte).unwrap_or(0) == 0 {
                        return;
                    }
                    head.push(byte[0]);
                }
                let text = String::from_utf8_lossy(&head).into_owned();
                let kind = text.lines().find_map(|line| {
                    let (name, value) = line.split_once(": ")?;
                    name.eq_ignore_ascii_case("upgrade").then_some(value)
                });
                let answer = match kind {
                    _ if text.contains(" /no ") => {
                        "HTTP/1.1 404 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                            .to_owned()
                    }
                    _ if text.starts_with("CONNECT far.test:443 HTTP/1.1\r\n") => {
                        "HTTP/1.1 200 OK\r\n\r\n".to_owned()
                    }
                    Some(kind) => format!(
                        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {kind}\r\n\r\n"
                    ),
                    None => {
                        "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nplain"
                            .to_owned()
                    }
                };
                let _ = stream.write_all(answer.as_bytes());
                let mut heard = [0; 64];
                while let Ok(n @ 1..) = stream.read(&mut heard) {
                    let _ = stream.write_all(&heard[..n].to_ascii_uppercase());
                }
            });
        }
    });
    address
}

fn upgrades(manager: &mut HttpConnectionManager, kinds: &[&str]) {
    for kind in kinds {
        manager.upgrade_configs.push(UpgradeConfig {
            upgrade_type: (*kind).to_owned(),
            ..Default::default()
        });
    }
    manager.http2_protocol_options = Some(Http2ProtocolOptions {
        allow_connect: true,
        ..Default::default()
    });
}

fn scene(at: SocketAddr) -> XdsState {
    let connect = route::RouteMatch {
        path_specifier: Some(route::route_match::PathSpecifier::ConnectMatcher(
            route::route_match::ConnectMatcher {},
        )),
        ..Default::default()
    };
    let off = route::RouteAction {
        upgrade_configs: vec![route::route_action::UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            enabled: Some(BoolValue { value: false }),
            connect_config: None,
        }],
        ..action("loud")
    };
    let routes = table(vec![
        route_to(connect, action("loud")),
        route_to(prefix("/off"), off),
        route_to(prefix("/"), action("loud")),
    ]);
    let listener = http_listener(at, |manager| {
        upgrades(manager, &["websocket", "own/1", "CONNECT"]);
    });
    state(vec![listener], routes, vec![cluster("loud", &[loud()])])
}

fn talk(client: &mut Client) {
    client.send("hello");
    let mut echo = [0; 5];
    client.0.read_exact(&mut echo).expect("the echo");
    assert_eq!(&echo, b"HELLO");
}

#[test]
fn listed_upgrades_pass_and_others_are_forbidden() {
    let at = free_port();
    let proxy = Proxy::start(&scene(at));
    for kind in ["websocket", "WebSocket", "own/1"] {
        let mut client = Client::connect(at);
        let reply = client.get(
            "/",
            &format!("Connection: keep-alive, Upgrade\r\nUpgrade: {kind}\r\n"),
        );
        assert_eq!((reply.status, reply.header("upgrade")), (101, Some(kind)));
        talk(&mut client);
    }
    let ask = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    assert_eq!(Client::connect(at).get("/off", ask).status, 403);
    assert_eq!(Client::connect(at).get("/no", ask).status, 404);
    let other = "Connection: Upgrade\r\nUpgrade: other\r\n";
    assert_eq!(Client::connect(at).get("/", other).status, 403);
    // An upgrade to HTTP/2 is not one.
    let h2c = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n";
    let reply = Client::connect(at).get("/", h2c);
    assert_eq!((reply.status, reply.body.as_str()), (200, "plain"));
    wait(|| proxy.metric("istio_requests_total", &["response_code=\"101\""]) == 3.0);
}

#[test]
fn connect_opens_a_tunnel() {
    let at = free_port();
    let _proxy = Proxy::start(&scene(at));
    let mut client = Client::connect(at);
    client.send("CONNECT far.test:443 HTTP/1.1\r\nHost: far.test:443\r\n\r\n");
    assert_eq!(client.reply().expect("a reply").status, 200);
    talk(&mut client);
}

#[test]
fn connect_ends_here_where_the_route_says_so() {
    let echo = TcpListener::bind("127.0.0.1:0").expect("a port");
    let upstream = echo.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in echo.incoming() {
            let mut stream = stream.expect("a connection");
            let mut heard = [0; 5];
            if stream.read_exact(&mut heard).is_ok() {
                let _ = stream.write_all(&heard.to_ascii_uppercase());
            }
        }
    });
    let at = free_port();
    let connect = route::RouteMatch {
        path_specifier: Some(route::route_match::PathSpecifier::ConnectMatcher(
            route::route_match::ConnectMatcher {},
        )),
        ..Default::default()
    };
    let terminated = route::RouteAction {
        upgrade_configs: vec![route::route_action::UpgradeConfig {
            upgrade_type: "CONNECT".to_owned(),
            enabled: None,
            connect_config: Some(Default::default()),
        }],
        ..action("echo")
    };
    let proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        table(vec![route_to(connect, terminated)]),
        vec![cluster("echo", &[upstream])],
    ));
    let mut client = Client::connect(at);
    client.send("CONNECT far.test:443 HTTP/1.1\r\nHost: far.test:443\r\n\r\n");
    assert_eq!(client.reply().expect("a reply").status, 200);
    talk(&mut client);
    drop(client);
    wait(|| proxy.metric("istio_requests_total", &["response_code=\"200\""]) == 1.0);
}

#[test]
fn connect_is_refused_where_nothing_allows_it() {
    let (at, app) = (free_port(), App::start("a"));
    let _proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        table(vec![route_to(prefix("/"), action("a"))]),
        vec![cluster("a", &[app.address])],
    ));
    let mut client = Client::connect(at);
    client.send("CONNECT far.test:443 HTTP/1.1\r\nHost: far.test:443\r\n\r\n");
    assert_eq!(client.reply().expect("a reply").status, 404);
}

/// RFC 8441: a WebSocket over HTTP/2 reaches an endpoint that speaks HTTP/1.1.
#[tokio::test]
async fn an_upgrade_over_http2_becomes_one_of_http1() {
    let at = free_port();
    let _proxy = Proxy::start(&scene(at));
    for (method, protocol, uri) in [
        ("CONNECT", Some("websocket"), "http://app.test/chat"),
        ("CONNECT", None, "far.test:443"),
    ] {
        let stream = tokio::net::TcpStream::connect(at)
            .await
            .expect("a connection");
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("a handshake");
        tokio::spawn(connection);
        // The settings of the other side say that this form of CONNECT is allowed.
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        let mut request = Request::builder()
            .method(method)
            .uri(uri)
            .body(Empty::<Bytes>::new())
            .expect("a request");
        if let Some(protocol) = protocol {
            let protocol = hyper::ext::Protocol::from(protocol);
            request.extensions_mut().insert(protocol);
        }
        let response = sender.send_request(request).await.expect("a response");
        assert_eq!(response.status(), 200, "{protocol:?}");
        let mut tunnel = TokioIo::new(hyper::upgrade::on(response).await.expect("a tunnel"));
        tunnel.write_all(b"hello").await.expect("written");
        let mut echo = [0; 5];
        tunnel.read_exact(&mut echo).await.expect("the echo");
        assert_eq!(&echo, b"HELLO", "{protocol:?}");
    }
}

#[test]
fn inline_routes_change_under_open_connections() {
    let (at, v1, v2) = (free_port(), App::start("v1"), App::start("v2"));
    let config = |to: &str| {
        let listener = http_listener(at, |manager| {
            let routes = table(vec![route_to(prefix("/"), action(to))]);
            manager.route_specifier = Some(RouteSpecifier::RouteConfig(routes));
        });
        state(
            vec![listener],
            table(Vec::new()),
            vec![cluster("v1", &[v1.address]), cluster("v2", &[v2.address])],
        )
    };
    let proxy = Proxy::start(&config("v1"));
    let mut client = Client::connect(at);
    assert_eq!(client.get("/", "").header("x-app"), Some("v1"));
    proxy.publish(&config("v2"));
    wait(|| Client::connect(at).get("/", "").header("x-app") == Some("v2"));
    assert_eq!(client.get("/", "").header("x-app"), Some("v2"));
    assert_eq!(v2.connections.load(std::sync::atomic::Ordering::Relaxed), 1);
}

#[test]
fn passthrough_traffic_is_counted_under_its_host() {
    let (at, app) = (free_port(), App::start("a"));
    let mut passthrough = cluster("PassthroughCluster", &[app.address]);
    passthrough.metadata = None;
    let proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        table(vec![route_to(prefix("/"), action("PassthroughCluster"))]),
        vec![passthrough],
    ));
    assert_eq!(Client::connect(at).get("/", "").status, 200);
    let labels = [
        "destination_service=\"app.test\"",
        "destination_service_name=\"PassthroughCluster\"",
    ];
    wait(|| proxy.metric("istio_requests_total", &labels) == 1.0);
}

fn option(name: &str, value: &str, append: HeaderAppendAction) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: name.to_owned(),
            value: value.to_owned(),
            ..Default::default()
        }),
        append_action: append as i32,
        ..Default::default()
    }
}

#[test]
fn mutations_use_what_is_known_of_the_exchange() {
    use HeaderAppendAction::{
        AddIfAbsent, AppendIfExistsOrAdd, OverwriteIfExists, OverwriteIfExistsOrAdd,
    };
    let (at, app) = (free_port(), App::start("a"));
    let mut routed = route_to(
        prefix("/v1/"),
        route::RouteAction {
            prefix_rewrite: "/v2/".to_owned(),
            append_x_forwarded_host: true,
            host_rewrite_specifier: Some(
                route::route_action::HostRewriteSpecifier::HostRewritePathRegex(
                    envoy_types::pb::envoy::r#type::matcher::v3::RegexMatchAndSubstitute {
                        pattern: Some(envoy_types::pb::envoy::r#type::matcher::v3::RegexMatcher {
                            regex: "^/v1/(.+)$".to_owned(),
                            ..Default::default()
                        }),
                        substitution: "\\1.test".to_owned(),
                    },
                ),
            ),
            ..action("a")
        },
    );
    routed.name = "the-route".to_owned();
    routed.request_headers_to_add = vec![
        option("x-path", "%REQ(:PATH)%", OverwriteIfExistsOrAdd),
        option(
            "x-from",
            "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% by %PROTOCOL%",
            OverwriteIfExistsOrAdd,
        ),
        option("x-none", "%REQ(x-not-there)%", OverwriteIfExistsOrAdd),
        option("x-own", "more", AppendIfExistsOrAdd),
        option("x-new", "never", OverwriteIfExists),
        option("x-own", "absent", AddIfAbsent),
    ];
    routed.response_headers_to_add = vec![
        option(
            "x-said",
            "%REQ(x-own)% %RESPONSE_CODE% %ROUTE_NAME% %UPSTREAM_CLUSTER%",
            OverwriteIfExistsOrAdd,
        ),
        option("x-was", "%RESP(x-app)%", OverwriteIfExistsOrAdd),
    ];
    let _proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        table(vec![routed]),
        vec![cluster("a", &[app.address])],
    ));
    let reply = Client::connect(at).get("/v1/books?x=1", "X-Own: mine\r\n");
    let lines: HashMap<&str, &str> = reply
        .body
        .lines()
        .filter_map(|line| line.split_once(": "))
        .collect();
    assert!(reply.body.contains("GET /v2/books?x=1 "), "{}", reply.body);
    for (name, value) in [
        ("x-path", "/v1/books?x=1"),
        ("x-from", "127.0.0.1 by HTTP/1.1"),
        ("host", "books.test"),
        ("x-forwarded-host", "app.test"),
        ("x-envoy-original-path", "/v1/books?x=1"),
    ] {
        assert_eq!(lines.get(name), Some(&value), "{}", reply.body);
    }
    assert!(
        !reply.body.contains("x-none") && !reply.body.contains("x-new"),
        "{}",
        reply.body
    );
    assert!(
        reply.body.contains("x-own: mine\nx-own: more\n"),
        "{}",
        reply.body
    );
    assert!(!reply.body.contains("x-own: absent"), "{}", reply.body);
    assert_eq!(reply.header("x-said"), Some("mine 200 the-route a"));
    assert_eq!(reply.header("x-was"), Some("a"));
}

/// Trailers pass in HTTP/2, in both directions.
#[tokio::test]
async fn trailers_pass() {
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let upstream = socket.local_addr().expect("its address");
    tokio::spawn(async move {
        let (stream, _) = socket.accept().await.expect("a connection");
        let mut connection = h2::server::handshake(stream).await.expect("a handshake");
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            tokio::spawn(async move {
                let mut body = request.into_body();
                while let Some(Ok(data)) = body.data().await {
                    let _ = body.flow_control().release_capacity(data.len());
                }
                let trailers = body.trailers().await.expect("no error").expect("trailers");
                let mut send = respond
                    .send_response(http::Response::new(()), false)
                    .expect("sent");
                send.send_data("data".into(), false).expect("sent");
                send.send_trailers(trailers).expect("sent");
            });
        }
    });
    let at = free_port();
    let mut config = cluster("a", &[upstream]);
    config.http2_protocol_options = Some(Http2ProtocolOptions::default());
    let _proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        table(vec![route_to(prefix("/"), action("a"))]),
        vec![config],
    ));
    let stream = tokio::net::TcpStream::connect(at)
        .await
        .expect("a connection");
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("a handshake");
    tokio::spawn(connection);
    let mut trailers = http::HeaderMap::new();
    trailers.insert("x-trailer", "there".parse().expect("a value"));
    let body = Frames([Frame::data(Bytes::from("hello")), Frame::trailers(trailers)].into());
    let request = Request::post("http://app.test/")
        .body(body)
        .expect("a request");
    let response = sender.send_request(request).await.expect("a response");
    let collected = response.into_body().collect().await.expect("a body");
    let trailers = collected.trailers().expect("trailers").clone();
    assert_eq!(collected.to_bytes(), "data");
    assert_eq!(trailers.get("x-trailer").expect("it"), "there");
}

/// A body of these frames.
struct Frames(VecDeque<Frame<Bytes>>);

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(Ok))
    }
}
