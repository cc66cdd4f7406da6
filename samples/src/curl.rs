//! The applet `curl`: the part of curl that people use to try a mesh, with its options, output and exit codes.
//!
//! An option that is not there is refused by name; nothing is parsed and ignored. Order of a transfer: `args.rs` (what to do),
//! [`transfer`] (redirects and retries), `connect.rs` (names, TCP, TLS), `output.rs` (what is shown).

mod args;
mod connect;
mod output;
mod tls;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HOST, LOCATION,
    REFERER, USER_AGENT,
};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;

use args::Options;
use connect::{Connection, Target};
use output::Output;

/// A failed transfer: curl's exit code and its message.
#[derive(Debug, thiserror::Error)]
#[error("({code}) {message}")]
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// Exit codes, as curl's manual lists them.
mod code {
    pub(super) const USAGE: u8 = 2;
    pub(super) const URL: u8 = 3;
    pub(super) const RESOLVE: u8 = 6;
    pub(super) const CONNECT: u8 = 7;
    pub(super) const PARTIAL: u8 = 18;
    pub(super) const HTTP: u8 = 22;
    pub(super) const WRITE: u8 = 23;
    pub(super) const READ: u8 = 26;
    pub(super) const TIMEOUT: u8 = 28;
    pub(super) const TLS: u8 = 35;
    pub(super) const REDIRECTS: u8 = 47;
    pub(super) const EMPTY: u8 = 52;
    pub(super) const RECEIVE: u8 = 56;
    pub(super) const LOCAL_CERTIFICATE: u8 = 58;
    pub(super) const PEER_CERTIFICATE: u8 = 60;
    pub(super) const CA_FILE: u8 = 77;
}

/// What `-w` can show of a transfer.
#[derive(Debug, Clone, Default)]
struct Facts {
    status: u16,
    version: &'static str,
    method: String,
    url: String,
    redirect_url: String,
    redirects: u32,
    content_type: String,
    remote: Option<std::net::SocketAddr>,
    local: Option<std::net::SocketAddr>,
    connects: u32,
    resolved: Duration,
    connected: Duration,
    secured: Duration,
    first_byte: Duration,
    total: Duration,
    downloaded: u64,
    uploaded: u64,
    exit: u8,
    error: String,
}

pub(crate) fn main(args: &[String]) -> ExitCode {
    let options = match args::parse(args) {
        Ok(args::Parsed::Run(options)) => options,
        Ok(args::Parsed::Say(text)) => {
            crate::serve::say(&text);
            return ExitCode::SUCCESS;
        }
        Err(failure) => {
            eprintln!("curl: {}", failure.message);
            return ExitCode::from(failure.code);
        }
    };
    let result = crate::serve::block_on(async { Ok(run(&options).await) });
    ExitCode::from(result.unwrap_or(code::CONNECT))
}

/// Fetches all URLs one after the other; the exit code is the last failure's.
async fn run(options: &Options) -> u8 {
    let mut last = 0;
    let mut kept = None;
    for (index, url) in options.urls.iter().enumerate() {
        let exit = one(options, index, url, &mut kept).await;
        if exit != 0 {
            last = exit;
            if options.fail_early {
                break;
            }
        }
    }
    last
}

/// Fetches one URL with its retries.
async fn one(options: &Options, index: usize, url: &str, kept: &mut Option<Connection>) -> u8 {
    let mut attempt = 0;
    loop {
        let mut facts = Facts::default();
        let last_try = attempt >= options.retries;
        let started = Instant::now();
        let limit = options.max_time.unwrap_or(Duration::MAX);
        let work = transfer(options, index, url, kept, &mut facts, started, !last_try);
        let result = match tokio::time::timeout(limit, work).await {
            Ok(result) => result,
            Err(_) => {
                let milliseconds = started.elapsed().as_millis();
                let bytes = facts.downloaded;
                let message = format!(
                    "Operation timed out after {milliseconds} milliseconds with {bytes} bytes received"
                );
                Err(Failure::new(code::TIMEOUT, message))
            }
        };
        facts.total = started.elapsed();
        if result.is_err() {
            *kept = None;
        }
        let again = match &result {
            Ok(()) => is_transient(facts.status),
            Err(failure) if failure.code == code::HTTP => is_transient(facts.status),
            Err(failure) => {
                failure.code == code::TIMEOUT
                    || (failure.code == code::CONNECT && options.retry_refused)
                    || options.retry_all_errors
            }
        };
        if again && !last_try {
            attempt += 1;
            let pause = options
                .retry_delay
                .unwrap_or_else(|| Duration::from_secs(1 << (attempt - 1).min(9)));
            tokio::time::sleep(pause).await;
            continue;
        }
        return output::finish(options, &mut facts, result);
    }
}

