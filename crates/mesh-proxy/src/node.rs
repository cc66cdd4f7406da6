//! Who this proxy is, and who a peer says it is (Istio's peer metadata headers).

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value as PbValue};
use http::{HeaderName, HeaderValue};
use mesh_telemetry::Peer;
use prost::Message;
use serde_json::Value;

use crate::options::ProxyOptions;

/// The peer's node id; its presence says that the peer speaks metadata exchange.
pub const PEER_ID: HeaderName = HeaderName::from_static("x-envoy-peer-metadata-id");
/// The peer's metadata: base64 of a protobuf Struct.
pub const PEER_METADATA: HeaderName = HeaderName::from_static("x-envoy-peer-metadata");

/// Longest metadata header that is looked into; larger ones are taken for nonsense.
const LONGEST_METADATA: usize = 16 * 1024;

/// This proxy.
#[derive(Debug)]
pub struct Identity {
    /// As metrics name it.
    pub peer: Arc<Peer>,
    /// Value of [`PEER_ID`].
    pub id_header: HeaderValue,
    /// Value of [`PEER_METADATA`].
    pub metadata_header: HeaderValue,
    /// As the control plane knows it.
    pub node: Node,
    /// Of the machine or pod; empty where unknown.
    pub hostname: String,
}

impl Identity {
    /// From the options.
    pub fn new(options: &ProxyOptions) -> Self {
        let id = options.node_id();
        let metadata = Value::Object(options.metadata.clone());
        let encoded = STANDARD.encode(exchange_struct(options).encode_to_vec());
        Self {
            peer: Arc::new(peer_of(&exchange_struct(options))),
            id_header: HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("unknown")),
            metadata_header: HeaderValue::from_str(&encoded)
                .unwrap_or(HeaderValue::from_static("")),
            node: Node {
                id,
                cluster: format!(
                    "{}.{}",
                    label(options, "app").unwrap_or("istio-proxy"),
                    options.namespace
                ),
                metadata: match to_protobuf(&metadata).kind {
                    Some(Kind::StructValue(fields)) => Some(fields),
                    _ => None,
                },
                user_agent_name: "mesh".to_owned(),
                ..Node::default()
            },
            hostname: std::fs::read_to_string("/proc/sys/kernel/hostname")
                .unwrap_or_default()
                .trim()
                .to_owned(),
        }
    }
}

fn label<'a>(options: &'a ProxyOptions, key: &str) -> Option<&'a str> {
    options.labels.get(key).map(String::as_str)
}

/// What is told to peers: Istio's keys.
fn exchange_struct(options: &ProxyOptions) -> Struct {
    let meta = |key: &str| {
        options
            .metadata
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or("")
    };
    let workload = match meta("WORKLOAD_NAME") {
        "" => options.pod.as_str(),
        name => name,
    };
    let wanted = [
        "app",
        "version",
        "service.istio.io/canonical-name",
        "service.istio.io/canonical-revision",
    ];
    let labels: HashMap<String, PbValue> = wanted
        .iter()
        .filter_map(|key| Some(((*key).to_owned(), text(label(options, key)?))))
        .collect();
    let fields = [
        ("NAME", text(&options.pod)),
        ("NAMESPACE", text(&options.namespace)),
        ("OWNER", text(meta("OWNER"))),
        ("WORKLOAD_NAME", text(workload)),
        ("CLUSTER_ID", text(meta("CLUSTER_ID"))),
        (
            "LABELS",
            PbValue {
                kind: Some(Kind::StructValue(Struct { fields: labels })),
            },
        ),
    ];
    Struct {
        fields: fields
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
    }
}

fn text(value: &str) -> PbValue {
    PbValue {
        kind: Some(Kind::StringValue(value.to_owned())),
    }
}

fn to_protobuf(value: &Value) -> PbValue {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(*value),
        Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
        Value::String(value) => Kind::StringValue(value.clone()),
        Value::Array(values) => Kind::ListValue(ListValue {
            values: values.iter().map(to_protobuf).collect(),
        }),
        Value::Object(fields) => Kind::StructValue(Struct {
            fields: fields
                .iter()
                .map(|(key, value)| (key.clone(), to_protobuf(value)))
                .collect(),
        }),
    };
    PbValue { kind: Some(kind) }
}

/// The peer in a metadata header; `None` for nonsense.
pub fn parse_peer(header: &HeaderValue) -> Option<Peer> {
    if header.len() > LONGEST_METADATA {
        return None;
    }
    let bytes = STANDARD.decode(header.as_bytes()).ok()?;
    Some(peer_of(&Struct::decode(bytes.as_slice()).ok()?))
}

fn peer_of(fields: &Struct) -> Peer {
    fn get<'a>(fields: &'a Struct, key: &str) -> Option<&'a str> {
        match fields.fields.get(key)?.kind.as_ref()? {
            Kind::StringValue(text) if !text.is_empty() => Some(text),
            _ => None,
        }
    }
    let none = Struct::default();
    let labels = match fields.fields.get("LABELS").and_then(|v| v.kind.as_ref()) {
        Some(Kind::StructValue(labels)) => labels,
        _ => &none,
    };
    let unknown = Peer::default();
    let or =
        |found: Option<&str>, default: &Arc<str>| found.map_or_else(|| default.clone(), Arc::from);
    let app = get(labels, "app");
    let workload = get(fields, "WORKLOAD_NAME");
    Peer {
        workload: or(workload, &unknown.workload),
        namespace: or(get(fields, "NAMESPACE"), &unknown.namespace),
        principal: unknown.principal.clone(),
        app: or(app, &unknown.app),
        version: or(get(labels, "version"), &unknown.version),
        canonical_service: or(
            get(labels, "service.istio.io/canonical-name")
                .or(app)
                .or(workload),
            &unknown.canonical_service,
        ),
        canonical_revision: or(
            get(labels, "service.istio.io/canonical-revision").or(get(labels, "version")),
            &unknown.canonical_revision,
        ),
        cluster: or(get(fields, "CLUSTER_ID"), &unknown.cluster),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_names_nobody() {
        assert!(parse_peer(&HeaderValue::from_static("%%%")).is_none());
        assert!(parse_peer(&HeaderValue::from_static("/////w==")).is_none());
    }
}
