//! Whatever happens on a stream, the client ends up with what it should have, and never refers to what it lacks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use mesh_xds::subscription::{Mode, Subscription};
use mesh_xds::types::{CLUSTER, ROUTE, full_state};
use mesh_xds::{Resource, ResourceSet};
use proptest::prelude::*;

use crate::resource;

/// One step: the set of cluster names; each route is named after the cluster that it refers to.
#[derive(Clone, Debug)]
struct Step {
    clusters: BTreeMap<u8, u8>,
    take: bool,
    reconnect: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        prop::collection::btree_map(0..6_u8, 0..3_u8, 0..6),
        any::<bool>(),
        prop::bool::weighted(0.2),
    )
        .prop_map(|(clusters, take, reconnect)| Step {
            clusters,
            take,
            reconnect,
        });
    prop::collection::vec(step, 1..12)
}

fn set_of(step: &Step) -> ResourceSet {
    step.clusters
        .iter()
        .flat_map(|(name, version)| {
            [
                resource(CLUSTER, &name.to_string(), &version.to_string()),
                resource(ROUTE, &name.to_string(), &version.to_string()),
            ]
        })
        .collect()
}

#[derive(Default)]
struct Client {
    held: BTreeMap<String, BTreeMap<String, Arc<Resource>>>,
}

impl Client {
    fn open(&self, mode: Mode, number: usize) -> Subscription {
        let mut subscription = Subscription::new(mode, &number.to_string());
        for type_url in [CLUSTER, ROUTE] {
            let names = vec!["*".to_owned()];
            match mode {
                Mode::Delta => subscription.delta_request(&DeltaDiscoveryRequest {
                    type_url: type_url.to_owned(),
                    resource_names_subscribe: names,
                    initial_resource_versions: self
                        .held
                        .get(type_url)
                        .into_iter()
                        .flatten()
                        .map(|(name, resource)| (name.clone(), resource.version.clone()))
                        .collect(),
                    ..Default::default()
                }),
                Mode::StateOfTheWorld => subscription.sotw_request(&DiscoveryRequest {
                    type_url: type_url.to_owned(),
                    resource_names: names,
                    ..Default::default()
                }),
            }
            .unwrap();
        }
        subscription
    }

    fn take(&mut self, mode: Mode, subscription: &mut Subscription) {
        while let Some(response) = subscription.next_response() {
            let held = self.held.entry(response.type_url.clone()).or_default();
            if mode == Mode::StateOfTheWorld && full_state(&response.type_url) {
                held.clear();
            }
            for resource in response.resources {
                held.insert(resource.name.clone(), resource);
            }
            for name in response.removals {
                held.remove(&name);
            }
            // State of the world says nothing about routes that are gone: the client drops them with their listener.
            if mode == Mode::Delta {
                assert!(
                    self.names(ROUTE).is_subset(&self.names(CLUSTER)),
                    "a route without its cluster"
                );
            }
        }
    }

    fn names(&self, type_url: &str) -> BTreeSet<&String> {
        self.held
            .get(type_url)
            .into_iter()
            .flat_map(BTreeMap::keys)
            .collect()
    }

    fn versions(&self, type_url: &str) -> BTreeMap<String, String> {
        self.held
            .get(type_url)
            .into_iter()
            .flatten()
            .map(|(name, resource)| (name.clone(), resource.version.clone()))
            .collect()
    }
}

fn run(mode: Mode, steps: &[Step]) {
    let mut client = Client::default();
    let mut subscription = client.open(mode, 0);
    for (number, step) in steps.iter().enumerate() {
        if step.reconnect {
            subscription = client.open(mode, number + 1);
        }
        subscription.set_resources(Arc::new(set_of(step)));
        if step.take {
            client.take(mode, &mut subscription);
        }
    }
    client.take(mode, &mut subscription);
    let Some(last) = steps.last() else { return };
    let expected: BTreeMap<String, String> = last
        .clusters
        .iter()
        .map(|(name, version)| (name.to_string(), version.to_string()))
        .collect();
    assert_eq!(client.versions(CLUSTER), expected);
    if mode == Mode::Delta {
        assert_eq!(client.versions(ROUTE), expected);
    }
    assert!(subscription.next_response().is_none());
}

proptest! {
    #[test]
    fn delta_converges(steps in steps()) {
        run(Mode::Delta, &steps);
    }

    #[test]
    fn state_of_the_world_converges(steps in steps()) {
        run(Mode::StateOfTheWorld, &steps);
    }

    #[test]
    fn no_request_panics(types in prop::collection::vec(".{0,8}", 0..8), names in prop::collection::vec(".{0,4}", 0..8), nonce in ".{0,4}") {
        let mut subscription = Subscription::new(Mode::Delta, "t");
        subscription.set_resources(Arc::new(ResourceSet::new()));
        for type_url in types {
            let _ = subscription.delta_request(&DeltaDiscoveryRequest {
                type_url,
                resource_names_subscribe: names.clone(),
                resource_names_unsubscribe: names.iter().rev().cloned().collect(),
                response_nonce: nonce.clone(),
                ..Default::default()
            });
            while subscription.next_response().is_some() {}
        }
    }
}
