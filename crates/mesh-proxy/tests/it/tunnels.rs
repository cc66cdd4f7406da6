//! TCP connections that go through a tunnel: CONNECT and POST, in HTTP/1.1 and HTTP/2, plain and in mutual TLS.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::cluster::v3::cluster::CommonLbConfig;
use envoy_types::pb::envoy::config::cluster::v3::{Cluster, OutlierDetection};
use envoy_types::pb::envoy::config::core::v3::{
    HeaderValue, HeaderValueOption, Http2ProtocolOptions,
};
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::TunnelingConfig;
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf::{Duration as PbDuration, UInt32Value};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty};
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mesh_proxy::upstream::counters::Counter;

use crate::config::{action, cluster, http_listener, route_to, state, table, tcp_listener_with};
use crate::pki::{Pki, client, mesh_context, server};
use crate::servers;
use crate::stage::{Proxy, free_port, wait};

const TARGET: &str = "far.example.com:443";

/// A forward proxy in HTTP/1.1, as far as the tests need one: it answers every head with the same text, and what it lets through is said in
/// capitals.
struct Forward {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Forward {
    fn start(answer: &'static str) -> Self {
        let heads = Arc::<Mutex<Vec<String>>>::default();
        let noted = heads.clone();
        let address = servers::with_threads(move |stream| Self::serve(stream, answer, &noted));
        Self { address, heads }
    }

    fn serve(mut stream: TcpStream, answer: &str, heads: &Mutex<Vec<String>>) {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read(&mut byte).unwrap_or(0) == 0 {
                return;
            }
            head.push(byte[0]);
        }
        let mut head = String::from_utf8(head).expect("a head in ASCII");
        // Nothing may follow before the answer.
        stream
            .set_read_timeout(Some(Duration::from_millis(50)))
            .expect("a timeout");
        let early = stream.read(&mut byte);
        if !early.is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            head.push_str("AND MORE");
        }
        heads.lock().expect("the heads").push(head);
        stream.set_read_timeout(None).expect("no timeout");
        stream.write_all(answer.as_bytes()).expect("written");
        if !answer.contains(" 2") {
            // Held until the other side gives it up.
            let _ = stream.read(&mut byte);
            return;
        }
        let mut heard = [0; 1024];
        while let Ok(n) = stream.read(&mut heard) {
            if n == 0 {
                let _ = stream.write_all(b" and bye");
                return;
            }
            let _ = stream.write_all(&heard[..n].to_ascii_uppercase());
        }
    }

    fn heads(&self) -> Vec<String> {
        self.heads.lock().expect("the heads").clone()
    }
}

fn tunnelled(at: SocketAddr, change: impl FnOnce(&mut TcpProxy, &mut TunnelingConfig)) -> Listener {
    tcp_listener_with(at, "proxy", |proxy| {
        let mut tunnel = TunnelingConfig {
            hostname: TARGET.to_owned(),
            ..TunnelingConfig::default()
        };
        change(proxy, &mut tunnel);
        proxy.tunneling_config = Some(tunnel);
    })
}

fn through(listener: Listener, proxy: Cluster) -> Proxy {
    Proxy::start_with(
        &state(vec![listener], table(Vec::new()), vec![proxy]),
        |_| {},
    )
}

fn connect(at: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(at).expect("a connection");
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    stream
}

fn all(mut client: TcpStream) -> String {
    let mut text = Vec::new();
    let _ = client.read_to_end(&mut text);
    String::from_utf8(text).expect("text")
}

fn count(proxy: &Proxy, counter: Counter) -> u64 {
    let common = proxy.shared.upstreams.find("proxy").expect("the cluster");
    common.total(counter)
}

#[test]
fn connect_in_http1_and_half_close() {
    let forward = Forward::start("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nearly ");
    let at = free_port();
    let listener = tunnelled(at, |_, tunnel| {
        let header = |key: &str, value: &str| HeaderValueOption {
            header: Some(HeaderValue {
                key: key.to_owned(),
                value: value.to_owned(),
                ..HeaderValue::default()
            }),
            ..HeaderValueOption::default()
        };
        tunnel.headers_to_add = vec![
            header("proxy-authorization", "Basic eDp5"),
            header("x-local", "%DOWNSTREAM_LOCAL_ADDRESS%"),
        ];
    });
    let proxy = through(listener, cluster("proxy", &[forward.address]));
    let mut client = connect(at);
    client.write_all(b"hello").expect("written");
    let mut answer = [0; 11];
    client.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"early HELLO");
    // An open tunnel is an open connection; that of the stage, which waits until the listener is open, ends by itself.
    wait(|| count(&proxy, Counter::CxActive) == 1 && count(&proxy, Counter::RqActive) == 1);
    client.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(all(client), " and bye");
    let head = format!(
        "CONNECT {TARGET} HTTP/1.1\r\nproxy-authorization: Basic eDp5\r\nx-local: {at}\r\nhost: {TARGET}\r\n\r\n"
    );
    let heads = forward.heads();
    assert!(heads.iter().all(|seen| *seen == head), "{heads:?}");
    wait(|| count(&proxy, Counter::CxActive) == 0 && count(&proxy, Counter::RqActive) == 0);
    wait(|| {
        proxy.metric("istio_tcp_sent_bytes_total", &[]) >= 19.0
            && proxy.metric("istio_tcp_received_bytes_total", &[]) == 5.0
    });
}

