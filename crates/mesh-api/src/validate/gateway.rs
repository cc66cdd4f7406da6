//! Rules for Gateway.

use std::collections::HashSet;
use std::net::IpAddr;

use crate::networking::Gateway;
use crate::networking::gateway::{Server, ServerTlsMode, ServerTlsSettings, TlsProtocol};

use super::{Check, Validate, names};

const CIPHERS: &[&str] = &[
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES256-SHA",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "DES-CBC3-SHA",
];
const CURVES: &[&str] = &[
    "P-224",
    "P-256",
    "P-384",
    "P-521",
    "X25519",
    "X25519Kyber768Draft00",
    "X25519MLKEM768",
];

impl Validate for Gateway {
    fn validate(&self, check: &mut Check) {
        check.require(
            !self.servers.is_empty(),
            "servers",
            "a gateway needs at least one server",
        );
        names::labels("selector", &self.selector, check);
        let mut ports = HashSet::new();
        check.each("servers", &self.servers, |check, server| {
            server.validate(check);
            let unique = ports.insert((server.port.number, server.port.name.clone()));
            check.require(unique, "port.name", "another server of this gateway has the same port and name; give it a name of its own");
        });
    }
}

impl Validate for Server {
    fn validate(&self, check: &mut Check) {
        check.require(
            !self.hosts.is_empty(),
            "hosts",
            "a server needs at least one host; \"*\" is any",
        );
        check.each("hosts", &self.hosts, |check, host| server_host(host, check));
        port(self, check);
        check.require(
            self.default_endpoint.is_empty(),
            "defaultEndpoint",
            "this belongs to Sidecar; a gateway has no application",
        );
        let protocol = self.port.protocol.to_ascii_uppercase();
        match &self.tls {
            Some(tls) => check.at("tls", |check| {
                let plain = matches!(protocol.as_str(), "HTTP" | "HTTP2" | "GRPC" | "GRPC-WEB" | "HTTP_PROXY");
                let secure = matches!(protocol.as_str(), "HTTPS" | "TLS" | "HBONE");
                if plain && uses_tls(tls) {
                    check.error_at("mode", format!("a port with protocol {protocol} can only have httpsRedirect; use HTTPS to terminate TLS"));
                } else if !plain && !secure {
                    check.error(format!("a port with protocol {protocol} has no TLS; use TLS to terminate it or to pass it through"));
                }
                check.require(!tls.https_redirect || plain, "httpsRedirect", "only a port with protocol HTTP can redirect to https");
                if secure {
                    tls.validate(check);
                }
            }),
            None if matches!(protocol.as_str(), "HTTPS" | "TLS") => {
                check.error_at("tls", format!("protocol {protocol} needs TLS settings; write tls.mode and where the certificate is"));
            }
            None => {}
        }
    }
}

/// True if any setting besides the redirect is given.
fn uses_tls(tls: &ServerTlsSettings) -> bool {
    *tls != ServerTlsSettings {
        https_redirect: tls.https_redirect,
        ..ServerTlsSettings::default()
    }
}

fn port(server: &Server, check: &mut Check) {
    let unix = server.bind.starts_with("unix://");
    if unix {
        check.require(
            server.port.number == 0,
            "port.number",
            "a unix socket has no port; write 0",
        );
    } else {
        names::port(server.port.number, "port.number", check);
    }
    check.require(
        !server.port.name.is_empty(),
        "port.name",
        "a port needs a name",
    );
    check.require(
        !server.port.protocol.is_empty(),
        "port.protocol",
        "a port needs a protocol",
    );
    names::protocol(&server.port.protocol, "port.protocol", check);
    check.require(
        server.port.target_port == 0,
        "port.targetPort",
        "this belongs to ServiceEntry; leave it out",
    );
    let bind = server.bind.is_empty() || unix || server.bind.parse::<IpAddr>().is_ok();
    check.require(bind, "bind", "not an IP address or unix://path");
}

/// A host with an optional namespace before it.
fn server_host(host: &str, check: &mut Check) {
    let (namespace, name) = host
        .split_once('/')
        .map_or((None, host), |(namespace, name)| (Some(namespace), name));
    if let Some(namespace) = namespace
        && !matches!(namespace, "." | "*")
        && !names::is_dns_label(namespace)
    {
        check.error(format!("{namespace:?} is neither '.', '*' nor a namespace"));
    }
    if let Err(message) = names::wildcard_host(name) {
        check.error(message);
    } else if !name.contains('.') && name != "*" {
        check.error(format!("{name:?} is a short name; a gateway serves full names such as {name}.example.com, or \"*\""));
    }
}

