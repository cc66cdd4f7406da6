//! How the bytes to an endpoint are protected.

use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::TransportSocketMatch;
use envoy_types::pb::envoy::config::core::v3::proxy_protocol_config::Version;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{
    Metadata, ProxyProtocolConfig, TransportSocket, UpstreamHttpProtocolOptions,
};
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use envoy_types::pb::google::protobuf::Struct;
use envoy_types::pb::google::protobuf::value::Kind;
use http::HeaderName;
use prost::Message;

use crate::error::{CompileError, Result, Within, every_field};
use crate::metadata;
use crate::tls::{self, ClientTls, SecretName};

/// Section of an endpoint's metadata that selects its transport socket.
const SELECTOR: &str = "envoy.transport_socket_match";
/// Section of an endpoint's metadata with what PROXY protocol headers are to say besides.
const TLVS: &str = "envoy.transport_sockets.proxy_protocol";
const ANNOUNCING: &str =
    "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport";

/// What an endpoint says of itself, for the choice of its transport socket. Empty for most endpoints outside the mesh.
pub type Traits = Arc<[(Box<str>, Box<str>)]>;

/// How connections to an endpoint begin.
#[derive(Debug, Clone, Default)]
pub struct Transport {
    /// The settings of TLS; `None` for plain text.
    pub tls: Option<Arc<ClientTls>>,
    /// What comes before everything else, the TLS handshake too, and tells of the client.
    pub header: Option<ProxyHeader>,
}

/// Versions of the PROXY protocol's header (HAProxy's "The PROXY protocol", sections 2.1 and 2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyHeader {
    /// Text.
    V1,
    /// Binary.
    V2,
}

impl Transport {
    fn compile(m: Option<&TransportSocket>) -> Result<Self> {
        let (inner, header) = match m.and_then(announcing) {
            None => (m.cloned(), None),
            Some(bytes) => {
                let m = ProxyProtocolUpstreamTransport::decode(bytes)
                    .map_err(|error| CompileError::new("typed_config", error.to_string()))?;
                let header = compile_header(&m)?;
                let Some(inner) = m.transport_socket else {
                    return Err(CompileError::new("transport_socket", "is missing"));
                };
                (Some(inner), Some(header))
            }
        };
        Ok(Self {
            tls: tls::upstream(inner.as_ref())?,
            header,
        })
    }

    /// Is a connection of the other one as good as one of this?
    pub fn is_equal(&self, other: &Self) -> bool {
        let same = match (&self.tls, &other.tls) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a.common.key() == b.common.key(),
            (a, b) => a.is_none() && b.is_none(),
        };
        same && self.header == other.header
    }
}

/// The settings of a transport that begins with a PROXY protocol header.
fn announcing(m: &TransportSocket) -> Option<&[u8]> {
    match &m.config_type {
        Some(ConfigType::TypedConfig(any)) if any.type_url.ends_with(ANNOUNCING) => {
            Some(&any.value)
        }
        _ => None,
    }
}

fn compile_header(m: &ProxyProtocolUpstreamTransport) -> Result<ProxyHeader> {
    // tlv_as_pool_key: no TLVs are sent.
    every_field!(m, ProxyProtocolUpstreamTransport, used { config, transport_socket } irrelevant { tlv_as_pool_key }
        refused { allow_unspecified_address });
    let Some(config) = &m.config else {
        return Ok(ProxyHeader::V1);
    };
    every_field!(config, ProxyProtocolConfig, used { version } irrelevant {} refused { pass_through_tlvs, added_tlvs });
    match Version::try_from(config.version) {
        Ok(Version::V1) => Ok(ProxyHeader::V1),
        Ok(Version::V2) => Ok(ProxyHeader::V2),
        Err(_) => Err(CompileError::new("version", "is unknown")),
    }
    .within("config")
}

/// The transport sockets of a cluster.
#[derive(Debug, Default)]
pub struct Transports {
    /// The first that fits counts.
    matches: Vec<(Traits, Transport)>,
    /// For endpoints that none fits.
    default: Transport,
    /// Names from requests.
    pub names: NamesFromRequests,
    /// Requests do not change the application protocols (`istio.alpn_override: "false"` in the cluster's metadata: TLS to servers that are
    /// not sidecars).
    pub fixed_alpn: bool,
}

/// `upstream_http_protocol_options`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamesFromRequests {
    /// The request's authority is the server name to ask for.
    pub sni: bool,
    /// The server's certificate must be for the request's authority.
    pub validate: bool,
    /// This header counts before the authority.
    pub header: Option<HeaderName>,
}

