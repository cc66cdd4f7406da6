//! Role based access control at work: requests and connections are judged, findings counted and kept for later filters.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value};
use http::{HeaderMap, HeaderValue, StatusCode, request};
use mesh_routing::dynamic::Dynamic;
use mesh_routing::filter::rbac::{Action, Facts, HTTP_SECTION, Rbac, Shadow, Verdict};
use mesh_routing::hcm::HttpManager;

use super::stats::{Counter, Stats, inc};
use super::{LocalReply, Notes, Request};
use crate::http::view;
use crate::listener::Downstream;

/// Where Envoy notes that a log policy has matched.
const COMMON_SECTION: &str = "envoy.common";

/// What one filter counts.
#[derive(Debug)]
pub struct RbacStats {
    allowed: Counter,
    denied: Counter,
    shadow_allowed: Counter,
    shadow_denied: Counter,
    /// The first part of the names of what each policy counts.
    policies: String,
    /// The same for shadow rules.
    shadow_policies: String,
}

impl RbacStats {
    /// `prefix` with its final dot; the other two go between it and the name, `shadow` where shadow rules count.
    pub fn new(stats: &Stats, prefix: &str, rules: &str, shadow: &str) -> Self {
        let enforced = join(&format!("{prefix}rbac."), rules);
        let dry = join(&enforced, shadow);
        let of = |prefix: &str, name: &str| stats.counter(join(prefix, name));
        Self {
            allowed: of(&enforced, "allowed"),
            denied: of(&enforced, "denied"),
            shadow_allowed: of(&dry, "shadow_allowed"),
            shadow_denied: of(&dry, "shadow_denied"),
            policies: join(&enforced, "policy."),
            shadow_policies: join(&dry, "policy."),
        }
    }

    pub(super) fn count(&self, allowed: bool) {
        inc(if allowed { &self.allowed } else { &self.denied });
    }

    pub(super) fn count_shadow(&self, allowed: bool) {
        inc(match allowed {
            true => &self.shadow_allowed,
            false => &self.shadow_denied,
        });
    }
}

/// Parts of a name with one dot between them (Envoy: `statPrefixJoin`).
fn join(prefix: &str, rest: &str) -> String {
    let dot = match prefix.is_empty() || rest.is_empty() || prefix.ends_with('.') {
        true => "",
        false => ".",
    };
    format!("{prefix}{dot}{rest}")
}

impl<'a> Request<'a> {
    /// `filter` counts, `rules` (the route's, where it has some) judge.
    pub(super) fn rbac(
        &self,
        filter: &Arc<Rbac>,
        rules: &'a Rbac,
        parts: &request::Parts,
        notes: &mut Notes,
    ) -> Option<LocalReply<'a>> {
        let connection = &self.exchange.connection;
        let stats = self.rbac_stats(filter);
        let view = view(self.exchange, parts);
        let direct = connection.remote.ip();
        let facts = Facts {
            request: Some(&view),
            direct,
            remote: match rules.reads_forwarded() {
                true => client_ip(self.manager, connection, &parts.headers),
                false => direct,
            },
            destination: connection.destination,
            server_name: connection
                .tls
                .as_ref()
                .and_then(|tls| tls.sni.as_deref())
                .unwrap_or(""),
            tls: connection.tls.as_deref(),
            metadata: None,
        };
        if let Some(shadow) = &rules.shadow {
            let verdict = shadow.rules.judge(&Facts {
                metadata: notes.metadata.as_deref(),
                ..facts
            });
            stats.count_shadow(verdict.allowed);
            self.count_policy(filter, &stats.shadow_policies, verdict, "shadow_");
            notes.add(HTTP_SECTION, findings(shadow, verdict));
        }
        let engine = rules.rules.as_ref()?;
        let verdict = engine.judge(&Facts {
            metadata: notes.metadata.as_deref(),
            ..facts
        });
        if engine.action == Action::Log {
            let hint = Kind::BoolValue(verdict.policy.is_some());
            notes.add(COMMON_SECTION, one("access_log_hint", hint));
        }
        stats.count(verdict.allowed);
        self.count_policy(filter, &stats.policies, verdict, "");
        if verdict.allowed {
            return None;
        }
        tracing::debug!(
            remote = %connection.remote,
            details = %format_args!("rbac_access_denied_matched_policy[{}]", name_of(verdict)),
            "refused"
        );
        let mut reply = LocalReply::new(StatusCode::FORBIDDEN, None);
        reply.body = Bytes::from_static(b"RBAC: access denied");
        Some(reply)
    }

    fn rbac_stats(&self, filter: &Arc<Rbac>) -> Arc<RbacStats> {
        let counters = &self.exchange.connection.worker.shared.counters;
        counters.rbac(filter, || {
            let shadow = filter.shadow.as_ref().map_or("", |shadow| &shadow.prefix);
            let prefix = format!("http.{}.", self.manager.filters.stats);
            RbacStats::new(&counters.stats, &prefix, &filter.stats, shadow)
        })
    }

    /// Where the configuration asks for it, each policy has statistics of its own.
    fn count_policy(&self, filter: &Rbac, prefix: &str, verdict: Verdict<'_>, kind: &str) {
        if let Some(policy) = verdict.policy.filter(|_| filter.each_policy) {
            let counters = &self.exchange.connection.worker.shared.counters;
            let result = if verdict.allowed { "allowed" } else { "denied" };
            let name = format!("{prefix}{policy}.{kind}{result}");
            inc(&counters.stats.counter(name));
        }
    }
}

