//! Retries, timeouts and what is said of them.

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use envoy_types::pb::envoy::config::core::v3::Http2ProtocolOptions;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::retry_policy::{
    RateLimitedRetryBackOff, ResetHeader,
};
use envoy_types::pb::google::protobuf::{Duration, UInt32Value};
use mesh_routing::XdsState;

use crate::config::{action, cluster, http_listener, prefix, route_to, state, table};
use crate::stage::{App, Client, Proxy, Reply, free_port, wait};

fn policy(on: &str, retries: u32) -> route::RetryPolicy {
    route::RetryPolicy {
        retry_on: on.to_owned(),
        num_retries: Some(UInt32Value { value: retries }),
        ..Default::default()
    }
}

fn millis(millis: i32) -> Option<Duration> {
    Some(Duration {
        seconds: i64::from(millis / 1000),
        nanos: millis % 1000 * 1_000_000,
    })
}

fn retried(policy: route::RetryPolicy) -> route::RouteAction {
    route::RouteAction {
        retry_policy: Some(policy),
        ..action("a")
    }
}

fn one_route(at: SocketAddr, to: route::RouteAction, endpoints: &[SocketAddr]) -> XdsState {
    state(
        vec![http_listener(at, |_| {})],
        table(vec![route_to(prefix("/"), to)]),
        vec![cluster("a", endpoints)],
    )
}

/// An endpoint that answers with these texts in turn, the last one for ever, one for each connection; an empty text closes the connection
/// after the request. The answer to `seen` is what it got.
struct Script {
    address: SocketAddr,
    count: Arc<AtomicUsize>,
    seen: std::sync::mpsc::Receiver<String>,
}

impl Script {
    fn start(texts: &'static [&'static str]) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = socket.local_addr().expect("its address");
        let count = Arc::new(AtomicUsize::new(0));
        let (sender, seen) = std::sync::mpsc::channel();
        let counter = count.clone();
        std::thread::spawn(move || {
            for stream in socket.incoming() {
                let mut app = Client(stream.expect("a connection"));
                let turn = counter.fetch_add(1, Ordering::Relaxed);
                let Some(request) = read_request(&mut app) else {
                    continue;
                };
                let _ = sender.send(request);
                app.send(texts.get(turn).or(texts.last()).expect("a text"));
            }
        });
        Self {
            address,
            count,
            seen,
        }
    }
}

fn read_request(app: &mut Client) -> Option<String> {
    let mut all = Vec::new();
    let mut byte = [0];
    while !all.ends_with(b"\r\n\r\n") {
        (app.0.read(&mut byte).ok()? == 1).then(|| all.push(byte[0]))?;
    }
    let head = String::from_utf8_lossy(&all).to_ascii_lowercase();
    if head.contains("transfer-encoding: chunked") {
        while !all.ends_with(b"0\r\n\r\n") {
            (app.0.read(&mut byte).ok()? == 1).then(|| all.push(byte[0]))?;
        }
    }
    if let Some(at) = head.find("content-length: ") {
        let digits = head[at + 16..].split("\r\n").next()?;
        let mut body = vec![0; digits.parse().ok()?];
        app.0.read_exact(&mut body).ok()?;
        all.extend_from_slice(&body);
    }
    Some(String::from_utf8_lossy(&all).into_owned())
}

const FINE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
const BUSY: &str = "HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

