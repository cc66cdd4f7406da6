//! Filter chain matching in Envoy's order.

use envoy_types::pb::envoy::config::core::v3::address::Address as Kind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, CidrRange, SocketAddress};
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::listener_filter_chain_match_predicate::Rule;
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain, FilterChainMatch, Listener as PbListener, ListenerFilter,
    ListenerFilterChainMatchPredicate,
};
use envoy_types::pb::envoy::extensions::filters::listener::original_src::v3::OriginalSrc;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use envoy_types::pb::google::protobuf::{Any, BoolValue, UInt32Value};
use mesh_routing::chain::ConnectionView;
use mesh_routing::listener::Listener;
use prost::{Message, Name};

pub fn tcp_filter(cluster: &str) -> Filter {
    let proxy = TcpProxy {
        stat_prefix: "t".to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        ..Default::default()
    };
    Filter {
        name: "envoy.filters.network.tcp_proxy".to_owned(),
        config_type: Some(ConfigType::TypedConfig(Any {
            type_url: "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
                .to_owned(),
            value: proxy.encode_to_vec(),
        })),
    }
}

fn chain(name: &str, conditions: FilterChainMatch) -> FilterChain {
    FilterChain {
        name: name.to_owned(),
        filter_chain_match: Some(conditions),
        filters: vec![tcp_filter(name)],
        ..Default::default()
    }
}

pub fn listener(name: &str, ip: &str, port: u32, chains: Vec<FilterChain>) -> PbListener {
    let socket = SocketAddress {
        address: ip.to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(port)),
        ..Default::default()
    };
    PbListener {
        name: name.to_owned(),
        address: Some(Address {
            address: Some(Kind::SocketAddress(socket)),
        }),
        filter_chains: chains,
        ..Default::default()
    }
}

