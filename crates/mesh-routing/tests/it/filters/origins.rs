//! Cross-origin policies.

use super::*;

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
