//! How the bytes to an endpoint are protected.

use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::cluster::TransportSocketMatch;
use envoy_types::pb::envoy::config::core::v3::Metadata;
use envoy_types::pb::envoy::config::core::v3::UpstreamHttpProtocolOptions;
use envoy_types::pb::google::protobuf::Struct;
use envoy_types::pb::google::protobuf::value::Kind;
use http::HeaderName;

use crate::error::{CompileError, Result, Within, every_field};
use crate::metadata;
use crate::tls::{self, ClientTls, SecretName};

/// Section of an endpoint's metadata that selects its transport socket.
const SELECTOR: &str = "envoy.transport_socket_match";

/// What an endpoint says of itself, for the choice of its transport socket. Empty for most endpoints outside the mesh.
pub type Traits = Arc<[(Box<str>, Box<str>)]>;

/// The transport sockets of a cluster.
#[derive(Debug, Default)]
pub struct Transports {
    /// The first that fits counts.
    matches: Vec<(Traits, Option<Arc<ClientTls>>)>,
    /// For endpoints that none fits.
    default: Option<Arc<ClientTls>>,
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
            default: tls::upstream(m.transport_socket.as_ref()).within("transport_socket")?,
            names: NamesFromRequests::default(),
            fixed_alpn: metadata::istio(m.metadata.as_ref())
                .and_then(|istio| metadata::text(istio, "alpn_override"))
                == Some("false"),
        })
    }

    /// The TLS settings for an endpoint; `None` for plain text.
    pub fn of(&self, traits: &Traits) -> Option<&Arc<ClientTls>> {
        let fits = |wanted: &Traits| wanted.iter().all(|pair| traits.contains(pair));
        match self.matches.iter().find(|(wanted, _)| fits(wanted)) {
            Some((_, found)) => found.as_ref(),
            None => self.default.as_ref(),
        }
    }

    /// Is any endpoint spoken to in TLS?
    pub fn is_tls(&self) -> bool {
        self.all().next().is_some()
    }

    /// All TLS settings.
    pub fn all(&self) -> impl Iterator<Item = &Arc<ClientTls>> {
        let matched = self.matches.iter().filter_map(|(_, tls)| tls.as_ref());
        matched.chain(&self.default)
    }

    /// The secrets that they name.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        self.all().flat_map(|tls| tls.secrets())
    }

    /// Are connections of the other one as good as those of this one?
    pub fn is_equal(&self, other: &Self) -> bool {
        let same = |a: &Option<Arc<ClientTls>>, b: &Option<Arc<ClientTls>>| {
            a.as_ref().map(|tls| tls.common.key()) == b.as_ref().map(|tls| tls.common.key())
        };
        self.names == other.names
            && self.fixed_alpn == other.fixed_alpn
            && same(&self.default, &other.default)
            && self.matches.len() == other.matches.len()
            && self
                .matches
                .iter()
                .zip(&other.matches)
                .all(|(a, b)| a.0 == b.0 && same(&a.1, &b.1))
    }
}

fn compile_match(m: &TransportSocketMatch) -> Result<(Traits, Option<Arc<ClientTls>>)> {
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
    let socket = tls::upstream(m.transport_socket.as_ref()).within("transport_socket")?;
    Ok((wanted.into(), socket))
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
