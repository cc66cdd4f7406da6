//! Virtual hosts, conditions and actions.

use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{
    HeaderValue as PbValue, HeaderValueOption, RuntimeFractionalPercent,
};
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier as Spec;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher};
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, Int64Range};
use envoy_types::pb::google::protobuf::{BoolValue, UInt32Value};
use http::HeaderMap;
use mesh_routing::action::{Action, ClusterTarget};
use mesh_routing::route::{Decision, RequestView, RouteTable};
use proptest::prelude::*;

fn regex(text: &str) -> RegexMatcher {
    RegexMatcher {
        regex: text.to_owned(),
        ..Default::default()
    }
}

fn path(specifier: PathSpecifier) -> pb::RouteMatch {
    pb::RouteMatch {
        path_specifier: Some(specifier),
        ..Default::default()
    }
}

fn any() -> pb::RouteMatch {
    path(PathSpecifier::Prefix("/".to_owned()))
}

fn to(name: &str, conditions: pb::RouteMatch) -> pb::Route {
    let action = pb::RouteAction {
        cluster_specifier: Some(pb::route_action::ClusterSpecifier::Cluster(name.to_owned())),
        ..Default::default()
    };
    pb::Route {
        name: name.to_owned(),
        r#match: Some(conditions),
        action: Some(pb::route::Action::Route(action)),
        ..Default::default()
    }
}

fn host(name: &str, domains: &[&str], routes: Vec<pb::Route>) -> pb::VirtualHost {
    let domains = domains.iter().map(|d| (*d).to_owned()).collect();
    pb::VirtualHost {
        name: name.to_owned(),
        domains,
        routes,
        ..Default::default()
    }
}

fn table(hosts: Vec<pb::VirtualHost>) -> RouteTable {
    let message = pb::RouteConfiguration {
        name: "t".to_owned(),
        virtual_hosts: hosts,
        ignore_port_in_host_matching: true,
        ..Default::default()
    };
    RouteTable::compile(&message).expect("a table")
}

/// One table with one host; the answer is the name of the matched route.
fn decide(table: &RouteTable, request: &RequestView<'_>) -> String {
    match table.decide(request) {
        Decision::Matched(matched) => matched.route.name.to_string(),
        Decision::TlsRequired => "tls".to_owned(),
        Decision::NoRoute => "none".to_owned(),
    }
}

fn request<'a>(host: &'a str, path_and_query: &'a str, headers: &'a HeaderMap) -> RequestView<'a> {
    RequestView {
        host,
        method: "GET",
        path_and_query,
        scheme: "http",
        headers,
        random: 0,
    }
}

#[test]
fn domains_match_exact_then_suffix_then_prefix_then_all() {
    let h = |name: &str, domains: &[&str]| host(name, domains, vec![to(name, any())]);
    let table = table(vec![
        h("exact", &["foo.example.com", "UPPER.example.com"]),
        h("short-suffix", &["*.com"]),
        h("long-suffix", &["*.example.com"]),
        h("prefix", &["foo.*"]),
        h("long-prefix", &["foo.bar.*"]),
        h("all", &["*"]),
    ]);
    let none = HeaderMap::new();
    for (host, expected) in [
        ("foo.example.com", "exact"),
        ("FOO.Example.COM:8080", "exact"),
        ("upper.example.com", "exact"),
        ("bar.example.com", "long-suffix"),
        ("example.com", "short-suffix"),
        (".example.com", "short-suffix"),
        ("foo.org", "prefix"),
        ("foo.bar.org", "long-prefix"),
        ("foo.bar.", "prefix"),
        ("elsewhere", "all"),
        ("10.0.0.1:9080", "all"),
        ("[::1]:80", "all"),
        ("", "all"),
    ] {
        assert_eq!(
            decide(&table, &request(host, "/", &none)),
            expected,
            "{host}"
        );
    }
    let long = "x".repeat(300) + ".example.com";
    assert_eq!(
        decide(&table, &request(&long, "/", &none)),
        "all",
        "no DNS name is that long"
    );
}

#[test]
fn ports_count_where_the_table_says_so() {
    let hosts = vec![
        host("with", &["a:80"], vec![to("with", any())]),
        host("without", &["a"], vec![to("without", any())]),
    ];
    let message = pb::RouteConfiguration {
        virtual_hosts: hosts,
        ..Default::default()
    };
    let table = RouteTable::compile(&message).expect("a table");
    let none = HeaderMap::new();
    assert_eq!(decide(&table, &request("a:80", "/", &none)), "with");
    assert_eq!(decide(&table, &request("a", "/", &none)), "without");
    assert_eq!(decide(&table, &request("a:81", "/", &none)), "none");
}

