//! The node process: API server, controllers, service network, DNS and node agent in the cluster's own namespaces.

mod boot;
mod object;
mod pki;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use mesh_apiserver::{ApiServer, Auth, Identity};
use mesh_store::Store;
use tokio_util::sync::CancellationToken;

use crate::agent::backend::Backend;
use crate::agent::registry::Registry;
use crate::agent::{self, NODE_IP, Shared, sandbox};
use crate::parent::{NodeSetup, SETUP_FILE, write_private};
use crate::pass::HostPorts;
use crate::stage::take_stdin;

/// The API's port on the node.
const API_PORT: u16 = 6443;

/// The `node` stage.
pub(crate) fn main(state: &Path) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let ports = Arc::new(HostPorts::new(UnixStream::from(take_stdin()?)));
    let file = state.join(SETUP_FILE);
    let setup = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    let setup: NodeSetup = serde_json::from_slice(&setup).context("reading the node's set-up")?;
    let _ = std::fs::remove_file(&file);
    let filter = tracing_subscriber::EnvFilter::try_new(&setup.options.log_filter)
        .context("reading the log filter")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::env::var_os("NO_COLOR").is_none() && std::io::stderr().is_terminal())
        .init();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let result = runtime.block_on(run(&setup, ports, started));
    // Open watches and pods need no farewell: the namespaces end with this process, and every write was flushed when it was answered.
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

async fn run(
    setup: &NodeSetup,
    ports: Arc<HostPorts>,
    started: Instant,
) -> anyhow::Result<ExitCode> {
    let shutdown = CancellationToken::new();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .context("listening for SIGTERM")?;
    let work = async {
        start(setup, &ports, &shutdown).await?;
        summary(setup, started);
        if !setup.options.exit_when_ready {
            std::future::pending::<()>().await;
        }
        anyhow::Ok(())
    };
    let result = tokio::select! {
        result = work => result.map(|()| ExitCode::SUCCESS),
        _ = terminate.recv() => Ok(ExitCode::SUCCESS),
    };
    shutdown.cancel();
    result
}

/// Starts everything, in the order in which the parts need each other, and applies the first manifests.
async fn start(
    setup: &NodeSetup,
    ports: &Arc<HostPorts>,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    sandbox::prepare_node().await?;
    let pki = pki::Pki::open(&setup.state)?;
    let registry = Arc::new(Registry::default());
    let tables = Tables::default();
    let api = open_api(setup, &pki, &registry, &tables)?;
    let tls = mesh_identity::tls::server_config(&pki.serving(setup.api)?, &["h2", "http/1.1"])?;
    let host = ports
        .bind(setup.api)
        .with_context(|| format!("taking over the socket of {}", setup.api))?;
    host.set_nonblocking(true)?;
    let host = tokio::net::TcpListener::from_std(host)?;
    let own = SocketAddr::from((NODE_IP, API_PORT));
    let own = tokio::net::TcpListener::bind(own)
        .await
        .with_context(|| format!("listening on {own}"))?;
    for listener in [host, own] {
        let (api, tls, shutdown) = (api.clone(), tls.clone(), shutdown.clone());
        tokio::spawn(async move { api.serve(listener, tls, shutdown).await });
    }
    let kubeconfig = pki.kubeconfig(setup.api, &setup.options.users)?;
    write_private(&setup.state.join("kubeconfig"), &kubeconfig)?;
    let client = |name: &str| kube::Client::new(api.router_as(Identity::system(name)), "default");
    let kubelet = client("system:node:mesh-node");
    object::register(&kubelet)
        .await
        .context("registering the node")?;
    object::publish_root(&kubelet, pki.authority.certificate_pem())
        .await
        .context("publishing the cluster's root certificate")?;
    tokio::spawn(object::heartbeat(kubelet.clone(), shutdown.clone()));
    tokio::spawn(crate::controllers::run(
        client("system:kube-controller-manager"),
        shutdown.clone(),
    ));
    let cgroups = agent::cgroup::prepare(&setup.state);
    let shared = Arc::new(Shared::new(
        kubelet,
        setup.state.join("run"),
        registry,
        cgroups,
    ));
    tokio::spawn(agent::run(shared, shutdown.clone()));
    start_services(
        setup,
        ports,
        &client("mesh:service-network"),
        &tables,
        shutdown,
    );
    let limit = Duration::from_secs(setup.options.boot_timeout_seconds);
    boot::run(&client("mesh:boot"), &setup.options.boot, limit).await
}

