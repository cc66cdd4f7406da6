//! Filters, mirrors and hashes: what is compiled, what is refused, and what they decide.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::grpc_service::{EnvoyGrpc, TargetSpecifier};
use envoy_types::pb::envoy::config::core::v3::{
    ApiVersion, GrpcService, RuntimeFractionalPercent,
};
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as FilterType;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain};
use envoy_types::pb::envoy::config::ratelimit::v3::RateLimitServiceConfig;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::rate_limit::action::{self, ActionSpecifier};
use envoy_types::pb::envoy::config::route::v3::route_action::hash_policy as hash;
use envoy_types::pb::envoy::config::route::v3::route_action::hash_policy::PolicySpecifier;
use envoy_types::pb::envoy::config::route::v3::route_action::{
    ClusterSpecifier, HashPolicy, RequestMirrorPolicy,
};
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::extensions::common::ratelimit::v3 as common;
use envoy_types::pb::envoy::extensions::filters::common::fault::v3 as fault_common;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::{Cors, CorsPolicy};
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as fault;
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3::LocalRateLimit;
use envoy_types::pb::envoy::extensions::filters::http::ratelimit::v3::{
    RateLimit, RateLimitPerRoute,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, Rds,
};
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, TokenBucket};
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration, UInt32Value};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use mesh_routing::action::{Action, ClusterTarget, Forward};
use mesh_routing::chain::NetworkFilter;
use mesh_routing::filter::cors::{self, Verdict};
use mesh_routing::filter::descriptor::Facts;
use mesh_routing::filter::local_rate_limit::BucketId;
use mesh_routing::filter::{Active, HttpFilters, RouteFilters};
use mesh_routing::hcm::HttpManager;
use mesh_routing::route::{Decision, RequestView, Route, RouteTable};
use mesh_routing::xxhash::xx_hash64;
use mesh_routing::{XdsState, compile};
use prost::{Message, Name};

use crate::chains::listener;

fn any<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

fn percent(numerator: u32) -> Option<FractionalPercent> {
    Some(FractionalPercent {
        numerator,
        denominator: DenominatorType::Hundred as i32,
    })
}

fn runtime(numerator: u32) -> Option<RuntimeFractionalPercent> {
    Some(RuntimeFractionalPercent {
        default_value: percent(numerator),
        ..Default::default()
    })
}

fn filter<M: Message + Name>(name: &str, message: &M) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(message))),
        ..Default::default()
    }
}

/// A listener with these filters, through the whole compiler.
fn manager(filters: Vec<HttpFilter>) -> Result<Arc<HttpManager>, String> {
    let manager = HttpConnectionManager {
        stat_prefix: "t".to_owned(),
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            route_config_name: "t".to_owned(),
            ..Default::default()
        })),
        http_filters: filters,
        ..Default::default()
    };
    let chain = FilterChain {
        filters: vec![Filter {
            name: "hcm".to_owned(),
            config_type: Some(FilterType::TypedConfig(any(&manager))),
        }],
        ..Default::default()
    };
    let mut state = XdsState::default();
    let listener = listener("l", "127.0.0.1", 80, vec![chain]);
    state.listeners.insert("l".to_owned(), listener.into());
    state.routes.insert(
        "t".to_owned(),
        Arc::new(route::RouteConfiguration {
            name: "t".to_owned(),
            ..Default::default()
        }),
    );
    first_manager(&state)
}

fn first_manager(state: &XdsState) -> Result<Arc<HttpManager>, String> {
    let (snapshot, rejections) = compile(state, None);
    if let Some(rejection) = rejections.first() {
        return Err(rejection.message.clone());
    }
    let listener = snapshot.listeners().next().expect("a listener").clone();
    let chain = listener.chains().next().expect("a chain").clone();
    match &chain.filter {
        NetworkFilter::Http(manager) => Ok(manager.clone()),
        NetworkFilter::Tcp(_) => Err("not HTTP".to_owned()),
    }
}

type Settings = HashMap<String, Any>;

fn settings<M: Message + Name>(name: &str, message: &M) -> Settings {
    [(name.to_owned(), any(message))].into()
}

fn to(cluster: &str) -> route::RouteAction {
    route::RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        ..Default::default()
    }
}

/// A table of one route.
struct One {
    table: Settings,
    host: route::VirtualHost,
    route: Settings,
    action: route::RouteAction,
}

impl Default for One {
    fn default() -> Self {
        Self {
            table: Settings::new(),
            host: route::VirtualHost {
                name: "h".to_owned(),
                domains: vec!["*".to_owned()],
                ..Default::default()
            },
            route: Settings::new(),
            action: to("c"),
        }
    }
}

