//! `requests.txt` beside a golden file: requests run through the proxy's own matcher.
//!
//! A line is `TABLE METHOD AUTHORITY PATH [name=value ...] -> OUTCOME`; the outcome is the cluster (of several, the one that `random=N` picks),
//! `redirect LOCATION`, `direct STATUS`, `https` (redirect to it) or `none`; what follows a cluster is the path and host that the upstream sees.
//! A line `connect ADDRESS:PORT [sni=NAME] [alpn=NAME] [random=N] -> OUTCOME` is a connection to the node's only listening port (a sidecar's outgoing
//! one, or a gateway's by port); the outcome is the cluster, `http TABLE`, or `closed`.

use std::fs;
use std::net::SocketAddr;

use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_routing::Snapshot;
use mesh_routing::action::{Action, ClusterTarget};
use mesh_routing::chain::{ConnectionView, NetworkFilter};
use mesh_routing::hcm::RouteSource;
use mesh_routing::route::{Decision, RequestView};
use mesh_translate::translate;

use crate::case::Case;
use crate::golden::snapshot;

#[test]
fn requests_go_where_the_rules_say() {
    let mut count = 0;
    let mut failed = Vec::new();
    for case in Case::all() {
        let path = case.folder.join("requests.txt");
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
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
            let outcome = match request.strip_prefix("connect ") {
                Some(connection) => connected(&snapshot, connection),
                None => outcome(&snapshot, request),
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

fn outcome(snapshot: &Snapshot, line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut next = || words.next().unwrap_or_else(|| panic!("too short: {line}"));
    let (table, method, host, path) = (next(), next(), next(), next());
    let mut headers = HeaderMap::new();
    let mut random = 0;
    for word in words {
        let (name, value) = word.split_once('=').unwrap();
        match name {
            "random" => random = value.parse().unwrap(),
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
    let matched = match routes.decide(&request) {
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
            format!("{}{new_path}{host}", entry.name)
        }
    }
}

fn connected(snapshot: &Snapshot, line: &str) -> String {
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
