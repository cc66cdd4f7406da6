//! Clusters.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, DnsLookupFamily, EdsClusterConfig, LbPolicy,
};
use envoy_types::pb::envoy::config::core::v3::{
    BindConfig, Http1ProtocolOptions, Http2ProtocolOptions,
};
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterLoadAssignment, LocalityLbEndpoints};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::{
    ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
};
use mesh_model::{Mesh, Node, NodeKind, Protocol, Service, ServicePort};
use prost::Message;

use crate::metadata::{self, OrderedValue};
use crate::pb::{ads, any, duration, socket_address, uint32};
use crate::resources::{CLUSTER, Resource, Resources};
use crate::{endpoint, names};

pub(crate) use hash::{for_routes as hash_policies, set_tcp_policy};
pub(crate) use policy::Policy;
pub(crate) use tls::revocations;

mod hash;
mod policy;
mod tls;

/// Envoy's key for HTTP options of a cluster.
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Pause before DNS is asked again where an answer says nothing (MeshConfig's dnsRefreshRate by default).
const DNS_REFRESH: Duration = Duration::from_secs(60);

/// Adds the cluster of a service port, whole (`subset` empty) or in part, and its endpoints where the control plane gives them.
pub(crate) fn add_outbound(
    mesh: &Mesh,
    node: &Node,
    service: &Service,
    port: &ServicePort,
    subset: &str,
    resources: &mut Resources,
) {
    let name = names::outbound_cluster(port.number, subset, &service.host);
    let rule = mesh
        .destination_rule_for(&service.host, node)
        .map(AsRef::as_ref);
    let policy = Policy::new(mesh, rule, subset, port.number);
    let mut cluster = base(mesh, &name);
    let mut options = http_options(port.protocol);
    policy.apply_pool(&mut cluster, &mut options);
    policy.apply_upgrade(&mut options, port.protocol);
    policy.apply_outlier_detection(&mut cluster);
    if let Some(name) = &service.external_name {
        set_kind(
            &mut cluster,
            DiscoveryType::StrictDns,
            LbPolicy::LeastRequest,
        );
        policy.apply_load_balancer(&mut cluster);
        resolve(&mut cluster, name, port.number);
    } else if is_original_destination(service, node) || policy.passes_through() {
        set_kind(
            &mut cluster,
            DiscoveryType::OriginalDst,
            LbPolicy::ClusterProvided,
        );
    } else {
        set_kind(&mut cluster, DiscoveryType::Eds, LbPolicy::LeastRequest);
        policy.apply_load_balancer(&mut cluster);
        cluster.eds_cluster_config = Some(EdsClusterConfig {
            eds_config: ads(),
            service_name: name.clone(),
        });
        let part = endpoint::Part {
            service,
            port,
            subset,
            rule,
            mutual_tls_only: false,
        };
        let assignment = endpoint::assignment(mesh, node, &name, &part, &policy);
        resources.endpoints.extend([assignment]);
    }
    let target = tls::Target {
        mesh,
        node,
        service,
        port,
        subset,
    };
    let mut secrets = BTreeSet::new();
    let own_alpn = target.apply(&policy, &mut cluster, &mut options, &mut secrets);
    resources.need(secrets, rule.map_or(&[], |rule| &rule.keys));
    set_options(&mut cluster, options);
    let mut fields = described(&[service]);
    if let Some(key) = rule.and_then(|rule| rule.keys.first()) {
        fields.insert(
            "config".to_owned(),
            metadata::text(metadata::config_path(key)),
        );
    }
    if own_alpn {
        fields.insert("alpn_override".to_owned(), metadata::text("false"));
    }
    if !subset.is_empty() {
        fields.insert("subset".to_owned(), metadata::text(subset));
    }
    resources.clusters.insert(name, encode(&cluster, fields));
}

/// Adds a cluster to which TLS of clients is passed on unopened, with those endpoints of a service port that take mutual TLS of the mesh.
pub(crate) fn add_passed_on(
    mesh: &Mesh,
    node: &Node,
    service: &Service,
    port: &ServicePort,
    subset: &str,
    resources: &mut Resources,
) {
    let name = names::sni(port.number, subset, &service.host);
    let rule = mesh
        .destination_rule_for(&service.host, node)
        .map(AsRef::as_ref);
    let policy = Policy::new(mesh, rule, subset, port.number);
    let mut cluster = base(mesh, &name);
    policy.apply_pool(&mut cluster, &mut None);
    policy.apply_outlier_detection(&mut cluster);
    set_kind(&mut cluster, DiscoveryType::Eds, LbPolicy::LeastRequest);
    policy.apply_load_balancer(&mut cluster);
    cluster.eds_cluster_config = Some(EdsClusterConfig {
        eds_config: ads(),
        service_name: name.clone(),
    });
    let part = endpoint::Part {
        service,
        port,
        subset,
        rule,
        mutual_tls_only: true,
    };
    let assignment = endpoint::assignment(mesh, node, &name, &part, &policy);
    resources.endpoints.extend([assignment]);
    let resource = encode(&cluster, described(&[service]));
    resources.clusters.insert(name, resource);
}

/// Makes a cluster ask DNS for its endpoints: as often as answers allow, IPv4 only, as Istio asks where the mesh is not dual-stack.
#[expect(
    deprecated,
    reason = "Istio and Envoys of all ages know these fields; the newer ones mean the same"
)]
fn resolve(cluster: &mut Cluster, name: &str, port: u16) {
    let endpoint = endpoint::by_name(name, port);
    cluster.load_assignment = Some(ClusterLoadAssignment {
        cluster_name: cluster.name.clone(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: vec![endpoint],
            load_balancing_weight: uint32(1u32),
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    });
    cluster.dns_lookup_family = DnsLookupFamily::V4Only as i32;
    cluster.respect_dns_ttl = true;
    cluster.dns_refresh_rate = duration(DNS_REFRESH);
}

/// Headless services on sidecars: the client has chosen the pod already.
fn is_original_destination(service: &Service, node: &Node) -> bool {
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
    let mut options = http_options(protocol);
    // Limits that clients keep have to hold here too, so that the server's side has room for what they let through.
    let of_service = services.first().and_then(|service| {
        let port = port_with_target(mesh, node, service, target)?;
        Some((mesh.destination_rule_for(&service.host, node), port))
    });
    let (rule, port) = of_service.unwrap_or_default();
    Policy::new(mesh, rule.map(AsRef::as_ref), "", port).apply_pool(&mut cluster, &mut options);
    set_options(&mut cluster, options);
    cluster.upstream_bind_config = Some(inbound_source(node));
    set_kind(
        &mut cluster,
        DiscoveryType::OriginalDst,
        LbPolicy::ClusterProvided,
    );
    (name, encode(&cluster, described(services)))
}

/// Number of the service port that leads to a port of the node's own pod.
fn port_with_target(mesh: &Mesh, node: &Node, service: &Service, target: u16) -> Option<u16> {
    let served = mesh.served_by(node);
    served
        .into_iter()
        .find(|(own, of, _)| *own == target && of.host == service.host)
        .map(|(_, _, port)| port.number)
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
    cluster.circuit_breakers = Some(policy::breakers(policy::unlimited()));
    set_options(&mut cluster, http_options(Protocol::Auto));
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
        // Statistics of a cluster are found by what stands before the semicolon, since its own name has dots.
        alt_stat_name: format!("{name};"),
        connect_timeout: duration(mesh.config().connect_timeout.0),
        ..Cluster::default()
    }
}

fn set_kind(cluster: &mut Cluster, kind: DiscoveryType, policy: LbPolicy) {
    cluster.cluster_discovery_type = Some(ClusterDiscoveryType::Type(kind as i32));
    cluster.lb_policy = policy as i32;
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
fn http_options(protocol: Protocol) -> Option<HttpProtocolOptions> {
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
        _ => return None,
    };
    Some(HttpProtocolOptions {
        upstream_protocol_options: Some(options),
        ..HttpProtocolOptions::default()
    })
}

/// Envoy insists on a version in the options; where only timeouts are set it is its default.
fn set_options(cluster: &mut Cluster, options: Option<HttpProtocolOptions>) {
    if let Some(mut options) = options {
        options.upstream_protocol_options.get_or_insert_with(|| {
            UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
                protocol_config: Some(ProtocolConfig::HttpProtocolOptions(
                    Http1ProtocolOptions::default(),
                )),
            })
        });
        cluster.typed_extension_protocol_options =
            HashMap::from([(HTTP_OPTIONS.to_owned(), any(&options))]);
    }
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
