//! A Kubernetes-compatible API server on the state store.
//!
//! * **In:** HTTP requests as `kubectl` and `kube` send them, and [`Options`]: the store, credentials, the node agent behind
//!   [`node::NodeBackend`].
//! * **Out:** objects, lists, tables, watch streams, `Status` errors; every write durable before its answer, then seen by all watchers.
//! * **Never:** makes a typed round trip of an object (unknown fields of custom resources are kept or pruned by schema, never lost
//!   by accident), runs controllers or pods, or knows an Istio kind (they arrive as CRDs).
//! * **Start here:** [`ApiServer::open`], [`ApiServer::router`]; then `request.rs` (URL to request), `dispatch.rs` (request to verb),
//!   `storage.rs` (objects, revisions, watch history), `access.rs` and `rbac.rs` (who may do what).

mod access;
mod access_reviews;
mod admission;
mod auth;
mod bootstrap;
mod cleanup;
mod connect;
mod convert;
pub mod cron;
mod delete;
mod discovery;
mod dispatch;
mod documents;
mod duplicates;
mod errors;
mod impersonate;
mod limits;
mod logs;
mod managed;
mod names;
pub mod node;
mod openapi;
mod patch;
mod protobuf;
mod proxy;
mod rbac;
mod read;
mod registry;
mod request;
mod respond;
mod reviews;
mod rules;
mod scale;
mod schema;
mod selector;
mod serve;
mod storage;
mod strategy;
mod streams;
mod table;
mod watch;
mod write;

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use futures::future::BoxFuture;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use auth::{Auth, Identity};
use rbac::policy::Policy;
use registry::{Registry, Resource};
use storage::Storage;

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
    /// Users that are known by a bearer token of their own, beside the administrator; as Kubernetes' static token file has them.
    pub users: Vec<(String, Identity)>,
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
            users: Vec::new(),
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
    /// A first object can't be stored.
    #[error("creating the cluster's first objects: {0}")]
    Bootstrap(String),
    /// The service network has no room.
    #[error(
        "the service network {0}/{1} is too small or not a network; use a prefix of at most 28 bits"
    )]
    ServiceCidr(Ipv4Addr, u8),
}

/// The API server; clones share it.
#[derive(Clone)]
pub struct ApiServer {
    inner: Arc<Inner>,
}

struct Inner {
    options: Options,
    storage: Storage,
    registry: RwLock<Arc<Registry>>,
    policy: RwLock<Arc<Policy>>,
    /// Held from the choice of an address to the write that takes it.
    allocation: tokio::sync::Mutex<()>,
    closing: CancellationToken,
    refusals: Mutex<access::Refusals>,
    /// Uids of the definitions whose objects are being deleted.
    cleaning: Mutex<HashSet<String>>,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiServer").finish_non_exhaustive()
    }
}

impl ApiServer {
    /// Loads all objects and creates what every cluster has (namespaces, the `kubernetes` Service).
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(options: Options) -> Result<ApiServer, OpenError> {
        let (network, prefix) = options.service_cidr;
        if !(8..=28).contains(&prefix) || u32::from(network) << prefix != 0 {
            return Err(OpenError::ServiceCidr(network, prefix));
        }
        let storage = Storage::open(options.store.clone())?;
        let server = ApiServer {
            inner: Arc::new(Inner {
                options,
                storage,
                registry: RwLock::default(),
                policy: RwLock::default(),
                allocation: tokio::sync::Mutex::new(()),
                closing: CancellationToken::new(),
                refusals: Mutex::default(),
                cleaning: Mutex::default(),
            }),
        };
        server.rebuild_registry();
        bootstrap::create_first_objects(&server)?;
        rbac::defaults::create(&server)?;
        for (_, definition) in server.storage().list(cleanup::CRDS, None).items {
            cleanup::start(&server, &definition.value);
        }
        Ok(server)
    }

    /// The service for real clients: every request is authenticated by its bearer token.
    pub fn router(&self) -> axum::Router {
        serve::router(self, None)
    }

    /// The service for clients in this process: every request is `identity`'s, no token needed.
    pub fn router_as(&self, identity: Identity) -> axum::Router {
        serve::router(self, Some(identity))
    }

    /// Serves `router()` over TLS until `shutdown`; open watches, logs and connections are ended then.
    pub async fn serve(
        &self,
        listener: TcpListener,
        tls: Arc<rustls::ServerConfig>,
        shutdown: CancellationToken,
    ) {
        serve::serve(self, listener, tls, shutdown).await;
    }