fn post(client: &mut Client, body: &str, headers: &str) -> Reply {
    client.send(&format!(
        "POST /x HTTP/1.1\r\nHost: app.test\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    ));
    client.reply().expect("a reply")
}

#[test]
fn every_condition_has_its_meaning() {
    // (condition, first answer, is it tried again?)
    let with_status = |status: &str| -> &'static str {
        format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").leak()
    };
    let with_header = |header: &str| -> &'static str {
        format!("HTTP/1.1 200 X\r\n{header}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            .leak()
    };
    let cases: Vec<(&str, &'static str, bool)> = vec![
        ("5xx", with_status("500"), true),
        ("5xx", with_status("503"), true),
        ("5xx", with_status("404"), false),
        ("5xx", "", true),
        ("gateway-error", with_status("502"), true),
        ("gateway-error", with_status("500"), false),
        ("gateway-error", "", true),
        ("retriable-4xx", with_status("409"), true),
        ("retriable-4xx", with_status("404"), false),
        ("retriable-status-codes", with_status("418"), true),
        ("retriable-status-codes", with_status("503"), false),
        ("retriable-headers", with_header("x-again: yes"), true),
        ("retriable-headers", with_header("x-other: yes"), false),
        ("reset", "", true),
        ("reset", with_status("503"), false),
        ("connect-failure", "", false),
        ("connect-failure", with_status("503"), false),
        ("reset-before-request", "", false),
        ("refused-stream", with_status("503"), false),
        (
            "envoy-ratelimited",
            with_header("x-envoy-ratelimited: true"),
            true,
        ),
        (
            "5xx",
            "HTTP/1.1 503 X\r\nx-envoy-ratelimited: true\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            false,
        ),
        ("5xx,reset", "HTTP/1.1 200 OK\r\nbroken\r\n\r\n", true),
    ];
    for (on, first, again) in cases {
        let script = Script::start(vec![first, FINE].leak());
        let at = free_port();
        let policy = route::RetryPolicy {
            retriable_status_codes: vec![418],
            retriable_headers: vec![route::HeaderMatcher {
                name: "x-again".to_owned(),
                ..Default::default()
            }],
            ..policy(on, 1)
        };
        let _proxy = Proxy::start(&one_route(at, retried(policy), &[script.address]));
        // A body, too: what is tried again is the whole request.
        let reply = post(&mut Client::connect(at), "body", "");
        let tries = if again { 2 } else { 1 };
        assert_eq!(
            script.count.load(Ordering::Relaxed),
            tries,
            "{on} after {first:?}"
        );
        for attempt in 1..=tries {
            let seen = script.seen.recv().expect("a request");
            assert!(seen.ends_with("\r\n\r\nbody"), "{on}: {seen}");
            let count = format!("x-envoy-attempt-count: {attempt}\r\n");
            assert!(seen.contains(&count), "{on}: {seen}");
        }
        if again {
            assert_eq!((reply.status, reply.body.as_str()), (200, "ok"), "{on}");
        }
    }
}

#[test]
fn grpc_statuses_of_answers_without_body_are_tried_again() {
    let answer = |code: u32| -> &'static str {
        format!("HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: {code}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").leak()
    };
    for (on, code, again) in [
        ("cancelled", 1, true),
        ("deadline-exceeded", 4, true),
        ("resource-exhausted", 8, true),
        ("internal", 13, true),
        ("unavailable", 14, true),
        ("unavailable", 13, false),
        ("unavailable", 0, false),
    ] {
        let script = Script::start(vec![answer(code), answer(0)].leak());
        let at = free_port();
        let _proxy = Proxy::start(&one_route(at, retried(policy(on, 1)), &[script.address]));
        post(
            &mut Client::connect(at),
            "x",
            "Content-Type: application/grpc\r\n",
        );
        let tries = if again { 2 } else { 1 };
        assert_eq!(script.count.load(Ordering::Relaxed), tries, "{on} {code}");
    }
}

#[test]
fn a_request_that_runs_out_of_tries_says_so() {
    let script = Script::start(&[BUSY]);
    let (at, closed) = (free_port(), free_port());
    let routes = table(vec![
        route_to(
            prefix("/down"),
            route::RouteAction {
                retry_policy: Some(policy("connect-failure", 2)),
                ..action("down")
            },
        ),
        route_to(prefix("/"), retried(policy("5xx", 3))),
    ]);
    let clusters = vec![cluster("a", &[script.address]), cluster("down", &[closed])];
    let proxy = Proxy::start(&state(vec![http_listener(at, |_| {})], routes, clusters));
    let mut client = Client::connect(at);
    assert_eq!(client.get("/", "").status, 503);
    assert_eq!(script.count.load(Ordering::Relaxed), 4);
    wait(|| proxy.metric("istio_requests_total", &["response_flags=\"URX\""]) == 1.0);
    let reply = client.get("/down", "");
    assert_eq!(reply.status, 503);
    assert!(
        reply
            .body
            .contains("retried and the latest reset reason: remote connection failure"),
        "{}",
        reply.body
    );
    wait(|| proxy.metric("istio_requests_total", &["response_flags=\"UF,URX\""]) == 1.0);
}

#[test]
fn headers_of_a_request_ask_for_tries_and_end_here() {
    let script = Script::start(&[BUSY, BUSY, FINE]);
    let at = free_port();
    let _proxy = Proxy::start(&one_route(at, action("a"), &[script.address]));
    let reply = Client::connect(at).get(
        "/",
        "x-forwarded-for: 10.0.0.1\r\nx-envoy-retry-on: gateway-error\r\nx-envoy-max-retries: 2\r\n",
    );
    assert_eq!(reply.status, 200);
    let seen = script.seen.recv().expect("a request").to_ascii_lowercase();
    assert!(
        !seen.contains("x-envoy-retry-on") && !seen.contains("x-envoy-max-retries"),
        "{seen}"
    );
}

