//! Rate limits through the proxy: local ones, of connections, and those of a service that is asked.

use std::convert::Infallible;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::grpc_service::{EnvoyGrpc, TargetSpecifier};
use envoy_types::pb::envoy::config::core::v3::{
    ApiVersion, GrpcService, HeaderValue as PbHeader, HeaderValueOption,
};
use envoy_types::pb::envoy::config::listener::v3::Filter;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as NetworkType;
use envoy_types::pb::envoy::config::ratelimit::v3::RateLimitServiceConfig;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::rate_limit::action::{self, ActionSpecifier};
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3::LocalRateLimit;
use envoy_types::pb::envoy::extensions::filters::http::ratelimit::v3::RateLimit;
use envoy_types::pb::envoy::extensions::filters::network::local_ratelimit::v3 as network;
use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_response::{
    Code, DescriptorStatus, RateLimit as CurrentLimit,
};
use envoy_types::pb::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use envoy_types::pb::envoy::r#type::v3::TokenBucket;
use envoy_types::pb::google::protobuf::{Duration as PbDuration, UInt32Value};
use http::HeaderMap;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_routing::XdsState;
use prost::Message;

use crate::config::{
    action, always, any, cluster, filter, filtered, http_listener, state, table, tcp_listener,
};
use crate::servers;
use crate::stage::{App, Client, Proxy, free_port, wait};

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
    let config = filtered(
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
    wait(|| proxy.flags("RL") == 1.0);
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
    let _proxy = Proxy::start(&filtered(
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
    let _proxy = Proxy::start(&filtered(
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
        let manner = Arc::new(Mutex::new(Manner::Fails));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let shared = (manner.clone(), asked.clone());
        let address = servers::with_tasks(move |stream| {
            let shared = shared.clone();
            async move {
                let service = hyper::service::service_fn(move |request| {
                    judge(request, shared.0.clone(), shared.1.clone())
                });
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            }
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
    filtered(
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
    wait(|| proxy.flags("RL") == 1.0);
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
    wait(|| proxy.flags("RLSE") >= bad.len() as f64);
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
    let asked = || service.asked.lock().expect("the questions").len();
    for _ in 0..10 {
        let before = asked();
        let mut client = TcpStream::connect(at).expect("a connection");
        client
            .write_all(b"GET /leaves HTTP/1.1\r\nHost: x\r\n\r\n")
            .expect("written");
        wait(|| asked() > before);
        drop(client);
    }
    service.set(Manner::Answers(answer(Code::Ok)));
    assert_eq!(Client::connect(at).get("/", "").status, 200);
}
