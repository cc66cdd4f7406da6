//! Mirrored requests.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::mpsc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::RuntimeFractionalPercent;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::route_action::RequestMirrorPolicy;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;

use crate::config::{action, always, cluster, filtered};
use crate::stage::{App, Client, Proxy, free_port};

fn mirror(cluster: &str) -> RequestMirrorPolicy {
    RequestMirrorPolicy {
        cluster: cluster.to_owned(),
        ..Default::default()
    }
}

/// An application that says on a channel what it was sent.
fn witness() -> (SocketAddr, mpsc::Receiver<String>) {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = socket.local_addr().expect("its address");
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = socket.accept() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut seen = Vec::new();
                let mut buffer = [0; 4096];
                while let Ok(n) = stream.read(&mut buffer) {
                    if n == 0 {
                        break;
                    }
                    seen.extend_from_slice(&buffer[..n]);
                    let text = String::from_utf8_lossy(&seen).into_owned();
                    let Some((head, body)) = text.split_once("\r\n\r\n") else {
                        continue;
                    };
                    let length = head
                        .lines()
                        .find_map(|l| l.strip_prefix("content-length: "));
                    let chunked = head.contains("transfer-encoding: chunked");
                    let length: usize = length.map_or(0, |l| l.parse().expect("a length"));
                    if body.len() >= length && (!chunked || body.ends_with("0\r\n\r\n")) {
                        let _ = sender.send(text.clone());
                        let _ =
                            stream.write_all(b"HTTP/1.1 500 No\r\ncontent-length: 3\r\n\r\nno!");
                        seen.clear();
                    }
                }
            });
        }
    });
    (address, receiver)
}

#[test]
fn mirrors_get_copies_and_their_answers_are_discarded() {
    let (at, app) = (free_port(), App::start("a"));
    let (one, saw_one) = witness();
    let (two, saw_two) = witness();
    let mut to = action("a");
    to.request_mirror_policies = vec![
        mirror("one"),
        RequestMirrorPolicy {
            disable_shadow_host_suffix_append: true,
            runtime_fraction: always(),
            ..mirror("two")
        },
        mirror("missing"),
        RequestMirrorPolicy {
            runtime_fraction: Some(RuntimeFractionalPercent {
                default_value: Some(FractionalPercent::default()),
                ..Default::default()
            }),
            ..mirror("one")
        },
    ];
    to.prefix_rewrite_for_test();
    let _proxy = Proxy::start(&filtered(
        at,
        vec![],
        to,
        &[],
        vec![
            cluster("a", &[app.address]),
            cluster("one", &[one]),
            cluster("two", &[two]),
        ],
    ));
    let mut client = Client::connect(at);
    for i in 0..3 {
        client.send(&format!(
            "POST /{i} HTTP/1.1\r\nHost: app.test:80\r\nContent-Length: 5\r\n\r\nhello"
        ));
        let reply = client.reply().expect("a reply");
        assert!(
            reply.status == 200 && reply.body.contains("body: hello\n"),
            "{}",
            reply.body
        );
        for (saw, host) in [(&saw_one, "app.test-shadow:80"), (&saw_two, "app.test:80")] {
            let copy = saw.recv_timeout(Duration::from_secs(10)).expect("a copy");
            assert!(
                copy.starts_with(&format!("POST /new/{i} HTTP/1.1\r\n")),
                "{copy}"
            );
            assert!(copy.contains(&format!("host: {host}\r\n")), "{copy}");
            assert!(copy.ends_with("\r\n\r\nhello"), "{copy}");
        }
    }
    client.send("POST /chunked HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    assert_eq!(client.reply().expect("a reply").status, 200);
    let copy = saw_one
        .recv_timeout(Duration::from_secs(10))
        .expect("a copy");
    assert!(copy.ends_with("3\r\nabc\r\n0\r\n\r\n"), "{copy}");
    assert_eq!(client.get("/get", "").status, 200);
    let copy = saw_one
        .recv_timeout(Duration::from_secs(10))
        .expect("a copy");
    assert!(copy.starts_with("GET /new/get "), "{copy}");
    assert!(
        saw_one.try_recv().is_err(),
        "the fraction of zero copies nothing"
    );
}

trait Rewritten {
    fn prefix_rewrite_for_test(&mut self);
}

impl Rewritten for route::RouteAction {
    /// Copies are those of the rewritten request.
    fn prefix_rewrite_for_test(&mut self) {
        self.prefix_rewrite = "/new/".to_owned();
    }
}

#[test]
fn a_mirror_that_reads_nothing_does_not_hold_the_request_up() {
    let (at, app) = (free_port(), App::start("a"));
    let deaf = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let mut to = action("a");
    to.request_mirror_policies = vec![mirror("deaf")];
    let _proxy = Proxy::start(&filtered(
        at,
        vec![],
        to,
        &[],
        vec![
            cluster("a", &[app.address]),
            cluster("deaf", &[deaf.local_addr().expect("an address")]),
        ],
    ));
    let mut client = Client::connect(at);
    let large = "x".repeat(16 << 20);
    for _ in 0..2 {
        client.send(&format!(
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{large}",
            large.len()
        ));
        let reply = client.reply().expect("a reply");
        assert!(reply.status == 200 && reply.body.contains(&large));
    }
    // The copy was broken off as soon as too much of it waited.
    let (mut stream, _) = deaf.accept().expect("the copy's connection");
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    let mut read = Vec::new();
    let _ = stream.read_to_end(&mut read);
    assert!(read.len() < 16 << 20, "{}", read.len());
}
