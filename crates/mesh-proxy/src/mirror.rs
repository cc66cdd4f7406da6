//! Copies of requests for the clusters that a route mirrors to: sent and forgotten. A slow mirror neither slows the request down nor makes
//! it grow: a copy that lags too far behind is broken off.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderName, HeaderValue, Request};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use mesh_routing::Snapshot;
use mesh_routing::format::Facts;
use mesh_routing::mirror::Mirror;

use crate::attempt::{judge, tls_wish};
use crate::body::{BodyError, RequestBody};
use crate::http::{Exchange, address_head, upstream_version};
use crate::message::append_forwarded_for;
use crate::pool::Sent;
use crate::tls::connect::Wish as TlsWish;
use crate::upstream::{Observation, Wish};
use crate::worker::Worker;

/// Bytes that may wait for a mirror; Envoy's default limit of a connection's buffer.
const MOST_WAITING: usize = 1 << 20;
/// Copies under way on one worker; what comes on top is not copied.
const MOST_COPIES: usize = 1024;
/// Longest life of a copy where the route has no timeout.
const LONGEST: Duration = Duration::from_secs(60);
/// Tells the endpoint that the request came from a proxy, as Envoy's copies do.
const INTERNAL: HeaderName = HeaderName::from_static("x-envoy-internal");

thread_local! {
    static COPIES: Cell<usize> = const { Cell::new(0) };
}

/// Sees the frames of a request's body as they pass, and hands them to its copies.
#[derive(Debug, Default)]
pub struct Tap(Vec<Rc<Feed>>);

impl Tap {
    /// A frame has passed.
    pub fn frame(&mut self, frame: &Frame<Bytes>) {
        self.0.retain(|feed| feed.push(frame));
    }

    /// The body is whole.
    pub fn end(&mut self) {
        self.0.drain(..).for_each(|feed| feed.end(End::Whole));
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.0.drain(..).for_each(|feed| feed.end(End::Broken));
    }
}

/// The body of a copy: frames that have passed and were not sent yet.
#[derive(Debug, Default)]
pub struct Feed {
    frames: RefCell<VecDeque<Frame<Bytes>>>,
    waiting: Cell<usize>,
    end: Cell<End>,
    waker: RefCell<Option<Waker>>,
    /// Length as announced.
    announced: SizeHint,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    Whole,
    Broken,
}

impl Feed {
    fn new(announced: SizeHint) -> Self {
        Self {
            announced,
            ..Self::default()
        }
    }

    /// The length of the body as announced.
    pub fn size_hint(&self) -> SizeHint {
        self.announced
    }

