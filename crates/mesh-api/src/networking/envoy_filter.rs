//! EnvoyFilter: patches to the generated Envoy configuration.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{PolicyTargetReference, WorkloadSelector};

/// Patches to the generated Envoy configuration.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EnvoyFilter {
    /// Workloads; none is all of the namespace.
    pub workload_selector: Option<WorkloadSelector>,
    /// Gateways or services instead of workloads.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Patches, in order.
    pub config_patches: Vec<EnvoyConfigObjectPatch>,
    /// Order among EnvoyFilters, lowest first.
    pub priority: i32,
}

/// One patch.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EnvoyConfigObjectPatch {
    /// What is patched.
    pub apply_to: ApplyTo,
    /// Where.
    #[serde(rename = "match")]
    pub matcher: Option<EnvoyConfigObjectMatch>,
    /// How.
    pub patch: Option<Patch>,
}

/// What is patched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ApplyTo {
    /// Not given.
    #[default]
    Invalid,
    /// Listener.
    Listener,
    /// Filter chain.
    FilterChain,
    /// Network filter.
    NetworkFilter,
    /// HTTP filter.
    HttpFilter,
    /// Route table.
    RouteConfiguration,
    /// Virtual host.
    VirtualHost,
    /// Route.
    HttpRoute,
    /// Cluster.
    Cluster,
    /// Extension configuration.
    ExtensionConfig,
    /// Bootstrap.
    Bootstrap,
    /// Listener filter.
    ListenerFilter,
}

/// Where a patch applies.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EnvoyConfigObjectMatch {
    /// Kind of proxy and direction.
    pub context: PatchContext,
    /// Conditions on the proxy.
    pub proxy: Option<ProxyMatch>,
    /// Conditions on a listener.
    pub listener: Option<ListenerMatch>,
    /// Conditions on a route table.
    pub route_configuration: Option<RouteConfigurationMatch>,
    /// Conditions on a cluster.
    pub cluster: Option<ClusterMatch>,
    /// Conditions in a waypoint.
    pub waypoint: Option<WaypointMatch>,
}

/// Kind of proxy and direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PatchContext {
    /// All.
    #[default]
    Any,
    /// Incoming at a sidecar.
    SidecarInbound,
    /// Outgoing at a sidecar.
    SidecarOutbound,
    /// Gateway.
    Gateway,
    /// Waypoint.
    Waypoint,
}

/// Conditions on the proxy.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProxyMatch {
    /// Regular expression on the version.
    pub proxy_version: String,
    /// Node metadata.
    pub metadata: BTreeMap<String, String>,
}

/// Conditions on a listener.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ListenerMatch {
    /// Port.
    pub port_number: u32,
    /// Name of the port.
    pub port_name: String,
    /// Conditions on a filter chain.
    pub filter_chain: Option<FilterChainMatch>,
    /// Name of a listener filter.
    pub listener_filter: String,
    /// Name of the listener.
    pub name: String,
}

/// Conditions on a filter chain.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FilterChainMatch {
    /// Name.
    pub name: String,
    /// Server name.
    pub sni: String,
    /// `raw_buffer` or `tls`.
    pub transport_protocol: String,
    /// Name of the transport socket.
    pub transport_socket: String,
    /// Application protocols, separated by commas.
    pub application_protocols: String,
    /// Destination port.
    pub destination_port: u32,
    /// A network filter.
    pub filter: Option<FilterMatch>,
}

/// A network filter.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FilterMatch {
    /// Name.
    pub name: String,
    /// An HTTP filter in it.
    pub sub_filter: Option<SubFilterMatch>,
}

/// An HTTP filter.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SubFilterMatch {
    /// Name.
    pub name: String,
}

/// Conditions on a route table.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RouteConfigurationMatch {
    /// Port.
    pub port_number: u32,
    /// Name of the port.
    pub port_name: String,
    /// `namespace/name` of the gateway.
    pub gateway: String,
    /// A virtual host.
    pub vhost: Option<VirtualHostMatch>,
    /// Name of the route table.
    pub name: String,
}

/// A virtual host.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VirtualHostMatch {
    /// Name.
    pub name: String,
    /// One of its domains.
    pub domain_name: String,
    /// A route.
    pub route: Option<RouteMatch>,
}

/// A route.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RouteMatch {
    /// Name.
    pub name: String,
    /// Kind.
    pub action: RouteAction,
}

/// Kind of a route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RouteAction {
    /// All.
    #[default]
    Any,
    /// Forwards.
    Route,
    /// Redirects.
    Redirect,
    /// Answers.
    DirectResponse,
}

/// Conditions on a cluster.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClusterMatch {
    /// Port of the service.
    pub port_number: u32,
    /// Host of the service.
    pub service: String,
    /// Subset.
    pub subset: String,
    /// Name of the cluster.
    pub name: String,
}

/// Conditions in a waypoint.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WaypointMatch {
    /// Port of the service.
    pub port_number: u32,
    /// A filter.
    pub filter: Option<FilterMatch>,
    /// A route.
    pub route: Option<WaypointRouteMatch>,
}

/// A route of a waypoint.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WaypointRouteMatch {
    /// Name.
    pub name: String,
}

/// What is done.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Patch {
    /// How.
    pub operation: PatchOperation,
    /// Envoy configuration in JSON form; null if not given.
    #[schemars(schema_with = "crate::schema::free_object")]
    pub value: serde_json::Value,
    /// Where an added filter belongs.
    pub filter_class: FilterClass,
}

/// How a patch is applied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PatchOperation {
    /// Not given.
    #[default]
    Invalid,
    /// Merged.
    Merge,
    /// Added at the end.
    Add,
    /// Removed.
    Remove,
    /// Before the match.
    InsertBefore,
    /// After the match.
    InsertAfter,
    /// First.
    InsertFirst,
    /// Instead of the match.
    Replace,
    /// Merged; lists are replaced.
    MergeAndReplaceList,
}

/// Where an added filter belongs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FilterClass {
    /// Anywhere.
    #[default]
    Unspecified,
    /// After authentication.
    Authn,
    /// After authorization.
    Authz,
    /// Before statistics.
    Stats,
}
