//! TLS settings of filter chains and clusters, as plain data: who runs the handshakes makes its own configuration of them.
//!
//! What rustls does not have is refused by name. Two static RSA suites are the exception: they stand in Istio's default list and are left
//! out in silence, since a list of suites says what may be spoken, not what must be.

mod params;
mod validation;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{DataSource, TransportSocket};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::downstream_tls_context::SessionTicketKeysType;
use prost::Message;

use crate::error::{CompileError, Result, Within, every_field, flag, nonzero_duration};

pub use params::{Group, Params, Suite, Version};
pub use validation::{Authorities, Pins, Presented, Revoked, SanMatch, Validation, dns_matches};

const DOWNSTREAM: &str = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
const UPSTREAM: &str = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const RAW_BUFFER: &str = "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer";
/// Who agrees on this begins with metadata of both sides (Istio's TCP metadata exchange), which this proxy does not speak: it never offers
/// the name, so that others go on without.
const PEER_EXCHANGE: &str = "istio-peer-exchange";
/// Sessions that may be resumed for this long unless configured; what rustls' own tickets have.
const DEFAULT_SESSION_TIMEOUT: Duration = Duration::from_secs(12 * 3600);

/// Where a secret comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The agent beside the proxy.
    Agent,
    /// The discovery stream.
    Ads,
    /// Files that are named in the secret's name (`file-cert:CHAIN~KEY`, `file-root:AUTHORITIES`, `file-crl:LISTS`).
    Files,
}

/// A secret by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecretName {
    /// Where it comes from.
    pub source: Source,
    /// Its name.
    pub name: Arc<str>,
}

/// A certificate to present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Certificate {
    /// By name.
    Secret(SecretName),
    /// In the message.
    Inline {
        /// PEM, leaf first.
        chain: Box<str>,
        /// PEM.
        key: Box<str>,
    },
}

/// What both sides of a connection have.
#[derive(Debug)]
pub struct Common {
    /// Versions, suites, groups.
    pub params: Params,
    /// Application protocols in order of preference.
    pub alpn: Vec<Box<str>>,
    /// What is presented; several on servers, for different names or kinds of keys.
    pub certificates: Vec<Certificate>,
    /// Whose certificates are good; `None` verifies nothing.
    pub validation: Option<Validation>,
    /// The message, to tell equal settings of different snapshots.
    key: Box<[u8]>,
}

impl Common {
    /// Equal for equal settings.
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        let own = self.certificates.iter().filter_map(|c| match c {
            Certificate::Secret(name) => Some(name),
            Certificate::Inline { .. } => None,
        });
        own.chain(self.validation.iter().flat_map(Validation::secrets))
    }
}

/// A compiled `DownstreamTlsContext`.
#[derive(Debug)]
pub struct ServerTls {
    /// What both sides have.
    pub common: Common,
    /// Clients without a certificate are refused.
    pub require_client_certificate: bool,
    /// Clients that ask for no server name are refused.
    pub require_sni: bool,
    /// The client's order of suites counts.
    pub prefer_client_ciphers: bool,
    /// How long sessions may be resumed; `None` never.
    pub session_timeout: Option<Duration>,
}

/// A compiled `UpstreamTlsContext`.
#[derive(Debug)]
pub struct ClientTls {
    /// What both sides have.
    pub common: Common,
    /// Server name to ask for, empty for none.
    pub sni: Box<str>,
    /// The endpoint's host name is asked for.
    pub host_sni: bool,
    /// The certificate must be for the name that is asked for.
    pub validate_sni: bool,
    /// Sessions to keep for resumption; 0 never resumes.
    pub max_sessions: u32,
}

impl ServerTls {
    /// Compiles the message.
    pub(crate) fn compile(m: &pb::DownstreamTlsContext) -> Result<Self> {
        every_field!(m, pb::DownstreamTlsContext,
            used {
                common_tls_context, require_client_certificate, require_sni, session_timeout, prefer_client_ciphers,
                session_ticket_keys_type,
            }
            // Sessions are never kept on this side; without a matching name the first certificate is presented, and all are looked at.
            irrelevant { disable_stateful_session_resumption, full_scan_certs_on_sni_mismatch }
            refused { ocsp_staple_policy });
        let tickets = match &m.session_ticket_keys_type {
            None | Some(SessionTicketKeysType::DisableStatelessSessionResumption(false)) => true,
            Some(SessionTicketKeysType::DisableStatelessSessionResumption(true)) => false,
            Some(_) => return Err(CompileError::unsupported("session_ticket_keys")),
        };
        let common = Common::compile(m.common_tls_context.as_ref(), m.encode_to_vec())
            .within("common_tls_context")?;
        if common.certificates.is_empty() {
            return Err(CompileError::new(
                "common_tls_context.tls_certificates",
                "a server needs a certificate",
            ));
        }
        let require = flag(m.require_client_certificate.as_ref(), false);
        let verifies = |v: &Validation| v.authorities.is_some();
        if require && !common.validation.as_ref().is_some_and(verifies) {
            return Err(CompileError::new(
                "require_client_certificate",
                "without a trusted_ca any certificate would do, which this proxy does not accept",
            ));
        }
        let timeout = nonzero_duration("session_timeout", m.session_timeout.as_ref())?;
        Ok(Self {
            common,
            require_client_certificate: require,
            require_sni: flag(m.require_sni.as_ref(), false),
            prefer_client_ciphers: m.prefer_client_ciphers,
            session_timeout: tickets.then_some(timeout.unwrap_or(DEFAULT_SESSION_TIMEOUT)),
        })
    }

