//! Access control by chance, from a seed: trees of permissions and principals over small vocabularies, so that they meet requests often.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

use super::case::{Case, Request, RequestSpec, Version};

const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
const PATHS: &[&str] = &[
    "/",
    "/a",
    "/a/b",
    "/a/b/c",
    "/admin",
    "/admin/x",
    "/Admin",
    "/api/v1/items",
    "/x.y",
    "/a?q=/admin",
    "/a/./b",
    "/a//b",
    "/%61",
];
const METHODS: &[&str] = &["GET", "GET", "POST", "PUT", "DELETE", "PATCH"];
const HEADERS: &[&str] = &["x-role", "x-team", "x-agent"];
const VALUES: &[&str] = &["admin", "reader", "Admin", "10", "25", "", "a,b", "admin.x"];
const HOSTS: &[&str] = &["a.test", "A.test", "b.test", "x.a.test", "a.test:8080"];
const FORWARDED: &[&str] = &[
    "10.1.2.3",
    "10.1.2.3, 192.168.0.1",
    "192.168.0.1",
    "fd00::1",
    "x",
];
const RANGES: &[(&str, u32)] = &[
    ("10.0.0.0", 8),
    ("192.168.0.1", 32),
    ("127.0.0.1", 32),
    ("0.0.0.0", 0),
    ("fd00::", 8),
];
const DEEPEST: u32 = 3;
const REQUESTS: usize = 12;

/// So many sets of policies with their requests.
pub(super) fn policies(seed: u64, count: usize) -> Vec<Case> {
    (0..count as u64)
        .map(|n| {
            let mut random = StdRng::seed_from_u64(seed.wrapping_mul(2_000_003).wrapping_add(n));
            Maker(&mut random).case(format!("policies/{seed}-{n:03}"))
        })
        .collect()
}

struct Maker<'a>(&'a mut StdRng);

