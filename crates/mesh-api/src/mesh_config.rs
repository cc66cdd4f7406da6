//! MeshConfig and the default ProxyConfig: settings of the whole mesh, as the ConfigMap `istio` holds them.
//!
//! Strict: a name that Istio does not know is an error. Names that Istio knows and this version does not implement are accepted and
//! reported by [`MeshConfig::unsupported`], so that nothing is ignored in silence.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Duration;
use crate::networking::destination_rule::{
    ConnectionPoolSettings, H2UpgradePolicy, LocalityLbSetting, OutlierDetection, TcpKeepalive,
};
use crate::networking::virtual_service::HttpRetry;
use crate::object::{ParseError, typed};

pub use providers::{ExtAuthzGrpc, ExtAuthzHttp, ExtensionProvider, RequestBody};
pub use tls::{MinTlsVersion, PathNormalization, PathNormalizationKind, TlsConfig};

mod providers;
mod tls;

/// Settings of the whole mesh.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MeshConfig {
    /// Port to which outgoing connections are redirected; default 15001.
    pub proxy_listen_port: u16,
    /// Port to which incoming connections are redirected; default 15006.
    pub proxy_inbound_listen_port: u16,
    /// Limit for connecting to an endpoint; default 10s.
    pub connect_timeout: Duration,
    /// How long the proxy waits for the first bytes that tell the protocol; 0 (default) is no limit.
    pub protocol_detection_timeout: Duration,
    /// What happens to traffic to unknown destinations; default is to pass it through.
    pub outbound_traffic_policy: OutboundTrafficPolicy,
    /// Namespace whose objects hold for the whole mesh; default `istio-system`.
    pub root_namespace: String,
    /// Trust domain of the mesh's identities; default `cluster.local`.
    pub trust_domain: String,
    /// Other trust domains whose identities count as the mesh's own; default none.
    pub trust_domain_aliases: Vec<String>,
    /// Whether clients use mutual TLS toward workloads that offer it, where no DestinationRule says; default true.
    pub enable_auto_mtls: bool,
    /// Limits for mutual TLS between workloads.
    #[serde(rename = "meshMTLS")]
    pub mesh_mtls: TlsConfig,
    /// Limits for all other TLS: gateways' servers and DestinationRules of mode SIMPLE and MUTUAL.
    pub tls_defaults: TlsConfig,
    /// What is done to paths before anything looks at them; default is RFC 3986's normalization.
    pub path_normalization: PathNormalization,
    /// Services that policies name.
    pub extension_providers: Vec<ExtensionProvider>,
    /// Namespaces that see services which don't say so themselves; default all (`*`).
    pub default_service_export_to: Vec<String>,
    /// Namespaces that see VirtualServices which don't say so themselves; default all (`*`).
    pub default_virtual_service_export_to: Vec<String>,
    /// Namespaces that see DestinationRules which don't say so themselves; default all (`*`).
    pub default_destination_rule_export_to: Vec<String>,
    /// Whether HTTP/1.1 is sent as HTTP/2 where nothing else says so; default no.
    pub h2_upgrade_policy: H2UpgradePolicy,
    /// Keep-alive probes toward every destination; DestinationRules override it value by value. Default: none.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// How localities are preferred where no DestinationRule says; default is to prefer near ones where outlier detection is on.
    pub locality_lb_setting: Option<LocalityLbSetting>,
    /// When requests are tried again where no VirtualService says; default is Istio's own policy.
    pub default_http_retry_policy: Option<HttpRetry>,
    /// Parts of a traffic policy that hold where no DestinationRule sets them.
    pub default_traffic_policy: DefaultTrafficPolicy,
    /// Whether the pod's own metrics are merged with the proxy's; default true.
    pub enable_prometheus_merge: bool,
    /// Roots of authorities elsewhere, with the signers whose certificates they verify; default none.
    pub ca_certificates: Vec<CertificateData>,
    /// Settings of every proxy.
    pub default_config: ProxyConfig,
    #[serde(skip)]
    unsupported: Vec<String>,
}

