//! Upgraded connections (WebSocket): passed through once the endpoint has answered 101 (RFC 9110 section 7.8), never before.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Version, request};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use mesh_routing::hcm::HttpManager;

use crate::pool::Lease;
use crate::report::{Flag, Report};
use crate::shared::Shared;

/// An upgrade that the client asks for.
pub struct Asked {
    kind: HeaderValue,
    client: OnUpgrade,
}

impl Asked {
    /// Takes the wish off a request, where it is one that the manager allows. Call it before hop-by-hop headers are removed.
    pub fn take(parts: &mut request::Parts, manager: &HttpManager) -> Option<Self> {
        let client = parts.extensions.remove::<OnUpgrade>()?;
        if !manager.websocket || parts.method != Method::GET || parts.version != Version::HTTP_11 {
            return None;
        }
        let kind = parts.headers.get(UPGRADE)?.clone();
        let named = |value: &HeaderValue| {
            let text = value.to_str().unwrap_or("");
            text.split(',')
                .any(|name| name.trim().eq_ignore_ascii_case("upgrade"))
        };
        let asked = kind.as_bytes().eq_ignore_ascii_case(b"websocket")
            && parts.headers.get_all(CONNECTION).iter().any(named);
        asked.then_some(Self { kind, client })
    }

    /// Puts the wish on a message again.
    pub fn announce(&self, headers: &mut HeaderMap) {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, self.kind.clone());
    }

    /// The endpoint has agreed: both sides are joined once the client has got its 101.
    pub fn join(
        self,
        response: &mut Response<Incoming>,
        lease: Lease,
        mut report: Box<Report>,
        shared: Arc<Shared>,
    ) {
        let endpoint = hyper::upgrade::on(response);
        report.code = StatusCode::SWITCHING_PROTOCOLS.as_u16();
        tokio::task::spawn_local(async move {
            shared.totals.open.fetch_add(1, Ordering::Relaxed);
            match tokio::try_join!(self.client, endpoint) {
                Ok((client, endpoint)) => {
                    let (mut client, mut endpoint) = (TokioIo::new(client), TokioIo::new(endpoint));
                    match tokio::io::copy_bidirectional(&mut client, &mut endpoint).await {
                        Ok((_, received)) => report.response_bytes = received,
                        Err(error) => tracing::debug!(%error, "upgraded connection"),
                    }
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