#[test]
fn a_tunnel_that_is_refused_is_asked_for_as_often_as_allowed() {
    let forbidden = "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n";
    for (answer, post) in [
        (forbidden, false),
        (forbidden, true),
        (
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
            false,
        ),
        ("no HTTP at all\r\n\r\n", false),
        // The answer's body would be the way back.
        ("HTTP/1.1 204 No Content\r\n\r\n", true),
    ] {
        let forward = Forward::start(answer);
        let at = free_port();
        let listener = tunnelled(at, |proxy, tunnel| {
            proxy.max_connect_attempts = Some(UInt32Value { value: 2 });
            tunnel.use_post = post;
        });
        let proxy = through(listener, cluster("proxy", &[forward.address]));
        let flags = ["response_flags=\"UF,URX\""];
        let closed = || proxy.metric("istio_tcp_connections_closed_total", &flags);
        // The stage's own connection has ended the same way.
        wait(|| closed() == 1.0);
        assert_eq!(forward.heads().len(), 2, "{answer}");
        let mut client = connect(at);
        let _ = client.write_all(b"hello");
        assert_eq!(all(client), "", "{answer}");
        wait(|| closed() == 2.0);
        assert_eq!(forward.heads().len(), 4, "{answer}");
        assert_eq!(count(&proxy, Counter::CxAttemptsExceeded), 2);
        wait(|| count(&proxy, Counter::CxActive) == 0);
    }
}

#[test]
fn a_server_that_opens_no_tunnels_is_ejected() {
    let forward = Forward::start("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n");
    let at = free_port();
    let config = Cluster {
        outlier_detection: Some(OutlierDetection {
            consecutive_5xx: Some(UInt32Value { value: 2 }),
            max_ejection_percent: Some(UInt32Value { value: 100 }),
            ..OutlierDetection::default()
        }),
        // No panic where it was the only one.
        common_lb_config: Some(CommonLbConfig {
            healthy_panic_threshold: Some(Percent { value: 0.0 }),
            ..CommonLbConfig::default()
        }),
        ..cluster("proxy", &[forward.address])
    };
    let proxy = through(tunnelled(at, |_, _| {}), config);
    let closed = |flags: &str| {
        let flags = format!("response_flags=\"{flags}\"");
        proxy.metric("istio_tcp_connections_closed_total", &[&flags])
    };
    wait(|| closed("UF,URX") == 1.0);
    assert_eq!(all(connect(at)), "");
    wait(|| closed("UF,URX") == 2.0);
    assert_eq!(all(connect(at)), "");
    wait(|| closed("UH") == 1.0);
    assert_eq!(forward.heads().len(), 2);
}

#[test]
fn a_server_that_does_not_answer_is_given_up_after_the_idle_timeout() {
    let forward = Forward::start("");
    let at = free_port();
    let listener = tunnelled(at, |proxy, _| {
        proxy.idle_timeout = Some(PbDuration {
            seconds: 0,
            nanos: 200_000_000,
        });
    });
    let _proxy = through(listener, cluster("proxy", &[forward.address]));
    let ended = connect(at).read_to_end(&mut Vec::new());
    assert!(matches!(ended, Ok(0)), "{ended:?}");
}

/// What the server of tunnels was asked for: method, URI, and the header that was added.
type Asked = Arc<Mutex<Vec<(Method, String)>>>;

/// A server of tunnels in both versions of HTTP that sends back what it hears.
fn both_versions() -> (SocketAddr, Asked) {
    let asked = Asked::default();
    let noted = asked.clone();
    let address = servers::with_tasks(move |stream| {
        let noted = noted.clone();
        async move {
            let service = hyper::service::service_fn(move |request| echo(request, noted.clone()));
            let builder = auto::Builder::new(TokioExecutor::new());
            let serving = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
            let _ = serving.await;
        }
    });
    (address, asked)
}

