//! What the agent's and the health port say: readiness with its reasons, and the application's metrics with the proxy's.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;

use mesh_proxy::{OptionsError, Ports, ProxyOptions, Role, RunError, run};
use mesh_routing::compile::{CLUSTER, LISTENER};
use prost::Message as _;

use crate::config::{cluster, tcp_listener};
use crate::process::{LOCAL, ask, keep};
use crate::stage::{App, free_port, wait};

fn options(vars: &[(&str, String)]) -> Result<ProxyOptions, OptionsError> {
    let vars: BTreeMap<String, String> = vars
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect();
    ProxyOptions::from_vars(Role::Sidecar, vars, Path::new("/nowhere"))
}

/// A proxy that keeps a listener at this address from an earlier run, and has these variables.
struct Proxy {
    agent: u16,
    health: u16,
    process: JoinHandle<Result<(), RunError>>,
    _dir: tempfile::TempDir,
}

impl Proxy {
    async fn start(at: SocketAddr, vars: &[(&str, String)]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let listener = tcp_listener(at, "app");
        let app = cluster("app", &[free_port()]);
        let resources = vec![
            (CLUSTER, "app".to_owned(), app.encode_to_vec()),
            (LISTENER, listener.name.clone(), listener.encode_to_vec()),
        ];
        keep(dir.path(), resources).await;
        let mut options = options(vars).expect("options");
        options.discovery.clear();
        options.concurrency = 1;
        options.state_dir = Some(dir.path().to_owned());
        let [agent, health] = [(); 2].map(|()| free_port().port());
        options.ports = Ports {
            admin: 0,
            agent,
            health,
            metrics: 0,
        };
        let process = std::thread::spawn(move || run(options));
        let is_open = |port: u16| TcpStream::connect(("127.0.0.1", port)).is_ok();
        wait(|| process.is_finished() || is_open(agent) && is_open(health));
        if process.is_finished() {
            panic!("it has ended: {:?}", process.join());
        }
        Self {
            agent,
            health,
            process,
            _dir: dir,
        }
    }

    /// Both ports say the same.
    fn is_ready(&self) -> Result<(), String> {
        let replies = [self.agent, self.health].map(|port| {
            let reply = ask(port, "GET", "/healthz/ready", LOCAL);
            match reply.status {
                200 => Ok(()),
                status => Err(format!("{status} {}", reply.body)),
            }
        });
        let [agent, health] = replies;
        agent.and(health)
    }

    fn wait_for_reason(&self, reason: &str) {
        wait(|| {
            self.is_ready()
                .is_err_and(|said| said.starts_with("503") && said.contains(reason))
        });
    }

    fn end(self) {
        assert_eq!(ask(self.agent, "POST", "/quitquitquit", LOCAL).status, 200);
        self.process.join().expect("no panic").expect("a clean end");
    }
}

#[tokio::test]
async fn a_proxy_whose_listener_cannot_open_is_not_ready_until_it_does() {
    let at = free_port();
    let taken = TcpListener::bind(at).expect("a port");
    let proxy = Proxy::start(at, &[]).await;
    proxy.wait_for_reason("listeners are not open");
    drop(taken);
    wait(|| proxy.is_ready().is_ok());
    proxy.end();
}

#[tokio::test]
async fn a_proxy_without_its_certificate_is_not_ready() {
    let authority = ("CA_ADDR", format!("{}", free_port()));
    let proxy = Proxy::start(free_port(), &[authority]).await;
    proxy.wait_for_reason("no valid certificate");
    proxy.end();
}

#[tokio::test]
async fn the_applications_metrics_come_with_the_proxys() {
    let app = App::start("app");
    let scraped = |port: u16| {
        let text = format!(r#"{{"scrape":"true","port":"{port}","path":"/its/metrics"}}"#);
        ("ISTIO_PROMETHEUS_ANNOTATIONS", text)
    };
    let proxy = Proxy::start(free_port(), &[scraped(app.address.port())]).await;
    for path in ["/stats/prometheus", "/metrics"] {
        let reply = ask(proxy.agent, "GET", path, LOCAL);
        assert!(reply.body.contains("\nistio_build{"), "{}", reply.body);
        // The application of this test answers with what it was asked.
        assert!(
            reply.body.contains("\nGET /its/metrics HTTP/1.1\n"),
            "{}",
            reply.body
        );
    }
    proxy.end();
    // An application that is away does not take the proxy's own metrics with it.
    let proxy = Proxy::start(free_port(), &[scraped(free_port().port())]).await;
    let reply = ask(proxy.agent, "GET", "/metrics", LOCAL);
    assert_eq!(reply.status, 200);
    assert!(reply.body.contains("\nistio_build{"), "{}", reply.body);
    proxy.end();
    // The agent asking itself would go on for ever.
    let error = options(&[scraped(15020)])
        .expect_err("a circle")
        .to_string();
    assert!(error.contains("15020"), "{error}");
}
