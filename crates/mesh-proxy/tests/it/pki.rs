//! Authorities and certificates of the tests, and the TLS parts of configurations.

use std::time::{Duration, SystemTime};

use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{
    ApiConfigSource, ConfigSource, DataSource, TransportSocket, data_source,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::{
    CombinedCertificateValidationContext, ValidationContextType,
};
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::{Any, BoolValue};
use mesh_proxy::secrets::{MESH_ROOTS, Secret, WORKLOAD};
use mesh_proxy::shared::Shared;
use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType,
};

/// An authority.
pub struct Pki {
    pub root_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("params");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let root_pem = params.self_signed(&key).expect("a root").pem();
        Self {
            root_pem,
            issuer: Issuer::new(params, key),
        }
    }

    /// Chain and key of a certificate with these names; those with `://` are URIs.
    pub fn issue(&self, names: &[&str]) -> (String, String) {
        self.issue_until(names, Duration::from_secs(3600))
    }

    pub fn issue_until(&self, names: &[&str], lifetime: Duration) -> (String, String) {
        let mut params = CertificateParams::new(Vec::new()).expect("params");
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.contains("://") {
                true => SanType::URI((*name).try_into().expect("a URI")),
                false => SanType::DnsName((*name).try_into().expect("a name")),
            })
            .collect();
        params.not_before = (SystemTime::now() - Duration::from_secs(60)).into();
        params.not_after = (SystemTime::now() + lifetime).into();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().expect("a key");
        let chain = params.signed_by(&key, &self.issuer).expect("signed");
        (chain.pem(), key.serialize_pem())
    }

    /// Chain and key of a certificate with this serial number.
    pub fn issue_numbered(&self, name: &str, serial: u64) -> (String, String) {
        let names = vec![name.to_owned()];
        let mut params = CertificateParams::new(names).expect("params");
        params.serial_number = Some(serial.into());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let chain = params.signed_by(&key, &self.issuer).expect("signed");
        (chain.pem(), key.serialize_pem())
    }

    /// A list with one certificate that was called back, PEM.
    pub fn revoke(&self, serial: u64) -> String {
        let now = SystemTime::now();
        let revoked = RevokedCertParams {
            serial_number: serial.into(),
            revocation_time: (now - Duration::from_secs(60)).into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: (now - Duration::from_secs(60)).into(),
            next_update: (now + Duration::from_secs(3600)).into(),
            crl_number: 1_u64.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).expect("a list");
        list.pem().expect("PEM")
    }

    /// Gives a proxy a workload certificate of this authority, which it trusts, too.
    pub fn enrol(&self, shared: &Shared, identity: &str) {
        let (chain_pem, key_pem) = self.issue(&[identity]);
        shared
            .secrets
            .set(MESH_ROOTS, Secret::trust(self.root_pem.clone()))
            .expect("roots");
        let certificate = Secret::Certificate {
            chain_pem,
            key_pem: key_pem.into(),
        };
        shared
            .secrets
            .set(WORKLOAD, certificate)
            .expect("a certificate");
    }
}

pub fn agent_secret(name: &str) -> pb::SdsSecretConfig {
    pb::SdsSecretConfig {
        name: name.to_owned(),
        sds_config: Some(ConfigSource {
            config_source_specifier: Some(ConfigSourceSpecifier::ApiConfigSource(
                ApiConfigSource::default(),
            )),
            ..ConfigSource::default()
        }),
    }
}

pub fn exact(name: &str) -> StringMatcher {
    StringMatcher {
        match_pattern: Some(MatchPattern::Exact(name.to_owned())),
        ..StringMatcher::default()
    }
}

/// Istio's common part: the workload's certificate, the mesh's authorities, the names of peers.
pub fn mesh_context(alpn: &[&str], peers: &[&str]) -> pb::CommonTlsContext {
    #[allow(deprecated)]
    let names = pb::CertificateValidationContext {
        match_subject_alt_names: peers.iter().map(|name| exact(name)).collect(),
        ..pb::CertificateValidationContext::default()
    };
    let combined = CombinedCertificateValidationContext {
        default_validation_context: Some(names),
        validation_context_sds_secret_config: Some(agent_secret(MESH_ROOTS)),
        ..CombinedCertificateValidationContext::default()
    };
    pb::CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![agent_secret(WORKLOAD)],
        alpn_protocols: alpn.iter().map(|p| (*p).to_owned()).collect(),
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(combined)),
        ..pb::CommonTlsContext::default()
    }
}

pub fn server(context: pb::CommonTlsContext, require: bool) -> Option<TransportSocket> {
    let context = pb::DownstreamTlsContext {
        common_tls_context: Some(context),
        require_client_certificate: Some(BoolValue { value: require }),
        ..pb::DownstreamTlsContext::default()
    };
    socket("Downstream", &context)
}

pub fn client(context: pb::CommonTlsContext, sni: &str) -> Option<TransportSocket> {
    let context = pb::UpstreamTlsContext {
        common_tls_context: Some(context),
        sni: sni.to_owned(),
        ..pb::UpstreamTlsContext::default()
    };
    socket("Upstream", &context)
}

pub fn socket(side: &str, context: &impl Message) -> Option<TransportSocket> {
    let kind = format!("envoy.extensions.transport_sockets.tls.v3.{side}TlsContext");
    Some(TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(ConfigType::TypedConfig(Any {
            type_url: format!("type.googleapis.com/{kind}"),
            value: context.encode_to_vec(),
        })),
    })
}

pub fn inline(text: &str) -> Option<DataSource> {
    Some(DataSource {
        specifier: Some(data_source::Specifier::InlineString(text.to_owned())),
        ..DataSource::default()
    })
}

pub fn own((chain, key): &(String, String)) -> pb::TlsCertificate {
    pb::TlsCertificate {
        certificate_chain: inline(chain),
        private_key: inline(key),
        ..pb::TlsCertificate::default()
    }
}
