//! Copying between two connections that cannot be joined inside the kernel, as where one of them is in TLS.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::time::{Instant, sleep_until};

use crate::splice::{Counters, End};

/// Bytes of a buffer: a TLS record holds as many.
const CHUNK: usize = 16 * 1024;

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
    let (read_a, write_a) = split(a);
    let (read_b, write_b) = split(b);
    let mut both = pin!(async {
        tokio::try_join!(
            one_way(read_a, write_b, &counters.forward),
            one_way(read_b, write_a, &counters.backward)
        )
    });
    let ended = |done: io::Result<_>| match done {
        Ok(((), ())) => End::Closed,
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

async fn one_way<R, W>(
    mut from: ReadHalf<&mut R>,
    mut to: WriteHalf<&mut W>,
    counter: &AtomicU64,
) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        // Only taken when there is something, so that silent connections hold no buffer.
        if buffer.capacity() == 0 {
            buffer.reserve_exact(CHUNK);
        }
        let taken = from.read_buf(&mut buffer).await?;
        if taken == 0 {
            to.flush().await?;
            return match to.shutdown().await {
                // The other side is gone already: there is nobody left to tell.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                other => other,
            };
        }
        to.write_all(&buffer).await?;
        to.flush().await?;
        counter.fetch_add(taken as u64, Ordering::Relaxed);
    }
}