#[test]
fn a_domain_of_two_hosts_is_refused() {
    let hosts = vec![
        host("a", &["x.test"], vec![]),
        host("b", &["X.test"], vec![]),
    ];
    let error = RouteTable::compile(&pb::RouteConfiguration {
        virtual_hosts: hosts,
        ..Default::default()
    });
    let error = error.expect_err("a clash").to_string();
    assert!(
        error.contains("virtual_hosts[1] \"b\".domains") && error.contains("x.test"),
        "{error}"
    );
}

#[test]
fn paths() {
    let cases: &[(PathSpecifier, bool, &[&str], &[&str])] = &[
        (
            PathSpecifier::Prefix("/foo".into()),
            true,
            &["/foo", "/foobar", "/foo/bar?x", "/foo?x"],
            &["/fo", "/FOO", "/x/foo"],
        ),
        (
            PathSpecifier::Prefix("/foo".into()),
            false,
            &["/FOO", "/Foobar"],
            &["/fo"],
        ),
        (
            PathSpecifier::Path("/foo".into()),
            true,
            &["/foo", "/foo?x=1"],
            &["/foo/", "/foobar", "/Foo"],
        ),
        (
            PathSpecifier::Path("/foo".into()),
            false,
            &["/FOO?x"],
            &["/FOO/"],
        ),
        (
            PathSpecifier::PathSeparatedPrefix("/foo".into()),
            true,
            &["/foo", "/foo/", "/foo/bar", "/foo?x"],
            &["/foobar", "/fo"],
        ),
        (
            PathSpecifier::SafeRegex(regex("/foo/\\d+")),
            true,
            &["/foo/1", "/foo/12?x=y"],
            &["/foo/", "/foo/1/", "/a/foo/1"],
        ),
        (
            PathSpecifier::SafeRegex(regex("/a|/b")),
            true,
            &["/a", "/b"],
            &["/ab", "/a/b", "/c/b"],
        ),
    ];
    let none = HeaderMap::new();
    for (specifier, case_sensitive, yes, no) in cases {
        let conditions = pb::RouteMatch {
            case_sensitive: Some(BoolValue {
                value: *case_sensitive,
            }),
            ..path(specifier.clone())
        };
        let table = table(vec![host("h", &["*"], vec![to("hit", conditions)])]);
        for (paths, expected) in [(yes, "hit"), (no, "none")] {
            for path in *paths {
                assert_eq!(
                    decide(&table, &request("h", path, &none)),
                    expected,
                    "{specifier:?} {path}"
                );
            }
        }
    }
}