    /// The secrets that it names.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        self.common.secrets()
    }
}

impl ClientTls {
    /// Compiles the message.
    pub(crate) fn compile(m: &pb::UpstreamTlsContext) -> Result<Self> {
        every_field!(m, pb::UpstreamTlsContext,
            used { common_tls_context, sni, auto_host_sni, auto_sni_san_validation, max_session_keys }
            // The library checks the key usage in any case.
            irrelevant { enforce_rsa_key_usage }
            refused { allow_renegotiation });
        Ok(Self {
            common: Common::compile(m.common_tls_context.as_ref(), m.encode_to_vec())
                .within("common_tls_context")?,
            sni: m.sni.as_str().into(),
            host_sni: m.auto_host_sni,
            validate_sni: m.auto_sni_san_validation,
            max_sessions: m.max_session_keys.map_or(1, |v| v.value),
        })
    }

    /// The secrets that it names.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        self.common.secrets()
    }
}

impl Common {
    fn compile(m: Option<&pb::CommonTlsContext>, key: Vec<u8>) -> Result<Self> {
        let none = pb::CommonTlsContext::default();
        let m = m.unwrap_or(&none);
        every_field!(m, pb::CommonTlsContext,
        used {
            tls_params, tls_certificates, tls_certificate_sds_secret_configs, alpn_protocols, validation_context_type,
        }
        irrelevant {}
        refused {
            tls_certificate_provider_instance, custom_tls_certificate_selector, tls_certificate_certificate_provider,
            tls_certificate_certificate_provider_instance, custom_handshaker, key_log,
        });
        let mut certificates = Vec::new();
        for (i, config) in m.tls_certificate_sds_secret_configs.iter().enumerate() {
            let name =
                secret_name(config).within(format!("tls_certificate_sds_secret_configs[{i}]"))?;
            certificates.push(Certificate::Secret(name));
        }
        for (i, certificate) in m.tls_certificates.iter().enumerate() {
            certificates
                .push(own_certificate(certificate).within(format!("tls_certificates[{i}]"))?);
        }
        let params = m.tls_params.as_ref().map(Params::compile).transpose();
        Ok(Self {
            params: params.within("tls_params")?.unwrap_or_default(),
            alpn: m
                .alpn_protocols
                .iter()
                .filter(|name| *name != PEER_EXCHANGE)
                .map(|name| name.as_str().into())
                .collect(),
            certificates,
            validation: m
                .validation_context_type
                .as_ref()
                .map(Validation::compile)
                .transpose()?
                .flatten(),
            key: key.into(),
        })
    }
}

fn own_certificate(m: &pb::TlsCertificate) -> Result<Certificate> {
    every_field!(m, pb::TlsCertificate,
        used { certificate_chain, private_key }
        // Files are looked at every now and then in any case.
        irrelevant { watched_directory }
        refused { pkcs12, private_key_provider, password, ocsp_staple, signed_certificate_timestamp, tls_params });
    let chain = data("certificate_chain", m.certificate_chain.as_ref())?;
    let key = data("private_key", m.private_key.as_ref())?;
    match (chain, key) {
        (Some(Data::Text(chain)), Some(Data::Text(key))) => Ok(Certificate::Inline { chain, key }),
        (Some(Data::File(chain)), Some(Data::File(key))) => Ok(Certificate::Secret(SecretName {
            source: Source::Files,
            name: format!("file-cert:{chain}~{key}").into(),
        })),
        _ => Err(CompileError::new(
            "private_key",
            "certificate_chain and private_key must both be there, either both as files or both inline",
        )),
    }
}

/// Bytes of a message or of a file.
enum Data {
    Text(Box<str>),
    File(Box<str>),
}

fn data(field: &str, m: Option<&DataSource>) -> Result<Option<Data>> {
    let Some(specifier) = m.and_then(|m| m.specifier.as_ref()) else {
        return Ok(None);
    };
    match specifier {
        Specifier::Filename(name) => Ok(Some(Data::File(name.as_str().into()))),
        Specifier::InlineString(text) => Ok(Some(Data::Text(text.as_str().into()))),
        Specifier::InlineBytes(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Some(Data::Text(text.into()))),
            Err(_) => Err(CompileError::new(field, "is not PEM text")),
        },
        Specifier::EnvironmentVariable(_) => Err(CompileError::unsupported(format!(
            "{field}.environment_variable"
        ))),
    }
}

