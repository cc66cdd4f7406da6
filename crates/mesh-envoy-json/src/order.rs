//! Maps in a fixed order. Generated types keep maps as hash maps, so that the same message may be encoded to other bytes each time;
//! resources are compared by their bytes.

use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};

use crate::descriptors::Descriptors;
use crate::json::{ANY, find};

/// Depth of messages in messages; what is deeper keeps the order it has.
const MAX_DEPTH: usize = 64;

/// The message with the entries of all maps in it, also inside of every `Any` of a known type, ordered by key. Bytes that are not of the
/// type are returned as they are.
pub fn ordered(type_url: &str, bytes: &[u8]) -> Vec<u8> {
    let _held = Descriptors::hold();
    find(type_url)
        .and_then(|descriptor| message(&descriptor, bytes, 0))
        .unwrap_or_else(|| bytes.to_vec())
}

/// One field as it stands in the bytes.
struct Field<'a> {
    number: u32,
    wire_type: WireType,
    /// Without key and, for what has one, length.
    content: &'a [u8],
}

fn message(descriptor: &MessageDescriptor, bytes: &[u8], depth: usize) -> Option<Vec<u8>> {
    let fields = fields(bytes)?;
    if descriptor.full_name() == ANY {
        return Some(any(&fields, depth));
    }
    let mut out = Vec::with_capacity(bytes.len());
    for (index, field) in fields.iter().enumerate() {
        let known = descriptor.get_field(field.number);
        match known {
            Some(known) if known.is_map() => {
                let first = fields.iter().position(|other| other.number == field.number);
                if first == Some(index) {
                    let same = fields.iter().filter(|other| other.number == field.number);
                    map(&known, same, depth, &mut out);
                }
            }
            Some(known) => put(field, &inner(&known, field, depth), &mut out),
            None => put(field, field.content, &mut out),
        }
    }
    Some(out)
}

fn map<'a>(
    known: &FieldDescriptor,
    entries: impl Iterator<Item = &'a Field<'a>>,
    depth: usize,
    out: &mut Vec<u8>,
) {
    let mut ordered: Vec<(&Field<'_>, Vec<u8>)> = entries
        .map(|entry| (entry, inner(known, entry, depth)))
        .collect();
    // The key is an entry's first field, so entries in order of their bytes are in one order, whatever they hold.
    ordered.sort_by(|(_, left), (_, right)| left.cmp(right));
    for (entry, content) in ordered {
        put(entry, &content, out);
    }
}

/// The content of a field, in order if it is a message.
fn inner(known: &FieldDescriptor, field: &Field<'_>, depth: usize) -> Vec<u8> {
    let ordered = match known.kind() {
        Kind::Message(descriptor)
            if field.wire_type == WireType::LengthDelimited && depth < MAX_DEPTH =>
        {
            message(&descriptor, field.content, depth + 1)
        }
        _ => None,
    };
    ordered.unwrap_or_else(|| field.content.to_vec())
}

/// `google.protobuf.Any`: type URL (1) and value (2).
fn any(fields: &[Field<'_>], depth: usize) -> Vec<u8> {
    let type_url = fields.iter().rfind(|field| field.number == 1);
    let descriptor = type_url
        .and_then(|field| std::str::from_utf8(field.content).ok())
        .and_then(find)
        .filter(|_| depth < MAX_DEPTH);
    let mut out = Vec::new();
    for field in fields {
        let content = descriptor
            .as_ref()
            .filter(|_| field.number == 2)
            .and_then(|descriptor| message(descriptor, field.content, depth + 1));
        put(field, content.as_deref().unwrap_or(field.content), &mut out);
    }
    out
}

fn put(field: &Field<'_>, content: &[u8], out: &mut Vec<u8>) {
    encode_key(field.number, field.wire_type, out);
    if field.wire_type == WireType::LengthDelimited {
        encode_varint(content.len() as u64, out);
    }
    out.extend_from_slice(content);
}

/// The fields of a message; `None` if the bytes are no message, or have groups, which no message of Envoy has.
fn fields(bytes: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut fields = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (number, wire_type) = decode_key(&mut rest).ok()?;
        let length = match wire_type {
            WireType::Varint => {
                let mut after = rest;
                decode_varint(&mut after).ok()?;
                rest.len() - after.len()
            }
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut rest).ok()?).ok()?,
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        let content;
        (content, rest) = rest.split_at_checked(length)?;
        fields.push(Field {
            number,
            wire_type,
            content,
        });
    }
    Some(fields)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;
    use crate::{Naming, from_json, to_json};

    const FILTER: &str = "type.googleapis.com/envoy.config.listener.v3.Filter";

    /// Two levels of maps, the inner ones in an `Any`.
    fn filter() -> serde_json::Value {
        let fields: serde_json::Map<_, _> = (0..20)
            .map(|number| {
                (
                    format!("key{number}"),
                    json!({"x": number, "y": [1, {"z": 2, "a": 3}]}),
                )
            })
            .collect();
        json!({
            "name": "f",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "s",
                "route_config": {"name": "r", "metadata": {"filter_metadata": {"a": fields.clone(), "b": fields}}},
            },
        })
    }

    #[test]
    fn the_same_message_is_the_same_bytes_each_time() {
        let value = filter();
        let encoded: Vec<Vec<u8>> = (0..20)
            .map(|_| from_json(FILTER, &value).unwrap())
            .collect();
        let distinct: BTreeSet<&Vec<u8>> = encoded.iter().collect();
        assert!(distinct.len() > 1, "the test must see several orders");
        let ordered: BTreeSet<Vec<u8>> =
            encoded.iter().map(|bytes| ordered(FILTER, bytes)).collect();
        assert_eq!(ordered.len(), 1);
        let back = to_json(FILTER, ordered.first().unwrap(), Naming::Proto).unwrap();
        assert_eq!(back, to_json(FILTER, &encoded[0], Naming::Proto).unwrap());
    }

    #[test]
    fn what_is_no_message_stays_as_it_is() {
        for bytes in [&[255_u8, 255][..], &[10, 200], &[]] {
            assert_eq!(ordered(FILTER, bytes), bytes);
        }
        assert_eq!(ordered("type.googleapis.com/foo.Bar", &[1, 2]), [1, 2]);
    }
}
