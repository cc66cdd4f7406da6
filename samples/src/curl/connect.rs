//! From a URL to a connection.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use bytes::Bytes;
use http::{Request, Response, Uri, Version};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::args::{Family, Http, Options};
use super::{Facts, Failure, code, origin_form, tls};

/// Where a request goes.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) uri: Uri,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) secure: bool,
}

impl Target {
    /// Understands a URL as people type it: without a scheme it is plain HTTP.
    pub(super) fn parse(url: &str, options: &Options) -> Result<Self, Failure> {
        let text = if url.contains("://") {
            url.to_owned()
        } else {
            format!("http://{url}")
        };
        let malformed = || Failure::new(code::URL, format!("URL rejected: {url:?} is malformed"));
        let text = text.split('#').next().unwrap_or_default();
        let (scheme, rest) = text.split_once("://").ok_or_else(malformed)?;
        let secure = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            other => {
                return Err(Failure::new(
                    1,
                    format!("Protocol \"{other}\" not supported"),
                ));
            }
        };
        let (authority, path) = match rest.find(['/', '?']) {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        };
        let path = if path.starts_with('?') {
            format!("/{path}")
        } else {
            path.to_owned()
        };
        let path = if options.path_as_is {
            path
        } else {
            without_dots(&path)
        };
        let scheme = if secure { "https" } else { "http" };
        let uri: Uri = format!("{scheme}://{authority}{}", path.replace(' ', "%20"))
            .parse()
            .map_err(|_| malformed())?;
        let host = uri
            .host()
            .filter(|host| !host.is_empty())
            .ok_or_else(malformed)?
            .trim_matches(['[', ']'])
            .to_owned();
        // The URI type leaves out a port that is no number in range.
        let tail = authority.rsplit(['@', ']']).next().unwrap_or_default();
        if let Some((_, port)) = tail.split_once(':')
            && !port.is_empty()
            && port.parse::<u16>().is_err()
        {
            return Err(malformed());
        }
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Ok(Self {
            host,
            port,
            secure,
            uri,
        })
    }

    /// The target that a Location header names (RFC 3986 section 5, the forms that servers send).
    pub(super) fn join(&self, location: &str, options: &Options) -> Result<Self, Failure> {
        let scheme = if self.secure { "https" } else { "http" };
        let url = if location.contains("://") {
            location.to_owned()
        } else if let Some(rest) = location.strip_prefix("//") {
            format!("{scheme}://{rest}")
        } else if location.starts_with('/') {
            format!("{scheme}://{}{location}", self.authority())
        } else {
            let folder = self
                .uri
                .path()
                .rsplit_once('/')
                .map_or("", |(folder, _)| folder);
            format!("{scheme}://{}{folder}/{location}", self.authority())
        };
        Self::parse(&url, options)
    }

    /// Host and port as the Host header has them: without user, without a usual port.
    pub(super) fn authority(&self) -> String {
        let host = if self.host.contains(':') {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        };
        match self
            .uri
            .port_u16()
            .filter(|port| *port != if self.secure { 443 } else { 80 })
        {
            Some(port) => format!("{host}:{port}"),
            None => host,
        }
    }
}

/// A path without its `.` and `..` segments (RFC 3986 section 5.2.4).
fn without_dots(path_and_query: &str) -> String {
    let (path, query) = match path_and_query.find('?') {
        Some(at) => path_and_query.split_at(at),
        None => (path_and_query, ""),
    };
    let mut kept: Vec<&str> = Vec::new();
    let segments: Vec<_> = path.trim_start_matches('/').split('/').collect();
    let leading = path.len() - path.trim_start_matches('/').len();
    for (index, segment) in segments.iter().enumerate() {
        let is_last = index + 1 == segments.len();
        match *segment {
            "." | ".." => {
                if *segment == ".." {
                    kept.pop();
                }
                if is_last {
                    kept.push("");
                }
            }
            segment => kept.push(segment),
        }
    }
    format!("{}{}{query}", "/".repeat(leading.max(1)), kept.join("/"))
}