#[test]
fn only_requests_with_a_listed_header_are_tried_again() {
    for (header, tries) in [("x-may: 1\r\n", 2), ("", 1)] {
        let script = Script::start(&[BUSY, FINE]);
        let at = free_port();
        let policy = route::RetryPolicy {
            retriable_request_headers: vec![route::HeaderMatcher {
                name: "x-may".to_owned(),
                ..Default::default()
            }],
            ..policy("5xx", 1)
        };
        let _proxy = Proxy::start(&one_route(at, retried(policy), &[script.address]));
        Client::connect(at).get("/", header);
        assert_eq!(script.count.load(Ordering::Relaxed), tries, "{header:?}");
    }
}

#[test]
fn a_body_beyond_the_limit_is_streamed_and_not_sent_twice() {
    let script = Script::start(&[BUSY, FINE]);
    let at = free_port();
    let mut routes = table(vec![route_to(prefix("/"), retried(policy("5xx", 1)))]);
    routes.virtual_hosts[0].per_request_buffer_limit_bytes = Some(UInt32Value { value: 100 });
    let _proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        routes,
        vec![cluster("a", &[script.address])],
    ));
    let reply = post(&mut Client::connect(at), &"x".repeat(101), "");
    assert_eq!(reply.status, 503);
    assert_eq!(script.count.load(Ordering::Relaxed), 1);
    let reply = post(&mut Client::connect(at), &"x".repeat(100), "");
    assert_eq!(reply.status, 200, "{}", reply.body);
}

#[test]
fn a_chunked_body_is_sent_twice() {
    let script = Script::start(&["", FINE]);
    let at = free_port();
    let _proxy = Proxy::start(&one_route(
        at,
        retried(policy("reset", 1)),
        &[script.address],
    ));
    let mut client = Client::connect(at);
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
    assert_eq!(client.reply().expect("a reply").status, 200);
    for _ in 0..2 {
        let seen = script.seen.recv().expect("a request");
        let body = seen.split_once("\r\n\r\n").expect("a head").1;
        let letters: String = body.chars().filter(char::is_ascii_lowercase).collect();
        assert_eq!(letters, "abcde", "{seen}");
    }
}

#[test]
fn waits_follow_what_the_answer_asks_for() {
    let script = Script::start(&[
        "HTTP/1.1 503 X\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        FINE,
    ]);
    let at = free_port();
    let policy = route::RetryPolicy {
        rate_limited_retry_back_off: Some(RateLimitedRetryBackOff {
            reset_headers: vec![ResetHeader {
                name: "retry-after".to_owned(),
                format: 0,
            }],
            max_interval: millis(5000),
        }),
        ..policy("5xx", 1)
    };
    let _proxy = Proxy::start(&one_route(at, retried(policy), &[script.address]));
    let begun = std::time::Instant::now();
    assert_eq!(Client::connect(at).get("/", "").status, 200);
    assert!(
        begun.elapsed() >= std::time::Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
}

/// An endpoint that takes connections and says nothing.
fn silent() -> (TcpListener, SocketAddr) {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("its address");
    (socket, address)
}

#[test]
fn tries_have_their_own_limit() {
    let ((_socket, quiet), app, at) = (silent(), App::start("a"), free_port());
    let policy = route::RetryPolicy {
        per_try_timeout: millis(100),
        retry_host_predicate: vec![route::retry_policy::RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
            ..Default::default()
        }],
        host_selection_retry_max_attempts: 5,
        ..policy("5xx", 1)
    };
    let mut routes = table(vec![route_to(prefix("/"), retried(policy))]);
    routes.virtual_hosts[0].include_is_timeout_retry_header = true;
    let _proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        routes,
        vec![cluster("a", &[quiet, app.address])],
    ));
    let mut client = Client::connect(at);
    let replies: Vec<_> = (0..4).map(|_| client.get("/", "")).collect();
    assert!(replies.iter().all(|r| r.status == 200));
    assert!(
        replies
            .iter()
            .any(|r| r.body.contains("x-envoy-is-timeout-retry: true\n")
                && r.body.contains("x-envoy-attempt-count: 2\n")
                && r.body.contains("x-envoy-expected-rq-timeout-ms: 100\n")),
        "{}",
        replies[0].body
    );
}

