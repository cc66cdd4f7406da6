//! What a control plane, or an earlier process, of another version leaves here.

use std::path::Path;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::rbac::v3 as rbac;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType;
use envoy_types::pb::google::protobuf::Any;
use mesh_proxy::control::{Keeper, Receiver};
use mesh_routing::XdsState;
use mesh_routing::compile::{CLUSTER, LISTENER, ROUTE};
use mesh_store::Store;
use mesh_xds::Handler;
use prost::Message;
use prost::bytes::Buf;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

use super::{shared, update};
use crate::config::{action, cluster, filter, http_listener, prefix, route_to, table};
use crate::stage::{App, Client, Proxy, free_port, wait};

/// Fields that no version has, one of each form on the wire.
fn unknown() -> Vec<u8> {
    let mut out = Vec::new();
    encode_key(19_001, WireType::Varint, &mut out);
    encode_varint(u64::MAX, &mut out);
    encode_key(19_002, WireType::SixtyFourBit, &mut out);
    out.extend_from_slice(&[7; 8]);
    encode_key(19_003, WireType::LengthDelimited, &mut out);
    encode_varint(6, &mut out);
    out.extend_from_slice(b"future");
    encode_key(19_004, WireType::ThirtyTwoBit, &mut out);
    out.extend_from_slice(&[7; 4]);
    out
}

/// The message with [`unknown`] fields at the end of itself and of every message on the way along `path`, a list of field numbers.
fn sprinkled(message: &[u8], path: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = message;
    while rest.has_remaining() {
        let began = rest;
        let (field, form) = decode_key(&mut rest).expect("a key");
        let length = match form {
            WireType::Varint => {
                decode_varint(&mut rest).expect("a number");
                0
            }
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => decode_varint(&mut rest).expect("a length") as usize,
            other => panic!("{other:?}"),
        };
        let inner = &rest[..length];
        rest.advance(length);
        match path.split_first() {
            Some((first, deeper)) if *first == field && form == WireType::LengthDelimited => {
                let inner = sprinkled(inner, deeper);
                encode_key(field, form, &mut out);
                encode_varint(inner.len() as u64, &mut out);
                out.extend(inner);
            }
            _ => out.extend_from_slice(&began[..began.len() - rest.len()]),
        }
    }
    out.extend(unknown());
    out
}

/// [`sprinkled`] along several ways.
fn from_the_future(message: &impl Message, paths: &[&[u32]]) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    paths
        .iter()
        .fold(bytes, |bytes, path| sprinkled(&bytes, path))
}

/// A filter of a type that no version has.
fn future_filter(is_optional: bool) -> HttpFilter {
    HttpFilter {
        name: "future".to_owned(),
        is_optional,
        config_type: Some(ConfigType::TypedConfig(Any {
            type_url: "type.googleapis.com/envoy.extensions.filters.http.future.v9.Future"
                .to_owned(),
            value: unknown(),
        })),
        ..HttpFilter::default()
    }
}

fn routes() -> RouteConfiguration {
    table(vec![route_to(prefix("/"), action("a"))])
}

#[tokio::test]
async fn resources_of_a_newer_control_plane_are_taken_and_work() {
    let app = App::start("a");
    let proxy = Proxy::start(&XdsState::default());
    let mut receiver = Receiver::new(proxy.shared.clone(), None);
    let at = free_port();
    let listener = http_listener(at, |manager| {
        manager.http_filters.push(future_filter(true));
    });
    // Along address.socket_address, and filter_chains.filters.typed_config.value to the connection manager: its rds.config_source and http_filters.
    let listener_ways: [&[u32]; 3] = [&[2, 1], &[3, 3, 4, 2, 3, 1], &[3, 3, 4, 2, 5, 4]];
    // Along virtual_hosts.routes.match and .route.
    let route_ways: [&[u32]; 2] = [&[2, 3, 1], &[2, 3, 2]];
    // Along load_assignment.endpoints.lb_endpoints.endpoint.address, and lb_endpoints.metadata.
    let cluster_ways: [&[u32]; 2] = [&[33, 2, 2, 1, 1, 1], &[33, 2, 2, 3]];
    let cluster = from_the_future(&cluster("a", &[app.address]), &cluster_ways);
    let updates = [
        update(CLUSTER, &[("a", cluster)]),
        update(
            LISTENER,
            &[(&listener.name, from_the_future(&listener, &listener_ways))],
        ),
        update(
            ROUTE,
            &[("routes", from_the_future(&routes(), &route_ways))],
        ),
    ];
    for update in updates {
        let refused = receiver.update(update).await;
        assert!(refused.is_empty(), "{refused:?}");
    }
    let reply = tokio::task::spawn_blocking(move || {
        wait(|| std::net::TcpStream::connect(at).is_ok());
        Client::connect(at).get("/", "")
    });
    let reply = reply.await.expect("an answer");
    assert_eq!(
        (reply.status, reply.header("x-app")),
        (200, Some("a")),
        "{reply:?}"
    );
}

