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
    /// Requests after which a connection to the backend is replaced; 0: never.
    renewed_after: u32,
}

impl Resources {
    pub(super) fn new(port: u16, backend: u16) -> Self {
        Self {
            port,
            backend,
            server: None,
            client: None,
            renewed_after: 0,
        }
    }

    pub(super) fn with_connections_renewed_after(mut self, requests: u32) -> Self {
        self.renewed_after = requests;
        self
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
        let mut set = ResourceSet::new();
        for (kind, name, value) in self.all() {
            insert(&mut set, &format!("envoy.config.{kind}"), name, &value, "1")?;
        }
        Ok(set)
    }

    fn all(&self) -> [(&'static str, &'static str, Value); 4] {
        let ads = json!({"ads": {}, "resource_api_version": "V3"});
        let eds = json!({"eds_config": ads.clone(), "service_name": "backend"});
        let mut cluster = json!({"name": "backend", "type": "EDS", "connect_timeout": "5s", "eds_cluster_config": eds});
        protect(&mut cluster, "Upstream", self.client.as_ref());
        if self.renewed_after > 0 {
            let kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
            cluster["typed_extension_protocol_options"] = json!({kind: {
                "@type": format!("type.googleapis.com/{kind}"),
                "common_http_protocol_options": {"max_requests_per_connection": self.renewed_after},
                "explicit_http_config": {"http_protocol_options": {}},
            }});
        }
        let rds = json!({"config_source": ads, "route_config_name": "http.bench"});
        [
            ("cluster.v3.Cluster", "backend", cluster),
            (
                "endpoint.v3.ClusterLoadAssignment",
                "backend",
                self.assignment(),
            ),
            ("listener.v3.Listener", "bench", self.listener(("rds", rds))),
            ("route.v3.RouteConfiguration", "http.bench", self.route()),
        ]
    }
}

fn insert(
    set: &mut ResourceSet,
    kind: &str,
    name: &str,
    value: &Value,
    version: &str,
) -> anyhow::Result<()> {
    let type_url = format!("type.googleapis.com/{kind}");
    mesh_xds::json::Descriptors::keep();
    let bytes =
        mesh_xds::json::from_json(&type_url, value).with_context(|| format!("making {name}"))?;
    set.insert(Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        type_url,
        value: bytes.into(),
    });
    Ok(())
}

/// Changes the secrets `own` and `roots` of one proxy.
pub(super) struct Secrets {
    sets: watch::Sender<Option<Arc<ResourceSet>>>,
    version: u32,
}

impl Secrets {
    /// All PEM.
    pub(super) fn give(&mut self, chain: &str, key: &str, roots: &str) -> anyhow::Result<()> {
        let known = self.sets.borrow().clone().unwrap_or_default();
        let mut set = ResourceSet::clone(&known);
        self.version += 1;
        let inline = |text: &str| json!({"inline_string": text});
        let own = json!({"certificate_chain": inline(chain), "private_key": inline(key)});
        let trusted = json!({"trusted_ca": inline(roots)});
        for (name, field, value) in [
            ("own", "tls_certificate", own),
            ("roots", "validation_context", trusted),
        ] {
            let secret = json!({"name": name, field: value});
            let kind = "envoy.extensions.transport_sockets.tls.v3.Secret";
            insert(&mut set, kind, name, &secret, &self.version.to_string())?;
        }
        self.sets.send_replace(Some(Arc::new(set)));
        Ok(())
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
    serve_changing(resources).map(|(address, _)| address)
}

/// The same, with secrets that change.
pub(super) fn serve_changing(resources: Resources) -> anyhow::Result<(SocketAddr, Secrets)> {
    let sets = watch::Sender::new(Some(Arc::new(resources.set()?)));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    let source = Source(sets.clone());
    std::thread::Builder::new()
        .name("discovery".into())
        .spawn(move || {
            let server = AdsServer::new(source, "bench", Limits::default());
            if let Err(error) = runtime.block_on(server.serve(listener, std::future::pending())) {
                eprintln!("the discovery server ended: {error}");
            }
        })?;
    Ok((address, Secrets { sets, version: 0 }))
}
