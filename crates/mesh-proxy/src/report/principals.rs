//! Who the two sides of a connection have proved to be.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use mesh_routing::peer::PeerTls;
use mesh_telemetry::Peer;
use mesh_telemetry::istio::UNKNOWN;

/// Pairs that a thread remembers; beyond, the names are left out, so that nobody can fill the memory.
const MOST: usize = 4096;

/// Both sides of a connection in mutual TLS.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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
        let pair = || Self::of(peer.local_principal(), peer.principal());
        peer.is_mutual().then(pair)
    }

    /// One value for each pair and thread, so that metrics can tell them apart by their address.
    pub fn of(local: Option<&str>, remote: Option<&str>) -> Arc<Self> {
        let text = |name: Option<&str>| Arc::from(name.unwrap_or(UNKNOWN));
        let pair = Self {
            local: text(local),
            remote: text(remote),
        };
        KNOWN.with_borrow_mut(|known| {
            if let Some(found) = known.get(&pair) {
                return found.clone();
            }
            // Beyond, they are all the same nobody; it still was mutual TLS.
            let nobody = text(None);
            let named = match known.len() < MOST {
                true => pair,
                false => Self {
                    local: nobody.clone(),
                    remote: nobody,
                },
            };
            let made = known
                .entry(named.clone())
                .or_insert_with(|| Arc::new(named));
            made.clone()
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