fn port(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

fn range(text: &str) -> CidrRange {
    let (address, len) = text.split_once('/').expect("a range");
    CidrRange {
        address_prefix: address.to_owned(),
        prefix_len: port(len.parse().expect("a length")),
    }
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

fn chosen(listener: &Listener, destination: &str, view: ConnectionView<'_>) -> String {
    let destination = Some(destination.parse().expect("an address"));
    let source = Some("192.0.2.9:999".parse().expect("an address"));
    let view = ConnectionView {
        destination,
        source,
        ..view
    };
    listener
        .chain(&view)
        .map_or("none".to_owned(), |chain| chain.name.to_string())
}

fn plain<'a>(applications: &'a [&'a str]) -> ConnectionView<'a> {
    ConnectionView {
        transport: "raw_buffer",
        applications,
        ..ConnectionView::default()
    }
}

#[test]
fn the_inbound_matrix() {
    let on = |name: &str, transport: &str, applications: &[&str], destination| {
        let transport_protocol = transport.to_owned();
        let application_protocols = names(applications);
        chain(
            name,
            FilterChainMatch {
                destination_port: destination,
                transport_protocol,
                application_protocols,
                ..Default::default()
            },
        )
    };
    let message = listener(
        "virtualInbound",
        "0.0.0.0",
        15006,
        vec![
            on("blackhole", "", &[], port(15006)),
            on("9080-http", "raw_buffer", &["http/1.1", "h2c"], port(9080)),
            on("9080-tcp", "raw_buffer", &[], port(9080)),
            on("any-http", "raw_buffer", &["http/1.1", "h2c"], None),
            on("any-tls", "tls", &[], None),
            on("any-tcp", "raw_buffer", &[], None),
        ],
    );
    let listener = Listener::compile(&message).expect("a listener");
    let tls = || ConnectionView {
        transport: "tls",
        ..ConnectionView::default()
    };
    assert_eq!(
        chosen(&listener, "10.0.0.1:9080", plain(&["http/1.1"])),
        "9080-http"
    );
    assert_eq!(
        chosen(&listener, "10.0.0.1:9080", plain(&["h2c"])),
        "9080-http"
    );
    assert_eq!(chosen(&listener, "10.0.0.1:9080", plain(&[])), "9080-tcp");
    assert_eq!(
        chosen(&listener, "10.0.0.1:9080", tls()),
        "none",
        "Envoy does not go back to a less specific port"
    );
    assert_eq!(
        chosen(&listener, "10.0.0.1:80", plain(&["http/1.0"])),
        "any-tcp"
    );
    assert_eq!(
        chosen(&listener, "10.0.0.1:80", plain(&["http/1.1"])),
        "any-http"
    );
    assert_eq!(chosen(&listener, "10.0.0.1:80", tls()), "any-tls");
    assert_eq!(
        chosen(&listener, "10.0.0.1:15006", plain(&["http/1.1"])),
        "blackhole"
    );
}

#[test]
fn the_longest_range_and_name_win() {
    let to = |name: &str, ranges: &[&str], sni: &[&str]| {
        let prefix_ranges = ranges.iter().map(|r| range(r)).collect();
        chain(
            name,
            FilterChainMatch {
                prefix_ranges,
                server_names: names(sni),
                ..Default::default()
            },
        )
    };
    let message = listener(
        "l",
        "0.0.0.0",
        443,
        vec![
            to("wide", &["10.0.0.0/8"], &[]),
            to("narrow", &["10.1.0.0/16", "172.16.0.1/32"], &[]),
            to("v6", &["fd00::/8"], &[]),
            to("star", &[], &["*.example.com"]),
            to("star-long", &[], &["*.a.example.com"]),
            to("exact", &[], &["x.a.example.com"]),
            to("rest", &[], &[]),
        ],
    );
    let listener = Listener::compile(&message).expect("a listener");
    assert_eq!(chosen(&listener, "10.2.0.1:1", plain(&[])), "wide");
    assert_eq!(chosen(&listener, "10.1.0.1:1", plain(&[])), "narrow");
    assert_eq!(chosen(&listener, "172.16.0.1:1", plain(&[])), "narrow");
    assert_eq!(chosen(&listener, "[fd12::1]:1", plain(&[])), "v6");
    let sni = |name| ConnectionView {
        transport: "tls",
        server_name: Some(name),
        ..ConnectionView::default()
    };
    assert_eq!(
        chosen(&listener, "8.8.8.8:1", sni("x.a.example.com")),
        "exact"
    );
    assert_eq!(
        chosen(&listener, "8.8.8.8:1", sni("y.a.example.com")),
        "star-long"
    );
    assert_eq!(
        chosen(&listener, "8.8.8.8:1", sni("y.b.example.com")),
        "star"
    );
    assert_eq!(chosen(&listener, "8.8.8.8:1", sni("example.com")), "rest");
    assert_eq!(chosen(&listener, "8.8.8.8:1", plain(&[])), "rest");
}

#[test]
fn only_ports_that_ask_are_sniffed() {
    let http = FilterChainMatch {
        application_protocols: names(&["http/1.1"]),
        ..Default::default()
    };
    let mut message = listener(
        "l",
        "0.0.0.0",
        15006,
        vec![
            chain("http", http),
            chain("rest", FilterChainMatch::default()),
        ],
    );
    let ports = Rule::DestinationPortRange(Int32Range {
        start: 3306,
        end: 3307,
    });
    let inspector =
        "type.googleapis.com/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector";
    message.listener_filters = vec![ListenerFilter {
        name: "envoy.filters.listener.http_inspector".to_owned(),
        filter_disabled: Some(ListenerFilterChainMatchPredicate { rule: Some(ports) }),
        config_type: Some(
            envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType::TypedConfig(
                Any {
                    type_url: inspector.to_owned(),
                    ..Default::default()
                },
            ),
        ),
    }];
    let listener = Listener::compile(&message).expect("a listener");
    let needs = |port: u16| listener.needs_bytes(([10, 0, 0, 1], port).into());
    assert!(needs(80) && needs(3305) && needs(3307));
    assert!(!needs(3306), "the server speaks first there");
    message.filter_chains.remove(0);
    let listener = Listener::compile(&message).expect("a listener");
    assert!(
        !listener.needs_bytes(([10, 0, 0, 1], 80).into()),
        "no chain asks"
    );
}

#[test]
fn unknown_filters_are_refused_by_name() {
    let mut bad = chain("c", FilterChainMatch::default());
    bad.filters = vec![Filter {
        name: "redis".to_owned(),
        config_type: Some(ConfigType::TypedConfig(Any {
            type_url: "type.googleapis.com/envoy.Redis".to_owned(),
            ..Default::default()
        })),
    }];
    let error = Listener::compile(&listener("l", "0.0.0.0", 1, vec![bad]))
        .expect_err("refused")
        .to_string();
    assert!(
        error.contains("filter_chains[0] c.filters[0] redis") && error.contains("envoy.Redis"),
        "{error}"
    );
}

#[test]
fn the_clients_address_is_kept_where_the_listener_asks_for_it() {
    let compiled = |filter: Option<OriginalSrc>, name: &str| {
        let mut message = listener("l", "0.0.0.0", 15006, Vec::new());
        message.transparent = Some(BoolValue { value: true });
        let filter = filter.map(|filter| ListenerFilter {
            name: name.to_owned(),
            config_type: Some(
                envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType::TypedConfig(
                    Any {
                        type_url: OriginalSrc::type_url(),
                        value: filter.encode_to_vec(),
                    },
                ),
            ),
            ..Default::default()
        });
        message.listener_filters.extend(filter);
        Listener::compile(&message)
    };
    let plain = compiled(None, "").expect("a listener");
    assert!(plain.transparent && plain.original_source.is_none());
    let marked = OriginalSrc {
        mark: 1337,
        ..Default::default()
    };
    let kept = compiled(Some(marked), "any name").expect("a listener");
    assert_eq!(kept.original_source, Some(1337));
    let with_port = OriginalSrc {
        bind_port: true,
        ..Default::default()
    };
    let error = compiled(Some(with_port), "src")
        .expect_err("refused")
        .to_string();
    assert!(
        error.contains("listener_filters[0] src") && error.contains("bind_port"),
        "{error}"
    );
}
