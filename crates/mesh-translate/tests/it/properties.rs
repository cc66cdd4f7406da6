//! What has to hold for any input.

use std::collections::BTreeSet;

use mesh_model::{Mesh, ObjectKey};
use mesh_translate::{Resources, translate};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::case::{Case, by_type, item, objects};

fn changed(before: &Resources, after: &Resources) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for ((kind, before), (_, after)) in by_type(before).into_iter().zip(by_type(after)) {
        let all: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        names.extend(
            all.into_iter()
                .filter(|name| before.get(*name) != after.get(*name))
                .map(|name| format!("{kind}/{name}")),
        );
    }
    names
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// The order in which objects arrive means nothing, neither for the mesh nor for the bytes.
    #[test]
    fn order_of_arrival_does_not_matter(order in Just((0..Case::named("bookinfo-sidecar").raw.len()).collect::<Vec<_>>()).prop_shuffle()) {
        let case = Case::named("bookinfo-sidecar");
        let shuffled: Vec<_> = order.into_iter().map(|index| case.raw[index].clone()).collect();
        let mesh = Mesh::build(&objects(&shuffled));
        prop_assert_eq!(&mesh, &case.mesh());
        prop_assert_eq!(translate(&mesh, &case.node), translate(&case.mesh(), &case.node));
    }
}

#[test]
fn bytes_are_the_same_each_time() {
    for case in Case::all() {
        let first = translate(&case.mesh(), &case.node);
        for _ in 0..5 {
            assert_eq!(
                translate(&case.mesh(), &case.node),
                first,
                "{}",
                case.folder.display()
            );
        }
    }
}

#[test]
fn a_change_touches_only_what_it_is_about() {
    let case = Case::named("bookinfo-sidecar");
    let before = translate(&case.mesh(), &case.node);

    // One endpoint less: the service's endpoints, whole and by subset, no other.
    let mut objects = case.objects.clone();
    let is_slice = |raw: &&Value| raw["metadata"]["name"] == "reviews-1";
    let mut slice = case.raw.iter().find(is_slice).unwrap().clone();
    slice["endpoints"].as_array_mut().unwrap().pop();
    assert!(objects.upsert(item(&slice)));
    let after = translate(&Mesh::build(&objects), &case.node);
    let names = changed(&before, &after);
    let of_service = |name: &String| {
        name.starts_with("endpoints/outbound|9080|")
            && name.ends_with("|reviews.default.svc.cluster.local")
    };
    assert!(
        !names.is_empty() && names.iter().all(of_service),
        "{names:?}"
    );

    // The last endpoint of a service: with it goes the identity that its clients expect.
    let mut objects = case.objects.clone();
    assert!(objects.remove(&ObjectKey::new("EndpointSlice", "default", "ratings-1")));
    let after = translate(&Mesh::build(&objects), &case.node);
    let ratings = "outbound|9080||ratings.default.svc.cluster.local";
    assert_eq!(
        changed(&before, &after),
        [
            format!("clusters/{ratings}"),
            format!("endpoints/{ratings}")
        ]
        .into()
    );

    // A rule: one route table.
    let mut objects = case.objects.clone();
    objects.upsert(item(&json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": { "name": "details", "namespace": "default" },
        "spec": { "hosts": ["details"], "http": [{ "timeout": "2s", "route": [{ "destination": { "host": "details" } }] }] },
    })));
    let after = translate(&Mesh::build(&objects), &case.node);
    assert_eq!(changed(&before, &after), ["routes/9080".to_owned()].into());
}

#[test]
fn writes_that_mean_nothing_change_nothing() {
    let case = Case::named("bookinfo-sidecar");
    let mut objects = case.objects.clone();
    for raw in &case.raw {
        let mut raw = raw.clone();
        raw["metadata"]["resourceVersion"] = json!("77");
        if raw["kind"] == "Pod" {
            raw["status"]["conditions"] = json!([{ "type": "Ready", "status": "False" }]);
        }
        let is_istio = raw["apiVersion"].as_str().unwrap().contains("istio.io");
        assert!(is_istio || !objects.upsert(item(&raw)), "{raw:#}");
    }
}
