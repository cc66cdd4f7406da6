//! From cases to the xDS that both proxies are served: one listener, one route table and the case's own clusters for each.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, bail, ensure};
use mesh_xds::{Resource, ResourceSet};
use serde_json::{Map, Value, json};

use super::case::{Case, ClusterSpec};
use super::upstream::Upstream;

const MANAGER: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Which proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The stock Envoy.
    Envoy,
    /// Ours.
    Mesh,
}

impl Side {
    /// The first letter of its requests' ids, and what its node id begins with.
    pub(super) fn letter(self) -> char {
        match self {
            Self::Envoy => 'e',
            Self::Mesh => 'm',
        }
    }

    /// Where its listener for a case is.
    pub(super) fn listener(self, port: u16, case: usize) -> SocketAddr {
        let net = match self {
            Self::Envoy => 1,
            Self::Mesh => 2,
        };
        let host = |n: usize| u8::try_from(n).unwrap_or(u8::MAX);
        (
            Ipv4Addr::new(127, net, host(case / 200), host(case % 200 + 1)),
            port,
        )
            .into()
    }
}

/// Makes the resources of all cases for one proxy.
pub(super) struct Maker<'a> {
    pub(super) side: Side,
    /// All listeners' port.
    pub(super) port: u16,
    pub(super) upstream: &'a Upstream,
    /// Envoy writes its log here. Ours tells the same by its metrics, and takes no access log.
    pub(super) access_log: &'a str,
    pub(super) cases: &'a [Case],
    /// Where certificates are; stands for `PKI` in paths of a case.
    pub(super) certificates: &'a str,
}

/// The name of a case's listener and route table.
pub(super) fn name(case: usize) -> String {
    format!("case-{case:04}")
}