impl NamesFromRequests {
    pub(super) fn compile(m: &UpstreamHttpProtocolOptions) -> Result<Self> {
        every_field!(m, UpstreamHttpProtocolOptions,
            used { auto_sni, auto_san_validation, override_auto_sni_header } irrelevant {} refused {});
        let header =
            match m.override_auto_sni_header.as_str() {
                "" => None,
                name => Some(HeaderName::try_from(name).map_err(|_| {
                    CompileError::new("override_auto_sni_header", "is not a header")
                })?),
            };
        Ok(Self {
            sni: m.auto_sni,
            validate: m.auto_san_validation,
            header,
        })
    }
}

impl Transports {
    pub(super) fn compile(m: &pb::Cluster) -> Result<Self> {
        let mut matches = Vec::with_capacity(m.transport_socket_matches.len());
        for (i, one) in m.transport_socket_matches.iter().enumerate() {
            let at = format!("transport_socket_matches[{i}] {}", one.name);
            matches.push(compile_match(one).within(at)?);
        }
        Ok(Self {
            matches,
            default: Transport::compile(m.transport_socket.as_ref()).within("transport_socket")?,
            names: NamesFromRequests::default(),
            fixed_alpn: metadata::istio(m.metadata.as_ref())
                .and_then(|istio| metadata::text(istio, "alpn_override"))
                == Some("false"),
        })
    }

    /// How connections to an endpoint begin.
    pub fn of(&self, traits: &Traits) -> &Transport {
        let fits = |wanted: &Traits| wanted.iter().all(|pair| traits.contains(pair));
        match self.matches.iter().find(|(wanted, _)| fits(wanted)) {
            Some((_, found)) => found,
            None => &self.default,
        }
    }

    /// Is any endpoint told of the client?
    pub fn announces(&self) -> bool {
        self.each().any(|transport| transport.header.is_some())
    }

    fn each(&self) -> impl Iterator<Item = &Transport> {
        let matched = self.matches.iter().map(|(_, transport)| transport);
        matched.chain([&self.default])
    }

    /// Is any endpoint spoken to in TLS?
    pub fn is_tls(&self) -> bool {
        self.all().next().is_some()
    }

    /// All TLS settings.
    pub fn all(&self) -> impl Iterator<Item = &Arc<ClientTls>> {
        self.each().filter_map(|transport| transport.tls.as_ref())
    }

    /// The secrets that they name.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        self.all().flat_map(|tls| tls.secrets())
    }

    /// Are connections of the other one as good as those of this one?
    pub fn is_equal(&self, other: &Self) -> bool {
        self.names == other.names
            && self.fixed_alpn == other.fixed_alpn
            && self.default.is_equal(&other.default)
            && self.matches.len() == other.matches.len()
            && self
                .matches
                .iter()
                .zip(&other.matches)
                .all(|(a, b)| a.0 == b.0 && a.1.is_equal(&b.1))
    }
}

fn compile_match(m: &TransportSocketMatch) -> Result<(Traits, Transport)> {
    every_field!(m, TransportSocketMatch, used { name, r#match, transport_socket } irrelevant {} refused {});
    let mut wanted = Vec::new();
    for (key, value) in m.r#match.iter().flat_map(|m| &m.fields) {
        match value.kind.as_ref().and_then(text) {
            Some(text) => wanted.push((key.as_str().into(), text)),
            None => {
                let reason = "only text, numbers and booleans can be matched";
                return Err(CompileError::new(format!("match.{key}"), reason));
            }
        }
    }
    let socket = Transport::compile(m.transport_socket.as_ref()).within("transport_socket")?;
    Ok((wanted.into(), socket))
}

/// TLVs that are an endpoint's own are not sent, so that they are refused.
pub(crate) fn refuse_tlvs(metadata: Option<&Metadata>) -> Result<()> {
    match metadata.is_some_and(|m| m.typed_filter_metadata.contains_key(TLVS)) {
        true => Err(CompileError::unsupported(format!(
            "typed_filter_metadata[{TLVS}]"
        ))),
        false => Ok(()),
    }
}

/// What an endpoint's metadata says.
pub(crate) fn traits(metadata: Option<&Metadata>) -> Traits {
    let none = Struct::default();
    let found = metadata.and_then(|m| m.filter_metadata.get(SELECTOR));
    let mut all: Vec<(Box<str>, Box<str>)> = found
        .unwrap_or(&none)
        .fields
        .iter()
        .filter_map(|(key, value)| Some((key.as_str().into(), text(value.kind.as_ref()?)?)))
        .collect();
    all.sort();
    all.into()
}

fn text(kind: &Kind) -> Option<Box<str>> {
    match kind {
        Kind::StringValue(text) => Some(text.as_str().into()),
        Kind::BoolValue(value) => Some(value.to_string().into()),
        Kind::NumberValue(value) => Some(value.to_string().into()),
        _ => None,
    }
}
