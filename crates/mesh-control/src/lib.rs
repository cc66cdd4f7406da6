//! The running control plane.
//!
//! * **What:** watches a Kubernetes API, keeps the table of objects, publishes a [`mesh_model::Mesh`], translates it for every
//!   connected proxy and pushes what differs; serves the webhooks for injection and validation; writes findings to the status of objects.
//! * **In:** a Kubernetes client and addresses ([`Options`]).
//! * **Out:** xDS (`nodes.rs` around `mesh-xds`), admission answers (`webhook.rs`), statuses (`status.rs`), metrics and debug pages (`http.rs`).
//! * **Never:** asks which kind of cluster it runs in, sees routing or proxy, or keeps anything that is neither in the API nor
//!   can be computed from it.
//! * **Start here:** [`Control::run`], then `watch.rs` and `publish.rs`: the way of a change.

mod auth;
mod ca;
mod ending;
mod http;
mod jwks;
mod leader;
mod metrics;
mod nodes;
mod plain;
mod publish;
mod refusals;
mod secrets;
mod secure;
mod serving;
mod stand_in;
mod status;
mod table;
mod watch;
mod webhook;

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;

pub use ca::registration::{External, ExternalError};
pub use ca::service::Lifetimes;
pub use jwks::{Range, RangeError};

/// What a control plane is made of.
#[derive(Clone)]
pub struct Options {
    /// The cluster whose objects make the mesh.
    pub client: kube::Client,
    /// The system namespace, which holds our ConfigMaps, Secret and Service. Default `istio-system`.
    pub namespace: String,
    /// Our Service in it; the webhooks' certificate carries its names. Default `istiod`.
    pub service: String,
    /// Which of several installations in the cluster this one is; its ConfigMaps' names end in it. Default `default`, which is left out of names.
    pub revision: String,
    /// Shown by `/version` and to proxies.
    pub version: String,
    /// Discovery in plain text, without authentication and without secrets, for few clients at a time; none switches it off. Default
    /// `0.0.0.0:15010`.
    pub grpc: Option<SocketAddr>,
    /// Discovery and certificates over TLS. Default `0.0.0.0:15012`.
    pub secure_grpc: SocketAddr,
    /// Webhooks over TLS. Default `0.0.0.0:15017`.
    pub webhook: SocketAddr,
    /// `/metrics` and `/version`. Default `0.0.0.0:15014`.
    pub monitoring: SocketAddr,
    /// `/ready` for everyone, `/debug/…` for clients on the loopback address. Default `0.0.0.0:8080`.
    pub http: SocketAddr,
    /// Validity of workloads' certificates.
    pub lifetimes: Lifetimes,
    /// A signer that signs in place of the mesh's own authority (`EXTERNAL_CA`). Default: none.
    pub external: Option<External>,
    /// Audiences of service account tokens that are accepted (`TOKEN_AUDIENCES`). Default: `istio-ca`.
    pub token_audiences: Vec<String>,
    /// Where keys of token issuers are never fetched from (`BLOCKED_CIDRS_IN_JWKS_URIS`), beside loopback, link-local and clouds' metadata addresses.
    /// Default: nowhere else.
    pub blocked_key_ranges: Vec<Range>,
    /// Whether proxies on the secure port must authenticate for discovery (`XDS_AUTH`). Default: yes.
    pub xds_auth: bool,
    /// Whether a proxy must be in the namespace, and of the service account, that its credentials name (`PILOT_ENABLE_XDS_IDENTITY_CHECK`).
    /// Default: yes.
    pub xds_identity_check: bool,
    /// How long it serves on after the end was asked for, while it says that it is not ready: nodes learn a moment later that its Service
    /// leads elsewhere, and a pod that is made in that moment is refused where nobody answers. Default 2 s.
    pub linger: Duration,
}

/// The revision of an installation that names none.
const DEFAULT_REVISION: &str = "default";

impl Options {
    /// These options for an installation of a revision, whose Service is called `istiod-REVISION`; empty means `default`.
    #[must_use]
    pub fn of_revision(mut self, revision: &str) -> Self {
        if !revision.is_empty() {
            revision.clone_into(&mut self.revision);
            self.service = revisioned(&self.service, revision);
        }
        self
    }