/// Whether curl tries again on this status.
fn is_transient(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
}

/// One attempt: the request, and the ones that its redirects ask for.
async fn transfer(
    options: &Options,
    index: usize,
    url: &str,
    kept: &mut Option<Connection>,
    facts: &mut Facts,
    started: Instant,
    quiet_if_transient: bool,
) -> Result<(), Failure> {
    let mut target = Target::parse(url, options)?;
    let mut method = options.method.clone();
    let mut body = options.body.clone();
    let first_host = target.host.clone();
    let mut output = Output::open(options, index, &target)?;
    loop {
        facts.url = target.uri.to_string();
        facts.method = method.to_string();
        facts.uploaded = body.as_ref().map_or(0, |body| body.len() as u64);
        let same_host = target.host == first_host;
        let request = request(options, &target, &method, body.clone(), same_host)?;
        output.request_head(&request);
        let response = exchange(options, &target, kept, request, facts, started).await?;
        facts.first_byte = started.elapsed();
        facts.status = response.status().as_u16();
        facts.version = version_text(response.version());
        let text = |name| {
            response
                .headers()
                .get(name)
                .map(|value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        facts.content_type = text(CONTENT_TYPE).unwrap_or_default();
        let location = text(LOCATION).filter(|_| response.status().is_redirection());
        let next = location
            .as_deref()
            .map(|location| target.join(location, options))
            .transpose()?;
        facts.redirect_url = next
            .as_ref()
            .map(|next| next.uri.to_string())
            .unwrap_or_default();
        let Some(next) = next.filter(|_| options.follow) else {
            return receive(options, response, &mut output, facts, quiet_if_transient).await;
        };
        facts.redirects += 1;
        if facts.redirects > options.max_redirects {
            let message = format!("Maximum ({}) redirects followed", options.max_redirects);
            return Err(Failure::new(code::REDIRECTS, message));
        }
        output.response_head(&response)?;
        let status = response.status();
        drain(response).await?;
        // RFC 9110 section 15.4; a method that was asked for by name stays, as in curl.
        if matches!(status.as_u16(), 301..=303)
            && method != Method::HEAD
            && !options.method_is_fixed
        {
            method = Method::GET;
            body = None;
        }
        facts.redirect_url.clear();
        target = next;
    }
}

fn version_text(version: Version) -> &'static str {
    match version {
        Version::HTTP_09 => "0.9",
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        Version::HTTP_3 => "3",
        _ => "1.1",
    }
}

/// The request that the options ask for; credentials go to the first host only.
fn request(
    options: &Options,
    target: &Target,
    method: &Method,
    body: Option<Bytes>,
    same_host: bool,
) -> Result<Request<Full<Bytes>>, Failure> {
    let mut headers = HeaderMap::new();
    let mut set = |name, value: &str| {
        let value = HeaderValue::try_from(value);
        value
            .map(|value| headers.insert(name, value))
            .map_err(|_| Failure::new(code::USAGE, "a header value has control characters"))
    };
    set(HOST, &target.authority())?;
    set(
        USER_AGENT,
        options.user_agent.as_deref().unwrap_or("curl/8.16.0"),
    )?;
    set(ACCEPT, "*/*")?;
    if let Some(referer) = &options.referer {
        set(REFERER, referer)?;
    }
    if let Some(credentials) = options.authorization.as_deref().filter(|_| same_host) {
        set(AUTHORIZATION, credentials)?;
    }
    if let Some(cookie) = options.cookie.as_deref().filter(|_| same_host) {
        set(COOKIE, cookie)?;
    }
    if options.compressed {
        set(ACCEPT_ENCODING, "deflate, gzip")?;
    }
    if let Some(body) = &body {
        set(CONTENT_LENGTH, &body.len().to_string())?;
        set(CONTENT_TYPE, "application/x-www-form-urlencoded")?;
    }
    let mut replaced = std::collections::HashSet::new();
    for (name, value) in &options.headers {
        // The first of a name replaces what curl would send; further ones are added.
        if replaced.insert(name.clone()) {
            headers.remove(name);
        }
        let secret = *name == AUTHORIZATION || *name == COOKIE;
        if let Some(value) = value.as_ref().filter(|_| same_host || !secret) {
            headers.append(name.clone(), value.clone());
        }
    }
    let mut request = Request::new(Full::new(body.unwrap_or_default()));
    *request.method_mut() = method.clone();
    *request.headers_mut() = headers;
    *request.uri_mut() = target.uri.clone();
    Ok(request)
}

/// Sends the request on the kept connection, or on a new one where there is none to this host or it has ended.
async fn exchange(
    options: &Options,
    target: &Target,
    kept: &mut Option<Connection>,
    request: Request<Full<Bytes>>,
    facts: &mut Facts,
    started: Instant,
) -> Result<http::Response<Incoming>, Failure> {
    if let Some(connection) = kept.take().filter(|connection| connection.leads_to(target)) {
        let mut connection = connection;
        facts.remote = Some(connection.remote);
        facts.local = connection.local;
        if connection.is_ready().await {
            // The other side may be closing it just now: then it goes again on a new one.
            if let Ok(response) = connection.send(request.clone()).await {
                *kept = Some(connection);
                return Ok(response);
            }
        }
    }
    let mut connection = connect::open(options, target, facts, started).await?;
    let response = connection.send(request).await?;
    *kept = Some(connection);
    Ok(response)
}

/// Shows the response.
async fn receive(
    options: &Options,
    response: http::Response<Incoming>,
    output: &mut Output,
    facts: &mut Facts,
    quiet_if_transient: bool,
) -> Result<(), Failure> {
    let status = response.status();
    if quiet_if_transient && is_transient(status.as_u16()) {
        return drain(response).await;
    }
    output.response_head(&response)?;
    let failed = status.as_u16() >= 400;
    let message = || format!("The requested URL returned error: {}", status.as_u16());
    if failed && options.fail && !options.fail_with_body {
        return Err(Failure::new(code::HTTP, message()));
    }
    output.expect_encoding(options, response.headers());
    let expected = response
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| match expected {
            Some(expected) => {
                let left = expected.saturating_sub(facts.downloaded);
                Failure::new(
                    code::PARTIAL,
                    format!("end of response with {left} bytes missing"),
                )
            }
            None => Failure::new(
                code::RECEIVE,
                format!("Recv failure: {}", crate::upstream::causes(&error)),
            ),
        })?;
        if let Ok(data) = frame.into_data() {
            facts.downloaded += data.len() as u64;
            output.body(&data)?;
        }
    }
    output.end()?;
    if failed && options.fail_with_body {
        Err(Failure::new(code::HTTP, message()))
    } else {
        Ok(())
    }
}

