//! `tcp-echo`: sends every line back with a word before it, for routing below HTTP.

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::serve;

/// Longest line that is taken, in bytes; a longer one comes back in pieces.
const MAX_LINE: u64 = 64 * 1024;

/// Arguments as the field's program takes them: ports separated by commas, then the word.
pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    let [ports, prefix] = args else {
        anyhow::bail!(
            "tcp-echo takes two arguments: ports (such as 9000,9001,9002) and the word to put before each line"
        );
    };
    let ports: Vec<u16> = ports
        .split(',')
        .map(|port| {
            port.trim()
                .parse()
                .with_context(|| format!("{port:?} is not a port number"))
        })
        .collect::<anyhow::Result<_>>()?;
    serve::block_on(async {
        let stop = serve::stop_signal()?;
        for port in ports {
            let listener = serve::listen(port).await?;
            serve::say(&format!("tcp-echo listens on port {port}"));
            tokio::spawn(serve_on(listener, prefix.clone()));
        }
        stop.await;
        serve::linger().await;
        Ok(())
    })
}

/// Serves `listener` for ever, each line answered with `prefix`, a space and the line.
pub async fn serve_on(listener: TcpListener, prefix: String) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let prefix = prefix.clone();
                tokio::spawn(async move {
                    // A peer that breaks off ends its own connection only.
                    let _ = echo(stream, &prefix).await;
                });
            }
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
        }
    }
}

async fn echo(stream: TcpStream, prefix: &str) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut reader = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await?
            == 0
        {
            return Ok(());
        }
        let mut answer = Vec::with_capacity(prefix.len() + 1 + line.len());
        answer.extend_from_slice(prefix.as_bytes());
        answer.push(b' ');
        answer.extend_from_slice(&line);
        write.write_all(&answer).await?;
    }
}
