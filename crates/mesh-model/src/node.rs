//! The proxy that configuration is made for.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

/// What a proxy is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeKind {
    /// Beside an application, all of whose traffic it captures.
    Sidecar,
    /// On its own: ingress or egress gateway.
    Router,
}

/// A connected proxy.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// What it is for.
    pub kind: NodeKind,
    /// The whole id, `TYPE~IP~POD.NAMESPACE~DOMAIN`.
    pub id: String,
    /// Its addresses, the one from the id first.
    pub ips: Vec<IpAddr>,
    /// Name of the pod.
    pub name: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// DNS domain of the id, for instance `default.svc.cluster.local`.
    pub domain: String,
    /// Labels of the pod, as the proxy reports them.
    pub labels: BTreeMap<String, String>,
    /// Container ports by name, as the proxy reports them.
    pub named_ports: BTreeMap<String, u16>,
    /// Everything that the proxy reports about itself.
    pub metadata: Value,
    /// True if the proxy is neither ours nor Istio's: no filters beside Envoy's own are sent.
    pub stock_envoy: bool,
    /// Version of Istio or mesh that the proxy reports; empty if none.
    pub version: String,
}

/// Why a node id is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// Not four parts.
    #[error(
        "node id {0:?} has not the form TYPE~IP~POD.NAMESPACE~DOMAIN; set it in the proxy's bootstrap (node.id)"
    )]
    Form(String),
    /// A type that is not served.
    #[error("node id {id:?} has type {kind:?}; this control plane serves sidecar and router")]
    Kind {
        /// The whole id.
        id: String,
        /// The type in it.
        kind: String,
    },
    /// The second part is no address.
    #[error("node id {id:?} has {address:?} where the address of the pod belongs")]
    Address {
        /// The whole id.
        id: String,
        /// What stands there.
        address: String,
    },
}

impl Node {
    /// Reads a node's id (`TYPE~IP~POD.NAMESPACE~DOMAIN`, Istio's form) and metadata (`LABELS`, `NAMESPACE`, `INSTANCE_IPS`, `POD_PORTS`,
    /// `ISTIO_VERSION`, `MESH_VERSION`; all optional).
    ///
    /// # Errors
    /// An id of another form.
    pub fn from_xds_id(id: &str, metadata: &Value) -> Result<Self, NodeError> {
        let parts: Vec<&str> = id.split('~').collect();
        let [kind, address, pod, domain] = parts[..] else {
            return Err(NodeError::Form(id.to_owned()));
        };
        let kind = match kind {
            "sidecar" => NodeKind::Sidecar,
            "router" => NodeKind::Router,
            other => {
                return Err(NodeError::Kind {
                    id: id.to_owned(),
                    kind: other.to_owned(),
                });
            }
        };
        let Ok(address) = address.parse() else {
            return Err(NodeError::Address {
                id: id.to_owned(),
                address: address.to_owned(),
            });
        };
        let (name, namespace) = pod.rsplit_once('.').unwrap_or((pod, ""));
        let namespace = if namespace.is_empty() {
            text(metadata, "NAMESPACE")
        } else {
            namespace
        };
        if name.is_empty() || namespace.is_empty() {
            return Err(NodeError::Form(id.to_owned()));
        }
        let istio = text(metadata, "ISTIO_VERSION");
        let ours = text(metadata, "MESH_VERSION");
        Ok(Self {
            kind,
            id: id.to_owned(),
            ips: addresses(address, metadata),
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            domain: domain.to_owned(),
            labels: labels(metadata),
            named_ports: named_ports(metadata),
            stock_envoy: istio.is_empty() && ours.is_empty(),
            version: if ours.is_empty() { istio } else { ours }.to_owned(),
            metadata: metadata.clone(),
        })
    }

    /// The cluster's DNS domain: what follows `.svc.` in the node's domain, `cluster.local` where that is missing.
    pub fn cluster_domain(&self) -> &str {
        self.domain
            .split_once(".svc.")
            .map_or("cluster.local", |(_, domain)| domain)
    }

    /// True if the proxy asks to serve HTTP/1.0 too (`HTTP10` is `1`, from `ISTIO_META_HTTP10`).
    pub fn http10(&self) -> bool {
        text(&self.metadata, "HTTP10") == "1"
    }