    /// The defaults named at the fields.
    #[must_use]
    pub fn new(client: kube::Client, version: &str) -> Self {
        let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
        Self {
            client,
            namespace: "istio-system".to_owned(),
            service: "istiod".to_owned(),
            revision: DEFAULT_REVISION.to_owned(),
            version: version.to_owned(),
            grpc: Some(any(15010)),
            secure_grpc: any(15012),
            webhook: any(15017),
            monitoring: any(15014),
            http: any(8080),
            lifetimes: Lifetimes::default(),
            external: None,
            token_audiences: vec!["istio-ca".to_owned()],
            blocked_key_ranges: Vec::new(),
            xds_auth: true,
            xds_identity_check: true,
            linger: Duration::from_secs(2),
        }
    }
}

/// Istio's way to name the objects of a revision.
fn revisioned(name: &str, revision: &str) -> String {
    match revision {
        DEFAULT_REVISION => name.to_owned(),
        revision => format!("{name}-{revision}"),
    }
}

/// Why the control plane did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A kubeconfig file can't be used.
    #[error("reading the kubeconfig {path}: {source}")]
    Kubeconfig {
        /// The file.
        path: String,
        /// What is wrong.
        source: kube::config::KubeconfigError,
    },
    /// Neither a kubeconfig nor a pod's service account.
    #[error(
        "finding the cluster: {0}; run in a pod with a service account, or give --kubeconfig (KUBECONFIG and ~/.kube/config are never used by themselves)"
    )]
    InCluster(kube::config::InClusterError),
    /// The client can't be made.
    #[error("making the Kubernetes client: {0}")]
    Client(Box<kube::Error>),
    /// A port can't be had.
    #[error(
        "listening on {address} for {purpose}: {source}; choose another address or stop what uses it"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What it is for.
        purpose: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A server ended by itself.
    #[error("serving {what}: {reason}")]
    Serve {
        /// Which server.
        what: &'static str,
        /// Why.
        reason: String,
    },
}

/// A client for the cluster of a kubeconfig file, or, without one, for the cluster whose pod this process is in.
///
/// # Errors
/// When there is neither, or it can't be used. No other source (environment, home directory) is ever looked at.
pub async fn client(
    kubeconfig: Option<&Path>,
    context: Option<&str>,
) -> Result<kube::Client, ControlError> {
    let config = match kubeconfig {
        Some(path) => {
            let shown = || path.display().to_string();
            let error = |source| ControlError::Kubeconfig {
                path: shown(),
                source,
            };
            let file = kube::config::Kubeconfig::read_from(path).map_err(error)?;
            let options = kube::config::KubeConfigOptions {
                context: context.map(str::to_owned),
                ..Default::default()
            };
            kube::Config::from_custom_kubeconfig(file, &options)
                .await
                .map_err(error)?
        }
        None => kube::Config::incluster().map_err(ControlError::InCluster)?,
    };
    kube::Client::try_from(config).map_err(|error| ControlError::Client(Box::new(error)))
}

/// A control plane that has its ports, but does nothing yet.
pub struct Control {
    options: Options,
    grpc: Option<TcpListener>,
    secure_grpc: TcpListener,
    webhook: TcpListener,
    monitoring: TcpListener,
    http: TcpListener,
}

/// Where a control plane listens (of use where port 0 was asked for).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Discovery in plain text, where it is on.
    pub grpc: Option<SocketAddr>,
    /// Discovery and certificates over TLS.
    pub secure_grpc: SocketAddr,
    /// Webhooks.
    pub webhook: SocketAddr,
    /// Metrics.
    pub monitoring: SocketAddr,
    /// Readiness and debug pages.
    pub http: SocketAddr,
}

