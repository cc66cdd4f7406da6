//! `mesh request`: one request to the proxy of this pod (`pilot-agent request`, which hooks and people who are inside a pod call).

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use http::{Method, Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// The longest that a whole exchange takes (Istio's agent: one minute).
const TIMEOUT: Duration = Duration::from_secs(60);

/// Make one request to the proxy of this pod
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Method, such as GET or POST
    #[arg(value_name = "METHOD")]
    pub method: Method,
    /// Path and query, such as stats or config_dump?include_eds
    #[arg(value_name = "PATH")]
    pub path: String,
    /// Body
    #[arg(value_name = "BODY")]
    pub body: Option<String>,
    /// Port on this machine: 15000 is the admin interface, 15020 the agent
    #[arg(long = "debug-port", value_name = "PORT", default_value_t = 15000)]
    pub debug_port: u16,
}

/// Runs the command: the body of the answer goes to standard output, and nothing else.
///
/// # Errors
/// Nobody listens, no answer within a minute, or a status of 400 and above.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let asked = format!(
        "{} {} on port {} of this pod",
        args.method, args.path, args.debug_port
    );
    let body = tokio::time::timeout(TIMEOUT, ask(args)).await;
    let body = body
        .with_context(|| format!("{asked}: no answer within {} s", TIMEOUT.as_secs()))?
        .with_context(|| asked)?;
    let mut out = std::io::stdout().lock();
    out.write_all(&body)?;
    if !body.ends_with(b"\n") {
        out.write_all(b"\n")?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn ask(args: Args) -> anyhow::Result<Bytes> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, args.debug_port));
    let stream = TcpStream::connect(address)
        .await
        .context("connecting (is this the container of a proxy?)")?;
    let request = Request::builder()
        .method(args.method)
        .uri(format!("/{}", args.path.trim_start_matches('/')))
        .header(header::HOST, format!("localhost:{}", args.debug_port))
        .body(Full::new(Bytes::from(args.body.unwrap_or_default())))
        .context("this is no path")?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    connection.abort();
    if status.is_client_error() || status.is_server_error() {
        bail!(
            "answered with {status}: {}",
            String::from_utf8_lossy(&body).trim_end()
        );
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// Answers one request; what came is the task's result.
    async fn server(answer: &'static str) -> (u16, tokio::task::JoinHandle<String>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a free port");
        let port = listener.local_addr().expect("address").port();
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("connection");
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.expect("a byte"));
            }
            if String::from_utf8_lossy(&request).contains("content-length: 3") {
                let mut body = [0; 3];
                stream.read_exact(&mut body).await.expect("the body");
                request.extend_from_slice(&body);
            }
            stream.write_all(answer.as_bytes()).await.expect("written");
            String::from_utf8(request).expect("text")
        });
        (port, task)
    }

    fn args(port: u16, path: &str, body: Option<&str>) -> Args {
        Args {
            method: Method::POST,
            path: path.to_owned(),
            body: body.map(str::to_owned),
            debug_port: port,
        }
    }

    #[tokio::test]
    async fn the_path_may_do_without_its_slash() {
        for path in ["drain?now", "/drain?now"] {
            let (port, task) = server("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nOK\n").await;
            let body = ask(args(port, path, None)).await.expect("an answer");
            assert_eq!(body, "OK\n");
            let request = task.await.expect("a request");
            assert!(
                request.starts_with("POST /drain?now HTTP/1.1\r\n"),
                "{request}"
            );
            assert!(
                request.contains(&format!("host: localhost:{port}\r\n")),
                "{request}"
            );
        }
    }

    #[tokio::test]
    async fn a_body_is_sent() {
        let (port, task) = server("HTTP/1.1 204 No Content\r\n\r\n").await;
        let body = ask(args(port, "logging", Some("a=b"))).await;
        assert_eq!(body.expect("an answer"), "");
        let request = task.await.expect("a request");
        assert!(
            request.contains("content-length: 3\r\n") && request.ends_with("\r\n\r\na=b"),
            "{request}"
        );
    }

    #[tokio::test]
    async fn a_refusal_is_a_failure_with_the_reason() {
        let (port, _task) = server("HTTP/1.1 403 Forbidden\r\ncontent-length: 3\r\n\r\nno\n").await;
        let error = run(args(port, "drain", None)).await.expect_err("refused");
        let error = format!("{error:#}");
        assert!(
            error.contains("POST drain") && error.contains("403 Forbidden: no"),
            "{error}"
        );
    }
}
