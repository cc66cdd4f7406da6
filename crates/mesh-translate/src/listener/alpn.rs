//! Istio's filter that makes mutual TLS say which version of HTTP is inside, so that the other side can tell requests from bytes.

use prost::{Message, Name};

/// Name of the filter.
pub(super) const NAME: &str = "istio.alpn";

/// `istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig` (istio/proxy, `source/extensions/filters/http/alpn/config.proto`).
#[derive(Clone, PartialEq, Message)]
pub(super) struct FilterConfig {
    #[prost(message, repeated, tag = "1")]
    alpn_override: Vec<AlpnOverride>,
}

/// What is offered for requests of a version.
#[derive(Clone, PartialEq, Message)]
struct AlpnOverride {
    /// 0 is HTTP/1.0, 1 is HTTP/1.1, 2 is HTTP/2.
    #[prost(int32, tag = "1")]
    upstream_protocol: i32,
    #[prost(string, repeated, tag = "2")]
    alpn_override: Vec<String>,
}

impl Name for FilterConfig {
    const NAME: &'static str = "FilterConfig";
    const PACKAGE: &'static str = "istio.envoy.config.filter.http.alpn.v2alpha1";

    fn type_url() -> String {
        "type.googleapis.com/istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig".to_owned()
    }
}

pub(super) fn config() -> FilterConfig {
    let versions = [
        (0, ["istio-http/1.0", "istio", "http/1.0"]),
        (1, ["istio-http/1.1", "istio", "http/1.1"]),
        (2, ["istio-h2", "istio", "h2"]),
    ];
    let entry = |(upstream_protocol, names): (i32, [&str; 3])| AlpnOverride {
        upstream_protocol,
        alpn_override: names.map(str::to_owned).to_vec(),
    };
    FilterConfig {
        alpn_override: versions.map(entry).to_vec(),
    }
}
