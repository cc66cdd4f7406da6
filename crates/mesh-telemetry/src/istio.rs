//! Istio's standard metrics (istio.io, reference, "Istio Standard Metrics").

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Envoy's histogram bounds; durations in milliseconds, sizes in bytes.
pub const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// What is said where nothing is known.
pub const UNKNOWN: &str = "unknown";

/// One side of a connection or request. Every field is [`UNKNOWN`] until something better is known.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Workload name.
    pub workload: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// SPIFFE id.
    pub principal: Arc<str>,
    /// Label `app`.
    pub app: Arc<str>,
    /// Label `version`.
    pub version: Arc<str>,
    /// Canonical service.
    pub canonical_service: Arc<str>,
    /// Canonical revision; `latest` where a workload has none.
    pub canonical_revision: Arc<str>,
    /// Kubernetes cluster.
    pub cluster: Arc<str>,
}

impl Default for Peer {
    fn default() -> Self {
        let unknown: Arc<str> = UNKNOWN.into();
        Self {
            workload: unknown.clone(),
            namespace: unknown.clone(),
            principal: unknown.clone(),
            app: unknown.clone(),
            version: unknown.clone(),
            canonical_service: unknown.clone(),
            canonical_revision: "latest".into(),
            cluster: unknown,
        }
    }
}

/// Which side reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's proxy, or a gateway.
    Source,
    /// The server's proxy.
    Destination,
}

/// The label set of the standard metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Labels {
    /// Which side reports.
    pub reporter: Reporter,
    /// The client.
    pub source: Arc<Peer>,
    /// The server.
    pub destination: Arc<Peer>,
    /// FQDN of the service, or the host asked for.
    pub service: Arc<str>,
    /// Short name of the service, or the name of a cluster without one.
    pub service_name: Arc<str>,
    /// Namespace of the service.
    pub service_namespace: Arc<str>,
    /// `http`, `grpc` or `tcp`.
    pub protocol: &'static str,
    /// Status and gRPC status; `None` leaves both labels out (TCP metrics).
    pub response: Option<ResponseLabels>,
    /// Envoy's response flags; `-` for none.
    pub flags: &'static str,
    /// `mutual_tls` or `none` at the server, `unknown` at the client.
    pub security: &'static str,
}

/// The labels that only requests have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ResponseLabels {
    /// HTTP status; 0 where there was no answer.
    pub code: u16,
    /// gRPC status; `None` for other protocols.
    pub grpc: Option<u16>,
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let reporter = match self.reporter {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        };
        ("reporter", reporter).encode(encoder.encode_label())?;
        encode_peer(encoder, "source", &self.source)?;
        encode_peer(encoder, "destination", &self.destination)?;
        ("destination_service", &*self.service).encode(encoder.encode_label())?;
        ("destination_service_name", &*self.service_name).encode(encoder.encode_label())?;
        ("destination_service_namespace", &*self.service_namespace)
            .encode(encoder.encode_label())?;
        ("request_protocol", self.protocol).encode(encoder.encode_label())?;
        if let Some(response) = self.response {
            ("response_code", response.code.to_string().as_str()).encode(encoder.encode_label())?;
            let grpc = response
                .grpc
                .map(|code| code.to_string())
                .unwrap_or_default();
            ("grpc_response_status", grpc.as_str()).encode(encoder.encode_label())?;
        }
        ("response_flags", self.flags).encode(encoder.encode_label())?;
        ("connection_security_policy", self.security).encode(encoder.encode_label())
    }
}

use prometheus_client::encoding::EncodeLabel;

fn encode_peer(
    encoder: &mut LabelSetEncoder<'_>,
    side: &str,
    peer: &Peer,
) -> Result<(), fmt::Error> {
    let labels = [
        ("workload", &peer.workload),
        ("workload_namespace", &peer.namespace),
        ("principal", &peer.principal),
        ("app", &peer.app),
        ("version", &peer.version),
        ("canonical_service", &peer.canonical_service),
        ("canonical_revision", &peer.canonical_revision),
        ("cluster", &peer.cluster),
    ];
    for (name, value) in labels {
        (format!("{side}_{name}").as_str(), &**value).encode(encoder.encode_label())?;
    }
    Ok(())
}

/// Makes histograms with [`BUCKETS`].
#[derive(Debug, Clone, Copy)]
struct Bounds;

impl MetricConstructor<Histogram> for Bounds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(BUCKETS)
    }
}

type Histograms = Family<Labels, Histogram, Bounds>;
type Counters = Family<Labels, Counter>;

/// All standard metrics of a process. Clones share the values.
#[derive(Debug, Clone)]
pub struct IstioMetrics {
    requests: Counters,
    duration: Histograms,
    request_bytes: Histograms,
    response_bytes: Histograms,
    tcp_sent: Counters,
    tcp_received: Counters,
    tcp_opened: Counters,
    tcp_closed: Counters,
}

/// The metrics of one label set of requests.
#[derive(Debug, Clone)]
pub struct RequestHandles {
    /// `istio_requests_total`.
    pub requests: Counter,
    /// `istio_request_duration_milliseconds`.
    pub duration_ms: Histogram,
    /// `istio_request_bytes`.
    pub request_bytes: Histogram,
    /// `istio_response_bytes`.
    pub response_bytes: Histogram,
}

