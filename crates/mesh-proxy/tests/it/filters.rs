//! Faults and CORS through the proxy.

use std::time::{Duration, Instant};

use envoy_types::pb::envoy::extensions::filters::common::fault::v3 as fault_common;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::{Cors, CorsPolicy};
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as fault;
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::Duration as PbDuration;

use crate::config::{action, all, any, cluster, filter, filtered, yes};
use crate::stage::{App, Client, Proxy, free_port, wait};

#[test]
fn faults_of_a_route_delay_and_abort() {
    let (at, app) = (free_port(), App::start("a"));
    let rule = |delay: bool, abort| fault::HttpFault {
        delay: delay.then(|| fault_common::FaultDelay {
            percentage: all(),
            fault_delay_secifier: Some(fault_common::fault_delay::FaultDelaySecifier::FixedDelay(
                PbDuration {
                    seconds: 0,
                    nanos: 150_000_000,
                },
            )),
        }),
        abort: Some(fault::FaultAbort {
            percentage: all(),
            error_type: abort,
            ..Default::default()
        })
        .filter(|abort| abort.error_type.is_some()),
        ..Default::default()
    };
    let config = |rule: &fault::HttpFault| {
        filtered(
            at,
            vec![filter("fault", &fault::HttpFault::default())],
            action("a"),
            &[("fault", any(rule))],
            vec![cluster("a", &[app.address])],
        )
    };
    let teapot = fault::fault_abort::ErrorType::HttpStatus(418);
    let proxy = Proxy::start(&config(&rule(false, Some(teapot))));
    let mut client = Client::connect(at);
    let reply = client.get("/", "");
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (418, "fault filter abort")
    );
    assert_eq!(reply.header("server"), Some("istio-envoy"));
    assert_eq!(reply.header("content-type"), Some("text/plain"));
    wait(|| proxy.flags("FI") == 1.0);
    let service = ["response_flags=\"FI\"", "destination_service_name=\"a\""];
    assert_eq!(proxy.metric("istio_requests_total", &service), 1.0);

    proxy.publish(&config(&rule(true, None)));
    wait(|| {
        let begun = Instant::now();
        Client::connect(at).get("/", "").status == 200
            && begun.elapsed() >= Duration::from_millis(150)
    });
    wait(|| proxy.flags("DI") == 1.0);

    let not_found = fault::fault_abort::ErrorType::GrpcStatus(5);
    proxy.publish(&config(&rule(true, Some(not_found))));
    let grpc = "content-type: application/grpc\r\n";
    wait(|| Client::connect(at).get("/", grpc).header("grpc-status") == Some("5"));
    let reply = client.get("/", grpc);
    assert_eq!(reply.header("grpc-message"), Some("fault filter abort"));
    assert_eq!((reply.status, reply.body.as_str()), (200, ""));
    wait(|| proxy.flags("DI,FI") >= 2.0);
}

#[test]
fn a_response_can_be_slowed_down() {
    let (at, app) = (free_port(), App::start("a"));
    let rule = fault::HttpFault {
        response_rate_limit: Some(fault_common::FaultRateLimit {
            percentage: all(),
            limit_type: Some(fault_common::fault_rate_limit::LimitType::FixedLimit(
                fault_common::fault_rate_limit::FixedLimit { limit_kbps: 64 },
            )),
        }),
        ..Default::default()
    };
    let _proxy = Proxy::start(&filtered(
        at,
        vec![filter("fault", &rule)],
        action("a"),
        &[],
        vec![cluster("a", &[app.address])],
    ));
    let mut client = Client::connect(at);
    let body = "x".repeat(32 << 10);
    let begun = Instant::now();
    client.send(&format!(
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    ));
    let reply = client.reply().expect("a reply");
    assert!(reply.body.contains(&body), "nothing is lost");
    // Half a second's worth; the first slice is free.
    assert!(
        begun.elapsed() >= Duration::from_millis(400),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn cors_preflights_are_answered_and_responses_decorated() {
    let (at, app) = (free_port(), App::start("a"));
    let policy = CorsPolicy {
        allow_origin_string_match: vec![StringMatcher {
            match_pattern: Some(MatchPattern::Exact("https://a.test".to_owned())),
            ..Default::default()
        }],
        allow_methods: "GET".to_owned(),
        expose_headers: "x-app".to_owned(),
        max_age: "60".to_owned(),
        allow_credentials: yes(),
        ..Default::default()
    };
    let _proxy = Proxy::start(&filtered(
        at,
        vec![filter("cors", &Cors::default())],
        action("a"),
        &[("cors", any(&policy))],
        vec![cluster("a", &[app.address])],
    ));
    let mut client = Client::connect(at);
    client.send(
        "OPTIONS / HTTP/1.1\r\nHost: x\r\nOrigin: https://a.test\r\nAccess-Control-Request-Method: GET\r\n\r\n",
    );
    let reply = client.reply().expect("a reply");
    assert_eq!((reply.status, reply.body.as_str()), (200, ""));
    for (name, value) in [
        ("access-control-allow-origin", "https://a.test"),
        ("access-control-allow-methods", "GET"),
        ("access-control-max-age", "60"),
        ("access-control-allow-credentials", "true"),
    ] {
        assert_eq!(reply.header(name), Some(value), "{name}");
    }
    assert_eq!(reply.header("x-app"), None, "the application saw nothing");
    let reply = client.get("/", "Origin: https://a.test\r\n");
    assert_eq!(
        reply.header("access-control-allow-origin"),
        Some("https://a.test")
    );
    assert_eq!(reply.header("access-control-expose-headers"), Some("x-app"));
    assert_eq!(reply.header("x-app"), Some("a"));
    let reply = client.get("/", "Origin: https://b.test\r\n");
    assert_eq!(reply.header("access-control-allow-origin"), None);
}
