//! Bodies on their way through: one enum each way, nothing boxed, and nothing buffered that is not to be sent twice.

mod input;
mod pipe;
mod request;

use std::convert::Infallible;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use crate::filter::Throttle;
use crate::listener::Downstream;
use crate::pool::Lease;
use crate::report::{Flag, Report};

pub use input::{Input, Peeked};
pub use pipe::Inlet;
pub use request::{Kept, RequestBody};

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// From the connection.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// The route's timeout.
    #[error("the route's timeout is over")]
    Timeout,
    /// The stream was silent too long.
    #[error("nothing was sent within the idle timeout")]
    Idle,
    /// Who wrote it is gone.
    #[error("the client of the tunnel is gone")]
    Abandoned,
    /// Another try has begun.
    #[error("the request is sent again elsewhere")]
    Superseded,
    /// The endpoint has answered without waiting for the rest.
    #[error("the answer is there before the request was sent whole")]
    Answered,
    /// The request that this is a copy of.
    #[error("the request that is copied broke off, or came faster than the copy was taken")]
    Copied,
}

impl From<Infallible> for BodyError {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// The response's body on its way to the client.
pub struct ResponseBody {
    content: Content,
    /// Keeps the connection from being taken for idle until the body is through.
    guard: Option<InFlight>,
    throttle: Option<Box<Throttle>>,
}

enum Content {
    Local(Option<Bytes>, Option<Box<Report>>),
    Upstream(Box<UpstreamBody>),
}

/// Tells a connection that its response is through, when dropped.
pub struct InFlight {
    connection: Rc<Downstream>,
    era: u32,
}

impl InFlight {
    /// For a request that begins now.
    pub fn new(connection: &Rc<Downstream>) -> Self {
        Self {
            era: connection.era(),
            connection: connection.clone(),
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.connection.finish(self.era);
    }
}

impl ResponseBody {
    /// A local answer. The report is recorded when the body is dropped.
    pub fn local(bytes: Option<Bytes>, report: Box<Report>) -> Self {
        Self {
            content: Content::Local(bytes, Some(report)),
            guard: None,
            throttle: None,
        }
    }

    /// Nothing, and nothing to report.
    pub fn empty() -> Self {
        Self {
            content: Content::Local(None, None),
            guard: None,
            throttle: None,
        }
    }

    /// From an endpoint.
    pub fn upstream(body: UpstreamBody) -> Self {
        Self {
            content: Content::Upstream(Box::new(body)),
            guard: None,
            throttle: None,
        }
    }

    /// Takes what there is of a local answer away; the answer is how long it was, where it was anything.
    pub fn leave_out(&mut self) -> Option<u64> {
        let Content::Local(bytes, report) = &mut self.content else {
            return None;
        };
        if let Some(report) = report {
            report.response_bytes = 0;
        }
        bytes.take().map(|bytes| bytes.len() as u64)
    }

    /// Limits how fast it goes to the client.
    pub fn slow_down(&mut self, throttle: Box<Throttle>) {
        self.throttle = Some(throttle);
    }

    /// Ties the end of the body to the connection.
    pub fn guard(&mut self, guard: InFlight) {
        self.guard = Some(guard);
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // The report first: whoever sees the connection idle must see the request counted.
        if let Content::Local(_, report) = &mut self.content {
            report.take();
        }
    }
}

/// The body of an endpoint's response.
pub struct UpstreamBody {
    inner: Incoming,
    /// Given back to the pool at the end.
    lease: Option<Lease>,
    report: Report,
    limits: Option<Limits>,
    ended: bool,
}

/// Limits of a response's body, only where there are some.
#[derive(Debug, Clone, Copy, Default)]
pub struct BodyLimits {
    /// From the end of the request to the end of the response.
    pub timeout: Option<Duration>,
    /// End of the stream at the latest.
    pub end: Option<Instant>,
    /// Longest silence in both directions.
    pub idle: Option<Duration>,
}

struct Limits {
    what: BodyLimits,
    timer: Pin<Box<Sleep>>,
}

impl UpstreamBody {
    /// `limits`: when the body is broken off.
    pub fn new(inner: Incoming, lease: Lease, report: Report, limits: BodyLimits) -> Self {
        let any = limits.timeout.is_some() || limits.end.is_some() || limits.idle.is_some();
        if any {
            report.flow.watch();
        }
        let mut body = Self {
            inner,
            lease: Some(lease),
            report,
            limits: any.then(|| Limits {
                what: limits,
                timer: Box::pin(tokio::time::sleep_until(Instant::now())),
            }),
            ended: false,
        };
        if body.inner.is_end_stream() {
            body.end();
        }
        body
    }

