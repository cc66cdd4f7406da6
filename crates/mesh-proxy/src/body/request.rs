//! The request's body on its way to the endpoint, kept in bounded memory only where it may have to be sent again.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use super::pipe::{Inlet, Outlet, pipe};
use super::{BodyError, Input};
use crate::mirror::Feed;
use crate::report::Flow;

/// The request's body on its way to the endpoint.
#[derive(Debug)]
pub struct RequestBody {
    source: Source,
    flow: Rc<Flow>,
}

#[derive(Debug)]
enum Source {
    /// No body.
    Empty,
    /// Straight from the client.
    Stream(Input),
    /// From the client, through memory.
    Kept(Reading),
    /// Made here.
    Whole(Option<Bytes>),
    /// A copy of another request's.
    Copy(Rc<Feed>),
    /// A stream of bytes that is written here.
    Piped(Outlet),
}

/// How far a try has read a remembered body.
#[derive(Debug)]
struct Reading {
    kept: Rc<Kept>,
    turn: u32,
    next: usize,
    trailers_read: bool,
}

/// A body that is remembered while it is sent, so that another try can send it again.
#[derive(Debug)]
pub struct Kept {
    inner: RefCell<Input>,
    read: RefCell<Vec<Bytes>>,
    trailers: RefCell<Option<HeaderMap>>,
    ended: Cell<bool>,
    /// Length as announced at the beginning.
    announced: SizeHint,
    size: Cell<usize>,
    limit: usize,
    /// The number of the try that may read.
    turn: Cell<u32>,
    remembers: Cell<bool>,
}

impl Kept {
    /// Can the body be sent again from its beginning?
    pub fn may_repeat(&self) -> bool {
        self.remembers.get()
    }

    /// No other try will come: what was remembered is dropped.
    pub fn forget(&self) {
        self.remembers.set(false);
        self.read.borrow_mut().clear();
    }

    fn remember(&self, data: &Bytes) {
        if !self.remembers.get() {
            return;
        }
        self.size.set(self.size.get() + data.len());
        // Envoy, too, gives up retrying beyond the buffer limit and streams on (`retry_or_shadow_abandoned`).
        if self.size.get() > self.limit {
            self.forget();
        } else {
            self.read.borrow_mut().push(data.clone());
        }
    }
}

impl RequestBody {
    /// The body of a request.
    pub fn new(inner: Input, flow: Rc<Flow>) -> Self {
        let source = if inner.is_end_stream() {
            flow.finish_request();
            flow.request_sent.set(true);
            Source::Empty
        } else {
            Source::Stream(inner)
        };
        Self { source, flow }
    }

    /// Nothing to send.
    pub fn empty(flow: Rc<Flow>) -> Self {
        Self {
            source: Source::Empty,
            flow,
        }
    }

    /// A body made here.
    pub fn whole(bytes: Bytes) -> Self {
        Self {
            source: Source::Whole(Some(bytes)),
            flow: Rc::default(),
        }
    }

    /// A copy of a body that passes.
    pub fn copy(feed: Rc<Feed>) -> Self {
        Self {
            source: Source::Copy(feed),
            flow: Rc::default(),
        }
    }

    /// A body that is written into as the bytes come.
    pub fn piped() -> (Self, Inlet) {
        let (inlet, outlet) = pipe();
        let body = Self {
            source: Source::Piped(outlet),
            flow: Rc::default(),
        };
        (body, inlet)
    }

    /// From now on what passes is remembered, up to `limit` bytes. `None` where there is no body.
    pub fn keep(&mut self, limit: usize) -> Option<Rc<Kept>> {
        let inner = match std::mem::replace(&mut self.source, Source::Empty) {
            Source::Stream(inner) => inner,
            other => {
                self.source = other;
                return None;
            }
        };
        let kept = Rc::new(Kept {
            announced: inner.size_hint(),
            ended: Cell::new(false),
            inner: RefCell::new(inner),
            read: RefCell::default(),
            trailers: RefCell::default(),
            size: Cell::new(0),
            limit,
            turn: Cell::new(0),
            remembers: Cell::new(true),
        });
        self.source = Source::Kept(Reading::new(&kept, 0));
        Some(kept)
    }

    /// The same body for another try; the try before cannot read on.
    pub fn again(kept: Option<&Rc<Kept>>, flow: &Rc<Flow>) -> Self {
        let Some(kept) = kept else {
            return Self::empty(flow.clone());
        };
        let turn = kept.turn.get() + 1;
        kept.turn.set(turn);
        flow.request_sent.set(false);
        Self {
            source: Source::Kept(Reading::new(kept, turn)),
            flow: flow.clone(),
        }
    }

