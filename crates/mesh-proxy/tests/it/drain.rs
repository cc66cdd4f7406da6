//! SIGTERM: what is under way ends in peace. The proxy runs in a process of its own, since a signal is for a whole process.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use http_body_util::Full;
use hyper::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_proxy::{Ports, run};
use mesh_routing::compile::{CLUSTER, LISTENER, ROUTE};
use prost::Message;

use crate::balancing::Held;
use crate::config::{action, cluster, http_listener, prefix, route_to, table, tcp_listener};
use crate::process::{LOCAL, ask, keep, options};
use crate::stage::{Client, echo, free_port, say, wait};

/// Set for the process that is the proxy: health port, admin port, agent's port, seconds to drain, state directory.
const CHILD: &str = "MESH_PROXY_DRAIN_TEST";
/// Set for a proxy that the last connection ends.
const UNTIL_THE_LAST: &str = "MESH_PROXY_DRAIN_TEST_UNTIL_THE_LAST";

/// Not a test by itself: the entry of the other process.
#[test]
fn the_other_process() {
    let Ok(text) = std::env::var(CHILD) else {
        return;
    };
    let mut parts = text.splitn(5, ' ');
    let mut number = || -> u16 { parts.next().and_then(|p| p.parse().ok()).expect("a number") };
    let (health, admin, agent, seconds) = (number(), number(), number(), number());
    let mut options = options(Path::new(parts.next().expect("a folder")));
    options.termination_drain = Duration::from_secs(seconds.into());
    options.drain = Duration::from_secs(1);
    options.exit_on_zero = std::env::var(UNTIL_THE_LAST)
        .is_ok()
        .then_some(Duration::from_millis(100));
    options.ports = Ports {
        admin,
        health,
        agent,
        metrics: 0,
    };
    run(options).expect("a clean end");
}

