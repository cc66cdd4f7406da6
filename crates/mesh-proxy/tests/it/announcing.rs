//! Endpoints that are told of the client by the PROXY protocol.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster};
use envoy_types::pb::envoy::config::core::v3::proxy_protocol_config::Version;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{ProxyProtocolConfig, TransportSocket};
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use envoy_types::pb::google::protobuf::UInt32Value;

use crate::config::{
    action, any, cluster, http_listener, prefix, route_to, state, table, tcp_listener,
};
use crate::pki::{Pki, client, mesh_context};
use crate::servers::with_threads;
use crate::stage::{Client, Proxy, free_port};

/// Puts the PROXY protocol around a cluster's transport.
fn announce(mut cluster: Cluster, version: Version) -> Cluster {
    let raw = TransportSocket {
        name: "envoy.transport_sockets.raw_buffer".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&RawBuffer {}))),
    };
    let outer = ProxyProtocolUpstreamTransport {
        config: Some(ProxyProtocolConfig {
            version: version as i32,
            ..ProxyProtocolConfig::default()
        }),
        transport_socket: Some(cluster.transport_socket.take().unwrap_or(raw)),
        ..ProxyProtocolUpstreamTransport::default()
    };
    cluster.transport_socket = Some(TransportSocket {
        name: "envoy.transport_sockets.upstream_proxy_protocol".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&outer))),
    });
    cluster
}

/// Reads to the end of a line, or of a head; nothing where the connection ends before.
fn until(stream: &mut TcpStream, end: &[u8]) -> Vec<u8> {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !text.ends_with(end) {
        if stream.read(&mut byte).unwrap_or(0) == 0 {
            return Vec::new();
        }
        text.push(byte[0]);
    }
    text
}

#[test]
fn both_versions_before_the_bytes_of_tcp() {
    for (version, length) in [(Version::V1, None), (Version::V2, Some(28))] {
        // Sends back what it gets, the header too.
        let address = with_threads(|mut stream| {
            let mut heard = [0; 256];
            while let Ok(n) = stream.read(&mut heard)
                && n > 0
            {
                let _ = stream.write_all(&heard[..n]);
            }
        });
        let at = free_port();
        let _proxy = Proxy::start(&state(
            vec![tcp_listener(at, "told")],
            table(Vec::new()),
            vec![announce(cluster("told", &[address]), version)],
        ));
        // The header comes before the client has said anything.
        let mut client = TcpStream::connect(at).expect("a connection");
        let from = client.local_addr().expect("its address");
        let header = match length {
            None => until(&mut client, b"\r\n"),
            Some(length) => {
                let mut header = vec![0; length];
                client.read_exact(&mut header).expect("a header");
                header
            }
        };
        let expected = match version {
            Version::V1 => format!(
                "PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n",
                from.port(),
                at.port()
            )
            .into_bytes(),
            Version::V2 => [
                &b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x01\x7f\x00\x00\x01"[..],
                &from.port().to_be_bytes(),
                &at.port().to_be_bytes(),
            ]
            .concat(),
        };
        assert_eq!(header, expected);
        client.write_all(b"hello").expect("written");
        let mut echo = [0; 5];
        client.read_exact(&mut echo).expect("the echo");
        assert_eq!(&echo, b"hello");
    }
}

/// Answers every request with the line that its connection began with.
fn reflector() -> (SocketAddr, Arc<AtomicUsize>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let address = with_threads(move |mut stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        let line = until(&mut stream, b"\r\n");
        while !until(&mut stream, b"\r\n\r\n").is_empty() {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", line.len());
            let _ = stream.write_all(&[head.as_bytes(), &line].concat());
        }
    });
    (address, connections)
}

fn web(at: SocketAddr, upstream: Cluster) -> Proxy {
    Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        table(vec![route_to(prefix("/"), action(&upstream.name))]),
        vec![upstream],
    ))
}

fn line(client: &Client, at: SocketAddr) -> String {
    let from = client.0.local_addr().expect("its address");
    format!(
        "PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n",
        from.port(),
        at.port()
    )
}

#[test]
fn requests_of_different_clients_do_not_share_a_connection() {
    let (address, connections) = reflector();
    let at = free_port();
    let _proxy = web(at, announce(cluster("told", &[address]), Version::V1));
    let (mut one, mut two) = (Client::connect(at), Client::connect(at));
    for _ in 0..2 {
        assert_eq!(one.get("/", "").body, line(&one, at));
        assert_eq!(two.get("/", "").body, line(&two, at));
    }
    assert_eq!(connections.load(Ordering::Relaxed), 2, "each used again");
}

#[test]
fn an_unused_connection_of_another_client_gives_way_at_the_limit() {
    let (address, connections) = reflector();
    let at = free_port();
    let mut upstream = announce(cluster("told", &[address]), Version::V1);
    upstream.circuit_breakers = Some(CircuitBreakers {
        thresholds: vec![Thresholds {
            max_connections: Some(UInt32Value { value: 1 }),
            ..Thresholds::default()
        }],
        ..CircuitBreakers::default()
    });
    let _proxy = web(at, upstream);
    for _ in 0..3 {
        let mut client = Client::connect(at);
        assert_eq!(client.get("/", "").body, line(&client, at));
    }
    assert_eq!(connections.load(Ordering::Relaxed), 3);
}

#[test]
fn the_header_stands_before_the_handshake() {
    let (said, heard) = std::sync::mpsc::channel();
    let address = with_threads(move |mut stream| {
        let line = until(&mut stream, b"\r\n");
        let mut record = [0; 3];
        if stream.read_exact(&mut record).is_ok() {
            let _ = said.send((line, record));
        }
    });
    let at = free_port();
    let mut upstream = cluster("told", &[address]);
    upstream.transport_socket = client(mesh_context(&["istio"], &["spiffe://x"]), "told.test");
    let proxy = Proxy::start(&state(
        vec![http_listener(at, |_| {})],
        table(vec![route_to(prefix("/"), action("told"))]),
        vec![announce(upstream, Version::V1)],
    ));
    Pki::new("root").enrol(&proxy.shared, "spiffe://cluster.local/ns/default/sa/client");
    let mut client = Client::connect(at);
    let expected = line(&client, at);
    assert_eq!(client.get("/", "").status, 503, "this server speaks no TLS");
    let (line, record) = heard
        .recv_timeout(std::time::Duration::from_secs(10))
        .expect("a connection");
    assert_eq!(String::from_utf8_lossy(&line), expected);
    assert_eq!(record, [0x16, 3, 1], "a ClientHello");
}
