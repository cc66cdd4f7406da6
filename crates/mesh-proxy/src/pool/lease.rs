//! A connection lent to one request.

use std::rc::Rc;
use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use mesh_routing::cluster::ClusterConfig;

use crate::body::RequestBody;
use crate::clock;
use crate::pool::connect::{ConnectError, Open};
use crate::pool::{History, Host, Http1, Idle, MOST_IDLE, Multiplexed};
use crate::report::principals::Principals;
use crate::upstream::breaker::Held;
use crate::upstream::counters::{Counter, HostCounter};

pub(super) enum Sender {
    Http1(Http1),
    Http2(Rc<Multiplexed>),
}

/// A connection lent to one request. Dropping it without [`Lease::give_back`] closes it (HTTP/1) or resets the stream (HTTP/2).
pub struct Lease {
    host: Rc<Host>,
    sender: Option<Sender>,
    /// Was it used before? (Then the endpoint may close it at the very moment it is used again.)
    pub reused: bool,
    /// Was it unused for so long that this is likely?
    pub suspect: bool,
    history: History,
    limits: Limits,
    _request: Option<Held>,
    /// Counts the connection as open as long as it is lent, though it may be the HTTP library's no more (upgrades, tunnels).
    _open: Option<Rc<Open>>,
}

/// What of the configuration counts when the connection is given back.
#[derive(Debug, Clone, Copy)]
struct Limits {
    requests: Option<u32>,
    seconds: Option<u64>,
}

/// What became of a try.
pub enum Sent {
    /// There is a response.
    Response(Response<Incoming>),
    /// Nothing was written; here is the request again.
    Unsent(Box<Request<RequestBody>>, hyper::Error),
    /// It may have been received.
    Lost(hyper::Error),
}

impl Lease {
    pub(super) fn new(
        host: &Rc<Host>,
        sender: Sender,
        config: &ClusterConfig,
        mut history: History,
    ) -> Result<Self, ConnectError> {
        let request = match host.core.begin_request() {
            Some(request) => request,
            None => {
                // The connection is as good as before.
                if let Sender::Http1(sender) = sender {
                    keep(host, sender, history);
                }
                return Err(ConnectError::Overflow);
            }
        };
        history.requests += 1;
        if let Sender::Http2(shared) = &sender {
            shared.streams.set(shared.streams.get() + 1);
            shared.history.replace(history.clone());
        }
        host.active.set(host.active.get() + 1);
        host.core.counters.inc(Counter::RqTotal);
        host.core.counters.inc(Counter::RqActive);
        host.counters.inc(HostCounter::RqTotal);
        host.counters.inc(HostCounter::RqActive);
        Ok(Self {
            _open: history.open.upgrade(),
            host: host.clone(),
            sender: Some(sender),
            reused: false,
            suspect: false,
            history,
            limits: Limits {
                requests: config.max_requests_per_connection,
                seconds: config.max_connection_duration.map(|d| d.as_secs().max(1)),
            },
            _request: request,
        })
    }

    pub(super) fn used_before(mut self, suspect: bool) -> Self {
        self.reused = true;
        self.suspect = suspect;
        self
    }

    /// What both sides of the connection have proved, in mutual TLS.
    pub fn principals(&self) -> Option<Arc<Principals>> {
        self.history.principals.clone()
    }

    /// The endpoint.
    pub fn host(&self) -> &Rc<Host> {
        &self.host
    }

    /// Sends a request.
    pub async fn send(&mut self, request: Request<RequestBody>) -> Option<Sent> {
        let done = match self.sender.as_mut()? {
            Sender::Http1(sender) => sender.try_send_request(request).await,
            Sender::Http2(shared) => shared.sender.clone().try_send_request(request).await,
        };
        Some(match done {
            Ok(response) => Sent::Response(response),
            Err(mut error) => match error.take_message() {
                Some(request) => Sent::Unsent(Box::new(request), error.into_error()),
                None => Sent::Lost(error.into_error()),
            },
        })
    }

    /// Back to the pool after the whole response; an HTTP/1 connection whose request was not sent whole is closed instead.
    pub fn give_back(mut self, request_done: bool) {
        if !request_done || self.is_spent() {
            return;
        }
        if let Some(Sender::Http1(_)) = self.sender
            && let Some(Sender::Http1(sender)) = self.sender.take()
        {
            keep(&self.host, sender, self.history.clone());
        }
    }

    fn is_spent(&self) -> bool {
        let counters = &self.host.core.counters;
        let full = self
            .limits
            .requests
            .is_some_and(|most| self.history.requests >= most);
        let age = u64::from(clock::now().saturating_sub(self.history.born));
        let old = self.limits.seconds.is_some_and(|most| age >= most);
        if matches!(self.sender, Some(Sender::Http1(_))) {
            if full {
                counters.inc(Counter::CxMaxRequests);
            } else if old {
                counters.inc(Counter::CxMaxDuration);
            }
        }
        full || old || self.history.generation != self.host.generation.get()
    }
}

/// To who waits for a connection, or to the idle ones.
fn keep(host: &Host, sender: Http1, history: History) {
    let idle = Idle {
        sender,
        since: clock::now(),
        history,
    };
    if host.waiting.borrow().is_empty() {
        let mut all = host.idle.borrow_mut();
        let wish = &idle.history.wish;
        if all.len() >= MOST_IDLE && (wish.ends.is_some() || wish.source.is_some()) {
            // That which has been unused for longest is of a client that may be gone.
            all.remove(0);
        }
        if all.len() < MOST_IDLE {
            all.push(idle);
        }
    } else if let Some(idle) = host.hand_over(Some(idle)) {
        host.idle.borrow_mut().push(idle);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let host = &self.host;
        host.active.set(host.active.get() - 1);
        host.core.counters.dec(Counter::RqActive);
        host.counters.dec(HostCounter::RqActive);
        if let Some(Sender::Http2(shared)) = &self.sender {
            shared.streams.set(shared.streams.get() - 1);
            shared.since.set(clock::now());
            if !host.waiting.borrow().is_empty() {
                // There is room for another stream.
                host.hand_over(None);
            }
        }
    }
}
