//! Changes of the configuration under connections that are open: an unchanged filter chain keeps them, what a changed one has let in has the
//! drain time left.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::listener::v3::Filter;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::rbac::v3::Rbac as Rules;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::UpgradeConfig;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac;
use http_body_util::Empty;
use hyper::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_routing::XdsState;

use crate::balancing::Held;
use crate::config::{
    action, any, cluster, http_listener, prefix, route_to, state, table, tcp_listener,
};
use crate::servers;
use crate::stage::{App, Client, Proxy, echo, free_port, say, wait};

/// Drains for one second.
fn start(state: &XdsState) -> Proxy {
    Proxy::start_with(state, |options| options.drain = Duration::from_secs(1))
}

fn tcp(listeners: Vec<Listener>, upstream: SocketAddr) -> XdsState {
    let clusters = vec![cluster("echo", &[upstream]), cluster("other", &[upstream])];
    state(listeners, table(Vec::new()), clusters)
}

#[test]
fn tcp_connections_of_a_changed_chain_have_the_drain_time() {
    let (changed, removed, kept, echo) = (free_port(), free_port(), free_port(), echo());
    let before = vec![
        tcp_listener(changed, "echo"),
        tcp_listener(removed, "echo"),
        tcp_listener(kept, "echo"),
    ];
    let proxy = start(&tcp(before, echo));
    let mut all = [changed, removed, kept].map(Client::connect);
    for stream in &mut all {
        assert!(say(&mut stream.0, "before"));
    }
    // The same chain in a message of its own, and another cluster for one of the others.
    let after = vec![tcp_listener(changed, "other"), tcp_listener(kept, "echo")];
    proxy.publish(&tcp(after, echo));
    let [mut changed_stream, mut removed_stream, mut kept_stream] = all;
    let leaving = [&mut changed_stream, &mut removed_stream];
    assert!(leaving.map(|s| say(&mut s.0, "they have their time")) == [true; 2]);
    for stream in [&mut changed_stream, &mut removed_stream] {
        assert!(stream.is_closed(), "and then they end");
    }
    assert!(say(&mut kept_stream.0, "an unchanged chain keeps its own"));
    assert!(say(&mut Client::connect(changed).0, "new ones are taken"));
    assert!(TcpStream::connect(removed).is_err());
}

#[test]
fn a_policy_reaches_tcp_connections_that_are_open() {
    let (at, echo) = (free_port(), echo());
    let proxy = start(&tcp(vec![tcp_listener(at, "echo")], echo));
    let mut stream = Client::connect(at);
    assert!(say(&mut stream.0, "before"));
    // Nobody is allowed.
    let rbac = Rbac {
        rules: Some(Rules::default()),
        stat_prefix: "tcp.".to_owned(),
        ..Default::default()
    };
    let filter = Filter {
        name: "rbac".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&rbac))),
    };
    let mut guarded = tcp_listener(at, "echo");
    guarded.filter_chains[0].filters.insert(0, filter);
    proxy.publish(&tcp(vec![guarded], echo));
    assert!(stream.is_closed());
    assert!(!say(&mut Client::connect(at).0, "and nobody gets in"));
}

fn web(at: SocketAddr, server: &str, chain: &str, upstream: SocketAddr) -> XdsState {
    let mut listener = http_listener(at, |manager| {
        manager.server_name = server.to_owned();
        manager.upgrade_configs.push(UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..Default::default()
        });
    });
    listener.filter_chains[0].name = chain.to_owned();
    let routes = table(vec![route_to(prefix("/"), action("app"))]);
    state(vec![listener], routes, vec![cluster("app", &[upstream])])
}

/// Agrees to upgrades and says then what it hears.
fn upgrading() -> SocketAddr {
    servers::with_threads(|stream| {
        let mut app = Client(stream);
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && app.0.read(&mut byte).is_ok_and(|n| n == 1) {
            head.push(byte[0]);
        }
        app.send("HTTP/1.1 101 Yes\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n");
        let mut reader = app.0.try_clone().expect("a second handle");
        let _ = std::io::copy(&mut reader, &mut app.0);
    })
}

