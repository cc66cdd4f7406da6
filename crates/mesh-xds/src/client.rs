//! The delta ADS client: connects, subscribes, hands over updates, answers with ACK or NACK, comes back after a failure.
//!
//! It subscribes to every type with the wildcard: the server knows what the node needs, and sends it in an order in which
//! nothing refers to what has not arrived. It runs on any tokio runtime, a current-thread one too.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use crate::backoff::Backoff;
use crate::channel::{self, ChannelError, Connector, CredentialSource};
use crate::nack::{self, Rejection};
use crate::resources::Resource;
use crate::{Node, types};

/// The largest response taken. A set of resources for one node of a large mesh is some ten megabytes.
const MAX_RESPONSE: usize = 256 << 20;
/// Requests that may wait for the network. More than one per type is never needed for long.
const REQUEST_QUEUE: usize = 64;

/// Adds to what the node says of itself, before each stream.
pub type NodeUpdate = Arc<dyn Fn(&mut Node) + Send + Sync>;

/// Name, then version, of resources.
pub type Versions = BTreeMap<String, String>;

/// How to reach the control plane, and as whom.
#[derive(Clone)]
pub struct ClientConfig {
    /// `host:port` of control planes, tried in turn. Names are resolved at every attempt.
    pub addresses: Vec<String>,
    /// Who we are; sent with the first request of each stream.
    pub node: Node,
    /// Type URLs to subscribe to as a whole. Default: clusters, endpoints, listeners, routes.
    pub types: Vec<String>,
    /// A type of which only what is needed is asked for. Default: none.
    pub named: Option<Named>,
    /// By type URL, the resources that we hold already (from an earlier run): they are sent again only if they changed.
    pub initial_versions: BTreeMap<String, Versions>,
    /// First wait after a failure (doubles, with jitter). Default: 50 ms.
    pub backoff_first: Duration,
    /// Longest wait after failures. Default: 5 s.
    pub backoff_max: Duration,
    /// How long one connection attempt may take, with resolving. Default: 5 s.
    pub connect_timeout: Duration,
    /// Opens connections. Default: a plain TCP connection.
    pub connector: Connector,
    /// What connections are authenticated with, in TLS. Default: none, plain text.
    pub credentials: Option<CredentialSource>,
    /// Changes the node before each stream. Default: none.
    pub node_update: Option<NodeUpdate>,
    /// A change here ends the stream and opens another at once: with new credentials, and what else the node says then. Default: none.
    pub reconnect: Option<watch::Receiver<u64>>,
}

impl ClientConfig {
    /// A configuration with the defaults named at the fields.
    #[must_use]
    pub fn new(addresses: Vec<String>, node: Node) -> Self {
        Self {
            addresses,
            node,
            types: [
                types::CLUSTER,
                types::ENDPOINT,
                types::LISTENER,
                types::ROUTE,
            ]
            .map(str::to_owned)
            .to_vec(),
            named: None,
            initial_versions: BTreeMap::new(),
            backoff_first: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            connector: channel::plain_connector(),
            credentials: None,
            node_update: None,
            reconnect: None,
        }
    }
}

/// A type that is subscribed to by name.
#[derive(Clone)]
pub struct Named {
    /// The type.
    pub type_url: String,
    /// The names that are wanted; a change is sent on at once.
    pub names: watch::Receiver<Arc<BTreeSet<String>>>,
}

/// What one response changes. The first update of a type on a stream may be empty: it says that all of the type is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// The type, one of [`types`].
    pub type_url: String,
    /// New and changed resources.
    pub upserts: Vec<Resource>,
    /// Names that are gone.
    pub removals: Vec<String>,
}

/// Takes the updates.
pub trait Handler {
    /// Applies an update, as far as it can: what is not in the answer counts as accepted (an empty answer is an ACK), what is
    /// in it is refused by name (NACK). The next update comes after this future is done.
    fn update(&mut self, update: Update) -> impl Future<Output = Vec<Rejection>>;
}

/// How the connection stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// An attempt is being made, or will be after a wait.
    Connecting {
        /// What went wrong last, empty at first.
        last_error: String,
    },
    /// A stream is open to this address.
    Connected {
        /// The configured address (`host:port`).
        address: String,
    },
}

