//! Filters, mirrors and hash policies through the proxy.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::config::cluster::v3::cluster::LbPolicy;
use envoy_types::pb::envoy::config::core::v3::grpc_service::{EnvoyGrpc, TargetSpecifier};
use envoy_types::pb::envoy::config::core::v3::{
    ApiVersion, GrpcService, HeaderValue as PbHeader, HeaderValueOption, RuntimeFractionalPercent,
};
use envoy_types::pb::envoy::config::listener::v3::Filter;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as NetworkType;
use envoy_types::pb::envoy::config::ratelimit::v3::RateLimitServiceConfig;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::rate_limit::action::{self, ActionSpecifier};
use envoy_types::pb::envoy::config::route::v3::route_action::hash_policy::{
    Cookie, PolicySpecifier,
};
use envoy_types::pb::envoy::config::route::v3::route_action::{HashPolicy, RequestMirrorPolicy};
use envoy_types::pb::envoy::extensions::filters::common::fault::v3 as fault_common;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::{Cors, CorsPolicy};
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as fault;
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3::LocalRateLimit;
use envoy_types::pb::envoy::extensions::filters::http::ratelimit::v3::RateLimit;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType;
use envoy_types::pb::envoy::extensions::filters::network::local_ratelimit::v3 as network;
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, TokenBucket};
use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_response::{
    Code, DescriptorStatus, RateLimit as CurrentLimit,
};
use envoy_types::pb::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use envoy_types::pb::google::protobuf::{Any, Duration as PbDuration, UInt32Value};
use http::HeaderMap;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_routing::XdsState;
use prost::{Message, Name};

use crate::config::{
    action, cluster, http_listener, prefix, route_to, state, table, tcp_listener, yes,
};
use crate::stage::{App, Client, Proxy, free_port, wait};

fn any<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

fn filter<M: Message + Name>(name: &str, message: &M) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(message))),
        ..Default::default()
    }
}

fn all() -> Option<FractionalPercent> {
    Some(FractionalPercent {
        numerator: 100,
        denominator: 0,
    })
}

fn always() -> Option<RuntimeFractionalPercent> {
    Some(RuntimeFractionalPercent {
        default_value: all(),
        ..Default::default()
    })
}

/// One listener with filters, one route with settings for them, clusters.
fn config(
    at: SocketAddr,
    filters: Vec<HttpFilter>,
    action: route::RouteAction,
    settings: &[(&str, Any)],
    clusters: Vec<envoy_types::pb::envoy::config::cluster::v3::Cluster>,
) -> XdsState {
    let settings: HashMap<String, Any> = settings
        .iter()
        .map(|(name, any)| ((*name).to_owned(), any.clone()))
        .collect();
    let route = route::Route {
        typed_per_filter_config: settings,
        ..route_to(prefix("/"), action)
    };
    let listener = http_listener(at, |manager| manager.http_filters = filters);
    state(vec![listener], table(vec![route]), clusters)
}