#[test]
fn headers() {
    let text = |pattern, ignore_case| {
        Spec::StringMatch(StringMatcher {
            ignore_case,
            match_pattern: Some(pattern),
        })
    };
    let m = |name: &str, spec: Option<Spec>| pb::HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: spec,
        ..Default::default()
    };
    let inverted = |m: pb::HeaderMatcher| pb::HeaderMatcher {
        invert_match: true,
        ..m
    };
    let or_empty = |m: pb::HeaderMatcher| pb::HeaderMatcher {
        treat_missing_header_as_empty: true,
        ..m
    };
    // The request carries `user: jason`, `n: 5`, `many: a`, `many: b`, method GET, authority h.test.
    let cases = vec![
        (m("user", None), true),
        (m("other", None), false),
        (m("other", Some(Spec::PresentMatch(false))), true),
        (inverted(m("other", Some(Spec::PresentMatch(true)))), true),
        (inverted(m("user", Some(Spec::PresentMatch(true)))), false),
        (
            m(
                "user",
                Some(text(MatchPattern::Exact("jason".into()), false)),
            ),
            true,
        ),
        (
            m(
                "user",
                Some(text(MatchPattern::Exact("JASON".into()), false)),
            ),
            false,
        ),
        (
            m(
                "user",
                Some(text(MatchPattern::Exact("JASON".into()), true)),
            ),
            true,
        ),
        (
            m("user", Some(text(MatchPattern::Prefix("ja".into()), false))),
            true,
        ),
        (
            m("user", Some(text(MatchPattern::Suffix("SON".into()), true))),
            true,
        ),
        (
            m(
                "user",
                Some(text(MatchPattern::Contains("AsO".into()), true)),
            ),
            true,
        ),
        (
            m(
                "user",
                Some(text(MatchPattern::Contains("AsO".into()), false)),
            ),
            false,
        ),
        (
            m(
                "user",
                Some(text(MatchPattern::SafeRegex(regex("j.*n")), false)),
            ),
            true,
        ),
        (
            m(
                "user",
                Some(text(MatchPattern::SafeRegex(regex("j")), false)),
            ),
            false,
        ),
        (
            inverted(m("user", Some(Spec::ExactMatch("jason".into())))),
            false,
        ),
        (
            inverted(m("user", Some(Spec::ExactMatch("other".into())))),
            true,
        ),
        (
            inverted(m("other", Some(Spec::ExactMatch("x".into())))),
            false,
        ),
        (
            or_empty(inverted(m("other", Some(Spec::ExactMatch("x".into()))))),
            true,
        ),
        (
            or_empty(m("other", Some(Spec::ExactMatch(String::new())))),
            true,
        ),
        (
            m("n", Some(Spec::RangeMatch(Int64Range { start: 0, end: 6 }))),
            true,
        ),
        (
            m("n", Some(Spec::RangeMatch(Int64Range { start: 0, end: 5 }))),
            false,
        ),
        (
            m(
                "user",
                Some(Spec::RangeMatch(Int64Range { start: 0, end: 9 })),
            ),
            false,
        ),
        (m("many", Some(Spec::ExactMatch("a".into()))), true),
        (m("many", Some(Spec::ExactMatch("b".into()))), true),
        (m("many", Some(Spec::ExactMatch("a,b".into()))), false),
        (m(":method", Some(Spec::ExactMatch("GET".into()))), true),
        (m(":authority", Some(Spec::PrefixMatch("h.".into()))), true),
        (m("Host", Some(Spec::SuffixMatch(".test".into()))), true),
        (m(":path", Some(Spec::ContainsMatch("?q".into()))), true),
        (m(":scheme", Some(Spec::ExactMatch("http".into()))), true),
    ];
    let mut headers = HeaderMap::new();
    for (name, value) in [("user", "jason"), ("n", "5"), ("many", "a"), ("many", "b")] {
        headers.append(name, value.parse().expect("a value"));
    }
    for (matcher, expected) in cases {
        let conditions = pb::RouteMatch {
            headers: vec![matcher.clone()],
            ..any()
        };
        let table = table(vec![host("h", &["*"], vec![to("hit", conditions)])]);
        let got = decide(&table, &request("h.test", "/x?q", &headers));
        assert_eq!(got == "hit", expected, "{matcher:?}");
    }
}

#[test]
fn query_parameters_and_fractions() {
    use pb::query_parameter_matcher::QueryParameterMatchSpecifier as Query;
    let exact = StringMatcher {
        match_pattern: Some(MatchPattern::Exact("1".into())),
        ..Default::default()
    };
    let parameter = |name: &str, spec| pb::QueryParameterMatcher {
        name: name.to_owned(),
        query_parameter_match_specifier: Some(spec),
    };
    let conditions = pb::RouteMatch {
        query_parameters: vec![
            parameter("a", Query::StringMatch(exact)),
            parameter("b", Query::PresentMatch(true)),
        ],
        ..any()
    };
    let none = HeaderMap::new();
    let t = table(vec![host("h", &["*"], vec![to("hit", conditions)])]);
    for (path, expected) in [
        ("/?a=1&b", "hit"),
        ("/?b=2&a=1", "hit"),
        ("/?a=2&b", "none"),
        ("/?a=1", "none"),
        ("/?a=2&a=1&b", "none"),
    ] {
        assert_eq!(decide(&t, &request("h", path, &none)), expected, "{path}");
    }
    let fraction = FractionalPercent {
        numerator: 30,
        ..Default::default()
    };
    let share = RuntimeFractionalPercent {
        default_value: Some(fraction),
        ..Default::default()
    };
    let t = table(vec![host(
        "h",
        &["*"],
        vec![to(
            "hit",
            pb::RouteMatch {
                runtime_fraction: Some(share),
                ..any()
            },
        )],
    )]);
    let hits = (0..1_000_000).step_by(1000).filter(|random| {
        decide(
            &t,
            &RequestView {
                random: *random,
                ..request("h", "/", &none)
            },
        ) == "hit"
    });
    assert_eq!(hits.count(), 300);
}