impl One {
    fn compile(self) -> Result<RouteTable, String> {
        let route = route::Route {
            r#match: Some(route::RouteMatch {
                path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
                ..Default::default()
            }),
            action: Some(route::route::Action::Route(self.action)),
            typed_per_filter_config: self.route,
            ..Default::default()
        };
        let table = route::RouteConfiguration {
            name: "t".to_owned(),
            typed_per_filter_config: self.table,
            virtual_hosts: vec![route::VirtualHost {
                routes: vec![route],
                ..self.host
            }],
            ..Default::default()
        };
        RouteTable::compile(&table).map_err(|error| error.to_string())
    }

    fn table(self) -> RouteTable {
        self.compile().expect("a table")
    }
}

fn first_route(table: &RouteTable) -> &Route {
    let headers = HeaderMap::new();
    match table.decide(&view("GET", "/", &headers)) {
        Decision::Matched(matched) => matched.route,
        other => panic!("{other:?}"),
    }
}

fn forward(table: &RouteTable) -> &Forward {
    match &first_route(table).action {
        Action::Forward(forward) => forward,
        other => panic!("{other:?}"),
    }
}

fn view<'a>(method: &'a str, path_and_query: &'a str, headers: &'a HeaderMap) -> RequestView<'a> {
    RequestView {
        host: "app.test:8080",
        method,
        path_and_query,
        scheme: "http",
        headers,
        random: 0,
    }
}

fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
    list.iter()
        .map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        })
        .collect()
}

/// What is active for a route, in words.
fn active(filters: &HttpFilters, route: Option<&RouteFilters>) -> Vec<&'static str> {
    filters
        .active(route)
        .map(|filter| match filter {
            Active::Fault(_) => "fault",
            Active::Cors(_) => "cors",
            Active::LocalRateLimit(..) => "local",
            Active::RateLimit(..) => "global",
            Active::Rbac(..) => "rbac",
            Active::Jwt(..) => "jwt",
            Active::ExtAuthz(..) => "ext_authz",
        })
        .collect()
}