#[tokio::test]
async fn what_this_version_must_understand_is_refused_by_name_and_the_last_good_stays() {
    let shared = shared();
    let mut receiver = Receiver::new(shared.clone(), None);
    let at = free_port();
    let good = http_listener(at, |_| {});
    let name = good.name.clone();
    for update in [
        update(CLUSTER, &[("a", cluster("a", &[]).encode_to_vec())]),
        update(LISTENER, &[(&name, good.encode_to_vec())]),
        update(ROUTE, &[("routes", routes().encode_to_vec())]),
    ] {
        assert!(receiver.update(update).await.is_empty());
    }
    let snapshot = shared.snapshot();
    let before = snapshot.listener(&name).expect("the listener");

    let filtered = http_listener(at, |manager| {
        manager.http_filters.push(future_filter(false));
    });
    let refused = receiver
        .update(update(LISTENER, &[(&name, filtered.encode_to_vec())]))
        .await;
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!(refused[0].name, name);
    assert!(
        refused[0].message.contains("future.v9.Future"),
        "{refused:?}"
    );
    let snapshot = shared.snapshot();
    let after = snapshot.listener(&name).expect("the listener");
    assert!(std::sync::Arc::ptr_eq(before, after));

    // A balancer of the future: this cluster is refused, its neighbour in the same answer is taken.
    let balanced = Cluster {
        lb_policy: 9001,
        ..cluster("b", &[])
    };
    let answer = update(
        CLUSTER,
        &[
            ("b", balanced.encode_to_vec()),
            ("c", cluster("c", &[]).encode_to_vec()),
        ],
    );
    let refused = receiver.update(answer).await;
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!(refused[0].name, "b");
    assert!(refused[0].message.contains("lb_policy"), "{refused:?}");
    assert!(shared.snapshot().cluster("b").is_none() && shared.snapshot().cluster("c").is_some());

    // A type that did not exist.
    let type_url = "type.googleapis.com/envoy.config.future.v9.Future";
    let refused = receiver.update(update(type_url, &[("x", unknown())])).await;
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].message.contains(type_url), "{refused:?}");
}

#[tokio::test]
async fn a_condition_of_the_future_never_means_everybody() {
    let any = rbac::Permission {
        rule: Some(rbac::permission::Rule::Any(true)),
    };
    let anybody = rbac::Principal {
        identifier: Some(rbac::principal::Identifier::Any(true)),
    };
    let policy = rbac::Policy {
        permissions: vec![any],
        principals: vec![anybody],
        ..rbac::Policy::default()
    };
    let rules = |policy: &rbac::Policy, action: i32| Rbac {
        rules: Some(rbac::Rbac {
            action,
            policies: [("p".to_owned(), policy.clone())].into(),
            ..rbac::Rbac::default()
        }),
        ..Rbac::default()
    };
    // To a decoder of this version a condition whose only field is unknown looks as if it had none.
    let principal = rbac::Policy {
        principals: vec![rbac::Principal::decode(unknown().as_slice()).expect("a principal")],
        ..policy.clone()
    };
    let permission = rbac::Policy {
        permissions: vec![rbac::Permission::decode(unknown().as_slice()).expect("a permission")],
        ..policy.clone()
    };
    let cases = [
        ("good", rules(&policy, 0), true),
        ("principal", rules(&principal, 0), false),
        ("permission", rules(&permission, 0), false),
        ("action", rules(&policy, 9001), false),
    ];
    for (what, rules, taken) in cases {
        let mut receiver = Receiver::new(shared(), None);
        let listener = http_listener(free_port(), |manager| {
            manager.http_filters.push(filter("rbac", &rules));
        });
        let answer = update(LISTENER, &[(&listener.name, listener.encode_to_vec())]);
        let refused = receiver.update(answer).await;
        assert_eq!(refused.is_empty(), taken, "{what}: {refused:?}");
    }
}

