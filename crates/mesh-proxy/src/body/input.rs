//! The client's body before it goes anywhere: filters may look at its beginning.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;

/// A body, of which the beginning may have been read already.
#[derive(Debug)]
pub struct Input {
    inner: Incoming,
    /// What was looked at; a null check where nothing was.
    held: Option<Box<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    data: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
}

/// The beginning of a body.
#[derive(Debug)]
pub struct Peeked {
    /// At least as much as was asked for, unless the body has ended.
    pub bytes: Bytes,
    /// That is all.
    pub ended: bool,
}

impl From<Incoming> for Input {
    fn from(inner: Incoming) -> Self {
        Self { inner, held: None }
    }
}

impl Input {
    /// Is there nothing (left) to read?
    pub fn is_empty(&self) -> bool {
        self.is_end_stream()
    }

    /// Has the client sent it whole?
    pub fn has_arrived(&self) -> bool {
        self.inner.is_end_stream()
    }

    /// Reads until there are `most` bytes or the body ends. Everything stays in the body.
    pub async fn peek(&mut self, most: usize) -> Result<Peeked, hyper::Error> {
        let held = self.held.get_or_insert_default();
        let mut size: usize = held.data.iter().map(Bytes::len).sum();
        let mut ended = held.trailers.is_some();
        while size < most && !ended {
            let Some(frame) = self.inner.frame().await else {
                ended = true;
                break;
            };
            match frame?.into_data() {
                Ok(data) => {
                    size += data.len();
                    held.data.push_back(data);
                }
                Err(frame) => held.trailers = frame.into_trailers().ok(),
            }
            ended = held.trailers.is_some() || self.inner.is_end_stream();
        }
        let mut bytes = BytesMut::with_capacity(size);
        held.data
            .iter()
            .for_each(|data| bytes.extend_from_slice(data));
        Ok(Peeked {
            bytes: bytes.freeze(),
            ended: ended || self.inner.is_end_stream(),
        })
    }
}

impl Body for Input {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        if let Some(held) = &mut this.held {
            if let Some(data) = held.data.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            if let Some(trailers) = held.trailers.take() {
                return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
            }
            this.held = None;
        }
        Pin::new(&mut this.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        let holds = |held: &Held| !held.data.is_empty() || held.trailers.is_some();
        !self.held.as_deref().is_some_and(holds) && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let Some(held) = &self.held else {
            return self.inner.size_hint();
        };
        let read: usize = held.data.iter().map(Bytes::len).sum();
        let (read, rest) = (read as u64, self.inner.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + read);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + read);
        }
        hint
    }
}
