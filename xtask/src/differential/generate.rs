//! Route tables and requests by chance, from a seed: small vocabularies, so that conditions meet requests often.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

use super::case::{Case, Request, RequestSpec, Version};

const PATHS: &[&str] = &[
    "/",
    "/a",
    "/a/",
    "/a/b",
    "/a/b/c",
    "/A/b",
    "/ab",
    "/api",
    "/api/v1",
    "/api/v1/items",
    "/api/v2",
    "/x.y",
    "/a%20b",
    "/a//b",
    "/products/12/reviews",
];
const REGEXES: &[&str] = &[
    "/a.*",
    "/api/v[0-9]+",
    "/api/v[0-9]+/.*",
    "/products/\\d+/reviews",
    ".*b.*",
    "/",
    "/[a-c]/?",
];
const SUBSTITUTIONS: &[(&str, &str)] = &[
    ("^/api/(v[0-9]+)", "/rest/\\1"),
    ("b", "xx"),
    ("/a/(.*)", "/\\1/a"),
    ("none", "z"),
    ("", "-"),
];
const QUERIES: &[&str] = &[
    "",
    "?q=1",
    "?q=2&r=x",
    "?r=",
    "?q",
    "?q=abc&q=1",
    "?R=x",
    "?q=a%20b",
];
const HEADERS: &[&str] = &["x-a", "x-b", "end-user"];
const VALUES: &[&str] = &["1", "2", "10", "-5", "abc", "ABC", "abcdef", "jason", ""];
const DOMAINS: &[&str] = &[
    "a.test",
    "b.test",
    "*.test",
    "*.a.test",
    "www.a.test",
    "a.*",
    "www.*",
    "a.test:8080",
    "*",
    "*-x.test",
    "c.test",
];
const HOSTS: &[&str] = &[
    "a.test",
    "A.test",
    "b.test",
    "www.a.test",
    "x.www.a.test",
    "a.test:8080",
    "a.test:81",
    "a.other",
    "www.other",
    "q-x.test",
    "other",
    "c.test",
];
const METHODS: &[&str] = &[
    "GET", "GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH",
];
const CLUSTERS: &[&str] = &["e1", "e2", "e3", "e4", "h1", "h2", "e5", "h3"];
const REQUESTS: usize = 12;

/// So many route tables with their requests.
pub(super) fn tables(seed: u64, count: usize) -> Vec<Case> {
    (0..count as u64)
        .map(|n| {
            // One seed a table, so that one alone can be made again.
            let mut random = StdRng::seed_from_u64(seed.wrapping_mul(1_000_003).wrapping_add(n));
            Maker(&mut random).case(format!("generated/{seed}-{n:03}"))
        })
        .collect()
}

struct Maker<'a>(&'a mut StdRng);

