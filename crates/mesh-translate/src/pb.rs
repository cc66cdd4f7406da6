//! Short forms for messages that every resource needs.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, SocketAddress,
};
use envoy_types::pb::google::protobuf::{self, Any, BoolValue, UInt32Value};
use prost::{Message, Name};

pub(crate) fn any<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

/// A map of a generated message, encoded in the order of its keys. Those maps are hash maps, whose order changes with each of them, and resources have
/// to be the same bytes each time: so it is made again until the order is right, which for the two or three entries that we send takes a few
/// tries.
pub(crate) fn ordered_map<K, V>(entries: impl IntoIterator<Item = (K, V)>) -> HashMap<K, V>
where
    K: Ord + Hash + Clone,
    V: Clone,
{
    let entries: Vec<(K, V)> = entries.into_iter().collect();
    loop {
        let map: HashMap<K, V> = entries.iter().cloned().collect();
        if map.keys().is_sorted() {
            return map;
        }
    }
}

pub(crate) fn uint32(value: impl Into<u32>) -> Option<UInt32Value> {
    Some(UInt32Value {
        value: value.into(),
    })
}

pub(crate) fn boolean(value: bool) -> Option<BoolValue> {
    Some(BoolValue { value })
}

/// Lengths beyond the protobuf limit do not come out of Istio's duration syntax.
pub(crate) fn duration(value: Duration) -> Option<protobuf::Duration> {
    let seconds = i64::try_from(value.as_secs()).unwrap_or(i64::MAX);
    Some(protobuf::Duration {
        seconds,
        nanos: value.subsec_nanos().cast_signed(),
    })
}

pub(crate) fn socket_address(address: IpAddr, port: u16) -> SocketAddress {
    SocketAddress {
        address: address.to_string(),
        port_specifier: Some(PortSpecifier::PortValue(u32::from(port))),
        ..SocketAddress::default()
    }
}

pub(crate) fn address(address: IpAddr, port: u16) -> Option<Address> {
    Some(Address {
        address: Some(AddressKind::SocketAddress(socket_address(address, port))),
    })
}

/// "By the aggregated stream", without a limit for the first answer (Istio sets 0 so that a slow control plane never means half a configuration).
pub(crate) fn ads() -> Option<ConfigSource> {
    Some(ConfigSource {
        resource_api_version: ApiVersion::V3 as i32,
        initial_fetch_timeout: duration(Duration::ZERO),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_come_in_the_order_of_their_keys() {
        for _ in 0..50 {
            let map = ordered_map([("c", 3), ("a", 1), ("b", 2)]);
            assert_eq!(map.keys().copied().collect::<Vec<_>>(), ["a", "b", "c"]);
            // A copy keeps the order.
            assert!(map.clone().keys().is_sorted());
        }
    }
}
