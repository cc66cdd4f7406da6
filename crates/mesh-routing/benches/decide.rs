//! What a route decision costs: one among 5,000 routes on 1,000 hosts, and one among 5,000 routes of one host.
//!
//! `cargo bench -p mesh-routing` prints times. `CASE=hosts DECISIONS=10000 valgrind --tool=callgrind TARGET/release/deps/decide-...` counts
//! instructions: the difference between two numbers of decisions, divided by their difference, is the cost of one. `cargo xtask bench
//! --part decide` does both.

use std::hint::black_box;
use std::time::Instant;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use http::HeaderMap;
use mesh_routing::route::{Decision, RequestView, RouteTable};

const DECISIONS: u32 = 1_000_000;

fn route(path: PathSpecifier) -> pb::Route {
    let action = pb::RouteAction {
        cluster_specifier: Some(pb::route_action::ClusterSpecifier::Cluster(
            "outbound|80||a.default.svc.cluster.local".to_owned(),
        )),
        ..Default::default()
    };
    pb::Route {
        r#match: Some(pb::RouteMatch {
            path_specifier: Some(path),
            ..Default::default()
        }),
        action: Some(pb::route::Action::Route(action)),
        ..Default::default()
    }
}

/// The routes of one service: four by path, one for the rest.
fn service(i: u32) -> pb::VirtualHost {
    let name = format!("svc-{i}");
    let mut routes: Vec<_> = (0..4)
        .map(|n| route(PathSpecifier::Prefix(format!("/api/v{n}/"))))
        .collect();
    routes.push(route(PathSpecifier::Prefix("/".to_owned())));
    pb::VirtualHost {
        domains: vec![
            format!("{name}.default.svc.cluster.local"),
            name.clone(),
            format!("{name}.default"),
            format!("{name}.default.svc"),
        ],
        name,
        routes,
        ..Default::default()
    }
}

fn table(hosts: Vec<pb::VirtualHost>) -> RouteTable {
    let message = pb::RouteConfiguration {
        name: "80".to_owned(),
        virtual_hosts: hosts,
        ignore_port_in_host_matching: true,
        ..Default::default()
    };
    RouteTable::compile(&message).expect("a table")
}

fn main() {
    let decisions = std::env::var("DECISIONS").ok();
    let decisions = decisions.map_or(DECISIONS, |text| text.parse().expect("a number"));
    let case = std::env::var("CASE").unwrap_or_default();
    if case.is_empty() || case == "hosts" {
        let many = table((0..1000).map(service).collect());
        let hosts: Vec<String> = (0..1000)
            .map(|i| format!("SVC-{i}.default.svc.cluster.local:80"))
            .collect();
        time("5,000 routes on 1,000 hosts", &many, decisions, |i| {
            (&hosts[i % hosts.len()], "/api/v3/reviews?page=2")
        });
    }
    if case.is_empty() || case == "paths" {
        let exact = |n| route(PathSpecifier::Path(format!("/products/{n}/reviews")));
        let one = table(vec![pb::VirtualHost {
            name: "all".to_owned(),
            domains: vec!["*".to_owned()],
            routes: (0..5000).map(exact).collect(),
            ..Default::default()
        }]);
        let paths: Vec<String> = (0..5000)
            .map(|n| format!("/products/{n}/reviews?page=2"))
            .collect();
        time("5,000 exact routes of one host", &one, decisions, |i| {
            ("shop.test", &paths[i % paths.len()])
        });
    }
}

fn time<'a>(
    what: &str,
    table: &RouteTable,
    decisions: u32,
    request: impl Fn(usize) -> (&'a str, &'a str),
) {
    let headers = HeaderMap::new();
    let begun = Instant::now();
    for i in 0..decisions {
        let (host, path_and_query) = request(i as usize * 7919);
        let decision = table.decide(black_box(&RequestView {
            host,
            method: "GET",
            path_and_query,
            scheme: "http",
            headers: &headers,
            random: u64::from(i),
        }));
        assert!(matches!(black_box(decision), Decision::Matched(_)));
    }
    let each = begun.elapsed() / decisions.max(1);
    println!("{what}: {each:?} each ({decisions} decisions)");
}
