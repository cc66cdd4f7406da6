//! Rate limits: descriptors, stages, buckets.

use super::*;

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