impl Validate for ServerTlsSettings {
    fn validate(&self, check: &mut Check) {
        let files = !self.server_certificate.is_empty()
            || !self.private_key.is_empty()
            || !self.ca_certificates.is_empty()
            || !self.ca_crl.is_empty();
        let secrets = !self.credential_name.is_empty()
            || !self.credential_names.is_empty()
            || !self.ca_cert_credential_name.is_empty();
        match self.mode {
            ServerTlsMode::Passthrough | ServerTlsMode::AutoPassthrough => {
                if files || secrets || !self.tls_certificates.is_empty() {
                    check.warn("TLS is passed through, so certificates have no effect");
                }
            }
            ServerTlsMode::IstioMutual => {
                check.require(
                    !files && !secrets && self.tls_certificates.is_empty(),
                    "mode",
                    "ISTIO_MUTUAL uses the mesh's certificates; leave all other ones out",
                );
            }
            ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual => {
                certificates(self, check)
            }
        }
        crypto(self, check);
    }
}

fn certificates(tls: &ServerTlsSettings, check: &mut Check) {
    let pair = !tls.server_certificate.is_empty() && !tls.private_key.is_empty();
    let sources = [
        !tls.credential_name.is_empty(),
        !tls.credential_names.is_empty(),
        !tls.tls_certificates.is_empty(),
        pair,
    ];
    match sources.iter().filter(|given| **given).count() {
        0 => check.error_at("credentialName", "a certificate is needed: credentialName, credentialNames, tlsCertificates, or serverCertificate and privateKey"),
        1 => {}
        _ => check.error_at("credentialName", "credentialName, credentialNames, tlsCertificates and serverCertificate exclude each other"),
    }
    check.require(
        tls.credential_names.len() <= 2,
        "credentialNames",
        "at most two",
    );
    check.require(
        tls.tls_certificates.len() <= 2,
        "tlsCertificates",
        "at most two",
    );
    check.each(
        "tlsCertificates",
        &tls.tls_certificates,
        |check, certificate| {
            check.require(
                !certificate.server_certificate.is_empty() && !certificate.private_key.is_empty(),
                "serverCertificate",
                "certificate and key are needed",
            );
        },
    );
    let secret = !tls.credential_name.is_empty() || !tls.credential_names.is_empty();
    let roots = secret
        || !tls.ca_certificates.is_empty()
        || !tls.ca_cert_credential_name.is_empty()
        || tls
            .tls_certificates
            .iter()
            .any(|entry| !entry.ca_certificates.is_empty());
    if tls.mode != ServerTlsMode::Simple {
        check.require(
            roots,
            "caCertificates",
            "client certificates can't be checked without roots; give caCertificates or a secret",
        );
    }
    if !tls.ca_crl.is_empty() {
        check.require(
            !secret,
            "caCrl",
            "with a secret, the revocation list belongs into the secret (ca.crl)",
        );
        check.require(
            tls.mode != ServerTlsMode::Simple,
            "caCrl",
            "SIMPLE checks no client certificates",
        );
    }
}

fn crypto(tls: &ServerTlsSettings, check: &mut Check) {
    let old = matches!(
        tls.min_protocol_version,
        TlsProtocol::Tlsv1_0 | TlsProtocol::Tlsv1_1
    );
    if old && tls.cipher_suites.is_empty() {
        check.warn_at(
            "minProtocolVersion",
            "TLS below 1.2 needs cipherSuites that it can use",
        );
    }
    for (field, list, known) in [
        ("cipherSuites", &tls.cipher_suites, CIPHERS),
        ("ecdhCurves", &tls.ecdh_curves, CURVES),
    ] {
        for (index, entry) in list.iter().enumerate() {
            let at = format!("{field}[{index}]");
            if !known.contains(&entry.as_str()) {
                check.warn_at(&at, format!("{entry:?} is unknown and will not be used"));
            } else if list[..index].contains(entry) {
                check.warn_at(&at, format!("{entry:?} is there twice"));
            }
        }
    }
}