    fn end(&mut self) {
        self.ended = true;
        if let Some(lease) = self.lease.take() {
            let sent = self.report.flow.request_sent.get();
            lease.give_back(sent);
            if !sent {
                self.report.flow.abandon_request();
            }
        }
    }

    /// The limit that has been reached, or a timer that wakes for the next one.
    fn poll_limits(&mut self, cx: &mut Context<'_>) -> Option<BodyError> {
        let limits = self.limits.as_mut()?;
        let flow = &self.report.flow;
        loop {
            let timeout = limits
                .what
                .timeout
                .zip(flow.finished())
                .map(|(t, at)| at + t);
            let idle = limits.what.idle.map(|idle| flow.touched() + idle);
            // While the request still comes in, its end sets the timeout going; its frames are looked at once more then.
            let Some(next) = [timeout, limits.what.end, idle].into_iter().flatten().min() else {
                flow.wait_for_end(cx);
                return None;
            };
            if next > Instant::now() {
                limits.timer.as_mut().reset(next);
                if limits.timer.as_mut().poll(cx).is_pending() {
                    flow.wait_for_end(cx);
                    return None;
                }
                continue;
            }
            let (flag, error) = match () {
                () if timeout == Some(next) => (Flag::Timeout, BodyError::Timeout),
                () if idle == Some(next) => (Flag::Idle, BodyError::Idle),
                () => (Flag::MaxStreamDuration, BodyError::Timeout),
            };
            self.report.flags.add(flag);
            return Some(error);
        }
    }

    fn note(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.report.response_bytes += data.len() as u64;
        }
        if let Some(trailers) = frame.trailers_ref()
            && self.report.is_grpc
        {
            self.report.grpc = grpc_status(trailers).or(self.report.grpc);
        }
        if self.limits.is_some() {
            self.report.flow.touch();
        }
    }
}

/// Envoy's flag for a response that ends in the middle.
fn broken_off(error: &hyper::Error) -> Flag {
    let source = std::error::Error::source(error);
    match source.and_then(|source| source.downcast_ref::<h2::Error>()) {
        Some(error) if error.is_reset() => Flag::UpstreamReset,
        None if error.is_incomplete_message() || error.is_parse() => Flag::UpstreamProtocol,
        _ => Flag::UpstreamClosed,
    }
}

/// `grpc-status` of headers or trailers.
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

impl Drop for UpstreamBody {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if self.inner.size_hint().exact() == Some(0) {
            // All that was announced has come, and HTTP/1 asks for no more: over HTTP/2 the end may be a frame of its own.
            self.end();
        } else if self.report.flags.is_empty() {
            self.report.flags.add(Flag::ClientGone);
        }
    }
}

impl Content {
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let body = match self {
            Self::Local(bytes, _) => {
                return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes))));
            }
            Self::Upstream(body) => &mut **body,
        };
        if body.ended {
            return Poll::Ready(None);
        }
        match Pin::new(&mut body.inner).poll_frame(cx) {
            Poll::Pending => match body.poll_limits(cx) {
                Some(error) => Poll::Ready(Some(Err(error))),
                None => Poll::Pending,
            },
            Poll::Ready(Some(Ok(frame))) => {
                body.note(&frame);
                if body.inner.is_end_stream() {
                    body.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                body.report.flags.add(broken_off(&error));
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                body.end();
                Poll::Ready(None)
            }
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let Some(throttle) = &mut this.throttle else {
            return this.content.poll_frame(cx);
        };
        ready!(throttle.poll_turn(cx));
        if let Some(held) = throttle.held() {
            return Poll::Ready(Some(Ok(held)));
        }
        let frame = ready!(this.content.poll_frame(cx));
        Poll::Ready(frame.map(|frame| frame.map(|frame| throttle.slice(frame))))
    }

    fn is_end_stream(&self) -> bool {
        if self.throttle.as_ref().is_some_and(|t| t.holds()) {
            return false;
        }
        match &self.content {
            Content::Local(bytes, _) => bytes.is_none(),
            Content::Upstream(body) => body.ended || body.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Local(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64))
            }
            Content::Upstream(body) => body.inner.size_hint(),
        }
    }
}
