//! Reading the parts of Envoy's `Metadata` that the control plane attaches to clusters and endpoints.

use envoy_types::pb::envoy::config::core::v3::Metadata;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value};

/// The `istio` section.
pub(crate) fn istio(metadata: Option<&Metadata>) -> Option<&Struct> {
    metadata?.filter_metadata.get("istio")
}

/// A text field of a struct.
pub(crate) fn text<'a>(fields: &'a Struct, key: &str) -> Option<&'a str> {
    match fields.fields.get(key)?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text),
        _ => None,
    }
}

/// The structs in a list field.
pub(crate) fn structs<'a>(fields: &'a Struct, key: &str) -> impl Iterator<Item = &'a Struct> {
    let values: &[Value] = match fields.fields.get(key).and_then(|v| v.kind.as_ref()) {
        Some(Kind::ListValue(list)) => &list.values,
        _ => &[],
    };
    values
        .iter()
        .filter_map(|value| match value.kind.as_ref()? {
            Kind::StructValue(fields) => Some(fields),
            _ => None,
        })
}
