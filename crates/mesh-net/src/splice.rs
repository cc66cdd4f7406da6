//! Copying between two TCP connections inside the kernel: splice(2) through a pipe, no copy to user space.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

/// Bytes asked for in one call: the default size of a pipe (pipe(7)).
const CHUNK: usize = 64 * 1024;

/// Bytes moved so far, readable while the copy runs.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the first connection to the second.
    pub forward: AtomicU64,
    /// From the second connection to the first.
    pub backward: AtomicU64,
}

/// How a copy ended.
#[derive(Debug)]
pub enum End {
    /// Both sides closed.
    Closed,
    /// Nothing was moved for the idle time.
    Idle,
    /// Reading from or writing to a connection failed, as with a reset.
    Failed(io::Error),
}

/// Copies both ways until both sides have closed, nothing moves for `idle`, or a connection fails. `prefix` (bytes of `a` that were
/// already read) reaches `b` first. A side that closes its sending half closes the other's receiving half, no more (half-close).
pub async fn bidirectional(
    a: &mut TcpStream,
    b: &mut TcpStream,
    prefix: &[u8],
    idle: Option<Duration>,
    counters: &Counters,
) -> End {
    if !prefix.is_empty() {
        if let Err(error) = b.write_all(prefix).await {
            return End::Failed(error);
        }
        counters
            .forward
            .fetch_add(prefix.len() as u64, Ordering::Relaxed);
    }
    let (a, b) = (&*a, &*b);
    let both = async {
        tokio::try_join!(
            one_way(a, b, &counters.forward),
            one_way(b, a, &counters.backward)
        )
    };
    tokio::pin!(both);
    let Some(idle) = idle else {
        return match both.await {
            Ok(_) => End::Closed,
            Err(error) => End::Failed(error),
        };
    };
    let mut moved = counters.total();
    loop {
        tokio::select! {
            done = &mut both => return match done {
                Ok(_) => End::Closed,
                Err(error) => End::Failed(error),
            },
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

impl Counters {
    pub(crate) fn total(&self) -> u64 {
        self.forward.load(Ordering::Relaxed) + self.backward.load(Ordering::Relaxed)
    }
}

async fn one_way(from: &TcpStream, to: &TcpStream, counter: &AtomicU64) -> io::Result<()> {
    let (read_end, write_end) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC)?;
    loop {
        let taken = from
            .async_io(Interest::READABLE, || pull(from, &write_end))
            .await?;
        if taken == 0 {
            return shutdown(to);
        }
        let mut left = taken;
        while left > 0 {
            left -= to
                .async_io(Interest::WRITABLE, || push(&read_end, to, left))
                .await?;
        }
        counter.fetch_add(taken as u64, Ordering::Relaxed);
    }
}

fn pull(from: &TcpStream, pipe: &OwnedFd) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    Ok(splice(from, None, pipe, None, CHUNK, flags)?)
}

fn push(pipe: &OwnedFd, to: &TcpStream, length: usize) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    Ok(splice(pipe, None, to, None, length, flags)?)
}

fn shutdown(to: &TcpStream) -> io::Result<()> {
    match socket2::SockRef::from(to).shutdown(std::net::Shutdown::Write) {
        // The other side is gone already: there is nobody left to tell.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        other => other,
    }
}
