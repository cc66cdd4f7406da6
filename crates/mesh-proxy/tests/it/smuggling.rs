//! HTTP/1 requests and answers whose borders two parsers could see in different places.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use envoy_types::pb::envoy::config::core::v3::Http1ProtocolOptions;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::google::protobuf::Duration;

use crate::config::{action, cluster, http_listener, prefix, route_to, state, table};
use crate::servers;
use crate::stage::{App, Client, Proxy, free_port, wait};

fn start(endpoints: &[SocketAddr], http10: bool) -> (SocketAddr, Proxy) {
    let at = free_port();
    let direct = route::Route {
        r#match: Some(prefix("/direct")),
        action: Some(route::route::Action::DirectResponse(
            route::DirectResponseAction {
                status: 403,
                ..Default::default()
            },
        )),
        ..Default::default()
    };
    let listener = http_listener(at, |manager| {
        manager.http_protocol_options = Some(Http1ProtocolOptions {
            accept_http_10: http10,
            ..Default::default()
        });
    });
    let routes = table(vec![direct, route_to(prefix("/"), action("a"))]);
    let proxy = Proxy::start(&state(
        vec![listener],
        routes,
        vec![cluster("a", endpoints)],
    ));
    (at, proxy)
}

/// Refused, the connection closed, nothing forwarded.
fn check_refused(at: SocketAddr, app: &App, request: &str, statuses: &[u16]) {
    let mut client = Client::connect(at);
    client.send(request);
    let status = client.reply().map(|r| r.status);
    assert!(
        status.is_none_or(|s| statuses.contains(&s)),
        "{request:?} gave {status:?}"
    );
    assert!(client.is_closed(), "{request:?} left the connection open");
    assert_eq!(
        app.connections.load(Ordering::Relaxed),
        0,
        "{request:?} was forwarded"
    );
}

#[test]
fn two_lengths_are_refused_in_any_order() {
    let app = App::start("a");
    let (at, _proxy) = start(&[app.address], false);
    for request in [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTRANSFER-encoding: chunked\r\ncontent-LENGTH:5\r\n\r\n0\r\n\r\n",
    ] {
        check_refused(at, &app, request, &[400]);
        // In pieces of one byte, too.
        let mut client = Client::connect(at);
        for byte in request.bytes() {
            if client.0.write_all(&[byte]).is_err() {
                break;
            }
        }
        assert!(matches!(client.reply().map(|r| r.status), Some(400) | None));
        assert!(client.is_closed());
    }
    // Behind another request, cut where both are there but not the end of the head.
    let mut client = Client::connect(at);
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n");
    assert_eq!(client.reply().expect("a reply").status, 200);
    client.send("\r\n0\r\n\r\n");
    assert_eq!(client.reply().expect("a reply").status, 400);
    assert!(client.is_closed());
    // Each alone is fine, one after the other.
    let mut client = Client::connect(at);
    for _ in 0..2 {
        client.send(
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n\nContent-Length: 5\n\n",
        );
        assert_eq!(client.reply().expect("a reply").status, 200);
        client.send(
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        );
        assert_eq!(client.reply().expect("a reply").status, 200);
    }
}

#[test]
fn broken_framing_is_refused() {
    let app = App::start("a");
    let (at, _proxy) = start(&[app.address], false);
    for request in [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5,6\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5 5\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n",
        "G=ET / HTTP/1.1\r\nHost a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
        "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    ] {
        check_refused(at, &app, request, &[400, 426, 501, 505]);
    }
}

#[test]
fn broken_chunks_never_reach_the_endpoint_as_a_whole_request() {
    for chunks in [
        "-5\r\nhello\r\n0\r\n\r\n",
        " 5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        "5\r\nhelloXX0\r\n\r\n",
        "5\rhello\r\n0\r\n\r\n",
        "g\r\nhello\r\n0\r\n\r\n",
    ] {
        let app = App::start("a");
        let (at, proxy) = start(&[app.address], false);
        let mut client = Client::connect(at);
        client.send(&format!(
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
        ));
        let reply = client.reply();
        assert!(
            reply.as_ref().is_none_or(|r| r.status >= 400),
            "{chunks:?}: {reply:?}"
        );
        assert!(client.is_closed(), "{chunks:?} left the connection open");
        wait(|| proxy.shared.totals.open.load(Ordering::Relaxed) == 0);
    }
}

#[test]
fn the_body_of_a_refused_request_is_not_taken_for_a_request() {
    let app = App::start("a");
    let (at, _proxy) = start(&[app.address], false);
    let inner = "GET /inner HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut client = Client::connect(at);
    client.send(&format!(
        "POST /direct HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{inner}",
        inner.len()
    ));
    assert_eq!(client.reply().expect("a reply").status, 403);
    client.send("GET /second HTTP/1.1\r\nHost: a\r\n\r\n");
    if let Some(reply) = client.reply() {
        assert!(reply.body.contains("GET /second "), "{}", reply.body);
    }
    // A body that never comes: the connection cannot be used again.
    let mut client = Client::connect(at);
    client.send("POST /direct HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n");
    assert_eq!(client.reply().expect("a reply").status, 403);
    client.send(&format!("{inner}{inner}"));
    assert!(client.reply().is_none(), "the inner request was answered");
}

