//! Tables for the rules of one stream.

use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::google::rpc::Status;
use mesh_xds::subscription::{Mode, Outgoing, ProtocolError, StreamEvent, Subscription};
use mesh_xds::types::{CLUSTER, ENDPOINT, LISTENER, ROUTE, short_name};

use crate::set;

/// What the responses say, one line each: `CDS +a=1 +b=1 -c`.
fn drain(subscription: &mut Subscription) -> Vec<String> {
    outgoing(subscription).iter().map(describe).collect()
}

fn outgoing(subscription: &mut Subscription) -> Vec<Outgoing> {
    std::iter::from_fn(|| subscription.next_response()).collect()
}

fn describe(response: &Outgoing) -> String {
    let mut text = short_name(&response.type_url).to_owned();
    for resource in &response.resources {
        text.push_str(&format!(" +{}={}", resource.name, resource.version));
    }
    for name in &response.removals {
        text.push_str(&format!(" -{name}"));
    }
    text
}

fn delta(type_url: &str, names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    }
}

fn sotw(type_url: &str, names: &[&str], nonce: &str) -> DiscoveryRequest {
    DiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names: names.iter().map(|name| (*name).to_owned()).collect(),
        response_nonce: nonce.to_owned(),
        ..Default::default()
    }
}

fn all_wildcard(mode: Mode) -> Subscription {
    let mut subscription = Subscription::new(mode, "t");
    for type_url in [LISTENER, ROUTE, ENDPOINT, CLUSTER] {
        match mode {
            Mode::Delta => subscription.delta_request(&delta(type_url, &["*"])),
            Mode::StateOfTheWorld => subscription.sotw_request(&sotw(type_url, &["*"], "")),
        }
        .unwrap();
    }
    subscription
}

#[test]
fn additions_in_push_order_removals_after_and_reversed() {
    let mut subscription = all_wildcard(Mode::Delta);
    assert!(drain(&mut subscription).is_empty(), "no set yet");
    subscription.set_resources(Arc::new(set(&[
        (CLUSTER, "a", "1"),
        (ENDPOINT, "a", "1"),
        (LISTENER, "l", "1"),
        (ROUTE, "80", "1"),
    ])));
    assert_eq!(
        drain(&mut subscription),
        ["CDS +a=1", "EDS +a=1", "LDS +l=1", "RDS +80=1"]
    );
    subscription.set_resources(Arc::new(set(&[
        (CLUSTER, "b", "1"),
        (ENDPOINT, "b", "1"),
        (LISTENER, "m", "1"),
        (ROUTE, "81", "1"),
    ])));
    assert_eq!(
        drain(&mut subscription),
        [
            "CDS +b=1",
            "EDS +b=1",
            "LDS +m=1 -l",
            "RDS +81=1",
            "RDS -80",
            "EDS -a",
            "CDS -a"
        ]
    );
}

#[test]
fn equal_sets_send_nothing_and_empty_ones_answer_once() {
    let mut subscription = all_wildcard(Mode::Delta);
    subscription.set_resources(Arc::new(set(&[(CLUSTER, "a", "1")])));
    assert_eq!(drain(&mut subscription), ["CDS +a=1", "EDS", "LDS", "RDS"]);
    subscription.set_resources(Arc::new(set(&[(CLUSTER, "a", "1")])));
    assert!(drain(&mut subscription).is_empty());
}

#[test]
fn a_reconnect_gets_only_the_difference() {
    let mut subscription = Subscription::new(Mode::Delta, "t");
    let mut request = delta(CLUSTER, &["*"]);
    request.initial_resource_versions = [("a", "1"), ("b", "1"), ("gone", "1")]
        .map(|(name, version)| (name.to_owned(), version.to_owned()))
        .into();
    subscription.set_resources(Arc::new(set(&[
        (CLUSTER, "a", "1"),
        (CLUSTER, "b", "2"),
        (CLUSTER, "c", "1"),
    ])));
    subscription.delta_request(&request).unwrap();
    assert_eq!(drain(&mut subscription), ["CDS +b=2 +c=1", "CDS -gone"]);
}

#[test]
fn names_subscribe_and_unsubscribe() {
    let mut subscription = Subscription::new(Mode::Delta, "t");
    subscription.set_resources(Arc::new(set(&[(ENDPOINT, "a", "1"), (ENDPOINT, "b", "1")])));
    subscription
        .delta_request(&delta(ENDPOINT, &["a", "nowhere"]))
        .unwrap();
    // A client may wait for what does not exist, so it is told.
    assert_eq!(drain(&mut subscription), ["EDS +a=1 -nowhere"]);
    subscription
        .delta_request(&delta(ENDPOINT, &["b"]))
        .unwrap();
    assert_eq!(drain(&mut subscription), ["EDS +b=1"]);
    // Again: the client may have dropped it.
    subscription
        .delta_request(&delta(ENDPOINT, &["b"]))
        .unwrap();
    assert_eq!(drain(&mut subscription), ["EDS +b=1"]);
    let mut unsubscribe = delta(ENDPOINT, &[]);
    unsubscribe.resource_names_unsubscribe = vec!["a".to_owned()];
    subscription.delta_request(&unsubscribe).unwrap();
    subscription.set_resources(Arc::new(set(&[
        (ENDPOINT, "a", "2"),
        (ENDPOINT, "b", "2"),
        (ENDPOINT, "nowhere", "1"),
    ])));
    assert_eq!(drain(&mut subscription), ["EDS +b=2 +nowhere=1"]);
}

