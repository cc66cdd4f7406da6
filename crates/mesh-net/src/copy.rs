//! Copying between two connections that cannot be joined inside the kernel, as where one of them is in TLS.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, sleep_until};

use crate::splice::{Counters, End};

/// Bytes of a buffer: a TLS record holds as many.
const CHUNK: usize = 16 * 1024;

thread_local! {
    /// One buffer for all connections of a thread: what is read is written at once, and only what cannot be is kept. So connections that
    /// are silent hold none.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
}

/// As [`crate::splice::bidirectional`], through user space.
pub async fn bidirectional<A, B>(
    a: &mut A,
    b: &mut B,
    prefix: &[u8],
    idle: Option<Duration>,
    counters: &Counters,
) -> End
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    if !prefix.is_empty() {
        if let Err(error) = b.write_all(prefix).await {
            return End::Failed(error);
        }
        let bytes = prefix.len() as u64;
        counters.forward.fetch_add(bytes, Ordering::Relaxed);
    }
    let (mut forward, mut backward) = (Way::default(), Way::default());
    let mut both = poll_fn(|cx| {
        let there = forward.poll(cx, &mut *a, &mut *b, &counters.forward)?;
        let back = backward.poll(cx, &mut *b, &mut *a, &counters.backward)?;
        match there.is_ready() && back.is_ready() {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    });
    let ended = |done: io::Result<()>| match done {
        Ok(()) => End::Closed,
        Err(error) => End::Failed(error),
    };
    let Some(idle) = idle else {
        return ended(both.await);
    };
    let mut moved = counters.total();
    loop {
        tokio::select! {
            done = &mut both => return ended(done),
            () = sleep_until(Instant::now() + idle) => {
                let now = counters.total();
                if now == moved {
                    return End::Idle;
                }
                moved = now;
            }
        }
    }
}

/// One direction.
#[derive(Default)]
struct Way {
    /// What could not be written yet.
    rest: Vec<u8>,
    /// How much of that is written.
    written: usize,
    /// The side that is read from has closed.
    ended: bool,
    /// And the other one was told.
    done: bool,
}

impl Way {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        counter: &AtomicU64,
    ) -> Poll<io::Result<()>> {
        loop {
            if self.done {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_rest(cx, to))?;
            if self.ended {
                ready!(Pin::new(&mut *to).poll_flush(cx))?;
                match ready!(Pin::new(&mut *to).poll_shutdown(cx)) {
                    // The other side is gone already: there is nobody left to tell.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                    other => other?,
                }
                self.done = true;
                continue;
            }
            let taken = match self.poll_chunk(cx, from, to) {
                Poll::Ready(taken) => taken?,
                Poll::Pending => {
                    // Nothing more for now: what is buffered goes out.
                    let _ = Pin::new(&mut *to).poll_flush(cx)?;
                    return Poll::Pending;
                }
            };
            self.ended = taken == 0;
            counter.fetch_add(taken as u64, Ordering::Relaxed);
        }
    }

    fn poll_rest(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<io::Result<()>> {
        while let Some(left) = self.rest.get(self.written..).filter(|l| !l.is_empty()) {
            match ready!(Pin::new(&mut *to).poll_write(cx, left))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.written += written,
            }
        }
        (self.rest, self.written) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }

    /// Reads what there is, writes what goes and keeps the rest. The number of bytes read; 0 at the end.
    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<io::Result<usize>> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(from).poll_read(cx, &mut read))?;
            let mut left = read.filled();
            let taken = left.len();
            while !left.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, left)? {
                    Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(written) => left = left.get(written..).unwrap_or_default(),
                    Poll::Pending => break,
                }
            }
            self.rest.extend_from_slice(left);
            Poll::Ready(Ok(taken))
        })
    }
}
