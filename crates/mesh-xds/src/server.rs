//! The ADS server: gRPC around [`Subscription`]. What each node gets comes from a [`NodeSource`].

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::ControlPlane;
use envoy_types::pb::envoy::service::discovery::v3 as ads;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::google::protobuf::Any;
use futures::Stream;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::metadata::MetadataMap;
use tonic::transport::server::Router;
use tonic::{Extensions, Request, Response, Status, Streaming};

use crate::Node;
use crate::resources::{Resource, ResourceSet};
use crate::subscription::{Mode, Outgoing, ProtocolError, Subscription};

pub use crate::subscription::StreamEvent;

/// Says what a node gets.
pub trait NodeSource: Send + Sync + 'static {
    /// A node opened a stream. Must not block: leave work to another task and put its result into the channel.
    ///
    /// # Errors
    /// The status with which the stream is refused, for instance for a node id that can't be read.
    fn connect(&self, node: Node, peer: Option<SocketAddr>) -> Result<Connection, Status>;

    /// Finds out who opens a stream, from what the request carries: the metadata, and among the extensions the peer of the connection.
    /// The default asks nobody.
    ///
    /// # Errors
    /// The status with which the stream is refused.
    fn authenticate(
        &self,
        _metadata: &MetadataMap,
        _extensions: &Extensions,
    ) -> impl Future<Output = Result<Option<Caller>, Status>> + Send {
        std::future::ready(Ok(None))
    }

    /// As [`NodeSource::connect`], for a node behind which somebody was found. The default makes no difference.
    ///
    /// # Errors
    /// As there, and where the node is not the caller's.
    fn connect_as(
        &self,
        node: Node,
        peer: Option<SocketAddr>,
        _caller: Caller,
    ) -> Result<Connection, Status> {
        self.connect(node, peer)
    }
}

/// Who opened a stream, as far as it could be proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The SPIFFE id.
    pub identity: String,
    /// By a client certificate; else by a token.
    pub by_certificate: bool,
    /// Name and uid of the pod that the token is bound to.
    pub pod: Option<(String, String)>,
}

/// What a [`NodeSource`] gives for a stream.
pub struct Connection {
    /// The newest set for the node; `None` until the first is made. When the sender is dropped the stream ends.
    pub sets: watch::Receiver<Option<Arc<ResourceSet>>>,
    /// Told of everything that happens; dropped when the stream ends.
    pub report: Box<dyn Report>,
}

/// Is told what happens on a stream, in order.
pub trait Report: Send {
    /// Must return at once.
    fn event(&mut self, event: StreamEvent);
}

/// Bounds that keep a misbehaving client from costing much.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Streams at a time. Default: 10,000.
    pub max_streams: usize,
    /// Streams of one connection at a time. Default: 100.
    pub max_streams_per_connection: u32,
    /// Largest request. Default: 16 MiB (a reconnect names every resource with its version).
    pub max_request_bytes: usize,
    /// How long a client may leave its first request out. Default: 10 s.
    pub first_request: Duration,
    /// How long a response may wait for a client that does not read. Default: 20 s.
    pub send: Duration,
    /// Age at which a connection is closed gracefully, so that clients spread over replicas. Default: 30 min, Istio's
    /// `keepaliveMaxServerConnectionAge`.
    pub max_connection_age: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_streams: 10_000,
            max_streams_per_connection: 100,
            max_request_bytes: 16 << 20,
            first_request: Duration::from_secs(10),
            send: Duration::from_secs(20),
            max_connection_age: Duration::from_secs(30 * 60),
        }
    }
}

/// The gRPC service `AggregatedDiscoveryService`.
pub struct AdsServer<S> {
    shared: Arc<Shared<S>>,
}

impl<S> Clone for AdsServer<S> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

struct Shared<S> {
    source: S,
    limits: Limits,
    identifier: String,
    streams: Arc<Semaphore>,
    stream_number: AtomicU64,
    /// Becomes true when all streams have to end.
    closing: watch::Sender<bool>,
}

impl<S: NodeSource> AdsServer<S> {
    /// A server for the nodes of `source`. `identifier` is shown to clients (`control_plane.identifier`).
    #[must_use]
    pub fn new(source: S, identifier: &str, limits: Limits) -> Self {
        Self {
            shared: Arc::new(Shared {
                source,
                identifier: identifier.to_owned(),
                streams: Arc::new(Semaphore::new(limits.max_streams)),
                stream_number: AtomicU64::new(0),
                closing: watch::Sender::new(false),
                limits,
            }),
        }
    }