/// The client. Made by [`AdsClient::new`], driven by [`AdsClient::run`].
pub struct AdsClient {
    config: ClientConfig,
    state: watch::Sender<ConnectionState>,
    /// What the handler accepted, by type: sent as initial versions on the next stream.
    accepted: BTreeMap<String, Versions>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("no address of a control plane is configured")]
    NoAddress,
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("discovery stream to {0}: {1}")]
    Stream(String, String),
    #[error("discovery stream to {0}: ended by the control plane")]
    Ended(String),
    #[error("discovery stream: opened anew, since what this node is known by has changed")]
    Renewed,
}

impl AdsClient {
    /// A client that does nothing until it is [run](AdsClient::run), and a view of its connection state.
    #[must_use]
    pub fn new(config: ClientConfig) -> (Self, watch::Receiver<ConnectionState>) {
        let (state, view) = watch::channel(ConnectionState::Connecting {
            last_error: String::new(),
        });
        let accepted = config.initial_versions.clone();
        (
            Self {
                config,
                state,
                accepted,
            },
            view,
        )
    }

    /// Keeps a stream open for ever, as well as it can; drop the future to stop. While no control plane answers it waits and
    /// tries again, and the handler keeps what it has.
    pub async fn run<H: Handler>(mut self, mut handler: H) {
        let seed = self
            .config
            .node
            .id
            .bytes()
            .fold(0x9e37_79b9_7f4a_7c15_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        let mut backoff = Backoff::new(self.config.backoff_first, self.config.backoff_max, seed);
        let mut attempt = 0_usize;
        let mut renewals = self.config.reconnect.take();
        // Of attempts that fail alike, the first is told.
        let mut told = String::new();
        loop {
            let mut was_connected = false;
            if let Some(renewals) = &mut renewals {
                renewals.mark_unchanged();
            }
            let error = self
                .stream(attempt, &mut handler, &mut was_connected, &mut renewals)
                .await;
            if matches!(error, StreamError::Renewed) {
                continue;
            }
            if was_connected {
                backoff.reset();
                told.clear();
            }
            attempt = attempt.wrapping_add(1);
            let last_error = error.to_string();
            match last_error == told {
                true => tracing::debug!(%error, "no configuration from the control plane"),
                false if was_connected => tracing::info!(%error, "the control plane is gone"),
                false => tracing::warn!(%error, "no configuration from the control plane"),
            }
            told.clone_from(&last_error);
            self.state
                .send_replace(ConnectionState::Connecting { last_error });
            tokio::time::sleep(backoff.wait()).await;
        }
    }

    /// One stream from connecting to its end; the answer says why it ended.
    async fn stream<H: Handler>(
        &mut self,
        attempt: usize,
        handler: &mut H,
        was_connected: &mut bool,
        renewals: &mut Option<watch::Receiver<u64>>,
    ) -> StreamError {
        let count = self.config.addresses.len();
        if count == 0 {
            return StreamError::NoAddress;
        }
        let address = self.config.addresses[attempt % count].clone();
        let opened = channel::open(
            &address,
            &self.config.connector,
            self.config.credentials.as_ref(),
            self.config.connect_timeout,
        );
        let connection = match opened.await {
            Ok(connection) => connection,
            Err(error) => return error.into(),
        };
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE.max(self.config.types.len() + 1));
        for request in self.first_requests() {
            // The queue was made long enough for these.
            let _ = requests.try_send(request);
        }
        let request = connection.request(ReceiverStream::new(queue));
        let mut client = AggregatedDiscoveryServiceClient::new(connection.channel)
            .max_decoding_message_size(MAX_RESPONSE);
        let opened = client.delta_aggregated_resources(request).await;
        let mut responses = match opened {
            Ok(response) => response.into_inner(),
            Err(status) => return StreamError::Stream(address, describe(&status)),
        };
        self.state.send_replace(ConnectionState::Connected {
            address: address.clone(),
        });
        let mut named = self.config.named.clone();
        let mut subscribed = BTreeSet::new();
        if let Some(named) = &mut named {
            named.names.mark_changed();
        }
        loop {
            let message = tokio::select! {
                message = responses.message() => message,
                () = renewed(renewals) => return StreamError::Renewed,
                () = renamed(&mut named) => {
                    let request = self.subscription(named.as_mut(), &mut subscribed);
                    if let Some(request) = request && requests.send(request).await.is_err() {
                        return StreamError::Ended(address);
                    }
                    continue;
                }
            };
            match message {
                Ok(Some(response)) => {
                    if !std::mem::replace(was_connected, true) {
                        tracing::info!(address, "connected to the control plane");
                    }
                    let answer = self.take(response, handler).await;
                    if requests.send(answer).await.is_err() {
                        return StreamError::Ended(address);
                    }
                }
                Ok(None) => return StreamError::Ended(address),
                Err(status) => return StreamError::Stream(address, describe(&status)),
            }
        }
    }

