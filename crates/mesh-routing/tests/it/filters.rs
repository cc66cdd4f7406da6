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

mod faults;
mod hashes;
mod limits;
mod origins;

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
