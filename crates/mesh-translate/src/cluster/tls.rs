//! TLS toward endpoints, as Istio's pilot sets it (pilot/pkg/networking/core/cluster_tls.go).

use std::collections::BTreeSet;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, TransportSocketMatch,
};
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::{
    DataSource, TransportSocket, UpstreamHttpProtocolOptions, proxy_protocol_config,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, TlsParameters, UpstreamTlsContext,
};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::UpstreamProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
use envoy_types::pb::google::protobuf::Struct;
use mesh_api::mesh_config::TlsConfig;
use mesh_api::networking::destination_rule::{
    ClientTlsMode, ClientTlsSettings, ProxyProtocol, ProxyProtocolVersion,
};
use mesh_model::{Mesh, MtlsMode, Node, NodeKind, Service, ServicePort};

use super::Policy;
use crate::endpoint::takes_mutual_tls;
use crate::names;
use crate::tls::{self, From};

/// What a client speaks inside of mutual TLS; the alpn filter puts the version of HTTP in its place.
const IN_MESH: &[&str] = &["istio-peer-exchange", "istio"];
const IN_MESH_HTTP2: &[&str] = &["istio-peer-exchange", "istio", "h2"];
const HTTP2_ONLY: &[&str] = &["h2"];

/// A cluster whose transport is to be set.
pub(super) struct Target<'a> {
    pub(super) mesh: &'a Mesh,
    pub(super) node: &'a Node,
    pub(super) service: &'a Service,
    pub(super) port: &'a ServicePort,
    pub(super) subset: &'a str,
}

impl Target<'_> {
    /// Sets the transport; `secrets` gets the names of what the control plane has to provide. True if what the cluster says inside of TLS that it speaks
    /// is for its server alone, so that the alpn filter must leave it.
    pub(super) fn apply(
        &self,
        policy: &Policy<'_>,
        cluster: &mut Cluster,
        options: &mut Option<HttpProtocolOptions>,
        secrets: &mut BTreeSet<String>,
    ) -> bool {
        let own_alpn = self.apply_tls(policy, cluster, options, secrets);
        if let Some(given) = policy.rule.proxy_protocol {
            announce_clients(given, cluster);
        }
        own_alpn
    }

    fn apply_tls(
        &self,
        policy: &Policy<'_>,
        cluster: &mut Cluster,
        options: &mut Option<HttpProtocolOptions>,
        secrets: &mut BTreeSet<String>,
    ) -> bool {
        let http2 = is_http2(options.as_ref());
        let Some(given) = policy.rule.tls else {
            self.automatic(cluster, http2);
            return false;
        };
        match given.mode {
            ClientTlsMode::Disable => false,
            ClientTlsMode::IstioMutual => {
                cluster.transport_socket = Some(self.mutual(given, http2));
                false
            }
            ClientTlsMode::Simple | ClientTlsMode::Mutual => {
                set_automatic_names(given, options);
                cluster.transport_socket = Some(self.originated(given, http2, secrets));
                true
            }
        }
    }

    /// Mutual TLS toward endpoints that take it, plain text toward others.
    fn automatic(&self, cluster: &mut Cluster, http2: bool) {
        let Self {
            mesh,
            service,
            port,
            ..
        } = self;
        if !mesh.config().enable_auto_mtls
            || service.external_name.is_some()
            || mesh.namespace_mtls(&service.namespace) == MtlsMode::Disable
        {
            return;
        }
        let socket = self.mutual(&ClientTlsSettings::default(), http2);
        if is_original_destination(cluster) {
            // The endpoint is known only when a connection is made: all of them have to take it.
            let endpoints = service.endpoints(port.number);
            let mut all = endpoints
                .iter()
                .map(|endpoint| takes_mutual_tls(mesh, endpoint));
            if !endpoints.is_empty() && all.all(|takes| takes) {
                cluster.transport_socket = Some(socket);
            }
            return;
        }
        let plain = TransportSocketMatch {
            name: "tlsMode-disabled".to_owned(),
            r#match: Some(Struct::default()),
            transport_socket: Some(tls::plain()),
        };
        let mutual = TransportSocketMatch {
            name: "tlsMode-istio".to_owned(),
            r#match: Some(crate::metadata::tls_mode()),
            transport_socket: Some(socket),
        };
        cluster.transport_socket_matches = vec![mutual, plain];
    }

    /// With the mesh's certificates. What the rule leaves out is the service's own: its accounts and its name.
    fn mutual(&self, given: &ClientTlsSettings, http2: bool) -> TransportSocket {
        let names = if given.subject_alt_names.is_empty() {
            self.identities()
        } else {
            given.subject_alt_names.clone()
        };
        let sni = if given.sni.is_empty() {
            names::sni(self.port.number, self.subset, &self.service.host)
        } else {
            given.sni.clone()
        };
        let context = CommonTlsContext {
            tls_params: Some(tls::parameters(&TlsConfig::default())),
            alpn_protocols: tls::texts(if http2 { IN_MESH_HTTP2 } else { IN_MESH }),
            tls_certificate_sds_secret_configs: vec![tls::own_certificate()],
            validation_context_type: Some(tls::mesh_peers(tls::exact(names))),
            ..CommonTlsContext::default()
        };
        socket(context, sni)
    }

    /// Who may answer for the service: its endpoints' service accounts in the trust domain and its aliases.
    fn identities(&self) -> Vec<String> {
        let accounts = self.service.service_accounts();
        let domains = tls::trust_domains(self.mesh);
        let mut identities: Vec<String> = accounts
            .into_iter()
            .flat_map(|(namespace, account)| {
                domains
                    .clone()
                    .map(move |domain| format!("spiffe://{domain}/ns/{namespace}/sa/{account}"))
            })
            .collect();
        identities.sort();
        identities
    }

    /// With certificates of the rule's own.
    fn originated(
        &self,
        given: &ClientTlsSettings,
        http2: bool,
        secrets: &mut BTreeSet<String>,
    ) -> TransportSocket {
        let mutual = given.mode == ClientTlsMode::Mutual;
        let mut context = CommonTlsContext {
            tls_params: Some(self.originated_parameters()),
            alpn_protocols: if http2 {
                tls::texts(HTTP2_ONLY)
            } else {
                Vec::new()
            },
            ..CommonTlsContext::default()
        };
        let skip = given.insecure_skip_verify == Some(true);
        let roots = if given.credential_name.is_empty() || !self.may_have_credentials() {
            if mutual {
                let name = tls::file_certificate(&given.client_certificate, &given.private_key);
                context
                    .tls_certificate_sds_secret_configs
                    .push(tls::secret(name, From::Agent));
            }
            let file = match given.ca_certificates.as_str() {
                "" => "system",
                file => file,
            };
            tls::secret(tls::file_roots(file), From::Agent)
        } else {
            if mutual {
                let name = tls::credential(&given.credential_name);
                secrets.insert(name.clone());
                context
                    .tls_certificate_sds_secret_configs
                    .push(tls::secret(name, From::ControlPlane));
            }
            let name = tls::credential_roots(&given.credential_name);
            if !skip {
                secrets.insert(name.clone());
            }
            tls::secret(name, From::ControlPlane)
        };
        context.validation_context_type = Some(if skip {
            ValidationContextType::ValidationContext(CertificateValidationContext::default())
        } else {
            let conditions = CertificateValidationContext {
                crl: revocations(&given.ca_crl),
                ..tls::names_only(tls::exact(&given.subject_alt_names))
            };
            tls::validated(roots, conditions)
        });
        socket(context, given.sni.clone())
    }

    /// The mesh's suites and curves; its lowest version is for servers.
    fn originated_parameters(&self) -> TlsParameters {
        let defaults = &self.mesh.config().tls_defaults;
        tls::parameters(&TlsConfig {
            ecdh_curves: defaults.ecdh_curves.clone(),
            cipher_suites: defaults.cipher_suites.clone(),
            ..TlsConfig::default()
        })
    }

    /// Secrets are for gateways, and for those sidecars that a rule names by label: all others use files, as Istio documents it.
    fn may_have_credentials(&self) -> bool {
        self.node.kind == NodeKind::Router
            || self
                .mesh
                .destination_rule_for(&self.service.host, self.node)
                .is_some_and(|rule| rule.selector.is_some())
    }
}

