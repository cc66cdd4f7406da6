//! Endpoints that fail, limits, connections: what the proxy does about them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::thresholds::RetryBudget;
use envoy_types::pb::envoy::config::core::v3::{Http2ProtocolOptions, TcpKeepalive};
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf;
use envoy_types::pb::google::protobuf::UInt32Value;
use http_body_util::Full;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mesh_proxy::upstream::counters::Counter;
use mesh_routing::XdsState;
use tokio::sync::Semaphore;

use crate::config::{action, cluster, http_listener, prefix, route_to, state, table, tcp_listener};
use crate::servers;
use crate::stage::{App, Client, Proxy, free_port, wait};

/// An application whose answers can be held back, and whose status can be changed.
pub struct Held {
    pub address: SocketAddr,
    /// Connections accepted and connections open.
    accepted: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    /// Requests that have arrived.
    requests: Arc<AtomicUsize>,
    /// Each permit lets an answer out.
    pub gate: Arc<Semaphore>,
    status: Arc<AtomicU16>,
}

impl Held {
    pub fn start(name: &'static str) -> Self {
        let (accepted, open) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let requests = Arc::<AtomicUsize>::default();
        let gate = Arc::new(Semaphore::new(0));
        let status = Arc::new(AtomicU16::new(200));
        let counts = (accepted.clone(), open.clone(), requests.clone());
        let answer = (gate.clone(), status.clone());
        let address = servers::with_tasks(move |stream| {
            let (accepted, open, requests) = counts.clone();
            let (gate, status) = answer.clone();
            accepted.fetch_add(1, Ordering::SeqCst);
            open.fetch_add(1, Ordering::SeqCst);
            async move {
                let service = hyper::service::service_fn(move |_: Request<_>| {
                    requests.fetch_add(1, Ordering::SeqCst);
                    let (gate, status) = (gate.clone(), status.clone());
                    async move {
                        gate.acquire().await.expect("open").forget();
                        Response::builder()
                            .status(status.load(Ordering::SeqCst))
                            .header("x-app", name)
                            .body(Full::<Bytes>::default())
                    }
                });
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                open.fetch_sub(1, Ordering::SeqCst);
            }
        });
        Self {
            address,
            accepted,
            open,
            requests,
            gate,
            status,
        }
    }

