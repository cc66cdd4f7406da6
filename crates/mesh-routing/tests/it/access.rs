//! Access control: conditions on who connects, and what trees of conditions come to.

use std::collections::HashMap;
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::config::rbac::v3::permission::Rule;
use envoy_types::pb::envoy::config::rbac::v3::principal::{Authenticated, Identifier};
use envoy_types::pb::envoy::config::rbac::v3::rbac::Action;
use envoy_types::pb::envoy::config::route::v3::HeaderMatcher;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::UInt32Value;
use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_routing::filter::rbac::{Engine, Facts};
use mesh_routing::peer::PeerTls;
use mesh_routing::route::RequestView;
use proptest::prelude::{Just, Strategy, prop_assert_eq, prop_oneof, proptest};

fn text(pattern: MatchPattern) -> matcher::StringMatcher {
    matcher::StringMatcher {
        match_pattern: Some(pattern),
        ..Default::default()
    }
}

fn exact(word: &str) -> matcher::StringMatcher {
    text(MatchPattern::Exact(word.to_owned()))
}

fn prefix(word: &str) -> matcher::StringMatcher {
    text(MatchPattern::Prefix(word.to_owned()))
}

fn permission(rule: Rule) -> pb::Permission {
    pb::Permission { rule: Some(rule) }
}

fn principal(identifier: Identifier) -> pb::Principal {
    pb::Principal {
        identifier: Some(identifier),
    }
}

fn authenticated(name: Option<matcher::StringMatcher>) -> pb::Principal {
    principal(Identifier::Authenticated(Authenticated {
        principal_name: name,
    }))
}

fn range(address: &str, len: u32) -> CidrRange {
    CidrRange {
        address_prefix: address.to_owned(),
        prefix_len: Some(UInt32Value { value: len }),
    }
}

fn policies(action: Action, list: Vec<(&str, pb::Permission, pb::Principal)>) -> pb::Rbac {
    let policy = |(name, permission, principal): (&str, _, _)| {
        let policy = pb::Policy {
            permissions: vec![permission],
            principals: vec![principal],
            ..Default::default()
        };
        (name.to_owned(), policy)
    };
    pb::Rbac {
        action: action as i32,
        policies: list.into_iter().map(policy).collect(),
        ..Default::default()
    }
}

fn any() -> pb::Permission {
    permission(Rule::Any(true))
}

fn facts<'a>(request: Option<&'a RequestView<'a>>, tls: Option<&'a PeerTls>) -> Facts<'a> {
    Facts {
        request,
        direct: IpAddr::from([10, 0, 0, 7]),
        remote: IpAddr::from([192, 0, 2, 1]),
        destination: "10.0.0.9:8080".parse().expect("an address"),
        server_name: "outbound_.80_._.reviews.default.svc.cluster.local",
        tls,
        metadata: None,
    }
}

fn peer(uris: &[&str], dns: &[&str], subject: &str) -> PeerTls {
    PeerTls {
        uri_sans: uris.iter().map(|s| (*s).into()).collect(),
        dns_sans: dns.iter().map(|s| (*s).into()).collect(),
        subject: subject.into(),
        chain: vec![vec![1].into()],
        ..PeerTls::default()
    }
}

fn lets(principal: pb::Principal, tls: Option<&PeerTls>) -> bool {
    let rbac = policies(Action::Allow, vec![("p", any(), principal)]);
    let engine = Engine::compile(&rbac).expect("an engine");
    engine.judge(&facts(None, tls)).allowed
}