    /// Serves plain-text gRPC until `shutdown` is done, then closes what is open.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let incoming = TcpListenerStream::new(listener).map(|accepted| {
            accepted.inspect(|stream| {
                // Without it a small push waits for the acknowledgement of the one before. A socket that refuses is gone.
                let _ = stream.set_nodelay(true);
            })
        });
        let this = self.clone();
        let closing = async move {
            shutdown.await;
            this.close();
        };
        self.router()
            .serve_with_incoming_shutdown(incoming, closing)
            .await
    }

    /// The service with its settings, for a server that has other services too. Whoever stops that server must [`close`](Self::close) this.
    #[must_use]
    pub fn router(&self) -> Router {
        let limits = &self.shared.limits;
        let service = AggregatedDiscoveryServiceServer::new(self.clone())
            .max_decoding_message_size(limits.max_request_bytes);
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .max_concurrent_streams(limits.max_streams_per_connection)
            .max_connection_age(limits.max_connection_age)
            .max_connection_age_grace(Duration::from_secs(10))
            .add_service(service)
    }

    /// Ends all streams: they have no end of their own, and without this a server would wait for them for ever.
    pub fn close(&self) {
        self.shared.closing.send_replace(true);
    }

    async fn open<W: Wire>(
        &self,
        request: Request<Streaming<W::Request>>,
    ) -> Result<Response<Responses<W::Response>>, Status> {
        let permit = Arc::clone(&self.shared.streams)
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted("too many discovery streams are open"))?;
        let peer = request.remote_addr();
        let caller = self
            .shared
            .source
            .authenticate(request.metadata(), request.extensions())
            .await?;
        let requests = request.into_inner();
        let (responses, queue) = mpsc::channel(1);
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let number = shared.stream_number.fetch_add(1, Ordering::Relaxed);
            let ended = drive::<W, S>(&shared, requests, &responses, (peer, caller), number);
            if let Err(status) = ended.await {
                tracing::debug!(?peer, %status, "discovery stream ended");
                let _ = tokio::time::timeout(shared.limits.send, responses.send(Err(status))).await;
            }
        });
        Ok(Response::new(Box::pin(Permitted {
            inner: ReceiverStream::new(queue),
            _permit: permit,
        })))
    }
}

/// The stream of responses; it gives its place back when the connection lets go of it.
struct Permitted<T> {
    inner: ReceiverStream<T>,
    _permit: OwnedSemaphorePermit,
}

impl<T> Stream for Permitted<T> {
    type Item = T;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<T>> {
        Pin::new(&mut self.inner).poll_next(context)
    }
}

type Responses<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send + 'static>>;