fn flags(proxy: &Proxy, flags: &str) -> f64 {
    proxy.metric(
        "istio_requests_total",
        &[&format!("response_flags=\"{flags}\"")],
    )
}

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
        config(
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
    wait(|| flags(&proxy, "FI") == 1.0);
    let service = ["response_flags=\"FI\"", "destination_service_name=\"a\""];
    assert_eq!(proxy.metric("istio_requests_total", &service), 1.0);

    proxy.publish(&config(&rule(true, None)));
    wait(|| {
        let begun = Instant::now();
        Client::connect(at).get("/", "").status == 200
            && begun.elapsed() >= Duration::from_millis(150)
    });
    wait(|| flags(&proxy, "DI") == 1.0);

    let not_found = fault::fault_abort::ErrorType::GrpcStatus(5);
    proxy.publish(&config(&rule(true, Some(not_found))));
    let grpc = "content-type: application/grpc\r\n";
    wait(|| Client::connect(at).get("/", grpc).header("grpc-status") == Some("5"));
    let reply = client.get("/", grpc);
    assert_eq!(reply.header("grpc-message"), Some("fault filter abort"));
    assert_eq!((reply.status, reply.body.as_str()), (200, ""));
    wait(|| flags(&proxy, "DI,FI") >= 2.0);
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
    let _proxy = Proxy::start(&config(
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
    let _proxy = Proxy::start(&config(
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

fn local(max: u32) -> LocalRateLimit {
    LocalRateLimit {
        stat_prefix: "l".to_owned(),
        token_bucket: Some(TokenBucket {
            max_tokens: max,
            tokens_per_fill: Some(UInt32Value { value: max }),
            fill_interval: Some(PbDuration {
                seconds: 3600,
                nanos: 0,
            }),
        }),
        filter_enabled: always(),
        filter_enforced: always(),
        enable_x_ratelimit_headers: 1,
        enable_retry_after_header: true,
        response_headers_to_add: vec![add("x-local-rate-limit", "true")],
        ..Default::default()
    }
}

fn add(key: &str, value: &str) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(PbHeader {
            key: key.to_owned(),
            value: value.to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[test]
fn local_limits_count_for_the_process_and_outlive_snapshots() {
    let (at, app) = (free_port(), App::start("a"));
    let config = config(
        at,
        vec![filter("limit", &local(3))],
        action("a"),
        &[],
        vec![cluster("a", &[app.address])],
    );
    let proxy = Proxy::start(&config);
    for left in ["2", "1"] {
        let reply = Client::connect(at).get("/", "");
        assert_eq!(reply.status, 200);
        assert_eq!(reply.header("x-ratelimit-limit"), Some("3"));
        assert_eq!(reply.header("x-ratelimit-remaining"), Some(left));
        assert_eq!(reply.header("x-local-rate-limit"), None);
    }
    // The listener is the same, so is its bucket.
    let mut changed = config.clone();
    let more = cluster("b", &[app.address]);
    changed.clusters.insert("b".to_owned(), Arc::new(more));
    proxy.publish(&changed);
    let mut client = Client::connect(at);
    assert_eq!(client.get("/", "").status, 200);
    let reply = client.get("/", "");
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (429, "local_rate_limited")
    );
    assert_eq!(reply.header("x-local-rate-limit"), Some("true"));
    assert_eq!(reply.header("x-ratelimit-remaining"), Some("0"));
    let wait_for: u32 = reply
        .header("retry-after")
        .and_then(|v| v.parse().ok())
        .expect("a wait");
    assert!((1100..=1200).contains(&wait_for), "{wait_for}");
    wait(|| flags(&proxy, "RL") == 1.0);
    let reply = client.get("/", "content-type: application/grpc\r\n");
    assert_eq!(
        (reply.status, reply.header("grpc-status")),
        (200, Some("14"))
    );
}

#[test]
fn limits_that_are_not_enforced_mark_the_request() {
    let (at, app) = (free_port(), App::start("a"));
    let soft = LocalRateLimit {
        filter_enforced: None,
        request_headers_to_add_when_not_enforced: vec![add("x-too-much", "yes")],
        ..local(1)
    };
    let _proxy = Proxy::start(&config(
        at,
        vec![filter("limit", &soft)],
        action("a"),
        &[],
        vec![cluster("a", &[app.address])],
    ));
    let mut client = Client::connect(at);
    assert!(!client.get("/", "").body.contains("x-too-much"));
    let reply = client.get("/", "");
    assert!(
        reply.status == 200 && reply.body.contains("x-too-much: yes\n"),
        "{}",
        reply.body
    );
}

#[test]
fn every_connection_can_have_a_bucket_of_its_own() {
    let (at, app) = (free_port(), App::start("a"));
    let own = LocalRateLimit {
        local_rate_limit_per_downstream_connection: true,
        ..local(1)
    };
    let _proxy = Proxy::start(&config(
        at,
        vec![filter("limit", &own)],
        action("a"),
        &[],
        vec![cluster("a", &[app.address])],
    ));
    for _ in 0..2 {
        let mut client = Client::connect(at);
        assert_eq!(client.get("/", "").status, 200);
        assert_eq!(client.get("/", "").status, 429);
    }
}

#[test]
fn requests_without_a_route_are_counted_too() {
    let at = free_port();
    let listener = http_listener(at, |m| m.http_filters = vec![filter("limit", &local(1))]);
    let _proxy = Proxy::start(&state(vec![listener], table(vec![]), vec![]));
    let mut client = Client::connect(at);
    assert_eq!(client.get("/", "").status, 404);
    assert_eq!(client.get("/", "").status, 429);
}

#[test]
fn connections_beyond_their_limit_are_closed() {
    let (at, app) = (free_port(), App::start("a"));
    let mut listener = tcp_listener(at, "a");
    // One token more than connections below: the stage opens one to see that the listener is there.
    let limit = network::LocalRateLimit {
        stat_prefix: "l".to_owned(),
        token_bucket: Some(TokenBucket {
            max_tokens: 3,
            tokens_per_fill: None,
            fill_interval: Some(PbDuration {
                seconds: 3600,
                nanos: 0,
            }),
        }),
        ..Default::default()
    };
    listener.filter_chains[0].filters.insert(
        0,
        Filter {
            name: "limit".to_owned(),
            config_type: Some(NetworkType::TypedConfig(any(&limit))),
        },
    );
    let clusters = vec![cluster("a", &[app.address])];
    let _proxy = Proxy::start(&state(vec![listener], table(vec![]), clusters));
    let mut statuses = Vec::new();
    for _ in 0..4 {
        let mut client = Client::connect(at);
        let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        let reply = match client.0.write_all(request) {
            Ok(()) => client.reply(),
            Err(_) => None,
        };
        statuses.push(reply.map_or(0, |reply| reply.status));
    }
    assert_eq!(statuses, [200, 200, 0, 0]);
}

fn mirror(cluster: &str) -> RequestMirrorPolicy {
    RequestMirrorPolicy {
        cluster: cluster.to_owned(),
        ..Default::default()
    }
}

/// An application that says on a channel what it was sent.
fn witness() -> (SocketAddr, mpsc::Receiver<String>) {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = socket.local_addr().expect("its address");
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = socket.accept() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut seen = Vec::new();
                let mut buffer = [0; 4096];
                while let Ok(n) = stream.read(&mut buffer) {
                    if n == 0 {
                        break;
                    }
                    seen.extend_from_slice(&buffer[..n]);
                    let text = String::from_utf8_lossy(&seen).into_owned();
                    let Some((head, body)) = text.split_once("\r\n\r\n") else {
                        continue;
                    };
                    let length = head
                        .lines()
                        .find_map(|l| l.strip_prefix("content-length: "));
                    let chunked = head.contains("transfer-encoding: chunked");
                    let length: usize = length.map_or(0, |l| l.parse().expect("a length"));
                    if body.len() >= length && (!chunked || body.ends_with("0\r\n\r\n")) {
                        let _ = sender.send(text.clone());
                        let _ =
                            stream.write_all(b"HTTP/1.1 500 No\r\ncontent-length: 3\r\n\r\nno!");
                        seen.clear();
                    }
                }
            });
        }
    });
    (address, receiver)
}

#[test]
fn mirrors_get_copies_and_their_answers_are_discarded() {
    let (at, app) = (free_port(), App::start("a"));
    let (one, saw_one) = witness();
    let (two, saw_two) = witness();
    let mut to = action("a");
    to.request_mirror_policies = vec![
        mirror("one"),
        RequestMirrorPolicy {
            disable_shadow_host_suffix_append: true,
            runtime_fraction: always(),
            ..mirror("two")
        },
        mirror("missing"),
        RequestMirrorPolicy {
            runtime_fraction: Some(RuntimeFractionalPercent {
                default_value: Some(FractionalPercent::default()),
                ..Default::default()
            }),
            ..mirror("one")
        },
    ];
    to.prefix_rewrite_for_test();
    let _proxy = Proxy::start(&config(
        at,
        vec![],
        to,
        &[],
        vec![
            cluster("a", &[app.address]),
            cluster("one", &[one]),
            cluster("two", &[two]),
        ],
    ));
    let mut client = Client::connect(at);
    for i in 0..3 {
        client.send(&format!(
            "POST /{i} HTTP/1.1\r\nHost: app.test:80\r\nContent-Length: 5\r\n\r\nhello"
        ));
        let reply = client.reply().expect("a reply");
        assert!(
            reply.status == 200 && reply.body.contains("body: hello\n"),
            "{}",
            reply.body
        );
        for (saw, host) in [(&saw_one, "app.test-shadow:80"), (&saw_two, "app.test:80")] {
            let copy = saw.recv_timeout(Duration::from_secs(10)).expect("a copy");
            assert!(
                copy.starts_with(&format!("POST /new/{i} HTTP/1.1\r\n")),
                "{copy}"
            );
            assert!(copy.contains(&format!("host: {host}\r\n")), "{copy}");
            assert!(copy.ends_with("\r\n\r\nhello"), "{copy}");
        }
    }
    client.send("POST /chunked HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    assert_eq!(client.reply().expect("a reply").status, 200);
    let copy = saw_one
        .recv_timeout(Duration::from_secs(10))
        .expect("a copy");
    assert!(copy.ends_with("3\r\nabc\r\n0\r\n\r\n"), "{copy}");
    assert_eq!(client.get("/get", "").status, 200);
    let copy = saw_one
        .recv_timeout(Duration::from_secs(10))
        .expect("a copy");
    assert!(copy.starts_with("GET /new/get "), "{copy}");
    assert!(
        saw_one.try_recv().is_err(),
        "the fraction of zero copies nothing"
    );
}

trait Rewritten {
    fn prefix_rewrite_for_test(&mut self);
}

impl Rewritten for route::RouteAction {
    /// Copies are those of the rewritten request.
    fn prefix_rewrite_for_test(&mut self) {
        self.prefix_rewrite = "/new/".to_owned();
    }
}

#[test]
fn a_mirror_that_reads_nothing_does_not_hold_the_request_up() {
    let (at, app) = (free_port(), App::start("a"));
    let deaf = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let mut to = action("a");
    to.request_mirror_policies = vec![mirror("deaf")];
    let _proxy = Proxy::start(&config(
        at,
        vec![],
        to,
        &[],
        vec![
            cluster("a", &[app.address]),
            cluster("deaf", &[deaf.local_addr().expect("an address")]),
        ],
    ));
    let mut client = Client::connect(at);
    let large = "x".repeat(16 << 20);
    for _ in 0..2 {
        client.send(&format!(
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{large}",
            large.len()
        ));
        let reply = client.reply().expect("a reply");
        assert!(reply.status == 200 && reply.body.contains(&large));
    }
    // The copy was broken off as soon as too much of it waited.
    let (mut stream, _) = deaf.accept().expect("the copy's connection");
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    let mut read = Vec::new();
    let _ = stream.read_to_end(&mut read);
    assert!(read.len() < 16 << 20, "{}", read.len());
}

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
    let _proxy = Proxy::start(&config(at, vec![], to, &[], vec![ring]));
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

/// How the rate limit service behaves.
#[derive(Clone)]
enum Manner {
    Answers(RateLimitResponse),
    Says(&'static [u8]),
    Fails,
    Hangs,
    Resets,
}

struct Service {
    address: SocketAddr,
    manner: Arc<Mutex<Manner>>,
    asked: Arc<Mutex<Vec<RateLimitRequest>>>,
}

impl Service {
    fn start() -> Self {
        let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        socket.set_nonblocking(true).expect("non-blocking");
        let address = socket.local_addr().expect("its address");
        let manner = Arc::new(Mutex::new(Manner::Fails));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let shared = (manner.clone(), asked.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                let socket = tokio::net::TcpListener::from_std(socket).expect("the socket");
                loop {
                    let (stream, _) = socket.accept().await.expect("a connection");
                    let shared = shared.clone();
                    tokio::spawn(async move {
                        let service = hyper::service::service_fn(move |request| {
                            judge(request, shared.0.clone(), shared.1.clone())
                        });
                        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                            .serve_connection(TokioIo::new(stream), service)
                            .await;
                    });
                }
            });
        });
        Self {
            address,
            manner,
            asked,
        }
    }

    fn set(&self, manner: Manner) {
        *self.manner.lock().expect("the manner") = manner;
    }

    fn last(&self) -> RateLimitRequest {
        self.asked
            .lock()
            .expect("the questions")
            .last()
            .expect("a question")
            .clone()
    }
}

