//! The two proxies under comparison, the discovery server that both ask, and what they say of a request's end.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mesh_xds::{AdsServer, Connection, Limits, Node, NodeSource, Report, ResourceSet, StreamEvent};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::case::Case;
use super::resources::{Side, name};

/// Resources that a proxy refused, with its reasons.
#[derive(Clone, Default)]
pub(super) struct Refusals(Arc<Mutex<BTreeMap<String, String>>>);

impl Refusals {
    /// Why a case can't run, if so: one of its resources was refused.
    pub(super) fn of(&self, case: usize) -> Option<String> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = name(case);
        all.iter()
            .find(|(resource, _)| **resource == own || resource.starts_with(&format!("{own}/")))
            .map(|(_, reason)| reason.clone())
    }
}

impl Report for Refusals {
    fn event(&mut self, event: StreamEvent) {
        if let StreamEvent::Nacked { rejections, .. } = event {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(rejections.into_iter().map(|r| (r.name, r.message)));
        }
    }
}

/// Gives each of the two its resources.
struct Source {
    envoy: (watch::Sender<Option<Arc<ResourceSet>>>, Refusals),
    mesh: (watch::Sender<Option<Arc<ResourceSet>>>, Refusals),
}

impl NodeSource for Source {
    fn connect(&self, node: Node, _: Option<SocketAddr>) -> Result<Connection, tonic::Status> {
        let (sets, refusals) = if node.id == Side::Envoy.node() {
            &self.envoy
        } else {
            &self.mesh
        };
        Ok(Connection {
            sets: sets.subscribe(),
            report: Box::new(refusals.clone()),
        })
    }
}

impl Side {
    fn node(self) -> &'static str {
        match self {
            Self::Envoy => "envoy",
            Self::Mesh => "mesh",
        }
    }
}

/// A discovery server for both, on the current runtime; gives its address and what will be refused, Envoy's first.
pub(super) async fn discovery(
    envoy: ResourceSet,
    mesh: ResourceSet,
) -> anyhow::Result<(SocketAddr, [Refusals; 2])> {
    let refusals = [Refusals::default(), Refusals::default()];
    let source = Source {
        envoy: (watch::channel(Some(Arc::new(envoy))).0, refusals[0].clone()),
        mesh: (watch::channel(Some(Arc::new(mesh))).0, refusals[1].clone()),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        let server = AdsServer::new(source, "differential", Limits::default());
        if let Err(error) = server.serve(listener, std::future::pending()).await {
            eprintln!("the discovery server ended: {error}");
        }
    });
    Ok((address, refusals))
}

/// A running proxy.
pub(super) struct Proxy {
    pub(super) side: Side,
    pub(super) refusals: Refusals,
    child: Child,
    /// Of all listeners.
    port: u16,
    tally: TallySource,
}

/// Where the proxy tells how requests ended.
enum TallySource {
    AccessLog(PathBuf),
    Metrics(u16),
}

/// How often requests ended with a status and response flags (`503 UF`).
pub(super) type Tally = BTreeMap<String, i64>;

