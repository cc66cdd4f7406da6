//! Names of resources, in Istio's formats, so that dumps read alike.

use mesh_api::mesh_config::OutboundTrafficMode;
use mesh_model::Mesh;

/// Cluster that connects to the original destination.
pub(crate) const PASSTHROUGH: &str = "PassthroughCluster";
/// Cluster without endpoints.
pub(crate) const BLACK_HOLE: &str = "BlackHoleCluster";
/// Cluster that connects to the original destination from the address of incoming traffic.
pub(crate) const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";

/// HTTP filter that delays and ends requests on purpose; per-route settings have its name.
pub(crate) const FAULT_FILTER: &str = "envoy.filters.http.fault";
/// HTTP filter for cross-origin rules; per-route settings have its name.
pub(crate) const CORS_FILTER: &str = "envoy.filters.http.cors";

/// `outbound|9080|v1|reviews.default.svc.cluster.local`; the subset may be empty.
pub(crate) fn outbound_cluster(port: u16, subset: &str, host: &str) -> String {
    format!("outbound|{port}|{subset}|{host}")
}

/// `outbound_.9080_.v1_.reviews.default.svc.cluster.local`: a cluster as a server name.
pub(crate) fn sni(port: u16, subset: &str, host: &str) -> String {
    format!("outbound_.{port}_.{subset}_.{host}")
}

/// `inbound|9080||`.
pub(crate) fn inbound_cluster(port: u16) -> String {
    format!("inbound|{port}||")
}

/// Where traffic to unknown destinations goes.
pub(crate) fn catch_all_cluster(mesh: &Mesh) -> &'static str {
    match mesh.config().outbound_traffic_policy.mode {
        OutboundTrafficMode::AllowAny => PASSTHROUGH,
        OutboundTrafficMode::RegistryOnly => BLACK_HOLE,
    }
}
