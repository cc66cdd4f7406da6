//! TLS contexts: where certificates come from, what is asked of peers.

use envoy_types::pb::envoy::config::core::v3::api_config_source::ApiType;
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::grpc_service::{EnvoyGrpc, TargetSpecifier};
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{
    AggregatedConfigSource, ApiConfigSource, ApiVersion, ConfigSource, GrpcService,
    ProxyProtocolConfig, TransportSocket, proxy_protocol_config,
};
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::{
    CombinedCertificateValidationContext, ValidationContextType,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
    TlsParameters,
};
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use mesh_api::mesh_config::{MinTlsVersion, TlsConfig};
use mesh_model::Mesh;
use prost::{Message, Name};

use crate::pb::{any, boolean, duration};

/// The workload's own certificate, and the roots of the mesh, as the proxy's agent names them.
const OWN_CERTIFICATE: &str = "default";
const MESH_ROOTS: &str = "ROOTCA";
/// Cluster of the agent's secrets, part of every bootstrap.
const SDS_CLUSTER: &str = "sds-grpc";
/// Suites between workloads where the mesh names none (Istio's list).
const INBOUND_CIPHERS: [&str; 6] = [
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-GCM-SHA256",
];

/// What a server speaks inside of TLS: HTTP.
pub(crate) const ALPN_HTTP: &[&str] = &["h2", "http/1.1"];
/// What a server speaks inside of mutual TLS: any bytes.
pub(crate) const ALPN_TCP: &[&str] = &["istio-peer-exchange", "h2", "http/1.1"];

/// Where a secret comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum From {
    /// The agent beside the proxy: the workload's identity, and files.
    Agent,
    /// The control plane: secrets of the cluster.
    ControlPlane,
}

pub(crate) fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

/// A reference to a secret.
pub(crate) fn secret(name: impl Into<String>, from: From) -> SdsSecretConfig {
    let source = match from {
        From::Agent => ConfigSource {
            resource_api_version: ApiVersion::V3 as i32,
            initial_fetch_timeout: duration(std::time::Duration::ZERO),
            config_source_specifier: Some(ConfigSourceSpecifier::ApiConfigSource(agent_source())),
            ..ConfigSource::default()
        },
        // Without a limit of our own: a secret that does not exist must not hold back everything else of the listener for ever.
        From::ControlPlane => ConfigSource {
            resource_api_version: ApiVersion::V3 as i32,
            config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
            ..ConfigSource::default()
        },
    };
    SdsSecretConfig {
        name: name.into(),
        sds_config: Some(source),
    }
}

fn agent_source() -> ApiConfigSource {
    ApiConfigSource {
        api_type: ApiType::Grpc as i32,
        transport_api_version: ApiVersion::V3 as i32,
        set_node_on_first_message_only: true,
        grpc_services: vec![GrpcService {
            target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                cluster_name: SDS_CLUSTER.to_owned(),
                ..EnvoyGrpc::default()
            })),
            ..GrpcService::default()
        }],
        ..ApiConfigSource::default()
    }
}

/// The workload's own certificate.
pub(crate) fn own_certificate() -> SdsSecretConfig {
    secret(OWN_CERTIFICATE, From::Agent)
}

/// Peers have certificates of the mesh, and one of these names (any, where none is given).
pub(crate) fn mesh_peers(names: Vec<StringMatcher>) -> ValidationContextType {
    validated(secret(MESH_ROOTS, From::Agent), names_only(names))
}

/// Conditions on names alone.
#[expect(
    deprecated,
    reason = "Istio sends this field; the newer one takes one entry per kind of name"
)]
pub(crate) fn names_only(names: Vec<StringMatcher>) -> CertificateValidationContext {
    CertificateValidationContext {
        match_subject_alt_names: names,
        ..CertificateValidationContext::default()
    }
}

/// Peers have certificates of these roots, and fulfil the conditions.
pub(crate) fn validated(
    roots: SdsSecretConfig,
    conditions: CertificateValidationContext,
) -> ValidationContextType {
    ValidationContextType::CombinedValidationContext(CombinedCertificateValidationContext {
        default_validation_context: Some(conditions),
        validation_context_sds_secret_config: Some(roots),
        ..CombinedCertificateValidationContext::default()
    })
}