/// Names with `file-` stand for files whatever their source is said to be: Istio's agent serves them from there.
fn secret_name(m: &pb::SdsSecretConfig) -> Result<SecretName> {
    let source = match m
        .sds_config
        .as_ref()
        .and_then(|c| c.config_source_specifier.as_ref())
    {
        _ if m.name.is_empty() => return Err(CompileError::new("name", "is missing")),
        _ if m.name.starts_with("file-") => Source::Files,
        Some(ConfigSourceSpecifier::Ads(_)) => Source::Ads,
        Some(ConfigSourceSpecifier::ApiConfigSource(_)) => Source::Agent,
        None => return Err(CompileError::new("sds_config", "is missing")),
        Some(_) => return Err(CompileError::unsupported("sds_config with files")),
    };
    Ok(SecretName {
        source,
        name: m.name.as_str().into(),
    })
}

/// The TLS settings of a filter chain; `None` for plain text.
pub(crate) fn downstream(m: Option<&TransportSocket>) -> Result<Option<Arc<ServerTls>>> {
    match m.map(|m| typed(m, DOWNSTREAM)).transpose()? {
        None | Some(None) => Ok(None),
        Some(Some(bytes)) => {
            let m = pb::DownstreamTlsContext::decode(bytes)
                .map_err(|error| CompileError::new("typed_config", error.to_string()))?;
            Ok(Some(Arc::new(ServerTls::compile(&m)?)))
        }
    }
}

/// The TLS settings of a cluster; `None` for plain text.
pub(crate) fn upstream(m: Option<&TransportSocket>) -> Result<Option<Arc<ClientTls>>> {
    match m.map(|m| typed(m, UPSTREAM)).transpose()? {
        None | Some(None) => Ok(None),
        Some(Some(bytes)) => {
            let m = pb::UpstreamTlsContext::decode(bytes)
                .map_err(|error| CompileError::new("typed_config", error.to_string()))?;
            Ok(Some(Arc::new(ClientTls::compile(&m)?)))
        }
    }
}

fn typed<'a>(m: &'a TransportSocket, wanted: &str) -> Result<Option<&'a [u8]>> {
    match &m.config_type {
        None if m.name == "envoy.transport_sockets.raw_buffer" => Ok(None),
        None => Err(CompileError::new("typed_config", "is missing")),
        Some(ConfigType::TypedConfig(any)) => match any.type_url.rsplit('/').next().unwrap_or("") {
            RAW_BUFFER => Ok(None),
            kind if kind == wanted => Ok(Some(&any.value)),
            other => Err(CompileError::unsupported(other)),
        },
    }
}

/// Gathers the names of secrets.
pub(crate) fn gather<'a>(
    names: impl Iterator<Item = &'a SecretName>,
    into: &mut BTreeSet<SecretName>,
) {
    into.extend(names.cloned());
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::google::protobuf::BoolValue;

    fn context(alpn: &[&str]) -> pb::DownstreamTlsContext {
        let inline = |text: &str| {
            Some(DataSource {
                specifier: Some(Specifier::InlineString(text.to_owned())),
                ..DataSource::default()
            })
        };
        let certificate = pb::TlsCertificate {
            certificate_chain: inline("chain"),
            private_key: inline("key"),
            ..pb::TlsCertificate::default()
        };
        let common = pb::CommonTlsContext {
            tls_certificates: vec![certificate],
            alpn_protocols: alpn.iter().map(|name| (*name).to_owned()).collect(),
            ..pb::CommonTlsContext::default()
        };
        pb::DownstreamTlsContext {
            common_tls_context: Some(common),
            ..pb::DownstreamTlsContext::default()
        }
    }

    #[test]
    fn what_is_not_spoken_is_not_offered() {
        let tls = ServerTls::compile(&context(&["istio-peer-exchange", "h2", "http/1.1"])).unwrap();
        let names: Vec<&str> = tls.common.alpn.iter().map(|name| &**name).collect();
        assert_eq!(names, ["h2", "http/1.1"]);
    }

    #[test]
    fn equal_settings_have_equal_keys() {
        let key = |alpn: &[&str]| {
            let tls = ServerTls::compile(&context(alpn)).unwrap();
            tls.common.key().to_vec()
        };
        assert_eq!(key(&["h2"]), key(&["h2"]));
        assert_ne!(key(&["h2"]), key(&["http/1.1"]));
    }

    #[test]
    fn a_server_that_asks_without_trusting_anybody_is_refused() {
        let mut asking = context(&[]);
        asking.require_client_certificate = Some(BoolValue { value: true });
        let error = ServerTls::compile(&asking).unwrap_err().to_string();
        assert!(error.starts_with("require_client_certificate:"), "{error}");
    }
}
