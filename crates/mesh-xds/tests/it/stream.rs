//! Server and client over loopback.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::DiscoveryRequest;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_xds::client::Named;
use mesh_xds::types::{CLUSTER, ENDPOINT, LISTENER, ROUTE, SECRET};
use mesh_xds::{
    AdsClient, AdsServer, ClientConfig, Connection, ConnectionState, Handler, Limits, Node,
    NodeSource, Rejection, Report, ResourceSet, StreamEvent, Update,
};
use tokio::sync::{mpsc, oneshot, watch};

use crate::set;

/// Gives the same set to every node, refuses those named `bad`, and tells what happens.
#[derive(Clone)]
struct Source {
    sets: watch::Sender<Option<Arc<ResourceSet>>>,
    events: mpsc::UnboundedSender<StreamEvent>,
}

impl NodeSource for Source {
    fn connect(&self, node: Node, _: Option<SocketAddr>) -> Result<Connection, tonic::Status> {
        if node.id == "bad" {
            return Err(tonic::Status::invalid_argument("no such node"));
        }
        Ok(Connection {
            sets: self.sets.subscribe(),
            report: Box::new(Events(self.events.clone())),
        })
    }
}

struct Events(mpsc::UnboundedSender<StreamEvent>);

impl Report for Events {
    fn event(&mut self, event: StreamEvent) {
        let _ = self.0.send(event);
    }
}

struct Server {
    source: Source,
    events: mpsc::UnboundedReceiver<StreamEvent>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

async fn serve(address: &str) -> Server {
    let (sender, events) = mpsc::unbounded_channel();
    let source = Source {
        sets: watch::Sender::new(None),
        events: sender,
    };
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = AdsServer::new(source.clone(), "test", Limits::default());
    let task = tokio::spawn(async move {
        server
            .serve(listener, async {
                let _ = stopped.await;
            })
            .await
            .unwrap();
    });
    Server {
        source,
        events,
        address,
        stop: Some(stop),
        task,
    }
}

impl Server {
    async fn stop(mut self) {
        drop(self.stop.take());
        tokio::time::timeout(Duration::from_secs(10), self.task)
            .await
            .expect("the server ends its streams")
            .unwrap();
    }

