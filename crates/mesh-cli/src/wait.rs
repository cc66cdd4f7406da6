//! `mesh wait`: waits until the proxy of this pod is ready (a post-start hook that the injector sets).

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// Wait until the proxy of this pod is ready
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Port of the proxy's health check on this machine
    #[arg(long, value_name = "PORT", default_value_t = 15021)]
    pub port: u16,
    /// Longest wait, in seconds
    #[arg(long = "timeoutSeconds", value_name = "SECONDS", default_value_t = 60)]
    pub timeout_seconds: u64,
    /// Longest wait for one answer, in milliseconds
    #[arg(
        long = "requestTimeoutMillis",
        value_name = "MILLISECONDS",
        default_value_t = 500
    )]
    pub request_timeout_millis: u64,
    /// Pause between questions, in milliseconds
    #[arg(
        long = "periodMillis",
        value_name = "MILLISECONDS",
        default_value_t = 100
    )]
    pub period_millis: u64,
}

/// Runs the command.
///
/// # Errors
/// The proxy is not ready when the time is over; the message has its last answer.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let deadline = Instant::now() + Duration::from_secs(args.timeout_seconds);
    loop {
        let answer = timeout(
            Duration::from_millis(args.request_timeout_millis),
            ask(args.port),
        )
        .await;
        let answer = answer.unwrap_or_else(|_| {
            Err(anyhow::anyhow!(
                "no answer within {} ms",
                args.request_timeout_millis
            ))
        });
        match answer {
            Ok(200) => return Ok(ExitCode::SUCCESS),
            answer if Instant::now() >= deadline => {
                let last = answer.map_or_else(
                    |error| format!("{error:#}"),
                    |status| format!("status {status}"),
                );
                anyhow::bail!(
                    "the proxy is not ready after {} s: {last} on port {}; its log says why",
                    args.timeout_seconds,
                    args.port
                );
            }
            _ => sleep(Duration::from_millis(args.period_millis)).await,
        }
    }
}

/// Asks once; the status code of the answer.
async fn ask(port: u16) -> anyhow::Result<u16> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))
        .await
        .context("connecting")?;
    stream
        .write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .await?;
    // "HTTP/1.1 200" is all that counts.
    let mut head = [0; 12];
    stream
        .read_exact(&mut head)
        .await
        .context("reading the answer")?;
    std::str::from_utf8(&head[9..])
        .ok()
        .and_then(|status| status.parse().ok())
        .context("not an HTTP answer")
}

/// A time as Go writes it, in whole units: `300s`, `5m`, `1h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => 0,
    };
    match number.parse::<u32>() {
        Ok(number) if factor > 0 => Ok(Duration::from_secs(u64::from(number) * factor)),
        _ => Err(format!("{text:?} is not a time, such as 300s or 5m")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn server(answers: &'static [&'static str]) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a free port");
        let port = listener.local_addr().expect("address").port();
        tokio::spawn(async move {
            for answer in answers
                .iter()
                .chain(std::iter::repeat(&answers[answers.len() - 1]))
            {
                let (mut stream, _) = listener.accept().await.expect("connection");
                let mut request = [0; 64];
                let _ = stream.read(&mut request).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        port
    }

    fn args(port: u16, timeout_seconds: u64) -> Args {
        Args {
            port,
            timeout_seconds,
            request_timeout_millis: 5_000,
            period_millis: 1,
        }
    }

    #[tokio::test]
    async fn waits_for_the_first_200() {
        let port = server(&[
            "HTTP/1.1 503 Service Unavailable\r\n\r\n",
            "nonsense from elsewhere\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
        ])
        .await;
        assert!(run(args(port, 60)).await.is_ok());
    }

    #[tokio::test]
    async fn says_the_last_answer_when_the_time_is_over() {
        let port = server(&["HTTP/1.1 503 Service Unavailable\r\n\r\n"]).await;
        let error = run(args(port, 0))
            .await
            .expect_err("never ready")
            .to_string();
        assert!(error.contains("status 503"), "{error}");
    }
}
