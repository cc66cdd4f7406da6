//! Which connections of an inbound port are told apart, and how each kind is handled: Istio's table by mode of mutual TLS and declared protocol.

use envoy_types::pb::envoy::config::listener::v3::FilterChainMatch;
use mesh_model::{MtlsMode, Protocol};

use crate::tls::texts;

/// What clients of the mesh say inside of TLS that they speak: HTTP.
const HTTP_ALPN: &[&str] = &["istio-http/1.0", "istio-http/1.1", "istio-h2"];
/// Any bytes.
const TCP_ALPN: &[&str] = &["istio-peer-exchange", "istio"];
/// Either.
const MESH_ALPN: &[&str] = &[
    "istio",
    "istio-peer-exchange",
    "istio-http/1.0",
    "istio-http/1.1",
    "istio-h2",
];

/// What a port is declared to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Declared {
    Http,
    Tcp,
    /// Nothing is declared: the first bytes say it.
    Auto,
}

impl Declared {
    pub(super) fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Auto => Self::Auto,
            _ if protocol.is_http() => Self::Http,
            _ => Self::Tcp,
        }
    }
}

/// What the first bytes of a connection have to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bytes {
    /// TLS, with one of these protocols (any, where none is given).
    Tls(&'static [&'static str]),
    Plain,
    /// Plain HTTP.
    PlainHttp,
}

/// One kind of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    bytes: Bytes,
    /// Handled as HTTP, else as bytes.
    pub(super) http: bool,
    /// Mutual TLS is ended here.
    pub(super) mutual: bool,
}

const fn kind(bytes: Bytes, http: bool, mutual: bool) -> Kind {
    Kind {
        bytes,
        http,
        mutual,
    }
}

/// The kinds of a port, in the order of Istio's chains.
pub(super) fn kinds(mode: MtlsMode, declared: Declared) -> &'static [Kind] {
    const ANY: &[&str] = &[];
    match (mode, declared) {
        (MtlsMode::Strict, Declared::Http) => &const { [kind(Bytes::Tls(ANY), true, true)] },
        (MtlsMode::Strict, Declared::Tcp) => &const { [kind(Bytes::Tls(ANY), false, true)] },
        (MtlsMode::Strict, Declared::Auto) => {
            &const {
                [
                    kind(Bytes::Tls(HTTP_ALPN), true, true),
                    kind(Bytes::Tls(ANY), false, true),
                ]
            }
        }
        (MtlsMode::Permissive, Declared::Http) => {
            &const {
                [
                    kind(Bytes::Tls(MESH_ALPN), true, true),
                    kind(Bytes::Plain, true, false),
                ]
            }
        }
        (MtlsMode::Permissive, Declared::Tcp) => {
            &const {
                [
                    kind(Bytes::Tls(MESH_ALPN), false, true),
                    kind(Bytes::Tls(ANY), false, false),
                    kind(Bytes::Plain, false, false),
                ]
            }
        }
        (MtlsMode::Permissive, Declared::Auto) => {
            &const {
                [
                    kind(Bytes::Tls(HTTP_ALPN), true, true),
                    kind(Bytes::PlainHttp, true, false),
                    kind(Bytes::Tls(TCP_ALPN), false, true),
                    kind(Bytes::Plain, false, false),
                    kind(Bytes::Tls(ANY), false, false),
                ]
            }
        }
        (MtlsMode::Disable, Declared::Http) => &const { [kind(Bytes::Plain, true, false)] },
        (MtlsMode::Disable, Declared::Tcp) => &const { [kind(Bytes::Plain, false, false)] },
        (MtlsMode::Disable, Declared::Auto) => {
            &const {
                [
                    kind(Bytes::PlainHttp, true, false),
                    kind(Bytes::Plain, false, false),
                ]
            }
        }
    }
}

/// True if the first bytes have to be looked at for TLS.
pub(super) fn looks_for_tls(mode: MtlsMode, declared: Declared) -> bool {
    mode != MtlsMode::Disable || declared == Declared::Auto
}

/// True if they have to be looked at for plain HTTP.
pub(super) fn looks_for_http(mode: MtlsMode, declared: Declared) -> bool {
    declared == Declared::Auto && mode != MtlsMode::Strict
}

impl Kind {
    /// The condition on connections; `plain_http` is what plain HTTP looks like.
    pub(super) fn condition(self, plain_http: &FilterChainMatch) -> FilterChainMatch {
        match self.bytes {
            Bytes::PlainHttp => plain_http.clone(),
            Bytes::Plain => FilterChainMatch {
                transport_protocol: "raw_buffer".to_owned(),
                ..FilterChainMatch::default()
            },
            Bytes::Tls(protocols) => FilterChainMatch {
                transport_protocol: "tls".to_owned(),
                application_protocols: texts(protocols),
                ..FilterChainMatch::default()
            },
        }
    }
}
