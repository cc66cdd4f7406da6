//! Gateways.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::mesh_config::TlsConfig;
use mesh_api::networking::gateway::{Gateway as Spec, Server, ServerTlsMode, ServerTlsSettings};
use mesh_api::{AnyObject, Object};

use super::created;
use crate::problem::Reporter;
use crate::rules::{Gateway, GatewayServer, ServerMode};
use crate::service::contains_labels;
use crate::{ObjectKey, Objects, Problem, Protocol, Severity, hostname};

mod tls;

pub(crate) use tls::mesh_limits;

/// `defaults` are the mesh's limits, which hold where a server sets none.
pub(crate) fn build(
    objects: &Objects,
    defaults: &TlsConfig,
    problems: &mut Vec<Problem>,
) -> Vec<Arc<Gateway>> {
    let mut gateways = Vec::new();
    for (key, object) in &objects.istio {
        if let AnyObject::Gateway(object) = object.as_ref() {
            gateways.push(Arc::new(gateway(
                key,
                object,
                defaults,
                &mut Reporter::new(key, problems),
            )));
        }
    }
    gateways.sort_by(|a, b| (a.created, &a.key).cmp(&(b.created, &b.key)));
    report_conflicts(&gateways, problems);
    gateways
}

/// On one port of one proxy there is HTTP, or TLS, or a single TCP server; the oldest Gateway decides.
fn report_conflicts(gateways: &[Arc<Gateway>], problems: &mut Vec<Problem>) {
    let mut seen: Vec<(&Gateway, &GatewayServer)> = Vec::new();
    for gateway in gateways {
        for server in &gateway.servers {
            let rival = seen.iter().find(|(other, first)| {
                first.port == server.port
                    && first.bind == server.bind
                    && (contains_labels(&other.selector, &gateway.selector)
                        || contains_labels(&gateway.selector, &other.selector))
            });
            match rival {
                Some((other, first)) if !first.mode.shares_port_with(server.mode) => {
                    let message = format!(
                        "port {} has another protocol by server {} of {}, which is first; proxies that serve both leave server {} out",
                        server.port, first.name, other.key, server.name
                    );
                    Reporter::new(&gateway.key, problems).report(
                        Severity::Error,
                        Some("IST0145"),
                        "spec.servers",
                        message,
                    );
                }
                _ => seen.push((gateway, server)),
            }
        }
    }
}

fn gateway(
    key: &ObjectKey,
    object: &Object<Spec>,
    defaults: &TlsConfig,
    report: &mut Reporter<'_>,
) -> Gateway {
    let mut servers = Vec::new();
    for (index, server) in object.spec.servers.iter().enumerate() {
        servers.extend(self::server(
            server,
            &key.namespace,
            defaults,
            &format!("spec.servers[{index}]"),
            report,
        ));
    }
    Gateway {
        key: key.clone(),
        created: created(&object.meta),
        selector: object.spec.selector.clone(),
        servers,
    }
}

/// `None` for a server that this version does not serve, which is reported.
fn server(
    server: &Server,
    namespace: &str,
    defaults: &TlsConfig,
    field: &str,
    report: &mut Reporter<'_>,
) -> Option<GatewayServer> {
    let Ok(port) = u16::try_from(server.port.number) else {
        report.report(
            Severity::Error,
            Some("IST0106"),
            format!("{field}.port.number"),
            "a port is a number from 1 to 65535; the server is left out",
        );
        return None;
    };
    let mode = mode(server, field, report)?;
    let tls = match (&server.tls, mode) {
        (Some(tls), ServerMode::Https | ServerMode::TlsTermination) => Some(tls::applied(
            tls,
            defaults,
            &format!("{field}.tls"),
            report,
        )?),
        _ => None,
    };
    let bind = bind(server, field, report)?;
    if !server.default_endpoint.is_empty() {
        report.not_applied(format!("{field}.defaultEndpoint"));
    }
    let mut hosts = Vec::new();
    for (index, host) in server.hosts.iter().enumerate() {
        let (only, name) = server_host(host, namespace);
        if hostname::is_valid(&name) {
            hosts.push((only, name));
        } else {
            let message = format!(
                "{host:?} is not a host; a wildcard is its whole first label. The host is left out"
            );
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.hosts[{index}]"),
                message,
            );
        }
    }
    Some(GatewayServer {
        port,
        name: server.port.name.clone(),
        bind,
        mode,
        tls,
        hosts,
    })
}

/// What is done with connections, by protocol and TLS settings.
fn mode(server: &Server, field: &str, report: &mut Reporter<'_>) -> Option<ServerMode> {
    let name = &server.port.protocol;
    let mut refuse = |part: &str, severity: Severity, message: String| {
        let code = (severity == Severity::Error).then_some("IST0106");
        let message = format!("{message}; the server is left out");
        report.report(severity, code, format!("{field}.{part}"), message);
        None
    };
    let tls = server.tls.as_ref();
    match Protocol::of_name(name) {
        Some(protocol) if protocol.is_http() => Some(ServerMode::Http {
            https_redirect: tls.is_some_and(|tls| tls.https_redirect),
        }),
        Some(protocol @ (Protocol::Https | Protocol::Tls | Protocol::Tcp)) => match tls {
            Some(tls) => Some(tls_mode(tls, protocol)),
            None if protocol == Protocol::Tcp => Some(ServerMode::Tcp),
            None => refuse(
                "tls",
                Severity::Error,
                format!("protocol {name} needs TLS settings"),
            ),
        },
        _ => refuse(
            "port.protocol",
            Severity::Warning,
            format!(
                "servers of protocol {name} are not applied; HTTP, HTTP2, GRPC, TCP, TLS and HTTPS are"
            ),
        ),
    }
}

/// What is done with connections that begin with TLS.
fn tls_mode(tls: &ServerTlsSettings, protocol: Protocol) -> ServerMode {
    match tls.mode {
        ServerTlsMode::Passthrough => ServerMode::TlsPassthrough,
        ServerTlsMode::AutoPassthrough => ServerMode::AutoPassthrough,
        _ if protocol == Protocol::Https => ServerMode::Https,
        _ => ServerMode::TlsTermination,
    }
}

/// The address to listen on; the outer `None` where the server can't be applied.
fn bind(server: &Server, field: &str, report: &mut Reporter<'_>) -> Option<Option<IpAddr>> {
    match server.bind.parse::<IpAddr>() {
        _ if server.bind.is_empty() => Some(None),
        Ok(address) if address.is_unspecified() => Some(None),
        Ok(address) => Some(Some(address)),
        Err(_) => {
            let message = format!(
                "{:?} is not an IP address, and sockets in files are not served; the server is left out",
                server.bind
            );
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.bind"),
                message,
            );
            None
        }
    }
}

/// `namespace/name`: `*` or nothing is any namespace, `.` the gateway's own.
fn server_host(host: &str, own: &str) -> (Option<String>, String) {
    let (namespace, name) = host.split_once('/').unwrap_or(("*", host));
    let namespace = match namespace {
        "*" => None,
        "." => Some(own.to_owned()),
        other => Some(other.to_owned()),
    };
    (namespace, name.to_ascii_lowercase())
}
