//! Istio's filter `istio.alpn`: which application protocols the TLS handshake of a request's upstream connection offers. The peer tells by
//! them that a sidecar speaks, and what.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType;
use prost::Message;

use crate::error::{CompileError, Result, Within};

pub(super) const ALPN: &str = "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig";

/// `FilterConfig` of Istio's proxy.
#[derive(Clone, PartialEq, Message)]
struct FilterConfig {
    #[prost(message, repeated, tag = "1")]
    alpn_override: Vec<AlpnOverride>,
}

#[derive(Clone, PartialEq, Message)]
struct AlpnOverride {
    #[prost(int32, tag = "1")]
    upstream_protocol: i32,
    #[prost(string, repeated, tag = "2")]
    alpn_override: Vec<String>,
}

/// Application protocols, in order of preference.
pub type Protocols = Arc<[Box<str>]>;

/// What is offered instead of the cluster's own list; `None` leaves that.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Alpn {
    /// For requests that go out as HTTP/1.1 (this proxy never sends 1.0).
    pub http1: Option<Protocols>,
    /// For those that go out as HTTP/2.
    pub http2: Option<Protocols>,
}

impl Alpn {
    /// The settings of the last such filter of a connection manager.
    pub(crate) fn of_filters(list: &[HttpFilter]) -> Result<Self> {
        let mut found = Self::default();
        for (i, filter) in list.iter().enumerate() {
            let Some(ConfigType::TypedConfig(any)) = &filter.config_type else {
                continue;
            };
            if filter.disabled || super::type_name(any) != ALPN {
                continue;
            }
            found = Self::compile(&any.value)
                .within(format_args!("http_filters[{i}] {}", filter.name))?;
        }
        Ok(found)
    }

    fn compile(bytes: &[u8]) -> Result<Self> {
        let m = FilterConfig::decode(bytes)
            .map_err(|error| CompileError::new("typed_config", error.to_string()))?;
        let mut alpn = Self::default();
        for one in m.alpn_override {
            let names: Vec<Box<str>> = one
                .alpn_override
                .iter()
                .map(|n| n.as_str().into())
                .collect();
            match one.upstream_protocol {
                // HTTP/1.0: a request that came so goes out as 1.1.
                0 => {}
                1 => alpn.http1 = Some(names.into()),
                2 => alpn.http2 = Some(names.into()),
                other => {
                    let reason = format!("{other} is unknown");
                    return Err(CompileError::new("upstream_protocol", reason));
                }
            }
        }
        Ok(alpn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_follow_the_protocol() {
        let one = |upstream_protocol, names: &[&str]| AlpnOverride {
            upstream_protocol,
            alpn_override: names.iter().map(|n| (*n).to_owned()).collect(),
        };
        let m = FilterConfig {
            alpn_override: vec![one(1, &["istio-http/1.1", "istio"]), one(2, &["istio-h2"])],
        };
        let alpn = Alpn::compile(&m.encode_to_vec()).unwrap();
        assert_eq!(alpn.http1.unwrap().len(), 2);
        assert_eq!(&*alpn.http2.unwrap()[0], "istio-h2");
    }
}
