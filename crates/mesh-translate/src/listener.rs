//! What all listeners are made of.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType as ListenerFilterConfig;
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter, ListenerFilterChainMatchPredicate,
};
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{RouteSpecifier, UpgradeConfig};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType as HttpFilterConfig;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{HttpConnectionManager, HttpFilter, Rds};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use mesh_model::{Mesh, Node};
use prost::{Message, Name};

use crate::pb::{address, ads, any, boolean, duration};

/// Where a listener stands; HTTP is treated a little differently in each place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Traffic that the application beside the proxy sends.
    Outbound,
    /// Traffic to the application beside the proxy.
    Inbound,
    /// Traffic from outside the mesh.
    Gateway,
}

/// Where an HTTP filter chain finds its routes.
pub(crate) enum Routes {
    /// In a resource of its own.
    Discovered(String),
    /// In the listener.
    Inline(RouteConfiguration),
}

/// All addresses of the node's family.
pub(crate) fn any_address(node: &Node) -> IpAddr {
    match node.ips.first() {
        Some(IpAddr::V6(_)) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    }
}

/// `10.96.4.1_3306`, `0.0.0.0_9080`, `[::]_9080`.
pub(crate) fn name(ip: IpAddr, port: u16) -> String {
    match ip {
        IpAddr::V4(ip) => format!("{ip}_{port}"),
        IpAddr::V6(ip) => format!("[{ip}]_{port}"),
    }
}

pub(crate) fn listener(name: String, ip: IpAddr, port: u16, place: Place) -> Listener {
    let direction = if place == Place::Inbound {
        TrafficDirection::Inbound
    } else {
        TrafficDirection::Outbound
    };
    Listener {
        name,
        address: address(ip, port),
        traffic_direction: direction as i32,
        ..Listener::default()
    }
}

/// The filter chain's HTTP connection manager. Sidecars and gateways get only filters that every Envoy has; what Istio does in filters of its own
/// (metrics, peer metadata), our proxy does by itself.
pub(crate) fn http_chain(
    matched: Option<FilterChainMatch>,
    stat_prefix: String,
    routes: Routes,
    place: Place,
) -> FilterChain {
    let router = HttpFilter {
        name: "envoy.filters.http.router".to_owned(),
        config_type: Some(HttpFilterConfig::TypedConfig(any(&Router::default()))),
        ..HttpFilter::default()
    };
    let manager = HttpConnectionManager {
        stat_prefix,
        http_filters: vec![router],
        server_name: if place == Place::Outbound {
            String::new()
        } else {
            "istio-envoy".to_owned()
        },
        use_remote_address: boolean(place == Place::Gateway),
        generate_request_id: boolean(true),
        normalize_path: boolean(true),
        stream_idle_timeout: duration(Duration::ZERO),
        upgrade_configs: vec![UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..UpgradeConfig::default()
        }],
        route_specifier: Some(match routes {
            Routes::Discovered(name) => RouteSpecifier::Rds(Rds {
                config_source: ads(),
                route_config_name: name,
            }),
            Routes::Inline(routes) => RouteSpecifier::RouteConfig(routes),
        }),
        ..HttpConnectionManager::default()
    };
    chain(
        matched,
        "envoy.filters.network.http_connection_manager",
        &manager,
    )
}

/// A filter chain that passes connections on to a cluster.
pub(crate) fn tcp_chain(matched: Option<FilterChainMatch>, cluster: &str) -> FilterChain {
    let proxy = TcpProxy {
        stat_prefix: cluster.to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        ..TcpProxy::default()
    };
    chain(matched, "envoy.filters.network.tcp_proxy", &proxy)
}

fn chain<M: Message + Name>(
    filter_chain_match: Option<FilterChainMatch>,
    name: &str,
    config: &M,
) -> FilterChain {
    let filter = Filter {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(config))),
    };
    FilterChain {
        filter_chain_match,
        filters: vec![filter],
        ..FilterChain::default()
    }
}

pub(crate) fn named(mut chain: FilterChain, name: impl Into<String>) -> FilterChain {
    chain.name = name.into();
    chain
}

/// What the first bytes of plain HTTP look like to the inspectors.
pub(crate) fn plain_http() -> FilterChainMatch {
    FilterChainMatch {
        transport_protocol: "raw_buffer".to_owned(),
        application_protocols: vec!["http/1.1".to_owned(), "h2c".to_owned()],
        ..FilterChainMatch::default()
    }
}

/// Makes a listener look at the first bytes of connections. A limit of 0, the default, means none: a client that says nothing is not taken
/// for a protocol in which the server speaks first. `except` says where not to look.
pub(crate) fn inspect(
    listener: &mut Listener,
    mesh: &Mesh,
    except: Option<&ListenerFilterChainMatchPredicate>,
) {
    listener.listener_filters.push(listener_filter(
        "envoy.filters.listener.tls_inspector",
        &TlsInspector::default(),
        except,
    ));
    listener.listener_filters.push(listener_filter(
        "envoy.filters.listener.http_inspector",
        &HttpInspector::default(),
        except,
    ));
    listener.listener_filters_timeout = duration(mesh.config().protocol_detection_timeout.0);
    listener.continue_on_listener_filters_timeout = true;
}

/// Makes a listener ask the kernel for the destination that a connection had before it was captured.
pub(crate) fn restore_destination(listener: &mut Listener) {
    listener.listener_filters.push(listener_filter(
        "envoy.filters.listener.original_dst",
        &OriginalDst::default(),
        None,
    ));
}

fn listener_filter<M: Message + Name>(
    name: &str,
    config: &M,
    except: Option<&ListenerFilterChainMatchPredicate>,
) -> ListenerFilter {
    ListenerFilter {
        name: name.to_owned(),
        filter_disabled: except.cloned(),
        config_type: Some(ListenerFilterConfig::TypedConfig(any(config))),
    }
}
