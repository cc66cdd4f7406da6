//! The whole process with its own ports: health, metrics, admin, the end.

use std::collections::BTreeMap;
use std::path::Path;

use envoy_types::pb::envoy::config::rbac::v3::Rbac as RbacRules;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac;
use mesh_proxy::control::{Keeper, Receiver};
use mesh_proxy::shared::Shared;
use mesh_proxy::{Ports, ProxyOptions, Role, run};
use mesh_routing::compile::{CLUSTER, LISTENER, ROUTE};
use mesh_xds::{Handler, Resource, Update};
use prost::Message;

use crate::config::{action, cluster, filter, http_listener, prefix, route_to, table};
use crate::servers;
use crate::stage::{App, Client, Reply, free_port, wait};

pub fn options(state_dir: &Path) -> ProxyOptions {
    let mut options =
        ProxyOptions::from_vars(Role::Sidecar, BTreeMap::new(), Path::new("/nowhere"))
            .expect("options");
    options.discovery.clear();
    options.concurrency = 2;
    options.state_dir = Some(state_dir.to_owned());
    options
}

pub async fn keep(dir: &Path, resources: Vec<(&'static str, String, Vec<u8>)>) {
    let keeper = Keeper::open(dir).expect("a store");
    let mut receiver = Receiver::new(Shared::new(options(dir)), Some(keeper));
    for (type_url, name, value) in resources {
        let resource = Resource {
            name,
            version: "1".to_owned(),
            type_url: type_url.to_owned(),
            value: value.into(),
        };
        let update = Update {
            type_url: type_url.to_owned(),
            upserts: vec![resource],
            removals: Vec::new(),
        };
        assert!(receiver.update(update).await.is_empty());
    }
}

pub fn ask(port: u16, method: &str, path: &str, headers: &str) -> Reply {
    let mut client = Client::connect(([127, 0, 0, 1], port).into());
    client.send(&format!(
        "{method} {path} HTTP/1.1\r\n{headers}content-length: 0\r\n\r\n"
    ));
    client.reply().expect("a reply")
}

pub const LOCAL: &str = "host: localhost\r\n";

#[tokio::test]
async fn a_process_serves_its_ports_and_ends_when_asked() {
    let dir = tempfile::tempdir().expect("a folder");
    let (at, app) = (free_port(), App::start("a"));
    // A policy that is only tried out, as Istio's control plane has it.
    let dry = Rbac {
        shadow_rules: Some(RbacRules::default()),
        shadow_rules_stat_prefix: "istio_dry_run_allow_".to_owned(),
        ..Default::default()
    };
    let listener = http_listener(at, |manager| {
        manager.http_filters = vec![filter("envoy.filters.http.rbac", &dry)];
    });
    keep(
        dir.path(),
        vec![
            (
                CLUSTER,
                "a".to_owned(),
                cluster("a", &[app.address]).encode_to_vec(),
            ),
            (LISTENER, listener.name.clone(), listener.encode_to_vec()),
            (
                ROUTE,
                "routes".to_owned(),
                table(vec![route_to(prefix("/"), action("a"))]).encode_to_vec(),
            ),
        ],
    )
    .await;
    let mut options = options(dir.path());
    let port = || free_port().port();
    let ports = Ports {
        admin: port(),
        agent: port(),
        health: port(),
        metrics: port(),
    };
    options.ports = ports;
    let process = std::thread::spawn(move || run(options));
    wait(|| std::net::TcpStream::connect(("127.0.0.1", ports.metrics)).is_ok());
    wait(|| ask(ports.health, "GET", "/healthz/ready", LOCAL).status == 200);
    assert_eq!(Client::connect(at).get("/", "").header("x-app"), Some("a"));

    for port in [ports.metrics, ports.agent] {
        wait(|| {
            ask(port, "GET", "/stats/prometheus", LOCAL)
                .body
                .contains("istio_requests_total{reporter=\"source\"")
        });
        let text = ask(port, "GET", "/stats/prometheus", LOCAL).body;
        let found = "envoy_http_test_rbac{authz_dry_run_action=\"allow\",authz_dry_run_result=\"denied\"} 1\n";
        assert!(text.contains(found), "{text}");
        assert!(text.ends_with("\n# EOF\n") && text.matches("# EOF").count() == 1);
    }
    let admin = |path: &str| ask(ports.admin, "GET", path, LOCAL);
    let dump: serde_json::Value =
        serde_json::from_str(&admin("/config_dump?include_eds").body).expect("JSON");
    let kinds: Vec<_> = dump["configs"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|c| c["@type"].as_str().expect("a type"))
        .collect();
    assert_eq!(kinds.len(), 6, "{kinds:?}");
    assert_eq!(
        dump["configs"][1]["dynamic_active_clusters"][0]["cluster"]["name"],
        "a"
    );
    assert!(
        admin("/clusters")
            .body
            .contains(&format!("a::{}::health_flags::healthy", app.address))
    );
    assert!(admin("/listeners").body.contains(&at.to_string()));
    assert_eq!(admin("/ready").body, "LIVE\n");
    assert!(
        admin("/stats?filter=clusters")
            .body
            .starts_with("cluster_manager.active_clusters: 1\n")
    );
    assert!(admin("/server_info").body.contains("\"state\": \"LIVE\""));
    assert_eq!(admin("/nothing").status, 404);

    assert_eq!(
        ask(ports.admin, "GET", "/ready", "host: evil.test\r\n").status,
        403,
        "DNS rebinding"
    );
    assert_eq!(
        ask(
            ports.admin,
            "GET",
            "/ready",
            "host: localhost\r\norigin: http://evil.test\r\n"
        )
        .status,
        403
    );
    assert_eq!(ask(ports.admin, "GET", "/quitquitquit", LOCAL).status, 405);
    assert_eq!(
        ask(ports.admin, "POST", "/healthcheck/fail", LOCAL).status,
        200
    );
    assert_eq!(
        ask(ports.health, "GET", "/healthz/ready", LOCAL).status,
        503
    );
    assert_eq!(
        ask(ports.admin, "POST", "/healthcheck/ok", LOCAL).status,
        200
    );
    assert_eq!(
        ask(ports.health, "GET", "/healthz/ready", LOCAL).status,
        200
    );

    assert_eq!(ask(ports.agent, "POST", "/quitquitquit", LOCAL).status, 200);
    wait(|| process.is_finished());
    process.join().expect("no panic").expect("a clean end");
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its address").port();
    let dir = tempfile::tempdir().expect("a folder");
    let mut options = options(dir.path());
    options.ports = Ports {
        admin: port,
        agent: 0,
        health: 0,
        metrics: 0,
    };
    let error = run(options).expect_err("the port is taken").to_string();
    assert!(
        error.contains("admin") && error.contains(&port.to_string()),
        "{error}"
    );
}

/// Whether the last answer to the probe of that name has this status.
fn probed(agent: u16, name: &str, status: u16) {
    let reply = ask(agent, "GET", &format!("/app-health/app/{name}"), LOCAL);
    assert_eq!(reply.status, status, "{name}: {}", reply.body);
}

/// A health service as `grpc.health.v1` describes it: serves "live", does not serve "dead", knows nothing else.
fn health_service() -> u16 {
    servers::with_tasks(answer_health).port()
}

async fn answer_health(stream: tokio::net::TcpStream) {
    let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
        let mut asked = Vec::new();
        let mut body = request.into_body();
        // The connection is only polled by accepting, so the small body is read beside it.
        tokio::spawn(async move {
            while let Some(Ok(data)) = body.data().await {
                asked.extend_from_slice(&data);
            }
            // Not compressed, the length, field 1 (a text) with its length, the text.
            let status = match asked.get(7..) {
                Some(b"live") => Some(1),
                Some(b"dead") => Some(2),
                _ => None,
            };
            let head = hyper::Response::builder().header("content-type", "application/grpc");
            let mut trailers = hyper::HeaderMap::new();
            let Some(status) = status else {
                let head = head.header("grpc-status", "5").body(()).expect("a head");
                respond.send_response(head, true).expect("sent");
                return;
            };
            let head = head.body(()).expect("a head");
            let mut stream = respond.send_response(head, false).expect("sent");
            let message = vec![0, 0, 0, 0, 2, 0x08, status];
            stream.send_data(message.into(), false).expect("sent");
            trailers.insert("grpc-status", "0".parse().expect("a value"));
            stream.send_trailers(trailers).expect("sent");
        });
    }
}

