//! All resources together.

use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, Listener};
use envoy_types::pb::google::protobuf::BoolValue;
use mesh_routing::{XdsState, compile};

use crate::chains::{listener, tcp_filter};

fn tcp(name: &str, ip: &str, port: u32) -> (String, Arc<Listener>) {
    let chain = FilterChain {
        filters: vec![tcp_filter(name)],
        ..Default::default()
    };
    (
        name.to_owned(),
        Arc::new(listener(name, ip, port, vec![chain])),
    )
}

#[test]
fn bad_resources_are_refused_alone_and_their_last_good_version_stays() {
    let mut state = XdsState {
        listeners: [tcp("a", "0.0.0.0", 1), tcp("b", "0.0.0.0", 2)].into(),
        ..XdsState::default()
    };
    let (first, refused) = compile(&state, None);
    assert!(refused.is_empty());
    let bad = Listener {
        name: "a".to_owned(),
        ..Listener::default()
    };
    state.listeners.insert("a".to_owned(), Arc::new(bad));
    let cluster = Cluster {
        name: "c".to_owned(),
        ..Cluster::default()
    };
    let broken = Cluster {
        name: "d".to_owned(),
        health_checks: vec![Default::default()],
        ..Cluster::default()
    };
    state.clusters = [
        ("c".to_owned(), Arc::new(cluster)),
        ("d".to_owned(), Arc::new(broken)),
    ]
    .into();
    let (second, refused) = compile(&state, Some(&first));
    let names: Vec<_> = refused.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["a", "d"]);
    assert!(
        refused[1].message.contains("health_checks"),
        "{}",
        refused[1].message
    );
    assert_eq!(second.listener("a").expect("the old one").address.port(), 1);
    assert!(second.cluster("c").is_some() && second.cluster("d").is_none());
    let unchanged = |s: &mesh_routing::Snapshot| Arc::as_ptr(s.listener("b").expect("b"));
    assert_eq!(
        unchanged(&first),
        unchanged(&second),
        "what did not change is not compiled again"
    );
}

#[test]
fn connections_are_handed_to_the_listener_of_their_destination() {
    let mut outbound = (*tcp("virtualOutbound", "0.0.0.0", 15001).1).clone();
    outbound.use_original_dst = Some(BoolValue { value: true });
    let listeners = [
        tcp("vip", "10.96.0.1", 80),
        tcp("wildcard", "0.0.0.0", 80),
        ("virtualOutbound".to_owned(), Arc::new(outbound)),
    ];
    let (snapshot, refused) = compile(
        &XdsState {
            listeners: listeners.into(),
            ..XdsState::default()
        },
        None,
    );
    assert!(refused.is_empty());
    let virtual_outbound = snapshot.listener("virtualOutbound").expect("it");
    let to = |address: &str| {
        snapshot
            .hand_over(virtual_outbound, address.parse().expect("an address"))
            .name
            .to_string()
    };
    assert_eq!(to("10.96.0.1:80"), "vip");
    assert_eq!(to("10.96.0.2:80"), "wildcard");
    assert_eq!(to("10.96.0.1:81"), "virtualOutbound");
    let plain = snapshot.listener("wildcard").expect("it");
    assert_eq!(
        &*snapshot
            .hand_over(plain, "10.96.0.1:80".parse().expect("an address"))
            .name,
        "wildcard"
    );
}
