//! Ports of Services on the host: connections to a host socket are carried to the Service's ready endpoints, each to the next one.
//!
//! Host sockets come from the parent ([`PortBinder`]). Those that the command line names exist from the start; a Service of type
//! LoadBalancer or NodePort that appears later gets sockets on the loopback address: its own port numbers where they are free, else
//! free ones. What was bound stands in the Service's annotation `mesh.local/host-ports` (`80=127.0.0.1:8080,...`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::HostPort;
use crate::services::{Entry, Kind, Name, Table, Transport};

/// The annotation that says which host addresses a Service has.
pub const ANNOTATION: &str = "mesh.local/host-ports";

/// How long a connection waits for a first ready endpoint before it is closed.
const ENDPOINT_WAIT: Duration = Duration::from_secs(5);
/// How long connecting to an endpoint may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Binds addresses in the host's network.
pub trait PortBinder: Send + Sync + 'static {
    /// A listening socket on `host_addr`; port 0 takes a free one.
    ///
    /// # Errors
    /// What bind(2) says, such as an address in use.
    fn bind(&self, host_addr: SocketAddr) -> std::io::Result<TcpListener>;
}

/// A port of a Service that has, or is to have, a host socket.
type PortKey = (Name, u16);

/// Serves host ports until `shutdown`. `fixed` are those of the command line, with the addresses that were really bound.
pub async fn run(
    client: Client,
    binder: Arc<dyn PortBinder>,
    fixed: Vec<HostPort>,
    mut tables: watch::Receiver<Arc<Table>>,
    shutdown: CancellationToken,
) {
    let mut edge = Edge {
        client,
        binder,
        tables: tables.clone(),
        open: BTreeMap::new(),
        shown: BTreeMap::new(),
        shutdown: shutdown.clone(),
    };
    for port in fixed {
        let key = ((port.namespace.clone(), port.service.clone()), port.port);
        edge.open(key, port.address);
    }
    loop {
        let table = tables.borrow_and_update().clone();
        edge.follow(&table).await;
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = tables.changed() => if changed.is_err() {
                return;
            },
        }
    }
}

struct Edge {
    client: Client,
    binder: Arc<dyn PortBinder>,
    tables: watch::Receiver<Arc<Table>>,
    open: BTreeMap<PortKey, (SocketAddr, CancellationToken)>,
    /// What was last written to each Service.
    shown: BTreeMap<Name, String>,
    shutdown: CancellationToken,
}