#[test]
fn limits_end_what_takes_too_long() {
    let (_socket, quiet) = silent();
    let at = free_port();
    let grpc = route::RouteAction {
        max_grpc_timeout: millis(0),
        ..action("a")
    };
    let stream = route::RouteAction {
        max_stream_duration: Some(route::route_action::MaxStreamDuration {
            max_stream_duration: millis(100),
            ..Default::default()
        }),
        ..action("a")
    };
    let idle = route::RouteAction {
        idle_timeout: millis(100),
        ..action("a")
    };
    let routes = table(vec![
        route_to(prefix("/grpc"), grpc),
        route_to(prefix("/stream"), stream),
        route_to(prefix("/idle"), idle),
        route_to(prefix("/"), action("a")),
    ]);
    let listener = http_listener(at, |manager| manager.request_timeout = millis(300));
    let proxy = Proxy::start(&state(vec![listener], routes, vec![cluster("a", &[quiet])]));
    let timeout = "x-forwarded-for: 10.0.0.1\r\nx-envoy-upstream-rq-timeout-ms: 100\r\n";
    let reply = Client::connect(at).get("/", timeout);
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (504, "upstream request timeout")
    );
    let alternative = format!("{timeout}x-envoy-upstream-rq-timeout-alt-response: 1\r\n");
    assert_eq!(Client::connect(at).get("/", &alternative).status, 204);
    let reply = Client::connect(at).get(
        "/grpc",
        "content-type: application/grpc\r\ngrpc-timeout: 100m\r\n",
    );
    assert_eq!(
        (reply.status, reply.header("grpc-status")),
        (200, Some("14"))
    );
    let reply = Client::connect(at).get("/stream", "content-type: application/grpc\r\n");
    assert_eq!(
        (reply.status, reply.header("grpc-status")),
        (200, Some("4"))
    );
    let reply = Client::connect(at).get("/stream", "");
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (504, "downstream duration timeout")
    );
    let reply = Client::connect(at).get("/idle", "");
    assert_eq!((reply.status, reply.body.as_str()), (504, "stream timeout"));
    // The client is the slow one.
    let mut client = Client::connect(at);
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe");
    let reply = client.reply().expect("a reply");
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (408, "request timeout")
    );
    let mut client = Client::connect(at);
    client.send("POST /idle HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe");
    let reply = client.reply().expect("a reply");
    assert_eq!((reply.status, reply.body.as_str()), (408, "stream timeout"));
    for (flag, count) in [("UT", 3.0), ("SI", 2.0)] {
        let label = format!("response_flags=\"{flag}\"");
        wait(|| proxy.metric("istio_requests_total", &[&label]) == count);
    }
}

#[test]
fn a_timeout_begins_with_the_end_of_the_request() {
    let (at, app) = (free_port(), App::start("a"));
    let to = route::RouteAction {
        timeout: millis(200),
        ..action("a")
    };
    let _proxy = Proxy::start(&one_route(at, to, &[app.address]));
    let mut client = Client::connect(at);
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe");
    std::thread::sleep(std::time::Duration::from_millis(400));
    client.send("llo");
    let reply = client.reply().expect("a reply");
    assert_eq!(reply.status, 200);
    assert!(reply.body.contains("body: hello\n"), "{}", reply.body);
}

/// An HTTP/2 endpoint that ends its first stream without having worked on it, by these frames.
async fn unwilling(frames: &'static [&'static [u8]]) -> (SocketAddr, Arc<AtomicUsize>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = socket.local_addr().expect("its address");
    let refused = Arc::new(AtomicUsize::new(0));
    let counter = refused.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = socket.accept().await.expect("a connection");
            let counter = counter.clone();
            tokio::spawn(async move {
                let mut seen = Vec::new();
                // Preface and settings come at once, then the head of the request.
                stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
                while !seen.windows(9).any(|w| w[3] == 1 && w[5..] == [0, 0, 0, 1]) {
                    if stream.read_buf(&mut seen).await? == 0 {
                        return Ok(());
                    }
                }
                counter.fetch_add(1, Ordering::Relaxed);
                for frame in frames {
                    stream.write_all(frame).await?;
                }
                while stream.read_buf(&mut seen).await? > 0 {}
                Ok::<(), std::io::Error>(())
            });
        }
    });
    (address, refused)
}

/// Streams that are refused, or left out by a GOAWAY, were not worked on: they are tried again elsewhere, with their bodies.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_were_not_worked_on_are_tried_again() {
    const REFUSED: &[u8] = &[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 7];
    const AWAY: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for frames in [&[REFUSED, AWAY][..], &[AWAY]] {
        let (leaving, refused) = unwilling(frames).await;
        let (at, app) = (free_port(), App::start("a"));
        let mut upstream = cluster("a", &[leaving, app.address]);
        upstream.http2_protocol_options = Some(Http2ProtocolOptions::default());
        let routes = table(vec![route_to(
            prefix("/"),
            retried(policy("refused-stream", 2)),
        )]);
        let _proxy = Proxy::start(&state(
            vec![http_listener(at, |_| {})],
            routes,
            vec![upstream],
        ));
        tokio::task::spawn_blocking(move || {
            for _ in 0..4 {
                let reply = post(&mut Client::connect(at), "body", "");
                assert_eq!(reply.status, 200, "{}", reply.body);
                assert!(reply.body.contains("body: body\n"), "{}", reply.body);
            }
        })
        .await
        .expect("no failure");
        assert!(refused.load(Ordering::Relaxed) > 0);
    }
}