fn abort(status: u32, numerator: u32) -> fault::HttpFault {
    fault::HttpFault {
        abort: Some(fault::FaultAbort {
            percentage: percent(numerator),
            error_type: Some(fault::fault_abort::ErrorType::HttpStatus(status)),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn bucket(max: u32, per_fill: u32, seconds: i64) -> Option<TokenBucket> {
    Some(TokenBucket {
        max_tokens: max,
        tokens_per_fill: Some(UInt32Value { value: per_fill }),
        fill_interval: Some(Duration { seconds, nanos: 0 }),
    })
}

fn local(max: u32) -> LocalRateLimit {
    LocalRateLimit {
        stat_prefix: "l".to_owned(),
        token_bucket: bucket(max, max, 60),
        filter_enabled: runtime(100),
        filter_enforced: runtime(100),
        ..Default::default()
    }
}

fn global() -> RateLimit {
    RateLimit {
        domain: "d".to_owned(),
        rate_limit_service: Some(RateLimitServiceConfig {
            grpc_service: Some(GrpcService {
                target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                    cluster_name: "limits".to_owned(),
                    ..Default::default()
                })),
                ..Default::default()
            }),
            transport_api_version: ApiVersion::V3 as i32,
        }),
        ..Default::default()
    }
}

fn generic_key(value: &str) -> route::RateLimit {
    route::RateLimit {
        actions: vec![make_action(ActionSpecifier::GenericKey(
            action::GenericKey {
                descriptor_value: value.to_owned(),
                ..Default::default()
            },
        ))],
        ..Default::default()
    }
}

fn make_action(specifier: ActionSpecifier) -> route::rate_limit::Action {
    route::rate_limit::Action {
        action_specifier: Some(specifier),
    }
}

#[test]
fn filters_without_settings_ask_nothing_of_a_request() {
    let manager = manager(vec![
        filter("fault", &fault::HttpFault::default()),
        filter("cors", &Cors::default()),
        filter("limit", &global()),
    ])
    .expect("a manager");
    assert!(!manager.filters.wanted(None));
    let table = One::default().table();
    assert!(first_route(&table).filters.is_none());
}

#[test]
fn the_most_specific_level_speaks_and_the_chain_keeps_its_order() {
    let manager = manager(vec![
        filter("limit", &local(1)),
        filter("fault", &fault::HttpFault::default()),
        filter("cors", &Cors::default()),
    ])
    .expect("a manager");
    assert!(manager.filters.wanted(None), "the limit acts by itself");
    let mut one = One {
        table: settings("fault", &abort(501, 100)),
        route: settings("fault", &abort(503, 100)),
        ..One::default()
    };
    one.host.typed_per_filter_config = settings("fault", &abort(502, 100));
    let table = one.table();
    let said = first_route(&table).filters.as_deref();
    assert_eq!(active(&manager.filters, said), ["local", "fault"]);
    let fault = manager.filters.active(said).find_map(|f| match f {
        Active::Fault(fault) => Some(fault),
        _ => None,
    });
    let abort = fault.expect("a fault").abort(&HeaderMap::new(), 7);
    assert_eq!(
        abort.expect("an abort").status,
        StatusCode::SERVICE_UNAVAILABLE
    );
}

#[test]
fn a_route_turns_filters_off_and_on() {
    let off = |name: &str| {
        settings(
            name,
            &route::FilterConfig {
                disabled: true,
                ..Default::default()
            },
        )
    };
    let manager = manager(vec![
        filter("limit", &local(1)),
        HttpFilter {
            disabled: true,
            ..filter("sleeping", &local(1))
        },
    ])
    .expect("a manager");
    let table = One {
        route: off("limit"),
        ..One::default()
    }
    .table();
    let said = first_route(&table).filters.as_deref();
    assert!(active(&manager.filters, said).is_empty());
    assert_eq!(active(&manager.filters, None), ["local"]);
    let on = route::FilterConfig {
        config: Some(any(&local(5))),
        ..Default::default()
    };
    let table = One {
        route: settings("sleeping", &on),
        ..One::default()
    }
    .table();
    let said = first_route(&table).filters.as_deref();
    assert_eq!(active(&manager.filters, said), ["local", "local"]);
}

#[test]
fn an_entry_of_a_split_has_a_word_of_its_own() {
    let entry = |name: &str, weight: u32, typed_per_filter_config: Settings| {
        route::weighted_cluster::ClusterWeight {
            name: name.to_owned(),
            weight: Some(UInt32Value { value: weight }),
            typed_per_filter_config,
            ..Default::default()
        }
    };
    let clusters = vec![
        entry("plain", 1, Settings::new()),
        entry("faulty", 1, settings("fault", &abort(503, 100))),
    ];
    let table = One {
        action: route::RouteAction {
            cluster_specifier: Some(ClusterSpecifier::WeightedClusters(route::WeightedCluster {
                clusters,
                ..Default::default()
            })),
            ..Default::default()
        },
        ..One::default()
    }
    .table();
    assert!(
        first_route(&table).filters.is_some(),
        "requests of the route must come to the filters"
    );
    let none = HeaderMap::new();
    for (random, filters) in [(0, false), (1, true)] {
        let request = RequestView {
            random,
            ..view("GET", "/", &none)
        };
        match forward(&table).target(&request) {
            ClusterTarget::Entry(entry) => assert_eq!(entry.filters.is_some(), filters),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let unknown = HttpFilter {
        name: "lua".to_owned(),
        config_type: Some(ConfigType::TypedConfig(Any {
            type_url: "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua".to_owned(),
            value: Vec::new(),
        })),
        ..Default::default()
    };
    let error = manager(vec![unknown.clone()]).expect_err("refused");
    assert!(
        error.contains("http_filters[0] lua") && error.contains("lua.v3.Lua"),
        "{error}"
    );
    let optional = HttpFilter {
        is_optional: true,
        ..unknown
    };
    assert!(manager(vec![optional]).is_ok(), "Envoy leaves it out");

    let wildcard = LocalRateLimit {
        descriptors: vec![common::LocalRateLimitDescriptor {
            entries: vec![common::rate_limit_descriptor::Entry {
                key: "user".to_owned(),
                value: String::new(),
            }],
            token_bucket: bucket(1, 1, 60),
            ..Default::default()
        }],
        ..local(1)
    };
    let error = manager(vec![filter("l", &wildcard)]).expect_err("refused");
    assert!(
        error.contains("descriptors[0].entries") && error.contains("\"user\""),
        "{error}"
    );

    let fast = LocalRateLimit {
        token_bucket: Some(TokenBucket {
            fill_interval: Some(Duration {
                seconds: 0,
                nanos: 49_000_000,
            }),
            ..bucket(1, 1, 0).expect("a bucket")
        }),
        ..local(1)
    };
    let error = manager(vec![filter("l", &fast)]).expect_err("refused");
    assert!(error.contains("token_bucket.fill_interval"), "{error}");

    let metadata = route::RateLimit {
        actions: vec![make_action(ActionSpecifier::Metadata(
            action::MetaData::default(),
        ))],
        ..Default::default()
    };
    let mut one = One::default();
    one.action.rate_limits = vec![metadata];
    let error = one.compile().expect_err("refused");
    assert!(
        error.contains("rate_limits.[0].actions[0].metadata"),
        "{error}"
    );

    let mut one = One::default();
    one.action.hash_policy = vec![HashPolicy {
        policy_specifier: Some(PolicySpecifier::FilterState(hash::FilterState::default())),
        ..Default::default()
    }];
    let error = one.compile().expect_err("refused");
    assert!(error.contains("hash_policy[0].filter_state"), "{error}");

    let per_route = LocalRateLimit {
        token_bucket: None,
        ..local(1)
    };
    let error = One {
        route: settings("l", &per_route),
        ..One::default()
    }
    .compile()
    .expect_err("refused");
    assert!(
        error.contains("typed_per_filter_config[\"l\"].token_bucket"),
        "{error}"
    );
}

#[test]
fn faults_are_drawn_by_their_percentages() {
    let delay = |numerator, denominator| fault_common::FaultDelay {
        percentage: Some(FractionalPercent {
            numerator,
            denominator: denominator as i32,
        }),
        fault_delay_secifier: Some(fault_common::fault_delay::FaultDelaySecifier::FixedDelay(
            Duration {
                seconds: 7,
                nanos: 0,
            },
        )),
    };
    let none = HeaderMap::new();
    for (numerator, denominator, of) in [
        (25, DenominatorType::Hundred, 100),
        (25, DenominatorType::TenThousand, 10_000),
        (25, DenominatorType::Million, 1_000_000),
    ] {
        let manager = manager(vec![filter(
            "fault",
            &fault::HttpFault {
                delay: Some(delay(numerator, denominator)),
                ..Default::default()
            },
        )])
        .expect("a manager");
        let Some(Active::Fault(fault)) = manager.filters.active(None).next() else {
            panic!("no fault");
        };
        let delayed = (0..of).filter(|r| fault.delay(&none, *r).is_some()).count();
        assert_eq!(delayed, 25, "of {of}");
        assert_eq!(
            fault.delay(&none, 0),
            Some(std::time::Duration::from_secs(7))
        );
        assert!(fault.abort(&none, 0).is_none());
    }
}

#[test]
fn faults_can_be_asked_for_by_headers() {
    let manager = manager(vec![filter(
        "fault",
        &fault::HttpFault {
            delay: Some(fault_common::FaultDelay {
                percentage: percent(100),
                fault_delay_secifier: Some(
                    fault_common::fault_delay::FaultDelaySecifier::HeaderDelay(Default::default()),
                ),
            }),
            abort: Some(fault::FaultAbort {
                percentage: percent(50),
                error_type: Some(fault::fault_abort::ErrorType::HeaderAbort(
                    Default::default(),
                )),
                response_body: "broken on purpose".to_owned(),
            }),
            headers: vec![route::HeaderMatcher {
                name: "x-test".to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        },
    )])
    .expect("a manager");
    let Some(Active::Fault(fault)) = manager.filters.active(None).next() else {
        panic!("no fault");
    };
    let asked = headers(&[
        ("x-test", "1"),
        ("x-envoy-fault-delay-request", "1500"),
        ("x-envoy-fault-abort-grpc-request", "5"),
        ("x-envoy-fault-abort-request-percentage", "10"),
    ]);
    assert!(fault.applies(&view("GET", "/", &asked), Some("c")));
    assert!(!fault.applies(&view("GET", "/", &HeaderMap::new()), Some("c")));
    assert_eq!(
        fault.delay(&asked, 99),
        Some(std::time::Duration::from_millis(1500))
    );
    assert_eq!(
        fault.delay(&HeaderMap::new(), 0),
        None,
        "nothing was asked for"
    );
    let abort = fault.abort(&asked, 9).expect("an abort");
    assert_eq!((abort.status, abort.grpc), (StatusCode::OK, Some(5)));
    assert_eq!(abort.body, "broken on purpose");
    assert!(
        fault.abort(&asked, 10).is_none(),
        "the header lowers the percentage"
    );
    let more = headers(&[
        ("x-envoy-fault-abort-request", "418"),
        ("x-envoy-fault-abort-request-percentage", "100"),
    ]);
    assert!(fault.abort(&more, 50).is_none(), "but never raises it");
    let abort = fault.abort(&more, 49).expect("an abort");
    assert_eq!((abort.status, abort.grpc), (StatusCode::IM_A_TEAPOT, None));
}

fn origins(list: &[MatchPattern]) -> Vec<StringMatcher> {
    let matcher = |pattern: &MatchPattern| StringMatcher {
        match_pattern: Some(pattern.clone()),
        ..Default::default()
    };
    list.iter().map(matcher).collect()
}

fn judge(policy: CorsPolicy, method: &str, list: &[(&'static str, &'static str)]) -> String {
    let manager = manager(vec![filter("cors", &Cors::default())]).expect("a manager");
    let table = One {
        route: settings("cors", &policy),
        ..One::default()
    }
    .table();
    let said = first_route(&table).filters.as_deref();
    let Some(Active::Cors(policies)) = manager.filters.active(said).next() else {
        panic!("no policy");
    };
    let sent = headers(list);
    let show = |headers: HeaderMap| {
        let mut lines: Vec<String> = headers
            .iter()
            .map(|(name, value)| {
                let name = name.as_str().trim_start_matches("access-control-");
                format!("{name}={}", value.to_str().expect("text"))
            })
            .collect();
        lines.sort();
        lines.join(" ")
    };
    match cors::judge(policies, &view(method, "/", &sent), 0) {
        Verdict::Pass => "pass".to_owned(),
        Verdict::Decorate(headers) => format!("decorate {}", show(headers)),
        Verdict::Answer(headers) => format!("answer {}", show(headers)),
    }
}

#[test]
fn cors_answers_preflights_and_decorates_the_rest() {
    let policy = CorsPolicy {
        allow_origin_string_match: origins(&[
            MatchPattern::Exact("https://a.test".to_owned()),
            MatchPattern::Prefix("https://b.".to_owned()),
        ]),
        allow_methods: "GET,POST".to_owned(),
        allow_headers: "*".to_owned(),
        expose_headers: "x-own".to_owned(),
        max_age: "86400".to_owned(),
        allow_credentials: Some(BoolValue { value: true }),
        allow_private_network_access: Some(BoolValue { value: true }),
        ..Default::default()
    };
    let preflight = "access-control-request-method";
    for (method, sent, expected) in [
        ("GET", vec![], "pass"),
        (
            "GET",
            vec![("origin", "https://a.test")],
            "decorate allow-credentials=true allow-origin=https://a.test expose-headers=x-own",
        ),
        ("GET", vec![("origin", "https://c.test")], "pass"),
        (
            "OPTIONS",
            vec![("origin", "https://b.test")],
            "decorate allow-credentials=true allow-origin=https://b.test expose-headers=x-own",
        ),
        (
            "OPTIONS",
            vec![
                ("origin", "https://b.test"),
                (preflight, "PUT"),
                ("access-control-request-headers", "x-1,x-2"),
                ("access-control-request-private-network", "true"),
            ],
            "answer allow-credentials=true allow-headers=x-1,x-2 allow-methods=GET,POST allow-origin=https://b.test \
             allow-private-network=true expose-headers=x-own max-age=86400",
        ),
        (
            "OPTIONS",
            vec![("origin", "https://c.test"), (preflight, "PUT")],
            "pass",
        ),
    ] {
        assert_eq!(
            judge(policy.clone(), method, &sent),
            expected,
            "{method} {sent:?}"
        );
    }
    let strict = CorsPolicy {
        forward_not_matching_preflights: Some(BoolValue { value: false }),
        allow_credentials: None,
        allow_methods: "*".to_owned(),
        ..policy.clone()
    };
    assert_eq!(
        judge(
            strict,
            "OPTIONS",
            &[("origin", "https://c.test"), (preflight, "PUT")]
        ),
        "answer allow-methods=PUT max-age=86400"
    );
    let off = CorsPolicy {
        filter_enabled: runtime(0),
        ..policy
    };
    assert_eq!(judge(off, "GET", &[("origin", "https://a.test")]), "pass");
}

#[test]
fn inner_cors_policies_leave_open_fields_to_outer_ones() {
    let manager = manager(vec![filter("cors", &Cors::default())]).expect("a manager");
    let mut one = One {
        route: settings(
            "cors",
            &CorsPolicy {
                allow_methods: "GET".to_owned(),
                ..Default::default()
            },
        ),
        ..One::default()
    };
    one.host.typed_per_filter_config = settings(
        "cors",
        &CorsPolicy {
            allow_origin_string_match: origins(&[MatchPattern::Exact("*".to_owned())]),
            allow_methods: "PUT".to_owned(),
            ..Default::default()
        },
    );
    let table = one.table();
    let said = first_route(&table).filters.as_deref();
    let Some(Active::Cors(policies)) = manager.filters.active(said).next() else {
        panic!("no policy");
    };
    let sent = headers(&[
        ("origin", "https://x"),
        ("access-control-request-method", "PUT"),
    ]);
    let Verdict::Answer(answer) = cors::judge(policies, &view("OPTIONS", "/", &sent), 0) else {
        panic!("not answered");
    };
    assert_eq!(answer["access-control-allow-origin"], "https://x");
    assert_eq!(answer["access-control-allow-methods"], "GET");
}

#[test]
fn descriptors_follow_the_actions() {
    let header = |name: &str, skip_if_absent| {
        make_action(ActionSpecifier::RequestHeaders(action::RequestHeaders {
            header_name: name.to_owned(),
            descriptor_key: name.trim_start_matches(':').to_uppercase(),
            skip_if_absent,
        }))
    };
    let matches = |expect| {
        make_action(ActionSpecifier::HeaderValueMatch(
            action::HeaderValueMatch {
                descriptor_value: "yes".to_owned(),
                expect_match: Some(BoolValue { value: expect }),
                headers: vec![route::HeaderMatcher {
                    name: "x-user".to_owned(),
                    ..Default::default()
                }],
                ..Default::default()
            },
        ))
    };
    let mask = make_action(ActionSpecifier::MaskedRemoteAddress(
        action::MaskedRemoteAddress {
            v4_prefix_mask_len: Some(UInt32Value { value: 24 }),
            v6_prefix_mask_len: None,
        },
    ));
    let query = make_action(ActionSpecifier::QueryParameters(action::QueryParameters {
        query_parameter_name: "q".to_owned(),
        descriptor_key: "query".to_owned(),
        skip_if_absent: false,
    }));
    let fixed = [
        make_action(ActionSpecifier::SourceCluster(action::SourceCluster {})),
        make_action(ActionSpecifier::DestinationCluster(
            action::DestinationCluster {},
        )),
        make_action(ActionSpecifier::RemoteAddress(action::RemoteAddress {})),
    ];
    for (actions, expected) in [
        (
            fixed.to_vec(),
            Some("source_cluster=me destination_cluster=c remote_address=10.1.2.3"),
        ),
        (vec![mask], Some("masked_remote_address=10.1.2.0/24")),
        (
            vec![header(":path", false), header("x-user", false)],
            Some("PATH=/p?q=7 X-USER=jason"),
        ),
        (vec![header("x-none", false)], None),
        (
            vec![header("x-none", true), header(":authority", false)],
            Some("AUTHORITY=app.test:8080"),
        ),
        (vec![matches(true)], Some("header_match=yes")),
        (vec![matches(false)], None),
        (vec![query], Some("query=7")),
    ] {
        let manager = manager(vec![filter("limit", &global())]).expect("a manager");
        let mut one = One::default();
        one.action.rate_limits = vec![route::RateLimit {
            actions,
            ..Default::default()
        }];
        let table = one.table();
        let said = first_route(&table).filters.as_deref();
        assert!(manager.filters.wanted(said));
        let Some(Active::RateLimit(rule, route, settings)) = manager.filters.active(said).next()
        else {
            panic!("no limit");
        };
        let sent = headers(&[("x-user", "jason")]);
        let request = view("GET", "/p?q=7", &sent);
        let question = rule.question(route, settings, &facts(&request));
        let entries = question.map(|q| {
            let entries = &q.descriptors[0].entries;
            let pairs: Vec<_> = entries.iter().map(|(k, v)| format!("{k}={v}")).collect();
            pairs.join(" ")
        });
        assert_eq!(entries.as_deref(), expected);
    }
}

fn facts<'a>(request: &'a RequestView<'a>) -> Facts<'a> {
    Facts {
        request,
        remote: IpAddr::from([10, 1, 2, 3]),
        source_cluster: "me",
        destination_cluster: "c",
    }
}

#[test]
fn limits_of_route_and_virtual_host_and_stages() {
    let asked = |include: Option<bool>,
                 per_route: Settings,
                 route_limits: Vec<route::RateLimit>,
                 stage: u32| {
        let manager =
            manager(vec![filter("limit", &RateLimit { stage, ..global() })]).expect("a manager");
        let mut one = One {
            route: per_route,
            ..One::default()
        };
        one.host.rate_limits = vec![generic_key("host"), {
            let mut later = generic_key("host-1");
            later.stage = Some(UInt32Value { value: 1 });
            later
        }];
        one.action.rate_limits = route_limits;
        one.action.include_vh_rate_limits = include.map(|value| BoolValue { value });
        let table = one.table();
        let said = first_route(&table).filters.as_deref();
        let Some(Active::RateLimit(rule, route, settings)) = manager.filters.active(said).next()
        else {
            panic!("no limit");
        };
        let none = HeaderMap::new();
        let request = view("GET", "/", &none);
        let question = rule.question(route, settings, &facts(&request));
        let Some(question) = question else {
            return String::new();
        };
        let values: Vec<String> = question
            .descriptors
            .iter()
            .map(|d| d.entries[0].1.to_string())
            .collect();
        format!("{}: {}", question.domain, values.join(" "))
    };
    let per_route = |vh_rate_limits, domain: &str| {
        let message = RateLimitPerRoute {
            vh_rate_limits,
            domain: domain.to_owned(),
            ..Default::default()
        };
        settings("limit", &message)
    };
    let route = || vec![generic_key("route")];
    assert_eq!(asked(None, Settings::new(), vec![], 0), "d: host");
    assert_eq!(asked(None, Settings::new(), vec![], 1), "d: host-1");
    assert_eq!(asked(None, Settings::new(), route(), 0), "d: route");
    assert_eq!(
        asked(Some(true), Settings::new(), route(), 0),
        "d: route host"
    );
    assert_eq!(
        asked(None, per_route(1, "other"), route(), 0),
        "other: route host"
    );
    assert_eq!(asked(None, per_route(2, ""), vec![], 0), "");
}

#[test]
fn local_limits_choose_their_buckets() {
    let descriptor = |value: &str, max: u32, seconds: i64| common::LocalRateLimitDescriptor {
        entries: vec![common::rate_limit_descriptor::Entry {
            key: "generic_key".to_owned(),
            value: value.to_owned(),
        }],
        token_bucket: bucket(max, max, seconds),
        ..Default::default()
    };
    let judge = |always: bool, keys: &[&str], empty: &[BucketId]| {
        let message = LocalRateLimit {
            descriptors: vec![descriptor("a", 100, 60), descriptor("b", 1, 60)],
            always_consume_default_token_bucket: Some(BoolValue { value: always }),
            ..local(1000)
        };
        let manager = manager(vec![filter("l", &message)]).expect("a manager");
        let mut one = One::default();
        one.action.rate_limits = keys.iter().map(|key| generic_key(key)).collect();
        let table = one.table();
        let said = first_route(&table).filters.as_deref();
        let Some(Active::LocalRateLimit(rule, route)) = manager.filters.active(said).next() else {
            panic!("no limit");
        };
        let none = HeaderMap::new();
        let request = view("GET", "/", &none);
        let descriptors = rule.describe(route, &facts(&request));
        let mut asked = Vec::new();
        let judged = rule.judge(&descriptors, |id, _| {
            asked.push(id);
            !empty.contains(&id)
        });
        (judged.allowed, judged.bucket, asked)
    };
    let (a, b) = (BucketId::Descriptor(0), BucketId::Descriptor(1));
    let default = BucketId::Default;
    assert_eq!(judge(true, &[], &[]), (true, Some(default), vec![default]));
    assert_eq!(
        judge(true, &["x"], &[]),
        (true, Some(default), vec![default])
    );
    assert_eq!(judge(true, &["a"], &[]), (true, Some(a), vec![a, default]));
    assert_eq!(judge(false, &["a"], &[default]), (true, Some(a), vec![a]));
    assert_eq!(
        judge(false, &["a", "b"], &[b]),
        (false, Some(b), vec![b]),
        "the slowest is asked first"
    );
    assert_eq!(
        judge(true, &["a"], &[default]),
        (false, Some(default), vec![a, default])
    );
}

fn policy(specifier: PolicySpecifier, terminal: bool) -> HashPolicy {
    HashPolicy {
        policy_specifier: Some(specifier),
        terminal,
    }
}

fn by_header(name: &str) -> PolicySpecifier {
    PolicySpecifier::Header(hash::Header {
        header_name: name.to_owned(),
        ..Default::default()
    })
}

fn hash_of(
    policies: Vec<HashPolicy>,
    list: &[(&'static str, &'static str)],
) -> (Option<u64>, Vec<String>) {
    let mut one = One::default();
    one.action.hash_policy = policies;
    let table = one.table();
    let sent = headers(list);
    let remote: SocketAddr = "10.0.0.1:1234".parse().expect("an address");
    let local: SocketAddr = "10.0.0.2:80".parse().expect("an address");
    let hash = forward(&table).hash.as_ref().expect("a policy").hash(
        &view("GET", "/p?a=1&user=x&user=y", &sent),
        remote,
        local,
    );
    let cookies = hash
        .set_cookies
        .iter()
        .map(|c| c.to_str().expect("text").to_owned());
    (hash.value, cookies.collect())
}

#[test]
fn hashes_are_those_of_envoy() {
    let of = |text: &str| Some(xx_hash64(text.as_bytes(), 0));
    let source_ip =
        PolicySpecifier::ConnectionProperties(hash::ConnectionProperties { source_ip: true });
    let by_query = |name: &str| {
        PolicySpecifier::QueryParameter(hash::QueryParameter {
            name: name.to_owned(),
        })
    };
    let sent = [("x-user", "jason"), ("x-many", "b"), ("x-many", "a")];
    for (policies, expected) in [
        (vec![policy(by_header("x-user"), false)], of("jason")),
        (vec![policy(by_header("x-none"), false)], None),
        (
            vec![policy(by_header("x-many"), false)],
            Some(xx_hash64(b"b", xx_hash64(b"a", 0))),
        ),
        (vec![policy(source_ip.clone(), false)], of("10.0.0.1")),
        (vec![policy(by_query("user"), false)], of("x")),
        (vec![policy(by_query("none"), false)], None),
        (
            vec![
                policy(by_header("x-user"), false),
                policy(source_ip.clone(), false),
            ],
            of("jason")
                .zip(of("10.0.0.1"))
                .map(|(a, b)| a.rotate_left(1) ^ b),
        ),
        (
            vec![
                policy(by_header("x-user"), true),
                policy(source_ip.clone(), false),
            ],
            of("jason"),
        ),
        (
            vec![policy(by_header("x-none"), true), policy(source_ip, false)],
            of("10.0.0.1"),
        ),
    ] {
        assert_eq!(hash_of(policies.clone(), &sent).0, expected, "{policies:?}");
    }
}

#[test]
fn clients_without_the_cookie_are_given_one() {
    let cookie = |ttl: Option<i64>| {
        vec![policy(
            PolicySpecifier::Cookie(hash::Cookie {
                name: "user".to_owned(),
                ttl: ttl.map(|seconds| Duration { seconds, nanos: 0 }),
                path: "/p".to_owned(),
                attributes: vec![
                    hash::CookieAttribute {
                        name: "SameSite".to_owned(),
                        value: "Lax".to_owned(),
                    },
                    hash::CookieAttribute {
                        name: "Secure".to_owned(),
                        value: String::new(),
                    },
                ],
            }),
            false,
        )]
    };
    let sent = [("cookie", "other=1; user=\"abc\"; user=d")];
    assert_eq!(
        hash_of(cookie(Some(0)), &sent),
        (Some(xx_hash64(b"abc", 0)), vec![])
    );
    assert_eq!(hash_of(cookie(None), &[]), (None, vec![]));
    let value = format!("{:016x}", xx_hash64(b"10.0.0.1:123410.0.0.2:80", 0));
    let hash = Some(xx_hash64(value.as_bytes(), 0));
    for (ttl, age) in [(0, ""), (60, "; Max-Age=60")] {
        let expected = format!("user=\"{value}\"{age}; Path=/p; SameSite=Lax; Secure; HttpOnly");
        assert_eq!(hash_of(cookie(Some(ttl)), &[]), (hash, vec![expected]));
    }
}

#[test]
fn mirrors_of_the_route_come_before_those_of_the_virtual_host() {
    let to = |cluster: &str, fraction: Option<u32>, plain: bool| RequestMirrorPolicy {
        cluster: cluster.to_owned(),
        runtime_fraction: fraction.and_then(runtime),
        disable_shadow_host_suffix_append: plain,
        ..Default::default()
    };
    let mut one = One::default();
    one.host.request_mirror_policies = vec![to("host", None, true)];
    let table = one.table();
    let none = HeaderMap::new();
    let request = view("GET", "/", &none);
    let names = |table: &RouteTable, random| -> Vec<String> {
        let mirrors = &forward(table).mirrors;
        mirrors
            .iter()
            .filter_map(|m| m.target(&request, random))
            .map(|n| n.to_string())
            .collect()
    };
    assert_eq!(names(&table, 0), ["host"]);
    let mut one = One::default();
    one.host.request_mirror_policies = vec![to("host", None, true)];
    one.action.request_mirror_policies = vec![
        to("all", None, false),
        to("half", Some(50), true),
        to("never", Some(0), true),
    ];
    let table = one.table();
    assert_eq!(names(&table, 49), ["all", "half"]);
    assert_eq!(names(&table, 50), ["all"]);
    let mirrors = &forward(&table).mirrors;
    let host = HeaderValue::from_static("app.test:8080");
    assert_eq!(mirrors[0].host(&host), "app.test-shadow:8080");
    assert_eq!(mirrors[1].host(&host), "app.test:8080");
}