impl Edge {
    /// Opens what is missing, closes what is gone, and writes the addresses to the Services.
    async fn follow(&mut self, table: &Table) {
        let wanted: BTreeSet<PortKey> = table
            .iter()
            .flat_map(|(name, entry)| published(name, entry))
            .collect();
        let gone: Vec<PortKey> = self
            .open
            .keys()
            .filter(|key| table_lost(table, key, &wanted))
            .cloned()
            .collect();
        for key in gone {
            if let Some((_, stop)) = self.open.remove(&key) {
                stop.cancel();
            }
        }
        for (name, port) in wanted {
            if self.open.contains_key(&(name.clone(), port)) {
                continue;
            }
            let own = table
                .get(&name)
                .map_or(port, |entry| host_port(entry, port));
            let own = SocketAddr::from((Ipv4Addr::LOCALHOST, own));
            let key = (name, port);
            if !self.open(key.clone(), own) {
                self.open(key, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
            }
        }
        for (name, entry) in table {
            self.show(name, entry).await;
        }
    }

    /// Binds and serves; false when the address can't be had.
    fn open(&mut self, key: PortKey, address: SocketAddr) -> bool {
        let listener = self.binder.bind(address).and_then(|listener| {
            let address = listener.local_addr()?;
            listener.set_nonblocking(true)?;
            Ok((address, tokio::net::TcpListener::from_std(listener)?))
        });
        match listener {
            Ok((address, listener)) => {
                let stop = self.shutdown.child_token();
                tokio::spawn(serve(
                    listener,
                    key.clone(),
                    self.tables.clone(),
                    stop.clone(),
                ));
                tracing::info!(service = %key.0.1, namespace = %key.0.0, port = key.1, %address, "a host port is open");
                self.open.insert(key, (address, stop));
                true
            }
            Err(error) => {
                tracing::warn!(service = %key.0.1, namespace = %key.0.0, port = key.1, %address, %error, "a host port can't be had");
                false
            }
        }
    }

    async fn show(&mut self, name: &Name, entry: &Entry) {
        let ports: Vec<String> = self
            .open
            .iter()
            .filter(|((n, _), _)| n == name)
            .map(|((_, port), (address, _))| format!("{port}={address}"))
            .collect();
        let text = ports.join(",");
        if text.is_empty() || self.shown.get(name) == Some(&text) {
            return;
        }
        let api: Api<Service> = Api::namespaced(self.client.clone(), &name.0);
        let annotate = json!({"metadata": {"annotations": {ANNOTATION: text}}});
        let mut result = api
            .patch(&name.1, &PatchParams::default(), &Patch::Merge(&annotate))
            .await;
        if result.is_ok() && entry.kind == Kind::LoadBalancer {
            let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": "127.0.0.1"}]}}});
            result = api
                .patch_status(&name.1, &PatchParams::default(), &Patch::Merge(&status))
                .await;
        }
        match result {
            Ok(_) => {
                self.shown.insert(name.clone(), text);
            }
            Err(error) => {
                tracing::warn!(service = %name.1, namespace = %name.0, %error, "writing a Service's host ports failed")
            }
        }
    }
}

/// The TCP ports of a Service that belong on the host.
fn published(name: &Name, entry: &Entry) -> Vec<PortKey> {
    if entry.kind == Kind::Cluster {
        return Vec::new();
    }
    let tcp = entry
        .ports
        .iter()
        .filter(|port| port.transport == Transport::Tcp);
    tcp.map(|port| (name.clone(), port.port)).collect()
}

/// A port closes when its Service is known and no longer has it. One of the command line stays while its Service is not there yet.
fn table_lost(table: &Table, key: &PortKey, wanted: &BTreeSet<PortKey>) -> bool {
    table.contains_key(&key.0) && !wanted.contains(key)
}

/// The host port that a Service would like: its own for a load balancer, the node port for NodePort.
fn host_port(entry: &Entry, port: u16) -> u16 {
    match entry.kind {
        Kind::NodePort => entry
            .ports
            .iter()
            .find(|p| p.port == port)
            .and_then(|p| p.node_port)
            .unwrap_or(port),
        _ => port,
    }
}

async fn serve(
    listener: tokio::net::TcpListener,
    key: PortKey,
    tables: watch::Receiver<Arc<Table>>,
    stop: CancellationToken,
) {
    let turn = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((client, _)) => {
                tokio::spawn(carry(client, key.clone(), tables.clone(), turn.clone()));
            }
            Err(error) => {
                // Out of descriptors, most likely: waiting lets connections end.
                tracing::warn!(service = %key.0.1, %error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Carries one connection. An endpoint that refuses is passed over for the next.
async fn carry(
    mut client: TcpStream,
    key: PortKey,
    mut tables: watch::Receiver<Arc<Table>>,
    turn: Arc<AtomicUsize>,
) {
    let found = tokio::time::timeout(
        ENDPOINT_WAIT,
        tables.wait_for(|table| !endpoints(table, &key).is_empty()),
    )
    .await;
    let Ok(Ok(table)) = found.map(|r| r.map(|t| t.clone())) else {
        return;
    };
    let all = endpoints(&table, &key);
    for _ in 0..all.len() {
        let endpoint = all[turn.fetch_add(1, Ordering::Relaxed) % all.len()];
        if let Ok(Ok(mut server)) =
            tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(endpoint)).await
        {
            // Latency counts on a connection of single requests; failing to say so costs only that.
            let _ = client.set_nodelay(true);
            let _ = server.set_nodelay(true);
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            return;
        }
    }
}

fn endpoints(table: &Table, key: &PortKey) -> Vec<(Ipv4Addr, u16)> {
    let port = table.get(&key.0).and_then(|entry| {
        entry
            .ports
            .iter()
            .find(|p| p.port == key.1 && p.transport == Transport::Tcp)
    });
    port.map(|p| p.endpoints.clone()).unwrap_or_default()
}
