//! xDS resources for the tests.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
use envoy_types::pb::envoy::config::core::v3::address::Address as Kind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, Metadata, RuntimeFractionalPercent, SocketAddress};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints};
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener};
use envoy_types::pb::envoy::config::route::v3::{self as route, RouteConfiguration};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{HttpConnectionManager, HttpFilter, Rds};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType as HttpConfigType;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier as TcpCluster;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use envoy_types::pb::google::protobuf::value::Kind as ValueKind;
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration, Struct, UInt32Value, Value};
use mesh_routing::XdsState;
use prost::{Message, Name};

pub fn address(address: SocketAddr) -> Address {
    Address {
        address: Some(Kind::SocketAddress(SocketAddress {
            address: address.ip().to_string(),
            port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
            ..Default::default()
        })),
    }
}

fn listener(at: SocketAddr, type_name: &str, message: &impl Message) -> Listener {
    let config = Any {
        type_url: format!("type.googleapis.com/{type_name}"),
        value: message.encode_to_vec(),
    };
    let filter = Filter {
        name: type_name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(config)),
    };
    Listener {
        name: at.to_string(),
        address: Some(address(at)),
        filter_chains: vec![FilterChain {
            filters: vec![filter],
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// An HTTP listener whose routes come from the table `routes`.
pub fn http_listener(at: SocketAddr, change: impl FnOnce(&mut HttpConnectionManager)) -> Listener {
    let mut manager = HttpConnectionManager {
        stat_prefix: "test".to_owned(),
        server_name: "istio-envoy".to_owned(),
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            route_config_name: "routes".to_owned(),
            ..Default::default()
        })),
        ..Default::default()
    };
    change(&mut manager);
    listener(
        at,
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        &manager,
    )
}

pub fn tcp_listener(at: SocketAddr, cluster: &str) -> Listener {
    tcp_listener_with(at, cluster, |_| {})
}

pub fn tcp_listener_with(
    at: SocketAddr,
    cluster: &str,
    change: impl FnOnce(&mut TcpProxy),
) -> Listener {
    let mut proxy = TcpProxy {
        stat_prefix: "test".to_owned(),
        cluster_specifier: Some(TcpCluster::Cluster(cluster.to_owned())),
        ..Default::default()
    };
    change(&mut proxy);
    listener(
        at,
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        &proxy,
    )
}

/// A cluster with static endpoints, balanced in turn. The endpoints belong to the workload of the cluster's name.
pub fn cluster(name: &str, endpoints: &[SocketAddr]) -> Cluster {
    let text = |text: String| Value {
        kind: Some(ValueKind::StringValue(text)),
    };
    let workload = format!("{name}-workload;default;{name};v1;Kubernetes");
    let istio = Struct {
        fields: [("workload".to_owned(), text(workload))].into(),
    };
    let metadata = Metadata {
        filter_metadata: [("istio".to_owned(), istio)].into(),
        ..Default::default()
    };
    let endpoint = |at: &SocketAddr| LbEndpoint {
        metadata: Some(metadata.clone()),
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(address(*at)),
            ..Default::default()
        })),
        ..Default::default()
    };
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static as i32)),
        lb_policy: LbPolicy::RoundRobin as i32,
        connect_timeout: Some(Duration {
            seconds: 2,
            nanos: 0,
        }),
        load_assignment: Some(ClusterLoadAssignment {
            cluster_name: name.to_owned(),
            endpoints: vec![LocalityLbEndpoints {
                lb_endpoints: endpoints.iter().map(endpoint).collect(),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub fn prefix(prefix: &str) -> route::RouteMatch {
    route::RouteMatch {
        path_specifier: Some(route::route_match::PathSpecifier::Prefix(prefix.to_owned())),
        ..Default::default()
    }
}

pub fn action(cluster: &str) -> route::RouteAction {
    route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(
            cluster.to_owned(),
        )),
        timeout: Some(Duration::default()),
        ..Default::default()
    }
}

pub fn weighted(clusters: &[(&str, u32)]) -> route::RouteAction {
    let entry = |(name, weight): &(&str, u32)| route::weighted_cluster::ClusterWeight {
        name: (*name).to_owned(),
        weight: Some(UInt32Value { value: *weight }),
        ..Default::default()
    };
    let clusters = clusters.iter().map(entry).collect();
    let weighted = route::WeightedCluster {
        clusters,
        ..Default::default()
    };
    route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::WeightedClusters(
            weighted,
        )),
        ..action("")
    }
}

pub fn route_to(conditions: route::RouteMatch, action: route::RouteAction) -> route::Route {
    route::Route {
        r#match: Some(conditions),
        action: Some(route::route::Action::Route(action)),
        ..Default::default()
    }
}

/// The table `routes` with one virtual host for everything.
pub fn table(routes: Vec<route::Route>) -> RouteConfiguration {
    let host = route::VirtualHost {
        name: "all".to_owned(),
        domains: vec!["*".to_owned()],
        routes,
        include_request_attempt_count: true,
        ..Default::default()
    };
    RouteConfiguration {
        name: "routes".to_owned(),
        virtual_hosts: vec![host],
        ..Default::default()
    }
}

pub fn state(
    listeners: Vec<Listener>,
    routes: RouteConfiguration,
    clusters: Vec<Cluster>,
) -> XdsState {
    XdsState {
        listeners: listeners
            .into_iter()
            .map(|l| (l.name.clone(), Arc::new(l)))
            .collect(),
        routes: [(routes.name.clone(), Arc::new(routes))].into(),
        clusters: clusters
            .into_iter()
            .map(|c| (c.name.clone(), Arc::new(c)))
            .collect(),
        ..XdsState::default()
    }
}

pub fn yes() -> Option<BoolValue> {
    Some(BoolValue { value: true })
}

/// A message as Envoy wraps it.
pub fn any<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

/// An HTTP filter.
pub fn filter<M: Message + Name>(name: &str, message: &M) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(HttpConfigType::TypedConfig(any(message))),
        ..Default::default()
    }
}

pub fn all() -> Option<FractionalPercent> {
    Some(FractionalPercent {
        numerator: 100,
        denominator: 0,
    })
}

pub fn always() -> Option<RuntimeFractionalPercent> {
    Some(RuntimeFractionalPercent {
        default_value: all(),
        ..Default::default()
    })
}

/// One listener with filters, one route with settings for them, clusters.
pub fn filtered(
    at: SocketAddr,
    filters: Vec<HttpFilter>,
    action: route::RouteAction,
    settings: &[(&str, Any)],
    clusters: Vec<Cluster>,
) -> XdsState {
    let settings: HashMap<String, Any> = settings
        .iter()
        .map(|(name, any)| ((*name).to_owned(), any.clone()))
        .collect();
    let route = route::Route {
        typed_per_filter_config: settings,
        ..route_to(prefix("/"), action)
    };
    let listener = http_listener(at, |manager| manager.http_filters = filters);
    state(vec![listener], table(vec![route]), clusters)
}