impl Maker<'_> {
    pub(super) fn make(&self) -> anyhow::Result<ResourceSet> {
        let mut set = ResourceSet::new();
        for (name, spec) in self.common_clusters() {
            self.cluster(&mut set, &name, &spec)?;
        }
        for (i, case) in self.cases.iter().enumerate() {
            self.case(&mut set, i, case)
                .with_context(|| format!("case {}", case.name))?;
        }
        Ok(set)
    }

    /// The clusters that every case can name: `e1` to `e8` with one endpoint each, the same in HTTP/2 as `h1` to `h8`, `t1` to `t8` of
    /// TCP echoes, `b1` and `b2` that speak first, `dead` and `empty`.
    fn common_clusters(&self) -> Vec<(String, ClusterSpec)> {
        let one = |endpoint: String, http2| ClusterSpec {
            endpoints: vec![Value::String(endpoint)],
            http2,
            ..ClusterSpec::default()
        };
        let mut all = Vec::new();
        for n in 1..=8 {
            all.push((format!("e{n}"), one(n.to_string(), false)));
            all.push((format!("h{n}"), one(n.to_string(), true)));
            all.push((format!("t{n}"), one(format!("tcp{n}"), false)));
        }
        for n in 1..=2 {
            all.push((format!("b{n}"), one(format!("banner{n}"), false)));
        }
        all.push(("dead".to_owned(), one("dead".to_owned(), false)));
        all.push(("empty".to_owned(), ClusterSpec::default()));
        all
    }

    fn case(&self, set: &mut ResourceSet, i: usize, case: &Case) -> anyhow::Result<()> {
        let own: Vec<&str> = case.clusters.keys().map(String::as_str).collect();
        for (cluster, spec) in &case.clusters {
            self.cluster(set, &format!("{}/{cluster}", name(i)), spec)?;
        }
        let chains = if case.chains.is_empty() {
            let mut table = self.table(i, case);
            qualify(&mut table, &own, i);
            self.insert(set, "route.v3.RouteConfiguration", &name(i), &table)?;
            let mut chain = self.manager_chain(i, case);
            merge(&mut chain, &case.chain);
            vec![chain]
        } else {
            case.chains.clone()
        };
        let address = self.side.listener(self.port, i);
        let mut listener = json!({
            "name": name(i),
            "address": socket_address(address),
            "filter_chains": chains,
        });
        merge(&mut listener, &case.listener);
        qualify(&mut listener, &own, i);
        self.insert(set, "listener.v3.Listener", &name(i), &listener)
    }

    fn table(&self, i: usize, case: &Case) -> Value {
        let hosts = if case.virtual_hosts.is_empty() {
            let mut host = json!({"name": "all", "domains": ["*"], "routes": case.routes});
            merge(&mut host, &case.host);
            vec![host]
        } else {
            case.virtual_hosts.clone()
        };
        let mut table = json!({"name": name(i), "virtual_hosts": hosts});
        merge(&mut table, &case.table);
        table
    }

    fn manager_chain(&self, i: usize, case: &Case) -> Value {
        let mut filters = case.filters.clone();
        filters.push(json!({"name": "envoy.filters.http.router", "typed_config":
            {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}));
        let mut manager = json!({
            "@type": MANAGER,
            "stat_prefix": name(i),
            "rds": {"config_source": {"ads": {}, "resource_api_version": "V3"}, "route_config_name": name(i)},
            "http_filters": filters,
        });
        merge(&mut manager, &case.manager);
        if self.side == Side::Envoy {
            // Envoy waits a second before it closes a connection on which it refused something: too long to watch.
            manager["delayed_close_timeout"] = json!("0.1s");
            manager["access_log"] = json!([{"name": "envoy.access_loggers.file", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": self.access_log,
                "log_format": {"text_format_source": {"inline_string": "%RESPONSE_CODE% %RESPONSE_FLAGS%\n"}},
            }}]);
        }
        json!({"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]})
    }

    fn cluster(&self, set: &mut ResourceSet, name: &str, spec: &ClusterSpec) -> anyhow::Result<()> {
        let mut cluster = json!({"name": name, "connect_timeout": "1s", "type": "EDS",
            "eds_cluster_config": {"eds_config": {"ads": {}, "resource_api_version": "V3"}, "service_name": name}});
        if spec.http2 {
            cluster["typed_extension_protocol_options"] = json!({HTTP_OPTIONS: {
                "@type": format!("type.googleapis.com/{HTTP_OPTIONS}"),
                "explicit_http_config": {"http2_protocol_options": {}},
            }});
        }
        merge(&mut cluster, &spec.fields);
        let endpoints = spec
            .endpoints
            .iter()
            .map(|endpoint| self.endpoint(endpoint))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut assignment = json!({"cluster_name": name, "endpoints": []});
        if !endpoints.is_empty() {
            assignment["endpoints"] = json!([{"lb_endpoints": endpoints}]);
        }
        if let Some(given) = cluster.as_object_mut().and_then(|c| c.remove("localities")) {
            assignment["endpoints"] = self.localities(given)?;
        }
        self.insert(set, "cluster.v3.Cluster", name, &cluster)?;
        self.insert(set, "endpoint.v3.ClusterLoadAssignment", name, &assignment)
    }

    /// `LocalityLbEndpoints` in which an endpoint may be given by its name.
    fn localities(&self, mut given: Value) -> anyhow::Result<Value> {
        for locality in given.as_array_mut().into_iter().flatten() {
            if let Some(endpoints) = locality["lb_endpoints"].as_array_mut() {
                for endpoint in endpoints {
                    *endpoint = self.endpoint(endpoint)?;
                }
            }
        }
        Ok(given)
    }

    /// The listener of a case: `self` is this proxy's, `other` the other one's.
    fn proxy(&self, whose: &str, case: &str) -> anyhow::Result<SocketAddr> {
        let side = match (whose, self.side) {
            ("self", side) => side,
            ("other", Side::Envoy) => Side::Mesh,
            ("other", Side::Mesh) => Side::Envoy,
            _ => bail!("{whose:?} is neither self nor other"),
        };
        let at = self.cases.iter().position(|known| known.name == case);
        let at = at.with_context(|| format!("there is no case {case:?} to send to"))?;
        Ok(side.listener(self.port, at))
    }

    /// An endpoint by its name, or an object with its name as `at` and further fields of `LbEndpoint`.
    fn endpoint(&self, endpoint: &Value) -> anyhow::Result<Value> {
        let name = match endpoint {
            Value::Object(fields) => &fields["at"],
            plain => plain,
        };
        let name = name
            .as_str()
            .map_or_else(|| name.to_string(), str::to_owned);
        let address = match name.split_once(':') {
            Some((whose, case)) => self.proxy(whose, case)?,
            None => self.upstream.address(&name)?,
        };
        let mut made = json!({"endpoint": {"address": socket_address(address)}});
        if let Value::Object(fields) = endpoint {
            let mut fields = fields.clone();
            fields.remove("at");
            merge(&mut made, &fields);
        }
        Ok(made)
    }

    fn insert(
        &self,
        set: &mut ResourceSet,
        kind: &str,
        name: &str,
        value: &Value,
    ) -> anyhow::Result<()> {
        let type_url = format!("type.googleapis.com/envoy.config.{kind}");
        mesh_xds::json::Descriptors::keep();
        let text = value.to_string();
        let placed = match text.contains("\"PKI/") {
            true => {
                serde_json::from_str(&text.replace("\"PKI/", &format!("\"{}/", self.certificates)))?
            }
            false => value.clone(),
        };
        let bytes = mesh_xds::json::from_json(&type_url, &placed)
            .with_context(|| format!("making {kind} {name}"))?;
        ensure!(
            set.find(&type_url, name).is_none(),
            "{kind} {name} is there twice"
        );
        set.insert(Resource {
            name: name.to_owned(),
            version: "1".to_owned(),
            type_url,
            value: bytes.into(),
        });
        Ok(())
    }
}

fn socket_address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// Puts `fields` over `value`: objects are merged, everything else replaced.
fn merge(value: &mut Value, fields: &Map<String, Value>) {
    for (name, field) in fields {
        match (&mut value[name.as_str()], field) {
            (old @ Value::Object(_), Value::Object(new)) => merge(old, new),
            (old, new) => *old = new.clone(),
        }
    }
}

/// Writes the case's own clusters as they are called in the set.
fn qualify(value: &mut Value, own: &[&str], case: usize) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(|item| qualify(item, own, case)),
        Value::Object(fields) => {
            for (name, field) in fields.iter_mut() {
                if name == "clusters"
                    && let Some(list) = field.as_array_mut()
                {
                    for entry in list {
                        rename(&mut entry["name"], own, case);
                        qualify(entry, own, case);
                    }
                } else if name == "cluster" || name == "cluster_name" {
                    rename(field, own, case);
                } else {
                    qualify(field, own, case);
                }
            }
        }
        _ => {}
    }
}

fn rename(field: &mut Value, own: &[&str], case: usize) {
    if let Some(cluster) = field.as_str().filter(|cluster| own.contains(cluster)) {
        *field = Value::String(format!("{}/{cluster}", name(case)));
    }
}