/// Adds to what a proxy kept.
fn keep(dir: &Path, entries: &[(&[u8], &[u8])]) {
    let (store, recovery) = Store::open(Some(dir)).expect("a store");
    assert!(recovery.is_clean());
    let tree = store.tree("xds").expect("a tree");
    for (key, value) in entries {
        tree.insert(key, value).expect("a write");
    }
    store.flush().expect("a flush");
}

#[tokio::test]
async fn kept_resources_of_another_version_are_read_as_far_as_they_can_be() {
    let dir = tempfile::tempdir().expect("a folder");
    let key = |type_url: &str, name: &str| [type_url.as_bytes(), &[0], name.as_bytes()].concat();
    let listener = http_listener(free_port(), |_| {});
    let newer = from_the_future(&listener, &[&[3, 3, 4, 2]]);
    let value = |body: &[u8]| [b"1".as_slice(), &[0], body].concat();
    let balanced = Cluster {
        lb_policy: 9001,
        ..cluster("b", &[])
    };
    keep(
        dir.path(),
        &[
            (&key(LISTENER, &listener.name), &value(&newer)),
            (&key(ROUTE, "routes"), &value(&routes().encode_to_vec())),
            (
                &key(CLUSTER, "a"),
                &value(&cluster("a", &[]).encode_to_vec()),
            ),
            (&key(CLUSTER, "b"), &value(&balanced.encode_to_vec())),
            (&key(CLUSTER, "noise"), &value(&[0xff; 9])),
            (
                &key("type.googleapis.com/envoy.config.future.v9.Future", "x"),
                &value(&unknown()),
            ),
            (b"a key of another form", b"a value of another form"),
            (&[0xff, 0, 0xff], &[0xff]),
        ],
    );
    let shared = shared();
    let receiver = Receiver::new(
        shared.clone(),
        Keeper::open_if_ours(Some(dir.path())).expect("a store"),
    );
    let snapshot = shared.snapshot();
    assert!(snapshot.listener(&listener.name).is_some());
    assert!(snapshot.cluster("a").is_some() && snapshot.cluster("b").is_none());
    // What was not taken is not announced as held: the control plane sends it again.
    let versions = receiver.versions();
    assert_eq!(versions[CLUSTER], [("a".to_owned(), "1".to_owned())].into());
    let held: usize = versions.values().map(|of_type| of_type.len()).sum();
    assert_eq!(held, 3, "{versions:?}");
}

#[test]
fn a_store_of_another_format_is_left_alone_and_the_proxy_starts() {
    let dir = tempfile::tempdir().expect("a folder");
    keep(dir.path(), &[(b"key", b"value")]);
    let marker = [crc(b"2").to_le_bytes().as_slice(), b"2"].concat();
    let raw = || {
        let db = sled::Config::new().path(dir.path()).open();
        db.expect("the files")
    };
    let db = raw();
    db.insert(b"\0format", marker).expect("a write");
    db.flush().expect("a flush");
    drop(db);
    let keeper = Keeper::open_if_ours(Some(dir.path())).expect("no reason to stop");
    assert!(keeper.is_none());
    let kept = raw().get(b"xds\0key").expect("a read").expect("a value");
    assert!(kept.ends_with(b"value"));
}

/// CRC32 as the store seals values with it (polynomial 0xEDB88320, reflected).
fn crc(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
    let over = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), step);
    !bytes.iter().fold(!0, over)
}