/// Runs one stream to its end.
async fn drive<W: Wire, S: NodeSource>(
    shared: &Shared<S>,
    mut requests: Streaming<W::Request>,
    responses: &mpsc::Sender<Result<W::Response, Status>>,
    (peer, caller): (Option<SocketAddr>, Option<Caller>),
    number: u64,
) -> Result<(), Status> {
    let first = tokio::time::timeout(shared.limits.first_request, requests.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no discovery request came"))??;
    let Some(mut first) = first else {
        return Ok(());
    };
    let node = W::node(&mut first)
        .ok_or_else(|| Status::invalid_argument("the first discovery request has no node"))?;
    let Connection {
        mut sets,
        mut report,
    } = match caller {
        Some(caller) => shared.source.connect_as(node, peer, caller)?,
        None => shared.source.connect(node, peer)?,
    };
    let mut subscription =
        Subscription::new(W::MODE, &format!("{:x}-{number}", std::process::id()));
    let refuse = |error: ProtocolError| Status::invalid_argument(error.to_string());
    for event in W::take(&mut subscription, &first).map_err(refuse)? {
        report.event(event);
    }
    if let Some(set) = sets.borrow_and_update().clone() {
        subscription.set_resources(set);
    }
    let mut closing = shared.closing.subscribe();
    loop {
        while let Some(outgoing) = subscription.next_response() {
            let sent = outgoing.sent();
            let response = W::render(outgoing, &shared.identifier);
            match tokio::time::timeout(shared.limits.send, responses.send(Ok(response))).await {
                Ok(Ok(())) => report.event(sent),
                Ok(Err(_)) => return Ok(()),
                Err(_) => {
                    return Err(Status::deadline_exceeded(
                        "the client does not read its responses",
                    ));
                }
            }
        }
        tokio::select! {
            request = requests.message() => {
                let Some(request) = request? else { return Ok(()) };
                for event in W::take(&mut subscription, &request).map_err(refuse)? {
                    report.event(event);
                }
            }
            changed = sets.changed() => {
                if changed.is_err() {
                    return Err(Status::unavailable("the control plane lets go of this node; connect again"));
                }
                if let Some(set) = sets.borrow_and_update().clone() {
                    subscription.set_resources(set);
                }
            }
            _ = closing.wait_for(|closing| *closing) => {
                return Err(Status::unavailable("the control plane is shutting down; connect to another"));
            }
            () = responses.closed() => return Ok(()),
        }
    }
}

/// One of the two forms of the protocol.
trait Wire: Send + 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;
    const MODE: Mode;
    fn node(request: &mut Self::Request) -> Option<Node>;
    fn take(
        subscription: &mut Subscription,
        request: &Self::Request,
    ) -> Result<Vec<StreamEvent>, ProtocolError>;
    fn render(outgoing: Outgoing, identifier: &str) -> Self::Response;
}

struct Delta;

impl Wire for Delta {
    type Request = ads::DeltaDiscoveryRequest;
    type Response = ads::DeltaDiscoveryResponse;
    const MODE: Mode = Mode::Delta;

    fn node(request: &mut Self::Request) -> Option<Node> {
        request.node.take()
    }

    fn take(
        subscription: &mut Subscription,
        request: &Self::Request,
    ) -> Result<Vec<StreamEvent>, ProtocolError> {
        subscription.delta_request(request)
    }

    fn render(outgoing: Outgoing, identifier: &str) -> Self::Response {
        ads::DeltaDiscoveryResponse {
            system_version_info: outgoing.version,
            resources: outgoing
                .resources
                .iter()
                .map(|resource| ads::Resource {
                    name: resource.name.clone(),
                    version: resource.version.clone(),
                    resource: Some(any(resource)),
                    ..Default::default()
                })
                .collect(),
            type_url: outgoing.type_url,
            removed_resources: outgoing.removals,
            nonce: outgoing.nonce,
            control_plane: control_plane(identifier),
            ..Default::default()
        }
    }
}

struct StateOfTheWorld;

impl Wire for StateOfTheWorld {
    type Request = ads::DiscoveryRequest;
    type Response = ads::DiscoveryResponse;
    const MODE: Mode = Mode::StateOfTheWorld;

    fn node(request: &mut Self::Request) -> Option<Node> {
        request.node.take()
    }

    fn take(
        subscription: &mut Subscription,
        request: &Self::Request,
    ) -> Result<Vec<StreamEvent>, ProtocolError> {
        subscription.sotw_request(request)
    }

    fn render(outgoing: Outgoing, identifier: &str) -> Self::Response {
        ads::DiscoveryResponse {
            version_info: outgoing.version,
            resources: outgoing.resources.iter().map(|r| any(r)).collect(),
            type_url: outgoing.type_url,
            nonce: outgoing.nonce,
            control_plane: control_plane(identifier),
            ..Default::default()
        }
    }
}

fn any(resource: &Resource) -> Any {
    Any {
        type_url: resource.type_url.clone(),
        value: resource.value.to_vec(),
    }
}

fn control_plane(identifier: &str) -> Option<ControlPlane> {
    Some(ControlPlane {
        identifier: identifier.to_owned(),
    })
}

// The attribute is what tonic generates its trait with; streams are opened rarely.
#[tonic::async_trait]
impl<S: NodeSource> AggregatedDiscoveryService for AdsServer<S> {
    type StreamAggregatedResourcesStream = Responses<ads::DiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<ads::DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        self.open::<StateOfTheWorld>(request).await
    }

    type DeltaAggregatedResourcesStream = Responses<ads::DeltaDiscoveryResponse>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<ads::DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.open::<Delta>(request).await
    }
}