    /// Ends all open watches and log streams of all routers; for the end of the process.
    pub fn close(&self) {
        self.inner.closing.cancel();
    }

    pub(crate) fn options(&self) -> &Options {
        &self.inner.options
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.inner.storage
    }

    pub(crate) fn closing(&self) -> CancellationToken {
        self.inner.closing.clone()
    }

    pub(crate) fn registry(&self) -> Arc<Registry> {
        self.inner
            .registry
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The roles and bindings as they are stored now.
    pub(crate) fn policy(&self) -> Arc<Policy> {
        let known = self
            .inner
            .policy
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if known.revision == self.storage().policy_revision() {
            return known;
        }
        let new = Arc::new(Policy::read(self.storage(), &known));
        let slot = self.inner.policy.write();
        let mut slot = slot.unwrap_or_else(PoisonError::into_inner);
        // Somebody who began later may have been faster.
        if slot.revision < new.revision {
            *slot = new.clone();
        }
        new
    }

    pub(crate) fn refusals(&self) -> MutexGuard<'_, access::Refusals> {
        let refusals = self.inner.refusals.lock();
        refusals.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn cleaning(&self) -> MutexGuard<'_, HashSet<String>> {
        let cleaning = self.inner.cleaning.lock();
        cleaning.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn allocation(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.inner.allocation.lock().await
    }

    /// First address and the one behind the last of the service network, without its own two ends.
    pub(crate) fn service_range(&self) -> (u32, u32) {
        let (network, prefix) = self.inner.options.service_cidr;
        let first = u32::from(network);
        (first + 1, first + (1 << (32 - u32::from(prefix))) - 1)
    }

    pub(crate) fn service_network(&self) -> String {
        let (network, prefix) = self.inner.options.service_cidr;
        format!("{network}/{prefix}")
    }

    /// The identity behind a token, with the token's audiences for a service account; the account and the pod must still exist.
    pub(crate) fn authenticate(
        &self,
        token: &str,
        audiences: &[String],
    ) -> Result<(Identity, Option<Vec<String>>), String> {
        let options = self.options();
        let known = match auth::holder(&options.users, token) {
            Some(identity) => Ok((identity.clone(), None)),
            None => options.auth.identify(token, audiences),
        };
        let (identity, claims) = known.map_err(|e| e.to_string())?;
        let Some(claims) = claims else {
            // Such a token is for this server and nobody else.
            let own = options.auth.tokens.issuer();
            if !audiences.is_empty() && !audiences.iter().any(|audience| audience == own) {
                return Err("the token is for the Kubernetes API only".to_owned());
            }
            return Ok((identity, Some(vec![own.to_owned()])));
        };
        let bound = &claims.kubernetes;
        let alive = |storage: &str, object: &mesh_identity::token::ObjectRef| {
            let found = self
                .storage()
                .get(storage, &format!("{}/{}", bound.namespace, object.name));
            found.is_some_and(|f| {
                object.uid.is_empty() || f.value["metadata"]["uid"] == object.uid.as_str()
            })
        };
        if !alive("core/serviceaccounts", &bound.serviceaccount) {
            return Err("the token's service account does not exist any more".to_owned());
        }
        if bound
            .pod
            .as_ref()
            .is_some_and(|pod| !alive("core/pods", pod))
        {
            return Err("the token's pod does not exist any more".to_owned());
        }
        Ok((identity, Some(claims.aud)))
    }

    /// What follows a write: a definition changes which resources there are, a ClusterRole those that are made of it.
    pub(crate) fn wrote(&self, resource: &Resource, object: &Value) {
        if resource.storage == rbac::CLUSTER_ROLES {
            rbac::aggregate::start(self);
        }
        if resource.storage != cleanup::CRDS {
            return;
        }
        self.rebuild_registry();
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        match self.storage().get(cleanup::CRDS, &format!("/{name}")) {
            None => self.storage().close_watches(&cleanup::storage_of(object)),
            Some(stored) => cleanup::start(self, &stored.value),
        }
    }

    fn rebuild_registry(&self) {
        let crds = self.storage().list(cleanup::CRDS, None).items;
        let registry = Registry::new(crds.iter().map(|(_, stored)| &stored.value));
        *self
            .inner
            .registry
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(registry);
    }
}
