//! Plain TCP through the proxy.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use crate::config::{cluster, http_listener, state, table, tcp_listener};
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
