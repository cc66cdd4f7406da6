//! Metadata for Envoy's messages, with maps in a fixed order: the generated types keep maps as hash maps, whose order changes from run to
//! run, and resources have to be the same bytes each time.

use std::collections::{BTreeMap, HashMap};

use envoy_types::pb::envoy::config::core::v3::Metadata;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value};
use mesh_model::ObjectKey;
use prost::Message;

use crate::pb::ordered_map;

/// Istio's key in `filter_metadata`.
const ISTIO: &str = "istio";

/// Metadata with one text under `istio`; maps of one entry have only one order.
pub(crate) fn single(key: &str, text: String) -> Option<Metadata> {
    Some(Metadata {
        filter_metadata: HashMap::from([(ISTIO.to_owned(), fields(key, text))]),
        ..Metadata::default()
    })
}

/// Key under which Envoy looks for what chooses an endpoint's transport.
const TRANSPORT: &str = "envoy.transport_socket_match";

/// What endpoints with mutual TLS say, and what chooses it.
pub(crate) fn tls_mode() -> Struct {
    fields("tlsMode", "istio".to_owned())
}

/// Metadata of an endpoint: the workload behind it, and whether it takes mutual TLS.
pub(crate) fn endpoint(workload: String, mutual_tls: bool) -> Metadata {
    let istio = (ISTIO.to_owned(), fields("workload", workload));
    let transport = mutual_tls.then(|| (TRANSPORT.to_owned(), tls_mode()));
    Metadata {
        filter_metadata: ordered_map([istio].into_iter().chain(transport)),
        ..Metadata::default()
    }
}

fn fields(key: &str, text: String) -> Struct {
    let value = Value {
        kind: Some(Kind::StringValue(text)),
    };
    Struct {
        fields: HashMap::from([(key.to_owned(), value)]),
    }
}

/// The path by which Istio refers to an object in metadata.
pub(crate) fn config_path(key: &ObjectKey) -> String {
    format!(
        "/apis/networking.istio.io/v1/namespaces/{}/{}/{}",
        key.namespace,
        kebab(&key.kind),
        key.name
    )
}

/// `VirtualService` to `virtual-service`.
fn kebab(kind: &str) -> String {
    let mut out = String::with_capacity(kind.len() + 2);
    for (index, letter) in kind.char_indices() {
        if letter.is_ascii_uppercase() && index > 0 {
            out.push('-');
        }
        out.push(letter.to_ascii_lowercase());
    }
    out
}

/// A value of `google.protobuf.Struct`, field numbers as published in `struct.proto`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct OrderedValue {
    #[prost(oneof = "OrderedKind", tags = "3, 5, 6")]
    kind: Option<OrderedKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum OrderedKind {
    #[prost(string, tag = "3")]
    Text(String),
    #[prost(message, tag = "5")]
    Struct(OrderedStruct),
    #[prost(message, tag = "6")]
    List(OrderedList),
}

/// `google.protobuf.Struct` with ordered fields.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct OrderedStruct {
    #[prost(btree_map = "string, message", tag = "1")]
    fields: BTreeMap<String, OrderedValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct OrderedList {
    #[prost(message, repeated, tag = "1")]
    values: Vec<OrderedValue>,
}

/// `envoy.config.core.v3.Metadata`, `filter_metadata` only.
#[derive(Clone, PartialEq, prost::Message)]
struct OrderedMetadata {
    #[prost(btree_map = "string, message", tag = "1")]
    filter_metadata: BTreeMap<String, OrderedStruct>,
}

/// A cluster with nothing but metadata (field 25 of `envoy.config.cluster.v3.Cluster`): appended to an encoded cluster it becomes its metadata, since
/// concatenation merges messages (protobuf's encoding rules).
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ClusterMetadata {
    #[prost(message, optional, tag = "25")]
    metadata: Option<OrderedMetadata>,
}

pub(crate) fn text(value: impl Into<String>) -> OrderedValue {
    OrderedValue {
        kind: Some(OrderedKind::Text(value.into())),
    }
}

pub(crate) fn list(values: impl IntoIterator<Item = OrderedValue>) -> OrderedValue {
    OrderedValue {
        kind: Some(OrderedKind::List(OrderedList {
            values: values.into_iter().collect(),
        })),
    }
}

pub(crate) fn structure<const N: usize>(fields: [(&str, OrderedValue); N]) -> OrderedValue {
    OrderedValue {
        kind: Some(OrderedKind::Struct(OrderedStruct {
            fields: fields.map(|(key, value)| (key.to_owned(), value)).into(),
        })),
    }
}

/// Encodes `istio: {fields}` as the metadata of a cluster, to be appended to the encoded cluster.
pub(crate) fn append_to_cluster(body: &mut Vec<u8>, fields: BTreeMap<String, OrderedValue>) {
    let istio = OrderedStruct { fields };
    let metadata = OrderedMetadata {
        filter_metadata: BTreeMap::from([(ISTIO.to_owned(), istio)]),
    };
    body.extend(
        ClusterMetadata {
            metadata: Some(metadata),
        }
        .encode_to_vec(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::cluster::v3::Cluster;

    #[test]
    fn appended_metadata_is_the_clusters() {
        let mut body = Cluster {
            name: "x".to_owned(),
            ..Cluster::default()
        }
        .encode_to_vec();
        let service = structure([("host", text("a.b")), ("name", text("a"))]);
        append_to_cluster(
            &mut body,
            [
                ("services".to_owned(), list([service])),
                ("subset".to_owned(), text("v1")),
            ]
            .into(),
        );
        let cluster = Cluster::decode(body.as_slice()).unwrap();
        assert_eq!(cluster.name, "x");
        let istio = &cluster.metadata.unwrap().filter_metadata["istio"];
        assert_eq!(
            istio.fields["subset"].kind,
            Some(Kind::StringValue("v1".to_owned()))
        );
        let Some(Kind::ListValue(services)) = &istio.fields["services"].kind else {
            panic!("no list: {istio:?}")
        };
        let Some(Kind::StructValue(first)) = &services.values[0].kind else {
            panic!("no struct")
        };
        assert_eq!(
            first.fields["host"].kind,
            Some(Kind::StringValue("a.b".to_owned()))
        );
    }

    #[test]
    fn objects_are_named_as_istio_names_them() {
        let key = ObjectKey::new("VirtualService", "default", "reviews");
        assert_eq!(
            config_path(&key),
            "/apis/networking.istio.io/v1/namespaces/default/virtual-service/reviews"
        );
    }
}
