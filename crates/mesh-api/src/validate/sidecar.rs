//! Rules for Sidecar.

use std::collections::HashSet;
use std::net::IpAddr;

use crate::networking::Sidecar;
use crate::networking::gateway::{Port, ServerTlsMode};
use crate::networking::sidecar::{
    CaptureMode, IstioEgressListener, IstioIngressListener, OutboundTrafficMode,
};

use super::{Check, Validate, names};

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
            ingress(listener, check);
            check.require(
                ports.insert(listener.port.number),
                "port.number",
                "this port is there twice",
            );
        });
        check.part("inboundConnectionPool", &self.inbound_connection_pool);
        let last = self.egress.len().saturating_sub(1);
        let mut places = HashSet::new();
        for (index, listener) in self.egress.iter().enumerate() {
            check.at(&format!("egress[{index}]"), |check| {
                egress(listener, check);
                match &listener.port {
                    None if index != last => {
                        check.error_at("port", "only the last egress entry may be without a port")
                    }
                    None => {}
                    Some(port) if port.number == 0 => check.require(
                        places.insert((0, listener.bind.as_str())),
                        "bind",
                        "this socket is there twice",
                    ),
                    Some(port) => check.require(
                        places.insert((port.number, "")),
                        "port.number",
                        "this port is there twice",
                    ),
                }
            });
        }
        if let Some(policy) = &self.outbound_traffic_policy
            && let Some(proxy) = &policy.egress_proxy
        {
            check.at("outboundTrafficPolicy.egressProxy", |check| {
                if policy.mode != OutboundTrafficMode::AllowAny {
                    check.error("goes with mode ALLOW_ANY only; otherwise nothing unknown is let out that it could take");
                }
                check.require(names::is_fqdn(&proxy.host), "host", "the name of a host is needed");
                let number = proxy.port.as_ref().map_or(0, |port| port.number);
                names::port(number, "port.number", check);
            });
        }
    }
}

fn ingress(listener: &IstioIngressListener, check: &mut Check) {
    names::port(listener.port.number, "port.number", check);
    port(&listener.port, check);
    let bind = listener.bind.is_empty() || listener.bind.parse::<IpAddr>().is_ok();
    check.require(bind, "bind", "not an IP address");
    default_endpoint(&listener.default_endpoint, check);
    check.part("connectionPool", &listener.connection_pool);
    let Some(tls) = &listener.tls else { return };
    check.at("tls", |check| {
        let protocol = listener.port.protocol.to_ascii_uppercase();
        if !matches!(protocol.as_str(), "HTTPS" | "TLS") {
            check.error(format!("a port with protocol {:?} has no TLS; write protocol: HTTPS or TLS", listener.port.protocol));
        }
        let never = matches!(tls.mode, ServerTlsMode::IstioMutual | ServerTlsMode::AutoPassthrough);
        check.require(!never, "mode", "a sidecar ends TLS of clients outside the mesh here: SIMPLE, MUTUAL, OPTIONAL_MUTUAL or PASSTHROUGH");
        for (field, given) in [
            ("httpsRedirect", tls.https_redirect),
            ("subjectAltNames", !tls.subject_alt_names.is_empty()),
            ("credentialName", !tls.credential_name.is_empty()),
            ("credentialNames", !tls.credential_names.is_empty()),
            ("tlsCertificates", !tls.tls_certificates.is_empty()),
        ] {
            check.require(!given, field, "not for sidecars; certificates are files here (serverCertificate, privateKey, caCertificates)");
        }
        tls.validate(check);
    });
}

fn egress(listener: &IstioEgressListener, check: &mut Check) {
    check.require(
        !listener.hosts.is_empty(),
        "hosts",
        "at least one host is needed, such as \"./*\"",
    );
    check.each("hosts", &listener.hosts, |check, host| {
        namespaced_host(host, check)
    });
    if listener.hosts.len() > 1 && listener.hosts.iter().any(|host| host == "*/*") {
        check.warn_at(
            "hosts",
            "\"*/*\" is everything, so the other hosts have no meaning",
        );
    }
    let Some(given) = &listener.port else { return };
    port(given, check);
    let unix = listener.bind.starts_with("unix://");
    if given.number == 0 {
        check.require(
            unix,
            "bind",
            "port 0 is for unix sockets; write unix:///path, or a port",
        );
        check.require(
            listener.capture_mode != CaptureMode::Iptables,
            "captureMode",
            "DEFAULT or NONE: nothing is captured for a unix socket",
        );
    } else {
        names::port(given.number, "port.number", check);
        let bind = listener.bind.is_empty() || listener.bind.parse::<IpAddr>().is_ok();
        check.require(
            bind,
            "bind",
            "not an IP address (a unix socket has port number 0)",
        );
    }
}

/// What ports of both directions have in common.
fn port(port: &Port, check: &mut Check) {
    names::protocol(&port.protocol, "port.protocol", check);
    check.require(
        port.target_port == 0,
        "port.targetPort",
        "this belongs to ServiceEntry; leave it out",
    );
}

fn default_endpoint(endpoint: &str, check: &mut Check) {
    let local = ["127.0.0.1:", "0.0.0.0:", "[::1]:", "[::]:", ":"]
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
