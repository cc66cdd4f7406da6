//! Rules for the kinds that take few.

use std::collections::HashSet;

use crate::extensions::wasm_plugin::{EnvValueSource, VmConfig};
use crate::extensions::{TrafficExtension, WasmPlugin};
use crate::networking::envoy_filter::{ApplyTo, PatchContext, PatchOperation};
use crate::networking::service_entry::Resolution;
use crate::networking::{
    EnvoyFilter, ProxyConfig, ServiceEntry, Sidecar, WorkloadEntry, WorkloadGroup,
};
use crate::security::authorization_policy::{Action, Operation, Source};
use crate::security::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication};
use crate::telemetry::{TagOperation, Telemetry};

use super::{Check, Validate, names};

impl Validate for ServiceEntry {
    fn validate(&self, check: &mut Check) {
        check.require(
            !self.hosts.is_empty(),
            "hosts",
            "a ServiceEntry needs at least one host",
        );
        check.each("hosts", &self.hosts, |check, host| match host.as_str() {
            "*" => check.error(
                "\"*\" would stand for every host there is; name a domain, such as *.example.com",
            ),
            host => {
                if let Err(message) = names::wildcard_host(host) {
                    check.error(message);
                }
            }
        });
        check.each("addresses", &self.addresses, |check, address| {
            if let Err(message) = names::cidr(address) {
                check.error(message);
            } else if address.contains('/')
                && !matches!(self.resolution, Resolution::None | Resolution::Static)
            {
                check.error("a block of addresses goes with resolution NONE or STATIC only");
            }
        });
        service_ports(self, check);
        service_endpoints(self, check);
        check.part("workloadSelector", &self.workload_selector);
        names::export_to(&self.export_to, true, check);
    }
}

fn service_ports(entry: &ServiceEntry, check: &mut Check) {
    let mut numbers = HashSet::new();
    let mut port_names = HashSet::new();
    check.each("ports", &entry.ports, |check, port| {
        names::port(port.number, "number", check);
        check.require(!port.name.is_empty(), "name", "a port needs a name");
        check.require(
            numbers.insert(port.number),
            "number",
            "this number is there twice",
        );
        check.require(
            port_names.insert(&port.name),
            "name",
            "this name is there twice",
        );
        if port.target_port != 0 {
            names::port(port.target_port, "targetPort", check);
        }
    });
}

fn service_endpoints(entry: &ServiceEntry, check: &mut Check) {
    let wildcard = entry.hosts.iter().any(|host| host.contains('*'));
    if entry.workload_selector.is_some() && !entry.endpoints.is_empty() {
        check.error_at(
            "endpoints",
            "endpoints and workloadSelector exclude each other",
        );
    }
    match entry.resolution {
        Resolution::None => check.require(
            entry.endpoints.is_empty(),
            "endpoints",
            "resolution NONE takes no endpoints",
        ),
        Resolution::Dns | Resolution::DnsRoundRobin if wildcard && entry.endpoints.is_empty() => {
            check.error_at("endpoints", "a wildcard host can't be resolved; list endpoints, or use resolution NONE or DYNAMIC_DNS");
        }
        Resolution::DnsRoundRobin => check.require(
            entry.endpoints.len() <= 1,
            "endpoints",
            "DNS_ROUND_ROBIN takes one endpoint",
        ),
        Resolution::DynamicDns => {
            check.require(wildcard, "hosts", "DYNAMIC_DNS is for wildcard hosts");
            check.require(
                entry.endpoints.is_empty(),
                "endpoints",
                "DYNAMIC_DNS takes no endpoints",
            );
            check.require(
                entry.addresses.is_empty(),
                "addresses",
                "DYNAMIC_DNS takes no addresses",
            );
        }
        _ => {}
    }
    check.each("endpoints", &entry.endpoints, |check, endpoint| {
        endpoint.validate(check);
        let literal = endpoint.address.parse::<std::net::IpAddr>().is_ok()
            || endpoint.address.starts_with("unix://");
        if entry.resolution == Resolution::Static && !literal {
            check.error_at(
                "address",
                "resolution STATIC needs an IP address or a unix socket",
            );
        }
        if endpoint.address.starts_with("unix://") && entry.ports.len() != 1 {
            check.error_at(
                "address",
                "a unix socket goes with exactly one service port",
            );
        }
    });
}