    async fn event(&mut self, wanted: impl Fn(&StreamEvent) -> bool) -> StreamEvent {
        loop {
            let event = soon(self.events.recv()).await.unwrap();
            if wanted(&event) {
                return event;
            }
        }
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future)
        .await
        .expect("in time")
}

/// Passes updates on and refuses resources whose version is `bad`.
struct Recorder(mpsc::UnboundedSender<Update>);

impl Handler for Recorder {
    async fn update(&mut self, update: Update) -> Vec<Rejection> {
        let rejected = update
            .upserts
            .iter()
            .filter(|resource| resource.version == "bad")
            .map(|resource| Rejection {
                name: resource.name.clone(),
                message: "not good".to_owned(),
            })
            .collect();
        let _ = self.0.send(update);
        rejected
    }
}

fn node(id: &str) -> Node {
    Node {
        id: id.to_owned(),
        ..Default::default()
    }
}

type Updates = mpsc::UnboundedReceiver<Update>;

fn client(address: SocketAddr, id: &str) -> (Updates, watch::Receiver<ConnectionState>) {
    let mut config = ClientConfig::new(vec![address.to_string()], node(id));
    config.backoff_max = Duration::from_millis(100);
    run(config)
}

fn run(config: ClientConfig) -> (Updates, watch::Receiver<ConnectionState>) {
    let (sender, updates) = mpsc::unbounded_channel();
    let (client, state) = AdsClient::new(config);
    tokio::spawn(client.run(Recorder(sender)));
    (updates, state)
}

fn names(update: &Update) -> Vec<&str> {
    update
        .upserts
        .iter()
        .map(|resource| resource.name.as_str())
        .collect()
}

#[tokio::test]
async fn resources_arrive_in_order_and_changes_alone_follow() {
    let mut server = serve("127.0.0.1:0").await;
    let (mut updates, state) = client(server.address, "n");
    server.source.sets.send_replace(Some(Arc::new(set(&[
        (CLUSTER, "a", "1"),
        (ENDPOINT, "a", "1"),
        (LISTENER, "l", "1"),
        (ROUTE, "80", "1"),
    ]))));
    let mut kinds = Vec::new();
    for _ in 0..4 {
        kinds.push(soon(updates.recv()).await.unwrap().type_url);
    }
    assert_eq!(kinds, [CLUSTER, ENDPOINT, LISTENER, ROUTE]);
    assert!(matches!(*state.borrow(), ConnectionState::Connected { .. }));
    server.source.sets.send_replace(Some(Arc::new(set(&[
        (CLUSTER, "a", "1"),
        (ENDPOINT, "a", "1"),
        (LISTENER, "l", "1"),
        (ROUTE, "80", "bad"),
        (ROUTE, "81", "1"),
    ]))));
    let update = soon(updates.recv()).await.unwrap();
    assert_eq!(
        (update.type_url.as_str(), names(&update)),
        (ROUTE, vec!["80", "81"])
    );
    let event = server
        .event(|event| matches!(event, StreamEvent::Nacked { .. }))
        .await;
    let StreamEvent::Nacked {
        rejections,
        message,
        ..
    } = event
    else {
        unreachable!()
    };
    assert_eq!(
        rejections,
        [Rejection {
            name: "80".to_owned(),
            message: "not good".to_owned()
        }]
    );
    assert_eq!(message, "80: not good");
    server.stop().await;
}

#[tokio::test]
async fn a_client_outlives_its_server_and_gets_the_difference() {
    let first = serve("127.0.0.1:0").await;
    let address = first.address;
    let (mut updates, state) = client(address, "n");
    let before = [
        (CLUSTER, "a", "1"),
        (CLUSTER, "b", "1"),
        (CLUSTER, "c", "bad"),
    ];
    first.source.sets.send_replace(Some(Arc::new(set(&before))));
    for _ in 0..4 {
        soon(updates.recv()).await.unwrap();
    }
    first.stop().await;
    let mut state_after = state.clone();
    soon(state_after.wait_for(|state| matches!(state, ConnectionState::Connecting { last_error } if !last_error.is_empty())))
        .await
        .unwrap();
    let second = serve(&address.to_string()).await;
    let after = [
        (CLUSTER, "b", "2"),
        (CLUSTER, "a", "1"),
        (CLUSTER, "c", "bad"),
    ];
    second.source.sets.send_replace(Some(Arc::new(set(&after))));
    let update = soon(updates.recv()).await.unwrap();
    // `a` is held already; `c` was refused, so the client does not hold it.
    assert_eq!(
        (update.type_url.as_str(), names(&update)),
        (CLUSTER, vec!["b", "c"])
    );
    second.stop().await;
}

#[tokio::test]
async fn initial_versions_spare_a_restarted_client() {
    let server = serve("127.0.0.1:0").await;
    let resources = [(CLUSTER, "a", "1"), (CLUSTER, "b", "1")];
    server
        .source
        .sets
        .send_replace(Some(Arc::new(set(&resources))));
    let mut config = ClientConfig::new(vec![server.address.to_string()], node("n"));
    config.initial_versions = BTreeMap::from([(
        CLUSTER.to_owned(),
        BTreeMap::from([
            ("a".to_owned(), "1".to_owned()),
            ("x".to_owned(), "1".to_owned()),
        ]),
    )]);
    let (mut updates, _state) = run(config);
    let update = soon(updates.recv()).await.unwrap();
    assert_eq!(
        (update.type_url.as_str(), names(&update)),
        (CLUSTER, vec!["b"])
    );
    let removal = loop {
        let update = soon(updates.recv()).await.unwrap();
        if !update.removals.is_empty() {
            break update;
        }
    };
    assert_eq!(removal.removals, ["x"]);
    server.stop().await;
}

#[tokio::test]
async fn a_refused_node_learns_why() {
    let server = serve("127.0.0.1:0").await;
    let (_updates, mut state) = client(server.address, "bad");
    soon(state.wait_for(|state| {
        matches!(state, ConnectionState::Connecting { last_error } if last_error.contains("no such node"))
    }))
    .await
    .unwrap();
    server.stop().await;
}

#[tokio::test]
async fn state_of_the_world_is_served_too() {
    let mut server = serve("127.0.0.1:0").await;
    server.source.sets.send_replace(Some(Arc::new(set(&[
        (CLUSTER, "a", "1"),
        (ROUTE, "80", "1"),
    ]))));
    let mut client =
        AggregatedDiscoveryServiceClient::connect(format!("http://{}", server.address))
            .await
            .unwrap();
    let (requests, queue) = mpsc::channel(4);
    let request = DiscoveryRequest {
        node: Some(node("n")),
        type_url: CLUSTER.to_owned(),
        ..Default::default()
    };
    requests.send(request).await.unwrap();
    let queue = tokio_stream::wrappers::ReceiverStream::new(queue);
    let mut responses = client
        .stream_aggregated_resources(queue)
        .await
        .unwrap()
        .into_inner();
    let response = soon(responses.message()).await.unwrap().unwrap();
    assert_eq!(response.resources.len(), 1);
    let ack = DiscoveryRequest {
        type_url: CLUSTER.to_owned(),
        version_info: response.version_info.clone(),
        response_nonce: response.nonce.clone(),
        ..Default::default()
    };
    requests.send(ack).await.unwrap();
    let event = server
        .event(|event| matches!(event, StreamEvent::Acked { .. }))
        .await;
    assert!(
        matches!(event, StreamEvent::Acked { version, .. } if version == response.version_info)
    );
    server.stop().await;
}

#[tokio::test]
async fn a_type_by_name_comes_as_far_as_it_is_named() {
    let server = serve("127.0.0.1:0").await;
    server.source.sets.send_replace(Some(Arc::new(set(&[
        (CLUSTER, "a", "1"),
        (SECRET, "one", "1"),
        (SECRET, "two", "1"),
        (SECRET, "three", "1"),
    ]))));
    let wanted = |names: &[&str]| -> Arc<BTreeSet<String>> {
        Arc::new(names.iter().map(|name| (*name).to_owned()).collect())
    };
    let (names_wanted, view) = watch::channel(wanted(&["one"]));
    let (renew, reconnect) = watch::channel(0);
    let mut config = ClientConfig::new(vec![server.address.to_string()], node("n"));
    config.types = vec![CLUSTER.to_owned()];
    config.named = Some(Named {
        type_url: SECRET.to_owned(),
        names: view,
    });
    config.reconnect = Some(reconnect);
    let (mut updates, _) = run(config);
    let mut secrets = async || loop {
        let update = soon(updates.recv()).await.unwrap();
        // The first of a stream may be empty: all that is wanted is held.
        if update.type_url == SECRET && !update.upserts.is_empty() {
            let names: Vec<String> = names(&update).into_iter().map(str::to_owned).collect();
            break names;
        }
    };
    assert_eq!(secrets().await, ["one"]);
    names_wanted.send_replace(wanted(&["one", "two"]));
    assert_eq!(secrets().await, ["two"], "what is held is not sent again");
    names_wanted.send_replace(wanted(&["three"]));
    assert_eq!(secrets().await, ["three"]);
    // What is not named any more does not come, what is does.
    server.source.sets.send_replace(Some(Arc::new(set(&[
        (CLUSTER, "a", "1"),
        (SECRET, "one", "2"),
        (SECRET, "three", "2"),
    ]))));
    assert_eq!(secrets().await, ["three"]);
    // A new stream by our own choice begins with what is held.
    renew.send_replace(1);
    names_wanted.send_replace(wanted(&["one", "three"]));
    assert_eq!(secrets().await, ["one"]);
    server.stop().await;
}
