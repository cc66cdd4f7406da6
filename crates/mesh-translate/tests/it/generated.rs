//! Rules as nobody would write them: whatever passes the schema, the proxy has to take what comes out, since one refused route takes its whole table
//! with it.

use mesh_model::{Mesh, Node};
use mesh_translate::translate;
use proptest::prelude::*;
use proptest::strategy::{BoxedStrategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Map, Value, json};

use crate::case::{Case, item};
use crate::golden::{bootstrap, snapshot};

/// Texts of all kinds, good and bad ones.
fn text() -> BoxedStrategy<String> {
    let odd = [
        "",
        "/",
        "/a",
        "/a/b",
        "x",
        "X-A",
        ".*",
        "*",
        "(",
        "a{2}",
        "[",
        "(a)(b)",
        "\\1",
        "\\7",
        "%",
        "%%",
        "%REQ(x)%",
        "%NOPE%",
        "a b",
        "a\tb",
        "a\nb",
        "é",
        "host",
        ":authority",
        ":path",
        "5xx",
        "503",
        "reset,,409",
        "ä.example.com",
        "*.example.com",
        "10.0.0.0/8",
        "10.0.0.0/40",
        "UNAVAILABLE",
        "\\2/\\1",
        "12",
        "http",
        "https",
        "ftp",
        "\u{0}",
        "(?i)x",
        "\\d+",
        "a|b",
        "$",
        "^/a$",
    ];
    prop_oneof![
        8 => proptest::sample::select(odd.to_vec()).prop_map(str::to_owned),
        1 => "[ -~]{0,12}",
    ]
    .boxed()
}

fn number() -> BoxedStrategy<i64> {
    let odd = [
        0,
        1,
        2,
        80,
        100,
        199,
        200,
        301,
        302,
        404,
        503,
        599,
        600,
        9080,
        65535,
        65536,
        2_147_483_647,
    ];
    proptest::sample::select(odd.to_vec()).boxed()
}

fn share() -> BoxedStrategy<Value> {
    let odd = [0.0, 0.0001, 0.00001, 12.5, 100.0, 100.1];
    proptest::sample::select(odd.to_vec())
        .prop_map(|value| json!({ "value": value }))
        .boxed()
}

fn length() -> BoxedStrategy<Value> {
    let odd = ["0s", "1ms", "1s", "15s", "2562047h"];
    proptest::sample::select(odd.to_vec())
        .prop_map(Value::from)
        .boxed()
}

fn string_match() -> BoxedStrategy<Value> {
    let kind = proptest::sample::select(vec!["exact", "prefix", "regex", ""]);
    (kind, text())
        .prop_map(|(kind, text)| match kind {
            "" => json!({}),
            kind => json!({ kind: text }),
        })
        .boxed()
}

/// An object with some of the given fields.
fn fields(all: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let optional: Vec<_> = all
        .into_iter()
        .map(|(name, value)| {
            proptest::option::weighted(0.4, value).prop_map(move |value| Some((name, value?)))
        })
        .collect();
    optional
        .prop_map(|fields| {
            let fields = fields.into_iter().flatten();
            Value::Object(Map::from_iter(
                fields.map(|(name, value)| (name.to_owned(), value)),
            ))
        })
        .boxed()
}

fn list(of: BoxedStrategy<Value>, most: usize) -> BoxedStrategy<Value> {
    proptest::collection::vec(of, 0..=most)
        .prop_map(Value::from)
        .boxed()
}

fn map(of: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
    proptest::collection::btree_map(text(), of, 0..3)
        .prop_map(|map| Value::Object(map.into_iter().collect()))
        .boxed()
}

fn texts() -> BoxedStrategy<Value> {
    list(text().prop_map(Value::from).boxed(), 3)
}

fn destination() -> BoxedStrategy<Value> {
    let hosts = [
        "details",
        "ratings",
        "reviews",
        "nowhere",
        "istiod.istio-system.svc.cluster.local",
        "a.example.com",
    ];
    let subset = proptest::option::of(proptest::sample::select(vec!["v1", "v9"]));
    let port = proptest::option::of(number());
    (proptest::sample::select(hosts.to_vec()), subset, port)
        .prop_map(|(host, subset, port)| {
            let mut made = json!({ "host": host });
            if let Some(subset) = subset {
                made["subset"] = json!(subset);
            }
            if let Some(port) = port {
                made["port"] = json!({ "number": port });
            }
            made
        })
        .boxed()
}

