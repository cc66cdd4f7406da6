//! HTTP/1.1 through the proxy.

use std::collections::BTreeMap;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::UpgradeConfig;
use envoy_types::pb::google::protobuf::{Duration, UInt32Value};
use mesh_routing::XdsState;

use crate::config::{
    action, cluster, http_listener, prefix, route_to, state, table, weighted, yes,
};
use crate::stage::{App, Client, Proxy, free_port, wait};

fn one_route(
    at: SocketAddr,
    to: route::RouteAction,
    clusters: Vec<envoy_types::pb::envoy::config::cluster::v3::Cluster>,
) -> XdsState {
    state(
        vec![http_listener(at, |_| {})],
        table(vec![route_to(prefix("/"), to)]),
        clusters,
    )
}

#[test]
fn requests_of_one_connection_share_one_upstream_connection() {
    let (at, app) = (free_port(), App::start("a"));
    let proxy = Proxy::start(&one_route(
        at,
        action("a"),
        vec![cluster("a", &[app.address])],
    ));
    let mut client = Client::connect(at);
    for i in 0..20 {
        let reply = client.get(
            &format!("/path/{i}?q=1"),
            "X-Own: 1\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\n",
        );
        assert_eq!(reply.status, 200);
        assert!(
            reply.body.contains(&format!("GET /path/{i}?q=1 HTTP/1.1")),
            "{}",
            reply.body
        );
        assert!(
            reply.body.contains("host: app.test\n") && reply.body.contains("x-own: 1\n"),
            "{}",
            reply.body
        );
        assert!(
            !reply.body.contains("x-hop"),
            "hop-by-hop headers end here: {}",
            reply.body
        );
        assert!(
            reply.body.contains("x-request-id: ")
                && reply.body.contains("x-forwarded-proto: http\n"),
            "{}",
            reply.body
        );
        assert!(
            reply.body.contains("x-envoy-attempt-count: 1\n"),
            "{}",
            reply.body
        );
        assert_eq!(reply.header("server"), Some("istio-envoy"));
        assert!(reply.header("x-envoy-upstream-service-time").is_some());
        assert!(reply.header("x-envoy-peer-metadata").is_none());
    }
    assert_eq!(app.connections.load(Ordering::Relaxed), 1);
    let labels = [
        "reporter=\"source\"",
        "source_workload=\"client\"",
        "destination_workload=\"a-workload\"",
        "response_code=\"200\"",
    ];
    wait(|| proxy.metric("istio_requests_total", &labels) == 20.0);
    assert_eq!(
        proxy.metric("istio_request_duration_milliseconds_count", &labels),
        20.0
    );
}