impl Validate for WorkloadEntry {
    fn validate(&self, check: &mut Check) {
        if self.address.is_empty() && self.network.is_empty() {
            check.error_at("address", "an address or a network is needed");
        } else if let Some(path) = self.address.strip_prefix("unix://") {
            check.require(
                path.starts_with('/') || path.starts_with('@'),
                "address",
                "a unix socket is unix:///path or unix://@name",
            );
            check.require(self.ports.is_empty(), "ports", "a unix socket has no ports");
        } else if !self.address.is_empty()
            && self.address.parse::<std::net::IpAddr>().is_err()
            && !names::is_fqdn(&self.address)
        {
            check.error_at(
                "address",
                format!(
                    "{:?} is not an IP address, a host name or a unix socket",
                    self.address
                ),
            );
        }
        workload_parts(self, check);
    }
}

fn workload_parts(entry: &WorkloadEntry, check: &mut Check) {
    for (name, port) in &entry.ports {
        names::port(*port, &format!("ports[{name}]"), check);
    }
    names::labels("labels", &entry.labels, check);
}

impl Validate for WorkloadGroup {
    fn validate(&self, check: &mut Check) {
        match &self.template {
            None => check.error_at("template", "a WorkloadGroup needs a template"),
            Some(template) => check.at("template", |check| workload_parts(template, check)),
        }
        names::labels("metadata.labels", &self.metadata.labels, check);
        if let Some(probe) = &self.probe {
            let given = [
                probe.http_get.is_some(),
                probe.tcp_socket.is_some(),
                probe.exec.is_some(),
                probe.grpc.is_some(),
            ];
            let count = given.iter().filter(|given| **given).count();
            check.require(
                count == 1,
                "probe",
                "exactly one of httpGet, tcpSocket, exec and grpc has to be given",
            );
        }
    }
}

impl Validate for Sidecar {
    fn validate(&self, check: &mut Check) {
        check.part("workloadSelector", &self.workload_selector);
        if self.ingress.is_empty()
            && self.egress.is_empty()
            && self.outbound_traffic_policy.is_none()
            && self.inbound_connection_pool.is_none()
        {
            check.error(
                "a Sidecar needs ingress, egress, inboundConnectionPool or outboundTrafficPolicy",
            );
        }
        let mut ports = HashSet::new();
        check.each("ingress", &self.ingress, |check, listener| {
            names::port(listener.port.number, "port.number", check);
            check.require(
                ports.insert(listener.port.number),
                "port.number",
                "this port is there twice",
            );
            default_endpoint(&listener.default_endpoint, check);
        });
        let last = self.egress.len().saturating_sub(1);
        for (index, listener) in self.egress.iter().enumerate() {
            check.at(&format!("egress[{index}]"), |check| {
                check.require(
                    !listener.hosts.is_empty(),
                    "hosts",
                    "at least one host is needed, such as \"./*\"",
                );
                check.each("hosts", &listener.hosts, |check, host| {
                    namespaced_host(host, check)
                });
                if listener.port.is_none() && index != last {
                    check.error_at("port", "only the last egress entry may be without a port");
                }
            });
        }
    }
}

