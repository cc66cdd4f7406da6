//! Resources from the control plane: kept over a restart, refused by name.

use std::collections::BTreeMap;
use std::path::Path;

use envoy_types::pb::envoy::config::listener::v3::Listener;
use mesh_proxy::control::{Keeper, Receiver};
use mesh_proxy::shared::Shared;
use mesh_proxy::{ProxyOptions, Role};
use mesh_routing::compile::{CLUSTER, LISTENER, ROUTE};
use mesh_xds::{Handler, Resource, Update};
use prost::Message;

use crate::config::{action, cluster, http_listener, prefix, route_to, table};
use crate::stage::free_port;

mod skew;

fn update(type_url: &str, resources: &[(&str, Vec<u8>)]) -> Update {
    let resource = |(name, value): &(&str, Vec<u8>)| Resource {
        name: (*name).to_owned(),
        version: "1".to_owned(),
        type_url: type_url.to_owned(),
        value: value.clone().into(),
    };
    Update {
        type_url: type_url.to_owned(),
        upserts: resources.iter().map(resource).collect(),
        removals: Vec::new(),
    }
}

fn shared() -> std::sync::Arc<Shared> {
    Shared::new(
        ProxyOptions::from_vars(Role::Sidecar, BTreeMap::new(), Path::new("/nowhere"))
            .expect("options"),
    )
}

#[tokio::test]
async fn the_last_good_resources_survive_a_restart() {
    let dir = tempfile::tempdir().expect("a folder");
    let listener = http_listener(free_port(), |_| {});
    let name = listener.name.clone();
    {
        let shared = shared();
        let mut receiver = Receiver::new(
            shared.clone(),
            Some(Keeper::open(dir.path()).expect("a store")),
        );
        assert!(receiver.versions().is_empty());
        let good = update(CLUSTER, &[("a", cluster("a", &[]).encode_to_vec())]);
        assert!(receiver.update(good).await.is_empty());
        let good = update(LISTENER, &[(&name, listener.encode_to_vec())]);
        assert!(receiver.update(good).await.is_empty());
        assert!(
            shared.snapshot().listener(&name).is_none(),
            "a listener waits for its routes"
        );
        assert!(!shared.configured.load(std::sync::atomic::Ordering::Relaxed));
        let good = update(
            ROUTE,
            &[(
                "routes",
                table(vec![route_to(prefix("/"), action("a"))]).encode_to_vec(),
            )],
        );
        assert!(receiver.update(good).await.is_empty());
        assert!(shared.snapshot().listener(&name).is_some());
        assert!(shared.configured.load(std::sync::atomic::Ordering::Relaxed));
        // Neither is kept: one does not compile, one does not decode.
        let broken = Listener {
            name: name.clone(),
            ..Listener::default()
        };
        let bad = update(
            LISTENER,
            &[(&name, broken.encode_to_vec()), ("garbage", vec![0xff; 9])],
        );
        let mut refused: Vec<_> = receiver
            .update(bad)
            .await
            .into_iter()
            .map(|r| r.name)
            .collect();
        refused.sort();
        let mut expected = vec![name.clone(), "garbage".to_owned()];
        expected.sort();
        assert_eq!(refused, expected);
        assert!(
            shared.snapshot().listener(&name).is_some(),
            "the last good version stays"
        );
    }
    let shared = shared();
    let receiver = Receiver::new(
        shared.clone(),
        Some(Keeper::open(dir.path()).expect("a store")),
    );
    assert!(
        shared.configured.load(std::sync::atomic::Ordering::Relaxed),
        "ready without the control plane"
    );
    assert!(
        shared.snapshot().listener(&name).is_some() && shared.snapshot().cluster("a").is_some()
    );
    assert_eq!(
        receiver.versions()[LISTENER],
        [(name, "1".to_owned())].into()
    );
}

#[tokio::test]
async fn a_refused_listener_keeps_a_new_proxy_from_being_ready() {
    let shared = shared();
    let mut receiver = Receiver::new(shared.clone(), None);
    let ready = || shared.configured.load(std::sync::atomic::Ordering::Relaxed);
    let listener = http_listener(free_port(), |_| {});
    let name = listener.name.clone();
    let routes = table(vec![route_to(prefix("/"), action("a"))]);
    let good = [
        update(CLUSTER, &[("a", cluster("a", &[]).encode_to_vec())]),
        update(ROUTE, &[("routes", routes.encode_to_vec())]),
    ];
    for update in good {
        assert!(receiver.update(update).await.is_empty());
    }
    let broken = Listener {
        name: "inbound".to_owned(),
        ..Listener::default()
    };
    let mixed = update(
        LISTENER,
        &[
            (&name, listener.encode_to_vec()),
            ("inbound", broken.encode_to_vec()),
        ],
    );
    assert_eq!(receiver.update(mixed).await.len(), 1);
    assert!(shared.snapshot().listener(&name).is_some() && !ready());
    // A change elsewhere does not bring it.
    let other = update(LISTENER, &[(&name, listener.encode_to_vec())]);
    assert!(receiver.update(other).await.is_empty());
    assert!(!ready());
    let mut mended = http_listener(free_port(), |_| {});
    mended.name = "inbound".to_owned();
    let mended = update(LISTENER, &[("inbound", mended.encode_to_vec())]);
    assert!(receiver.update(mended).await.is_empty());
    assert!(ready());
}
