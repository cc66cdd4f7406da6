//! What header mutations and texts may ask for of an exchange (`mesh_routing::format`).

use std::time::SystemTime;

use http::{HeaderMap, Method, Version, request};
use mesh_routing::action::ClusterTarget;
use mesh_routing::format::Facts;
use mesh_routing::route::Matched;

use super::Exchange;

/// The request as it was matched, kept only for mutations of the response that ask for it.
pub(super) struct Origin {
    headers: HeaderMap,
    method: Method,
    path: String,
}

impl Origin {
    /// A copy, where the route's mutations of the response (or its text) ask for one.
    pub(super) fn keep(
        matched: &Matched<'_>,
        target: Option<&ClusterTarget<'_>>,
        parts: &request::Parts,
    ) -> Option<Box<Self>> {
        let entry = match target {
            Some(ClusterTarget::Entry(entry)) => entry.response_ops.reads_request(),
            _ => false,
        };
        (entry || matched.route.answers_read_request()).then(|| {
            Box::new(Self {
                headers: parts.headers.clone(),
                method: parts.method.clone(),
                path: path(parts).to_owned(),
            })
        })
    }

    /// Adds what is known of the request.
    pub(super) fn add_to<'a>(&'a self, facts: &mut Facts<'a>) {
        facts.request = Some(&self.headers);
        facts.method = self.method.as_str();
        facts.path = &self.path;
    }
}

pub(super) fn path(parts: &request::Parts) -> &str {
    parts.uri.path_and_query().map_or("/", |p| p.as_str())
}

/// What is known of any exchange.
pub(super) fn facts<'a>(
    exchange: &'a Exchange,
    matched: &Matched<'a>,
    target: Option<&'a ClusterTarget<'_>>,
) -> Facts<'a> {
    let connection = &exchange.connection;
    let elapsed = exchange.started.elapsed();
    Facts {
        authority: exchange.authority.to_str().unwrap_or(""),
        scheme: exchange.scheme,
        protocol: match exchange.version {
            Version::HTTP_2 => "HTTP/2",
            Version::HTTP_10 => "HTTP/1.0",
            _ => "HTTP/1.1",
        },
        flags: "-",
        remote: Some(connection.remote),
        local: Some(connection.destination),
        upstream_cluster: match target {
            Some(ClusterTarget::Entry(entry)) => &entry.name,
            Some(ClusterTarget::Named(name)) => name,
            _ => "",
        },
        route: &matched.route.name,
        server_name: connection
            .tls
            .as_deref()
            .and_then(|tls| tls.sni.as_deref())
            .unwrap_or(""),
        tls: connection.tls.as_deref(),
        hostname: &connection.worker.shared.identity.hostname,
        started: SystemTime::now().checked_sub(elapsed),
        duration: Some(elapsed),
        received: exchange.flow.request_bytes.get(),
        ..Facts::default()
    }
}