impl Maker<'_> {
    fn pick<'t>(&mut self, list: &[&'t str]) -> &'t str {
        list.choose(self.0).copied().unwrap_or_default()
    }

    fn case(&mut self, name: String) -> Case {
        let filters = (0..self.0.random_range(1..=2))
            .map(|_| self.filter())
            .collect();
        let mut manager = Map::new();
        if self.0.random_bool(0.5) {
            manager.insert("normalize_path".to_owned(), json!(true));
            manager.insert("merge_slashes".to_owned(), json!(true));
        }
        Case {
            name,
            filters,
            manager,
            routes: vec![json!({"match": {"prefix": "/"}, "route": {"cluster": "e1"}})],
            requests: (0..REQUESTS)
                .map(|_| RequestSpec::Full(Box::new(self.request())))
                .collect(),
            ..Case::default()
        }
    }

    fn filter(&mut self) -> Value {
        let mut policies = Map::new();
        for n in 0..self.0.random_range(0..=3) {
            let permissions: Vec<_> = (0..self.0.random_range(1..=2))
                .map(|_| self.permission(0))
                .collect();
            let principals: Vec<_> = (0..self.0.random_range(1..=2))
                .map(|_| self.principal(0))
                .collect();
            let policy = json!({"permissions": permissions, "principals": principals});
            policies.insert(format!("policy-{n}"), policy);
        }
        let action = self.pick(&["ALLOW", "ALLOW", "DENY", "DENY", "LOG"]);
        let rules = json!({"action": action, "policies": policies});
        json!({"name": "envoy.filters.http.rbac", "typed_config": {"@type": RBAC, "rules": rules}})
    }

    fn permission(&mut self, depth: u32) -> Value {
        let kinds = if depth < DEEPEST { 10 } else { 7 };
        match self.0.random_range(0..kinds) {
            0 => json!({"any": true}),
            1 | 2 => json!({"url_path": {"path": self.text(PATHS)}}),
            3 | 4 => json!({"header": self.header()}),
            5 => json!({"destination_ip": self.range()}),
            6 => {
                let (start, end) = *[(1, 65_536), (80, 81), (1, 1024)]
                    .choose(self.0)
                    .unwrap_or(&(1, 2));
                json!({"destination_port_range": {"start": start, "end": end}})
            }
            7 => json!({"and_rules": {"rules": self.several(|m| m.permission(depth + 1))}}),
            8 => json!({"or_rules": {"rules": self.several(|m| m.permission(depth + 1))}}),
            _ => json!({"not_rule": self.permission(depth + 1)}),
        }
    }

    fn principal(&mut self, depth: u32) -> Value {
        let kinds = if depth < DEEPEST { 11 } else { 8 };
        match self.0.random_range(0..kinds) {
            0 => json!({"any": true}),
            1 => json!({"url_path": {"path": self.text(PATHS)}}),
            2 | 3 => json!({"header": self.header()}),
            4 => json!({"direct_remote_ip": self.range()}),
            5 | 6 => json!({"remote_ip": self.range()}),
            7 => json!({"authenticated": {"principal_name": self.text(VALUES)}}),
            8 => json!({"and_ids": {"ids": self.several(|m| m.principal(depth + 1))}}),
            9 => json!({"or_ids": {"ids": self.several(|m| m.principal(depth + 1))}}),
            _ => json!({"not_id": self.principal(depth + 1)}),
        }
    }

    fn several(&mut self, mut make: impl FnMut(&mut Self) -> Value) -> Vec<Value> {
        (0..self.0.random_range(1..=3))
            .map(|_| make(self))
            .collect()
    }

    fn range(&mut self) -> Value {
        let (prefix, length) = RANGES.choose(self.0).copied().unwrap_or(("0.0.0.0", 0));
        json!({"address_prefix": prefix, "prefix_len": length})
    }

    fn text(&mut self, words: &[&str]) -> Value {
        let word = self.pick(words);
        let part = &word[..word.len().min(self.0.random_range(1..=6))];
        let ignore_case = self.0.random_bool(0.3);
        let mut text = match self.0.random_range(0..5) {
            0 if !part.is_empty() => json!({"prefix": part}),
            1 if !part.is_empty() => json!({"contains": part}),
            2 if !word.is_empty() => json!({"suffix": &word[word.len() / 2..]}),
            3 => {
                return json!({"safe_regex": {"regex": format!(".*{}.*", part.replace(['?', '.'], "\\W"))}});
            }
            _ => json!({"exact": word}),
        };
        text["ignore_case"] = json!(ignore_case);
        text
    }

    fn header(&mut self) -> Value {
        let mut header = match self.0.random_range(0..6) {
            0 => json!({"name": ":method", "string_match": {"exact": self.pick(METHODS)}}),
            1 => json!({"name": ":authority", "string_match": self.text(HOSTS)}),
            2 => json!({"name": self.pick(HEADERS), "present_match": self.0.random_bool(0.7)}),
            3 => json!({"name": self.pick(HEADERS), "range_match": {"start": 5, "end": 20}}),
            _ => json!({"name": self.pick(HEADERS), "string_match": self.text(VALUES)}),
        };
        if self.0.random_bool(0.25) {
            header["invert_match"] = json!(true);
        }
        if self.0.random_bool(0.15) {
            header["treat_missing_header_as_empty"] = json!(true);
        }
        header
    }

    fn request(&mut self) -> Request {
        let mut headers = Vec::new();
        for name in HEADERS {
            for _ in 0..*[0, 0, 1, 1, 2].choose(self.0).unwrap_or(&0) {
                headers.push(format!("{name}: {}", self.pick(VALUES)));
            }
        }
        if self.0.random_bool(0.4) {
            headers.push(format!("x-forwarded-for: {}", self.pick(FORWARDED)));
        }
        Request {
            send: format!("{} {}", self.pick(METHODS), self.pick(PATHS)),
            host: Some(self.pick(HOSTS).to_owned()),
            headers,
            version: match self.0.random_bool(0.3) {
                true => Version::Http2,
                false => Version::Http11,
            },
            ..Request::default()
        }
    }
}
