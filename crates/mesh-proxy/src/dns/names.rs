//! Which names the mesh answers, and what. Pure.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::op::{Message, Metadata, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use mesh_xds::json::{NameInfo, NameTable};
use prost::Message as _;
use rand::seq::SliceRandom;

use crate::options::ProxyOptions;

/// Seconds that an answer may be kept (Istio's agent).
const TTL: u32 = 30;
/// The registry of services that have short names.
const KUBERNETES: &str = "Kubernetes";

/// The table of names, ready for questions.
#[derive(Debug)]
pub struct Names {
    /// As it came.
    table: NameTable,
    /// Lower case, without the dot at the end; `*.` may begin a name.
    hosts: HashMap<String, Arc<[IpAddr]>, foldhash::fast::RandomState>,
    /// What the application's resolver tries first behind a name, with a dot before it.
    search: Option<String>,
}

impl Names {
    /// Reads what the control plane sent.
    pub(super) fn decode(value: &[u8], options: &ProxyOptions) -> Result<Self, String> {
        let table =
            NameTable::decode(value).map_err(|error| format!("does not decode: {error}"))?;
        let search = options.dns.as_ref().and_then(|dns| dns.search.first());
        Ok(Self::new(
            table,
            &options.namespace,
            &options.domain,
            search.map(String::as_str),
        ))
    }

    fn new(table: NameTable, namespace: &str, domain: &str, search: Option<&str>) -> Self {
        // `default.svc.cluster.local`, of which the namespace is not wanted.
        let domain = domain
            .strip_prefix(namespace)
            .and_then(|rest| rest.strip_prefix('.'))
            .unwrap_or(domain);
        let mut hosts = HashMap::default();
        for (host, info) in &table.table {
            let addresses: Arc<[IpAddr]> =
                info.ips.iter().filter_map(|ip| ip.parse().ok()).collect();
            if addresses.is_empty() {
                continue;
            }
            for name in other_names(host, info, namespace, domain) {
                // A host of its own is not to be hidden by a short form of another one.
                hosts.entry(name).or_insert_with(|| addresses.clone());
            }
            hosts.insert(plain(host), addresses);
        }
        Self {
            table,
            hosts,
            search: search.map(|search| format!(".{}", plain(search))),
        }
    }

    pub(super) fn to_json(&self) -> serde_json::Value {
        self.table.to_json()
    }

    /// The answer to a query with one question; `None` where the pod's resolvers have to be asked.
    pub(super) fn answer(&self, query: &Message) -> Option<Message> {
        let question = query.queries.first()?;
        let asked = plain(&question.name().to_ascii());
        let (host, addresses) = self.find(&asked)?;
        let kind = question.query_type;
        if !matches!(kind, RecordType::A | RecordType::AAAA) {
            return None;
        }
        let mut response = reply(query);
        response.metadata.authoritative = true;
        // A name without addresses of this family exists nevertheless: no error, so that clients don't give up the other family.
        let mut records: Vec<RData> = addresses
            .iter()
            .filter_map(|address| match (address, kind) {
                (IpAddr::V4(ip), RecordType::A) => Some(RData::A(A(*ip))),
                (IpAddr::V6(ip), RecordType::AAAA) => Some(RData::AAAA(AAAA(*ip))),
                _ => None,
            })
            .collect();
        // Clients take the first: those of a headless service share the work.
        records.shuffle(&mut rand::rng());
        let mut owner = question.name().clone();
        if let Some(host) = host.filter(|_| !records.is_empty()) {
            let name = Name::from_ascii(format!("{host}.")).ok()?;
            let alias = RData::CNAME(CNAME(name.clone()));
            response.answers.push(Record::from_rdata(owner, TTL, alias));
            owner = name;
        }
        let records = records
            .into_iter()
            .map(|data| Record::from_rdata(owner.clone(), TTL, data));
        response.answers.extend(records);
        Some(response)
    }

    /// The addresses of a name. With the name that it is an alias of where the application's resolver has put the first search domain behind it:
    /// the answer spares it all other attempts.
    fn find<'a>(&self, asked: &'a str) -> Option<(Option<&'a str>, &Arc<[IpAddr]>)> {
        if let Some(addresses) = self.hosts.get(asked) {
            return Some((None, addresses));
        }
        let shorter = self
            .search
            .as_deref()
            .and_then(|search| asked.strip_suffix(search));
        if let Some(shorter) = shorter
            && let Some(addresses) = self.hosts.get(shorter).or_else(|| self.wildcard(shorter))
        {
            return Some((Some(shorter), addresses));
        }
        Some((None, self.wildcard(asked)?))
    }

    /// The narrowest wildcard that a name falls under.
    fn wildcard(&self, name: &str) -> Option<&Arc<[IpAddr]>> {
        let parents = name.match_indices('.').map(|(at, _)| &name[at..]);
        parents
            .filter_map(|parent| self.hosts.get(&format!("*{parent}")))
            .next()
    }
}

