//! Endpoints chosen by hash policies.

use envoy_types::pb::envoy::config::cluster::v3::cluster::LbPolicy;
use envoy_types::pb::envoy::config::route::v3::route_action::HashPolicy;
use envoy_types::pb::envoy::config::route::v3::route_action::hash_policy::{
    Cookie, PolicySpecifier,
};
use envoy_types::pb::google::protobuf::Duration as PbDuration;

use crate::config::{action, cluster, filtered};
use crate::stage::{App, Client, Proxy, free_port};

#[test]
fn a_cookie_keeps_a_client_with_its_endpoint() {
    let at = free_port();
    let apps = [App::start("a"), App::start("b"), App::start("c")];
    let addresses: Vec<_> = apps.iter().map(|app| app.address).collect();
    let mut ring = cluster("ring", &addresses);
    ring.lb_policy = LbPolicy::RingHash as i32;
    let mut to = action("ring");
    to.hash_policy = vec![HashPolicy {
        policy_specifier: Some(PolicySpecifier::Cookie(Cookie {
            name: "session".to_owned(),
            ttl: Some(PbDuration {
                seconds: 60,
                nanos: 0,
            }),
            path: "/".to_owned(),
            ..Default::default()
        })),
        ..Default::default()
    }];
    let _proxy = Proxy::start(&filtered(at, vec![], to, &[], vec![ring]));
    for _ in 0..5 {
        let first = Client::connect(at).get("/", "");
        let cookie = first.header("set-cookie").expect("a cookie").to_owned();
        let (value, rest) = cookie.split_once(';').expect("attributes");
        assert_eq!(rest, " Max-Age=60; Path=/; HttpOnly");
        assert!(
            value.starts_with("session=\"") && value.len() == 26,
            "{value}"
        );
        let app = first.header("x-app");
        for _ in 0..5 {
            let again = Client::connect(at).get("/", &format!("Cookie: {value}\r\n"));
            assert_eq!(again.header("x-app"), app);
            assert_eq!(again.header("set-cookie"), None);
        }
    }
}
