//! What a request costs in allocations. A program of its own, since the allocator that counts is for a whole process.

#[path = "../it/config.rs"]
#[allow(dead_code, reason = "the other tests need more of it")]
mod config;

use std::alloc::System;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use config::{action, cluster, http_listener, prefix, route_to, state, table};
use mesh_proxy::run::start_workers;
use mesh_proxy::shared::Shared;
use mesh_proxy::{ProxyOptions, Role};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Allocations for one request and its response that a change may not go beyond without being noticed.
const CEILING: usize = 20;
/// Requests that are counted.
const REQUESTS: usize = 500;

const REQUEST: &[u8] = b"GET /a HTTP/1.1\r\nhost: app.test\r\nuser-agent: test\r\n\r\n";
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";

/// Answers every request on every connection, without an allocation for any of them.
fn app() -> SocketAddr {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = socket.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in socket.incoming() {
            let mut stream = stream.expect("a connection");
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                let mut filled = 0;
                while let Ok(length @ 1..) = stream.read(&mut buffer[filled..]) {
                    filled += length;
                    if buffer[..filled].ends_with(b"\r\n\r\n") {
                        filled = 0;
                        stream.write_all(RESPONSE).expect("sent");
                    }
                }
            });
        }
    });
    address
}

fn exchange(stream: &mut TcpStream, buffer: &mut [u8]) {
    stream.write_all(REQUEST).expect("sent");
    let mut filled = 0;
    while !buffer[..filled].ends_with(b"hello") {
        let length = stream.read(&mut buffer[filled..]).expect("a response");
        assert_ne!(length, 0, "the connection ended");
        filled += length;
    }
    assert!(buffer.starts_with(b"HTTP/1.1 200 OK\r\n"));
}

#[test]
fn a_plain_request_allocates_little() {
    let at = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|socket| socket.local_addr())
        .expect("a free port");
    let resources = state(
        vec![http_listener(at, |_| {})],
        table(vec![route_to(prefix("/"), action("app"))]),
        vec![cluster("app", &[app()])],
    );
    let mut options =
        ProxyOptions::from_vars(Role::Sidecar, BTreeMap::new(), Path::new("/nowhere"))
            .expect("options");
    options.concurrency = 1;
    options.discovery.clear();
    let shared = Shared::new(options);
    assert!(shared.publish(&resources).is_empty());
    start_workers(&shared).expect("workers");
    let mut stream = (0..1000)
        .find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            TcpStream::connect(at).ok()
        })
        .expect("an open listener");
    let mut buffer = [0; 4096];
    // Connections, metrics and buffers are made by the first ones.
    for _ in 0..REQUESTS {
        exchange(&mut stream, &mut buffer);
    }
    let before = COUNTING.stats();
    for _ in 0..REQUESTS {
        exchange(&mut stream, &mut buffer);
    }
    let made = COUNTING.stats() - before;
    // Growing in place is work, too.
    let each = (made.allocations + made.reallocations) / REQUESTS;
    println!(
        "{each} allocations for a request, {} bytes",
        made.bytes_allocated / REQUESTS
    );
    assert!(each > 0, "nothing was counted");
    assert!(
        each <= CEILING,
        "{each} allocations for a request, of which there may be {CEILING}"
    );
}
