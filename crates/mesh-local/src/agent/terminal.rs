//! Terminals of containers and commands.
//!
//! The pseudoterminal is made inside, in the container's own /dev/pts, so that its programs find its name there (`tty`, `ttyname(3)`); the
//! agent gets the controlling end over a socket, as container runtimes do with their console socket.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use anyhow::Context;
use mesh_apiserver::node::TerminalSize;
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use crate::pass;

/// What the terminal's end is sent with; a message needs one byte at least.
const HERE_IT_IS: &[u8] = b"t";

/// The agent's end of a terminal.
#[derive(Debug)]
pub struct Terminal {
    /// Keys typed.
    pub keys: pipe::Sender,
    /// What the programs write.
    pub screen: Screen,
    /// Its size.
    pub window: Window,
}

impl Terminal {
    fn new(end: OwnedFd) -> std::io::Result<Self> {
        rustix::io::ioctl_fionbio(&end, true)?;
        // Tokio's pipes are what reads and writes a descriptor of any kind; "unchecked" is the check whether it is a pipe.
        Ok(Self {
            keys: pipe::Sender::from_owned_fd_unchecked(end.try_clone()?)?,
            screen: Screen(pipe::Receiver::from_owned_fd_unchecked(end.try_clone()?)?),
            window: Window(Arc::new(end)),
        })
    }

    /// Waits for the end that [`take_terminal`] sends over the other side of `console`.
    ///
    /// # Errors
    /// When the other side closes first.
    pub async fn receive(console: UnixStream) -> std::io::Result<Self> {
        console.set_nonblocking(true)?;
        let console = tokio::net::UnixStream::from_std(console)?;
        let received = console.async_io(Interest::READABLE, || {
            pass::receive(console.as_fd(), &mut [0])
        });
        let end = received.await?.1;
        Self::new(end.ok_or_else(|| std::io::Error::other("no terminal was sent"))?)
    }
}

/// A terminal's size; clones are of the same terminal.
#[derive(Debug, Clone)]
pub struct Window(Arc<OwnedFd>);

impl Window {
    /// Follows a client's window until the client is gone; the programs get SIGWINCH.
    pub fn follow(self, mut sizes: mpsc::Receiver<TerminalSize>) {
        tokio::spawn(async move {
            while let Some(size) = sizes.recv().await {
                let size = rustix::termios::Winsize {
                    ws_row: size.height,
                    ws_col: size.width,
                    ws_xpixel: 0,
                    ws_ypixel: 0,
                };
                // A terminal whose programs have ended has no size to set.
                let _ = rustix::termios::tcsetwinsize(&self.0, size);
            }
        });
    }
}

/// A terminal's output. Reading fails with EIO once the last program has closed the other side, which is its end of file.
#[derive(Debug)]
pub struct Screen(pipe::Receiver);

impl AsyncRead for Screen {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        match Pin::new(&mut self.0).poll_read(context, buffer) {
            Poll::Ready(Err(e)) if e.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                Poll::Ready(Ok(()))
            }
            other => other,
        }
    }
}

/// Makes a terminal, sends the agent its end over `console`, and takes the other as standard streams and controlling terminal. For a
/// process that leads its session and runs where the container's /dev is; `owner` is the user that the program will run as.
pub(super) fn take_terminal(console: OwnedFd, owner: Option<u32>) -> anyhow::Result<()> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let agents = openpt(flags).context("making a terminal")?;
    unlockpt(&agents).context("unlocking the terminal")?;
    let own = ioctl_tiocgptpeer(&agents, flags).context("opening the terminal")?;
    // So that the program can open it by its name, too.
    std::os::unix::fs::fchown(&own, owner, None).context("giving the terminal to its user")?;
    let console = UnixStream::from(console);
    pass::send(&console, HERE_IT_IS, Some(agents.as_fd())).context("handing the terminal over")?;
    nix::unistd::dup2_stdin(&own).context("taking the terminal as standard input")?;
    nix::unistd::dup2_stdout(&own).context("taking the terminal as standard output")?;
    nix::unistd::dup2_stderr(&own).context("taking the terminal as standard error")?;
    rustix::process::ioctl_tiocsctty(std::io::stdin()).context("taking control of the terminal")
}
