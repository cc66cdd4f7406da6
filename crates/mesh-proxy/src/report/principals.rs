//! Who the two sides of a connection have proved to be.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use mesh_routing::peer::PeerTls;
use mesh_telemetry::Peer;
use mesh_telemetry::istio::UNKNOWN;

/// Pairs that a thread remembers; beyond, connections count as those of nobody, so that nobody can fill the memory.
const MOST: usize = 4096;

/// Both sides of a connection in mutual TLS.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Principals {
    /// Ours.
    pub local: Arc<str>,
    /// The peer's.
    pub remote: Arc<str>,
}

thread_local! {
    static KNOWN: RefCell<HashMap<Principals, Arc<Principals>, foldhash::fast::RandomState>> = RefCell::default();
}

impl Principals {
    /// Of a connection that was accepted; `None` where the client did not prove who it is.
    pub fn of_client(peer: &PeerTls) -> Option<Arc<Self>> {
        if !peer.is_mutual() {
            return None;
        }
        Self::of(peer.local_principal(), peer.principal())
    }

    /// One value for each pair and thread, so that metrics can tell them apart by their address.
    pub fn of(local: Option<&str>, remote: Option<&str>) -> Option<Arc<Self>> {
        let text = |name: Option<&str>| Arc::from(name.unwrap_or(UNKNOWN));
        let pair = Self {
            local: text(local),
            remote: text(remote),
        };
        KNOWN.with_borrow_mut(|known| {
            if let Some(found) = known.get(&pair) {
                return Some(found.clone());
            }
            if known.len() >= MOST {
                return None;
            }
            let made = Arc::new(Self {
                local: pair.local.clone(),
                remote: pair.remote.clone(),
            });
            known.insert(pair, made.clone());
            Some(made)
        })
    }
}

/// The workload with the identity that it proved.
pub(super) fn identified(peer: &Arc<Peer>, principal: Option<&Arc<str>>) -> Arc<Peer> {
    match principal {
        None => peer.clone(),
        Some(principal) => Arc::new(Peer {
            principal: principal.clone(),
            ..Peer::clone(peer)
        }),
    }
}