    /// Answers at once from now on.
    pub fn release(&self) {
        self.gate.add_permits(1 << 20);
    }

    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

fn millis(millis: u32) -> Option<protobuf::Duration> {
    Some(protobuf::Duration {
        seconds: i64::from(millis / 1000),
        nanos: (millis % 1000 * 1_000_000) as i32,
    })
}

fn to_cluster(at: SocketAddr, cluster: pb::Cluster) -> XdsState {
    let routes = table(vec![route_to(prefix("/"), action(&cluster.name))]);
    state(vec![http_listener(at, |_| {})], routes, vec![cluster])
}

fn limits(change: impl FnOnce(&mut Thresholds)) -> Option<pb::CircuitBreakers> {
    let mut thresholds = Thresholds {
        track_remaining: true,
        ..Default::default()
    };
    change(&mut thresholds);
    Some(pb::CircuitBreakers {
        thresholds: vec![thresholds],
        ..Default::default()
    })
}

fn count(proxy: &Proxy, cluster: &str, counter: Counter) -> u64 {
    let common = proxy.shared.upstreams.find(cluster);
    common.map_or(0, |common| common.total(counter))
}

fn get_in_background(at: SocketAddr) -> std::thread::JoinHandle<crate::stage::Reply> {
    std::thread::spawn(move || Client::connect(at).get("/", ""))
}

#[test]
fn beyond_the_limits_requests_wait_and_then_overflow() {
    let (at, app) = (free_port(), Held::start("a"));
    let config = pb::Cluster {
        circuit_breakers: limits(|t| {
            t.max_connections = number(1);
            t.max_pending_requests = number(1);
        }),
        ..cluster("a", &[app.address])
    };
    let proxy = Proxy::start(&to_cluster(at, config));
    let first = get_in_background(at);
    wait(|| app.requests() == 1);
    // The connection is busy: the second request waits for it, the third one is too much.
    let second = get_in_background(at);
    wait(|| count(&proxy, "a", Counter::PendingActive) == 1);
    let third = Client::connect(at).get("/", "");
    assert_eq!(
        (third.status, third.header("x-envoy-overloaded")),
        (503, Some("true"))
    );
    assert_eq!(
        third.body,
        "upstream connect error or disconnect/reset before headers. reset reason: overflow"
    );
    assert_eq!(count(&proxy, "a", Counter::PendingOverflow), 1);
    let flagged = || proxy.metric("istio_requests_total", &["response_flags=\"UO\""]) == 1.0;
    wait(flagged);
    app.release();
    assert_eq!(first.join().expect("a reply").status, 200);
    assert_eq!(second.join().expect("a reply").status, 200);
    assert_eq!(app.accepted(), 1, "never more than the one connection");
    assert_eq!(Client::connect(at).get("/", "").status, 200);
}

#[test]
fn requests_have_a_limit_over_http2_too() {
    let (at, app) = (free_port(), Held::start("a"));
    let config = pb::Cluster {
        http2_protocol_options: Some(Http2ProtocolOptions::default()),
        circuit_breakers: limits(|t| t.max_requests = number(2)),
        ..cluster("a", &[app.address])
    };
    let proxy = Proxy::start(&to_cluster(at, config));
    let running: Vec<_> = (0..2).map(|_| get_in_background(at)).collect();
    wait(|| app.requests() == 2);
    assert_eq!(Client::connect(at).get("/", "").status, 503);
    assert_eq!(count(&proxy, "a", Counter::PendingOverflow), 1);
    app.release();
    for request in running {
        assert_eq!(request.join().expect("a reply").status, 200);
    }
    assert_eq!(Client::connect(at).get("/", "").status, 200);
}

#[test]
fn full_http2_connections_get_company() {
    let (at, app) = (free_port(), Held::start("a"));
    let config = pb::Cluster {
        http2_protocol_options: Some(Http2ProtocolOptions {
            max_concurrent_streams: number(2),
            ..Default::default()
        }),
        ..cluster("a", &[app.address])
    };
    let proxy = Proxy::start(&to_cluster(at, config));
    let running: Vec<_> = (0..5).map(|_| get_in_background(at)).collect();
    wait(|| app.requests() == 5);
    assert_eq!(
        count(&proxy, "a", Counter::CxHttp2Total),
        3,
        "two streams each"
    );
    assert_eq!(app.accepted(), 3);
    app.release();
    for request in running {
        assert_eq!(request.join().expect("a reply").status, 200);
    }
    for _ in 0..5 {
        assert_eq!(Client::connect(at).get("/", "").status, 200);
    }
    assert_eq!(app.accepted(), 3);
}

#[test]
fn a_tcp_connection_beyond_the_limit_is_closed() {
    let (at, app) = (free_port(), Held::start("a"));
    let config = pb::Cluster {
        circuit_breakers: limits(|t| t.max_connections = number(1)),
        ..cluster("a", &[app.address])
    };
    let routes = table(vec![route_to(prefix("/"), action("a"))]);
    let config = state(vec![tcp_listener(at, "a")], routes, vec![config]);
    let proxy = Proxy::start(&config);
    app.release();
    // The connection with which the stage saw the listener open may hold the only place for a moment.
    let admitted = || {
        for _ in 0..1000 {
            let mut client = Client::connect(at);
            client.send("GET / HTTP/1.1\r\nHost: app.test\r\n\r\n");
            if client.reply().is_some_and(|reply| reply.status == 200) {
                return client;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no place for a connection");
    };
    let first = admitted();
    assert!(Client::connect(at).is_closed());
    assert!(count(&proxy, "a", Counter::CxOverflow) >= 1);
    drop(first);
    admitted();
}

#[test]
fn retries_have_a_budget() {
    let (at, app) = (free_port(), Held::start("a"));
    app.status.store(503, Ordering::SeqCst);
    app.release();
    let config = |least| pb::Cluster {
        circuit_breakers: limits(|t| {
            t.retry_budget = Some(RetryBudget {
                min_retry_concurrency: number(least),
                ..Default::default()
            });
        }),
        ..cluster("a", &[app.address])
    };
    let mut to = action("a");
    to.retry_policy = Some(envoy_types::pb::envoy::config::route::v3::RetryPolicy {
        retry_on: "5xx".to_owned(),
        num_retries: number(2),
        ..Default::default()
    });
    let routes = table(vec![route_to(prefix("/"), to)]);
    let listeners = || vec![http_listener(at, |_| {})];
    let proxy = Proxy::start(&state(listeners(), routes.clone(), vec![config(3)]));
    assert_eq!(Client::connect(at).get("/", "").status, 503);
    assert_eq!(
        (app.requests(), count(&proxy, "a", Counter::RqRetry)),
        (3, 2)
    );
    assert_eq!(count(&proxy, "a", Counter::RqRetryLimitExceeded), 1);
    proxy.publish(&state(listeners(), routes, vec![config(0)]));
    let refused = || {
        Client::connect(at).get("/", "");
        count(&proxy, "a", Counter::RqRetryOverflow) > 0
    };
    wait(refused);
}

/// What is over counts as long as the interval says; without one there is only the request that wants the retry.
#[test]
fn a_budget_can_count_what_began_lately() {
    let minute = envoy_types::pb::google::protobuf::Duration {
        seconds: 60,
        nanos: 0,
    };
    for (interval, expected) in [(None, 0), (Some(minute), 2)] {
        let (at, app) = (free_port(), Held::start("a"));
        app.status.store(503, Ordering::SeqCst);
        app.release();
        let upstream = pb::Cluster {
            circuit_breakers: limits(|t| {
                t.retry_budget = Some(RetryBudget {
                    budget_percent: Some(Percent { value: 40.0 }),
                    min_retry_concurrency: number(0),
                    budget_interval: interval,
                });
            }),
            ..cluster("a", &[app.address])
        };
        let mut to = action("a");
        to.retry_policy = Some(envoy_types::pb::envoy::config::route::v3::RetryPolicy {
            retry_on: "5xx".to_owned(),
            num_retries: number(1),
            ..Default::default()
        });
        let routes = table(vec![route_to(prefix("/"), to)]);
        let proxy = Proxy::start(&state(
            vec![http_listener(at, |_| {})],
            routes,
            vec![upstream],
        ));
        for _ in 0..4 {
            assert_eq!(Client::connect(at).get("/", "").status, 503);
        }
        // 40 % of one or two that began come to none, of three and more to one.
        let (retried, refused) = (
            count(&proxy, "a", Counter::RqRetry),
            count(&proxy, "a", Counter::RqRetryOverflow),
        );
        assert_eq!(retried + refused, 4, "{interval:?}");
        assert_eq!(app.requests() as u64, 4 + retried, "{interval:?}");
        assert_eq!(retried, expected, "{interval:?}");
    }
}

fn detection(change: impl FnOnce(&mut pb::OutlierDetection)) -> Option<pb::OutlierDetection> {
    let mut detection = pb::OutlierDetection {
        interval: millis(50),
        base_ejection_time: millis(600),
        max_ejection_percent: number(100),
        ..Default::default()
    };
    change(&mut detection);
    Some(detection)
}

/// Who answers: name and status of so many requests.
fn answers(at: SocketAddr, n: usize) -> Vec<(String, u16)> {
    let mut client = Client::connect(at);
    let mut one = || {
        let reply = client.get("/", "");
        (reply.header("x-app").unwrap_or("").to_owned(), reply.status)
    };
    (0..n).map(|_| one()).collect()
}

#[test]
fn an_endpoint_that_fails_is_taken_out_and_comes_back() {
    let (at, good, bad) = (free_port(), Held::start("good"), Held::start("bad"));
    good.release();
    bad.release();
    bad.status.store(500, Ordering::SeqCst);
    let config = pb::Cluster {
        outlier_detection: detection(|d| d.consecutive_5xx = number(3)),
        ..cluster("a", &[good.address, bad.address])
    };
    let proxy = Proxy::start(&to_cluster(at, config));
    let started = Instant::now();
    let failed = answers(at, 30)
        .iter()
        .filter(|(_, status)| *status == 500)
        .count();
    assert_eq!(failed, 3, "taken out after the third");
    assert_eq!(count(&proxy, "a", Counter::Enforced5xx), 1);
    let common = proxy.shared.upstreams.find("a").expect("in use");
    assert_eq!(common.ejections_active(), 1);
    bad.status.store(200, Ordering::SeqCst);
    wait(|| answers(at, 4).iter().any(|(name, _)| name == "bad"));
    assert!(
        started.elapsed() >= Duration::from_millis(600),
        "no sooner than the ejection time"
    );
    // The second time it stays out twice as long.
    bad.status.store(500, Ordering::SeqCst);
    let again = Instant::now();
    wait(|| {
        answers(at, 4);
        common.ejections_active() == 1
    });
    wait(|| common.ejections_active() == 0);
    assert!(again.elapsed() >= Duration::from_millis(600));
}

#[test]
fn refused_connections_count_as_failures_and_a_part_of_the_endpoints_stays_in() {
    let (at, good, nobody) = (free_port(), Held::start("good"), free_port());
    good.release();
    let outlier = |percent: u32, split: bool| {
        detection(|d| {
            d.split_external_local_origin_errors = split;
            d.consecutive_5xx = number(if split { 0 } else { 2 });
            d.consecutive_local_origin_failure = number(2);
            d.max_ejection_percent = number(percent);
            d.base_ejection_time = millis(60_000);
        })
    };
    for split in [false, true] {
        let config = pb::Cluster {
            outlier_detection: outlier(50, split),
            ..cluster("a", &[good.address, nobody])
        };
        let proxy = Proxy::start(&to_cluster(at, config));
        let failed = answers(at, 20)
            .iter()
            .filter(|(_, status)| *status == 503)
            .count();
        assert_eq!(failed, 2, "split: {split}");
        assert!(
            proxy
                .shared
                .upstreams
                .find("a")
                .expect("in use")
                .ejections_active()
                == 1
        );
        let free = free_port();
        let config = pb::Cluster {
            outlier_detection: outlier(40, split),
            ..cluster("b", &[good.address, nobody])
        };
        let small = Proxy::start(&to_cluster(free, config));
        let failed = answers(free, 20)
            .iter()
            .filter(|(_, status)| *status == 503)
            .count();
        assert_eq!(failed, 10, "one of two is more than 40 %");
        assert!(count(&small, "b", Counter::EjectionsOverflow) >= 1);
        // The next round listens at the same address.
        proxy.publish(&XdsState::default());
        wait(|| std::net::TcpStream::connect(at).is_err());
    }
}

#[test]
fn who_fails_more_than_the_others_is_taken_out() {
    let by_percentage = |d: &mut pb::OutlierDetection| {
        d.enforcing_success_rate = number(0);
        d.enforcing_failure_percentage = number(100);
        d.failure_percentage_request_volume = number(5);
    };
    // Rates of 100, 100, 100, 100 and 0 %: mean 80, deviation 40, so that less than 80 - 1.9 * 40 = 4 is too little.
    let by_success = |d: &mut pb::OutlierDetection| {
        d.success_rate_request_volume = number(5);
    };
    type Change = fn(&mut pb::OutlierDetection);
    let cases: [(Change, Counter); 2] = [
        (by_percentage, Counter::EnforcedPercentage),
        (by_success, Counter::EnforcedRate),
    ];
    for (change, counter) in cases {
        let (at, bad) = (free_port(), Held::start("bad"));
        let good: Vec<_> = (0..4).map(|_| Held::start("good")).collect();
        good.iter().chain([&bad]).for_each(Held::release);
        bad.status.store(500, Ordering::SeqCst);
        let addresses: Vec<_> = good.iter().chain([&bad]).map(|app| app.address).collect();
        let config = pb::Cluster {
            outlier_detection: detection(|d| {
                d.interval = millis(400);
                d.base_ejection_time = millis(60_000);
                d.consecutive_5xx = number(0);
                change(d);
            }),
            ..cluster("a", &addresses)
        };
        let proxy = Proxy::start(&to_cluster(at, config));
        wait(|| {
            answers(at, 50);
            count(&proxy, "a", counter) == 1
        });
        let after = answers(at, 50);
        assert!(
            after
                .iter()
                .all(|(name, status)| name == "good" && *status == 200),
            "{counter:?}: {after:?}"
        );
    }
}

#[test]
fn unused_and_old_connections_are_closed() {
    use envoy_types::pb::envoy::config::core::v3::HttpProtocolOptions as Common;
    use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
    let options = |common: Common| {
        let options = HttpProtocolOptions {
            common_http_protocol_options: Some(common),
            ..Default::default()
        };
        let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        let any = protobuf::Any {
            type_url: format!("type.googleapis.com/{name}"),
            value: prost::Message::encode_to_vec(&options),
        };
        [(name.to_owned(), any)].into()
    };
    let (at, app) = (free_port(), Held::start("a"));
    app.release();
    let idle = Common {
        idle_timeout: millis(1000),
        ..Default::default()
    };
    let config = pb::Cluster {
        typed_extension_protocol_options: options(idle),
        ..cluster("a", &[app.address])
    };
    let proxy = Proxy::start(&to_cluster(at, config));
    answers(at, 2);
    assert_eq!(app.open.load(Ordering::SeqCst), 1);
    wait(|| app.open.load(Ordering::SeqCst) == 0);
    assert_eq!(count(&proxy, "a", Counter::CxIdleTimeout), 1);
    let old = Common {
        max_connection_duration: millis(1000),
        ..Default::default()
    };
    let config = pb::Cluster {
        typed_extension_protocol_options: options(old),
        ..cluster("b", &[app.address])
    };
    proxy.publish(&to_cluster(at, config));
    wait(|| proxy.shared.upstreams.find("a").is_none());
    let before = app.accepted();
    wait(|| {
        answers(at, 2);
        app.accepted() >= before + 2
    });
    assert!(count(&proxy, "b", Counter::CxMaxDuration) >= 1);
}

#[test]
fn connections_stay_when_the_configuration_changes_unless_they_are_concerned() {
    let (at, a, b) = (free_port(), App::start("a"), App::start("b"));
    let proxy = Proxy::start(&to_cluster(at, cluster("all", &[a.address])));
    let connections = || a.connections.load(Ordering::SeqCst);
    assert_eq!(Client::connect(at).get("/", "").status, 200);
    let changed = [
        cluster("all", &[a.address, b.address]),
        pb::Cluster {
            lb_policy: pb::cluster::LbPolicy::LeastRequest as i32,
            circuit_breakers: limits(|t| t.max_connections = number(7)),
            ..cluster("all", &[a.address])
        },
        cluster("all", &[a.address]),
    ];
    for config in changed {
        proxy.publish(&to_cluster(at, config));
        for _ in 0..4 {
            assert_eq!(Client::connect(at).get("/", "").status, 200);
        }
        assert_eq!(connections(), 1);
    }
    let keepalive = pb::Cluster {
        upstream_connection_options: Some(pb::UpstreamConnectionOptions {
            tcp_keepalive: Some(TcpKeepalive {
                keepalive_time: number(7),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..cluster("all", &[a.address])
    };
    proxy.publish(&to_cluster(at, keepalive));
    wait(|| Client::connect(at).get("/", "").status == 200 && connections() == 2);
}

#[test]
fn an_endpoint_that_leaves_ends_in_peace() {
    let (at, old, new) = (free_port(), Held::start("old"), Held::start("new"));
    let proxy = Proxy::start(&to_cluster(at, cluster("a", &[old.address])));
    // One connection idle, one with a request under way.
    old.gate.add_permits(1);
    assert_eq!(answers(at, 1), [("old".to_owned(), 200)]);
    let running = get_in_background(at);
    wait(|| old.requests() == 2);
    let another = get_in_background(at);
    wait(|| old.requests() == 3 && old.open.load(Ordering::SeqCst) == 2);
    old.gate.add_permits(1);
    wait(|| running.is_finished() || another.is_finished());
    proxy.publish(&to_cluster(at, cluster("a", &[new.address])));
    new.release();
    wait(|| old.open.load(Ordering::SeqCst) == 1);
    assert!(answers(at, 5).iter().all(|(name, _)| name == "new"));
    old.release();
    for request in [running, another] {
        assert_eq!(
            request.join().expect("a reply").header("x-app"),
            Some("old")
        );
    }
    wait(|| old.open.load(Ordering::SeqCst) == 0);
    assert_eq!(old.requests(), 3, "nothing new came");
}

#[test]
fn a_cluster_that_leaves_closes_its_connections() {
    let (at, app) = (free_port(), Held::start("a"));
    let proxy = Proxy::start(&to_cluster(at, cluster("a", &[app.address])));
    let running: Vec<_> = (0..2).map(|_| get_in_background(at)).collect();
    wait(|| app.requests() == 2);
    app.gate.add_permits(1);
    wait(|| running.iter().any(|request| request.is_finished()));
    proxy.publish(&to_cluster(at, cluster("b", &[app.address])));
    wait(|| app.open.load(Ordering::SeqCst) == 1);
    app.release();
    for request in running {
        assert_eq!(request.join().expect("a reply").status, 200);
    }
    wait(|| app.open.load(Ordering::SeqCst) == 0);
}

#[test]
fn connections_end_after_their_requests_and_their_time() {
    let (at, app) = (free_port(), Held::start("a"));
    app.release();
    let config = pb::Cluster {
        max_requests_per_connection: number(3),
        ..cluster("a", &[app.address])
    };
    let proxy = Proxy::start(&to_cluster(at, config));
    answers(at, 9);
    assert_eq!(app.accepted(), 3);
    assert_eq!(count(&proxy, "a", Counter::CxMaxRequests), 3);
    let http2 = pb::Cluster {
        http2_protocol_options: Some(Http2ProtocolOptions::default()),
        max_requests_per_connection: number(3),
        ..cluster("b", &[app.address])
    };
    proxy.publish(&to_cluster(at, http2));
    wait(|| proxy.shared.upstreams.find("a").is_none());
    answers(at, 9);
    assert_eq!(app.accepted(), 6);
}

#[test]
fn names_are_looked_up() {
    use envoy_types::pb::envoy::config::cluster::v3::cluster::{
        ClusterDiscoveryType, DiscoveryType,
    };
    use envoy_types::pb::envoy::config::core::v3::address::Address as Kind;
    use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
    let (at, app) = (free_port(), Held::start("a"));
    app.release();
    for kind in [DiscoveryType::StrictDns, DiscoveryType::LogicalDns] {
        let mut named = cluster("named", &[app.address]);
        named.cluster_discovery_type = Some(ClusterDiscoveryType::Type(kind as i32));
        named.dns_lookup_family = pb::cluster::DnsLookupFamily::V4Only as i32;
        let endpoints = &mut named.load_assignment.as_mut().expect("endpoints").endpoints;
        for endpoint in &mut endpoints[0].lb_endpoints {
            if let Some(HostIdentifier::Endpoint(e)) = &mut endpoint.host_identifier
                && let Some(Kind::SocketAddress(s)) =
                    e.address.as_mut().and_then(|a| a.address.as_mut())
            {
                s.address = "localhost".to_owned();
            }
        }
        let proxy = Proxy::start(&to_cluster(at, named));
        wait(|| Client::connect(at).get("/", "").status == 200);
        assert!(count(&proxy, "named", Counter::DnsSuccess) >= 1);
        let first = Client::connect(at).get("/", "");
        assert_eq!(first.header("x-app"), Some("a"));
        proxy.publish(&XdsState::default());
        wait(|| std::net::TcpStream::connect(at).is_err());
    }
}