/// Reads the rest of a response, so that its connection can be used again.
async fn drain(response: http::Response<Incoming>) -> Result<(), Failure> {
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        frame.map_err(|error| {
            Failure::new(
                code::RECEIVE,
                format!("Recv failure: {}", crate::upstream::causes(&error)),
            )
        })?;
    }
    Ok(())
}

/// The phrase of a status line; HTTP/2 has none.
fn reason(status: StatusCode, version: Version) -> &'static str {
    if version == Version::HTTP_2 {
        ""
    } else {
        status.canonical_reason().unwrap_or("")
    }
}

/// Path and query for an HTTP/1 request line.
fn origin_form(uri: &Uri) -> Uri {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    path.parse().unwrap_or_else(|_| Uri::from_static("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::httpbin::{Style, router};
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    /// Runs curl; its exit code and what it wrote to the file of `-o`.
    async fn curl(args: &[&str]) -> (u8, String) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("out").display().to_string();
        let mut all: Vec<_> = ["-s", "-o", &file]
            .iter()
            .chain(args)
            .map(|arg| (*arg).to_owned())
            .collect();
        all.retain(|arg| !arg.is_empty());
        let Ok(args::Parsed::Run(options)) = args::parse(&all) else {
            panic!("{args:?} is not understood")
        };
        let exit = run(&options).await;
        (exit, std::fs::read_to_string(&file).unwrap_or_default())
    }

    async fn httpbin() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(crate::serve::serve_on(
            listener,
            router(Style::Lists),
            std::future::pending(),
        ));
        format!("http://{address}")
    }

    #[tokio::test]
    async fn requests_carry_what_the_options_say() {
        let base = httpbin().await;
        let options = [
            "-H",
            "end-user: jason",
            "-A",
            "me",
            "-u",
            "a:b",
            "-b",
            "c=d",
            "-X",
            "PUT",
            "-d",
            "x=1",
        ];
        let (exit, body) = curl(&[&options[..], &[&format!("{base}/anything")]].concat()).await;
        let shown: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((exit, &shown["method"]), (0, &"PUT".into()));
        for (name, value) in [
            ("End-User", "jason"),
            ("User-Agent", "me"),
            ("Cookie", "c=d"),
            ("Authorization", "Basic YTpi"),
        ] {
            assert_eq!(shown["headers"][name][0], value);
        }
        assert_eq!(shown["form"]["x"][0], "1");
        let (exit, body) = curl(&["--http2-prior-knowledge", "-i", &format!("{base}/get")]).await;
        assert!(exit == 0 && body.starts_with("HTTP/2 200"), "{body}");
        let (_, body) = curl(&["--compressed", &format!("{base}/gzip")]).await;
        assert!(body.contains("gzipped"), "{body}");
    }

    #[tokio::test]
    async fn redirects_are_followed_when_asked() {
        let base = httpbin().await;
        assert_eq!(
            curl(&[&format!("{base}/redirect/2")]).await,
            (0, String::new())
        );
        let (exit, body) = curl(&["-L", &format!("{base}/redirect/2")]).await;
        assert!(exit == 0 && body.contains("/get"), "{body}");
        assert_eq!(
            curl(&["-L", "--max-redirs", "1", &format!("{base}/redirect/3")])
                .await
                .0,
            code::REDIRECTS
        );
    }

    #[tokio::test]
    async fn exit_codes_are_those_of_curl() {
        let base = httpbin().await;
        let closed = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let empty = format!("http://{}", silent.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = silent.accept().await {
                drop(stream);
            }
        });
        let short = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let partial = format!("http://{}", short.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = short.accept().await {
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")
                    .await;
                // Time to read the request, so that the end is no reset.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        for (args, expected) in [
            (vec!["http://name.invalid/".to_owned()], code::RESOLVE),
            (vec![format!("http://{closed}/")], code::CONNECT),
            (vec!["-f".into(), format!("{base}/status/404")], code::HTTP),
            (vec![format!("{base}/status/404")], 0),
            (
                vec!["-m".into(), "0.2".into(), format!("{base}/delay/5")],
                code::TIMEOUT,
            ),
            (vec![empty], code::EMPTY),
            (vec![partial], code::PARTIAL),
            (vec!["ftp://127.0.0.1/".into()], 1),
            (vec!["http://".into()], code::URL),
            (
                vec![
                    "--resolve".into(),
                    format!("shop:80:{}", "127.0.0.1"),
                    "--connect-timeout".into(),
                    "2".into(),
                    format!("http://shop:{}/", closed.port()),
                ],
                code::RESOLVE,
            ),
        ] {
            let args: Vec<_> = args.iter().map(String::as_str).collect();
            assert_eq!(curl(&args).await.0, expected, "{args:?}");
        }
    }

    #[tokio::test]
    async fn names_can_be_pinned_and_failures_tried_again() {
        let base = httpbin().await;
        let port = base.rsplit(':').next().unwrap().to_owned();
        let pinned = format!("shop.test:{port}:127.0.0.1");
        let (exit, body) = curl(&[
            "--resolve",
            &pinned,
            &format!("http://shop.test:{port}/get"),
        ])
        .await;
        assert!(exit == 0 && body.contains("shop.test"), "{body}");
        let begun = Instant::now();
        assert_eq!(
            curl(&[
                "-f",
                "--retry",
                "2",
                "--retry-delay",
                "0.1",
                &format!("{base}/status/503")
            ])
            .await
            .0,
            code::HTTP
        );
        assert!(begun.elapsed() >= Duration::from_millis(200), "two pauses");
    }
}
