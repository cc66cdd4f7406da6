//! The server's side of a handshake.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use mesh_identity::verify::{CertificateNames, hex, sha256};
use mesh_routing::peer::PeerTls;
use mesh_routing::tls::ServerTls;
use rustls::{HandshakeKind, ServerConnection};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsStream};

use super::contexts::{Local, ServerContext};
use super::counters::ListenerCounters;
use super::wire::{Rewound, Wire};
use super::{HandshakeError, cipher_name, version_name};
use crate::shared::Shared;
use crate::sniff::Protocol;

/// Handshakes of a worker at once; who comes beyond is turned away, so that a flood of them cannot take the memory.
const MOST_HANDSHAKES: u32 = 2048;

/// A handshake under way.
struct Running(Rc<Cell<u32>>);

impl Running {
    fn begin(count: &Rc<Cell<u32>>) -> Option<Self> {
        if count.get() >= MOST_HANDSHAKES {
            return None;
        }
        count.set(count.get() + 1);
        Some(Self(count.clone()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Who accepts, and how.
pub struct Acceptance<'a> {
    /// The proxy.
    pub shared: &'a Shared,
    /// Handshakes of this worker.
    pub running: &'a Rc<Cell<u32>>,
    /// The settings.
    pub settings: &'a Arc<ServerTls>,
    /// Limit for the handshake.
    pub timeout: Duration,
    /// The listener's.
    pub counters: &'a ListenerCounters,
}

impl Acceptance<'_> {
    /// Runs the handshake. `prefix`: what of the ClientHello was read; `protocol`: what it says.
    pub async fn accept(
        &self,
        stream: TcpStream,
        prefix: Bytes,
        protocol: Option<&Protocol>,
    ) -> Result<(Wire, Arc<PeerTls>), HandshakeError> {
        let done = self.run(stream, prefix, protocol).await;
        match &done {
            Ok((_, peer)) => {
                self.counters.handshakes.fetch_add(1, Ordering::Relaxed);
                if !peer.is_mutual() {
                    self.counters.no_certificate.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(error) => self.counters.count(error),
        }
        done
    }

    async fn run(
        &self,
        stream: TcpStream,
        prefix: Bytes,
        protocol: Option<&Protocol>,
    ) -> Result<(Wire, Arc<PeerTls>), HandshakeError> {
        let _running = Running::begin(self.running).ok_or(HandshakeError::Overload)?;
        let context = self
            .shared
            .contexts
            .server(self.settings, &self.shared.secrets)?;
        let config = match shares_protocol(self.settings, protocol) {
            true => context.config.clone(),
            false => context.no_protocols.clone(),
        };
        let accepting = TlsAcceptor::from(config).accept(Rewound::new(prefix, stream));
        let stream = match tokio::time::timeout(self.timeout, accepting).await {
            Ok(done) => done?,
            Err(_) => return Err(HandshakeError::Timeout),
        };
        let (_, session) = stream.get_ref();
        if self.settings.require_sni && session.server_name().is_none() {
            return Err(HandshakeError::NoServerName);
        }
        let peer = self.look_at(session, &context)?;
        Ok((Wire::Tls(Box::new(TlsStream::Server(stream))), peer))
    }

    fn look_at(
        &self,
        session: &ServerConnection,
        context: &ServerContext,
    ) -> Result<Arc<PeerTls>, HandshakeError> {
        let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
        if resumed {
            self.counters.reused.fetch_add(1, Ordering::Relaxed);
        }
        let mut peer = PeerTls {
            sni: session.server_name().map(Box::from),
            alpn: session
                .alpn_protocol()
                .map(|name| String::from_utf8_lossy(name).into()),
            version: version_name(session.protocol_version()),
            cipher: cipher_name(session.negotiated_cipher_suite().map(|s| s.suite())),
            ..PeerTls::default()
        };
        describe_local(&context.local, &mut peer);
        if let Some(chain) = session.peer_certificates()
            && let Some(leaf) = chain.first()
        {
            let names = CertificateNames::of(leaf)?;
            // Full handshakes were verified just now; a session's certificate was when it began.
            if resumed && names.not_after < now() {
                return Err(HandshakeError::Expired);
            }
            describe_peer(chain, names, &mut peer);
        }
        Ok(Arc::new(peer))
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

pub(super) fn describe_local(local: &Local, peer: &mut PeerTls) {
    peer.local_uri_sans.clone_from(&local.uri_sans);
    peer.local_dns_sans.clone_from(&local.dns_sans);
    peer.local_subject.clone_from(&local.subject);
}

fn describe_peer(
    chain: &[rustls_pki_types::CertificateDer<'_>],
    names: CertificateNames,
    peer: &mut PeerTls,
) {
    let boxed =
        |names: Vec<String>| -> Vec<Box<str>> { names.into_iter().map(Box::from).collect() };
    peer.uri_sans = boxed(names.uri);
    peer.dns_sans = boxed(names.dns);
    peer.subject = names.subject.into();
    peer.issuer = names.issuer.into();
    peer.serial = names.serial.into();
    peer.sha256 = chain
        .first()
        .and_then(|leaf| sha256(leaf))
        .map_or_else(Box::default, |hash| hex(&hash).into());
    peer.chain = chain.iter().map(|der| Box::from(der.as_ref())).collect();
}

/// Does the client name one of our protocols, or none at all? (rustls would turn it away otherwise; Envoy goes on without.)
fn shares_protocol(settings: &ServerTls, protocol: Option<&Protocol>) -> bool {
    match protocol {
        Some(Protocol::Tls { applications, .. }) if !applications.is_empty() => settings
            .common
            .alpn
            .iter()
            .any(|ours| applications.iter().any(|theirs| **ours == **theirs)),
        _ => true,
    }
}
