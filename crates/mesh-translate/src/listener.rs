//! What all listeners are made of.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{Http1ProtocolOptions, TrafficDirection};
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType as ListenerFilterConfig;
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter, ListenerFilterChainMatchPredicate,
};
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::Cors;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::HttpFault;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use envoy_types::pb::envoy::extensions::filters::listener::original_src::v3::OriginalSrc;
use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{RouteSpecifier, UpgradeConfig};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType as HttpFilterConfig;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{HttpConnectionManager, HttpFilter, Rds};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    ForwardClientCertDetails, PathWithEscapedSlashesAction, SetCurrentClientCertDetails,
};
use mesh_api::mesh_config::PathNormalizationKind;
use mesh_model::{Mesh, Node};
use prost::{Message, Name};

use crate::names;
use crate::pb::{address, ads, any, boolean, duration};
use crate::policy::Policies;

mod alpn;

/// Whether our proxies are sent the filter; stock Envoys don't have it.
const SEND_ALPN_FILTER: bool = true;

/// The mark of packets that TPROXY leads to the proxy.
const TPROXY_MARK: u32 = 1337;

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

/// What the HTTP filter chains of a node have in common.
pub(crate) struct Http {
    /// HTTP/1.0 is served too.
    http10: bool,
    /// What is done to paths first.
    paths: PathNormalizationKind,
    /// Filters that decide who may do what, in order.
    policies: Vec<HttpFilter>,
    /// Requests are sent on: TLS of the mesh says the version of HTTP that is inside.
    alpn: bool,
}

impl Http {
    /// For requests that are sent on to others, without policies.
    pub(crate) fn outbound(mesh: &Mesh, node: &Node) -> Self {
        Self {
            http10: node.http10(),
            paths: mesh.config().path_normalization.normalization,
            policies: Vec::new(),
            alpn: SEND_ALPN_FILTER && !node.stock_envoy,
        }
    }

    /// For requests from outside of the mesh.
    pub(crate) fn gateway(mesh: &Mesh, node: &Node, policies: &Policies<'_>) -> Self {
        Self {
            policies: policies.http.clone(),
            ..Self::outbound(mesh, node)
        }
    }

    /// For requests to the application beside the proxy.
    pub(crate) fn inbound(mesh: &Mesh, node: &Node, policies: &Policies<'_>) -> Self {
        Self {
            alpn: false,
            ..Self::gateway(mesh, node, policies)
        }
    }

    /// What the first bytes of plain HTTP look like to the inspectors.
    pub(crate) fn plain(&self) -> FilterChainMatch {
        let names = ["http/1.1", "h2c"];
        let old = self.http10.then_some("http/1.0");
        FilterChainMatch {
            transport_protocol: "raw_buffer".to_owned(),
            application_protocols: names.into_iter().chain(old).map(str::to_owned).collect(),
            ..FilterChainMatch::default()
        }
    }
}

/// The filter chain's HTTP connection manager. Sidecars and gateways get only filters that every Envoy has; what Istio does in filters of its own
/// (metrics, peer metadata), our proxy does by itself.
pub(crate) fn http_chain(
    http: &Http,
    matched: Option<FilterChainMatch>,
    stat_prefix: String,
    routes: Routes,
    place: Place,
) -> FilterChain {
    let manager = HttpConnectionManager {
        stat_prefix,
        http_filters: http_filters(http),
        http_protocol_options: http.http10.then(|| Http1ProtocolOptions {
            accept_http_10: true,
            ..Http1ProtocolOptions::default()
        }),
        server_name: if place == Place::Outbound {
            String::new()
        } else {
            "istio-envoy".to_owned()
        },
        use_remote_address: boolean(place == Place::Gateway),
        generate_request_id: boolean(true),
        normalize_path: boolean(http.paths >= PathNormalizationKind::Base),
        merge_slashes: http.paths >= PathNormalizationKind::MergeSlashes,
        path_with_escaped_slashes_action: if http.paths
            >= PathNormalizationKind::DecodeAndMergeSlashes
        {
            PathWithEscapedSlashesAction::UnescapeAndForward
        } else {
            PathWithEscapedSlashesAction::ImplementationSpecificDefault
        } as i32,
        forward_client_cert_details: match place {
            Place::Outbound => ForwardClientCertDetails::Sanitize,
            Place::Inbound => ForwardClientCertDetails::AppendForward,
            Place::Gateway => ForwardClientCertDetails::SanitizeSet,
        } as i32,
        set_current_client_cert_details: client_certificate(place),
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

/// Policies first; fault and cross-origin filters do nothing but where a route has settings for them.
fn http_filters(http: &Http) -> Vec<HttpFilter> {
    let mut filters = http.policies.clone();
    if http.alpn {
        filters.push(http_filter(alpn::NAME, &alpn::config()));
    }
    filters.push(http_filter(names::FAULT_FILTER, &HttpFault::default()));
    filters.push(http_filter(names::CORS_FILTER, &Cors::default()));
    filters.push(http_filter("envoy.filters.http.router", &Router::default()));
    filters
}

/// What of the client's certificate the next one is told.
fn client_certificate(place: Place) -> Option<SetCurrentClientCertDetails> {
    (place != Place::Outbound).then(|| SetCurrentClientCertDetails {
        subject: boolean(true),
        cert: place == Place::Gateway,
        dns: true,
        uri: true,
        ..SetCurrentClientCertDetails::default()
    })
}

pub(crate) fn http_filter<M: Message + Name>(name: &str, config: &M) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(HttpFilterConfig::TypedConfig(any(config))),
        ..HttpFilter::default()
    }
}