/// Service addresses, names, and ports of the host. A part that ends early says so in the log; the others go on.
fn start_services(
    setup: &NodeSetup,
    ports: &Arc<HostPorts>,
    client: &kube::Client,
    known: &Tables,
    shutdown: &CancellationToken,
) {
    let tables = crate::services::watch(client.clone(), shutdown.clone());
    // Set once, here: nobody else has a table.
    let _ = known.set(tables.clone());
    // Nobody outside can be asked: the node has no way out of its network.
    let dns = crate::dns::run(
        SocketAddr::from((crate::dns::ADDRESS, 53)),
        tables.clone(),
        Vec::new(),
        shutdown.clone(),
    );
    tokio::spawn(async move {
        if let Err(error) = dns.await {
            tracing::error!(%error, "cluster DNS ended");
        }
    });
    tokio::spawn(crate::network::run(tables.clone(), shutdown.clone()));
    let fixed = setup.options.host_ports.clone();
    tokio::spawn(crate::edge::run(
        client.clone(),
        ports.clone(),
        fixed,
        tables,
        shutdown.clone(),
    ));
}

/// The table of Services, once it is watched.
type Tables = Arc<std::sync::OnceLock<tokio::sync::watch::Receiver<Arc<crate::services::Table>>>>;

/// How long a webhook's Service may be without a ready endpoint in the table.
const ENDPOINT_WAIT: Duration = Duration::from_secs(2);

/// Connects the API server to a Service (for webhooks): straight to a ready endpoint. By the cluster address a call could come before
/// the rules for it, and the kernel would remember that it has no translation until the call times out.
async fn dial(
    tables: Tables,
    address: SocketAddr,
) -> std::io::Result<Box<dyn mesh_apiserver::node::Duplex>> {
    let find = |table: &Arc<crate::services::Table>| {
        let entry = table
            .values()
            .find(|entry| entry.address.is_some_and(|ip| address.ip() == ip))?;
        let port = entry
            .ports
            .iter()
            .find(|port| port.port == address.port())?;
        port.endpoints.first().copied()
    };
    let mut target = address;
    if let Some(mut receiver) = tables.get().cloned() {
        let found = tokio::time::timeout(
            ENDPOINT_WAIT,
            receiver.wait_for(|table| find(table).is_some()),
        )
        .await;
        if let Ok(Ok(table)) = found {
            target = find(&table).map_or(address, SocketAddr::from);
        }
    }
    let stream = tokio::net::TcpStream::connect(target).await?;
    Ok(Box::new(stream))
}

/// After SIGKILL of the parent the node of the run before ends within moments; until then it holds the store.
const STORE_WAIT: Duration = Duration::from_secs(10);

fn open_store(dir: Option<&Path>) -> Result<(Store, mesh_store::Recovery), mesh_store::StoreError> {
    let began = Instant::now();
    loop {
        match Store::open(dir) {
            Err(mesh_store::StoreError::Locked { .. }) if began.elapsed() < STORE_WAIT => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

fn open_api(
    setup: &NodeSetup,
    pki: &pki::Pki,
    registry: &Arc<Registry>,
    tables: &Tables,
) -> anyhow::Result<ApiServer> {
    let dir = setup.state.join("db");
    let (store, recovery) = open_store((!setup.in_memory).then_some(dir.as_path()))
        .context("opening the cluster's state")?;
    if !recovery.is_clean() {
        boot::say(&format!("  {recovery}"));
    }
    let auth = Auth {
        admin_tokens: vec![pki.admin_token.clone()],
        tokens: pki.tokens.clone(),
    };
    let backend = Arc::new(Backend::new(registry.clone()));
    let mut options = mesh_apiserver::Options::new(store, auth, backend);
    let users = setup.options.users.iter();
    options.users = users
        .map(|user| {
            let identity = Identity::user(&user.name, &user.uid, &user.groups);
            (user.token.clone(), identity)
        })
        .collect();
    let tables = tables.clone();
    options.service_dialer = Arc::new(move |address| Box::pin(dial(tables.clone(), address)));
    Ok(ApiServer::open(options)?)
}

/// The addresses to open and the line to set kubectl up.
fn summary(setup: &NodeSetup, started: Instant) {
    boot::say(&format!(
        "ready after {:.2} s",
        started.elapsed().as_secs_f32()
    ));
    for port in &setup.options.host_ports {
        if let Some((title, path)) = &port.link {
            boot::say(&format!("  {title:<12} http://{}{path}", port.address));
        }
    }
    boot::say(&format!("  {:<12} https://{}", "Kubernetes", setup.api));
    boot::say(&format!(
        "export KUBECONFIG={}",
        setup.state.join("kubeconfig").display()
    ));
}