struct Proxy {
    process: Child,
    health: u16,
    admin: u16,
    agent: u16,
    http: SocketAddr,
    /// From outside the workload.
    inbound: SocketAddr,
    tcp: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Proxy {
    async fn start(app: SocketAddr, echo: SocketAddr, seconds: u16) -> Self {
        Self::start_with(app, echo, seconds, &[]).await
    }

    async fn start_with(
        app: SocketAddr,
        echo: SocketAddr,
        seconds: u16,
        variables: &[&str],
    ) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (http, inbound, tcp) = (free_port(), free_port(), free_port());
        let mut listeners = [
            http_listener(http, |_| {}),
            http_listener(inbound, |_| {}),
            tcp_listener(tcp, "echo"),
        ];
        "inbound".clone_into(&mut listeners[1].name);
        for listener in &mut listeners[1..] {
            listener.traffic_direction = TrafficDirection::Inbound as i32;
        }
        let routes = table(vec![route_to(prefix("/"), action("app"))]);
        let mut resources = vec![
            (
                CLUSTER,
                "app".to_owned(),
                cluster("app", &[app]).encode_to_vec(),
            ),
            (
                CLUSTER,
                "echo".to_owned(),
                cluster("echo", &[echo]).encode_to_vec(),
            ),
            (ROUTE, "routes".to_owned(), routes.encode_to_vec()),
        ];
        resources.extend(
            listeners
                .iter()
                .map(|l| (LISTENER, l.name.clone(), l.encode_to_vec())),
        );
        keep(dir.path(), resources).await;
        let [health, admin, agent] = [(); 3].map(|()| free_port().port());
        let log = dir.path().join("log");
        let mut process = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "drain::the_other_process", "--nocapture"])
            .env(
                CHILD,
                format!(
                    "{health} {admin} {agent} {seconds} {}",
                    dir.path().display()
                ),
            )
            .envs(variables.iter().map(|name| (name, "1")))
            .stdout(Stdio::null())
            .stderr(File::create(&log).expect("a file"))
            .spawn()
            .expect("another process");
        for attempt in 0.. {
            if TcpStream::connect((Ipv4Addr::LOCALHOST, health)).is_ok() {
                break;
            }
            let ended = process.try_wait().expect("its status").is_some();
            if ended || attempt == 4000 {
                panic!("it does not serve: {:?}", std::fs::read_to_string(&log));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        wait(|| ask(health, "GET", "/healthz/ready", LOCAL).status == 200);
        Self {
            process,
            health,
            admin,
            agent,
            http,
            inbound,
            tcp,
            _dir: dir,
        }
    }

    fn terminate(&self) {
        let pid = i32::try_from(self.process.id()).expect("a process id");
        let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("its process");
        wait(|| ask(self.health, "GET", "/healthz/ready", LOCAL).status == 503);
    }

    fn wait_for_end(&mut self) {
        for _ in 0..1000 {
            if let Some(status) = self.process.try_wait().expect("its status") {
                assert!(status.success(), "{status}");
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the proxy does not end");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Where a test fails half-way.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn sigterm_lets_everything_end_in_peace() {
    let app = Held::start("app");
    let mut proxy = Proxy::start(app.address, echo(), 4).await;
    app.gate.add_permits(2);
    let mut idle = Client::connect(proxy.http);
    assert_eq!(idle.get("/", "").status, 200);
    let stream = tokio::net::TcpStream::connect(proxy.http)
        .await
        .expect("a connection");
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("a handshake");
    let connection = tokio::spawn(connection);
    let request = || {
        Request::get("http://app.test/")
            .body(Full::<Bytes>::default())
            .expect("a request")
    };
    let response = sender.send_request(request()).await.expect("a response");
    assert_eq!(response.status(), 200);
    let running_http2 = tokio::spawn(sender.send_request(request()));
    let at = proxy.http;
    let running = std::thread::spawn(move || Client::connect(at).get("/", ""));
    let mut tcp = TcpStream::connect(proxy.tcp).expect("a connection");
    assert!(say(&mut tcp, "before"));
    // Both are with the application.
    for _ in 0..500 {
        if app.requests() == 4 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let clusters = ask(proxy.admin, "GET", "/clusters", LOCAL).body;
    assert!(
        clusters.contains(&format!("app::{}::rq_active::2\n", app.address))
            && clusters.contains(&format!("app::{}::rq_success::2\n", app.address)),
        "{clusters}"
    );

    let started = Instant::now();
    proxy.terminate();
    assert!(say(&mut tcp, "still there"));
    app.release();
    let last = tokio::task::spawn_blocking(move || running.join())
        .await
        .expect("a thread")
        .expect("a reply");
    assert_eq!(
        (last.status, last.header("connection")),
        (200, Some("close"))
    );
    let last = running_http2.await.expect("a task").expect("a response");
    assert_eq!(last.status(), 200, "the stream under way is finished");
    // GOAWAY: the connection ends by itself once its streams are done.
    tokio::time::timeout(Duration::from_secs(3), connection)
        .await
        .expect("the HTTP/2 connection ends")
        .expect("a task")
        .expect("without an error");
    // Who comes late is served, and told to go.
    let mut late = Client::connect(proxy.http);
    let reply = late.get("/", "");
    assert_eq!(
        (reply.status, reply.header("connection")),
        (200, Some("close"))
    );
    assert!(
        idle.is_closed(),
        "an idle HTTP/1 connection is closed a moment later"
    );
    assert!(say(&mut tcp, "to the end"));
    tokio::task::spawn_blocking(move || {
        proxy.wait_for_end();
        drop(proxy);
    })
    .await
    .expect("the end");
    assert!(
        started.elapsed() >= Duration::from_secs(3),
        "TCP had its time"
    );
    assert!(!say(&mut tcp, "too late"));
}

/// `POST /drain_listeners` in all its forms, as Envoy's admin documents them.
#[tokio::test]
async fn listeners_are_closed_at_once_or_after_the_drain_time() {
    let app = Held::start("app");
    app.release();
    let proxy = Proxy::start(app.address, echo(), 60).await;
    let post = |query: &str| {
        ask(
            proxy.admin,
            "POST",
            &format!("/drain_listeners{query}"),
            LOCAL,
        )
    };
    let ready = || ask(proxy.health, "GET", "/healthz/ready", LOCAL).status;
    let is_open = |at: SocketAddr| TcpStream::connect(at).is_ok();
    let refused = post("?skip_exit");
    assert_eq!(refused.status, 400, "{}", refused.body);
    assert_eq!(ready(), 200);

    let mut tcp = TcpStream::connect(proxy.tcp).expect("a connection");
    assert!(say(&mut tcp, "before"));
    assert_eq!(post("?inboundonly&graceful&skip_exit").status, 200);
    assert_eq!(ready(), 503);
    let mut late = TcpStream::connect(proxy.tcp).expect("the listener stays");
    assert!(say(&mut late, "served"));

    assert_eq!(post("?inboundonly").status, 200);
    wait(|| !is_open(proxy.tcp));
    assert!(say(&mut tcp, "connections are left alone"));
    let mut client = Client::connect(proxy.http);
    let reply = client.get("/", "");
    assert_eq!((reply.status, reply.header("connection")), (200, None));

    assert_eq!(post("?graceful").status, 200);
    wait(|| {
        Client::connect(proxy.http)
            .get("/", "")
            .header("connection")
            == Some("close")
    });
    wait(|| !is_open(proxy.http));
    assert!(say(&mut tcp, "to the end"));
    let clusters = ask(proxy.admin, "GET", "/clusters", LOCAL);
    assert_eq!(clusters.status, 200, "the process goes on");
}

#[tokio::test]
async fn with_nothing_under_way_it_ends_soon() {
    let app = Held::start("app");
    app.release();
    let mut proxy = Proxy::start(app.address, echo(), 60).await;
    let mut idle = Client::connect(proxy.http);
    assert_eq!(idle.get("/", "").status, 200);
    let stats = ask(
        proxy.admin,
        "GET",
        "/stats?filter=app.*rq_(total|2xx)",
        LOCAL,
    )
    .body;
    assert_eq!(
        stats,
        "cluster.app.upstream_rq_2xx: 1\ncluster.app.upstream_rq_total: 1\n"
    );
    proxy.terminate();
    proxy.wait_for_end();
}

/// `POST /drain` to the agent: the hook with which a pod's end begins, while the application still runs.
#[tokio::test]
async fn the_hook_drains_what_comes_in_ahead_of_the_signal() {
    let app = Held::start("app");
    app.release();
    let mut proxy = Proxy::start(app.address, echo(), 60).await;
    let closes = |at: SocketAddr| {
        let reply = Client::connect(at).get("/", "");
        assert_eq!(reply.status, 200);
        reply.header("connection") == Some("close")
    };
    assert!(!closes(proxy.inbound));
    assert_eq!(ask(proxy.agent, "GET", "/drain", LOCAL).status, 405);
    assert!(!closes(proxy.inbound));

    let told = ask(proxy.agent, "POST", "/drain", LOCAL);
    assert_eq!((told.status, told.body.as_str()), (200, "OK\n"));
    assert_eq!(
        ask(proxy.health, "GET", "/healthz/ready", LOCAL).status,
        503
    );
    wait(|| closes(proxy.inbound));
    assert!(!closes(proxy.http), "the application may go on calling");
    let again = ask(proxy.agent, "POST", "/drain", LOCAL);
    assert_eq!(again.status, 200, "a hook may come twice");
    proxy.terminate();
    proxy.wait_for_end();
}

/// `EXIT_ON_ZERO_ACTIVE_CONNECTIONS`: no limit but the last connection.
#[tokio::test]
async fn the_last_connection_decides_where_it_is_asked_to() {
    let app = Held::start("app");
    app.release();
    // No time at all, were it not for the variable.
    let mut proxy = Proxy::start_with(app.address, echo(), 0, &[UNTIL_THE_LAST]).await;
    let mut tcp = TcpStream::connect(proxy.tcp).expect("a connection");
    assert!(say(&mut tcp, "before"));
    proxy.terminate();
    for _ in 0..20 {
        assert!(say(&mut tcp, "still there"));
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(tcp);
    proxy.wait_for_end();
}
