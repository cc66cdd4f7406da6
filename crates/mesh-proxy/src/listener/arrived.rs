//! A connection between the choice of its filter chain and the first filter.

use std::sync::Arc;

use bytes::BytesMut;
use mesh_routing::chain::FilterChain;
use mesh_routing::peer::PeerTls;
use tokio::net::TcpStream;

use super::read_until_known;
use crate::sniff::Protocol;
use crate::tls::HandshakeError;
use crate::tls::accept::Acceptance;
use crate::tls::counters::ListenerCounters;
use crate::tls::wire::Wire;
use crate::worker::Worker;

/// A connection on its way to its filter chain.
pub(super) struct Arrived {
    pub(super) wire: Wire,
    /// What was read of it.
    pub(super) prefix: BytesMut,
    pub(super) protocol: Option<Protocol>,
    pub(super) tls: Option<Arc<PeerTls>>,
}

impl Arrived {
    /// As it was accepted.
    pub(super) fn plain(stream: TcpStream, prefix: BytesMut, protocol: Option<Protocol>) -> Self {
        Self {
            wire: Wire::Plain(stream),
            prefix,
            protocol,
            tls: None,
        }
    }

    /// Through the handshake that the chain wants, if it does; `None` where that fails.
    pub(super) async fn through(
        self,
        worker: &Worker,
        chain: &FilterChain,
        counters: impl FnOnce() -> Arc<ListenerCounters>,
    ) -> Option<Self> {
        let Some(settings) = &chain.tls else {
            return Some(self);
        };
        let acceptance = Acceptance {
            shared: &worker.shared,
            running: &worker.handshakes,
            settings,
            timeout: chain.handshake_timeout,
            counters: &counters(),
        };
        // Boxed, since it is large, and gone when the connection lives.
        match Box::pin(self.protect(&acceptance)).await {
            Ok(arrived) => Some(arrived),
            Err(error) => {
                tracing::debug!(chain = &*chain.name, %error, "handshake");
                None
            }
        }
    }

    /// Runs the handshake; what was read belongs to that.
    async fn protect(mut self, acceptance: &Acceptance<'_>) -> Result<Self, HandshakeError> {
        let Wire::Plain(mut stream) = self.wire else {
            return Ok(self);
        };
        if self.protocol.is_none() {
            // No inspector has looked, but what the client offers has to be known.
            let reading = read_until_known(&mut stream, &mut self.prefix);
            match tokio::time::timeout(acceptance.timeout, reading).await {
                Ok(protocol) => self.protocol = Some(protocol?),
                Err(_) => {
                    acceptance.counters.count(&HandshakeError::Timeout);
                    return Err(HandshakeError::Timeout);
                }
            }
        }
        let (wire, peer) = acceptance
            .accept(stream, self.prefix.freeze(), self.protocol.as_ref())
            .await?;
        let protocol = match peer.alpn.as_deref() {
            Some("h2") => Some(Protocol::Http2),
            Some(_) => Some(Protocol::Http11),
            None => None,
        };
        Ok(Self {
            wire,
            prefix: BytesMut::new(),
            protocol,
            tls: Some(peer),
        })
    }

    /// The name that the client asked for, also where its TLS is not ended here.
    pub(super) fn server_name(&self) -> Option<&str> {
        match (&self.tls, &self.protocol) {
            (Some(tls), _) => tls.sni.as_deref(),
            (None, Some(Protocol::Tls { server_name, .. })) => server_name.as_deref(),
            _ => None,
        }
    }
}
