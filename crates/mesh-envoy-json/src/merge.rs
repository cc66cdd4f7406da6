//! Merging messages field by field, as Istio's control plane merges patches (its package `proto/merge`).

use prost::Message;
use prost_reflect::{DynamicMessage, Value};

use crate::descriptors::Descriptors;
use crate::json::{ANY, DURATION, JsonError, descriptor};

/// What happens to lists that both messages have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lists {
    /// The patch's entries come after the others (protobuf's merge).
    Append,
    /// The patch's list takes the place of the other.
    Replace,
}

/// Merges an encoded message into another of the same type: set scalars replace, messages are merged, maps are merged by key. A duration is a
/// value of its own and replaced, and so is an `Any`: only who knows what it stands for can say whether both are of one type.
///
/// # Errors
/// An unknown type, or bytes that are not of the type.
pub fn merge(
    type_url: &str,
    base: &[u8],
    patch: &[u8],
    lists: Lists,
) -> Result<Vec<u8>, JsonError> {
    let _held = Descriptors::hold();
    let descriptor = descriptor(type_url)?;
    let decode = |bytes: &[u8]| {
        DynamicMessage::decode(descriptor.clone(), bytes)
            .map_err(|error| JsonError::Decode(descriptor.full_name().to_owned(), error))
    };
    let mut base = decode(base)?;
    merge_into(&mut base, &decode(patch)?, lists);
    Ok(base.encode_to_vec())
}

fn merge_into(base: &mut DynamicMessage, patch: &DynamicMessage, lists: Lists) {
    for (field, value) in patch.fields() {
        if !base.has_field(&field) {
            base.set_field(&field, value.clone());
            continue;
        }
        match (base.get_field_mut(&field), value) {
            (Value::Message(own), Value::Message(given)) if !is_one_value(own) => {
                merge_into(own, given, lists);
            }
            (Value::List(own), Value::List(given)) if lists == Lists::Append => {
                own.extend(given.iter().cloned());
            }
            (Value::Map(own), Value::Map(given)) => {
                own.extend(
                    given
                        .iter()
                        .map(|(key, value)| (key.clone(), value.clone())),
                );
            }
            (own, given) => *own = given.clone(),
        }
    }
}

fn is_one_value(message: &DynamicMessage) -> bool {
    use prost_reflect::ReflectMessage;
    let descriptor = message.descriptor();
    matches!(descriptor.full_name(), DURATION | ANY)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{Naming, from_json, to_json};

    const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";

    fn merged(base: &Value, patch: &Value, lists: Lists) -> Value {
        let bytes = |value| from_json(CLUSTER, value).unwrap();
        let merged = merge(CLUSTER, &bytes(base), &bytes(patch), lists).unwrap();
        to_json(CLUSTER, &merged, Naming::Proto).unwrap()
    }

    #[test]
    fn scalars_replace_messages_merge_lists_append() {
        let base = json!({
            "name": "c", "connect_timeout": "1.5s", "lb_policy": "RANDOM",
            "circuit_breakers": {"thresholds": [{"max_connections": 1}]},
            "outlier_detection": {"consecutive_5xx": 7, "interval": "3s"},
        });
        let patch = json!({
            "connect_timeout": "2s",
            "circuit_breakers": {"thresholds": [{"max_connections": 2}]},
            "outlier_detection": {"interval": "4s"},
        });
        let result = merged(&base, &patch, Lists::Append);
        assert_eq!(result["connect_timeout"], "2s", "the fraction goes, too");
        assert_eq!(result["lb_policy"], "RANDOM");
        assert_eq!(
            result["outlier_detection"],
            json!({"consecutive_5xx": 7, "interval": "4s"})
        );
        let thresholds = |result: &Value| result["circuit_breakers"]["thresholds"].clone();
        assert_eq!(
            thresholds(&result),
            json!([{"max_connections": 1}, {"max_connections": 2}])
        );
        let result = merged(&base, &patch, Lists::Replace);
        assert_eq!(thresholds(&result), json!([{"max_connections": 2}]));
    }

    #[test]
    fn another_choice_takes_the_place_of_the_first() {
        let base =
            json!({"name": "c", "type": "EDS", "ring_hash_lb_config": {"minimum_ring_size": "8"}});
        let patch = json!({"maglev_lb_config": {"table_size": "7"}});
        let result = merged(&base, &patch, Lists::Append);
        assert_eq!(result["maglev_lb_config"]["table_size"], "7");
        assert!(result.get("ring_hash_lb_config").is_none(), "{result}");
    }

    #[test]
    fn maps_merge_by_key() {
        let options = |name: &str, kind: &str| json!({"typed_extension_protocol_options": {name: {"@type": format!("type.googleapis.com/{kind}")}}});
        let http = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        let tcp = "envoy.extensions.upstreams.tcp.v3.TcpProtocolOptions";
        let result = merged(&options("a", http), &options("b", http), Lists::Append);
        assert_eq!(
            result["typed_extension_protocol_options"]
                .as_object()
                .unwrap()
                .len(),
            2
        );
        let result = merged(&options("a", http), &options("a", tcp), Lists::Append);
        assert_eq!(
            result["typed_extension_protocol_options"]["a"]["@type"],
            format!("type.googleapis.com/{tcp}")
        );
    }
}