#[test]
fn a_principal_is_who_proved_it() {
    let id = "spiffe://cluster.local/ns/default/sa/bookinfo-productpage";
    let mutual = peer(&[id], &["page.test"], "O=Shop");
    let anonymous = PeerTls::default();
    let named = |name| authenticated(Some(name));
    assert!(lets(named(exact(id)), Some(&mutual)));
    assert!(
        lets(named(exact("page.test")), Some(&mutual)),
        "then DNS names"
    );
    assert!(
        lets(named(exact("O=Shop")), Some(&mutual)),
        "then the subject"
    );
    assert!(!lets(
        named(exact(
            "spiffe://cluster.local/ns/default/sa/bookinfo-productpag"
        )),
        Some(&mutual)
    ));
    assert!(lets(
        named(prefix("spiffe://cluster.local/ns/default/")),
        Some(&mutual)
    ));
    let two = peer(&["spiffe://x/1", id], &[], "");
    assert!(
        lets(named(exact(id)), Some(&two)),
        "each of several names counts"
    );
    for nobody in [None, Some(&anonymous)] {
        assert!(
            !lets(named(prefix("")), nobody),
            "who presented nothing has no name"
        );
        assert!(!lets(authenticated(None), nobody));
        assert!(lets(
            principal(Identifier::NotId(Box::new(named(exact(id))))),
            nobody
        ));
    }
    assert!(lets(authenticated(None), Some(&mutual)));
    let state = matcher::FilterStateMatcher {
        key: "io.istio.peer_principal".to_owned(),
        matcher: Some(matcher::filter_state_matcher::Matcher::StringMatch(exact(
            id,
        ))),
    };
    assert!(lets(
        principal(Identifier::FilterState(state)),
        Some(&mutual)
    ));
}

#[test]
fn characters_of_expressions_are_themselves_in_exact_names() {
    let peer = peer(&["spiffe://td/ns/a/sa/fooXbar"], &[], "");
    let name = exact("spiffe://td/ns/a/sa/foo.bar");
    assert!(!lets(authenticated(Some(name)), Some(&peer)));
}

#[test]
fn addresses_are_those_of_the_connection_or_what_proxies_tell() {
    let ip = |identifier: fn(CidrRange) -> Identifier, address, len| {
        lets(principal(identifier(range(address, len))), None)
    };
    assert!(ip(Identifier::DirectRemoteIp, "10.0.0.0", 8));
    assert!(!ip(Identifier::DirectRemoteIp, "192.0.2.0", 24));
    assert!(ip(Identifier::SourceIp, "10.0.0.7", 32));
    assert!(ip(Identifier::RemoteIp, "192.0.2.0", 24));
    assert!(!ip(Identifier::RemoteIp, "10.0.0.0", 8));
    assert!(!ip(Identifier::RemoteIp, "::", 0), "another family");
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let compile = |rbac: &pb::Rbac| Engine::compile(rbac).unwrap_err().to_string();
    let custom = principal(Identifier::Custom(Default::default()));
    let error = compile(&policies(Action::Allow, vec![("mine", any(), custom)]));
    assert!(
        error.contains("policies[\"mine\"].principals[0].custom"),
        "{error}"
    );
    let other = permission(Rule::Matcher(Default::default()));
    let nobody = principal(Identifier::Any(true));
    let error = compile(&policies(
        Action::Deny,
        vec![("mine", other, nobody.clone())],
    ));
    assert!(error.contains("permissions[0].matcher"), "{error}");
    let mut rbac = policies(Action::Allow, vec![("mine", any(), nobody.clone())]);
    rbac.policies.get_mut("mine").unwrap().condition = Some(Default::default());
    assert!(compile(&rbac).contains("condition"));
    let mut deep = nobody;
    for _ in 0..200 {
        deep = principal(Identifier::NotId(Box::new(deep)));
    }
    let error = compile(&policies(Action::Allow, vec![("mine", any(), deep)]));
    assert!(error.contains("nested too deeply"), "{error}");
}

#[test]
fn the_first_policy_by_name_is_the_one_that_is_named() {
    let all = || principal(Identifier::Any(true));
    let rbac = policies(
        Action::Deny,
        vec![
            ("b", any(), all()),
            ("a", permission(Rule::DestinationPort(1)), all()),
            ("c", any(), all()),
        ],
    );
    let engine = Engine::compile(&rbac).expect("an engine");
    let verdict = engine.judge(&facts(None, None));
    assert!(!verdict.allowed);
    assert_eq!(verdict.policy.map(|name| &**name), Some("b"));
    let log = Engine::compile(&pb::Rbac {
        action: Action::Log as i32,
        ..rbac
    })
    .unwrap();
    assert!(log.judge(&facts(None, None)).allowed);
}

