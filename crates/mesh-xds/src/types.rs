//! The resource types that travel over ADS, and the order in which they are pushed.

/// `envoy.config.cluster.v3.Cluster` (CDS).
pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
/// `envoy.config.endpoint.v3.ClusterLoadAssignment` (EDS).
pub const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
/// `envoy.config.listener.v3.Listener` (LDS).
pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
/// `envoy.config.route.v3.RouteConfiguration` (RDS).
pub const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";

/// `envoy.extensions.transport_sockets.tls.v3.Secret` (SDS).
pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// `istio.networking.nds.v1.NameTable` (NDS): the names by which agents answer DNS queries.
pub use mesh_envoy_json::NAME_TABLE;

/// The order in which additions and changes are pushed, so that nothing refers to what has not arrived: Istio's order
/// (`PushOrder` in pilot/pkg/xds). Removals go the other way round, after all additions.
pub const PUSH_ORDER: [&str; 6] = [CLUSTER, ENDPOINT, LISTENER, ROUTE, SECRET, NAME_TABLE];

/// The name that subscribes to everything of a type (xDS protocol, "wildcard").
pub const WILDCARD: &str = "*";

/// Envoy's short name of a type (`CDS`, `EDS`, `LDS`, `RDS`, `SDS`, `NDS`), or the last part of the type URL.
#[must_use]
pub fn short_name(type_url: &str) -> &str {
    match type_url {
        CLUSTER => "CDS",
        ENDPOINT => "EDS",
        LISTENER => "LDS",
        ROUTE => "RDS",
        SECRET => "SDS",
        NAME_TABLE => "NDS",
        other => other.rsplit(['.', '/']).next().unwrap_or(other),
    }
}

/// Whether the first request of a type without names means "everything" (xDS protocol: the old form of the wildcard, which
/// exists for CDS and LDS only; Istio's agents ask so for the table of names, too).
#[must_use]
pub fn empty_means_wildcard(type_url: &str) -> bool {
    matches!(type_url, CLUSTER | LISTENER | NAME_TABLE)
}

/// Whether a state-of-the-world response must hold every resource of the type (CDS and LDS; for others what is absent stays).
#[must_use]
pub fn full_state(type_url: &str) -> bool {
    matches!(type_url, CLUSTER | LISTENER)
}

/// Where a type stands in [`PUSH_ORDER`]; unknown types come last.
#[must_use]
pub fn push_rank(type_url: &str) -> usize {
    PUSH_ORDER
        .iter()
        .position(|known| *known == type_url)
        .unwrap_or(PUSH_ORDER.len())
}
