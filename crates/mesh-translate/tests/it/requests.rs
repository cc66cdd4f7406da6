//! `requests.txt` beside a golden file: requests run through the proxy's own matcher.
//!
//! A line is `TABLE METHOD AUTHORITY PATH [name=value ...] -> OUTCOME`; the outcome is the cluster (of several, the one that `random=N` picks),
//! `redirect LOCATION`, `direct STATUS`, `https` (redirect to it) or `none`; what follows a cluster is the path and host that the upstream sees.
//! A line `connect ADDRESS:PORT [sni=NAME] [alpn=NAME] [random=N] -> OUTCOME` is a connection to the node's only listening port (a sidecar's outgoing
//! one, or a gateway's by port); the outcome is the cluster, `http TABLE`, or `closed`. `inbound` in its place is a connection to a sidecar from outside.
//! Behind an outcome that is a cluster ` | NAME VALUE` tells more: `route`, `tries`, `per-try`, `timeout`, `mirror`, `hash` (whether there is one), or the
//! name of a request header with its value as the upstream sees it (`-` for none). `claim.NAME=VALUE` is a claim of the request's token (`a/b` is one
//! inside another, `x,y` a list).

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_routing::Snapshot;
use mesh_routing::action::{Action, ClusterTarget, Forward};
use mesh_routing::chain::{ConnectionView, NetworkFilter};
use mesh_routing::dynamic::Dynamic;
use mesh_routing::format::Facts;
use mesh_routing::hcm::RouteSource;
use mesh_routing::listener::Listener;
use mesh_routing::route::{Decision, RequestView, Route};
use mesh_translate::translate;

use crate::case::Case;
use crate::golden::snapshot;