/// The policy that decided, in the words of Envoy's response details.
pub(super) fn name_of<'v>(verdict: Verdict<'v>) -> &'v str {
    verdict.policy.map_or("none", |policy| policy)
}

/// What shadow rules found, as later filters look for it.
pub(super) fn findings(shadow: &Shadow, verdict: Verdict<'_>) -> Struct {
    let result = if verdict.allowed { "allowed" } else { "denied" };
    let mut fields = HashMap::with_capacity(2);
    let mut put = |name: &str, text: &str| {
        let kind = Some(Kind::StringValue(text.to_owned()));
        fields.insert(format!("{}{name}", shadow.prefix), Value { kind });
    };
    put("shadow_engine_result", result);
    if let Some(policy) = verdict.policy {
        put("shadow_effective_policy_id", policy);
    }
    Struct { fields }
}

pub(super) fn one(name: &str, kind: Kind) -> Struct {
    let value = Value { kind: Some(kind) };
    Struct {
        fields: HashMap::from([(name.to_owned(), value)]),
    }
}

/// The client's address as far as it is to be believed (Envoy: `ConnectionManagerUtility::mutateRequestHeaders`,
/// `Utility::getLastAddressFromXFF`).
fn client_ip(manager: &HttpManager, connection: &Downstream, headers: &HeaderMap) -> IpAddr {
    let direct = connection.remote.ip();
    let hops = manager.trusted_hops as usize;
    let skip = match manager.use_remote_address {
        true if hops == 0 => return direct,
        // Our own entry is the last one by now.
        true => hops - usize::from(manager.skip_xff_append),
        false => hops,
    };
    forwarded(headers, skip).unwrap_or(direct)
}

/// The address that stands `skip` places before the last one of `x-forwarded-for`.
fn forwarded(headers: &HeaderMap, skip: usize) -> Option<IpAddr> {
    let lines = headers.get_all("x-forwarded-for").into_iter();
    // By bytes: what a stranger wrote into the line may be no text, and is no reason to overlook what proxies added.
    let lines: Vec<&[u8]> = lines.map(HeaderValue::as_bytes).collect();
    let mut entries = lines.iter().rev().flat_map(|l| l.rsplit(|b| *b == b','));
    let entry = std::str::from_utf8(entries.nth(skip)?).ok()?;
    entry.trim().parse().ok()
}

impl Notes {
    /// Keeps what a filter has found out.
    pub(super) fn add(&mut self, section: &'static str, fields: Struct) {
        self.add_shared(section, Arc::new(fields));
    }

    pub(super) fn add_shared(&mut self, section: &'static str, fields: Arc<Struct>) {
        let metadata: &mut Dynamic = self.metadata.get_or_insert_default();
        metadata.add(section, fields);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_counted_from_the_end_over_all_lines() {
        let mut headers = HeaderMap::new();
        for line in ["1.1.1.1, 2.2.2.2", "3.3.3.3,nonsense"] {
            headers.append("x-forwarded-for", line.parse().unwrap());
        }
        let ip = |text: &str| text.parse::<IpAddr>().ok();
        assert_eq!(forwarded(&headers, 0), None);
        assert_eq!(forwarded(&headers, 1), ip("3.3.3.3"));
        assert_eq!(forwarded(&headers, 3), ip("1.1.1.1"));
        assert_eq!(forwarded(&headers, 4), None);
        let line = HeaderValue::from_bytes(b"\xff,4.4.4.4").unwrap();
        headers.append("x-forwarded-for", line);
        assert_eq!(forwarded(&headers, 0), ip("4.4.4.4"));
        assert_eq!(forwarded(&headers, 1), None);
        assert_eq!(forwarded(&HeaderMap::new(), 0), None);
    }
}