impl Maker<'_> {
    fn pick<'t>(&mut self, list: &[&'t str]) -> &'t str {
        list.choose(self.0).copied().unwrap_or_default()
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.0.random_range(0..100) < percent
    }

    fn case(&mut self, name: String) -> Case {
        let mut domains: Vec<&str> = DOMAINS.to_vec();
        let mut hosts = Vec::new();
        for h in 0..self.0.random_range(1..=4) {
            let taken: Vec<&str> = (0..self.0.random_range(1..=2))
                .map(|_| domains.swap_remove(self.0.random_range(0..domains.len())))
                .collect();
            hosts.push(self.virtual_host(h, &taken));
        }
        let mut table = Map::new();
        if self.chance(30) {
            table.insert(
                "request_headers_to_add".to_owned(),
                json!([self.header_to_add("t")]),
            );
        }
        if self.chance(20) {
            table.insert("response_headers_to_remove".to_owned(), json!(["x-from"]));
        }
        if self.chance(20) {
            table.insert(
                "most_specific_header_mutations_wins".to_owned(),
                json!(true),
            );
        }
        if self.chance(20) {
            table.insert("ignore_port_in_host_matching".to_owned(), json!(true));
        }
        Case {
            name,
            virtual_hosts: hosts,
            table,
            requests: (0..REQUESTS)
                .map(|_| RequestSpec::Full(Box::new(self.request())))
                .collect(),
            ..Case::default()
        }
    }

    fn virtual_host(&mut self, number: usize, domains: &[&str]) -> Value {
        let routes: Vec<Value> = (0..self.0.random_range(1..=6))
            .map(|r| self.route(&format!("{number}-{r}")))
            .collect();
        let mut host =
            json!({"name": format!("host-{number}"), "domains": domains, "routes": routes});
        if self.chance(25) {
            host["request_headers_to_add"] = json!([self.header_to_add("h")]);
        }
        if self.chance(15) {
            host["request_headers_to_remove"] = json!([self.pick(HEADERS)]);
        }
        if self.chance(15) {
            host["include_request_attempt_count"] = json!(true);
        }
        if self.chance(15) {
            host["include_attempt_count_in_response"] = json!(true);
        }
        if self.chance(6) {
            host["require_tls"] = json!(self.pick(&["EXTERNAL_ONLY", "ALL"]));
        }
        host
    }

    fn route(&mut self, name: &str) -> Value {
        let (matching, prefix) = self.matching();
        let mut route = json!({
            "name": name,
            "match": matching,
            "response_headers_to_add": [{"header": {"key": "x-route", "value": name}}],
        });
        let kind = self.0.random_range(0..100);
        if kind < 70 {
            route["route"] = self.forward(prefix);
        } else if kind < 85 {
            route["redirect"] = self.redirect(prefix);
        } else {
            let status = *[200, 204, 301, 403, 404, 503]
                .choose(self.0)
                .unwrap_or(&200);
            route["direct_response"] = json!({"status": status});
            if self.chance(60) {
                route["direct_response"]["body"] =
                    json!({"inline_string": format!("answer of {name}")});
            }
        }
        if self.chance(30) {
            route["request_headers_to_add"] =
                json!([self.header_to_add("r"), self.header_to_add("s")]);
        }
        if self.chance(15) {
            route["request_headers_to_remove"] = json!([self.pick(HEADERS)]);
        }
        if self.chance(15) {
            route["response_headers_to_remove"] =
                json!([self.pick(&["x-from", "x-route", "server", "content-type"])]);
        }
        route
    }

    /// A match, and whether it is by prefix, so that `prefix_rewrite` makes sense.
    fn matching(&mut self) -> (Value, bool) {
        let kind = self.0.random_range(0..100);
        let path = self.pick(PATHS);
        let (mut matching, prefix) = if kind < 45 {
            (json!({"prefix": path}), true)
        } else if kind < 65 {
            (json!({"path": path}), false)
        } else if kind < 80 && path.len() > 1 && !path.ends_with('/') {
            (json!({"path_separated_prefix": path}), true)
        } else {
            (json!({"safe_regex": {"regex": self.pick(REGEXES)}}), false)
        };
        if self.chance(15) {
            matching["case_sensitive"] = json!(false);
        }
        let headers: Vec<Value> = (0..self.0.random_range(0..=2))
            .filter_map(|_| self.header_matcher())
            .collect();
        if !headers.is_empty() {
            matching["headers"] = json!(headers);
        }
        if self.chance(20) {
            matching["query_parameters"] = json!([self.query_matcher()]);
        }
        (matching, prefix)
    }

    /// None half of the time: most routes should be met.
    fn header_matcher(&mut self) -> Option<Value> {
        if self.chance(50) {
            return None;
        }
        let name = self.pick(&[
            "x-a",
            "x-b",
            "end-user",
            ":method",
            ":authority",
            ":path",
            ":scheme",
        ]);
        let value = match name {
            ":method" => self.pick(METHODS),
            ":authority" => self.pick(HOSTS),
            ":path" => self.pick(PATHS),
            ":scheme" => self.pick(&["http", "https"]),
            _ => self.pick(VALUES),
        };
        let mut matcher = json!({"name": name});
        match self.0.random_range(0..8) {
            0 => matcher["present_match"] = json!(self.chance(70)),
            1 => matcher["range_match"] = json!({"start": 0, "end": 10}),
            // Envoy refuses the empty string here.
            2 if !value.is_empty() => matcher["string_match"] = json!({"prefix": value}),
            3 if !value.is_empty() => {
                matcher["string_match"] = json!({"suffix": value, "ignore_case": self.chance(50)})
            }
            4 if !value.is_empty() => {
                matcher["string_match"] = json!({"contains": value, "ignore_case": self.chance(50)})
            }
            5 => {
                matcher["string_match"] =
                    json!({"safe_regex": {"regex": self.pick(&["[a-z]+", "\\d*", "abc|1", ".+"])}})
            }
            _ => matcher["string_match"] = json!({"exact": value, "ignore_case": self.chance(30)}),
        }
        if self.chance(25) {
            matcher["invert_match"] = json!(true);
        }
        if self.chance(20) {
            matcher["treat_missing_header_as_empty"] = json!(true);
        }
        Some(matcher)
    }

    fn query_matcher(&mut self) -> Value {
        let name = self.pick(&["q", "r"]);
        match self.0.random_range(0..4) {
            0 => json!({"name": name, "present_match": true}),
            1 => json!({"name": name, "string_match": {"prefix": self.pick(&["1", "a"])}}),
            2 => {
                json!({"name": name, "string_match": {"safe_regex": {"regex": self.pick(&["\\d+", "a.*", ".?"])}}})
            }
            _ => {
                json!({"name": name, "string_match": {"exact": self.pick(&["1", "x", "", "abc"])}})
            }
        }
    }

    fn forward(&mut self, prefix: bool) -> Value {
        let mut action = match self.0.random_range(0..10) {
            0 => json!({"cluster": "dead"}),
            1 => json!({"cluster": "empty"}),
            2 => json!({"cluster": "unknown"}),
            3 => json!({"cluster_header": self.pick(&["x-a", "x-cluster"])}),
            4 => json!({"weighted_clusters": {"clusters": [
                {"name": self.pick(CLUSTERS), "weight": 0},
                {"name": self.pick(CLUSTERS), "weight": 100, "request_headers_to_add": [self.header_to_add("w")],
                 "response_headers_to_add": [{"header": {"key": "x-weighted", "value": "yes"}}]},
            ]}}),
            _ => json!({"cluster": self.pick(CLUSTERS)}),
        };
        match self.0.random_range(0..10) {
            0 | 1 if prefix => {
                action["prefix_rewrite"] = json!(self.pick(&["/", "/new", "/new/", "/a/b/"]))
            }
            2 => {
                let (pattern, substitution) =
                    SUBSTITUTIONS.choose(self.0).copied().unwrap_or_default();
                if !pattern.is_empty() {
                    action["regex_rewrite"] =
                        json!({"pattern": {"regex": pattern}, "substitution": substitution});
                }
            }
            _ => {}
        }
        match self.0.random_range(0..12) {
            0 => action["host_rewrite_literal"] = json!("new.test"),
            1 => action["host_rewrite_header"] = json!(self.pick(&["x-a", "x-b"])),
            2 => {
                action["host_rewrite_path_regex"] =
                    json!({"pattern": {"regex": "^/([a-z]+).*$"}, "substitution": "\\1.test"});
            }
            3 => action["auto_host_rewrite"] = json!(true),
            _ => {}
        }
        if self.chance(20) {
            action["append_x_forwarded_host"] = json!(true);
        }
        if self.chance(20) {
            action["timeout"] = json!(self.pick(&["0s", "5s", "2.5s"]));
        }
        if self.chance(25) {
            action["retry_policy"] = json!({
                "retry_on": self.pick(&["5xx", "gateway-error", "connect-failure,refused-stream", "retriable-4xx", "reset", "retriable-status-codes"]),
                "num_retries": self.0.random_range(0..=3),
                "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"},
                "retriable_status_codes": [418],
            });
        }
        action
    }

    fn redirect(&mut self, prefix: bool) -> Value {
        let mut redirect = json!({});
        if self.chance(40) {
            redirect["host_redirect"] = json!(self.pick(&["other.test", "other.test:99"]));
        }
        match self.0.random_range(0..5) {
            0 => redirect["https_redirect"] = json!(true),
            1 => redirect["scheme_redirect"] = json!("https"),
            _ => {}
        }
        if self.chance(20) {
            redirect["port_redirect"] = json!(*[80, 443, 8443].choose(self.0).unwrap_or(&80));
        }
        match self.0.random_range(0..6) {
            0 => redirect["path_redirect"] = json!(self.pick(&["/moved", "/moved?x=y"])),
            1 if prefix => redirect["prefix_rewrite"] = json!(self.pick(&["/", "/moved"])),
            2 => {
                let (pattern, substitution) = SUBSTITUTIONS[self.0.random_range(0..3)];
                redirect["regex_rewrite"] =
                    json!({"pattern": {"regex": pattern}, "substitution": substitution});
            }
            _ => {}
        }
        if self.chance(50) {
            let code = [
                "MOVED_PERMANENTLY",
                "FOUND",
                "SEE_OTHER",
                "TEMPORARY_REDIRECT",
                "PERMANENT_REDIRECT",
            ];
            redirect["response_code"] = json!(self.pick(&code));
        }
        if self.chance(20) {
            redirect["strip_query"] = json!(true);
        }
        redirect
    }

    fn header_to_add(&mut self, by: &str) -> Value {
        let name = match self.0.random_range(0..4) {
            0 => format!("x-by-{by}"),
            _ => self.pick(HEADERS).to_owned(),
        };
        let value = self.pick(&[
            "added",
            "%REQ(x-a)%",
            "%REQ(:path)%-%REQ(x-none?x-b)%",
            "100%%",
            "%PROTOCOL%",
        ]);
        let actions = [
            "APPEND_IF_EXISTS_OR_ADD",
            "ADD_IF_ABSENT",
            "OVERWRITE_IF_EXISTS_OR_ADD",
            "OVERWRITE_IF_EXISTS",
        ];
        json!({"header": {"key": name, "value": value}, "append_action": self.pick(&actions), "keep_empty_value": self.chance(50)})
    }

    fn request(&mut self) -> Request {
        let method = self.pick(METHODS);
        let mut path = self.pick(PATHS).to_owned();
        if self.chance(15) {
            path.push_str(self.pick(&["x", "/", "/more", "%2f"]));
        }
        path.push_str(self.pick(QUERIES));
        let mut headers = Vec::new();
        for _ in 0..self.0.random_range(0..=3) {
            headers.push(format!("{}: {}", self.pick(HEADERS), self.pick(VALUES)));
        }
        if self.chance(5) {
            headers.push(format!("x-cluster: {}", self.pick(CLUSTERS)));
        }
        let bodily = ["POST", "PUT", "PATCH"].contains(&method);
        Request {
            send: format!("{method} {path}"),
            host: Some(self.pick(HOSTS).to_owned()),
            headers,
            size: if bodily {
                *[0, 5, 2000].choose(self.0).unwrap_or(&0)
            } else {
                0
            },
            chunked: bodily && self.chance(30),
            version: if self.chance(30) {
                Version::Http2
            } else {
                Version::Http11
            },
            upstream: self
                .pick(&[
                    "",
                    "",
                    "",
                    "503 | 200",
                    "503",
                    "418 | 200",
                    "409 | 200",
                    "404 x-from=app",
                    "200 server=app x-from=app",
                    "500 | 200",
                    "204",
                ])
                .to_owned(),
            ..Request::default()
        }
    }
}
