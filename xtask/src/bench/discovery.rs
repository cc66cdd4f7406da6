//! One listener, one route, one cluster: as JSON for Envoy, over ADS for our proxy.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use mesh_xds::{
    AdsServer, Connection, Limits, Node, NodeSource, Report, Resource, ResourceSet, StreamEvent,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

const MANAGER: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";

/// The configuration of a proxy that forwards one port.
pub(super) struct Resources {
    port: u16,
    backend: u16,
    /// `DownstreamTlsContext` of the listener.
    server: Option<Value>,
    /// `UpstreamTlsContext` of the cluster.
    client: Option<Value>,
}

impl Resources {
    pub(super) fn new(port: u16, backend: u16) -> Self {
        Self {
            port,
            backend,
            server: None,
            client: None,
        }
    }

    pub(super) fn with_server(mut self, context: Value) -> Self {
        self.server = Some(context);
        self
    }

    pub(super) fn with_client(mut self, context: Value) -> Self {
        self.client = Some(context);
        self
    }

    fn route(&self) -> Value {
        let action = json!({"cluster": "backend", "timeout": "0s"});
        let host = json!({"name": "all", "domains": ["*"], "routes": [{"name": "default", "match": {"prefix": "/"}, "route": action}]});
        json!({"name": "http.bench", "virtual_hosts": [host]})
    }

    fn listener(&self, source: (&str, Value)) -> Value {
        let mut manager = json!({
            "@type": MANAGER,
            "stat_prefix": "bench",
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config":
                {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
        });
        manager[source.0] = source.1;
        let filter = json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": manager});
        let mut chain = json!({"filters": [filter]});
        protect(&mut chain, "Downstream", self.server.as_ref());
        json!({
            "name": "bench",
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": self.port}},
            "filter_chains": [chain],
        })
    }

    pub(super) fn listener_with_route(&self) -> Value {
        self.listener(("route_config", self.route()))
    }

    fn assignment(&self) -> Value {
        let endpoint = json!({"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": self.backend}}}});
        json!({"cluster_name": "backend", "endpoints": [{"lb_endpoints": [endpoint]}]})
    }

    pub(super) fn static_cluster(&self) -> Value {
        let mut cluster = json!({"name": "backend", "type": "STATIC", "connect_timeout": "5s", "load_assignment": self.assignment()});
        protect(&mut cluster, "Upstream", self.client.as_ref());
        cluster
    }

    fn set(&self) -> anyhow::Result<ResourceSet> {
        let ads = json!({"ads": {}, "resource_api_version": "V3"});
        let eds = json!({"eds_config": ads.clone(), "service_name": "backend"});
        let mut cluster = json!({"name": "backend", "type": "EDS", "connect_timeout": "5s", "eds_cluster_config": eds});
        protect(&mut cluster, "Upstream", self.client.as_ref());
        let rds = json!({"config_source": ads, "route_config_name": "http.bench"});
        let mut set = ResourceSet::new();
        for (kind, name, value) in [
            ("cluster.v3.Cluster", "backend", cluster),
            (
                "endpoint.v3.ClusterLoadAssignment",
                "backend",
                self.assignment(),
            ),
            ("listener.v3.Listener", "bench", self.listener(("rds", rds))),
            ("route.v3.RouteConfiguration", "http.bench", self.route()),
        ] {
            let type_url = format!("type.googleapis.com/envoy.config.{kind}");
            mesh_xds::json::Descriptors::keep();
            let bytes = mesh_xds::json::from_json(&type_url, &value)
                .with_context(|| format!("making {name}"))?;
            set.insert(Resource {
                name: name.to_owned(),
                version: "1".to_owned(),
                type_url,
                value: bytes.into(),
            });
        }
        Ok(set)
    }
}

/// Adds a transport socket.
fn protect(to: &mut Value, side: &str, context: Option<&Value>) {
    let Some(context) = context else { return };
    let kind = format!("envoy.extensions.transport_sockets.tls.v3.{side}TlsContext");
    let mut typed = context.clone();
    typed["@type"] = json!(format!("type.googleapis.com/{kind}"));
    to["transport_socket"] = json!({"name": "envoy.transport_sockets.tls", "typed_config": typed});
}

/// Gives every node the same set.
struct Source(watch::Sender<Option<Arc<ResourceSet>>>);

impl NodeSource for Source {
    fn connect(&self, _: Node, _: Option<SocketAddr>) -> Result<Connection, tonic::Status> {
        Ok(Connection {
            sets: self.0.subscribe(),
            report: Box::new(Printer),
        })
    }
}

/// A refusal would make the figures worthless: it is shown.
struct Printer;

impl Report for Printer {
    fn event(&mut self, event: StreamEvent) {
        if let StreamEvent::Nacked { .. } = &event {
            eprintln!("the proxy refused a resource: {event:?}");
        }
    }
}

/// Serves discovery from a thread of its own for as long as this process lives.
pub(super) fn serve(resources: Resources) -> anyhow::Result<SocketAddr> {
    let set = Arc::new(resources.set()?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    std::thread::Builder::new()
        .name("discovery".into())
        .spawn(move || {
            let (sender, _) = watch::channel(Some(set));
            let server = AdsServer::new(Source(sender), "bench", Limits::default());
            if let Err(error) = runtime.block_on(server.serve(listener, std::future::pending())) {
                eprintln!("the discovery server ended: {error}");
            }
        })?;
    Ok(address)
}
