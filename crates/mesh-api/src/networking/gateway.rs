//! Gateway: what an ingress or egress gateway listens to.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

/// Ports and hosts of the gateways that the selector chooses.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Gateway {
    /// Labels of the gateway pods.
    pub selector: BTreeMap<String, String>,
    /// Ports and hosts.
    pub servers: Vec<Server>,
}

/// One port with its hosts.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["port", "hosts"]))]
pub struct Server {
    /// The port.
    pub port: Port,
    /// Address or unix socket to listen on; empty is all addresses.
    pub bind: String,
    /// Hosts as `[namespace/]name`, wildcards allowed.
    pub hosts: Vec<String>,
    /// TLS toward clients.
    pub tls: Option<ServerTlsSettings>,
    /// Where traffic goes that no route takes; sidecars only.
    pub default_endpoint: String,
    /// Name of the server.
    pub name: String,
}

/// A port.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("required" = ["number", "protocol", "name"]))]
pub struct Port {
    /// Number, 1 to 65535 (0 with a unix socket).
    pub number: u32,
    /// HTTP, HTTPS, GRPC, HTTP2, MONGO, TCP, TLS, HBONE and others that Istio names.
    pub protocol: String,
    /// Name, unique in the gateway.
    pub name: String,
    /// Belongs to ServiceEntry; refused here.
    pub target_port: u32,
}

/// TLS toward clients.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ServerTlsSettings {
    /// Answer plain HTTP with a redirect to https.
    pub https_redirect: bool,
    /// Which kind.
    pub mode: ServerTlsMode,
    /// File of the certificate.
    pub server_certificate: String,
    /// File of the key.
    pub private_key: String,
    /// File of the roots for client certificates.
    pub ca_certificates: String,
    /// File of the revocation list.
    pub ca_crl: String,
    /// Secret with certificates.
    pub credential_name: String,
    /// Secret with the roots for client certificates.
    pub ca_cert_credential_name: String,
    /// One or two secrets, for certificates of different kinds of keys.
    pub credential_names: Vec<String>,
    /// One or two certificates from files.
    pub tls_certificates: Vec<TlsCertificate>,
    /// Names of which a client's certificate must have one.
    pub subject_alt_names: Vec<String>,
    /// SHA-256 of allowed public keys, base64.
    pub verify_certificate_spki: Vec<String>,
    /// SHA-256 of allowed certificates, hex.
    pub verify_certificate_hash: Vec<String>,
    /// Lowest version; TLS_AUTO is 1.2.
    pub min_protocol_version: TlsProtocol,
    /// Highest version; TLS_AUTO is 1.3.
    pub max_protocol_version: TlsProtocol,
    /// Cipher suites up to TLS 1.2.
    pub cipher_suites: Vec<String>,
    /// Curves.
    pub ecdh_curves: Vec<String>,
    /// Accept any client certificate.
    pub insecure_skip_verify: Option<bool>,
}

/// A certificate from files.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TlsCertificate {
    /// File of the certificate.
    pub server_certificate: String,
    /// File of the key.
    pub private_key: String,
    /// File of the roots for client certificates.
    pub ca_certificates: String,
}

/// Kinds of TLS toward clients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ServerTlsMode {
    /// Not terminated here; routed by server name.
    #[default]
    Passthrough,
    /// TLS.
    Simple,
    /// TLS with client certificates.
    Mutual,
    /// Passed through; the server name says the cluster.
    AutoPassthrough,
    /// TLS with the mesh's own certificates.
    IstioMutual,
    /// TLS; client certificates are checked if sent.
    OptionalMutual,
}

/// Versions of TLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TlsProtocol {
    /// The proxy decides.
    #[default]
    TlsAuto,
    /// 1.0.
    #[serde(rename = "TLSV1_0")]
    Tlsv1_0,
    /// 1.1.
    #[serde(rename = "TLSV1_1")]
    Tlsv1_1,
    /// 1.2.
    #[serde(rename = "TLSV1_2")]
    Tlsv1_2,
    /// 1.3.
    #[serde(rename = "TLSV1_3")]
    Tlsv1_3,
}
