//! Clusters.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbPolicy};
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster};
use envoy_types::pb::envoy::config::core::v3::{BindConfig, Http1ProtocolOptions, Http2ProtocolOptions};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::{
    ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
};
use envoy_types::pb::google::protobuf::Any;
use mesh_api::networking::destination_rule::SimpleLb;
use mesh_model::{DestinationRule, Mesh, Node, NodeKind, Protocol, Service, ServicePort};
use prost::Message;

use crate::metadata::{self, OrderedValue};
use crate::names;
use crate::pb::{ads, any, duration, socket_address, uint32};
use crate::resources::{CLUSTER, Resource};

/// Envoy's key for HTTP options of a cluster.
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// No limit: Istio's default of all circuit breakers.
const NO_LIMIT: u32 = u32::MAX;

/// The cluster of a service port, whole (`subset` empty) or in part.
pub(crate) fn outbound(
    mesh: &Mesh,
    node: &Node,
    service: &Service,
    port: &ServicePort,
    subset: &str,
) -> (String, Resource) {
    let name = names::outbound_cluster(port.number, subset, &service.host);
    let rule = mesh
        .destination_rule(&service.host, &node.namespace)
        .map(AsRef::as_ref);
    let mut cluster = base(mesh, &name);
    cluster.circuit_breakers = Some(unlimited());
    cluster.typed_extension_protocol_options = http_options(port.protocol);
    if is_original_destination(service, node) {
        set_kind(
            &mut cluster,
            DiscoveryType::OriginalDst,
            LbPolicy::ClusterProvided,
        );
    } else {
        set_kind(
            &mut cluster,
            DiscoveryType::Eds,
            lb_policy(rule, subset, port.number),
        );
        cluster.eds_cluster_config = Some(EdsClusterConfig {
            eds_config: ads(),
            service_name: name.clone(),
        });
    }
    let mut fields = described(&[service]);
    if let Some(key) = rule.and_then(|rule| rule.keys.first()) {
        fields.insert(
            "config".to_owned(),
            metadata::text(metadata::config_path(key)),
        );
    }
    if !subset.is_empty() {
        fields.insert("subset".to_owned(), metadata::text(subset));
    }
    (name, encode(&cluster, fields))
}

/// Headless services on sidecars: the client has chosen the pod already.
pub(crate) fn is_original_destination(service: &Service, node: &Node) -> bool {
    service.headless && node.kind == NodeKind::Sidecar
}

/// The cluster that leads to the application beside the proxy: to the original destination, from an address that capture exempts.
pub(crate) fn inbound(
    mesh: &Mesh,
    node: &Node,
    target: u16,
    protocol: Protocol,
    services: &[&Service],
) -> (String, Resource) {
    let name = names::inbound_cluster(target);
    let mut cluster = base(mesh, &name);
    cluster.circuit_breakers = Some(unlimited());
    cluster.typed_extension_protocol_options = http_options(protocol);
    cluster.upstream_bind_config = Some(inbound_source(node));
    set_kind(
        &mut cluster,
        DiscoveryType::OriginalDst,
        LbPolicy::ClusterProvided,
    );
    (name, encode(&cluster, described(services)))
}

/// Clusters that every sidecar has, whatever the mesh holds.
pub(crate) fn fixed(mesh: &Mesh, node: &Node) -> Vec<(String, Resource)> {
    let mut clusters = vec![black_hole(mesh)];
    if node.kind == NodeKind::Sidecar {
        clusters.push(passthrough(mesh, names::PASSTHROUGH, None));
        clusters.push(passthrough(
            mesh,
            names::INBOUND_PASSTHROUGH,
            Some(inbound_source(node)),
        ));
    }
    clusters
}

fn black_hole(mesh: &Mesh) -> (String, Resource) {
    let mut cluster = base(mesh, names::BLACK_HOLE);
    set_kind(&mut cluster, DiscoveryType::Static, LbPolicy::RoundRobin);
    (cluster.name.clone(), Resource::new(CLUSTER, &cluster))
}

