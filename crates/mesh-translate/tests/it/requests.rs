//! `requests.txt` beside a golden file: requests run through the proxy's own matcher.
//!
//! A line is `TABLE METHOD AUTHORITY PATH [name=value ...] -> OUTCOME`; the outcome is the cluster (of several, the one that `random=N` picks),
//! `redirect LOCATION`, `direct STATUS`, or `none`; what follows a `:` after a cluster is the path and host that the upstream sees.

use std::fs;

use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_routing::Snapshot;
use mesh_routing::action::{Action, ClusterTarget};
use mesh_routing::route::{Decision, RequestView};
use mesh_translate::translate;

use crate::case::Case;
use crate::golden::snapshot;

#[test]
fn requests_go_where_the_rules_say() {
    let mut count = 0;
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
            assert_eq!(
                outcome(&snapshot, request),
                expected,
                "{}: {line}",
                path.display()
            );
            count += 1;
        }
    }
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
    let Decision::Matched(matched) = routes.decide(&request) else {
        return "none".to_owned();
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
            let path = forward
                .rewritten_path(path, matched.matched_len)
                .map(|path| format!(" path {path}"))
                .unwrap_or_default();
            let host = forward
                .host_literal(&target)
                .map(|host| format!(" host {}", host.to_str().unwrap()))
                .unwrap_or_default();
            format!("{}{path}{host}", entry.name)
        }
    }
}