/// Roots of an authority elsewhere (Istio's `MeshConfig.CertificateData`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CertificateData {
    /// The roots, PEM.
    pub pem: String,
    /// Names of Kubernetes' signers that they are of; none means every signer.
    pub cert_signers: Vec<String>,
    spiffe_bundle_url: String,
    trust_domains: Vec<String>,
}

impl Default for MeshConfig {
    fn default() -> Self {
        let everyone = || vec!["*".to_owned()];
        Self {
            proxy_listen_port: 15001,
            proxy_inbound_listen_port: 15006,
            connect_timeout: Duration::from_secs(10),
            protocol_detection_timeout: Duration::default(),
            outbound_traffic_policy: OutboundTrafficPolicy::default(),
            root_namespace: "istio-system".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            trust_domain_aliases: Vec::new(),
            enable_auto_mtls: true,
            mesh_mtls: TlsConfig::default(),
            tls_defaults: TlsConfig::default(),
            path_normalization: PathNormalization::default(),
            extension_providers: Vec::new(),
            default_service_export_to: everyone(),
            default_virtual_service_export_to: everyone(),
            default_destination_rule_export_to: everyone(),
            h2_upgrade_policy: H2UpgradePolicy::DoNotUpgrade,
            tcp_keepalive: None,
            locality_lb_setting: Some(LocalityLbSetting::default()),
            default_http_retry_policy: None,
            default_traffic_policy: DefaultTrafficPolicy::default(),
            enable_prometheus_merge: true,
            ca_certificates: Vec::new(),
            default_config: ProxyConfig::default(),
            unsupported: Vec::new(),
        }
    }
}

/// Parts of a traffic policy for the whole mesh.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DefaultTrafficPolicy {
    /// Limits and timeouts of connections.
    pub connection_pool: Option<ConnectionPoolSettings>,
    /// When a failing endpoint is set aside.
    pub outlier_detection: Option<OutlierDetection>,
}

/// What happens to traffic to unknown destinations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutboundTrafficPolicy {
    /// Allow or refuse.
    pub mode: OutboundTrafficMode,
}

/// What happens to traffic to unknown destinations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundTrafficMode {
    /// Refused.
    RegistryOnly,
    /// Passed through.
    #[default]
    AllowAny,
}

/// Settings of a proxy (`meshConfig.defaultConfig`, annotation `proxy.istio.io/config`).
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// Host and port of the control plane; default `istiod.istio-system.svc:15012`, as with Istio.
    pub discovery_address: String,
    /// Port of the admin interface on the loopback address; default 15000.
    pub proxy_admin_port: u16,
    /// Port of the agent (health, merged metrics); default 15020.
    pub status_port: u16,
    /// Worker threads; none means by CPU limit, 0 one per core.
    pub concurrency: Option<u32>,
    /// How traffic reaches the proxy.
    pub interception_mode: InterceptionMode,
    /// Start the application only once the proxy is ready (classic sidecars); default false.
    pub hold_application_until_proxy_starts: bool,
    /// How long open connections may go on when the proxy ends; default 5s.
    pub termination_drain_duration: Duration,
    /// How long connections of a removed listener may go on; default 45s.
    pub drain_duration: Duration,
    /// Name of the service that the proxy serves; default `istio-proxy`.
    pub service_cluster: String,
    /// More environment variables of the proxy.
    pub proxy_metadata: BTreeMap<String, String>,
    #[serde(skip)]
    unsupported: Vec<String>,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            discovery_address: "istiod.istio-system.svc:15012".to_owned(),
            proxy_admin_port: 15000,
            status_port: 15020,
            concurrency: None,
            interception_mode: InterceptionMode::Redirect,
            hold_application_until_proxy_starts: false,
            termination_drain_duration: Duration::from_secs(5),
            drain_duration: Duration::from_secs(45),
            service_cluster: "istio-proxy".to_owned(),
            proxy_metadata: BTreeMap::new(),
            unsupported: Vec::new(),
        }
    }
}

/// How traffic reaches the proxy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum InterceptionMode {
    /// By redirection; the client's address is lost on the inbound side.
    #[default]
    Redirect,
    /// Transparently.
    Tproxy,
    /// Not at all.
    None,
}