    /// True if connections reach the proxy with both of their addresses as they were (`INTERCEPTION_MODE` is `TPROXY`).
    pub fn intercepts_transparently(&self) -> bool {
        text(&self.metadata, "INTERCEPTION_MODE") == "TPROXY"
    }

    /// True if the proxy answers its application's DNS queries (`DNS_CAPTURE` is true, from `ISTIO_META_DNS_CAPTURE`).
    pub fn captures_dns(&self) -> bool {
        let said = text(&self.metadata, "DNS_CAPTURE");
        matches!(said, "1" | "t" | "T" | "true" | "TRUE" | "True")
    }

    /// Name of the cluster that the proxy reports; `Kubernetes` where it reports none.
    pub fn cluster_id(&self) -> &str {
        match text(&self.metadata, "CLUSTER_ID") {
            "" => "Kubernetes",
            id => id,
        }
    }
}

fn text<'a>(metadata: &'a Value, key: &str) -> &'a str {
    metadata
        .get(key)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn labels(metadata: &Value) -> BTreeMap<String, String> {
    let labels = metadata.get("LABELS").and_then(Value::as_object);
    let pairs = labels
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
    pairs.collect()
}

/// The address of the id first, then those of `INSTANCE_IPS` (comma-separated).
fn addresses(first: IpAddr, metadata: &Value) -> Vec<IpAddr> {
    let mut all = vec![first];
    for address in text(metadata, "INSTANCE_IPS")
        .split(',')
        .filter_map(|part| part.trim().parse().ok())
    {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// `POD_PORTS` is a list, or a text that holds one: `[{"name":"http","containerPort":9080}]`.
fn named_ports(metadata: &Value) -> BTreeMap<String, u16> {
    let ports = match metadata.get("POD_PORTS") {
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_default(),
        Some(value) => value.clone(),
        None => Value::Null,
    };
    let named = ports.as_array().into_iter().flatten().filter_map(|port| {
        let number = port.get("containerPort")?.as_u64()?;
        Some((
            port.get("name")?.as_str()?.to_owned(),
            u16::try_from(number).ok()?,
        ))
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_istios_form() {
        let metadata = json!({
            "ISTIO_VERSION": "1.30.0", "LABELS": {"app": "reviews"}, "INSTANCE_IPS": "10.244.0.5,fe80::1",
            "POD_PORTS": "[{\"name\":\"http\",\"containerPort\":9080},{\"containerPort\":1}]",
        });
        let node = Node::from_xds_id(
            "sidecar~10.244.0.5~reviews-v1-x.default~default.svc.cluster.local",
            &metadata,
        )
        .unwrap();
        assert_eq!(
            (node.kind, node.name.as_str(), node.namespace.as_str()),
            (NodeKind::Sidecar, "reviews-v1-x", "default")
        );
        assert_eq!(node.ips.len(), 2);
        assert_eq!(node.labels["app"], "reviews");
        assert_eq!(node.named_ports, [("http".to_owned(), 9080)].into());
        assert!(!node.stock_envoy);
        assert_eq!(node.cluster_domain(), "cluster.local");
    }

    #[test]
    fn a_node_that_announces_nothing_is_a_stock_envoy() {
        assert!(
            Node::from_xds_id("router~10.0.0.1~gw.ns~ns.svc.cluster.local", &json!({}))
                .unwrap()
                .stock_envoy
        );
        assert!(
            !Node::from_xds_id("router~10.0.0.1~gw.ns~d", &json!({"MESH_VERSION": "0.1.0"}))
                .unwrap()
                .stock_envoy
        );
    }

    #[test]
    fn refuses_other_forms() {
        let read = |id: &str| Node::from_xds_id(id, &json!({}));
        assert!(matches!(read("x"), Err(NodeError::Form(_))));
        assert!(matches!(
            read("sidecar~10.0.0.1~pod~d"),
            Err(NodeError::Form(_))
        ));
        assert!(matches!(
            read("ztunnel~10.0.0.1~a.b~d"),
            Err(NodeError::Kind { .. })
        ));
        assert!(matches!(
            read("sidecar~here~a.b~d"),
            Err(NodeError::Address { .. })
        ));
    }
}