#[test]
fn weights_cover_exactly_their_share() {
    let entry = |name: &str, weight| pb::weighted_cluster::ClusterWeight {
        name: name.to_owned(),
        weight: Some(UInt32Value { value: weight }),
        ..Default::default()
    };
    let clusters = vec![entry("a", 80), entry("zero", 0), entry("b", 20)];
    let weighted = pb::WeightedCluster {
        clusters,
        ..Default::default()
    };
    let action = pb::RouteAction {
        cluster_specifier: Some(pb::route_action::ClusterSpecifier::WeightedClusters(
            weighted,
        )),
        ..Default::default()
    };
    let route = pb::Route {
        action: Some(pb::route::Action::Route(action)),
        ..to("split", any())
    };
    let table = table(vec![host("h", &["*"], vec![route])]);
    let none = HeaderMap::new();
    let mut counts = std::collections::BTreeMap::new();
    for random in 0..100 {
        let request = RequestView {
            random,
            ..request("h", "/", &none)
        };
        let Decision::Matched(matched) = table.decide(&request) else {
            panic!("no route")
        };
        let Action::Forward(forward) = &matched.route.action else {
            panic!("no forward")
        };
        let ClusterTarget::Entry(entry) = forward.target(&request) else {
            panic!("no cluster")
        };
        *counts.entry(entry.name.to_string()).or_insert(0) += 1;
    }
    assert_eq!(counts, [("a".to_owned(), 80), ("b".to_owned(), 20)].into());
}

