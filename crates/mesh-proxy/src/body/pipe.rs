//! A request's body that is written here as a stream of bytes, as tunnels by POST need it.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use super::BodyError;

/// Most bytes of a frame.
const FRAME: usize = 16 * 1024;

/// One frame at a time passes from the writer to the body, so that no more is read than the endpoint takes.
#[derive(Debug, Default)]
struct Pipe {
    frame: RefCell<Option<Bytes>>,
    ended: Cell<bool>,
    /// The writer is gone without an end.
    abandoned: Cell<bool>,
    /// The body is gone: nobody takes what is written.
    broken: Cell<bool>,
    reader: RefCell<Option<Waker>>,
    writer: RefCell<Option<Waker>>,
}

/// The writer's side. Dropped before the end it breaks the body off, so that the request does not wait for the rest.
#[derive(Debug)]
pub struct Inlet(Rc<Pipe>);

/// The reader's side.
#[derive(Debug)]
pub(super) struct Outlet(Rc<Pipe>);

pub(super) fn pipe() -> (Inlet, Outlet) {
    let pipe = Rc::<Pipe>::default();
    (Inlet(pipe.clone()), Outlet(pipe))
}

impl Inlet {
    /// Takes the beginning of the bytes as the next frame, once the one before is on its way.
    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let pipe = &*self.0;
        if pipe.broken.get() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if pipe.frame.borrow().is_some() {
            pipe.writer.replace(Some(cx.waker().clone()));
            return Poll::Pending;
        }
        let frame = bytes.get(..FRAME).unwrap_or(bytes);
        pipe.frame.replace(Some(Bytes::copy_from_slice(frame)));
        wake(&pipe.reader);
        Poll::Ready(Ok(frame.len()))
    }

    /// Nothing more will be written.
    pub fn end(&self) {
        self.0.ended.set(true);
        wake(&self.0.reader);
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        if !self.0.ended.get() {
            self.0.abandoned.set(true);
            wake(&self.0.reader);
        }
    }
}

impl Outlet {
    /// The next frame; `None` after the last.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        let pipe = &*self.0;
        if pipe.abandoned.get() {
            return Poll::Ready(Some(Err(BodyError::Abandoned)));
        }
        match pipe.frame.take() {
            Some(frame) => {
                wake(&pipe.writer);
                Poll::Ready(Some(Ok(frame)))
            }
            None if pipe.ended.get() => Poll::Ready(None),
            None => {
                pipe.reader.replace(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }

    pub(super) fn is_end(&self) -> bool {
        self.0.ended.get() && self.0.frame.borrow().is_none()
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.0.broken.set(true);
        wake(&self.0.writer);
    }
}

fn wake(waker: &RefCell<Option<Waker>>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The next frame as text, `-` after the last one, `!` where the body breaks off, nothing where it waits.
    fn next(outlet: &Outlet) -> String {
        match outlet.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Some(Ok(frame))) => String::from_utf8_lossy(&frame).into_owned(),
            Poll::Ready(Some(Err(_))) => "!".to_owned(),
            Poll::Ready(None) => "-".to_owned(),
            Poll::Pending => String::new(),
        }
    }

    #[test]
    fn one_frame_at_a_time_until_the_reader_is_gone() {
        let (inlet, outlet) = pipe();
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(next(&outlet), "");
        let large = vec![b'a'; FRAME + 1];
        let written = inlet.poll_write(&mut cx, &large);
        assert!(matches!(written, Poll::Ready(Ok(FRAME))));
        assert!(inlet.poll_write(&mut cx, b"x").is_pending());
        assert_eq!(next(&outlet).len(), FRAME);
        assert!(matches!(
            inlet.poll_write(&mut cx, b"x"),
            Poll::Ready(Ok(1))
        ));
        inlet.end();
        assert!(!outlet.is_end());
        assert_eq!((next(&outlet), next(&outlet)), ("x".into(), "-".into()));
        assert!(outlet.is_end());
        drop(outlet);
        assert!(matches!(
            inlet.poll_write(&mut cx, b"y"),
            Poll::Ready(Err(_))
        ));
    }

    #[test]
    fn a_writer_that_goes_breaks_the_body_off_unless_it_has_ended_it() {
        let (inlet, outlet) = pipe();
        drop(inlet);
        assert_eq!(next(&outlet), "!");
        let (inlet, outlet) = pipe();
        inlet.end();
        drop(inlet);
        assert_eq!(next(&outlet), "-");
    }
}