/// Puts the PROXY protocol around every transport of a cluster, plain text where it has none (Istio's applyUpstreamProxyProtocol).
fn announce_clients(given: &ProxyProtocol, cluster: &mut Cluster) {
    let version = match given.version {
        ProxyProtocolVersion::V1 => proxy_protocol_config::Version::V1,
        ProxyProtocolVersion::V2 => proxy_protocol_config::Version::V2,
    };
    let wrap = |inner| tls::announced(version, inner);
    if cluster.transport_socket.is_some() || cluster.transport_socket_matches.is_empty() {
        let inner = cluster.transport_socket.take().unwrap_or_else(tls::plain);
        cluster.transport_socket = Some(wrap(inner));
    }
    for one in &mut cluster.transport_socket_matches {
        one.transport_socket = one.transport_socket.take().map(wrap);
    }
}

/// A list of revoked certificates from a file.
pub(crate) fn revocations(file: &str) -> Option<DataSource> {
    (!file.is_empty()).then(|| DataSource {
        specifier: Some(Specifier::Filename(file.to_owned())),
        ..DataSource::default()
    })
}

fn socket(context: CommonTlsContext, sni: String) -> TransportSocket {
    tls::socket(&UpstreamTlsContext {
        common_tls_context: Some(context),
        sni,
        ..UpstreamTlsContext::default()
    })
}

/// Where a rule names no server, requests say it by their Host, and the certificate has to be for it.
fn set_automatic_names(given: &ClientTlsSettings, options: &mut Option<HttpProtocolOptions>) {
    if !given.sni.is_empty() {
        return;
    }
    let verified = given.subject_alt_names.is_empty() && given.insecure_skip_verify != Some(true);
    options
        .get_or_insert_default()
        .upstream_http_protocol_options = Some(UpstreamHttpProtocolOptions {
        auto_sni: true,
        auto_san_validation: verified,
        ..UpstreamHttpProtocolOptions::default()
    });
}

fn is_original_destination(cluster: &Cluster) -> bool {
    cluster.cluster_discovery_type
        == Some(ClusterDiscoveryType::Type(
            DiscoveryType::OriginalDst as i32,
        ))
}

/// True if requests are always sent as HTTP/2.
fn is_http2(options: Option<&HttpProtocolOptions>) -> bool {
    let Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) =
        options.and_then(|options| options.upstream_protocol_options.as_ref())
    else {
        return false;
    };
    matches!(
        explicit.protocol_config,
        Some(ProtocolConfig::Http2ProtocolOptions(_))
    )
}
