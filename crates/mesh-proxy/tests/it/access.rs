//! Access control, tokens and external authorization through the proxy.

use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::http_uri::HttpUpstreamType;
use envoy_types::pb::envoy::config::core::v3::{
    CidrRange, DataSource, Http2ProtocolOptions, HttpUri,
};
use envoy_types::pb::envoy::config::listener::v3::Filter;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as NetworkType;
use envoy_types::pb::envoy::config::rbac::v3 as rbac;
use envoy_types::pb::envoy::config::rbac::v3::permission::Rule;
use envoy_types::pb::envoy::config::rbac::v3::principal::Identifier;
use envoy_types::pb::envoy::config::rbac::v3::rbac::Action;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as authz;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{PathMatcher, StringMatcher, path_matcher};
use envoy_types::pb::google::protobuf::{Duration as PbDuration, UInt32Value};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_routing::XdsState;

use crate::config::{
    action, any, cluster, filter, http_listener, prefix, route_to, state, table, tcp_listener,
};
use crate::servers;
use crate::stage::{App, Client, Proxy, free_port};

/// Of issuer `https://a.test` for `alice`, until 2100; the private key is gone.
const TOKEN: &str = concat!(
    "eyJhbGciOiJSUzI1NiIsImtpZCI6InJzYSIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJodHRwczovL2EudGVzdCIsInN1YiI6ImFsaWNlIiwiYXVkIjpbInNob3AiLCJiYW5rI",
    "l0sImV4cCI6NDEwMjQ0NDgwMCwiaWF0IjoxNzAwMDAwMDAwLCJncm91cHMiOlsic3RhZmYiLCJhZG1pbiJdLCJzY29wZSI6InJlYWQgd3JpdGUiLCJuIjo3LCJmIjoxLjU",
    "sIm9rIjp0cnVlLCJuZXN0ZWQiOnsiZGVlcCI6eyJ4IjoieSJ9fX0.fBU4AxBwPHHuma4KMPh5G1KmkAaDGzuFCSVCw5q6iBQ_8YI3vJUwU1098TUWZm7cg52LT-K6B8bai",
    "H7TQNTF9KNzvLCcXEHkafkiNtVzmwCLoMDfqMVbpnjXHssZ2vjSG4PQ1Z5TdoTd1C7wDNvHAPuap2IXTP7dSDigrehHqZL4vbl4758bXC_YcHXr3uj_cppmaxSyU7DHpC-",
    "gM7wCvPqt8NG0Txv-oheCM6sLL1exfTv5_59-Ie6cuvYX0I07qa4IGr1coW1Fe4rTflFmN8r0f1dFC7bRald_VeT39XXI2T1rx4b4uuAv15xltKgz-ro116G8ZBIGXAoeE",
    "KIG1Q",
);
/// The same, over since 2023.
const EXPIRED: &str = concat!(
    "eyJhbGciOiJSUzI1NiIsImtpZCI6InJzYSIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJodHRwczovL2EudGVzdCIsInN1YiI6ImFsaWNlIiwiYXVkIjpbInNob3AiLCJiYW5rI",
    "l0sImV4cCI6MTcwMDAwMDEwMCwiaWF0IjoxNzAwMDAwMDAwLCJncm91cHMiOlsic3RhZmYiLCJhZG1pbiJdLCJzY29wZSI6InJlYWQgd3JpdGUiLCJuIjo3LCJmIjoxLjU",
    "sIm9rIjp0cnVlLCJuZXN0ZWQiOnsiZGVlcCI6eyJ4IjoieSJ9fX0.MGME3Jj0ok9tln9Ugry9tuP-_T21joVPH-uxrXXqWeNkckjcJ41R-lzWzFEGmfkrysqljQzN70Q49",
    "4EKPyUD9C0qNrfQKuCe3_oI8s8k7vFxFHJPtaOMfPwseXCj0sIamgpV540xPAl3hgMic5Z020Cj5ZZoYr1hHGDqJXXGCduFL9LMiRCPTuUQvSwmkhvDvoWnK-K6ZZlZkPj",
    "_iVtfTr7u6WFIjOpdhXuls7bRd-BTfE5byYgso7ApJn14r-yq4ozZJl_gyR1wT14sOzVGIlNGF9LHUxW1ySLqdAsldSjVzjRIl8RfAlsflKDc2AB8O2ajy9PTg1o3YH6YC",
    "i7Sow",
);
/// Its key.
const MODULUS: &str = concat!(
    "4jdwVam-7pm8XSbAT88RVXLA6GOjmwCgagwhBvzJ2RjFQLL5zPYA8-kJ6NkOkTAOVsvAQexRIJsLNfmhCGFFqQXbfDYvuRintlzBHcslkFHBT1UZ6qbyL4_OTNXTKgX5ed",
    "hzTwxzShM0XdWvTc37LUt902SLwjBBqq0vAZASxv54S0sJlDMnPDNflooNQH1dkCKkjoAQjq75l2Rc64m7sJ6sg_l_uKwrZ2gBybf68Z7TuN8V-mJ5bOEgaRvT323MRNvh",
    "KiIvjgGrE3ZnuMZ8WwcaB54PK9jXfeqkBE2fbLAg4d30VERnBgvG6rrwIqYOmwCpVqNUkT2jzBOU-C86vw",
);

