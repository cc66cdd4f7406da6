//! A running command and the channels that carry it, whatever the transport.

use std::pin::Pin;

use bytes::Bytes;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::node::{ExecSession, ExitStatus, TerminalSize};

/// Bytes read from a command at a time.
const CHUNK: usize = 32 * 1024;

/// The channels, with their numbers of `v4.channel.k8s.io`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Channel {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
    Error = 3,
    Resize = 4,
}

impl Channel {
    pub(super) fn from_number(number: u8) -> Option<Self> {
        [
            Self::Stdin,
            Self::Stdout,
            Self::Stderr,
            Self::Error,
            Self::Resize,
        ]
        .into_iter()
        .find(|c| *c as u8 == number)
    }

    /// By the `streamtype` header of SPDY.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        match name {
            "stdin" => Some(Self::Stdin),
            "stdout" => Some(Self::Stdout),
            "stderr" => Some(Self::Stderr),
            "error" => Some(Self::Error),
            "resize" => Some(Self::Resize),
            _ => None,
        }
    }
}

/// What the client sends.
pub(super) enum Input {
    Stdin(Bytes),
    StdinEnd,
    Resize(Bytes),
}

/// What the client gets.
pub(super) enum Output {
    Data(Channel, Bytes),
    End(Channel),
}

/// Carries a command until it has ended and all its output is delivered; the last thing sent is its status.
///
/// When the client goes away, `outputs` closes; the session's streams are dropped then, which tells the node agent.
pub(super) async fn run(
    session: ExecSession,
    inputs: mpsc::Receiver<Input>,
    outputs: mpsc::Sender<Output>,
) {
    let ExecSession {
        stdin,
        stdout,
        stderr,
        resize,
        exit,
    } = session;
    let input = tokio::spawn(feed(stdin, resize, inputs));
    let gone = outputs.clone();
    let work = async {
        tokio::join!(
            drain(stdout, Channel::Stdout, &outputs),
            drain(stderr, Channel::Stderr, &outputs)
        );
        let status = status(&exit.await);
        // A receiver that is gone has no use for the status.
        let _ = outputs.send(Output::Data(Channel::Error, status)).await;
        let _ = outputs.send(Output::End(Channel::Error)).await;
    };
    tokio::select! {
        () = work => {}
        () = gone.closed() => {}
    }
    input.abort();
}

async fn feed(
    stdin: Option<Pin<Box<dyn AsyncWrite + Send>>>,
    resize: mpsc::Sender<TerminalSize>,
    mut inputs: mpsc::Receiver<Input>,
) {
    let mut stdin = stdin;
    while let Some(input) = inputs.recv().await {
        match input {
            Input::Stdin(bytes) => {
                if let Some(to) = stdin.as_mut() {
                    let written = async {
                        to.write_all(&bytes).await?;
                        to.flush().await
                    };
                    if written.await.is_err() {
                        stdin = None;
                    }
                }
            }
            Input::StdinEnd => {
                if let Some(mut to) = stdin.take() {
                    // The command may have closed its input already.
                    let _ = to.shutdown().await;
                }
            }
            Input::Resize(bytes) => {
                if let Some(size) = terminal_size(&bytes) {
                    let _ = resize.send(size).await;
                }
            }
        }
    }
}

/// `{"Width":80,"Height":24}`, one or several, line by line; the last one counts.
fn terminal_size(bytes: &[u8]) -> Option<TerminalSize> {
    let sizes = serde_json::Deserializer::from_slice(bytes).into_iter::<serde_json::Value>();
    let size = sizes.filter_map(Result::ok).last()?;
    let number = |name: &str| size[name].as_u64().and_then(|n| u16::try_from(n).ok());
    Some(TerminalSize {
        width: number("Width")?,
        height: number("Height")?,
    })
}

async fn drain(
    from: Option<Pin<Box<dyn AsyncRead + Send>>>,
    channel: Channel,
    outputs: &mpsc::Sender<Output>,
) {
    let Some(mut from) = from else { return };
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            // A terminal gives EIO when its other side has closed: the end, like 0.
            Ok(0) | Err(_) => break,
            Ok(length) => {
                let data = Output::Data(channel, Bytes::copy_from_slice(&buffer[..length]));
                if outputs.send(data).await.is_err() {
                    return;
                }
            }
        }
    }
    let _ = outputs.send(Output::End(channel)).await;
}

/// The `Status` that ends a command, in the words that kubectl reads the exit code from.
pub(super) fn status(exit: &ExitStatus) -> Bytes {
    let value = match exit {
        ExitStatus::Code(0) => json!({"metadata": {}, "status": "Success"}),
        ExitStatus::Code(code) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: command terminated with exit code {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        ExitStatus::Failed(message) => json!({
            "metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500, "message": message,
        }),
    };
    Bytes::from(value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_size_counts_and_nonsense_does_not() {
        let size = terminal_size(b"{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Height\":40}\n");
        assert_eq!(
            size,
            Some(TerminalSize {
                width: 100,
                height: 40
            })
        );
        assert_eq!(terminal_size(b"{\"Width\":70000,\"Height\":1}"), None);
        assert_eq!(terminal_size(b"{"), None);
    }

    #[test]
    fn a_code_is_a_cause() {
        let status: serde_json::Value =
            serde_json::from_slice(&status(&ExitStatus::Code(7))).unwrap();
        assert_eq!(status["details"]["causes"][0]["message"], "7");
    }
}