#[test]
fn bodies_are_streamed_both_ways() {
    let (at, app) = (free_port(), App::start("a"));
    let _proxy = Proxy::start(&one_route(
        at,
        action("a"),
        vec![cluster("a", &[app.address])],
    ));
    let mut client = Client::connect(at);
    client.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello");
    assert!(
        client
            .reply()
            .expect("a reply")
            .body
            .contains("body: hello\n")
    );
    client.send("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
    let reply = client.reply().expect("a reply");
    assert!(
        reply.body.contains("body: abcde\n") && reply.body.contains("transfer-encoding: chunked\n"),
        "{}",
        reply.body
    );
    client.send("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n");
    let reply = client.reply().expect("a reply");
    assert!(reply.body.contains("body: abc\n"), "{}", reply.body);
    assert_eq!(
        reply.header("connection"),
        None,
        "a request that ends with trailers has been sent whole"
    );
    let large = "x".repeat(1 << 20);
    client.send(&format!(
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{large}",
        large.len()
    ));
    assert!(client.reply().expect("a reply").body.contains(&large));
}

#[test]
fn endpoints_take_turns_also_across_new_snapshots() {
    let (at, apps) = (
        free_port(),
        [App::start("a"), App::start("b"), App::start("c")],
    );
    let addresses: Vec<_> = apps.iter().map(|app| app.address).collect();
    let config = one_route(at, action("all"), vec![cluster("all", &addresses)]);
    let proxy = Proxy::start(&config);
    let mut client = Client::connect(at);
    let mut order = String::new();
    for i in 0..9 {
        if i % 2 == 1 {
            proxy.publish(&one_route(
                at,
                action("all"),
                vec![cluster("all", &addresses)],
            ));
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        order.push_str(client.get("/", "").header("x-app").expect("its name"));
    }
    assert!("abcabcabcabc".contains(&order), "{order}");
}

#[test]
fn weights_split_and_headers_choose() {
    let (at, v1, v2) = (free_port(), App::start("v1"), App::start("v2"));
    let jason = route::RouteMatch {
        headers: vec![route::HeaderMatcher {
            name: "end-user".to_owned(),
            header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::ExactMatch(
                "jason".to_owned(),
            )),
            ..Default::default()
        }],
        ..prefix("/")
    };
    let routes = table(vec![
        route_to(jason, action("v2")),
        route_to(prefix("/"), weighted(&[("v1", 80), ("v2", 20)])),
    ]);
    let clusters = vec![cluster("v1", &[v1.address]), cluster("v2", &[v2.address])];
    let _proxy = Proxy::start(&state(vec![http_listener(at, |_| {})], routes, clusters));
    let mut client = Client::connect(at);
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..2000 {
        *counts
            .entry(
                client
                    .get("/", "")
                    .header("x-app")
                    .expect("its name")
                    .to_owned(),
            )
            .or_default() += 1;
    }
    let share = f64::from(counts["v1"]) / 2000.0;
    assert!((share - 0.8).abs() < 0.045, "{counts:?}");
    for _ in 0..50 {
        assert_eq!(
            client.get("/", "end-user: jason\r\n").header("x-app"),
            Some("v2")
        );
    }
}

#[test]
fn what_cannot_be_routed_is_answered_as_envoy_does() {
    let (at, nobody) = (free_port(), free_port());
    let routes = table(vec![
        route_to(prefix("/none"), action("none")),
        route_to(prefix("/down"), action("down")),
        route_to(prefix("/unknown"), action("unknown")),
    ]);
    let clusters = vec![cluster("none", &[]), cluster("down", &[nobody])];
    let proxy = Proxy::start(&state(vec![http_listener(at, |_| {})], routes, clusters));
    let mut client = Client::connect(at);
    let reply = client.get("/", "");
    assert_eq!(
        (reply.status, reply.body.as_str(), reply.header("server")),
        (404, "", Some("istio-envoy"))
    );
    let reply = client.get("/none", "");
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (503, "no healthy upstream")
    );
    let reply = client.get("/down", "");
    assert_eq!(reply.status, 503);
    assert!(
        reply.body.starts_with(
            "upstream connect error or disconnect/reset before headers. reset reason: "
        ),
        "{}",
        reply.body
    );
    assert_eq!(client.get("/unknown", "").status, 503);
    for (flag, count) in [("NR", 1.0), ("UH", 1.0), ("UF", 1.0), ("NC", 1.0)] {
        wait(|| {
            proxy.metric(
                "istio_requests_total",
                &[&format!("response_flags=\"{flag}\"")],
            ) == count
        });
    }
}

#[test]
fn redirects_direct_responses_and_rewrites() {
    let (at, app) = (free_port(), App::start("a"));
    let with = |conditions, action| route::Route {
        r#match: Some(conditions),
        action: Some(action),
        ..Default::default()
    };
    let redirect = route::RedirectAction {
        path_rewrite_specifier: Some(route::redirect_action::PathRewriteSpecifier::PathRedirect(
            "/new".to_owned(),
        )),
        ..Default::default()
    };
    let direct = route::DirectResponseAction {
        status: 418,
        ..Default::default()
    };
    let rewrite = route::RouteAction {
        prefix_rewrite: "/v2/".to_owned(),
        host_rewrite_specifier: Some(
            route::route_action::HostRewriteSpecifier::HostRewriteLiteral("other.test".to_owned()),
        ),
        ..action("a")
    };
    let routes = table(vec![
        with(prefix("/old"), route::route::Action::Redirect(redirect)),
        with(
            prefix("/teapot"),
            route::route::Action::DirectResponse(direct),
        ),
        route_to(prefix("/v1/"), rewrite),
    ]);
    let _proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        routes,
        vec![cluster("a", &[app.address])],
    ));
    let mut client = Client::connect(at);
    let reply = client.get("/old?x=1", "");
    assert_eq!(
        (reply.status, reply.header("location")),
        (301, Some("http://app.test/new?x=1"))
    );
    assert_eq!(client.get("/teapot", "").status, 418);
    let reply = client.get("/v1/books?x=1", "");
    assert!(
        reply.body.contains("GET /v2/books?x=1 ") && reply.body.contains("host: other.test\n"),
        "{}",
        reply.body
    );
}

#[test]
fn changes_under_load_fail_no_request() {
    let (at, v1, v2) = (free_port(), App::start("v1"), App::start("v2"));
    let clusters = || vec![cluster("v1", &[v1.address]), cluster("v2", &[v2.address])];
    let proxy = Proxy::start(&one_route(at, action("v1"), clusters()));
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut client = Client::connect(at);
                let mut count = 0;
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(client.get("/", "").status, 200);
                    count += 1;
                }
                count
            })
        })
        .collect();
    for i in 0..20 {
        let to = if i % 2 == 0 { "v2" } else { "v1" };
        proxy.publish(&one_route(at, action(to), clusters()));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        assert!(client.join().expect("no failure") > 0);
    }
    // A connection that is kept alive sees the newest table.
    proxy.publish(&one_route(at, action("v2"), clusters()));
    let mut client = Client::connect(at);
    wait(|| Client::connect(at).get("/", "").header("x-app") == Some("v2"));
    assert_eq!(client.get("/", "").header("x-app"), Some("v2"));
    proxy.publish(&one_route(at, action("v1"), clusters()));
    wait(|| Client::connect(at).get("/", "").header("x-app") == Some("v1"));
    assert_eq!(client.get("/", "").header("x-app"), Some("v1"));
}