    /// False where nobody reads any more, or too slowly.
    fn push(&self, frame: &Frame<Bytes>) -> bool {
        let copy = match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => {
                self.waiting.set(self.waiting.get() + data.len());
                Frame::data(data.clone())
            }
            (_, Some(trailers)) => Frame::trailers(trailers.clone()),
            _ => return true,
        };
        if self.waiting.get() > MOST_WAITING {
            self.frames.borrow_mut().clear();
            self.end(End::Broken);
        }
        if self.end.get() != End::Open {
            return false;
        }
        self.frames.borrow_mut().push_back(copy);
        self.wake();
        true
    }

    fn end(&self, end: End) {
        if self.end.get() == End::Open {
            self.end.set(end);
        }
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// The next frame of the copy.
    pub fn poll_frame(&self, cx: &Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(frame) = self.frames.borrow_mut().pop_front() {
            let len = frame.data_ref().map_or(0, Bytes::len);
            self.waiting.set(self.waiting.get().saturating_sub(len));
            return Poll::Ready(Some(Ok(frame)));
        }
        match self.end.get() {
            End::Whole => Poll::Ready(None),
            End::Broken => Poll::Ready(Some(Err(BodyError::Copied))),
            End::Open => {
                *self.waker.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Is nothing more to come?
    pub fn is_end(&self) -> bool {
        self.end.get() == End::Whole && self.frames.borrow().is_empty()
    }
}

/// Sends copies of a request that is ready to be sent, and has its body tapped for them.
pub fn start(
    exchange: &Exchange,
    mirrors: &[(&Mirror, Arc<str>)],
    timeout: Option<Duration>,
    facts: &Facts<'_>,
    request: &Request<RequestBody>,
) {
    let worker = &exchange.connection.worker;
    let snapshot = worker.snapshot();
    let whole = request.body().is_end_stream();
    let own_address = worker.shared.options.ip;
    let mut tap = Tap::default();
    for (mirror, cluster) in mirrors {
        let Some(target) = snapshot
            .cluster(cluster)
            .filter(|_| COPIES.get() < MOST_COPIES)
        else {
            continue;
        };
        let version = upstream_version(target, request.version());
        let wish = tls_wish(exchange, target, version, request.headers());
        let feed = Rc::new(Feed::new(request.body().size_hint()));
        if whole {
            feed.end(End::Whole);
        } else {
            tap.0.push(feed.clone());
        }
        let copy = (
            copy(mirror, facts, own_address, request, feed.clone()),
            feed,
            wish,
        );
        let sending = send(worker.clone(), snapshot.clone(), cluster.clone(), copy);
        let limit = timeout.unwrap_or(LONGEST).min(LONGEST);
        let count = Count::up();
        tokio::task::spawn_local(async move {
            let _count = count;
            // What becomes of it is nobody's concern.
            let _ = tokio::time::timeout(limit, sending).await;
        });
    }
    if !tap.0.is_empty() {
        *exchange.flow.tap.borrow_mut() = Some(Box::new(tap));
    }
}

/// One more copy under way, until it is dropped.
struct Count;

impl Count {
    fn up() -> Self {
        COPIES.set(COPIES.get() + 1);
        Self
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        COPIES.set(COPIES.get().saturating_sub(1));
    }
}

fn copy(
    mirror: &Mirror,
    facts: &Facts<'_>,
    own_address: IpAddr,
    request: &Request<RequestBody>,
    feed: Rc<Feed>,
) -> Request<RequestBody> {
    let mut copy = Request::new(RequestBody::copy(feed));
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    let headers = copy.headers_mut();
    if let Some(host) = headers.get(HOST) {
        let host = mirror.host(host);
        headers.insert(HOST, host);
    }
    append_forwarded_for(headers, own_address);
    headers.insert(INTERNAL, HeaderValue::from_static("true"));
    mirror.request_ops.apply_to_request(headers, facts);
    copy
}

async fn send(
    worker: Rc<Worker>,
    snapshot: Arc<Snapshot>,
    cluster: Arc<str>,
    (mut request, feed, wish): (Request<RequestBody>, Rc<Feed>, TlsWish),
) {
    let Some(cluster) = snapshot.cluster(&cluster) else {
        return;
    };
    let state = worker.cluster_state(cluster);
    let version = upstream_version(cluster, request.version());
    if !address_head(&mut request, version) {
        return;
    }
    for fresh in [false, true] {
        let picked = state.pick(&Wish::default(), &worker.peers, || worker.random());
        let Some(host) = picked else { return };
        let how = (version, &wish);
        let lease = host.lease_for(&worker.shared, &cluster.config, how, fresh);
        let Ok(mut lease) = lease.await else { return };
        match lease.send(request).await {
            Some(Sent::Response(response)) => {
                host.observe(judge(&response));
                if discard(response.into_body()).await {
                    lease.give_back(feed.is_end());
                }
                return;
            }
            Some(Sent::Unsent(unsent, _)) if !fresh => request = *unsent,
            _ => {
                host.observe(Observation::Reset);
                return;
            }
        }
    }
}

/// Reads a body to its end; false where it breaks off.
async fn discard(mut body: Incoming) -> bool {
    while let Some(frame) = body.frame().await {
        if frame.is_err() {
            return false;
        }
    }
    true
}