/// MeshConfig fields that Istio knows and this version does not implement.
const MESH_FIELDS_NOT_IMPLEMENTED: &[&str] = &[
    "proxyHttpPort",
    "ingressClass",
    "ingressService",
    "ingressControllerMode",
    "ingressSelector",
    "enableTracing",
    "accessLogFile",
    "accessLogFormat",
    "accessLogEncoding",
    "enableEnvoyAccessLogService",
    "disableEnvoyListenerLog",
    "inboundTrafficPolicy",
    "ca",
    "certificates",
    "zoneAwareLbSetting",
    "dnsRefreshRate",
    "inboundClusterStatName",
    "outboundClusterStatName",
    "defaultProviders",
    "discoverySelectors",
    "serviceSettings",
    "serviceScopeConfigs",
    "serviceEntryVisibility",
    "hboneIdleTimeout",
    "configSources",
    "verifyCertificateAtClient",
    "thriftConfig",
    "enableClientSidePolicyCheck",
];

/// ProxyConfig fields that Istio knows and this version does not implement.
const PROXY_FIELDS_NOT_IMPLEMENTED: &[&str] = &[
    "configPath",
    "binaryPath",
    "customConfigFile",
    "statNameLength",
    "controlPlaneAuthPolicy",
    "tracing",
    "tracingServiceName",
    "gatewayTopology",
    "proxyStatsMatcher",
    "extraStatTags",
    "statsCompression",
    "fileFlushInterval",
    "fileFlushMinSizeKb",
    "readinessProbe",
    "meshId",
    "image",
    "runtimeValues",
    "caCertificatesPem",
    "privateKeyProvider",
    "envoyAccessLogService",
    "envoyMetricsService",
    "statsdUdpAddress",
    "proxyHeaders",
    "connectionSettings",
    "parentShutdownDuration",
    "proxyBootstrapTemplatePath",
    "zipkinAddress",
    "availabilityZone",
    "connectTimeout",
];

impl MeshConfig {
    /// Reads the mesh configuration from the text of the ConfigMap's key `mesh`; an empty text is the default.
    ///
    /// # Errors
    /// A text that is not YAML, an unknown field, or a value of the wrong form.
    pub fn from_yaml(text: &str) -> Result<Self, ParseError> {
        match document(text)? {
            Some(value) => Self::from_value(&value),
            None => Ok(Self::default()),
        }
    }

    /// As [`Self::from_yaml`] for a control plane beside a newer installation: fields that Istio does not know, or not yet, are left out and
    /// returned as the errors that they are. The rest holds.
    ///
    /// # Errors
    /// A text that is not YAML, or a value of the wrong form.
    pub fn from_newer_yaml(text: &str) -> Result<(Self, Vec<ParseError>), ParseError> {
        let mut left_out = Vec::new();
        let Some(mut value) = document(text)? else {
            return Ok((Self::default(), left_out));
        };
        // Bounded: each round takes a field away.
        loop {
            match Self::from_value(&value) {
                Err(error)
                    if error.message.starts_with("unknown field")
                        && take_away(&mut value, &error.path) =>
                {
                    left_out.push(error);
                }
                read => return read.map(|config| (config, left_out)),
            }
        }
    }

    /// Reads the mesh configuration from JSON, over the defaults.
    ///
    /// # Errors
    /// An unknown field, or a value of the wrong form.
    pub fn from_value(value: &Value) -> Result<Self, ParseError> {
        let (mut known, mut unsupported) = split(value, MESH_FIELDS_NOT_IMPLEMENTED, "")?;
        unsupported.extend(providers::take_unsupported(&mut known)?);
        let proxy = match known.remove("defaultConfig") {
            Some(proxy) if !proxy.is_null() => ProxyConfig::parse(&proxy, "defaultConfig")?,
            _ => ProxyConfig::default(),
        };
        let mut config: Self = typed(&Value::Object(known), "")?;
        for (index, data) in config.ca_certificates.iter().enumerate() {
            let given = [
                ("spiffeBundleUrl", !data.spiffe_bundle_url.is_empty()),
                ("trustDomains", !data.trust_domains.is_empty()),
            ];
            let given = given.into_iter().filter(|(_, given)| *given);
            unsupported.extend(given.map(|(field, _)| format!("caCertificates[{index}].{field}")));
        }
        unsupported.extend(proxy.unsupported.iter().cloned());
        config.default_config = proxy;
        config.unsupported = unsupported;
        Ok(config)
    }

