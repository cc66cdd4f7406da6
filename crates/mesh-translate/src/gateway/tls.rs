//! How a gateway ends TLS (pilot/pkg/networking/core/listener.go, `BuildListenerTLSContext`).

use std::collections::BTreeSet;
use std::time::Duration;

use envoy_types::pb::envoy::config::listener::v3::FilterChain;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol as Version;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
    TlsParameters,
};
use mesh_api::networking::gateway::{ServerTlsMode, ServerTlsSettings, TlsProtocol};
use mesh_model::Mesh;

use crate::cluster::revocations;
use crate::pb::{boolean, duration};
use crate::tls::{self, From};

/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(15);

/// Makes a chain end TLS; `secrets` gets the names of what the control plane has to provide.
pub(super) fn end(
    mut chain: FilterChain,
    mesh: &Mesh,
    given: &ServerTlsSettings,
    http: bool,
    secrets: &mut BTreeSet<String>,
) -> FilterChain {
    let own = given.mode == ServerTlsMode::IstioMutual;
    let mut context = CommonTlsContext {
        tls_params: Some(parameters(mesh, given)),
        alpn_protocols: tls::texts(if own && !http {
            tls::ALPN_TCP
        } else {
            tls::ALPN_HTTP
        }),
        tls_certificate_sds_secret_configs: certificates(given, secrets),
        ..CommonTlsContext::default()
    };
    let verified = matches!(
        given.mode,
        ServerTlsMode::Mutual | ServerTlsMode::IstioMutual | ServerTlsMode::OptionalMutual
    );
    if verified {
        context.validation_context_type = Some(validation(given, secrets));
    }
    let required = verified && given.mode != ServerTlsMode::OptionalMutual;
    chain.transport_socket = Some(tls::socket(&DownstreamTlsContext {
        common_tls_context: Some(context),
        require_client_certificate: boolean(required),
        ..DownstreamTlsContext::default()
    }));
    chain.transport_socket_connect_timeout = duration(HANDSHAKE);
    chain
}

/// The server's versions, suites and curves, the mesh's where it names none.
fn parameters(mesh: &Mesh, given: &ServerTlsSettings) -> TlsParameters {
    let defaults = tls::parameters(&mesh.config().tls_defaults);
    let or = |own: &Vec<String>, default: Vec<String>| {
        if own.is_empty() { default } else { own.clone() }
    };
    TlsParameters {
        tls_minimum_protocol_version: version(given.min_protocol_version)
            .unwrap_or(defaults.tls_minimum_protocol_version),
        tls_maximum_protocol_version: version(given.max_protocol_version)
            .unwrap_or(defaults.tls_maximum_protocol_version),
        cipher_suites: or(&given.cipher_suites, defaults.cipher_suites),
        ecdh_curves: or(&given.ecdh_curves, defaults.ecdh_curves),
        ..TlsParameters::default()
    }
}

fn version(version: TlsProtocol) -> Option<i32> {
    let version = match version {
        TlsProtocol::TlsAuto => return None,
        TlsProtocol::Tlsv1_0 => Version::TlSv10,
        TlsProtocol::Tlsv1_1 => Version::TlSv11,
        TlsProtocol::Tlsv1_2 => Version::TlSv12,
        TlsProtocol::Tlsv1_3 => Version::TlSv13,
    };
    Some(version as i32)
}

/// The server's own certificates: of the mesh, of secrets, or of files.
fn certificates(given: &ServerTlsSettings, secrets: &mut BTreeSet<String>) -> Vec<SdsSecretConfig> {
    if given.mode == ServerTlsMode::IstioMutual {
        return vec![tls::own_certificate()];
    }
    let named: Vec<&String> = if given.credential_names.is_empty() {
        let one = &given.credential_name;
        (!one.is_empty()).then_some(one).into_iter().collect()
    } else {
        given.credential_names.iter().collect()
    };
    if !named.is_empty() {
        let of_secret = |name: &&String| {
            let name = tls::credential(name);
            secrets.insert(name.clone());
            tls::secret(name, From::ControlPlane)
        };
        return named.iter().map(of_secret).collect();
    }
    let of_files = |certificate: &str, key: &str| {
        tls::secret(tls::file_certificate(certificate, key), From::Agent)
    };
    if given.tls_certificates.is_empty() {
        return vec![of_files(&given.server_certificate, &given.private_key)];
    }
    given
        .tls_certificates
        .iter()
        .map(|files| of_files(&files.server_certificate, &files.private_key))
        .collect()
}

/// What is asked of a client's certificate.
fn validation(given: &ServerTlsSettings, secrets: &mut BTreeSet<String>) -> ValidationContextType {
    let conditions = CertificateValidationContext {
        verify_certificate_spki: given.verify_certificate_spki.clone(),
        verify_certificate_hash: given.verify_certificate_hash.clone(),
        crl: revocations(&given.ca_crl),
        ..tls::names_only(tls::exact(&given.subject_alt_names))
    };
    if given.insecure_skip_verify == Some(true) {
        return ValidationContextType::ValidationContext(CertificateValidationContext::default());
    }
    if given.mode == ServerTlsMode::IstioMutual {
        return tls::mesh_peers(tls::exact(&given.subject_alt_names));
    }
    let named = [&given.ca_cert_credential_name, &given.credential_name]
        .into_iter()
        .chain(given.credential_names.first())
        .find(|name| !name.is_empty());
    let roots = match named {
        Some(name) => {
            let name = tls::credential_roots(name);
            secrets.insert(name.clone());
            tls::secret(name, From::ControlPlane)
        }
        None => {
            let of_certificate = given.tls_certificates.first();
            let file = match given.ca_certificates.as_str() {
                "" => of_certificate.map_or("", |files| files.ca_certificates.as_str()),
                file => file,
            };
            tls::secret(tls::file_roots(file), From::Agent)
        }
    };
    tls::validated(roots, conditions)
}