fn headers() -> BoxedStrategy<Value> {
    let operations = fields(vec![
        ("set", map(text().prop_map(Value::from).boxed())),
        ("add", map(text().prop_map(Value::from).boxed())),
        ("remove", texts()),
    ]);
    fields(vec![
        ("request", operations.clone()),
        ("response", operations),
    ])
}

fn condition() -> BoxedStrategy<Value> {
    let number = number().prop_map(Value::from).boxed();
    fields(vec![
        ("name", text().prop_map(Value::from).boxed()),
        ("uri", string_match()),
        ("scheme", string_match()),
        ("method", string_match()),
        ("authority", string_match()),
        ("headers", map(string_match())),
        ("withoutHeaders", map(string_match())),
        ("queryParams", map(string_match())),
        ("ignoreUriCase", any::<bool>().prop_map(Value::from).boxed()),
        ("port", number),
        ("sourceNamespace", text().prop_map(Value::from).boxed()),
        ("statPrefix", text().prop_map(Value::from).boxed()),
    ])
}

fn weighted(headers: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
    (destination(), number(), proptest::option::of(headers))
        .prop_map(|(destination, weight, headers)| {
            let mut made = json!({ "destination": destination, "weight": weight });
            if let Some(headers) = headers {
                made["headers"] = headers;
            }
            made
        })
        .boxed()
}

fn answer() -> Vec<(&'static str, BoxedStrategy<Value>)> {
    let word = || text().prop_map(Value::from).boxed();
    let number = || number().prop_map(Value::from).boxed();
    let redirect = fields(vec![
        ("uri", word()),
        ("authority", word()),
        ("scheme", word()),
        ("redirectCode", number()),
        ("prefixRewrite", word()),
        ("port", number()),
    ]);
    let direct = (number(), text())
        .prop_map(|(status, body)| json!({ "status": status, "body": { "bytes": body } }));
    vec![("redirect", redirect), ("directResponse", direct.boxed())]
}

fn rule() -> BoxedStrategy<Value> {
    let word = || text().prop_map(Value::from).boxed();
    let number = || number().prop_map(Value::from).boxed();
    let regex = fields(vec![("match", word()), ("rewrite", word())]);
    let fault = fields(vec![
        (
            "delay",
            fields(vec![
                ("percentage", share()),
                ("fixedDelay", length()),
                ("percent", number()),
            ]),
        ),
        (
            "abort",
            fields(vec![
                ("percentage", share()),
                ("httpStatus", number()),
                ("grpcStatus", word()),
            ]),
        ),
    ]);
    let cors = fields(vec![
        ("allowOrigins", list(string_match(), 3)),
        ("allowOrigin", texts()),
        ("allowMethods", texts()),
        ("allowHeaders", texts()),
        ("exposeHeaders", texts()),
        ("maxAge", length()),
        (
            "allowCredentials",
            any::<bool>().prop_map(Value::from).boxed(),
        ),
    ]);
    let retries = fields(vec![
        ("attempts", number()),
        ("perTryTimeout", length()),
        ("backoff", length()),
        ("retryOn", word()),
        (
            "retryRemoteLocalities",
            any::<bool>().prop_map(Value::from).boxed(),
        ),
    ]);
    let mut all = vec![
        ("name", word()),
        ("match", list(condition(), 3)),
        (
            "rewrite",
            fields(vec![
                ("uri", word()),
                ("authority", word()),
                ("uriRegexRewrite", regex),
            ]),
        ),
        ("timeout", length()),
        ("retries", retries),
        ("fault", fault),
        ("corsPolicy", cors),
        ("headers", headers()),
        ("mirror", destination()),
        ("mirrorPercentage", share()),
        ("mirrorPercent", number()),
    ];
    // Mostly a destination: the rest hardly passes otherwise.
    let route = proptest::collection::vec(weighted(headers()), 1..4).prop_map(Value::from);
    let answered = answer();
    let plain = all.clone();
    all.extend(answered);
    prop_oneof![
        1 => fields(all),
        4 => (fields(plain), route).prop_map(|(mut rule, route)| {
            rule["route"] = route;
            rule
        }),
    ]
    .boxed()
}