#[test]
fn the_most_specific_mutations_come_first() {
    let set = |name: &str, value: &str| HeaderValueOption {
        header: Some(PbValue {
            key: name.to_owned(),
            value: value.to_owned(),
            ..Default::default()
        }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
        ..Default::default()
    };
    let route = pb::Route {
        request_headers_to_add: vec![set("x", "route"), set("percent", "100%%")],
        ..to("r", any())
    };
    let mut vhost = host("h", &["*"], vec![route]);
    vhost.request_headers_to_add = vec![set("x", "host")];
    vhost.request_headers_to_remove = vec!["gone".to_owned()];
    let table = table(vec![vhost]);
    let mut headers = HeaderMap::new();
    headers.insert("gone", "1".parse().expect("a value"));
    let Decision::Matched(matched) = table.decide(&request("h", "/", &headers)) else {
        panic!("no route")
    };
    matched
        .route
        .request_ops
        .apply_to_request(&mut headers, &mesh_routing::format::Facts::default());
    assert_eq!(headers["x"], "host", "outer levels come later and win");
    assert_eq!(headers["percent"], "100%");
    assert!(!headers.contains_key("gone"));
}

#[test]
fn mutations_of_one_level_look_at_the_headers_as_they_came() {
    let op = |name: &str, value: &str, how: HeaderAppendAction| HeaderValueOption {
        header: Some(PbValue {
            key: name.to_owned(),
            value: value.to_owned(),
            ..Default::default()
        }),
        append_action: how as i32,
        ..Default::default()
    };
    use HeaderAppendAction::{
        AddIfAbsent, AppendIfExistsOrAdd, OverwriteIfExists, OverwriteIfExistsOrAdd,
    };
    let route = pb::Route {
        request_headers_to_add: vec![
            op("x-b", "new", OverwriteIfExistsOrAdd),
            op("x-copy", "%REQ(x-b)%", AppendIfExistsOrAdd),
            op("x-c", "made", OverwriteIfExistsOrAdd),
            op("x-c", "again", OverwriteIfExists),
            op("x-d", "first", AddIfAbsent),
            op("x-d", "second", AddIfAbsent),
            op("x-gone", "%REQ(x-removed)%", AppendIfExistsOrAdd),
        ],
        request_headers_to_remove: vec!["x-removed".to_owned()],
        ..to("r", any())
    };
    let mut vhost = host("h", &["*"], vec![route]);
    vhost.request_headers_to_add = vec![op("x-outer", "%REQ(x-b)%", AppendIfExistsOrAdd)];
    let table = table(vec![vhost]);
    let mut headers = HeaderMap::new();
    for name in ["x-b", "x-removed"] {
        headers.insert(name, "old".parse().expect("a value"));
    }
    let Decision::Matched(matched) = table.decide(&request("h", "/", &headers)) else {
        panic!("no route")
    };
    matched
        .route
        .request_ops
        .apply_to_request(&mut headers, &mesh_routing::format::Facts::default());
    assert_eq!(headers["x-b"], "new");
    assert_eq!(headers["x-copy"], "old", "the value before the level's own");
    assert_eq!(
        headers["x-c"], "made",
        "it was not there when the level began"
    );
    let both: Vec<_> = headers.get_all("x-d").iter().collect();
    assert_eq!(both, ["first", "second"]);
    assert!(
        !headers.contains_key("x-gone"),
        "removals of the level come before its values"
    );
    assert_eq!(headers["x-outer"], "new", "the next level sees them");
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut pb::Route)| {
        let mut route = to("r", any());
        change(&mut route);
        let message = pb::RouteConfiguration {
            virtual_hosts: vec![host("h", &["*"], vec![route])],
            ..Default::default()
        };
        RouteTable::compile(&message)
            .expect_err("refused")
            .to_string()
    };
    let error =
        refused(&|r| r.typed_per_filter_config = [("x".to_owned(), Default::default())].into());
    assert!(
        error.starts_with("virtual_hosts[0] \"h\".routes[0] \"r\".typed_per_filter_config[\"x\"]"),
        "{error}"
    );
    let error = refused(&|r| {
        if let Some(pb::route::Action::Route(action)) = &mut r.action {
            action.request_mirror_policies.push(Default::default());
        }
    });
    assert!(error.contains("route.request_mirror_policies"), "{error}");
    // Nothing here has breakers of its own for it.
    let error = refused(&|r| {
        if let Some(pb::route::Action::Route(action)) = &mut r.action {
            action.priority = 1;
        }
    });
    assert!(error.contains("route.priority"), "{error}");
    let error = refused(&|r| r.r#match = Some(path(PathSpecifier::SafeRegex(regex("(")))));
    assert!(error.contains("match.safe_regex.regex"), "{error}");
    let error = refused(&|r| {
        let value = PbValue {
            key: "x".to_owned(),
            value: "%NO_SUCH_OPERATOR%".to_owned(),
            ..Default::default()
        };
        r.request_headers_to_add.push(HeaderValueOption {
            header: Some(value),
            ..Default::default()
        });
    });
    assert!(error.contains("headers_to_add[0].value"), "{error}");
}

proptest! {
    /// Whatever a client sends, there is an answer and no panic; and a catch-all always catches.
    #[test]
    fn any_request_is_decided(host in "\\PC*", path in "/\\PC*", random: u64) {
        let hosts = vec![
            self::host("a", &["*.example.com", "a.*"], vec![to("a", path_regex())]),
            self::host("b", &["*"], vec![to("b", any())]),
        ];
        let table = table(hosts);
        let none = HeaderMap::new();
        let request = RequestView { random, ..request(&host, &path, &none) };
        prop_assert!(["a", "b", "none"].contains(&decide(&table, &request).as_str()));
    }

    /// The hash lookup agrees with going through all domains one by one.
    #[test]
    fn lookup_agrees_with_the_definition(domains in proptest::collection::btree_set("(\\*\\.)?[a-c]{1,3}(\\.[a-c]{1,2}){0,2}", 1..12), host in "[a-c]{1,3}(\\.[a-c]{1,2}){0,3}") {
        let hosts = domains.iter().map(|d| self::host(d, &[d], vec![to(d, any())])).collect();
        let table = table(hosts);
        let suffix = |d: &&String| d.strip_prefix('*').is_some_and(|s| host.len() > s.len() && host.ends_with(s));
        let expected = domains.iter().find(|d| **d == host)
            .or_else(|| domains.iter().filter(suffix).max_by_key(|d| d.len()));
        let found = table.virtual_host(&host).map(|h| h.name.to_string());
        prop_assert_eq!(found, expected.cloned());
    }
}

fn path_regex() -> pb::RouteMatch {
    path(PathSpecifier::SafeRegex(regex("/[a-z]*")))
}

/// Routes with whole paths are found by an index once there are many; order decides all the same.
#[test]
fn many_whole_paths_keep_their_order() {
    let whole = |name: &str, p: &str| to(name, path(PathSpecifier::Path(p.to_owned())));
    let mut routes: Vec<_> = (0..20)
        .map(|i| whole(&format!("first-{i}"), &format!("/p/{i}")))
        .collect();
    routes.insert(
        5,
        to("early", path(PathSpecifier::Prefix("/p/7".to_owned()))),
    );
    routes.push(whole("second-3", "/p/3"));
    let mut folded = whole("folded", "/P/CASE");
    if let Some(m) = &mut folded.r#match {
        m.case_sensitive = Some(BoolValue { value: false });
    }
    routes.push(folded);
    routes.push(to("rest", any()));
    let table = table(vec![host("all", &["*"], routes)]);
    let headers = HeaderMap::new();
    for (asked, expected) in [
        ("/p/3", "first-3"),
        ("/p/4?x=1", "first-4"),
        ("/p/7", "early"),
        ("/p/19", "first-19"),
        ("/p/20", "rest"),
        ("/p/case", "folded"),
        ("/p/3/", "rest"),
    ] {
        assert_eq!(
            decide(&table, &request("a", asked, &headers)),
            expected,
            "{asked}"
        );
    }
}