    /// One subscription per type; the node goes with the first.
    fn first_requests(&self) -> Vec<DeltaDiscoveryRequest> {
        let mut node = self.config.node.clone();
        if let Some(update) = &self.config.node_update {
            update(&mut node);
        }
        let mut node = Some(node);
        self.config
            .types
            .iter()
            .map(|type_url| DeltaDiscoveryRequest {
                node: node.take(),
                type_url: type_url.clone(),
                resource_names_subscribe: vec![types::WILDCARD.to_owned()],
                initial_resource_versions: self
                    .accepted
                    .get(type_url)
                    .map(|versions| versions.clone().into_iter().collect())
                    .unwrap_or_default(),
                ..Default::default()
            })
            .collect()
    }

    /// What has to be said after the names that are wanted have changed; nothing if they are those of before.
    fn subscription(
        &mut self,
        named: Option<&mut Named>,
        subscribed: &mut BTreeSet<String>,
    ) -> Option<DeltaDiscoveryRequest> {
        let named = named?;
        let wanted = named.names.borrow_and_update().clone();
        if *subscribed == *wanted {
            return None;
        }
        let first = subscribed.is_empty();
        let gone: Vec<String> = subscribed.difference(&wanted).cloned().collect();
        let accepted = self.accepted.entry(named.type_url.clone()).or_default();
        accepted.retain(|name, _| wanted.contains(name));
        let request = DeltaDiscoveryRequest {
            type_url: named.type_url.clone(),
            resource_names_subscribe: wanted.difference(subscribed).cloned().collect(),
            resource_names_unsubscribe: gone,
            initial_resource_versions: match first {
                true => accepted.clone().into_iter().collect(),
                false => Default::default(),
            },
            ..Default::default()
        };
        *subscribed = BTreeSet::clone(&wanted);
        Some(request)
    }

    /// Hands a response to the handler and makes the ACK or NACK.
    async fn take<H: Handler>(
        &mut self,
        response: DeltaDiscoveryResponse,
        handler: &mut H,
    ) -> DeltaDiscoveryRequest {
        let mut answer = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..Default::default()
        };
        let (update, mut rejections) = split(response);
        let type_url = update.type_url.clone();
        let offered: Vec<(String, String)> = update
            .upserts
            .iter()
            .map(|resource| (resource.name.clone(), resource.version.clone()))
            .collect();
        let removed = update.removals.clone();
        rejections.extend(handler.update(update).await);
        let accepted = self.accepted.entry(type_url.clone()).or_default();
        for name in removed {
            accepted.remove(&name);
        }
        for (name, version) in offered {
            if !rejections.iter().any(|rejection| rejection.name == name) {
                accepted.insert(name, version);
            }
        }
        if !rejections.is_empty() {
            tracing::warn!(
                kind = types::short_name(&type_url),
                ?rejections,
                "resources refused"
            );
            answer.error_detail = Some(nack::to_status(&rejections));
        }
        answer
    }
}

/// Splits a response into what can be handed on and what is malformed already.
fn split(response: DeltaDiscoveryResponse) -> (Update, Vec<Rejection>) {
    let mut rejections = Vec::new();
    let mut upserts = Vec::with_capacity(response.resources.len());
    for resource in response.resources {
        let Some(body) = resource.resource else {
            rejections.push(Rejection {
                name: resource.name,
                message: "the resource has no body".to_owned(),
            });
            continue;
        };
        if body.type_url != response.type_url {
            rejections.push(Rejection {
                name: resource.name,
                message: format!(
                    "the resource is a {}, the response is of type {}",
                    body.type_url, response.type_url
                ),
            });
            continue;
        }
        upserts.push(Resource {
            name: resource.name,
            version: resource.version,
            type_url: body.type_url,
            value: body.value.into(),
        });
    }
    let update = Update {
        type_url: response.type_url,
        upserts,
        removals: response.removed_resources,
    };
    (update, rejections)
}

fn describe(status: &tonic::Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

/// Waits for a change; for ever where nothing will change.
async fn renewed(renewals: &mut Option<watch::Receiver<u64>>) {
    if let Some(renewals) = renewals
        && renewals.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Waits until other names are wanted; for ever where there are none.
async fn renamed(named: &mut Option<Named>) {
    if let Some(named) = named
        && named.names.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