fn connection_rule() -> BoxedStrategy<Value> {
    let word = || text().prop_map(Value::from).boxed();
    let number = || number().prop_map(Value::from).boxed();
    let item = fields(vec![
        ("sniHosts", texts()),
        ("destinationSubnets", texts()),
        ("port", number()),
        ("sourceNamespace", word()),
    ]);
    (list(item, 3), list(weighted(Just(json!({})).boxed()), 3))
        .prop_map(|(matches, route)| json!({ "match": matches, "route": route }))
        .boxed()
}

fn without(mut rule: Value, part: &str) -> Value {
    for route in rule["route"].as_array_mut().unwrap() {
        route.as_object_mut().unwrap().remove("headers");
    }
    for item in rule["match"].as_array_mut().unwrap() {
        item.as_object_mut().unwrap().remove(part);
    }
    rule
}

fn virtual_service() -> BoxedStrategy<Value> {
    let hosts = vec![
        "details",
        "ratings",
        "reviews",
        "*",
        "*.example.com",
        "a.example.com",
    ];
    let rules = proptest::collection::vec(rule(), 0..4);
    let connections = proptest::collection::vec(connection_rule(), 0..3);
    let gateways = proptest::sample::select(vec!["mesh", "all"]);
    (
        proptest::sample::select(hosts),
        rules,
        connections,
        gateways,
    )
        .prop_map(|(host, rules, connections, gateway)| {
            let tls: Vec<_> = connections
                .iter()
                .cloned()
                .map(|rule| without(rule, ""))
                .collect();
            let tcp: Vec<_> = connections
                .into_iter()
                .map(|rule| without(rule, "sniHosts"))
                .collect();
            json!({ "hosts": [host], "gateways": [gateway], "http": rules, "tls": tls, "tcp": tcp })
        })
        .boxed()
}

const GATEWAY: &str = r#"{
    "apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": { "name": "all", "namespace": "default" },
    "spec": { "selector": { "istio": "ingressgateway" }, "servers": [
        { "port": { "number": 80, "name": "http", "protocol": "HTTP" }, "hosts": ["*"] },
        { "port": { "number": 31400, "name": "tcp", "protocol": "TCP" }, "hosts": ["*"] },
        { "port": { "number": 8443, "name": "tls", "protocol": "TLS" }, "hosts": ["*"], "tls": { "mode": "PASSTHROUGH" } }
    ] } }"#;

/// With `ENVOY_BOOTSTRAPS=<folder>` what came out is written there too, for stock Envoy to judge.
#[test]
fn whatever_the_rules_say_the_proxy_takes_it() {
    let sidecar = Case::named("bookinfo-sidecar");
    let gateway = Case::named("bookinfo-gateway");
    let folder = std::env::var_os("ENVOY_BOOTSTRAPS").map(std::path::PathBuf::from);
    let cases = 40;
    // The same cases each time: what fails once fails again.
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::with_cases(cases), rng);
    let specs = proptest::collection::vec(virtual_service(), 1..4);
    let mut number = 0;
    let mut applied = 0;
    for _ in 0..cases {
        let specs = specs.new_tree(&mut runner).unwrap().current();
        let mut objects = sidecar.objects.clone();
        objects.upsert(item(&serde_json::from_str(GATEWAY).unwrap()));
        for (index, spec) in specs.iter().enumerate() {
            let raw = json!({
                "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
                "metadata": { "name": format!("v{index}"), "namespace": "default" }, "spec": spec,
            });
            objects.upsert(item(&raw));
        }
        let mesh = Mesh::build(&objects);
        for node in [&sidecar.node, &gateway.node] {
            let resources = translate(&mesh, node);
            let text = format!("{}", Value::from(specs.clone()));
            snapshot(&resources, &text);
            applied += resources
                .routes
                .values()
                .filter(|table| table.body.len() > 2000)
                .count();
            if let Some(folder) = &folder {
                let path = folder.join(format!("generated-{number}.json"));
                let stock = Node {
                    stock_envoy: true,
                    ..node.clone()
                };
                let text = bootstrap(&translate(&mesh, &stock)).to_string();
                std::fs::write(path, text).unwrap();
                number += 1;
            }
        }
    }
    assert!(applied > 10, "hardly any rule was applied: {applied}");
}