    fn note(&self, frame: &Frame<Bytes>) {
        if let Some(tap) = self.flow.tap.borrow_mut().as_mut() {
            tap.frame(frame);
        }
        if let Some(data) = frame.data_ref() {
            let so_far = self.flow.request_bytes.get();
            self.flow
                .request_bytes
                .set(so_far + data.remaining() as u64);
        }
        self.flow.touch();
    }
}

/// A frame, and whether it came from the client just now.
type Passed = (Frame<Bytes>, bool);

impl Reading {
    fn new(kept: &Rc<Kept>, turn: u32) -> Self {
        Self {
            kept: kept.clone(),
            turn,
            next: 0,
            trailers_read: false,
        }
    }

    /// The next frame.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Passed, BodyError>>> {
        let kept = &*self.kept;
        if kept.turn.get() != self.turn {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        if let Some(data) = kept.read.borrow().get(self.next) {
            self.next += 1;
            return Poll::Ready(Some(Ok((Frame::data(data.clone()), false))));
        }
        if kept.ended.get() {
            let trailers = kept.trailers.borrow().clone();
            let trailers = trailers.filter(|_| !self.trailers_read);
            self.trailers_read = true;
            return Poll::Ready(trailers.map(|t| Ok((Frame::trailers(t), false))));
        }
        let frame = ready!(Pin::new(&mut *kept.inner.borrow_mut()).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    kept.remember(data);
                    self.next = kept.read.borrow().len();
                } else if let Some(trailers) = frame.trailers_ref() {
                    kept.trailers.replace(Some(trailers.clone()));
                    self.trailers_read = true;
                }
            }
            // A body that broke off cannot be sent again.
            Some(Err(_)) => kept.forget(),
            None => {}
        }
        if frame.is_none() || kept.inner.borrow().is_end_stream() {
            kept.ended.set(true);
        }
        Poll::Ready(frame.map(|frame| Ok((frame?, true))))
    }

    fn is_end(&self) -> bool {
        self.kept.ended.get()
            && self.next >= self.kept.read.borrow().len()
            && (self.trailers_read || self.kept.trailers.borrow().is_none())
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if matches!(this.source, Source::Stream(_) | Source::Kept(_)) {
            if this.flow.is_abandoned() {
                return Poll::Ready(Some(Err(BodyError::Answered)));
            }
            this.flow.wait_for_abandon(cx);
        }
        let (frame, new, ended) = match &mut this.source {
            Source::Empty => return Poll::Ready(None),
            Source::Whole(bytes) => (
                bytes.take().map(|bytes| Ok(Frame::data(bytes))),
                false,
                true,
            ),
            Source::Copy(feed) => (ready!(feed.poll_frame(cx)), false, feed.is_end()),
            Source::Piped(outlet) => {
                let frame = ready!(outlet.poll(cx));
                let frame = frame.map(|bytes| bytes.map(Frame::data));
                (frame, false, outlet.is_end())
            }
            Source::Stream(inner) => {
                let frame = ready!(Pin::new(&mut *inner).poll_frame(cx));
                let ended = frame.is_none() || inner.is_end_stream();
                (frame.map(|f| f.map_err(BodyError::Http)), true, ended)
            }
            Source::Kept(reading) => {
                let frame = ready!(reading.poll(cx));
                let new = matches!(&frame, Some(Ok((_, true))));
                let frame = frame.map(|frame| frame.map(|(frame, _)| frame));
                (frame, new, reading.kept.ended.get())
            }
        };
        if let Some(Ok(frame)) = frame.as_ref().filter(|_| new) {
            this.note(frame);
        }
        // Nothing comes after trailers, and whoever sends them does not ask again.
        let trailers = matches!(&frame, Some(Ok(frame)) if frame.is_trailers());
        if ended || trailers {
            this.flow.finish_request();
        }
        if frame.is_none() || trailers || this.is_end_stream() {
            this.flow.request_sent.set(true);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty | Source::Whole(None) => true,
            Source::Whole(Some(_)) => false,
            Source::Copy(feed) => feed.is_end(),
            Source::Piped(outlet) => outlet.is_end(),
            Source::Stream(inner) => inner.is_end_stream(),
            Source::Kept(reading) => reading.is_end(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty | Source::Whole(None) => SizeHint::with_exact(0),
            Source::Whole(Some(bytes)) => SizeHint::with_exact(bytes.len() as u64),
            Source::Copy(feed) => feed.size_hint(),
            Source::Stream(inner) => inner.size_hint(),
            Source::Kept(reading) if reading.next == 0 => reading.kept.announced,
            Source::Kept(_) | Source::Piped(_) => SizeHint::default(),
        }
    }
}