#[test]
fn a_changed_cluster_brings_its_endpoints_again_to_a_client_that_names_them() {
    let mut subscription = Subscription::new(Mode::Delta, "t");
    subscription.delta_request(&delta(CLUSTER, &[])).unwrap();
    subscription
        .delta_request(&delta(ENDPOINT, &["a"]))
        .unwrap();
    subscription.set_resources(Arc::new(set(&[(CLUSTER, "a", "1"), (ENDPOINT, "a", "1")])));
    assert_eq!(drain(&mut subscription), ["CDS +a=1", "EDS +a=1"]);
    subscription.set_resources(Arc::new(set(&[(CLUSTER, "a", "2"), (ENDPOINT, "a", "1")])));
    assert_eq!(drain(&mut subscription), ["CDS +a=2", "EDS +a=1"]);
}

#[test]
fn acknowledgements_by_nonce() {
    let mut subscription = all_wildcard(Mode::Delta);
    subscription.set_resources(Arc::new(set(&[(CLUSTER, "a", "1"), (CLUSTER, "b", "1")])));
    let sent = outgoing(&mut subscription);
    let mut answer = delta(CLUSTER, &[]);
    answer.response_nonce = sent[0].nonce.clone();
    answer.error_detail = Some(Status {
        code: 13,
        message: "cluster b is bad".to_owned(),
        details: Vec::new(),
    });
    let events = subscription.delta_request(&answer).unwrap();
    let [StreamEvent::Nacked { rejections, .. }] = events.as_slice() else {
        panic!("{events:?}");
    };
    assert_eq!(rejections.len(), 1);
    assert_eq!(rejections[0].name, "b");
    // The same answer again is stale, and what was refused is not sent again before it changes.
    let events = subscription.delta_request(&answer).unwrap();
    assert!(matches!(
        events.as_slice(),
        [StreamEvent::StaleNonce { .. }]
    ));
    assert!(drain(&mut subscription).is_empty());
    subscription.set_resources(Arc::new(set(&[(CLUSTER, "a", "1"), (CLUSTER, "b", "2")])));
    assert_eq!(drain(&mut subscription), ["CDS +b=2"]);
}

#[test]
fn state_of_the_world_keeps_clusters_until_routes_let_go() {
    let mut subscription = Subscription::new(Mode::StateOfTheWorld, "t");
    subscription.sotw_request(&sotw(CLUSTER, &[], "")).unwrap();
    subscription.sotw_request(&sotw(LISTENER, &[], "")).unwrap();
    subscription
        .sotw_request(&sotw(ROUTE, &["80"], ""))
        .unwrap();
    subscription.set_resources(Arc::new(set(&[
        (CLUSTER, "a", "1"),
        (LISTENER, "l", "1"),
        (LISTENER, "m", "1"),
        (ROUTE, "80", "1"),
        (ROUTE, "81", "1"),
    ])));
    assert_eq!(
        drain(&mut subscription),
        ["CDS +a=1", "LDS +l=1 +m=1", "RDS +80=1"]
    );
    subscription.set_resources(Arc::new(set(&[
        (CLUSTER, "b", "1"),
        (LISTENER, "l", "1"),
        (ROUTE, "80", "2"),
    ])));
    assert_eq!(
        drain(&mut subscription),
        ["CDS +a=1 +b=1", "LDS +l=1", "RDS +80=2", "CDS +b=1"]
    );
}

#[test]
fn state_of_the_world_nonces() {
    let mut subscription = Subscription::new(Mode::StateOfTheWorld, "t");
    subscription.set_resources(Arc::new(set(&[(ROUTE, "80", "1"), (ROUTE, "81", "1")])));
    // The first request of a stream is taken with a nonce of an earlier one.
    subscription
        .sotw_request(&sotw(ROUTE, &["80"], "old"))
        .unwrap();
    let first = outgoing(&mut subscription);
    assert_eq!(describe(&first[0]), "RDS +80=1");
    let events = subscription
        .sotw_request(&sotw(ROUTE, &["80", "81"], "older"))
        .unwrap();
    assert!(matches!(
        events.as_slice(),
        [StreamEvent::StaleNonce { .. }]
    ));
    assert!(
        drain(&mut subscription).is_empty(),
        "a stale request changes nothing"
    );
    let events = subscription
        .sotw_request(&sotw(ROUTE, &["80", "81"], &first[0].nonce))
        .unwrap();
    assert!(matches!(events.as_slice(), [StreamEvent::Acked { .. }]));
    assert_eq!(drain(&mut subscription), ["RDS +81=1"]);
}

#[test]
fn limits_and_malformed_requests_end_the_stream() {
    let mut subscription = Subscription::new(Mode::Delta, "t");
    assert_eq!(
        subscription.delta_request(&delta("", &[])),
        Err(ProtocolError::NoType)
    );
    let long = "x".repeat(5000);
    assert_eq!(
        subscription.delta_request(&delta(CLUSTER, &[&long])),
        Err(ProtocolError::NameTooLong(5000))
    );
    for number in 0..32 {
        subscription
            .delta_request(&delta(&format!("t{number}"), &[]))
            .unwrap();
    }
    assert_eq!(
        subscription.delta_request(&delta("one more", &[])),
        Err(ProtocolError::TooManyTypes)
    );
    let names: Vec<String> = (0..200_001).map(|number| number.to_string()).collect();
    let mut request = delta("t0", &[]);
    request.resource_names_subscribe = names;
    assert_eq!(
        subscription.delta_request(&request),
        Err(ProtocolError::TooManyNames)
    );
}