fn passthrough(mesh: &Mesh, name: &str, source: Option<BindConfig>) -> (String, Resource) {
    let mut cluster = base(mesh, name);
    cluster.circuit_breakers = Some(unlimited());
    cluster.typed_extension_protocol_options = http_options(Protocol::Auto);
    cluster.upstream_bind_config = source;
    set_kind(
        &mut cluster,
        DiscoveryType::OriginalDst,
        LbPolicy::ClusterProvided,
    );
    (cluster.name.clone(), Resource::new(CLUSTER, &cluster))
}

fn base(mesh: &Mesh, name: &str) -> Cluster {
    Cluster {
        name: name.to_owned(),
        connect_timeout: duration(mesh.config().connect_timeout.0),
        ..Cluster::default()
    }
}

fn set_kind(cluster: &mut Cluster, kind: DiscoveryType, policy: LbPolicy) {
    cluster.cluster_discovery_type = Some(ClusterDiscoveryType::Type(kind as i32));
    cluster.lb_policy = policy as i32;
}

fn lb_policy(rule: Option<&DestinationRule>, subset: &str, port: u16) -> LbPolicy {
    match rule.map_or(SimpleLb::LeastRequest, |rule| {
        rule.load_balancer(subset, port)
    }) {
        SimpleLb::RoundRobin => LbPolicy::RoundRobin,
        SimpleLb::Random => LbPolicy::Random,
        _ => LbPolicy::LeastRequest,
    }
}

fn unlimited() -> CircuitBreakers {
    let limits = Thresholds {
        max_connections: uint32(NO_LIMIT),
        max_pending_requests: uint32(NO_LIMIT),
        max_requests: uint32(NO_LIMIT),
        max_retries: uint32(NO_LIMIT),
        ..Thresholds::default()
    };
    CircuitBreakers {
        thresholds: vec![limits],
        ..CircuitBreakers::default()
    }
}

/// 127.0.0.6 or ::6: the capture rules let connections from there to the application pass.
fn inbound_source(node: &Node) -> BindConfig {
    let address = match node.ips.first() {
        Some(IpAddr::V6(_)) => IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6)),
        _ => IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6)),
    };
    BindConfig {
        source_address: Some(socket_address(address, 0)),
        ..BindConfig::default()
    }
}

/// HTTP/1.1 or HTTP/2 where the port says so; what the client speaks where the protocol is found out; nothing for TCP.
fn http_options(protocol: Protocol) -> HashMap<String, Any> {
    let explicit = |config| {
        UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(config),
        })
    };
    let options = match protocol {
        _ if protocol.is_http2() => explicit(ProtocolConfig::Http2ProtocolOptions(
            Http2ProtocolOptions::default(),
        )),
        Protocol::Http => explicit(ProtocolConfig::HttpProtocolOptions(
            Http1ProtocolOptions::default(),
        )),
        Protocol::Auto => {
            UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
                http_protocol_options: Some(Http1ProtocolOptions::default()),
                http2_protocol_options: Some(Http2ProtocolOptions::default()),
                ..UseDownstreamHttpConfig::default()
            })
        }
        _ => return HashMap::new(),
    };
    let options = HttpProtocolOptions {
        upstream_protocol_options: Some(options),
        ..HttpProtocolOptions::default()
    };
    HashMap::from([(HTTP_OPTIONS.to_owned(), any(&options))])
}

/// The services of a cluster, from which proxies take the `destination_service*` labels.
fn described(services: &[&Service]) -> BTreeMap<String, OrderedValue> {
    let entry = |service: &&Service| {
        metadata::structure([
            ("host", metadata::text(&service.host)),
            ("name", metadata::text(&service.name)),
            ("namespace", metadata::text(&service.namespace)),
        ])
    };
    BTreeMap::from([(
        "services".to_owned(),
        metadata::list(services.iter().map(entry)),
    )])
}

fn encode(cluster: &Cluster, fields: BTreeMap<String, OrderedValue>) -> Resource {
    let mut body = cluster.encode_to_vec();
    metadata::append_to_cluster(&mut body, fields);
    Resource::from_bytes(CLUSTER, body)
}