#[test]
fn http_10_is_served_where_allowed() {
    let app = App::start("a");
    let (at, _proxy) = start(&[app.address], true);
    let mut client = Client::connect(at);
    client.send("GET / HTTP/1.0\r\nHost: a\r\n\r\n");
    let reply = client.reply().expect("a reply");
    assert_eq!(reply.status, 200);
    assert!(reply.body.contains("GET / HTTP/1.1\n"), "{}", reply.body);
    assert!(client.is_closed());
    let mut client = Client::connect(at);
    for _ in 0..2 {
        client.send("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!(client.reply().expect("a reply").status, 200);
    }
    // A body without a length is none, and what follows is not a second request.
    let mut client = Client::connect(at);
    client.send("POST / HTTP/1.0\r\nHost: a\r\n\r\nGET /inner HTTP/1.0\r\nHost: a\r\n\r\n");
    let first = client.reply().expect("a reply");
    assert!(
        first.body.contains("body: \n") || first.status == 400,
        "{}",
        first.body
    );
    assert!(client.is_closed());
}

#[test]
fn pipelined_requests_are_answered_in_order_and_others_are_not_kept_waiting() {
    let app = App::start("a");
    let (at, _proxy) = start(&[app.address], false);
    let mut client = Client::connect(at);
    let count = 2000;
    let all: String = (0..count)
        .map(|i| format!("GET /{i} HTTP/1.1\r\nHost: a\r\n\r\n"))
        .collect();
    let mut writer = client.0.try_clone().expect("a clone");
    let writing = std::thread::spawn(move || writer.write_all(all.as_bytes()));
    assert_eq!(Client::connect(at).get("/bystander", "").status, 200);
    for i in 0..count {
        let reply = client.reply().expect("a reply");
        assert!(
            reply.body.contains(&format!("GET /{i} HTTP")),
            "{i}: {}",
            reply.body
        );
    }
    writing.join().expect("no panic").expect("written");
}

/// An endpoint that answers every request with the same bytes.
fn hostile(answer: &'static [u8]) -> (SocketAddr, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    let address = servers::with_threads(move |mut stream| {
        counter.fetch_add(1, Ordering::Relaxed);
        let mut seen = [0; 4096];
        while stream.read(&mut seen).is_ok_and(|n| n > 0) {
            if stream.write_all(answer).is_err() {
                return;
            }
        }
    });
    (address, count)
}

#[test]
fn connections_to_lying_endpoints_are_not_used_again() {
    for (answer, statuses) in [
        // Two answers to one request.
        (&b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\naHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nb"[..], &[200][..]),
        // More than was announced.
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nabc", &[200]),
        // A body where there can be none.
        (b"HTTP/1.1 204 No\r\n\r\nbody", &[204]),
        (b"HTTP/1.1 304 No\r\ncontent-length: 4\r\n\r\nbody", &[304]),
        // No HTTP at all.
        (b"nonsense\r\n\r\n", &[502, 503]),
        (b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", &[502, 503]),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", &[502, 503]),
        (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", &[502, 503]),
    ] {
        let (address, count) = hostile(answer);
        let (at, _proxy) = start(&[address], false);
        for i in 1..=3 {
            let mut client = Client::connect(at);
            client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
            let mut head = [0; 12];
            client.0.read_exact(&mut head).expect("a status line");
            let status: u16 = String::from_utf8_lossy(&head[9..]).parse().expect("a status");
            assert!(statuses.contains(&status), "{status} for {:?}", String::from_utf8_lossy(answer));
            // Time for what is too much to arrive.
            std::thread::sleep(std::time::Duration::from_millis(30));
            let opened = count.load(Ordering::Relaxed);
            assert!(opened >= i, "{opened} connections after {i} requests: {:?}", String::from_utf8_lossy(answer));
        }
    }
}

#[test]
fn interim_answers_without_end_and_huge_heads_are_cut_off() {
    let endless: &'static [u8] = "HTTP/1.1 100 Continue\r\n\r\n"
        .repeat(100_000)
        .leak()
        .as_bytes();
    let huge: &'static [u8] = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "x".repeat(10 << 20))
        .leak()
        .as_bytes();
    for answer in [endless, huge] {
        let (address, _) = hostile(answer);
        let at = free_port();
        let to = route::RouteAction {
            timeout: Some(Duration {
                seconds: 2,
                nanos: 0,
            }),
            ..action("a")
        };
        let _proxy = Proxy::start(&state(
            vec![http_listener(at, |_| {})],
            table(vec![route_to(prefix("/"), to)]),
            vec![cluster("a", &[address])],
        ));
        let reply = Client::connect(at).get("/", "");
        assert!(matches!(reply.status, 502..=504), "{}", reply.head);
    }
}

#[test]
fn slow_heads_and_slow_readers_end() {
    let app = App::start("a");
    let at = free_port();
    let second = |seconds| Some(Duration { seconds, nanos: 0 });
    let listener = http_listener(at, |manager| {
        manager.request_headers_timeout = second(1);
        manager.stream_idle_timeout = second(1);
    });
    let proxy = Proxy::start(&state(
        vec![listener],
        table(vec![route_to(prefix("/"), action("a"))]),
        vec![cluster("a", &[app.address])],
    ));
    // A byte now and then.
    let mut slow = Client::connect(at);
    slow.send("GET / HTTP/1.1\r\nHo");
    // Somebody who asks for much and reads nothing of it.
    let mut deaf = Client::connect(at);
    let large = "x".repeat(24 << 20);
    let mut writer = deaf.0.try_clone().expect("a clone");
    std::thread::spawn(move || {
        let head = format!(
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
            large.len()
        );
        let _ = writer.write_all(head.as_bytes());
        let _ = writer.write_all(large.as_bytes());
    });
    assert_eq!(Client::connect(at).get("/bystander", "").status, 200);
    assert!(slow.is_closed());
    wait(|| proxy.shared.totals.open.load(Ordering::Relaxed) == 0);
    drop(deaf.reply());
}