    /// Fields that were given and that this version does not implement, by path (`defaultConfig.tracing`).
    pub fn unsupported(&self) -> Vec<String> {
        self.unsupported.clone()
    }
}

impl ProxyConfig {
    /// Reads proxy settings from YAML (the annotation `proxy.istio.io/config`), over the defaults.
    ///
    /// # Errors
    /// A text that is not YAML, an unknown field, or a value of the wrong form.
    pub fn from_yaml(text: &str) -> Result<Self, ParseError> {
        match document(text)? {
            Some(value) => Self::parse(&value, ""),
            None => Ok(Self::default()),
        }
    }

    /// These settings with those of a YAML text (the annotation `proxy.istio.io/config`) over them.
    ///
    /// # Errors
    /// A text that is not YAML, an unknown field, or a value of the wrong form.
    pub fn overlaid(&self, text: &str) -> Result<Self, ParseError> {
        let Some(value) = document(text)? else {
            return Ok(self.clone());
        };
        let own = Self::parse(&value, "")?;
        let given = |field: &str| value.get(field).is_some_and(|value| !value.is_null());
        let mut result = self.clone();
        macro_rules! take {
            ($($name:literal $field:ident),*) => {
                $(if given($name) { result.$field = own.$field; })*
            };
        }
        take!(
            "discoveryAddress" discovery_address, "proxyAdminPort" proxy_admin_port, "statusPort" status_port, "concurrency" concurrency,
            "interceptionMode" interception_mode, "holdApplicationUntilProxyStarts" hold_application_until_proxy_starts,
            "terminationDrainDuration" termination_drain_duration, "drainDuration" drain_duration, "serviceCluster" service_cluster
        );
        result.proxy_metadata.extend(own.proxy_metadata);
        result.unsupported.extend(own.unsupported);
        Ok(result)
    }

    /// Reads proxy settings from JSON, over the defaults.
    ///
    /// # Errors
    /// An unknown field, or a value of the wrong form.
    pub fn from_value(value: &Value) -> Result<Self, ParseError> {
        Self::parse(value, "")
    }

    /// Fields that were given and that this version does not implement.
    pub fn unsupported(&self) -> &[String] {
        &self.unsupported
    }

    fn parse(value: &Value, root: &str) -> Result<Self, ParseError> {
        let (known, unsupported) = split(value, PROXY_FIELDS_NOT_IMPLEMENTED, root)?;
        let mut config: Self = typed(&Value::Object(known), root)?;
        config.unsupported = unsupported;
        Ok(config)
    }
}

/// The one document of a text.
fn document(text: &str) -> Result<Option<Value>, ParseError> {
    let documents = crate::yaml::documents(text, "mesh configuration")
        .map_err(|error| ParseError::new("", error.to_string(), ""))?;
    if documents.len() > 1 {
        return Err(ParseError::new(
            "",
            format!("{} documents", documents.len()),
            "one",
        ));
    }
    Ok(documents.into_iter().next())
}

/// Removes the field at a path as errors write it (`a.b[0].c`); false if there is none.
fn take_away(value: &mut Value, path: &str) -> bool {
    let pointer = format!("/{}", path.replace(['.', '['], "/").replace(']', ""));
    let Some((parent, field)) = pointer.rsplit_once('/') else {
        return false;
    };
    value
        .pointer_mut(parent)
        .and_then(Value::as_object_mut)
        .is_some_and(|fields| fields.remove(field).is_some())
}