pub(crate) fn exact(names: impl IntoIterator<Item = impl Into<String>>) -> Vec<StringMatcher> {
    let matcher = |name: String| StringMatcher {
        match_pattern: Some(MatchPattern::Exact(name)),
        ignore_case: false,
    };
    names.into_iter().map(|name| matcher(name.into())).collect()
}

/// The trust domain and its aliases.
pub(crate) fn trust_domains(mesh: &Mesh) -> impl Iterator<Item = &str> + Clone {
    let config = mesh.config();
    std::iter::once(config.trust_domain.as_str())
        .chain(config.trust_domain_aliases.iter().map(String::as_str))
}

/// Mutual TLS on the inbound side of a workload: any identity of the mesh's trust domains.
pub(crate) fn inbound(mesh: &Mesh, alpn: &[&str]) -> TransportSocket {
    let config = &mesh.config().mesh_mtls;
    let mut parameters = parameters(config);
    if parameters.cipher_suites.is_empty() {
        parameters.cipher_suites = texts(&INBOUND_CIPHERS);
    }
    let domains = trust_domains(mesh).map(|domain| StringMatcher {
        match_pattern: Some(MatchPattern::Prefix(format!("spiffe://{domain}/"))),
        ignore_case: false,
    });
    let context = DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            tls_params: Some(parameters),
            alpn_protocols: texts(alpn),
            tls_certificate_sds_secret_configs: vec![own_certificate()],
            validation_context_type: Some(mesh_peers(domains.collect())),
            ..CommonTlsContext::default()
        }),
        require_client_certificate: boolean(true),
        ..DownstreamTlsContext::default()
    };
    socket(&context)
}

/// Versions 1.2 to 1.3 unless the mesh says otherwise, with its suites and curves.
pub(crate) fn parameters(config: &TlsConfig) -> TlsParameters {
    let lowest = match config.min_protocol_version {
        MinTlsVersion::Auto | MinTlsVersion::V1_2 => TlsProtocol::TlSv12,
        MinTlsVersion::V1_3 => TlsProtocol::TlSv13,
    };
    TlsParameters {
        tls_minimum_protocol_version: lowest as i32,
        tls_maximum_protocol_version: TlsProtocol::TlSv13 as i32,
        cipher_suites: config.cipher_suites.clone(),
        ecdh_curves: config.ecdh_curves.clone(),
        ..TlsParameters::default()
    }
}

pub(crate) fn socket<M: Message + Name>(context: &M) -> TransportSocket {
    named_socket("envoy.transport_sockets.tls", context)
}

pub(crate) fn plain() -> TransportSocket {
    named_socket("envoy.transport_sockets.raw_buffer", &RawBuffer {})
}

/// A transport that begins with a PROXY protocol header.
pub(crate) fn announced(
    version: proxy_protocol_config::Version,
    inner: TransportSocket,
) -> TransportSocket {
    let context = ProxyProtocolUpstreamTransport {
        config: Some(ProxyProtocolConfig {
            version: version as i32,
            ..ProxyProtocolConfig::default()
        }),
        transport_socket: Some(inner),
        ..ProxyProtocolUpstreamTransport::default()
    };
    named_socket("envoy.transport_sockets.upstream_proxy_protocol", &context)
}

fn named_socket<M: Message + Name>(name: &str, config: &M) -> TransportSocket {
    TransportSocket {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(config))),
    }
}

/// The resource name of a secret that an object refers to: of its own form (`kubernetes-gateway://ns/name`) as it stands.
pub(crate) fn credential(name: &str) -> String {
    if name.contains("://") {
        name.to_owned()
    } else {
        format!("kubernetes://{name}")
    }
}

/// The resource name of the roots in a secret.
pub(crate) fn credential_roots(name: &str) -> String {
    let name = credential(name);
    if name.ends_with("-cacert") {
        name
    } else {
        format!("{name}-cacert")
    }
}

/// The agent's name for a certificate from files.
pub(crate) fn file_certificate(certificate: &str, key: &str) -> String {
    format!("file-cert:{certificate}~{key}")
}

/// The agent's name for roots from a file; `system` is what the proxy's machine trusts.
pub(crate) fn file_roots(file: &str) -> String {
    format!("file-root:{file}")
}
