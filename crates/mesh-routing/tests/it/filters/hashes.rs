//! Hashes of requests, cookies for them, mirrors.

use super::*;

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