/// A filter chain that passes connections on to a cluster.
pub(crate) fn tcp_chain(matched: Option<FilterChainMatch>, cluster: &str) -> FilterChain {
    tcp_proxy_chain(matched, &tcp_proxy(cluster))
}

/// Settings that pass connections on to a cluster.
pub(crate) fn tcp_proxy(cluster: &str) -> TcpProxy {
    TcpProxy {
        stat_prefix: cluster.to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        ..TcpProxy::default()
    }
}

/// A filter chain that passes connections on as the proxy's settings say.
pub(crate) fn tcp_proxy_chain(matched: Option<FilterChainMatch>, proxy: &TcpProxy) -> FilterChain {
    chain(matched, "envoy.filters.network.tcp_proxy", proxy)
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

/// Makes a listener look at the first bytes of connections. A limit of 0, the default, means none: a client that says nothing is not taken
/// for a protocol in which the server speaks first. `except` says where not to look.
pub(crate) fn inspect(
    listener: &mut Listener,
    mesh: &Mesh,
    except: Option<&ListenerFilterChainMatchPredicate>,
) {
    inspect_tls(listener, mesh, except);
    inspect_http(listener, mesh, except);
}

/// The same for plain HTTP alone.
pub(crate) fn inspect_http(
    listener: &mut Listener,
    mesh: &Mesh,
    except: Option<&ListenerFilterChainMatchPredicate>,
) {
    listener.listener_filters.push(listener_filter(
        "envoy.filters.listener.http_inspector",
        &HttpInspector::default(),
        except,
    ));
    limit_inspection(listener, mesh);
}

fn limit_inspection(listener: &mut Listener, mesh: &Mesh) {
    listener.listener_filters_timeout = duration(mesh.config().protocol_detection_timeout.0);
    listener.continue_on_listener_filters_timeout = true;
}

/// The same for the server name of TLS alone.
pub(crate) fn inspect_tls(
    listener: &mut Listener,
    mesh: &Mesh,
    except: Option<&ListenerFilterChainMatchPredicate>,
) {
    listener.listener_filters.push(listener_filter(
        "envoy.filters.listener.tls_inspector",
        &TlsInspector::default(),
        except,
    ));
    limit_inspection(listener, mesh);
}

/// The same for a gateway, which closes connections that don't say a server name in time (Envoy's own limit, 15 s).
pub(crate) fn inspect_gateway_tls(listener: &mut Listener) {
    listener.listener_filters.push(listener_filter(
        "envoy.filters.listener.tls_inspector",
        &TlsInspector::default(),
        None,
    ));
}

/// Makes a listener ask the kernel for the destination that a connection had before it was captured.
pub(crate) fn restore_destination(listener: &mut Listener) {
    listener.listener_filters.push(listener_filter(
        "envoy.filters.listener.original_dst",
        &OriginalDst::default(),
        None,
    ));
}

/// Makes a listener take connections that come by TPROXY, and pass them on from the client's address. The mark leads the application's answers
/// back to the proxy; it is that of the capture rules (`istio-iptables -t`, 1337).
pub(crate) fn keep_addresses(listener: &mut Listener) {
    listener.transparent = boolean(true);
    listener.listener_filters.push(listener_filter(
        "envoy.filters.listener.original_src",
        &OriginalSrc {
            mark: TPROXY_MARK,
            ..OriginalSrc::default()
        },
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