fn default_endpoint(endpoint: &str, check: &mut Check) {
    let local = ["127.0.0.1:", "0.0.0.0:", "[::1]:", "[::]:"]
        .iter()
        .find_map(|host| endpoint.strip_prefix(host));
    let right = endpoint.is_empty()
        || endpoint.starts_with("unix:///")
        || local.is_some_and(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
    check.require(
        right,
        "defaultEndpoint",
        "write 127.0.0.1:PORT, 0.0.0.0:PORT, [::1]:PORT, [::]:PORT or unix:///path",
    );
}

/// Checks `namespace/host` of Sidecar; the namespace may be `.`, `*` or `~`.
fn namespaced_host(text: &str, check: &mut Check) {
    let Some((namespace, host)) = text.split_once('/') else {
        return check.error(format!(
            "{text:?} has no namespace; write \"namespace/host\", \"./host\" or \"*/host\""
        ));
    };
    if !matches!(namespace, "." | "*" | "~") && !names::is_dns_label(namespace) {
        check.error(format!(
            "{namespace:?} is neither '.', '*', '~' nor a namespace"
        ));
    }
    if let Err(message) = names::wildcard_host(host) {
        check.error(message);
    }
}

impl Validate for EnvoyFilter {
    fn validate(&self, check: &mut Check) {
        check.warn("EnvoyFilter reaches into generated configuration, which changes between versions; check it after each upgrade");
        if self.workload_selector.is_some() && !self.target_refs.is_empty() {
            check.error("workloadSelector and targetRefs exclude each other");
        }
        check.part("workloadSelector", &self.workload_selector);
        check.parts("targetRefs", &self.target_refs);
        check.each("configPatches", &self.config_patches, |check, patch| {
            let waypoint = patch
                .matcher
                .as_ref()
                .is_some_and(|matcher| matcher.context == PatchContext::Waypoint);
            check.require(
                patch.apply_to != ApplyTo::Invalid || waypoint,
                "applyTo",
                "what is to be patched has to be given",
            );
            let Some(what) = &patch.patch else {
                return check.error_at("patch", "a patch has to be given");
            };
            check.require(
                what.operation != PatchOperation::Invalid,
                "patch.operation",
                "an operation has to be given",
            );
            let valueless =
                what.value.is_null() && what.operation != PatchOperation::Remove && !waypoint;
            check.require(!valueless, "patch.value", "a value has to be given");
            if let Some(proxy) = patch
                .matcher
                .as_ref()
                .and_then(|matcher| matcher.proxy.as_ref())
                && !proxy.proxy_version.is_empty()
            {
                check.at("match.proxy.proxyVersion", |check| {
                    names::regex(&proxy.proxy_version, check)
                });
            }
        });
    }
}

impl Validate for ProxyConfig {
    fn validate(&self, check: &mut Check) {
        check.part("selector", &self.selector);
        check.require(
            self.concurrency.unwrap_or(0) >= 0,
            "concurrency",
            "a number of threads can't be negative",
        );
    }
}

impl Validate for AuthorizationPolicy {
    fn validate(&self, check: &mut Check) {
        names::attachment(
            self.selector.as_ref(),
            self.target_ref.as_ref(),
            &self.target_refs,
            check,
        );
        match self.action {
            Action::Custom => {
                check.require(!self.rules.is_empty(), "rules", "CUSTOM needs rules");
                let named = self
                    .provider
                    .as_ref()
                    .is_some_and(|provider| !provider.name.is_empty());
                check.require(
                    named,
                    "provider.name",
                    "CUSTOM needs the name of a provider of the mesh configuration",
                );
            }
            Action::Deny => check.require(
                !self.rules.is_empty(),
                "rules",
                "DENY without rules refuses nothing; write \"rules: [{}]\" to refuse everything",
            ),
            Action::Allow | Action::Audit => {}
        }
        if self.provider.is_some() && self.action != Action::Custom {
            check.error_at("provider", "a provider goes with action CUSTOM only");
        }
        check.each("rules", &self.rules, |check, rule| {
            check.each("from", &rule.from, |check, from| match &from.source {
                Some(source) => check.at("source", |check| {
                    authorization_source(source, self.action, check)
                }),
                None => check.error_at(
                    "source",
                    "empty; a source with at least one field is needed",
                ),
            });
            check.each("to", &rule.to, |check, to| match &to.operation {
                Some(operation) => check.at("operation", |check| {
                    authorization_operation(operation, check)
                }),
                None => check.error_at(
                    "operation",
                    "empty; an operation with at least one field is needed",
                ),
            });
            check.each("when", &rule.when, |check, condition| {
                check.require(is_attribute(&condition.key), "key", "unknown attribute");
                if let Some(name) = condition
                    .key
                    .strip_prefix("request.headers[")
                    .and_then(|rest| rest.strip_suffix(']'))
                    && !names::is_matched_header(name)
                {
                    check.error_at(
                        "key",
                        format!("{name:?} is not the name of a header: letters, digits and !#$%&'*+-.^_`|~"),
                    );
                }
                if condition.values.is_empty() && condition.not_values.is_empty() {
                    check.error_at("values", "values or notValues are needed");
                }
            });
        });
    }
}

fn authorization_source(source: &Source, action: Action, check: &mut Check) {
    let lists = [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
        ("trustDomains", &source.trust_domains),
        ("notTrustDomains", &source.not_trust_domains),
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ];
    no_empty_values(&lists, "a source", check);
    let accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
    let others = [
        &source.principals,
        &source.not_principals,
        &source.namespaces,
        &source.not_namespaces,
    ]
    .iter()
    .any(|list| !list.is_empty());
    if accounts && others {
        check.error_at(
            "serviceAccounts",
            "service accounts can't be mixed with principals or namespaces",
        );
    }
    for (field, list) in lists
        .iter()
        .filter(|(field, _)| field.to_ascii_lowercase().ends_with("ipblocks"))
    {
        check.each(field, list, |check, block| {
            if let Err(message) = names::cidr(block) {
                check.error(message);
            }
        });
    }
    if action == Action::Custom {
        for (field, list) in lists
            .iter()
            .filter(|(field, _)| field.to_ascii_lowercase().ends_with("requestprincipals"))
        {
            check.require(list.is_empty(), field, "CUSTOM is decided before tokens are checked, so identities from tokens can't be used");
        }
    }
}

fn authorization_operation(operation: &Operation, check: &mut Check) {
    let lists = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("ports", &operation.ports),
        ("notPorts", &operation.not_ports),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    no_empty_values(&lists, "an operation", check);
    for (field, list) in [
        ("ports", &operation.ports),
        ("notPorts", &operation.not_ports),
    ] {
        check.each(field, list, |check, port| {
            if port.parse::<u16>().is_err() {
                check.error(format!("{port:?} is not a port from 0 to 65535"));
            }
        });
    }
}

fn no_empty_values(lists: &[(&str, &Vec<String>)], what: &str, check: &mut Check) {
    if lists.iter().all(|(_, list)| list.is_empty()) {
        check.error(format!(
            "{what} without any field would match nothing that can be named; give at least one"
        ));
    }
    for (field, list) in lists {
        check.each(field, list, |check, value| {
            if value.is_empty() {
                check.error("empty value");
            }
        });
    }
}

fn is_attribute(key: &str) -> bool {
    const PLAIN: &[&str] = &[
        "source.ip",
        "remote.ip",
        "source.namespace",
        "source.principal",
        "source.serviceAccount",
        "source.trustDomain",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "destination.ip",
        "destination.port",
        "connection.sni",
    ];
    let indexed = [
        "request.headers[",
        "request.auth.claims[",
        "experimental.envoy.filters.",
    ];
    PLAIN.contains(&key)
        || indexed
            .iter()
            .any(|prefix| key.starts_with(prefix) && (key.ends_with(']') || !prefix.ends_with('[')))
}

impl Validate for PeerAuthentication {
    fn validate(&self, check: &mut Check) {
        check.part("selector", &self.selector);
        let selects = self
            .selector
            .as_ref()
            .is_some_and(|selector| !selector.match_labels.is_empty());
        if !self.port_level_mtls.is_empty() && !selects {
            check.error_at(
                "portLevelMtls",
                "settings of single ports need a selector with labels",
            );
        }
        for port in self.port_level_mtls.keys() {
            if port.parse::<u16>().ok().filter(|port| *port > 0).is_none() {
                check.error_at(
                    &format!("portLevelMtls[{port}]"),
                    "a port is a number from 1 to 65535",
                );
            }
        }
    }
}

impl Validate for RequestAuthentication {
    fn validate(&self, check: &mut Check) {
        names::attachment(
            self.selector.as_ref(),
            self.target_ref.as_ref(),
            &self.target_refs,
            check,
        );
        check.each("jwtRules", &self.jwt_rules, |check, rule| {
            check.require(!rule.issuer.is_empty() || !rule.jwks_uri.is_empty(), "issuer", "an issuer or a jwksUri is needed");
            let web = rule.jwks_uri.is_empty() || rule.jwks_uri.starts_with("https://") || rule.jwks_uri.starts_with("http://");
            check.require(web, "jwksUri", "an address that begins with https:// or http:// is needed");
            if !rule.jwks_uri.is_empty() && !rule.jwks.is_empty() {
                check.error_at("jwks", "jwks and jwksUri exclude each other");
            }
            if !rule.jwks.is_empty() {
                let keys = serde_json::from_str::<serde_json::Value>(&rule.jwks).ok();
                let list = keys.as_ref().and_then(|keys| keys.get("keys")).and_then(serde_json::Value::as_array);
                check.require(list.is_some(), "jwks", "not a JSON Web Key Set: an object with a list \"keys\" is needed");
                if list.is_some_and(|list| list.iter().any(|key| key.get("d").is_some())) {
                    check.warn_at("jwks", "the key set contains a private key; everybody who can read this object has it");
                }
            }
            check.each("fromHeaders", &rule.from_headers, |check, header| check.require(!header.name.is_empty(), "name", "empty"));
            check.each("fromParams", &rule.from_params, |check, name| {
                if name.is_empty() {
                    check.error("empty");
                }
            });
        });
    }
}

impl Validate for Telemetry {
    fn validate(&self, check: &mut Check) {
        names::attachment(
            self.selector.as_ref(),
            self.target_ref.as_ref(),
            &self.target_refs,
            check,
        );
        if self.tracing.len() > 1 {
            check.warn_at("tracing", "only the first entry is used");
        }
        check.each("tracing", &self.tracing, |check, tracing| {
            if tracing
                .random_sampling_percentage
                .is_some_and(|share| !(0.0..=100.0).contains(&share))
            {
                check.error_at(
                    "randomSamplingPercentage",
                    "a share is a number from 0 to 100",
                );
            }
            if tracing.providers.len() > 1 {
                check.warn_at("providers", "only the first provider is used");
            }
            check.each("providers", &tracing.providers, |check, provider| {
                check.require(!provider.name.is_empty(), "name", "empty")
            });
        });
        check.each("metrics", &self.metrics, |check, metrics| {
            check.each("overrides", &metrics.overrides, |check, change| {
                for (tag, change) in &change.tag_overrides {
                    let valued = !change.value.is_empty();
                    let right = if change.operation == TagOperation::Upsert {
                        valued
                    } else {
                        !valued
                    };
                    check.require(
                        right,
                        &format!("tagOverrides[{tag}].value"),
                        "UPSERT needs a value, REMOVE takes none",
                    );
                }
            });
        });
    }
}

impl Validate for WasmPlugin {
    fn validate(&self, check: &mut Check) {
        names::attachment(
            self.selector.as_ref(),
            self.target_ref.as_ref(),
            &self.target_refs,
            check,
        );
        wasm_source(&self.url, &self.sha256, check);
        vm_config(self.vm_config.as_ref(), check);
    }
}

impl Validate for TrafficExtension {
    fn validate(&self, check: &mut Check) {
        names::attachment(self.selector.as_ref(), None, &self.target_refs, check);
        match (&self.wasm, &self.lua) {
            (Some(wasm), None) => check.at("wasm", |check| {
                wasm_source(&wasm.url, &wasm.sha256, check);
                vm_config(wasm.vm_config.as_ref(), check);
            }),
            (None, Some(lua)) => {
                check.require(
                    (1..=65536).contains(&lua.inline_code.len()),
                    "lua.inlineCode",
                    "a script has 1 to 65536 characters",
                );
            }
            _ => check.error("exactly one of wasm and lua has to be given"),
        }
    }
}

fn wasm_source(url: &str, sha256: &str, check: &mut Check) {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    check.require(!url.is_empty(), "url", "empty; write where the module is");
    check.require(
        matches!(scheme, "" | "http" | "https" | "oci" | "file"),
        "url",
        "the scheme is http, https, oci or file",
    );
    let digest =
        sha256.is_empty() || (sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_hexdigit()));
    check.require(digest, "sha256", "a digest has 64 hex digits");
}

fn vm_config(config: Option<&VmConfig>, check: &mut Check) {
    let mut seen = HashSet::new();
    let env = config.map_or(&[][..], |config| &config.env);
    check.each("vmConfig.env", env, |check, variable| {
        check.require(
            seen.insert(&variable.name),
            "name",
            "this variable is there twice",
        );
        check.require(!variable.name.is_empty(), "name", "empty");
        let host = variable.value_from == EnvValueSource::Host && !variable.value.is_empty();
        check.require(!host, "value", "a value from the HOST can't be given here");
    });
}
