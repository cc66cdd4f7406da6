//! Connections that change what they speak: upgrades (RFC 9110 section 7.8), their form in HTTP/2 (RFC 8441) and CONNECT. Bytes pass once
//! the endpoint has agreed, never before.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, request};
use hyper::body::Incoming;
use hyper::ext::Protocol;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use mesh_routing::action::Forward;
use mesh_routing::cluster::Cluster;
use mesh_routing::hcm::HttpManager;
use mesh_routing::upgrade::Passage;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::body::ResponseBody;
use crate::http::Exchange;
use crate::listener::tenure::Tenancy;
use crate::pool::{ConnectError, Host, Lease};
use crate::report::{Flag, Report};

const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// An upgrade that the client asks for.
pub struct Asked {
    kind: Kind,
    client: OnUpgrade,
    /// The client speaks HTTP/2, where success is 200.
    http2: bool,
}

enum Kind {
    /// As in the `upgrade` header.
    Protocol(HeaderValue),
    Connect,
}

impl Asked {
    /// Takes the wish off a request. Call it before hop-by-hop headers are removed. Requests of HTTP/2 (RFC 8441) become what they would
    /// be in HTTP/1.1, so that routing knows one form.
    pub fn take(parts: &mut request::Parts) -> Option<Self> {
        let client = parts.extensions.remove::<OnUpgrade>()?;
        let http2 = parts.version >= Version::HTTP_2;
        let kind = match parts.extensions.remove::<Protocol>() {
            Some(protocol) => {
                parts.method = Method::GET;
                Kind::Protocol(HeaderValue::from_str(protocol.as_str()).ok()?)
            }
            None if parts.method == Method::CONNECT => Kind::Connect,
            None if parts.version == Version::HTTP_11 && names_upgrade(&parts.headers) => {
                let kind = parts.headers.get(UPGRADE)?.clone();
                if kind.as_bytes().eq_ignore_ascii_case(b"h2c") {
                    // Deprecated by RFC 9113; Envoy, too, takes the wish off and answers in HTTP/1.1.
                    parts.headers.remove(HTTP2_SETTINGS);
                    return None;
                }
                Kind::Protocol(kind)
            }
            None => return None,
        };
        Some(Self {
            kind,
            client,
            http2,
        })
    }

    /// Is it let through? The route's word counts more than the manager's, which counts for all routes that say nothing.
    pub fn passage(&self, manager: &HttpManager, route: &Forward) -> Passage {
        let kind = match &self.kind {
            Kind::Protocol(kind) => kind.to_str().unwrap_or(""),
            Kind::Connect => "connect",
        };
        route
            .upgrades
            .find(kind)
            .or_else(|| manager.upgrades.find(kind))
            .unwrap_or(Passage::No)
    }

    /// Puts the wish on a request again.
    pub fn announce(&self, headers: &mut HeaderMap) {
        if let Kind::Protocol(kind) = &self.kind {
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(UPGRADE, kind.clone());
        }
    }

    /// Has the endpoint agreed?
    pub fn is_accepted<B>(&self, response: &Response<B>) -> bool {
        match &self.kind {
            Kind::Protocol(_) if response.version() < Version::HTTP_2 => {
                response.status() == StatusCode::SWITCHING_PROTOCOLS
            }
            _ => response.status().is_success(),
        }
    }

    /// The endpoint has agreed: both sides are joined once the client has been told.
    pub fn join(
        self,
        response: &mut Response<Incoming>,
        lease: Lease,
        mut report: Box<Report>,
        exchange: &Exchange,
    ) {
        let connection = &exchange.connection;
        let (shared, tenancy) = (
            connection.worker.shared.clone(),
            connection.settle_in(exchange.era),
        );
        let endpoint = hyper::upgrade::on(&mut *response);
        let status = match (&self.kind, self.http2) {
            (Kind::Protocol(_), false) => StatusCode::SWITCHING_PROTOCOLS,
            _ => StatusCode::OK,
        };
        *response.status_mut() = status;
        if !self.http2 {
            self.announce(response.headers_mut());
        }
        report.code = status.as_u16();
        tokio::task::spawn_local(async move {
            shared.totals.open.fetch_add(1, Ordering::Relaxed);
            match tokio::try_join!(self.client, endpoint) {
                Ok((client, endpoint)) => {
                    let (mut client, mut endpoint) = (TokioIo::new(client), TokioIo::new(endpoint));
                    pass(&mut client, &mut endpoint, &tenancy, &mut report).await;
                }
                Err(error) => {
                    report.flags.add(Flag::UpstreamClosed);
                    tracing::debug!(%error, "upgrading");
                }
            }
            shared.totals.open.fetch_sub(1, Ordering::Relaxed);
            drop((lease, report));
        });
    }
}

/// A CONNECT that ends here: the endpoint gets what is in the tunnel (`connect_config`).
pub async fn terminate(
    asked: Asked,
    host: &Rc<Host>,
    cluster: &Cluster,
    mut report: Box<Report>,
    exchange: &Exchange,
) -> Result<Response<ResponseBody>, (ConnectError, Box<Report>)> {
    let connection = &exchange.connection;
    let shared = connection.worker.shared.clone();
    let wish = connection.wish_for(&cluster.config.transports);
    let mut endpoint = match host.connect(&shared, &cluster.config, &wish).await {
        Ok(endpoint) => endpoint,
        Err(error) => return Err((error, report)),
    };
    report.code = StatusCode::OK.as_u16();
    let tenancy = connection.settle_in(exchange.era);
    tokio::task::spawn_local(async move {
        shared.totals.open.fetch_add(1, Ordering::Relaxed);
        match asked.client.await {
            Ok(client) => {
                let mut client = TokioIo::new(client);
                pass(&mut client, &mut endpoint.stream, &tenancy, &mut report).await;
            }
            Err(error) => tracing::debug!(%error, "opening a tunnel"),
        }
        shared.totals.open.fetch_sub(1, Ordering::Relaxed);
        drop(report);
    });
    Ok(Response::new(ResponseBody::empty()))
}

/// Lets the bytes pass until one side ends, or the filter chain that let them in is gone and their time over.
async fn pass(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    endpoint: &mut (impl AsyncRead + AsyncWrite + Unpin),
    tenancy: &Tenancy,
    report: &mut Report,
) {
    let copying = tokio::io::copy_bidirectional(client, endpoint);
    let passed = tokio::select! {
        passed = copying => passed,
        () = tenancy.over() => {
            tracing::debug!("upgraded connection closed: its filter chain was changed, and the drain time is over");
            return;
        }
    };
    match passed {
        Ok((sent, received)) => {
            report.flow.request_bytes.set(sent);
            report.response_bytes = received;
        }
        Err(error) => tracing::debug!(%error, "upgraded connection"),
    }
}

fn names_upgrade(headers: &HeaderMap) -> bool {
    let named = |value: &HeaderValue| {
        let text = value.to_str().unwrap_or("");
        text.split(',')
            .any(|name| name.trim().eq_ignore_ascii_case("upgrade"))
    };
    headers.get_all(CONNECTION).iter().any(named)
}
