//! Plain TCP through the proxy.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use envoy_types::pb::google::protobuf::Duration;

use crate::config::{cluster, http_listener, state, table, tcp_listener, tcp_listener_with};
use crate::stage::{Proxy, free_port, wait};

#[test]
fn bytes_pass_and_half_close_is_kept() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let upstream = socket.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in socket.incoming() {
            let mut stream = stream.expect("a connection");
            let mut all = Vec::new();
            // Only answers once the client has closed its half.
            if stream.read_to_end(&mut all).is_ok() && !all.is_empty() {
                all.reverse();
                stream.write_all(&all).expect("written");
            }
        }
    });
    let (at, web) = (free_port(), free_port());
    let listeners = vec![tcp_listener(at, "tcp"), http_listener(web, |_| {})];
    let proxy = Proxy::start(&state(
        listeners,
        table(Vec::new()),
        vec![cluster("tcp", &[upstream])],
    ));
    let mut client = TcpStream::connect(at).expect("a connection");
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    client.write_all(&sent).expect("written");
    client.shutdown(Shutdown::Write).expect("half-closed");
    let mut received = Vec::new();
    client.read_to_end(&mut received).expect("read");
    received.reverse();
    assert!(
        received == sent,
        "{} of {} bytes came back",
        received.len(),
        sent.len()
    );
    let labels = [
        "request_protocol=\"tcp\"",
        "destination_workload=\"tcp-workload\"",
    ];
    wait(|| proxy.metric("istio_tcp_received_bytes_total", &labels) == 1_000_000.0);
    assert_eq!(
        proxy.metric("istio_tcp_sent_bytes_total", &labels),
        1_000_000.0
    );
    wait(|| {
        proxy.metric("istio_tcp_connections_closed_total", &labels)
            == proxy.metric("istio_tcp_connections_opened_total", &labels)
    });
}

#[test]
fn a_cluster_without_endpoints_closes_the_connection() {
    let at = free_port();
    let proxy = Proxy::start(&state(
        vec![tcp_listener(at, "none")],
        table(Vec::new()),
        vec![cluster("none", &[])],
    ));
    let mut client = TcpStream::connect(at).expect("a connection");
    assert!(matches!(client.read(&mut [0; 8]), Ok(0) | Err(_)));
    wait(|| {
        proxy.metric(
            "istio_tcp_connections_closed_total",
            &["response_flags=\"UH\""],
        ) >= 1.0
    });
}

#[test]
fn silent_and_long_connections_end() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let upstream = socket.local_addr().expect("its address");
    std::thread::spawn(move || {
        // Held, and nothing said.
        let _held: Vec<_> = socket.incoming().collect();
    });
    let duration = |millis: i32| {
        Some(Duration {
            seconds: 0,
            nanos: millis * 1_000_000,
        })
    };
    let (idle, long) = (free_port(), free_port());
    let listeners = vec![
        tcp_listener_with(idle, "tcp", |m| m.idle_timeout = duration(200)),
        tcp_listener_with(long, "tcp", |m| {
            m.max_downstream_connection_duration = duration(300);
        }),
    ];
    let proxy = Proxy::start(&state(
        listeners,
        table(Vec::new()),
        vec![cluster("tcp", &[upstream])],
    ));
    for at in [idle, long] {
        let mut client = TcpStream::connect(at).expect("a connection");
        client.write_all(b"hello").expect("written");
        client
            .set_read_timeout(Some(std::time::Duration::from_secs(10)))
            .expect("a timeout");
        assert_eq!(client.read(&mut [0; 8]).expect("an end"), 0, "{at}");
    }
    wait(|| {
        proxy.metric(
            "istio_tcp_connections_closed_total",
            &["response_flags=\"DT\""],
        ) >= 1.0
    });
}