type Body = http_body_util::combinators::BoxBody<Bytes, Infallible>;

async fn judge(
    request: Request<Incoming>,
    manner: Arc<Mutex<Manner>>,
    asked: Arc<Mutex<Vec<RateLimitRequest>>>,
) -> Result<Response<Body>, std::io::Error> {
    assert_eq!(
        request.uri().path(),
        "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
    );
    assert_eq!(request.headers()["content-type"], "application/grpc");
    assert_eq!(request.headers()["te"], "trailers");
    let body = request
        .into_body()
        .collect()
        .await
        .expect("a body")
        .to_bytes();
    let question = RateLimitRequest::decode(&body[5..]).expect("a question");
    asked.lock().expect("the questions").push(question);
    let manner = manner.lock().expect("the manner").clone();
    let message = match &manner {
        Manner::Answers(answer) => {
            let message = answer.encode_to_vec();
            let mut framed = vec![0];
            framed.extend_from_slice(&(message.len() as u32).to_be_bytes());
            framed.extend_from_slice(&message);
            framed
        }
        Manner::Says(bytes) => bytes.to_vec(),
        Manner::Fails => Vec::new(),
        Manner::Hangs => std::future::pending().await,
        Manner::Resets => return Err(std::io::Error::other("reset")),
    };
    let status = if matches!(manner, Manner::Fails) {
        "13"
    } else {
        "0"
    };
    let trailers = HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        http::HeaderValue::from_static(status),
    )]);
    let body = Full::new(Bytes::from(message)).with_trailers(async move { Some(Ok(trailers)) });
    let mut response = Response::new(body.boxed());
    response
        .headers_mut()
        .insert("content-type", "application/grpc".parse().expect("a value"));
    Ok(response)
}