/// The metrics of one label set of connections.
#[derive(Debug, Clone)]
pub struct TcpHandles {
    /// Bytes to the client.
    pub sent: Counter,
    /// Bytes from the client.
    pub received: Counter,
    /// Connections opened.
    pub opened: Counter,
    /// Connections closed.
    pub closed: Counter,
}

/// The labels of `istio_build`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Build {
    component: String,
    tag: String,
}

impl EncodeLabelSet for Build {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        ("component", self.component.as_str()).encode(encoder.encode_label())?;
        ("tag", self.tag.as_str()).encode(encoder.encode_label())
    }
}

impl IstioMetrics {
    /// Registers the metrics, and `istio_build` with the component's name and version.
    pub fn register(registry: &mut Registry, component: &str, tag: &str) -> Self {
        let metrics = Self {
            requests: Counters::default(),
            duration: Histograms::new_with_constructor(Bounds),
            request_bytes: Histograms::new_with_constructor(Bounds),
            response_bytes: Histograms::new_with_constructor(Bounds),
            tcp_sent: Counters::default(),
            tcp_received: Counters::default(),
            tcp_opened: Counters::default(),
            tcp_closed: Counters::default(),
        };
        // The library adds `_total` to counters.
        registry.register(
            "istio_requests",
            "Requests handled",
            metrics.requests.clone(),
        );
        registry.register(
            "istio_request_duration_milliseconds",
            "Duration of requests",
            metrics.duration.clone(),
        );
        registry.register(
            "istio_request_bytes",
            "Size of requests",
            metrics.request_bytes.clone(),
        );
        registry.register(
            "istio_response_bytes",
            "Size of responses",
            metrics.response_bytes.clone(),
        );
        registry.register(
            "istio_tcp_sent_bytes",
            "Bytes sent to clients",
            metrics.tcp_sent.clone(),
        );
        registry.register(
            "istio_tcp_received_bytes",
            "Bytes received from clients",
            metrics.tcp_received.clone(),
        );
        registry.register(
            "istio_tcp_connections_opened",
            "Connections opened",
            metrics.tcp_opened.clone(),
        );
        registry.register(
            "istio_tcp_connections_closed",
            "Connections closed",
            metrics.tcp_closed.clone(),
        );
        let build = Family::<Build, Gauge>::default();
        build
            .get_or_create(&Build {
                component: component.to_owned(),
                tag: tag.to_owned(),
            })
            .set(1);
        registry.register("istio_build", "Version of the component", build);
        metrics
    }

    /// The handles of a label set with [`Labels::response`]. Costs a lookup: keep them.
    pub fn requests(&self, labels: &Labels) -> RequestHandles {
        RequestHandles {
            requests: self.requests.get_or_create_owned(labels),
            duration_ms: self.duration.get_or_create_owned(labels),
            request_bytes: self.request_bytes.get_or_create_owned(labels),
            response_bytes: self.response_bytes.get_or_create_owned(labels),
        }
    }

    /// The handles of a label set without [`Labels::response`]. Costs a lookup: keep them.
    pub fn tcp(&self, labels: &Labels) -> TcpHandles {
        TcpHandles {
            sent: self.tcp_sent.get_or_create_owned(labels),
            received: self.tcp_received.get_or_create_owned(labels),
            opened: self.tcp_opened.get_or_create_owned(labels),
            closed: self.tcp_closed.get_or_create_owned(labels),
        }
    }
}

/// The content type of [`expose`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The text exposition of everything in a registry.
pub fn expose(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, registry);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> Labels {
        Labels {
            reporter: Reporter::Source,
            source: Arc::default(),
            destination: Arc::default(),
            service: "reviews.default.svc.cluster.local".into(),
            service_name: "reviews".into(),
            service_namespace: "default".into(),
            protocol: "http",
            response: Some(ResponseLabels {
                code: 200,
                grpc: None,
            }),
            flags: "-",
            security: UNKNOWN,
        }
    }

    #[test]
    fn a_request_has_istios_25_labels() {
        let mut registry = Registry::default();
        let metrics = IstioMetrics::register(&mut registry, "proxy", "1");
        metrics.requests(&labels()).requests.inc();
        let text = expose(&registry);
        let line = text
            .lines()
            .find(|l| l.starts_with("istio_requests_total{"))
            .expect("the counter");
        assert_eq!(line.matches("=\"").count(), 25, "{line}");
        assert!(
            line.contains("response_code=\"200\"") && line.contains("source_workload=\"unknown\""),
            "{line}"
        );
        assert!(line.ends_with("} 1"), "{line}");
    }

    #[test]
    fn connections_have_no_response_code() {
        let mut registry = Registry::default();
        let metrics = IstioMetrics::register(&mut registry, "proxy", "1");
        metrics
            .tcp(&Labels {
                response: None,
                protocol: "tcp",
                ..labels()
            })
            .opened
            .inc();
        let text = expose(&registry);
        let line = text
            .lines()
            .find(|l| l.starts_with("istio_tcp_connections_opened_total{"))
            .expect("the counter");
        assert!(
            !line.contains("response_code") && line.contains("request_protocol=\"tcp\""),
            "{line}"
        );
    }
}