fn keys() -> String {
    format!(r#"{{"keys":[{{"kty":"RSA","kid":"rsa","n":"{MODULUS}","e":"AQAB"}}]}}"#)
}

fn config(at: SocketAddr, filters: Vec<HttpFilter>, clusters: &[(&str, SocketAddr)]) -> XdsState {
    let listener = http_listener(at, |manager| manager.http_filters = filters);
    let clusters = clusters.iter().map(|(name, at)| cluster(name, &[*at]));
    let route = route_to(prefix("/"), action("app"));
    state(vec![listener], table(vec![route]), clusters.collect())
}

fn stat(proxy: &Proxy, name: &str) -> u64 {
    let all = proxy.shared.counters.stats.values();
    let found = all.iter().find(|(known, _)| known == name);
    found.map_or(0, |(_, value)| *value)
}

/// A server that answers by a function of the request and its number.
fn serve(
    answer: impl Fn(&Request<Incoming>, usize) -> Response<Full<Bytes>> + Send + Sync + 'static,
) -> SocketAddr {
    let answer = Arc::new(answer);
    let count = Arc::new(AtomicUsize::new(0));
    servers::with_tasks(move |stream| {
        let (answer, count) = (answer.clone(), count.clone());
        async move {
            let service = hyper::service::service_fn(move |request| {
                let number = count.fetch_add(1, Ordering::SeqCst);
                let response = answer(&request, number);
                async move { Ok::<_, Infallible>(response) }
            });
            let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        }
    })
}

fn policy(permission: Rule, principal: Identifier) -> rbac::Policy {
    rbac::Policy {
        permissions: vec![rbac::Permission {
            rule: Some(permission),
        }],
        principals: vec![rbac::Principal {
            identifier: Some(principal),
        }],
        ..Default::default()
    }
}

fn rules(action: Action, policy: rbac::Policy) -> rbac::Rbac {
    rbac::Rbac {
        action: action as i32,
        policies: [("policy".to_owned(), policy)].into(),
        ..Default::default()
    }
}

fn path(begin: &str) -> Rule {
    let text = StringMatcher {
        match_pattern: Some(MatchPattern::Prefix(begin.to_owned())),
        ..Default::default()
    };
    Rule::UrlPath(PathMatcher {
        rule: Some(path_matcher::Rule::Path(text)),
    })
}

#[test]
fn rules_refuse_and_count_and_shadow_rules_only_count() {
    let (at, app) = (free_port(), App::start("a"));
    let deny = || rules(Action::Deny, policy(path("/admin"), Identifier::Any(true)));
    let filters = vec![
        filter(
            "dry",
            &Rbac {
                shadow_rules: Some(deny()),
                shadow_rules_stat_prefix: "dry_".to_owned(),
                ..Default::default()
            },
        ),
        filter(
            "rbac",
            &Rbac {
                rules: Some(deny()),
                ..Default::default()
            },
        ),
    ];
    let proxy = Proxy::start(&config(at, filters, &[("app", app.address)]));
    let mut client = Client::connect(at);
    assert_eq!(client.get("/", "").status, 200);
    let refused = client.get("/admin/x", "");
    assert_eq!(
        (refused.status, &*refused.body),
        (403, "RBAC: access denied")
    );
    assert_eq!(client.get("/", "").status, 200, "the connection goes on");
    assert_eq!(stat(&proxy, "http.test.rbac.allowed"), 2);
    assert_eq!(stat(&proxy, "http.test.rbac.denied"), 1);
    assert_eq!(stat(&proxy, "http.test.rbac.dry_.shadow_allowed"), 2);
    assert_eq!(stat(&proxy, "http.test.rbac.dry_.shadow_denied"), 1);
}

fn provider(source: jwt::jwt_provider::JwksSourceSpecifier) -> jwt::JwtAuthentication {
    let provider = jwt::JwtProvider {
        issuer: "https://a.test".to_owned(),
        jwks_source_specifier: Some(source),
        ..Default::default()
    };
    let requires = jwt::JwtRequirement {
        requires_type: Some(jwt::jwt_requirement::RequiresType::ProviderName(
            "p".to_owned(),
        )),
    };
    jwt::JwtAuthentication {
        providers: [("p".to_owned(), provider)].into(),
        rules: vec![jwt::RequirementRule {
            r#match: Some(prefix("/")),
            requirement_type: Some(jwt::requirement_rule::RequirementType::Requires(requires)),
        }],
        ..Default::default()
    }
}

fn remote(keep: i64) -> jwt::jwt_provider::JwksSourceSpecifier {
    jwt::jwt_provider::JwksSourceSpecifier::RemoteJwks(jwt::RemoteJwks {
        http_uri: Some(uri("http://keys.test/set")),
        cache_duration: Some(PbDuration {
            seconds: keep,
            nanos: 0,
        }),
        ..Default::default()
    })
}

fn uri(uri: &str) -> HttpUri {
    HttpUri {
        uri: uri.to_owned(),
        timeout: Some(PbDuration {
            seconds: 2,
            nanos: 0,
        }),
        http_upstream_type: Some(HttpUpstreamType::Cluster("service".to_owned())),
    }
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

#[test]
fn keys_are_fetched_once_and_tokens_verified_once() {
    let (at, app) = (free_port(), App::start("a"));
    let fetched = Arc::new(AtomicUsize::new(0));
    let count = fetched.clone();
    let service = serve(move |request, _| {
        assert_eq!(request.uri().path(), "/set");
        assert_eq!(request.headers()["host"], "keys.test");
        count.fetch_add(1, Ordering::SeqCst);
        Response::new(keys().into())
    });
    let filters = vec![filter("jwt", &provider(remote(600)))];
    let clusters = [("app", app.address), ("service", service)];
    let proxy = Proxy::start(&config(at, filters, &clusters));
    let mut client = Client::connect(at);
    let missing = client.get("/a?b", "");
    assert_eq!((missing.status, &*missing.body), (401, "Jwt is missing"));
    let challenge = missing.header("www-authenticate");
    assert_eq!(challenge, Some("Bearer realm=\"http://app.test/a?b\""));
    for _ in 0..3 {
        let good = client.get("/", &bearer(TOKEN));
        assert_eq!(good.status, 200);
        assert!(
            !good.body.contains("authorization:"),
            "the token stays here: {}",
            good.body
        );
    }
    let late = client.get("/", &bearer(EXPIRED));
    assert_eq!((late.status, &*late.body), (401, "Jwt is expired"));
    assert_eq!(fetched.load(Ordering::SeqCst), 1);
    assert_eq!(stat(&proxy, "http.test.jwt_authn.jwt_cache_hit"), 2);
    assert_eq!(stat(&proxy, "http.test.jwt_authn.allowed"), 3);
    assert_eq!(stat(&proxy, "http.test.jwt_authn.denied"), 2);
}

#[test]
fn without_keys_every_token_is_refused_until_a_fetch_succeeds() {
    let (at, app) = (free_port(), App::start("a"));
    let service = serve(|_, number| match number {
        0 => {
            let mut response = Response::new(keys().into());
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        }
        1 => Response::new("no keys".into()),
        _ => Response::new(keys().into()),
    });
    let filters = vec![filter("jwt", &provider(remote(600)))];
    let clusters = [("app", app.address), ("service", service)];
    let proxy = Proxy::start(&config(at, filters, &clusters));
    let mut client = Client::connect(at);
    let refused = client.get("/", &bearer(TOKEN));
    assert_eq!(
        (refused.status, &*refused.body),
        (401, "Jwks remote fetch is failed")
    );
    crate::stage::wait(|| {
        let mut client = Client::connect(at);
        client.get("/", &bearer(TOKEN)).status == 200
    });
    assert_eq!(stat(&proxy, "jwt_authn.jwks_fetch_failed"), 2);
    assert_eq!(stat(&proxy, "jwt_authn.jwks_fetch_success"), 1);
}

#[test]
fn the_last_good_keys_outlive_a_failing_source_for_a_while() {
    let (at, app) = (free_port(), App::start("a"));
    let service = serve(|_, number| {
        let mut response = Response::new(keys().into());
        if number > 0 {
            *response.status_mut() = StatusCode::BAD_GATEWAY;
        }
        response
    });
    let filters = vec![filter("jwt", &provider(remote(1)))];
    let clusters = [("app", app.address), ("service", service)];
    let proxy = Proxy::start(&config(at, filters, &clusters));
    let get = || Client::connect(at).get("/", &bearer(TOKEN));
    assert_eq!(get().status, 200);
    crate::stage::wait(|| {
        std::thread::sleep(Duration::from_millis(50));
        let _ = get();
        stat(&proxy, "jwt_authn.jwks_fetch_failed") > 0
    });
    crate::stage::wait(|| get().body == "Jwks remote fetch is failed");
}

#[test]
fn a_service_is_asked_and_its_word_carried_out() {
    let (at, app) = (free_port(), App::start("a"));
    let service = serve(|request, _| {
        assert!(
            request.headers().get("x-secret").is_none(),
            "not allowed out"
        );
        assert!(request.uri().path().starts_with("/check/"));
        let ok = request.headers().get("x-let").is_some();
        let mut response = Response::new("no entry".into());
        if !ok {
            *response.status_mut() = StatusCode::FORBIDDEN;
        }
        let headers = response.headers_mut();
        headers.insert("x-user", "bob".parse().expect("a value"));
        response
    });
    let list = |name: &str| {
        let exact = StringMatcher {
            match_pattern: Some(MatchPattern::Exact(name.to_owned())),
            ..Default::default()
        };
        let patterns = vec![exact];
        Some(envoy_types::pb::envoy::r#type::matcher::v3::ListStringMatcher { patterns })
    };
    let http = authz::HttpService {
        server_uri: Some(uri("http://authz.test")),
        path_prefix: "/check".to_owned(),
        authorization_response: Some(authz::AuthorizationResponse {
            allowed_upstream_headers: list("x-user"),
            ..Default::default()
        }),
        ..Default::default()
    };
    let filters = vec![filter(
        "authz",
        &authz::ExtAuthz {
            services: Some(authz::ext_authz::Services::HttpService(http)),
            allowed_headers: list("x-let"),
            with_request_body: Some(authz::BufferSettings {
                max_request_bytes: 8,
                ..Default::default()
            }),
            ..Default::default()
        },
    )];
    let clusters = [("app", app.address), ("service", service)];
    let proxy = Proxy::start(&config(at, filters, &clusters));
    let mut client = Client::connect(at);
    let good = client.get("/a", "X-Let: 1\r\nX-User: eve\r\nX-Secret: 1\r\n");
    assert_eq!(good.status, 200);
    assert!(good.body.contains("x-user: bob"), "{}", good.body);
    assert!(!good.body.contains("eve"), "{}", good.body);
    let refused = client.get("/a", "");
    assert_eq!((refused.status, &*refused.body), (403, "no entry"));
    let post = |client: &mut Client, body: &str| {
        let length = body.len();
        client.send(&format!(
            "POST /b HTTP/1.1\r\nHost: app.test\r\nX-Let: 1\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
        client.reply().expect("a reply")
    };
    let whole = post(&mut client, "12345678");
    assert_eq!(whole.status, 200);
    assert!(
        whole.body.contains("body: 12345678"),
        "the endpoint gets it, too: {}",
        whole.body
    );
    assert_eq!(post(&mut client, "123456789").status, 413);
    assert_eq!(stat(&proxy, "http.test.ext_authz.ok"), 2);
    assert_eq!(stat(&proxy, "http.test.ext_authz.denied"), 1);
    let flags = proxy.metric("istio_requests_total", &["response_flags=\"UAEX\""]);
    assert!((flags - 1.0).abs() < f64::EPSILON);
}

/// Asks an authorizer over HTTP.
fn asking(fails_open: bool) -> authz::ExtAuthz {
    let http = authz::HttpService {
        server_uri: Some(uri("http://authz.test")),
        ..Default::default()
    };
    authz::ExtAuthz {
        services: Some(authz::ext_authz::Services::HttpService(http)),
        failure_mode_allow: fails_open,
        ..Default::default()
    }
}

#[test]
fn a_missing_service_means_no_unless_it_is_to_mean_yes() {
    for (open, status) in [(false, 403), (true, 200)] {
        let (at, app) = (free_port(), App::start("a"));
        let filters = vec![filter("authz", &asking(open))];
        let clusters = [("app", app.address), ("service", free_port())];
        let proxy = Proxy::start(&config(at, filters, &clusters));
        assert_eq!(Client::connect(at).get("/", "").status, status);
        assert_eq!(stat(&proxy, "http.test.ext_authz.error"), 1);
    }
}

/// The client chooses the host, and HTTP/2 can't carry every one: that is no outage of the service.
#[test]
fn a_host_that_cannot_be_asked_about_is_refused_also_where_the_filter_fails_open() {
    let (at, app) = (free_port(), App::start("a"));
    let filters = vec![filter("authz", &asking(true))];
    let mut state = config(at, filters, &[("app", app.address)]);
    let mut service = cluster("service", &[free_port()]);
    service.http2_protocol_options = Some(Http2ProtocolOptions::default());
    state.clusters.insert("service".to_owned(), service.into());
    let _proxy = Proxy::start(&state);
    for (host, status) in [("a.test", 200), ("a%b", 400), ("a:b:c", 400)] {
        let mut client = Client::connect(at);
        client.send(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(client.reply().expect("a reply").status, status, "{host}");
    }
}

/// The only route needs a header that the token's claims make, so there is none yet when the service's turn comes.
#[test]
fn a_service_is_asked_also_where_a_token_leads_to_the_route() {
    for status in [StatusCode::FORBIDDEN, StatusCode::OK] {
        let (at, app) = (free_port(), App::start("a"));
        let service = serve(move |_, _| {
            let mut response = Response::new("word".into());
            *response.status_mut() = status;
            response
        });
        let inline = Specifier::InlineString(keys());
        let source = DataSource {
            specifier: Some(inline),
            ..Default::default()
        };
        let mut tokens = provider(jwt::jwt_provider::JwksSourceSpecifier::LocalJwks(source));
        for provider in tokens.providers.values_mut() {
            provider.clear_route_cache = true;
            provider.claim_to_headers = vec![jwt::JwtClaimToHeader {
                header_name: "x-sub".to_owned(),
                claim_name: "sub".to_owned(),
                ..Default::default()
            }];
        }
        let filters = vec![filter("authz", &asking(false)), filter("jwt", &tokens)];
        let clusters = [("app", app.address), ("service", service)];
        let mut state = config(at, filters, &clusters);
        let mut claimed = prefix("/");
        claimed.headers = vec![route::HeaderMatcher {
            name: "x-sub".to_owned(),
            header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
            ..Default::default()
        }];
        let routes = table(vec![route_to(claimed, action("app"))]);
        state.routes.insert("routes".to_owned(), routes.into());
        let _proxy = Proxy::start(&state);
        let reply = Client::connect(at).get("/", &bearer(TOKEN));
        assert_eq!(reply.status, status.as_u16(), "{}", reply.body);
    }
}

#[test]
fn a_refused_connection_reaches_nobody() {
    let (at, app) = (free_port(), App::start("a"));
    let local = Identifier::DirectRemoteIp(CidrRange {
        address_prefix: "127.0.0.0".to_owned(),
        prefix_len: Some(UInt32Value { value: 8 }),
    });
    let rbac = NetworkRbac {
        rules: Some(rules(Action::Deny, policy(Rule::Any(true), local))),
        stat_prefix: "tcp.".to_owned(),
        ..Default::default()
    };
    let mut listener = tcp_listener(at, "app");
    listener.filter_chains[0].filters.insert(
        0,
        Filter {
            name: "rbac".to_owned(),
            config_type: Some(NetworkType::TypedConfig(any(&rbac))),
        },
    );
    let clusters = vec![cluster("app", &[app.address])];
    let proxy = Proxy::start(&state(vec![listener], table(Vec::new()), clusters));
    let mut client = Client::connect(at);
    client.0.write_all(b"hello").expect("written");
    assert!(client.is_closed());
    assert_eq!(app.connections.load(Ordering::SeqCst), 0);
    crate::stage::wait(|| stat(&proxy, "tcp.rbac.denied") >= 1);
}