async fn echo(
    mut request: Request<hyper::body::Incoming>,
    asked: Asked,
) -> Result<Response<BoxBody<Bytes, hyper::Error>>, hyper::Error> {
    let what = (request.method().clone(), request.uri().to_string());
    asked.lock().expect("what was asked").push(what);
    if request.method() == Method::CONNECT {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let stream = TokioIo::new(upgrade.await.expect("a tunnel"));
            let (mut read, mut write) = tokio::io::split(stream);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut write).await;
        });
        let none = Empty::new().map_err(|never| match never {});
        return Ok(Response::new(none.boxed()));
    }
    Ok(Response::new(request.into_body().boxed()))
}

#[test]
fn both_methods_in_both_versions() {
    for (http2, post, path, uri) in [
        (false, false, "", TARGET.to_owned()),
        (true, false, "", TARGET.to_owned()),
        (false, true, "", "/".to_owned()),
        (true, true, "", format!("http://{TARGET}/")),
        (true, true, "/tunnel?x", format!("http://{TARGET}/tunnel?x")),
    ] {
        let (address, asked) = both_versions();
        let at = free_port();
        let listener = tunnelled(at, |_, tunnel| {
            tunnel.use_post = post;
            tunnel.post_path = path.to_owned();
        });
        let mut upstream = cluster("proxy", &[address]);
        upstream.http2_protocol_options = http2.then(Http2ProtocolOptions::default);
        let proxy = through(listener, upstream);
        let large: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
        let mut client = connect(at);
        let mut writer = client.try_clone().expect("another handle");
        let sent = large.clone();
        let writing = std::thread::spawn(move || {
            writer.write_all(&sent).expect("written");
            writer.shutdown(Shutdown::Write).expect("half-closed");
        });
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).expect("read");
        writing.join().expect("all written");
        assert_eq!(heard.len(), large.len(), "http2 {http2} post {post}");
        assert!(heard == large, "http2 {http2} post {post}");
        let method = if post { Method::POST } else { Method::CONNECT };
        let last = asked.lock().expect("what was asked").last().cloned();
        assert_eq!(last, Some((method, uri)), "http2 {http2} post {post}");
        wait(|| count(&proxy, Counter::RqActive) == 0);
    }
}

const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

/// The tunnel's server is another proxy, which asks for a certificate and ends the tunnel by its route.
#[test]
fn in_mutual_tls_through_another_proxy() {
    let pki = Pki::new("root");
    let forward = TcpListener::bind("127.0.0.1:0").expect("a port");
    let echo = forward.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in forward.incoming() {
            let mut stream = stream.expect("a connection");
            let mut heard = [0; 5];
            if stream.read_exact(&mut heard).is_ok() {
                let _ = stream.write_all(&heard.to_ascii_uppercase());
            }
        }
    });
    let inbound = free_port();
    let matcher = route::RouteMatch {
        path_specifier: Some(route::route_match::PathSpecifier::ConnectMatcher(
            route::route_match::ConnectMatcher {},
        )),
        ..Default::default()
    };
    let ended = route::RouteAction {
        upgrade_configs: vec![route::route_action::UpgradeConfig {
            upgrade_type: "CONNECT".to_owned(),
            enabled: None,
            connect_config: Some(Default::default()),
        }],
        ..action("echo")
    };
    let mut listener = http_listener(inbound, |_| {});
    listener.filter_chains[0].transport_socket =
        server(mesh_context(&["h2", "http/1.1"], &[CLIENT]), true);
    let far = Proxy::start(&state(
        vec![listener],
        table(vec![route_to(matcher, ended)]),
        vec![cluster("echo", &[echo])],
    ));
    pki.enrol(&far.shared, SERVER);
    for http2 in [false, true] {
        let at = free_port();
        let alpn = if http2 { "h2" } else { "http/1.1" };
        let mut upstream = cluster("proxy", &[inbound]);
        upstream.transport_socket = client(mesh_context(&[alpn], &[SERVER]), "far.example.com");
        upstream.http2_protocol_options = http2.then(Http2ProtocolOptions::default);
        let near = through(tunnelled(at, |_, _| {}), upstream);
        pki.enrol(&near.shared, CLIENT);
        let mut stream = connect(at);
        stream.write_all(b"hello").expect("written");
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer, b"HELLO", "http2 {http2}");
        drop(stream);
        let labels = ["destination_principal=\"spiffe://cluster.local/ns/default/sa/server\""];
        wait(|| near.metric("istio_tcp_connections_closed_total", &labels) >= 1.0);
    }
}