const PATHS: &[&str] = &["/", "/a", "/a/b", "/b"];
const ROLES: &[&str] = &["x", "y", ""];

fn leaf() -> impl Strategy<Value = pb::Permission> {
    let path = proptest::sample::select(PATHS).prop_map(|path| {
        let path = matcher::path_matcher::Rule::Path(prefix(path));
        permission(Rule::UrlPath(matcher::PathMatcher { rule: Some(path) }))
    });
    let role = (proptest::sample::select(ROLES), proptest::bool::ANY).prop_map(|(role, invert)| {
        permission(Rule::Header(HeaderMatcher {
            name: "role".to_owned(),
            invert_match: invert,
            header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(exact(role))),
            ..Default::default()
        }))
    });
    prop_oneof![Just(permission(Rule::Any(true))), path, role]
}

fn tree() -> impl Strategy<Value = pb::Permission> {
    leaf().prop_recursive(4, 24, 3, |inner| {
        let set = || proptest::collection::vec(inner.clone(), 1..4);
        let of = |rules| pb::permission::Set { rules };
        prop_oneof![
            set().prop_map(move |rules| permission(Rule::AndRules(of(rules)))),
            set().prop_map(move |rules| permission(Rule::OrRules(of(rules)))),
            inner.prop_map(|rule| permission(Rule::NotRule(Box::new(rule)))),
        ]
    })
}

fn not(rule: pb::Permission) -> pb::Permission {
    permission(Rule::NotRule(Box::new(rule)))
}

fn both(a: pb::Permission, b: pb::Permission) -> pb::Permission {
    permission(Rule::AndRules(pb::permission::Set { rules: vec![a, b] }))
}

fn either(a: pb::Permission, b: pb::Permission) -> pb::Permission {
    permission(Rule::OrRules(pb::permission::Set { rules: vec![a, b] }))
}

fn allowed(action: Action, rule: pb::Permission, path: &str, role: Option<&str>) -> bool {
    let mut headers = HeaderMap::new();
    if let Some(role) = role {
        let value = HeaderValue::from_str(role).expect("a value");
        headers.insert(HeaderName::from_static("role"), value);
    }
    let request = RequestView {
        host: "a.test",
        method: "GET",
        path_and_query: path,
        scheme: "http",
        headers: &headers,
        random: 0,
    };
    let all = principal(Identifier::Any(true));
    let rbac = policies(action, vec![("p", rule, all)]);
    let engine = Engine::compile(&rbac).expect("an engine");
    engine.judge(&facts(Some(&request), None)).allowed
}

proptest! {
    #[test]
    fn trees_of_conditions_obey_logic(
        a in tree(),
        b in tree(),
        path in proptest::sample::select(PATHS),
        role in proptest::option::of(proptest::sample::select(ROLES)),
    ) {
        let holds = |rule| allowed(Action::Allow, rule, path, role);
        let (va, vb) = (holds(a.clone()), holds(b.clone()));
        prop_assert_eq!(holds(not(a.clone())), !va);
        prop_assert_eq!(holds(both(a.clone(), b.clone())), va && vb);
        prop_assert_eq!(holds(either(a.clone(), b.clone())), va || vb);
        prop_assert_eq!(holds(not(both(a.clone(), b.clone()))), holds(either(not(a.clone()), not(b))));
        prop_assert_eq!(allowed(Action::Deny, a, path, role), !va);
    }
}

#[test]
fn no_policy_allows_nothing_and_denies_nothing() {
    let empty = |action| pb::Rbac {
        action: action as i32,
        policies: HashMap::new(),
        ..Default::default()
    };
    let judge = |action| {
        let engine = Engine::compile(&empty(action)).unwrap();
        engine.judge(&facts(None, None)).allowed
    };
    assert!(!judge(Action::Allow));
    assert!(judge(Action::Deny));
}
