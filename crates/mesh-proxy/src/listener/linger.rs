//! The end of a connection whose client may still be sending.

use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::tls::wire::Wire;

/// The longest silence before the connection is closed although the client has not closed it (Envoy's `delayed_close_timeout`).
const SILENCE: Duration = Duration::from_secs(1);
/// The longest time in all, for clients that never stop.
const LONGEST: Duration = Duration::from_secs(5);

/// Reads and drops what a client sends after its connection was shut down for writing: to close with bytes unread makes the kernel send a
/// reset, which takes the answer from the client that it has not read yet (RFC 9112 section 9.6).
pub(super) struct Linger {
    end: Instant,
    silence: Pin<Box<Sleep>>,
}

impl Linger {
    pub(super) fn new() -> Self {
        Self {
            end: Instant::now() + LONGEST,
            silence: Box::pin(tokio::time::sleep(SILENCE)),
        }
    }

    /// Ready when the client has closed, too, or has had its time.
    pub(super) fn poll(&mut self, stream: &mut Wire, cx: &mut Context<'_>) -> Poll<()> {
        let mut room = [MaybeUninit::uninit(); 4096];
        loop {
            let mut buf = ReadBuf::uninit(&mut room);
            match Pin::new(&mut *stream).poll_read(cx, &mut buf) {
                Poll::Pending => return self.silence.as_mut().poll(cx),
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    let now = Instant::now();
                    if now >= self.end {
                        return Poll::Ready(());
                    }
                    self.silence.as_mut().reset(self.end.min(now + SILENCE));
                }
                Poll::Ready(_) => return Poll::Ready(()),
            }
        }
    }
}