fn answer(code: Code) -> RateLimitResponse {
    RateLimitResponse {
        overall_code: code as i32,
        statuses: vec![DescriptorStatus {
            code: code as i32,
            current_limit: Some(CurrentLimit {
                requests_per_unit: 5,
                unit: 2,
                ..Default::default()
            }),
            limit_remaining: 3,
            duration_until_reset: Some(PbDuration {
                seconds: 42,
                nanos: 0,
            }),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn global(change: impl FnOnce(&mut RateLimit)) -> RateLimit {
    let mut rule = RateLimit {
        domain: "productpage-ratelimit".to_owned(),
        timeout: Some(PbDuration {
            seconds: 10,
            nanos: 0,
        }),
        rate_limit_service: Some(RateLimitServiceConfig {
            grpc_service: Some(GrpcService {
                target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                    cluster_name: "outbound|8081||ratelimit.default.svc.cluster.local".to_owned(),
                    authority: "ratelimit.default.svc.cluster.local".to_owned(),
                    ..Default::default()
                })),
                ..Default::default()
            }),
            transport_api_version: ApiVersion::V3 as i32,
        }),
        enable_x_ratelimit_headers: 1,
        ..Default::default()
    };
    change(&mut rule);
    rule
}

fn asking(at: SocketAddr, app: &App, service: SocketAddr, rule: &RateLimit) -> XdsState {
    let mut to = action("a");
    to.rate_limits = vec![route::RateLimit {
        actions: vec![route::rate_limit::Action {
            action_specifier: Some(ActionSpecifier::RequestHeaders(action::RequestHeaders {
                header_name: ":path".to_owned(),
                descriptor_key: "PATH".to_owned(),
                ..Default::default()
            })),
        }],
        ..Default::default()
    }];
    let name = "outbound|8081||ratelimit.default.svc.cluster.local";
    config(
        at,
        vec![filter("envoy.filters.http.ratelimit", rule)],
        to,
        &[],
        vec![cluster("a", &[app.address]), cluster(name, &[service])],
    )
}

#[test]
fn the_rate_limit_service_is_asked_and_obeyed() {
    let (at, app, service) = (free_port(), App::start("a"), Service::start());
    let proxy = Proxy::start(&asking(at, &app, service.address, &global(|_| {})));
    let mut client = Client::connect(at);
    let header = |key: &str, value: &str| PbHeader {
        key: key.to_owned(),
        value: value.to_owned(),
        ..Default::default()
    };
    service.set(Manner::Answers(RateLimitResponse {
        response_headers_to_add: vec![header("x-answer", "ok")],
        request_headers_to_add: vec![header("x-question", "asked"), header("no header", "x")],
        ..answer(Code::Ok)
    }));
    let reply = client.get("/productpage", "");
    assert!(
        reply.status == 200 && reply.body.contains("x-question: asked\n"),
        "{}",
        reply.body
    );
    assert_eq!(reply.header("x-answer"), Some("ok"));
    assert_eq!(reply.header("x-ratelimit-limit"), Some("5, 5;w=60"));
    assert_eq!(reply.header("x-ratelimit-remaining"), Some("3"));
    assert_eq!(reply.header("x-ratelimit-reset"), Some("42"));
    let asked = service.last();
    assert_eq!(asked.domain, "productpage-ratelimit");
    let entry = &asked.descriptors[0].entries[0];
    assert_eq!(
        (entry.key.as_str(), entry.value.as_str()),
        ("PATH", "/productpage")
    );

    service.set(Manner::Answers(RateLimitResponse {
        raw_body: b"slow down".to_vec(),
        ..answer(Code::OverLimit)
    }));
    let reply = client.get("/productpage", "");
    assert_eq!((reply.status, reply.body.as_str()), (429, "slow down"));
    assert_eq!(reply.header("x-envoy-ratelimited"), Some("true"));
    assert_eq!(reply.header("x-ratelimit-limit"), Some("5, 5;w=60"));
    wait(|| flags(&proxy, "RL") == 1.0);
    proxy.publish(&asking(
        at,
        &app,
        service.address,
        &global(|rule| {
            rule.enable_retry_after_header = true;
            rule.disable_x_envoy_ratelimited_header = true;
            rule.response_headers_to_add = vec![add("x-own", "1")];
        }),
    ));
    wait(|| Client::connect(at).get("/", "").header("retry-after") == Some("42"));
    let reply = client.get("/", "");
    assert_eq!(reply.header("x-own"), Some("1"));
    assert_eq!(reply.header("x-envoy-ratelimited"), None);
}

#[test]
fn a_service_that_fails_opens_or_closes_as_configured() {
    let (at, app, service) = (free_port(), App::start("a"), Service::start());
    let soon = Some(PbDuration {
        seconds: 0,
        nanos: 200_000_000,
    });
    let open = asking(
        at,
        &app,
        service.address,
        &global(|rule| rule.timeout = soon),
    );
    let closed = |status: Option<i32>| {
        let rule = global(|rule| {
            rule.timeout = soon;
            rule.failure_mode_deny = true;
            rule.status_on_error =
                status.map(|code| envoy_types::pb::envoy::r#type::v3::HttpStatus { code });
        });
        asking(at, &app, service.address, &rule)
    };
    let proxy = Proxy::start(&open);
    let bad = [
        Manner::Fails,
        Manner::Hangs,
        Manner::Resets,
        Manner::Answers(answer(Code::Unknown)),
        Manner::Says(b""),
        Manner::Says(b"\0\0\0\0\x09short"),
        Manner::Says(b"\x01\0\0\0\0"),
        Manner::Says(b"\0\0\0\0\x04\xff\xff\xff\xff"),
    ];
    let mut client = Client::connect(at);
    for manner in &bad {
        service.set(manner.clone());
        assert_eq!(client.get("/", "").status, 200);
    }
    proxy.publish(&closed(None));
    wait(|| Client::connect(at).get("/", "").status == 500);
    for manner in &bad {
        service.set(manner.clone());
        let reply = client.get("/", "");
        assert_eq!((reply.status, reply.body.as_str()), (500, ""));
    }
    wait(|| flags(&proxy, "RLSE") >= bad.len() as f64);
    service.set(Manner::Answers(answer(Code::Ok)));
    assert_eq!(client.get("/", "").status, 200, "as soon as it is back");
    // Nobody there at all.
    let mut gone = closed(Some(503));
    let name = "outbound|8081||ratelimit.default.svc.cluster.local";
    let nobody = Arc::new(cluster(name, &[free_port()]));
    gone.clusters.insert(name.to_owned(), nobody);
    proxy.publish(&gone);
    wait(|| Client::connect(at).get("/", "").status == 503);
    gone.clusters.remove(name);
    proxy.publish(&gone);
    wait(|| Client::connect(at).get("/", "").status == 503);
}

#[test]
fn a_client_that_leaves_while_the_service_is_asked_harms_nobody() {
    let (at, app, service) = (free_port(), App::start("a"), Service::start());
    let _proxy = Proxy::start(&asking(at, &app, service.address, &global(|_| {})));
    service.set(Manner::Hangs);
    for _ in 0..10 {
        let mut client = TcpStream::connect(at).expect("a connection");
        client
            .write_all(b"GET /leaves HTTP/1.1\r\nHost: x\r\n\r\n")
            .expect("written");
        let before = || service.asked.lock().expect("the questions").len();
        let n = before();
        wait(|| before() > n || n > 0);
        drop(client);
    }
    service.set(Manner::Answers(answer(Code::Ok)));
    assert_eq!(Client::connect(at).get("/", "").status, 200);
}
