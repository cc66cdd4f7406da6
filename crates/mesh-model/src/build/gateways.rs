//! Gateways.

use std::sync::Arc;

use mesh_api::networking::gateway::{Gateway as Spec, Server};
use mesh_api::{AnyObject, Object};

use super::created;
use crate::problem::Reporter;
use crate::rules::{Gateway, GatewayServer};
use crate::{ObjectKey, Objects, Problem, Protocol, Severity, hostname};

pub(crate) fn build(objects: &Objects, problems: &mut Vec<Problem>) -> Vec<Arc<Gateway>> {
    let mut gateways = Vec::new();
    for (key, object) in &objects.istio {
        if let AnyObject::Gateway(object) = object.as_ref() {
            gateways.push(Arc::new(gateway(
                key,
                object,
                &mut Reporter::new(key, problems),
            )));
        }
    }
    gateways.sort_by(|a, b| (a.created, &a.key).cmp(&(b.created, &b.key)));
    gateways
}

fn gateway(key: &ObjectKey, object: &Object<Spec>, report: &mut Reporter<'_>) -> Gateway {
    let mut servers = Vec::new();
    for (index, server) in object.spec.servers.iter().enumerate() {
        servers.extend(self::server(
            server,
            &key.namespace,
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
    let protocol = Protocol::of_name(&server.port.protocol).filter(|protocol| protocol.is_http());
    let Some(protocol) = protocol else {
        let message = format!(
            "servers of protocol {} are not applied yet by this version of mesh; HTTP, HTTP2 and GRPC are",
            server.port.protocol
        );
        report.report(
            Severity::Warning,
            None,
            format!("{field}.port.protocol"),
            message,
        );
        return None;
    };
    if server.tls.as_ref().is_some_and(|tls| tls.https_redirect) {
        report.not_applied(format!("{field}.tls.httpsRedirect"));
    }
    if !server.bind.is_empty() {
        report.not_applied(format!("{field}.bind"));
    }
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
        protocol,
        hosts,
    })
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