#[test]
fn malformed_requests_are_refused_and_nothing_is_forwarded() {
    let (at, app) = (free_port(), App::start("a"));
    let _proxy = Proxy::start(&one_route(
        at,
        action("a"),
        vec![cluster("a", &[app.address])],
    ));
    let bad = [
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
        "GET http://user@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551616\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n: empty\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
        "NONSENSE\r\n\r\n",
    ];
    for request in bad {
        let mut client = Client::connect(at);
        client.send(request);
        let status = client.reply().map(|r| r.status);
        assert!(
            matches!(status, None | Some(400 | 501 | 426)),
            "{request:?} gave {status:?}"
        );
        assert!(client.is_closed(), "{request:?} left the connection open");
    }
    let mut client = Client::connect(at);
    client.send(&format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX-Large: {}\r\n\r\n",
        "x".repeat(1 << 20)
    ));
    assert!(matches!(client.reply().map(|r| r.status), None | Some(431)));
    let mut client = Client::connect(at);
    client.send(&format!(
        "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
        "X-Many: 1\r\n".repeat(200)
    ));
    assert!(matches!(client.reply().map(|r| r.status), None | Some(431)));
    assert_eq!(
        app.connections.load(Ordering::Relaxed),
        0,
        "something was forwarded"
    );
}

#[test]
fn the_target_beats_the_host_header() {
    let (at, app) = (free_port(), App::start("a"));
    let _proxy = Proxy::start(&one_route(
        at,
        action("a"),
        vec![cluster("a", &[app.address])],
    ));
    let mut client = Client::connect(at);
    client.send("GET http://real.test/x HTTP/1.1\r\nHost: forged.test\r\n\r\n");
    let reply = client.reply().expect("a reply");
    assert!(
        reply.body.contains("GET /x HTTP/1.1") && reply.body.contains("host: real.test\n"),
        "{}",
        reply.body
    );
}

#[test]
fn edges_believe_no_client() {
    let (at, app) = (free_port(), App::start("a"));
    let listener = http_listener(at, |manager| {
        manager.use_remote_address = yes();
        manager.normalize_path = yes();
    });
    let routes = table(vec![route_to(prefix("/public"), action("a"))]);
    let _proxy = Proxy::start(&state(
        vec![listener],
        routes,
        vec![cluster("a", &[app.address])],
    ));
    let mut client = Client::connect(at);
    let reply = client.get(
        "/public",
        "x-envoy-peer-metadata: eA==\r\nx-envoy-max-retries: 9\r\nx-forwarded-proto: https\r\n",
    );
    assert!(
        reply.body.contains("x-forwarded-for: 127.0.0.1\n")
            && reply.body.contains("x-forwarded-proto: http\n"),
        "{}",
        reply.body
    );
    assert!(
        !reply.body.contains("x-envoy-max-retries") && !reply.body.contains("eA=="),
        "{}",
        reply.body
    );
    assert_eq!(
        client.get("/public/../secret", "").status,
        404,
        "the path judged is the path forwarded"
    );
}