#[test]
fn requests_go_where_the_rules_say() {
    let mut count = 0;
    let mut failed = Vec::new();
    for case in Case::all() {
        let path = case.folder.join("requests.txt");
        let text = fs::read_to_string(&path).unwrap_or_else(|error| {
            panic!("every case asks the matcher: {}: {error}", path.display())
        });
        let mesh = case.mesh();
        let snapshot = snapshot(&translate(&mesh, &case.node), &path.display().to_string());
        for line in text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            let (request, expected) = line
                .split_once(" -> ")
                .unwrap_or_else(|| panic!("no outcome: {line}"));
            let (verb, rest) = request.split_once(' ').unwrap();
            let outcome = match verb {
                "connect" => connected(&snapshot, rest),
                "inbound" => inbound(&snapshot, rest),
                _ => {
                    let asked = expected.split(" | ").skip(1);
                    let asked: Vec<&str> =
                        asked.filter_map(|part| part.split(' ').next()).collect();
                    outcome(&snapshot, request, &asked)
                }
            };
            if outcome != expected {
                failed.push(format!("{}: {line}\n  got {outcome}", path.display()));
            }
            count += 1;
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert!(count > 20, "only {count} requests were tried");
}

fn outcome(snapshot: &Snapshot, line: &str, asked: &[&str]) -> String {
    let mut words = line.split_whitespace();
    let mut next = || words.next().unwrap_or_else(|| panic!("too short: {line}"));
    let (table, method, host, path) = (next(), next(), next(), next());
    let mut headers = HeaderMap::new();
    let mut random = 0;
    let mut claims = Vec::new();
    for word in words {
        let (name, value) = word.split_once('=').unwrap();
        match name {
            "random" => random = value.parse().unwrap(),
            name if name.starts_with("claim.") => {
                let path: Vec<&str> = name["claim.".len()..].split('/').collect();
                claims.push(claim(&path, value));
            }
            _ => drop(headers.insert(
                HeaderName::try_from(name).unwrap(),
                HeaderValue::from_str(value).unwrap(),
            )),
        }
    }
    let request = RequestView {
        host,
        method,
        path_and_query: path,
        scheme: "http",
        headers: &headers,
        random,
    };
    let routes = snapshot
        .routes(table)
        .unwrap_or_else(|| panic!("no table {table}"));
    let known = (!claims.is_empty()).then(|| {
        let payload = fields([("payload", structure(claims.into_iter().collect()))]);
        let mut known = Dynamic::default();
        known.add("envoy.filters.http.jwt_authn", Arc::new(payload));
        known
    });
    let matched = match routes.decide_with(&request, known.as_ref()) {
        Decision::Matched(matched) => matched,
        Decision::TlsRequired => return "https".to_owned(),
        Decision::NoRoute => return "none".to_owned(),
    };
    match &matched.route.action {
        Action::Redirect(redirect) => format!(
            "redirect {} {}",
            redirect.status.as_u16(),
            redirect.location(&request, matched.matched_len)
        ),
        Action::Direct(direct) => format!("direct {}", direct.status.as_u16()),
        Action::Forward(forward) => {
            let target = forward.target(&request);
            let ClusterTarget::Entry(entry) = &target else {
                return "no cluster".to_owned();
            };
            let new_path = forward
                .rewritten_path(path, matched.matched_len)
                .map(|path| format!(" path {path}"))
                .unwrap_or_default();
            let host = forward
                .rewritten_host(&target, &headers, path)
                .map(|host| format!(" host {}", host.to_str().unwrap()))
                .unwrap_or_default();
            let details: String = asked
                .iter()
                .map(|name| {
                    format!(
                        " | {name} {}",
                        detail(name, matched.route, forward, &request)
                    )
                })
                .collect();
            format!("{}{new_path}{host}{details}", entry.name)
        }
    }
}

/// A claim by its way, the first name of which comes back with what is inside.
fn claim(path: &[&str], value: &str) -> (String, Value) {
    let text = |text: &str| Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    let value = match path {
        [_] if value.contains(',') => Value {
            kind: Some(Kind::ListValue(ListValue {
                values: value.split(',').map(text).collect(),
            })),
        },
        [_] | [] => text(value),
        [_, inner @ ..] => structure([claim(inner, value)].into()),
    };
    (path[0].to_owned(), value)
}

fn structure(fields: HashMap<String, Value>) -> Value {
    Value {
        kind: Some(Kind::StructValue(Struct { fields })),
    }
}

fn fields<const N: usize>(fields: [(&str, Value); N]) -> Struct {
    let fields = fields.map(|(name, value)| (name.to_owned(), value));
    Struct {
        fields: fields.into(),
    }
}

/// What a route says about one thing.
fn detail(name: &str, route: &Route, forward: &Forward, request: &RequestView<'_>) -> String {
    let retry = forward.retry.as_ref();
    let time = |time: Option<Duration>| time.map_or("-".to_owned(), |time| format!("{time:?}"));
    match name {
        "route" => route.name.to_string(),
        "tries" => retry.map_or(1, |retry| retry.retries + 1).to_string(),
        "per-try" => time(retry.and_then(|retry| retry.per_try_timeout)),
        "timeout" => time(forward.timeout),
        "mirror" => {
            let all = forward.mirrors.iter();
            let taken: Vec<String> = all
                .filter_map(|mirror| Some(mirror.target(request, request.random)?.to_string()))
                .collect();
            if taken.is_empty() {
                "-".to_owned()
            } else {
                taken.join(",")
            }
        }
        "hash" => {
            let here = SocketAddr::from(([10, 244, 0, 10], 1));
            let hash = forward
                .hash
                .as_ref()
                .map(|policy| policy.hash(request, here, here));
            let some = hash.is_some_and(|hash| hash.value.is_some());
            if some { "yes" } else { "-" }.to_owned()
        }
        header => {
            let mut headers = request.headers.clone();
            let facts = Facts {
                request: Some(request.headers),
                method: request.method,
                path: request.path_and_query,
                authority: request.host,
                protocol: "HTTP/1.1",
                ..Facts::default()
            };
            route.request_ops.apply_to_request(&mut headers, &facts);
            let values: Vec<&str> = headers
                .get_all(header)
                .iter()
                .map(|value| value.to_str().unwrap())
                .collect();
            if values.is_empty() {
                "-".to_owned()
            } else {
                values.join(",")
            }
        }
    }
}

/// A connection that comes to a sidecar from outside: its chain, and the cluster or table behind it.
fn inbound(snapshot: &Snapshot, line: &str) -> String {
    let listener = snapshot.listener("virtualInbound").unwrap();
    chain(listener, line)
}

fn connected(snapshot: &Snapshot, line: &str) -> String {
    let destination: SocketAddr = line.split_whitespace().next().unwrap().parse().unwrap();
    let listener = match snapshot.listener("virtualOutbound") {
        Some(outbound) => snapshot.hand_over(outbound, destination),
        None => match snapshot
            .listeners()
            .find(|listener| listener.address.port() == destination.port())
        {
            Some(listener) => listener,
            None => return "closed".to_owned(),
        },
    };
    chain(listener, line)
}

fn chain(listener: &Listener, line: &str) -> String {
    let mut words = line.split_whitespace();
    let destination: SocketAddr = words.next().unwrap().parse().unwrap();
    let (mut name, mut application, mut random) = (None, None, 0);
    for word in words {
        match word.split_once('=').unwrap() {
            ("sni", value) => name = Some(value),
            ("alpn", value) => application = Some(value),
            ("random", value) => random = value.parse().unwrap(),
            other => panic!("{other:?}: {line}"),
        }
    }
    let view = ConnectionView {
        destination: Some(destination),
        source: None,
        server_name: name,
        transport: if name.is_some() { "tls" } else { "raw_buffer" },
        applications: application.as_slice(),
    };
    match listener.chain(&view).map(|chain| &chain.filter) {
        None => "closed".to_owned(),
        Some(NetworkFilter::Tcp(proxy)) => proxy.cluster(random).to_string(),
        Some(NetworkFilter::Http(manager)) => match &manager.routes {
            RouteSource::Rds(table) => format!("http {table}"),
            RouteSource::Inline(table) => format!("http {}", table.name),
        },
    }
}
