//! The process: threads, ports, signals, the end.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_net::sockets::{ConnectOptions, ListenError, connect};
use mesh_store::StoreError;
use mesh_xds::channel::Connector;
use mesh_xds::types::NAME_TABLE;
use mesh_xds::{AdsClient, ClientConfig};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, LocalRuntime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::agent::AGENT;
use crate::control::{Keeper, Receiver};
use crate::identity::Agent;
use crate::options::{ProxyOptions, Role, SECURE_PORT};
use crate::serve::{open, serve};
use crate::shared::Shared;
use crate::worker::Worker;
use crate::{admin, agent, dns};

/// A drained proxy stays for at least this long, so that who is about to connect still finds it.
const MINIMUM_DRAIN: Duration = Duration::from_millis(250);
/// The same for a gateway: its clients come through the nodes' tables, which follow a change within seconds, and not through proxies that are told. As
/// long as Istio's `terminationDrainDuration` by default.
const GATEWAY_DRAIN: Duration = Duration::from_secs(5);
/// TCP keep-alive of the discovery stream.
const DISCOVERY_KEEPALIVE: Duration = Duration::from_secs(30);

/// Why a proxy cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// One of its own ports is taken.
    #[error("opening the proxy's {port} port: {source}")]
    Port {
        /// Which.
        port: &'static str,
        /// Why.
        source: ListenError,
    },
    /// The port for DNS queries over UDP is taken.
    #[error("opening the proxy's DNS port: listening on {address} for UDP: {source}")]
    Datagrams {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The state directory cannot be used.
    #[error("opening the state directory: {0}")]
    Store(#[from] StoreError),
    /// The system refuses threads, timers or signals.
    #[error("starting the proxy: {0}")]
    System(#[from] std::io::Error),
}

/// Runs a proxy until SIGTERM, SIGINT or a request to quit, and its connections are drained.
pub fn run(options: ProxyOptions) -> Result<(), RunError> {
    let runtime = runtime()?;
    let keeper = Keeper::open_if_ours(options.state_dir.as_deref())?;
    let shared = Shared::new(options);
    let receiver = Receiver::new(shared.clone(), keeper);
    tracing::info!(
        target: AGENT,
        node = shared.options.node_id(),
        workers = shared.options.concurrency,
        "proxy starts"
    );
    start_workers(&shared)?;
    runtime.block_on(main_thread(shared, receiver))
}

fn runtime() -> std::io::Result<LocalRuntime> {
    Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())
}

/// Starts one thread for each worker. They end with the process.
pub fn start_workers(shared: &Arc<Shared>) -> std::io::Result<()> {
    for i in 0..shared.options.concurrency {
        let (shared, runtime_made) = (
            shared.clone(),
            std::thread::Builder::new().name(format!("worker-{i}")),
        );
        // Taken before the worker reads its first snapshot, so that no change is missed.
        let changes = shared.changes();
        runtime_made.spawn(move || match runtime() {
            Ok(runtime) => runtime.block_on(Worker::new(shared).run(changes)),
            Err(error) => tracing::error!(%error, "a worker has no runtime"),
        })?;
    }
    Ok(())
}

async fn main_thread(shared: Arc<Shared>, receiver: Receiver) -> Result<(), RunError> {
    let (quit, mut quitting) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    own_ports(&shared, &quit)?;
    dns::start(&shared)?;
    tokio::task::spawn_local(agent::tell_when_ready(shared.clone()));
    tokio::task::spawn_local(crate::secrets::files::watch(shared.clone()));
    let agent = shared.options.identity.clone();
    let agent = agent.map(|options| Agent::new(shared.clone(), options, connector(&shared)));
    if !shared.options.discovery.is_empty() {
        let config = discovery(&shared, &receiver, agent.as_ref());
        let (client, _state) = AdsClient::new(config);
        tokio::task::spawn_local(client.run(receiver));
    }
    if let Some(agent) = agent {
        tokio::task::spawn_local(agent.run());
    }
    tokio::select! {
        _ = terminate.recv() => tracing::info!(target: AGENT, "SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!(target: AGENT, "SIGINT: draining"),
        _ = quitting.wait_for(|quit| *quit) => tracing::info!(target: AGENT, "asked to quit: draining"),
    }
    drain(&shared).await;
    Ok(())
}

fn discovery(shared: &Arc<Shared>, receiver: &Receiver, agent: Option<&Agent>) -> ClientConfig {
    let mut config = ClientConfig::new(
        shared.options.discovery.clone(),
        shared.identity.node.clone(),
    );
    config.initial_versions = receiver.versions();
    config.named = Some(receiver.secrets());
    if shared.options.dns.is_some() {
        config.types.push(NAME_TABLE.to_owned());
    }
    config.connector = connector(shared);
    let secure = |address: &String| address.ends_with(SECURE_PORT);
    if let Some(agent) = agent.filter(|_| shared.options.discovery.iter().all(secure)) {
        config.credentials = Some(agent.credentials());
        config.node_update = Some(agent.node_update());
        config.reconnect = Some(agent.renewed());
    }
    config
}

/// Opens connections to the control plane, past capture.
fn connector(shared: &Arc<Shared>) -> Connector {
    let mark = shared.mark;
    Arc::new(move |address| {
        let options = ConnectOptions {
            mark,
            keepalive: Some(DISCOVERY_KEEPALIVE),
            ..ConnectOptions::default()
        };
        Box::pin(connect(address, options))
    })
}

fn own_ports(shared: &Arc<Shared>, quit: &watch::Sender<bool>) -> Result<(), RunError> {
    let ports = shared.options.ports;
    let everywhere = match shared.options.ip {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    if let Some(socket) = bind("admin", Ipv4Addr::LOCALHOST.into(), ports.admin)? {
        let (shared, quit) = (shared.clone(), quit.clone());
        let handler =
            move |request, peer| admin::handle(shared.clone(), quit.clone(), request, peer);
        tokio::task::spawn_local(serve(socket, handler));
    }
    if let Some(socket) = bind("agent", everywhere, ports.agent)? {
        let (shared, quit) = (shared.clone(), quit.clone());
        let handler =
            move |request, peer| agent::agent(shared.clone(), quit.clone(), request, peer);
        tokio::task::spawn_local(serve(socket, handler));
    }
    if let Some(socket) = bind("health", everywhere, ports.health)? {
        let shared = shared.clone();
        tokio::task::spawn_local(serve(socket, move |request, _| {
            agent::health(shared.clone(), request)
        }));
    }
    if let Some(socket) = bind("metrics", everywhere, ports.metrics)? {
        let shared = shared.clone();
        tokio::task::spawn_local(serve(socket, move |request, _| {
            agent::prometheus(shared.clone(), request)
        }));
    }
    Ok(())
}

fn bind(port: &'static str, ip: IpAddr, number: u16) -> Result<Option<TcpListener>, RunError> {
    if number == 0 {
        return Ok(None);
    }
    let socket =
        open(SocketAddr::new(ip, number)).map_err(|source| RunError::Port { port, source })?;
    Ok(Some(TcpListener::from_std(socket)?))
}

/// How long a drained proxy stays.
#[derive(Debug, PartialEq)]
struct Ends {
    /// At least, connections or not.
    minimum: Duration,
    /// At most; without it the last connection decides, and in the end whoever stops the pod.
    limit: Option<Duration>,
}

impl Ends {
    /// `ahead`: connections were asked to end before the signal came, and whoever was about to connect has done it.
    fn of(options: &ProxyOptions, ahead: bool) -> Self {
        let (minimum, limit) = match options.exit_on_zero {
            Some(minimum) => (minimum, None),
            None => {
                let limit = options.termination_drain;
                let minimum = match options.role {
                    Role::Sidecar => MINIMUM_DRAIN,
                    Role::Router => GATEWAY_DRAIN.min(limit),
                };
                (minimum, Some(limit))
            }
        };
        Self {
            minimum: if ahead { Duration::ZERO } else { minimum },
            limit,
        }
    }
}

/// Waits until all connections have ended, no longer than the options say.
async fn drain(shared: &Shared) {
    let Ends { minimum, limit } = Ends::of(&shared.options, shared.is_drained_ahead());
    shared.drain();
    let started = Instant::now();
    while limit.is_none_or(|limit| started.elapsed() < limit) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if started.elapsed() >= minimum && shared.totals.open.load(Ordering::Relaxed) == 0 {
            break;
        }
    }
    tracing::info!(
        target: AGENT,
        open = shared.totals.open.load(Ordering::Relaxed),
        "proxy ends"
    );
}