impl Drop for Proxy {
    fn drop(&mut self) {
        // Killing is enough: it has nothing to say at its end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    pub(super) fn envoy(
        program: &Path,
        place: &Path,
        discovery: SocketAddr,
        port: u16,
        refusals: Refusals,
    ) -> anyhow::Result<Self> {
        let file = place.join("envoy.json");
        std::fs::write(&file, bootstrap(discovery).to_string())?;
        let log = place.join("access.log");
        let child = Command::new(program)
            .args([
                "--concurrency",
                "1",
                "-l",
                "warning",
                "--disable-hot-restart",
            ])
            .args(["--file-flush-interval-msec", "5", "-c"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(place.join("envoy.stderr"))?)
            .spawn()
            .context("starting Envoy")?;
        Ok(Self {
            side: Side::Envoy,
            refusals,
            child,
            port,
            tally: TallySource::AccessLog(log),
        })
    }

    pub(super) fn mesh(
        program: &Path,
        place: &Path,
        discovery: SocketAddr,
        port: u16,
        refusals: Refusals,
    ) -> anyhow::Result<Self> {
        let free = free_ports()?;
        let config = json!({"discoveryAddress": discovery.to_string(), "concurrency": 1,
            "proxyAdminPort": free[0], "statusPort": free[1]});
        let child = Command::new(program)
            .args(["proxy", "router"])
            .env("PROXY_CONFIG", config.to_string())
            .env("POD_NAME", "mesh")
            .env("POD_NAMESPACE", "default")
            .env("INSTANCE_IP", "127.0.0.1")
            .env("ENVOY_STATUS_PORT", free[2].to_string())
            .env("ENVOY_PROMETHEUS_PORT", free[3].to_string())
            .env("MESH_STATE_DIR", place.join("state"))
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(place.join("mesh.stdout"))?)
            .stderr(std::fs::File::create(place.join("mesh.stderr"))?)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self {
            side: Side::Mesh,
            refusals,
            child,
            port,
            tally: TallySource::Metrics(free[3]),
        })
    }

    /// Where it listens for a case.
    pub(super) fn listener(&self, case: usize) -> SocketAddr {
        self.side.listener(self.port, case)
    }

    /// Waits until every case's listener is there or refused.
    pub(super) async fn ready(&mut self, cases: &[Case]) -> anyhow::Result<()> {
        let began = Instant::now();
        for (i, case) in cases.iter().enumerate() {
            while self.refusals.of(i).is_none()
                && TcpStream::connect(self.listener(i)).await.is_err()
            {
                if let Some(status) = self.child.try_wait()? {
                    bail!("the proxy {:?} ended with {status}", self.side);
                }
                if began.elapsed() > Duration::from_secs(30) {
                    bail!(
                        "{:?} has no listener for case {} after 30 s",
                        self.side,
                        case.name
                    );
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        Ok(())
    }

    /// How all requests so far ended.
    pub(super) async fn tally(&self) -> anyhow::Result<Tally> {
        let mut tally = Tally::new();
        match &self.tally {
            TallySource::AccessLog(file) => {
                for line in std::fs::read_to_string(file).unwrap_or_default().lines() {
                    let (code, flags) = line.split_once(' ').unwrap_or((line, "-"));
                    *tally.entry(end(code, flags)).or_insert(0) += 1;
                }
            }
            TallySource::Metrics(port) => {
                let text = fetch(*port, "/stats/prometheus").await?;
                for line in text
                    .lines()
                    .filter(|l| l.starts_with("istio_requests_total{"))
                {
                    let label = |name: &str| {
                        let (_, rest) = line.split_once(&format!("{name}=\""))?;
                        rest.split_once('"').map(|(value, _)| value)
                    };
                    let (Some(code), Some(flags)) =
                        (label("response_code"), label("response_flags"))
                    else {
                        continue;
                    };
                    let count: f64 = line
                        .rsplit(' ')
                        .next()
                        .and_then(|n| n.parse().ok())
                        .unwrap_or_default();
                    *tally.entry(end(code, flags)).or_insert(0) += count as i64;
                }
            }
        }
        Ok(tally)
    }
}

/// A status and its flags, in one order.
fn end(code: &str, flags: &str) -> String {
    let mut flags: Vec<&str> = flags.split(',').collect();
    flags.sort_unstable();
    format!("{code} {}", flags.join(","))
}

async fn fetch(port: u16, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

/// Four ports that nobody has at the moment.
fn free_ports() -> anyhow::Result<Vec<u16>> {
    let held = (0..4)
        .map(|_| std::net::TcpListener::bind("0.0.0.0:0"))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(held
        .iter()
        .map(|l| l.local_addr().map(|a| a.port()))
        .collect::<Result<_, _>>()?)
}

fn bootstrap(discovery: SocketAddr) -> serde_json::Value {
    let ads = json!({"ads": {}, "resource_api_version": "V3"});
    let options = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }});
    let endpoint = json!({"endpoint": {"address": {"socket_address":
        {"address": discovery.ip().to_string(), "port_value": discovery.port()}}}});
    json!({
        "node": {"id": Side::Envoy.node(), "cluster": "differential"},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "discovery"}}],
            },
            "cds_config": ads.clone(),
            "lds_config": ads,
        },
        "static_resources": {"clusters": [{
            "name": "discovery",
            "type": "STATIC",
            "connect_timeout": "1s",
            "typed_extension_protocol_options": options,
            "load_assignment": {"cluster_name": "discovery", "endpoints": [{"lb_endpoints": [endpoint]}]},
        }]},
    })
}