/// Separates the fields that are not implemented from the rest.
fn split(
    value: &Value,
    not_implemented: &[&str],
    root: &str,
) -> Result<(Map<String, Value>, Vec<String>), ParseError> {
    let Some(fields) = value.as_object() else {
        return Err(ParseError::new(
            root,
            "not a map of settings",
            "fields such as rootNamespace: istio-system",
        ));
    };
    let prefix = if root.is_empty() {
        String::new()
    } else {
        format!("{root}.")
    };
    let mut known = Map::new();
    let mut rest = Vec::new();
    for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        if not_implemented.contains(&name.as_str()) {
            rest.push(format!("{prefix}{name}"));
        } else {
            known.insert(name.clone(), value.clone());
        }
    }
    Ok((known, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_istios() {
        let config = MeshConfig::from_yaml("").expect("empty");
        assert_eq!(config, MeshConfig::default());
        assert_eq!(
            (config.proxy_listen_port, config.default_config.status_port),
            (15001, 15020)
        );
    }

    #[test]
    fn a_setting_replaces_its_default_only() {
        let config = MeshConfig::from_yaml("rootNamespace: mesh\noutboundTrafficPolicy: {mode: REGISTRY_ONLY}\ndefaultConfig: {concurrency: 2}").expect("valid");
        assert_eq!(config.root_namespace, "mesh");
        assert_eq!(
            config.outbound_traffic_policy.mode,
            OutboundTrafficMode::RegistryOnly
        );
        assert_eq!(config.default_config.concurrency, Some(2));
        assert_eq!(config.trust_domain, "cluster.local");
    }

    #[test]
    fn security_settings_are_read() {
        let text = "
trustDomainAliases: [old]
enableAutoMtls: false
meshMTLS: {minProtocolVersion: TLSV1_3, ecdhCurves: [X25519]}
pathNormalization: {normalization: DECODE_AND_MERGE_SLASHES}
extensionProviders:
- {name: authz, envoyExtAuthzGrpc: {service: foo/ext-authz, port: 9000, includeRequestBodyInCheck: {maxRequestBytes: 8}}}
- {name: zip, zipkin: {service: z, port: 1}}";
        let config = MeshConfig::from_yaml(text).expect("valid");
        assert_eq!(config.mesh_mtls.min_protocol_version, MinTlsVersion::V1_3);
        assert!(!config.enable_auto_mtls);
        assert_eq!(
            config.path_normalization.normalization,
            PathNormalizationKind::DecodeAndMergeSlashes
        );
        assert!(config.extension_providers[0].envoy_ext_authz_grpc.is_some());
        assert_eq!(config.unsupported(), ["extensionProviders[1].zipkin"]);
        let default =
            MeshConfig::from_yaml("pathNormalization: {normalization: DEFAULT}").expect("valid");
        assert_eq!(default.path_normalization, PathNormalization::default());
    }

    #[test]
    fn unknown_fields_are_errors_and_unimplemented_ones_are_reported() {
        let error = MeshConfig::from_yaml("defaultConfig: {concurency: 2}").expect_err("misspelt");
        assert_eq!(error.path, "defaultConfig.concurency");
        let config =
            MeshConfig::from_yaml("accessLogFile: /dev/stdout\ndefaultConfig: {tracing: {}}")
                .expect("known to Istio");
        assert_eq!(
            config.unsupported(),
            ["accessLogFile", "defaultConfig.tracing"]
        );
    }

    #[test]
    fn fields_of_a_newer_version_are_left_out_by_name() {
        let text = "
trustDomain: example.org
future: {deep: [1]}
outboundTrafficPolicy: {mode: REGISTRY_ONLY, future: 1}
caCertificates: [{pem: one}, {pem: two, future: [z]}]
defaultConfig: {concurrency: 2, future: {}}";
        let (config, left_out) = MeshConfig::from_newer_yaml(text).expect("readable");
        let mut paths: Vec<_> = left_out.iter().map(|error| error.path.as_str()).collect();
        paths.sort_unstable();
        assert_eq!(
            paths,
            [
                "caCertificates[1].future",
                "defaultConfig.future",
                "future",
                "outboundTrafficPolicy.future"
            ]
        );
        let known = "
trustDomain: example.org
outboundTrafficPolicy: {mode: REGISTRY_ONLY}
caCertificates: [{pem: one}, {pem: two}]
defaultConfig: {concurrency: 2}";
        assert_eq!(config, MeshConfig::from_yaml(known).expect("valid"));
        // A value that is not understood is no field that could be left out: the default might allow what was forbidden.
        let wrong = "outboundTrafficPolicy: {mode: FUTURE}";
        let error = MeshConfig::from_newer_yaml(wrong).expect_err("unknown");
        assert_eq!(error.path, "outboundTrafficPolicy.mode");
    }
}