#[test]
fn upgraded_connections_of_a_changed_chain_have_the_drain_time() {
    let (at, app) = (free_port(), upgrading());
    let proxy = start(&web(at, "one", "c", app));
    let upgraded = || {
        let mut client = Client::connect(at);
        let reply = client.get("/", "connection: upgrade\r\nupgrade: websocket\r\n");
        assert_eq!(reply.status, 101);
        assert!(say(&mut client.0, "hello"));
        client
    };
    let mut stream = upgraded();
    // The same again changes nothing.
    proxy.publish(&web(at, "one", "c", app));
    proxy.publish(&web(at, "two", "c", app));
    // Until the worker has seen it.
    wait(|| Client::connect(at).get("/", "").header("server") == Some("two"));
    let mut later = upgraded();
    assert!(say(&mut stream.0, "it has its time"));
    assert!(stream.is_closed(), "and then it ends");
    assert!(say(&mut later.0, "this one is of the new chain"));
}

#[test]
fn http_connections_go_on_where_only_what_requests_meet_has_changed() {
    let (at, app) = (free_port(), Held::start("app"));
    let proxy = start(&web(at, "one", "c", app.address));
    let mut idle = Client::connect(at);
    app.gate.add_permits(1);
    assert_eq!(idle.get("/", "").header("server"), Some("one"));
    let mut running = Client::connect(at);
    running.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    wait(|| app.requests() == 2);
    proxy.publish(&web(at, "two", "c", app.address));
    // What runs under the old version has its time, and not more.
    assert!(running.is_closed());
    // One more, should the endpoint not have noticed yet that nobody waits for the other answer.
    app.gate.add_permits(3);
    for _ in 0..2 {
        let reply = idle.get("/", "");
        let found = (reply.header("server"), reply.header("connection"));
        assert_eq!(
            found,
            (Some("two"), None),
            "the same connection, judged anew"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_connections_of_a_chain_that_is_gone_are_told_to_end() {
    let (at, app) = (free_port(), App::start("app"));
    let proxy = start(&web(at, "one", "old", app.address));
    let stream = tokio::net::TcpStream::connect(at)
        .await
        .expect("a connection");
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("a handshake");
    let connection = tokio::spawn(connection);
    let request = Request::get("http://app.test/").body(Empty::<Bytes>::new());
    let response = sender.send_request(request.expect("a request")).await;
    assert_eq!(response.expect("a response").status(), 200);
    let address = app.address;
    let check = tokio::task::spawn_blocking(move || {
        let (mut used, mut idle) = (Client::connect(at), Client::connect(at));
        for client in [&mut used, &mut idle] {
            assert_eq!(client.get("/", "").header("connection"), None);
        }
        proxy.publish(&web(at, "two", "new", address));
        // Until the worker has seen it.
        wait(|| Client::connect(at).get("/", "").header("server") == Some("two"));
        let last = used.get("/", "");
        assert_eq!(
            (last.status, last.header("connection")),
            (200, Some("close"))
        );
        assert!(idle.is_closed(), "when the time is over");
        proxy
    });
    // GOAWAY: with no stream left the connection ends at once.
    let ended = tokio::time::timeout(Duration::from_secs(8), connection).await;
    let ended = ended.expect("it ends").expect("a task");
    ended.expect("in peace");
    drop(check.await.expect("no failure"));
}

/// Answers in two halves, the second one well after a change was noticed.
fn slow() -> SocketAddr {
    servers::with_threads(|mut stream| {
        let mut buffer = [0; 4096];
        while stream.read(&mut buffer).is_ok_and(|read| read > 0) {
            let head = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst";
            if stream.write_all(head).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(3500));
            if stream.write_all(b" half").is_err() {
                return;
            }
        }
    })
}

#[test]
fn a_request_behind_a_long_answer_is_not_lost_with_a_change() {
    let (at, upstream) = (free_port(), slow());
    let proxy = Proxy::start_with(&web(at, "one", "chain", upstream), |options| {
        options.drain = Duration::from_secs(30);
    });
    let mut client = Client::connect(at);
    let request = "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n";
    client.send(request);
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    let mut read_until = |client: &mut Client, done: &dyn Fn(&str) -> bool| {
        while !done(&seen) {
            let read = client.0.read(&mut buffer).expect("an answer in time");
            assert!(read > 0, "closed after {seen:?}");
            seen.push_str(std::str::from_utf8(&buffer[..read]).expect("text"));
        }
    };
    read_until(&mut client, &|seen| seen.ends_with("first"));
    proxy.publish(&web(at, "two", "chain", upstream));
    // The next one is sent before the first one's answer ends.
    client.send(request);
    read_until(&mut client, &|seen| seen.matches("first half").count() == 2);
}