#[tokio::test]
async fn the_agent_probes_the_application() {
    let (dir, app) = (tempfile::tempdir().expect("a folder"), App::start("a"));
    let (nobody, open) = (free_port().port(), app.address.port());
    let health = health_service();
    let probes = serde_json::json!({
        "/app-health/app/livez": { "httpGet": { "path": "/live", "port": open }, "timeoutSeconds": 5 },
        "/app-health/app/gone": { "httpGet": { "path": "/live", "port": nobody } },
        "/app-health/app/plain": { "httpGet": { "path": "/live", "port": open, "scheme": "HTTPS" } },
        "/app-health/app/tcp": { "tcpSocket": { "port": open } },
        "/app-health/app/closed": { "tcpSocket": { "port": nobody } },
        "/app-health/app/grpc": { "grpc": { "port": open, "service": "s" } },
        "/app-health/app/healthy": { "grpc": { "port": health, "service": "live" }, "timeoutSeconds": 5 },
        "/app-health/app/unhealthy": { "grpc": { "port": health, "service": "dead" }, "timeoutSeconds": 5 },
        "/app-health/app/unheard-of": { "grpc": { "port": health }, "timeoutSeconds": 5 },
        "/app-health/app/readyz": { "httpGet": { "path": "/status/503", "port": open } },
    });
    let vars = BTreeMap::from([("ISTIO_KUBE_APP_PROBERS".to_owned(), probes.to_string())]);
    let mut options =
        ProxyOptions::from_vars(Role::Sidecar, vars, Path::new("/nowhere")).expect("options");
    options.discovery.clear();
    options.state_dir = Some(dir.path().to_owned());
    let agent = free_port().port();
    options.ports = Ports {
        admin: 0,
        agent,
        health: 0,
        metrics: 0,
    };
    let process = std::thread::spawn(move || run(options));
    wait(|| std::net::TcpStream::connect(("127.0.0.1", agent)).is_ok());
    for (name, status) in [
        ("livez", 200),
        ("readyz", 503),
        ("tcp", 200),
        ("gone", 500),
        ("plain", 500),
        ("closed", 500),
        // It speaks HTTP/2, but is no health service.
        ("grpc", 500),
        ("healthy", 200),
        ("unhealthy", 500),
        ("unheard-of", 500),
        ("unknown", 404),
    ] {
        probed(agent, name, status);
    }
    // The kubelet's headers reach the application, but for those of its connection to us.
    let headers = "host: kubelet\r\nx-probe: 1\r\nconnection: keep-alive\r\n";
    let reply = ask(agent, "GET", "/app-health/app/livez", headers);
    let lines: Vec<&str> = reply.body.lines().collect();
    assert!(
        lines.contains(&"GET /live HTTP/1.1") && lines.contains(&"x-probe: 1"),
        "{lines:?}"
    );
    assert!(
        lines.contains(&format!("host: {}", app.address).as_str()),
        "{lines:?}"
    );
    assert!(
        !lines.iter().any(|line| line.starts_with("connection:")),
        "{lines:?}"
    );
    assert_eq!(ask(agent, "POST", "/quitquitquit", LOCAL).status, 200);
    wait(|| process.is_finished());
    process.join().expect("no panic").expect("a clean end");
}