enum Sender {
    One(http1::SendRequest<Full<Bytes>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

/// An open connection to one host.
pub(super) struct Connection {
    sender: Sender,
    host: String,
    port: u16,
    secure: bool,
    version: Version,
    pub(super) remote: SocketAddr,
    pub(super) local: Option<SocketAddr>,
}

impl Connection {
    pub(super) fn leads_to(&self, target: &Target) -> bool {
        (&self.host, self.port, self.secure) == (&target.host, target.port, target.secure)
    }

    pub(super) async fn is_ready(&mut self) -> bool {
        match &mut self.sender {
            Sender::One(sender) => sender.ready().await.is_ok(),
            Sender::Two(sender) => sender.ready().await.is_ok(),
        }
    }

    pub(super) async fn send(
        &mut self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Failure> {
        *request.version_mut() = self.version;
        let result = match &mut self.sender {
            Sender::One(sender) => {
                *request.uri_mut() = origin_form(request.uri());
                sender.send_request(request).await
            }
            Sender::Two(sender) => {
                request.headers_mut().remove(http::header::HOST);
                sender.send_request(request).await
            }
        };
        result.map_err(|error| failed(&error))
    }
}

/// curl's view of an exchange that brought no response.
fn failed(error: &hyper::Error) -> Failure {
    let causes = crate::upstream::causes(error);
    if error.is_incomplete_message() || causes.contains("connection closed") {
        Failure::new(code::EMPTY, "Empty reply from server")
    } else if error.is_parse() {
        Failure::new(8, format!("Weird server reply: {causes}"))
    } else {
        Failure::new(code::RECEIVE, format!("Recv failure: {causes}"))
    }
}

/// Opens a connection to `target`, noting times and addresses.
pub(super) async fn open(
    options: &Options,
    target: &Target,
    facts: &mut Facts,
    started: Instant,
) -> Result<Connection, Failure> {
    let opening = open_within(options, target, facts, started);
    match tokio::time::timeout(options.connect_timeout, opening).await {
        Ok(result) => result,
        Err(_) => {
            let milliseconds = options.connect_timeout.as_millis();
            Err(Failure::new(
                code::TIMEOUT,
                format!("Connection timed out after {milliseconds} milliseconds"),
            ))
        }
    }
}

async fn open_within(
    options: &Options,
    target: &Target,
    facts: &mut Facts,
    started: Instant,
) -> Result<Connection, Failure> {
    let addresses = resolve(options, target).await?;
    facts.resolved = started.elapsed();
    let stream = connect(&addresses, target, started).await?;
    facts.connected = started.elapsed();
    facts.connects += 1;
    let remote = stream
        .peer_addr()
        .map_err(|error| Failure::new(code::CONNECT, error.to_string()))?;
    let local = stream.local_addr().ok();
    facts.remote = Some(remote);
    facts.local = local;
    if options.verbose {
        eprintln!(
            "* Connected to {} ({}) port {}",
            target.host,
            remote.ip(),
            remote.port()
        );
    }
    let (sender, version) = if target.secure {
        let (stream, is_two) = tls::secure(options, target, stream).await?;
        facts.secured = started.elapsed();
        handshake(stream, is_two, options).await?
    } else {
        handshake(stream, options.http == Http::Two, options).await?
    };
    Ok(Connection {
        sender,
        version,
        host: target.host.clone(),
        port: target.port,
        secure: target.secure,
        remote,
        local,
    })
}

async fn handshake<S>(
    stream: S,
    is_two: bool,
    options: &Options,
) -> Result<(Sender, Version), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(stream);
    // The connection's own errors come back with the request that meets them.
    if is_two {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io)
            .await
            .map_err(|error| Failure::new(16, error.to_string()))?;
        tokio::spawn(async move { drop(connection.await) });
        Ok((Sender::Two(sender), Version::HTTP_2))
    } else {
        let (sender, connection) = http1::Builder::new()
            .title_case_headers(false)
            .handshake(io)
            .await
            .map_err(|error| failed(&error))?;
        tokio::spawn(async move { drop(connection.await) });
        let version = if options.http == Http::OneZero {
            Version::HTTP_10
        } else {
            Version::HTTP_11
        };
        Ok((Sender::One(sender), version))
    }
}

/// The addresses to try: those of `--resolve`, else the resolver's.
async fn resolve(options: &Options, target: &Target) -> Result<Vec<SocketAddr>, Failure> {
    let (mut host, mut port) = (target.host.clone(), target.port);
    let fits = |wanted: &str, wanted_port: &Option<u16>| {
        (wanted.is_empty() || wanted.eq_ignore_ascii_case(&target.host))
            && wanted_port.is_none_or(|port| port == target.port)
    };
    if let Some((_, _, to, to_port)) = options
        .connect_to
        .iter()
        .find(|(wanted, wanted_port, ..)| fits(wanted, wanted_port))
    {
        host = if to.is_empty() { host } else { to.clone() };
        port = to_port.unwrap_or(port);
    }
    let pinned = options.resolve.iter().find(|(wanted, wanted_port, _)| {
        (wanted == "*" || wanted.eq_ignore_ascii_case(&host)) && *wanted_port == port
    });
    let mut addresses: Vec<SocketAddr> = match pinned {
        Some((_, _, addresses)) => addresses
            .iter()
            .map(|address| SocketAddr::new(*address, port))
            .collect(),
        None => match host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) => {
                let looked_up = tokio::net::lookup_host((host.as_str(), port)).await;
                looked_up.map(Iterator::collect).unwrap_or_default()
            }
        },
    };
    addresses.retain(|address| match options.family {
        None => true,
        Some(Family::V4) => address.is_ipv4(),
        Some(Family::V6) => address.is_ipv6(),
    });
    if addresses.is_empty() {
        return Err(Failure::new(
            code::RESOLVE,
            format!("Could not resolve host: {host}"),
        ));
    }
    Ok(addresses)
}