#[test]
fn a_connection_closed_while_idle_is_not_noticed() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let upstream = socket.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in socket.incoming() {
            let mut app = Client(stream.expect("a connection"));
            let mut seen = [0; 4096];
            let _ = std::io::Read::read(&mut app.0, &mut seen);
            app.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
            // Closed without a word, although the connection could be kept.
            let _ = app.0.shutdown(Shutdown::Both);
        }
    });
    let at = free_port();
    let _proxy = Proxy::start(&one_route(at, action("a"), vec![cluster("a", &[upstream])]));
    let mut client = Client::connect(at);
    for _ in 0..20 {
        assert_eq!(client.get("/", "").status, 200);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn retries_follow_the_policy() {
    let (at, nobody, app) = (free_port(), free_port(), App::start("a"));
    let policy = |on: &str| {
        Some(route::RetryPolicy {
            retry_on: on.to_owned(),
            num_retries: Some(UInt32Value { value: 2 }),
            ..Default::default()
        })
    };
    let routes = table(vec![
        route_to(
            prefix("/status"),
            route::RouteAction {
                retry_policy: policy("gateway-error"),
                ..action("a")
            },
        ),
        route_to(
            prefix("/"),
            route::RouteAction {
                retry_policy: policy("connect-failure"),
                ..action("half")
            },
        ),
    ]);
    let clusters = vec![
        cluster("a", &[app.address]),
        cluster("half", &[nobody, app.address]),
    ];
    let proxy = Proxy::start(&state(vec![http_listener(at, |_| {})], routes, clusters));
    let mut client = Client::connect(at);
    for _ in 0..10 {
        assert_eq!(
            client.get("/", "").status,
            200,
            "the second try finds the endpoint that lives"
        );
    }
    let reply = client.get("/status/503", "");
    assert_eq!(reply.status, 503);
    assert!(
        reply.body.contains("x-envoy-attempt-count: 3\n"),
        "{}",
        reply.body
    );
    wait(|| proxy.metric("istio_requests_total", &["response_code=\"503\""]) == 1.0);
}

#[test]
fn a_route_timeout_is_504() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = socket.local_addr().expect("its address");
    let at = free_port();
    let timeout = Some(Duration {
        seconds: 0,
        nanos: 100_000_000,
    });
    let to = route::RouteAction {
        timeout,
        ..action("silent")
    };
    let proxy = Proxy::start(&one_route(at, to, vec![cluster("silent", &[silent])]));
    let reply = Client::connect(at).get("/", "");
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (504, "upstream request timeout")
    );
    wait(|| proxy.metric("istio_requests_total", &["response_flags=\"UT\""]) == 1.0);
    drop(socket);
}

#[test]
fn a_draining_proxy_ends_connections_with_the_response() {
    let (at, app) = (free_port(), App::start("a"));
    let proxy = Proxy::start(&one_route(
        at,
        action("a"),
        vec![cluster("a", &[app.address])],
    ));
    proxy.shared.configured.store(true, Ordering::Release);
    wait(|| proxy.shared.is_ready());
    let (mut busy, mut idle) = (Client::connect(at), Client::connect(at));
    let mut unused = Client::connect(at);
    for client in [&mut busy, &mut idle, &mut unused] {
        assert_eq!(client.get("/", "").status, 200);
    }
    busy.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhel");
    std::thread::sleep(std::time::Duration::from_millis(100));
    proxy.shared.drain();
    assert!(!proxy.shared.is_ready());
    busy.send("lo");
    let reply = busy.reply().expect("the request under way is finished");
    assert!(reply.body.contains("body: hello\n"), "{}", reply.body);
    assert!(busy.is_closed());
    // One that was on its way when the drain began is answered, too.
    assert_eq!(idle.get("/", "").status, 200);
    assert!(idle.is_closed());
    assert!(unused.is_closed(), "an idle connection ends a moment later");
    wait(|| proxy.shared.totals.open.load(Ordering::Relaxed) == 0);
}

#[test]
fn websockets_pass_once_the_endpoint_agrees() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let upstream = socket.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in socket.incoming() {
            let mut app = Client(stream.expect("a connection"));
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if std::io::Read::read(&mut app.0, &mut byte).unwrap_or(0) == 0 {
                    break;
                }
                head.push(byte[0]);
            }
            let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
            if text.contains("upgrade: websocket") && !text.contains("/no") {
                app.send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhello");
                let mut echo = [0; 4];
                if std::io::Read::read_exact(&mut app.0, &mut echo).is_ok() {
                    let _ = std::io::Write::write_all(&mut app.0, &echo);
                }
            } else {
                app.send("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
            }
        }
    });
    let at = free_port();
    let listener = http_listener(at, |manager| {
        manager.upgrade_configs.push(UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..Default::default()
        });
    });
    let routes = table(vec![route_to(prefix("/"), action("ws"))]);
    let proxy = Proxy::start(&state(
        vec![listener],
        routes,
        vec![cluster("ws", &[upstream])],
    ));
    let mut client = Client::connect(at);
    let reply = client.get("/chat", "Connection: Upgrade\r\nUpgrade: websocket\r\n");
    assert_eq!(
        (reply.status, reply.header("upgrade")),
        (101, Some("websocket"))
    );
    let mut bytes = [0; 5];
    std::io::Read::read_exact(&mut client.0, &mut bytes).expect("the first bytes of the endpoint");
    assert_eq!(&bytes, b"hello");
    client.send("ping");
    std::io::Read::read_exact(&mut client.0, &mut bytes[..4]).expect("the echo");
    assert_eq!(&bytes[..4], b"ping");
    drop(client);
    wait(|| proxy.metric("istio_requests_total", &["response_code=\"101\""]) == 1.0);
    // Without a 101 there is no tunnel: what follows is another request (CVE-2026-2833).
    let mut client = Client::connect(at);
    let wish = "GET /no HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    client.send(&format!("{wish}GET /second HTTP/1.1\r\nHost: a\r\n\r\n"));
    assert_eq!(client.reply().expect("a reply").status, 200);
    assert_eq!(client.reply().map(|r| r.status), Some(200));
}