impl Control {
    /// Takes the ports.
    ///
    /// # Errors
    /// When one of them can't be had.
    pub async fn bind(options: Options) -> Result<Self, ControlError> {
        let grpc = match options.grpc {
            Some(address) => Some(listen(address, "discovery (gRPC)").await?),
            None => None,
        };
        Ok(Self {
            grpc,
            secure_grpc: listen(
                options.secure_grpc,
                "discovery and certificates (gRPC over TLS)",
            )
            .await?,
            webhook: listen(options.webhook, "webhooks").await?,
            monitoring: listen(options.monitoring, "metrics").await?,
            http: listen(options.http, "readiness and debug pages").await?,
            options,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        let of = |listener: &TcpListener, asked| listener.local_addr().unwrap_or(asked);
        Addresses {
            grpc: self.grpc.as_ref().and_then(|grpc| grpc.local_addr().ok()),
            secure_grpc: of(&self.secure_grpc, self.options.secure_grpc),
            webhook: of(&self.webhook, self.options.webhook),
            monitoring: of(&self.monitoring, self.options.monitoring),
            http: of(&self.http, self.options.http),
        }
    }

    /// Runs until `shutdown` is done, then for [`Options::linger`], and until what is under way is finished (5 s at most).
    ///
    /// # Errors
    /// When one of the servers ends by itself. An API that is away is no error: it is waited for.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ControlError> {
        let options = Arc::new(self.options);
        let metrics = Arc::new(metrics::Metrics::new(&options.version));
        let (publisher, published, problems, shared) =
            publish::new(&options.revision, Arc::clone(&metrics));
        let refusals = refusals::Board::new();
        let authenticator = Arc::new(auth::Authenticator::new(
            options.client.clone(),
            Arc::clone(&shared),
            options.token_audiences.clone(),
        ));
        let nodes = nodes::Nodes::new(
            published.clone(),
            Arc::clone(&metrics),
            refusals.clone(),
            nodes::Gate::new(&options, Arc::clone(&authenticator)),
            secrets::Secrets::new(options.client.clone()),
        );
        let mut tasks = JoinSet::new();
        let kinds = watch::kinds(&options.namespace, &options.revision);
        let changes = publisher.changes();
        for kind in kinds.iter().cloned() {
            tasks.spawn(ended(
                "watching",
                watch::run(options.client.clone(), kind, changes.clone()),
            ));
        }
        let keys = jwks::Keys::new(&options);
        tasks.spawn(ended(
            "the keys of token issuers",
            jwks::keep(published.clone(), changes, keys.clone()),
        ));
        tasks.spawn(ended("publishing", publisher.run(kinds.len(), keys)));
        let identity = leader::identity();
        let (leading, leader) = leader::new();
        let election = tasks.spawn(ended(
            "leader election",
            leader::run(Arc::clone(&options), identity.clone(), leading),
        ));
        let statuses = tasks.spawn(ended(
            "statuses",
            status::run(options.client.clone(), problems, refusals, leader.clone()),
        ));
        let issuing = authority(&mut tasks, &options, &metrics, &shared);
        let rotation = tasks.spawn(ended(
            "rotation of the root",
            ca::rotation::run(
                Arc::clone(&options),
                identity.clone(),
                nodes.clone(),
                leader.clone(),
                issuing.clone(),
            ),
        ));
        let certificate = serving::Certificate::default();
        tasks.spawn(ended(
            "the control plane's certificate",
            serving::keep(Arc::clone(&options), certificate.clone(), issuing.clone()),
        ));
        let (ending, announced) = ending::new();
        let (own, seen) = (Arc::clone(&options), Arc::clone(&shared));
        let webhook = webhook::Webhook::new(own, seen, Arc::clone(&metrics));
        let mut servers = JoinSet::new();
        servers.spawn(webhook::serve(
            self.webhook,
            certificate.clone(),
            webhook,
            announced.clone(),
        ));
        let state = http::State {
            nodes: nodes.clone(),
            shared,
            metrics: Arc::clone(&metrics),
            certificate: certificate.clone(),
            version: options.version.clone(),
            ending: announced.clone(),
        };
        pages(&mut tasks, self.http, self.monitoring, state);
        let identifier = identifier(&options.version);
        let ads = mesh_xds::AdsServer::new(nodes.clone(), &identifier, mesh_xds::Limits::default());
        // Whoever may talk to the plain port must not be able to take the places of those who have proven who they are.
        let plain = mesh_xds::AdsServer::new(nodes, &identifier, plain::limits());
        if let Some(listener) = self.grpc {
            let incoming = plain::connections(listener, Arc::clone(&metrics));
            let (end, router) = (announced.clone().closing(), plain.router());
            servers.spawn(discovery(
                router.serve_with_incoming_shutdown(incoming, end),
            ));
        }
        let service = ca::service::Service {
            issuing,
            authenticator,
            lifetimes: options.lifetimes,
            metrics,
        };
        let incoming = secure::connections(self.secure_grpc, certificate);
        let secure = ads
            .router()
            .add_service(mesh_xds::certificate::CertificateServer::new(Arc::new(
                service,
            )))
            .serve_with_incoming_shutdown(incoming, announced.closing());
        servers.spawn(discovery(secure));
        tracing::info!(version = options.version, "control plane started");
        tokio::select! {
            () = shutdown => {}
            Some(ended) = servers.join_next() => return Err(failure("a server", ended)),
            Some(ended) = tasks.join_next() => return Err(failure("a task", ended)),
        }
        ending.leave();
        let leading = [election, statuses, rotation];
        linger(&options, &identity, &leader, leading).await;
        ending.close();
        // Proxies are told to go to another control plane; whoever does not listen is left behind.
        ads.close();
        plain.close();
        let _ = tokio::time::timeout(Duration::from_secs(5), servers.join_all()).await;
        tasks.abort_all();
        Ok(())
    }
}

/// Gives up what only one control plane does, so that whoever leads next need not wait, and goes on with the rest for a moment.
async fn linger(
    options: &Options,
    identity: &str,
    leader: &leader::Leader,
    leading: [tokio::task::AbortHandle; 3],
) {
    for task in leading {
        task.abort();
    }
    let resigned = leader::resign(options, identity, leader);
    let resigned = tokio::time::timeout(Duration::from_secs(2), resigned);
    let _ = tokio::join!(resigned, tokio::time::sleep(options.linger));
}

/// Starts what serves readiness, metrics and debug pages.
fn pages(
    tasks: &mut JoinSet<Result<(), ControlError>>,
    main: TcpListener,
    monitoring: TcpListener,
    state: http::State,
) {
    let router = http::main_router(state.clone());
    tasks.spawn(http::serve(main, router, "readiness"));
    let router = http::monitoring_router(state);
    tasks.spawn(http::serve(monitoring, router, "metrics"));
}

/// A server of discovery, to its end.
async fn discovery<E: std::fmt::Display>(
    server: impl Future<Output = Result<(), E>>,
) -> Result<(), ControlError> {
    server.await.map_err(|error| ControlError::Serve {
        what: "discovery",
        reason: error.to_string(),
    })
}

/// How discovery names itself to clients, in Istio's form.
fn identifier(version: &str) -> String {
    format!("{{\"Component\":\"istiod\",\"Info\":{{\"version\":\"{version}\"}}}}")
}

/// Starts what keeps the authority and its roots.
fn authority(
    tasks: &mut JoinSet<Result<(), ControlError>>,
    options: &Arc<Options>,
    metrics: &Arc<metrics::Metrics>,
    shared: &Arc<publish::Shared>,
) -> ca::Issuing {
    let (put, issuing) = tokio::sync::watch::channel(None);
    const WHAT: &str = "the certificate authority";
    let (own, metrics) = (Arc::clone(options), Arc::clone(metrics));
    match options.external.clone() {
        Some(external) => {
            let keep = ca::external::keep(own, external, Arc::clone(shared), metrics, put);
            tasks.spawn(ended(WHAT, keep));
        }
        None => {
            tasks.spawn(ended(WHAT, ca::secret::keep(own, metrics, put)));
        }
    }
    tasks.spawn(ended(
        "the roots in the namespaces",
        ca::roots::keep(Arc::clone(options), Arc::clone(shared), issuing.clone()),
    ));
    issuing
}

/// A server or task that should run for ever, and did not.
fn failure(
    what: &'static str,
    ended: Result<Result<(), ControlError>, tokio::task::JoinError>,
) -> ControlError {
    let reason = match ended {
        Ok(Err(error)) => return error,
        Ok(Ok(())) => "ended".to_owned(),
        Err(error) => error.to_string(),
    };
    ControlError::Serve { what, reason }
}

/// Binds and runs a control plane.
///
/// # Errors
/// See [`Control::bind`] and [`Control::run`].
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), ControlError> {
    Control::bind(options).await?.run(shutdown).await
}

async fn listen(address: SocketAddr, purpose: &'static str) -> Result<TcpListener, ControlError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ControlError::Listen {
            address,
            purpose,
            source,
        })
}

/// A task that should run for ever.
async fn ended(what: &'static str, task: impl Future<Output = ()>) -> Result<(), ControlError> {
    task.await;
    Err(ControlError::Serve {
        what,
        reason: "ended".to_owned(),
    })
}