async fn connect(
    addresses: &[SocketAddr],
    target: &Target,
    started: Instant,
) -> Result<TcpStream, Failure> {
    let mut last = String::from("no address");
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                // Best effort: without it small requests may only wait a little.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Err(error) => last = error.to_string(),
        }
    }
    let milliseconds = started.elapsed().as_millis();
    let message = format!(
        "Failed to connect to {} port {} after {milliseconds} ms: {last}",
        target.host, target.port
    );
    Err(Failure::new(code::CONNECT, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> Target {
        Target::parse(url, &Options::default()).unwrap()
    }

    #[test]
    fn urls_are_understood_as_typed() {
        for (url, host, port, authority, path) in [
            (
                "reviews:9080/reviews/0",
                "reviews",
                9080,
                "reviews:9080",
                "/reviews/0",
            ),
            ("HTTP://a", "a", 80, "a", "/"),
            ("https://a:443?x=1#part", "a", 443, "a", "/?x=1"),
            ("http://[::1]:8080/a b", "::1", 8080, "[::1]:8080", "/a%20b"),
            ("http://u:p@a/", "a", 80, "a", "/"),
        ] {
            let target = target(url);
            assert_eq!((target.host.as_str(), target.port), (host, port), "{url}");
            assert_eq!(target.authority(), authority, "{url}");
            assert_eq!(target.uri.path_and_query().unwrap().as_str(), path, "{url}");
        }
        for (url, expected) in [
            ("ftp://a", 1),
            ("http://", code::URL),
            ("http://a:99999/", code::URL),
            ("http://[/", code::URL),
        ] {
            assert_eq!(
                Target::parse(url, &Options::default()).unwrap_err().code,
                expected,
                "{url}"
            );
        }
    }

    #[test]
    fn dots_go_unless_the_path_is_wanted_as_it_is() {
        for (path, expected) in [
            ("/a/../b", "/b"),
            ("/a/./b/..", "/a/"),
            ("/../x?q=/../y", "/x?q=/../y"),
            ("//admin", "//admin"),
            ("/a//b", "/a//b"),
        ] {
            assert_eq!(without_dots(path), expected, "{path}");
        }
        let options = Options {
            path_as_is: true,
            ..Options::default()
        };
        assert_eq!(
            Target::parse("http://a/b/../c", &options)
                .unwrap()
                .uri
                .path(),
            "/b/../c"
        );
    }

    #[test]
    fn locations_are_joined() {
        let base = target("http://a:81/x/y?q");
        for (location, expected) in [
            ("/z", "http://a:81/z"),
            ("z", "http://a:81/x/z"),
            ("//b/z", "http://b/z"),
            ("https://c/", "https://c/"),
        ] {
            assert_eq!(
                base.join(location, &Options::default()).unwrap().uri,
                expected,
                "{location}"
            );
        }
    }
}
