//! Bodies on their way through: one enum each way, nothing boxed, nothing buffered.

use std::convert::Infallible;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use crate::listener::Downstream;
use crate::pool::Lease;
use crate::report::{Flag, Flow, Report};

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
}

impl From<Infallible> for BodyError {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// The request's body on its way to the endpoint.
#[derive(Debug)]
pub struct RequestBody {
    inner: Option<Incoming>,
    flow: Rc<Flow>,
}

impl RequestBody {
    /// The body of a request; `None` for a try without one.
    pub fn new(inner: Option<Incoming>, flow: Rc<Flow>) -> Self {
        let inner = inner.filter(|body| !body.is_end_stream());
        if inner.is_none() {
            flow.request_done.set(true);
        }
        Self { inner, flow }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let Some(inner) = &mut this.inner else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(&mut *inner).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            this.flow
                .request_bytes
                .set(this.flow.request_bytes.get() + data.remaining() as u64);
        }
        if frame.is_none() || inner.is_end_stream() {
            this.flow.request_done.set(true);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Incoming::size_hint)
    }
}

/// The response's body on its way to the client.
pub struct ResponseBody {
    content: Content,
    /// Keeps the connection from being taken for idle until the body is through.
    guard: Option<InFlight>,
}

enum Content {
    Local(Option<Bytes>, Option<Box<Report>>),
    Upstream(Box<UpstreamBody>),
}

/// Tells a connection that its response is through, when dropped.
pub struct InFlight(pub Rc<Downstream>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.finish();
    }
}

impl ResponseBody {
    /// A local answer. The report is recorded when the body is dropped.
    pub fn local(bytes: Option<Bytes>, report: Box<Report>) -> Self {
        Self {
            content: Content::Local(bytes, Some(report)),
            guard: None,
        }
    }

    /// Nothing, and nothing to report.
    pub fn empty() -> Self {
        Self {
            content: Content::Local(None, None),
            guard: None,
        }
    }

    /// From an endpoint.
    pub fn upstream(body: UpstreamBody) -> Self {
        Self {
            content: Content::Upstream(Box::new(body)),
            guard: None,
        }
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

/// Timers, only where a route has some.
struct Limits {
    deadline: Option<Pin<Box<Sleep>>>,
    idle: Option<(Duration, Pin<Box<Sleep>>)>,
}

impl UpstreamBody {
    /// `deadline`: end of the route's timeout. `idle`: longest silence.
    pub fn new(
        inner: Incoming,
        lease: Lease,
        report: Report,
        deadline: Option<Instant>,
        idle: Option<Duration>,
    ) -> Self {
        let limits = (deadline.is_some() || idle.is_some()).then(|| Limits {
            deadline: deadline.map(|at| Box::pin(tokio::time::sleep_until(at))),
            idle: idle.map(|time| (time, Box::pin(tokio::time::sleep(time)))),
        });
        let mut body = Self {
            inner,
            lease: Some(lease),
            report,
            limits,
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
            lease.give_back(self.report.flow.request_done.get());
        }
    }

    fn poll_limits(&mut self, cx: &mut Context<'_>) -> Option<BodyError> {
        let limits = self.limits.as_mut()?;
        if let Some(deadline) = &mut limits.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            self.report.flag = Flag::Timeout;
            return Some(BodyError::Timeout);
        }
        if let Some((_, idle)) = &mut limits.idle
            && idle.as_mut().poll(cx).is_ready()
        {
            self.report.flag = Flag::Idle;
            return Some(BodyError::Idle);
        }
        None
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
        if let Some(Limits {
            idle: Some((time, sleep)),
            ..
        }) = &mut self.limits
        {
            sleep.as_mut().reset(Instant::now() + *time);
        }
    }
}

/// `grpc-status` of headers or trailers.
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

impl Drop for UpstreamBody {
    fn drop(&mut self) {
        if !self.ended && self.report.flag == Flag::None {
            self.report.flag = Flag::ClientGone;
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
        let body = match &mut self.get_mut().content {
            Content::Local(bytes, _) => {
                return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes))));
            }
            Content::Upstream(body) => &mut **body,
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
                body.report.flag = Flag::UpstreamClosed;
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                body.end();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
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
