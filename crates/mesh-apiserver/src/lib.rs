//! A Kubernetes-compatible API server on the state store.
//!
//! * **In:** HTTP requests as `kubectl` and `kube` send them, and [`Options`]: the store, credentials, the node agent behind
//!   [`node::NodeBackend`].
//! * **Out:** objects, lists, tables, watch streams, `Status` errors; every write durable before its answer, then seen by all watchers.
//! * **Never:** makes a typed round trip of an object (unknown fields of custom resources are kept or pruned by schema, never lost
//!   by accident), runs controllers or pods, knows an Istio kind (they arrive as CRDs), or authorises: every authenticated identity
//!   may do everything, role-based access control is a later step.
//! * **Start here:** [`ApiServer::open`], [`ApiServer::router`]; then `request.rs` (URL to request), `dispatch.rs` (request to verb),
//!   `storage.rs` (objects, revisions, watch history).

mod auth;
pub mod node;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use auth::{Auth, Identity};

/// How webhooks reach a service: cluster address and port in, connection out.
pub type ServiceDialer = Arc<
    dyn Fn(SocketAddr) -> BoxFuture<'static, std::io::Result<Box<dyn node::Duplex>>> + Send + Sync,
>;

/// What an API server is made of.
#[derive(Clone)]
pub struct Options {
    /// Where objects lie.
    pub store: mesh_store::Store,
    /// Who may come in.
    pub auth: Auth,
    /// Answers logs, exec and port-forward.
    pub node: Arc<dyn node::NodeBackend>,
    /// Network and prefix length from which cluster addresses are given; the first address is the `kubernetes` Service's.
    pub service_cidr: (Ipv4Addr, u8),
    /// Connects to services for webhooks; [`Options::new`] takes a plain TCP connection to the cluster address.
    pub service_dialer: ServiceDialer,
    /// Where this server listens for pods: the endpoint of the `kubernetes` Service.
    pub advertise: SocketAddr,
    /// Host names and addresses by which clients may call the server, beside loopback, `kubernetes*` and the addresses above;
    /// other `Host` headers are refused (DNS rebinding).
    pub allowed_hosts: Vec<String>,
}

impl Options {
    /// The defaults of the local cluster: services in 10.96.0.0/16, endpoint 10.244.0.1:6443.
    pub fn new(store: mesh_store::Store, auth: Auth, node: Arc<dyn node::NodeBackend>) -> Options {
        Options {
            store,
            auth,
            node,
            service_cidr: (Ipv4Addr::new(10, 96, 0, 0), 16),
            service_dialer: Arc::new(|address| {
                Box::pin(async move {
                    let stream = tokio::net::TcpStream::connect(address).await?;
                    Ok(Box::new(stream) as Box<dyn node::Duplex>)
                })
            }),
            advertise: SocketAddr::from(([10, 244, 0, 1], 6443)),
            allowed_hosts: Vec::new(),
        }
    }
}

/// Why the server did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store could not be read.
    #[error("loading the cluster's objects: {0}")]
    Store(#[from] mesh_store::StoreError),
    /// A stored object is not what was written.
    #[error(
        "loading the cluster's objects: {key}: {reason}; run `mesh state check`, or move the state directory aside"
    )]
    Object {
        /// Key in the store.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The service network has no room.
    #[error(
        "the service network {0}/{1} is too small or not a network; use a prefix of at most 28 bits"
    )]
    ServiceCidr(Ipv4Addr, u8),
}

/// The API server; clones share it.
#[derive(Clone)]
pub struct ApiServer {
    options: Arc<Options>,
}

impl ApiServer {
    /// Loads all objects and creates what every cluster has (namespaces, the `kubernetes` Service).
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(options: Options) -> Result<ApiServer, OpenError> {
        Ok(ApiServer {
            options: Arc::new(options),
        })
    }

    /// The service for real clients: every request is authenticated by its bearer token.
    pub fn router(&self) -> axum::Router {
        axum::Router::new()
    }

    /// The service for clients in this process: every request is `identity`'s, no token needed.
    pub fn router_as(&self, identity: Identity) -> axum::Router {
        let _ = (identity, &self.options);
        axum::Router::new()
    }

    /// Serves `router()` over TLS until `shutdown`; open watches are ended then.
    pub async fn serve(
        &self,
        listener: TcpListener,
        tls: Arc<rustls::ServerConfig>,
        shutdown: CancellationToken,
    ) {
        let _ = (listener, tls);
        shutdown.cancelled().await;
    }
}
