//! How long what a filter chain has let in may go on after the chain was changed or taken away (Envoy: "Draining"): requests are judged by
//! the chain's newer version as soon as there is one, what is not judged again has the drain time left.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mesh_routing::Snapshot;
use mesh_routing::chain::{FilterChain, NetworkFilter};
use mesh_routing::hcm::HttpManager;
use mesh_routing::listener::Listener;
use tokio::sync::Notify;

use super::{Closing, Downstream};
use crate::clock;

/// Requests that run while their filter chain changes mostly end within so many seconds; their connections go on then.
const MOMENT: u32 = 1;

/// A filter chain, to be found again in later snapshots.
pub struct Place {
    listener: Arc<str>,
    /// Of the chain ([`FilterChain::door`]): what was agreed on at the beginning, a client's certificate for instance, holds for nothing else.
    door: u64,
    /// The version of the chain that what runs at present was let in by.
    whole: Cell<u64>,
}

/// What has become of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Same,
    /// It is the same door, but says something else now.
    Changed(u64),
    Gone,
}

impl Place {
    pub(super) fn of(listener: &Listener, chain: &FilterChain) -> Self {
        Self {
            listener: listener.name.clone(),
            door: chain.door,
            whole: Cell::new(chain.whole),
        }
    }

    fn find<'a>(&self, snapshot: &'a Snapshot) -> Option<&'a Arc<FilterChain>> {
        let mut chains = snapshot.listener(&self.listener)?.chains();
        chains.find(|chain| chain.door == self.door)
    }

    /// The connection manager that has taken the place of the one before.
    pub(super) fn manager(&self, snapshot: &Snapshot) -> Option<Arc<HttpManager>> {
        match &self.find(snapshot)?.filter {
            NetworkFilter::Http(manager) => Some(manager.clone()),
            NetworkFilter::Tcp(_) => None,
        }
    }

    fn fate(&self, snapshot: &Snapshot) -> Fate {
        match self.find(snapshot) {
            None => Fate::Gone,
            Some(chain) if chain.whole == self.whole.get() => Fate::Same,
            Some(chain) => Fate::Changed(chain.whole),
        }
    }
}

/// Bytes that pass and are not judged again: those of a TCP connection, of an upgraded one, of a tunnel.
pub struct Tenancy {
    place: Place,
    /// The second in which it ends, once its chain is not the same any more.
    ends: Cell<Option<u32>>,
    over: Notify,
}

impl Tenancy {
    /// Begins under the chain of a connection, by a request that began in this era.
    pub(super) fn begin(connection: &Downstream, era: u32) -> Rc<Self> {
        let place = &connection.place;
        let tenancy = Rc::new(Self {
            place: Place {
                listener: place.listener.clone(),
                door: place.door,
                whole: place.whole.clone(),
            },
            ends: Cell::new(None),
            over: Notify::new(),
        });
        // The chain may have changed between the decision to let it in and now.
        let worker = &connection.worker;
        let drain = worker.shared.options.drain;
        match era == connection.era() {
            true => tenancy.settle(&worker.snapshot(), drain),
            false => tenancy.ends.set(Some(end_of(drain))),
        }
        tenancy
    }

    /// Looks at a new snapshot.
    pub fn settle(&self, snapshot: &Snapshot, drain: Duration) {
        if self.ends.get().is_none() && self.place.fate(snapshot) != Fate::Same {
            self.ends.set(Some(end_of(drain)));
        }
    }

    /// Called every second.
    pub fn check(&self) {
        if self.ends.get().is_some_and(|end| end <= clock::now()) {
            self.over.notify_one();
        }
    }

    /// Waits until the time is over.
    pub async fn over(&self) {
        self.over.notified().await;
    }
}

/// The second in which what begins to drain now has had its time. Never earlier, at most two steps of the clock later.
fn end_of(drain: Duration) -> u32 {
    let seconds = u32::try_from(drain.as_secs()).unwrap_or(u32::MAX);
    let began = u32::from(drain.subsec_nanos() > 0) + 1;
    clock::now().saturating_add(seconds).saturating_add(began)
}

/// What an HTTP connection still has to do with versions of its chain that are gone.
#[derive(Debug, Default)]
pub(super) struct Lapse {
    /// The chain itself is gone: the connection ends with what runs on it.
    leaving: Cell<bool>,
    /// The second in which that began.
    since: Cell<u32>,
    /// The second in which the connection is closed.
    ends: Cell<Option<u32>>,
    /// Counts versions of the chain.
    era: Cell<u32>,
    /// Requests that run since an earlier version.
    old: Cell<u32>,
}

impl Downstream {
    /// Looks at a new snapshot. A connection whose chain is gone is told to end; one whose chain has changed goes on with the new one, but
    /// requests that run already have to come to an end.
    pub fn settle(&self, snapshot: &Snapshot) {
        let drain = self.worker.shared.options.drain;
        match self.place.fate(snapshot) {
            Fate::Same => return,
            Fate::Changed(whole) => {
                self.place.whole.set(whole);
                let running = self.activity.in_flight();
                if running == 0 {
                    return;
                }
                self.lapse.era.set(self.lapse.era.get().wrapping_add(1));
                self.lapse.old.set(running);
            }
            Fate::Gone if self.lapse.leaving.replace(true) => return,
            Fate::Gone if self.http2.get() => self.end_gracefully(),
            // The next response says so (`begin`).
            Fate::Gone => {}
        }
        if self.lapse.ends.get().is_none() {
            self.lapse.since.set(clock::now());
            self.lapse.ends.set(Some(end_of(drain)));
        }
    }

    /// The version of the chain that a request begins under.
    pub fn era(&self) -> u32 {
        self.lapse.era.get()
    }

    /// Is the chain gone?
    pub(super) fn is_leaving(&self) -> bool {
        self.lapse.leaving.get()
    }

    /// A request that began in this era has ended.
    pub(super) fn leave_era(&self, era: u32) {
        let lapse = &self.lapse;
        if era == lapse.era.get() {
            return;
        }
        lapse.old.set(lapse.old.get().saturating_sub(1));
        if lapse.old.get() == 0 && !lapse.leaving.get() {
            lapse.ends.set(None);
        }
    }

    /// Called every second: closes what has had its time. An HTTP/2 connection with requests of earlier versions that don't end in a moment is told
    /// to end, too, so that no other request is lost when it is closed. Over HTTP/1 there is no other, and an answer that has begun can't say any
    /// more that the connection ends with it.
    pub(super) fn check_lapse(&self) {
        let Some(end) = self.lapse.ends.get() else {
            return;
        };
        let now = clock::now();
        if end <= now {
            tracing::debug!(remote = %self.remote, "closed: its filter chain was changed, and the drain time is over");
            self.close(Closing::Now);
        } else if self.http2.get()
            && !self.is_leaving()
            && now.saturating_sub(self.lapse.since.get()) > MOMENT
        {
            self.end_gracefully();
        }
    }
}
