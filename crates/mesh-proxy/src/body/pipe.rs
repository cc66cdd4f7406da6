//! A request's body that is written here as a stream of bytes, as tunnels by POST need it.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

/// Most bytes of a frame.
const FRAME: usize = 16 * 1024;

/// One frame at a time passes from the writer to the body, so that no more is read than the endpoint takes.
#[derive(Debug, Default)]
pub struct Pipe {
    frame: RefCell<Option<Bytes>>,
    ended: Cell<bool>,
    /// The body is gone: nobody takes what is written.
    broken: Cell<bool>,
    reader: RefCell<Option<Waker>>,
    writer: RefCell<Option<Waker>>,
}

/// The reader's side.
#[derive(Debug)]
pub(super) struct Outlet(Rc<Pipe>);

impl Pipe {
    pub(super) fn outlet(self: &Rc<Self>) -> Outlet {
        Outlet(self.clone())
    }

    /// Takes the beginning of the bytes as the next frame, once the one before is on its way.
    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.broken.get() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.frame.borrow().is_some() {
            self.writer.replace(Some(cx.waker().clone()));
            return Poll::Pending;
        }
        let frame = bytes.get(..FRAME).unwrap_or(bytes);
        self.frame.replace(Some(Bytes::copy_from_slice(frame)));
        wake(&self.reader);
        Poll::Ready(Ok(frame.len()))
    }

    /// Nothing more will be written.
    pub fn end(&self) {
        self.ended.set(true);
        wake(&self.reader);
    }
}

impl Outlet {
    /// The next frame; `None` after the last.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let pipe = &*self.0;
        match pipe.frame.take() {
            Some(frame) => {
                wake(&pipe.writer);
                Poll::Ready(Some(frame))
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

    #[test]
    fn one_frame_at_a_time_until_the_reader_is_gone() {
        let pipe = Rc::new(Pipe::default());
        let outlet = pipe.outlet();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(outlet.poll(&mut cx).is_pending());
        let large = vec![7; FRAME + 1];
        let written = pipe.poll_write(&mut cx, &large);
        assert!(matches!(written, Poll::Ready(Ok(FRAME))));
        assert!(pipe.poll_write(&mut cx, b"x").is_pending());
        assert_eq!(
            outlet.poll(&mut cx),
            Poll::Ready(Some(large[..FRAME].to_vec().into()))
        );
        assert!(matches!(pipe.poll_write(&mut cx, b"x"), Poll::Ready(Ok(1))));
        pipe.end();
        assert!(!outlet.is_end());
        assert_eq!(outlet.poll(&mut cx), Poll::Ready(Some("x".into())));
        assert_eq!(outlet.poll(&mut cx), Poll::Ready(None));
        assert!(outlet.is_end());
        drop(outlet);
        assert!(matches!(
            pipe.poll_write(&mut cx, b"y"),
            Poll::Ready(Err(_))
        ));
    }
}