/// Lower case, without the dot at the end.
pub(super) fn plain(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// Short forms of a Kubernetes service's name (Istio: of services of the proxy's own cluster alone).
fn other_names(host: &str, info: &NameInfo, namespace: &str, domain: &str) -> Vec<String> {
    if info.registry != KUBERNETES || domain.is_empty() || !host.ends_with(domain) {
        return Vec::new();
    }
    let NameInfo {
        shortname,
        namespace: own,
        ..
    } = info;
    let first = domain.split('.').next().unwrap_or(domain);
    let mut names = vec![
        plain(&format!("{shortname}.{own}")),
        plain(&format!("{shortname}.{own}.{first}")),
    ];
    if own == namespace {
        names.push(plain(shortname));
    }
    names
}

fn reply(query: &Message) -> Message {
    let mut response = Message::response(query.metadata.id, query.metadata.op_code);
    response.metadata = Metadata::response_from_request(&query.metadata);
    response.metadata.recursion_available = true;
    response.queries = query.queries.clone();
    response
}

/// An answer that says that there is none.
pub(super) fn failure(query: &Message, code: ResponseCode) -> Message {
    let mut response = reply(query);
    response.metadata.response_code = code;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use std::str::FromStr as _;

    fn names() -> Names {
        let entry = |host: &str, ips: &[&str], registry: &str| {
            let mut parts = host.split('.').map(str::to_owned);
            let (shortname, namespace) = match registry {
                KUBERNETES => (parts.next(), parts.next()),
                _ => (None, None),
            };
            let info = NameInfo {
                ips: ips.iter().map(|ip| (*ip).to_owned()).collect(),
                registry: registry.to_owned(),
                shortname: shortname.unwrap_or_default(),
                namespace: namespace.unwrap_or_default(),
            };
            (host.to_owned(), info)
        };
        let table = NameTable {
            table: [
                entry("web.default.svc.cluster.local", &["10.96.1.1"], KUBERNETES),
                entry(
                    "db.other.svc.cluster.local",
                    &["10.244.0.5", "10.244.0.6", "fd00::6"],
                    KUBERNETES,
                ),
                entry("far.default.svc.other.test", &["10.96.9.9"], KUBERNETES),
                entry("Example.test", &["240.240.0.1"], "External"),
                entry("*.wild.test", &["240.240.0.2"], "External"),
                entry("*.narrow.wild.test", &["240.240.0.3"], "External"),
                entry("bad.test", &["no address"], "External"),
            ]
            .into(),
        };
        Names::new(
            table,
            "default",
            "default.svc.cluster.local",
            Some("default.svc.cluster.local"),
        )
    }

    /// The answer's code, and its records.
    fn ask(name: &str, kind: RecordType) -> Option<(ResponseCode, Vec<String>)> {
        let mut query = Message::query();
        query
            .queries
            .push(Query::query(Name::from_str(name).expect("a name"), kind));
        let answer = names().answer(&query)?;
        assert!(answer.metadata.authoritative);
        let mut records: Vec<String> = answer
            .answers
            .iter()
            .map(|record| format!("{} {} {}", record.name, record.ttl, record.data))
            .collect();
        records.sort();
        Some((answer.metadata.response_code, records))
    }

    #[test]
    fn services_have_their_short_names() {
        for name in [
            "web.",
            "web.default.",
            "web.default.svc.",
            "web.default.svc.cluster.local.",
            "WEB.Default.",
        ] {
            let (code, records) = ask(name, RecordType::A).expect(name);
            assert_eq!(code, ResponseCode::NoError);
            let name = name.to_lowercase();
            assert_eq!(records, [format!("{name} 30 10.96.1.1")]);
        }
        assert!(ask("db.other.", RecordType::A).is_some());
        // Not in its own namespace, and one of another cluster's domain.
        for name in [
            "db.",
            "far.",
            "far.default.",
            "web.default.svc.cluster.",
            "bad.test.",
            "nothing.test.",
        ] {
            assert_eq!(ask(name, RecordType::A), None, "{name}");
        }
    }

    #[test]
    fn families_are_told_apart_and_other_types_forwarded() {
        let name = "db.other.svc.cluster.local.";
        let (_, v4) = ask(name, RecordType::A).expect("an answer");
        assert_eq!(
            v4,
            [
                format!("{name} 30 10.244.0.5"),
                format!("{name} 30 10.244.0.6")
            ]
        );
        let (_, v6) = ask(name, RecordType::AAAA).expect("an answer");
        assert_eq!(v6, [format!("{name} 30 fd00::6")]);
        let none = ask("web.", RecordType::AAAA);
        assert_eq!(none, Some((ResponseCode::NoError, Vec::new())));
        assert_eq!(ask(name, RecordType::SRV), None);
    }

    #[test]
    fn what_the_resolver_puts_behind_a_name_is_seen_through() {
        let asked = "example.test.default.svc.cluster.local.";
        let (code, records) = ask(asked, RecordType::A).expect("an answer");
        assert_eq!(code, ResponseCode::NoError);
        assert_eq!(
            records,
            [
                "example.test. 30 240.240.0.1".to_owned(),
                format!("{asked} 30 example.test."),
            ]
        );
        let (_, records) =
            ask("a.wild.test.default.svc.cluster.local.", RecordType::A).expect("an answer");
        assert_eq!(
            records[1],
            "a.wild.test.default.svc.cluster.local. 30 a.wild.test."
        );
        assert_eq!(records[0], "a.wild.test. 30 240.240.0.2");
        // Only the first domain: the others come after it.
        assert_eq!(ask("example.test.svc.cluster.local.", RecordType::A), None);
    }

    #[test]
    fn the_narrowest_wildcard_answers() {
        for (name, address) in [
            ("a.wild.test.", "240.240.0.2"),
            ("a.b.wild.test.", "240.240.0.2"),
            ("narrow.wild.test.", "240.240.0.2"),
            ("a.narrow.wild.test.", "240.240.0.3"),
        ] {
            let (_, records) = ask(name, RecordType::A).expect(name);
            assert_eq!(records, [format!("{name} 30 {address}")]);
        }
        assert_eq!(ask("wild.test.", RecordType::A), None);
    }
}
