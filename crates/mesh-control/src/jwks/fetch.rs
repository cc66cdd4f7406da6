//! One fetch: only from where nobody inside is, never more than a few redirects, never a large answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use http::header::{ACCEPT, HOST, LOCATION, USER_AGENT};
use http::uri::Scheme;
use http::{Request, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use mesh_model::KeySource;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::Range;
use super::range::behind_nat64;

/// Largest answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;
const MAX_REDIRECTS: usize = 3;
const DISCOVERY: &str = "/.well-known/openid-configuration";
/// Addresses under which clouds tell machines their secrets, beside the link-local one.
const METADATA: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// Why keys could not be fetched.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("it took too long")]
    Slow,
    #[error("{0:?} is not an address with http:// or https:// and a host")]
    Address(String),
    #[error("{host} has no address: {source}")]
    Resolve {
        host: String,
        source: std::io::Error,
    },
    #[error(
        "{host} is at {address}, which is a loopback, link-local, multicast, metadata or blocked address: keys are never fetched from there"
    )]
    Blocked { host: String, address: IpAddr },
    #[error("connecting to {host}: {source}")]
    Connect {
        host: String,
        source: std::io::Error,
    },
    #[error("asking {host}: {reason}")]
    Ask { host: String, reason: String },
    #[error("{host} answers {status}")]
    Status { host: String, status: u16 },
    #[error("more than {MAX_REDIRECTS} redirects, or one from https to http")]
    Redirects,
    #[error("the answer of {host} is {what}")]
    Answer { host: String, what: &'static str },
}

/// Fetches keys; clones share what it trusts.
#[derive(Clone)]
pub(crate) struct Fetcher {
    tls: Arc<rustls::ClientConfig>,
    /// Whether an address may be asked.
    allowed: fn(IpAddr) -> bool,
    /// Ranges that may not be asked, whatever else holds.
    blocked: Arc<[Range]>,
}

impl Fetcher {
    /// Trusts what the machine trusts, and where that is nothing, Mozilla's roots.
    pub(crate) fn new(blocked: &[Range]) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(native.certs);
        if roots.is_empty() {
            roots.add_parsable_certificates(
                webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().cloned(),
            );
        }
        Self {
            tls: Arc::new(
                rustls::ClientConfig::builder()
                    .with_root_certificates(roots)
                    .with_no_client_auth(),
            ),
            allowed: is_public,
            blocked: blocked.into(),
        }
    }

    /// The key set (JSON) of a source.
    ///
    /// # Errors
    /// When it can't be had, or has no key.
    pub(super) async fn keys(&self, source: &KeySource) -> Result<String, FetchError> {
        let uri = match source {
            KeySource::Jwks(uri) => uri.clone(),
            KeySource::Discovery(issuer) => self.discover(issuer).await?,
        };
        let (host, body) = self.get(&uri).await?;
        let keys = std::str::from_utf8(&body).ok();
        let set: Option<Value> = keys.and_then(|text| serde_json::from_str(text).ok());
        let has_keys = set
            .as_ref()
            .and_then(|set| set.get("keys")?.as_array())
            .is_some_and(|keys| !keys.is_empty());
        match keys {
            Some(keys) if has_keys => Ok(keys.to_owned()),
            _ => Err(FetchError::Answer {
                host,
                what: "not a JSON Web Key Set with at least one key",
            }),
        }
    }

    /// Where an issuer says that its keys are.
    async fn discover(&self, issuer: &str) -> Result<String, FetchError> {
        let uri = format!("{}{DISCOVERY}", issuer.trim_end_matches('/'));
        let (host, body) = self.get(&uri).await?;
        let document: Option<Value> = serde_json::from_slice(&body).ok();
        document
            .and_then(|document| Some(document.get("jwks_uri")?.as_str()?.to_owned()))
            .ok_or(FetchError::Answer {
                host,
                what: "not an OpenID configuration with jwks_uri",
            })
    }

    /// The answer to a GET, with the host that gave it.
    async fn get(&self, uri: &str) -> Result<(String, Bytes), FetchError> {
        let bad = || FetchError::Address(uri.to_owned());
        let mut uri: Uri = uri.parse().map_err(|_| bad())?;
        for _ in 0..=MAX_REDIRECTS {
            match self.get_once(&uri).await? {
                Answer::Body(host, body) => return Ok((host, body)),
                Answer::Redirect(next) => {
                    let downgrade = uri.scheme() == Some(&Scheme::HTTPS)
                        && next.scheme() == Some(&Scheme::HTTP);
                    if downgrade {
                        return Err(FetchError::Redirects);
                    }
                    uri = next;
                }
            }
        }
        Err(FetchError::Redirects)
    }

    async fn get_once(&self, uri: &Uri) -> Result<Answer, FetchError> {
        let bad = || FetchError::Address(uri.to_string());
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad()),
        };
        let host = uri
            .host()
            .filter(|host| !host.is_empty())
            .ok_or_else(bad)?
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let stream = self.connect(&host, port).await?;
        if secure {
            let name = ServerName::try_from(host.clone()).map_err(|_| bad())?;
            let connector = TlsConnector::from(Arc::clone(&self.tls));
            let stream =
                connector
                    .connect(name, stream)
                    .await
                    .map_err(|source| FetchError::Connect {
                        host: host.clone(),
                        source,
                    })?;
            ask(stream, uri, host).await
        } else {
            ask(stream, uri, host).await
        }
    }

    fn may_ask(&self, address: IpAddr) -> bool {
        (self.allowed)(address) && !self.blocked.iter().any(|range| range.contains(address))
    }

    /// Connects to the first address that answers, among those that may be asked: looked up once, so that what was checked is what is used.
    async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, FetchError> {
        let unresolved = |source| FetchError::Resolve {
            host: host.to_owned(),
            source,
        };
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port))
            .await
            .map_err(unresolved)?
            .collect();
        if let Some(blocked) = addresses.iter().find(|address| !self.may_ask(address.ip())) {
            return Err(FetchError::Blocked {
                host: host.to_owned(),
                address: blocked.ip(),
            });
        }
        TcpStream::connect(addresses.as_slice())
            .await
            .map_err(|source| FetchError::Connect {
                host: host.to_owned(),
                source,
            })
    }
}

enum Answer {
    Body(String, Bytes),
    Redirect(Uri),
}

async fn ask<S>(stream: S, uri: &Uri, host: String) -> Result<Answer, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |reason: String| FetchError::Ask {
        host: host.clone(),
        reason,
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(error.to_string()))?;
    let driver = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let request = Request::get(path)
        .header(HOST, authority)
        .header(ACCEPT, "application/json")
        .header(USER_AGENT, "istiod")
        .body(Empty::<Bytes>::new())
        .map_err(|error| failed(error.to_string()))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|error| failed(error.to_string()))?;
    let status = response.status();
    if status.is_redirection() {
        let location = response
            .headers()
            .get(LOCATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| text.parse::<Uri>().ok())
            .filter(|next| next.host().is_some());
        driver.abort();
        return location.map(Answer::Redirect).ok_or(FetchError::Answer {
            host,
            what: "a redirect without an absolute address",
        });
    }
    if !status.is_success() {
        driver.abort();
        return Err(FetchError::Status {
            host,
            status: status.as_u16(),
        });
    }
    let body = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await;
    driver.abort();
    match body {
        Ok(body) => Ok(Answer::Body(host, body.to_bytes())),
        Err(error) => Err(failed(error.to_string())),
    }
}

/// False for addresses behind which only this machine, its link, or its cloud can be.
fn is_public(address: IpAddr) -> bool {
    if METADATA.contains(&address) {
        return false;
    }
    if let Some(inner) = behind_nat64(address) {
        return is_public(inner.into());
    }
    match address.to_canonical() {
        IpAddr::V4(address) => {
            !(address.is_loopback()
                || address.is_link_local()
                || address.is_unspecified()
                || address.is_multicast()
                || address.is_broadcast()
                || METADATA.contains(&IpAddr::V4(address)))
        }
        IpAddr::V6(address) => {
            !(address.is_loopback()
                || address.is_unicast_link_local()
                || address.is_unspecified()
                || address.is_multicast())
        }
    }
}

/// Servers of tests, and a fetcher that asks them.
#[cfg(test)]
pub(super) mod fake {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::Fetcher;

    /// Answers every connection with the same text.
    pub(in crate::jwks) async fn server(answer: String) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut buffer = [0; 4096];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        address
    }

    pub(in crate::jwks) fn ok(body: &str) -> String {
        format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    }

    pub(in crate::jwks) fn everywhere() -> Fetcher {
        Fetcher {
            allowed: |_| true,
            ..Fetcher::new(&[])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::{everywhere, ok, server};
    use super::*;

    const KEYS: &str = r#"{"keys":[{"kty":"EC"}]}"#;

    #[tokio::test]
    async fn keys_are_fetched_directly_or_by_the_issuers_document() {
        let keys = server(ok(KEYS)).await;
        let direct = KeySource::Jwks(format!("http://{keys}/keys"));
        assert_eq!(everywhere().keys(&direct).await.expect("keys"), KEYS);
        let document = server(ok(&format!(r#"{{"jwks_uri":"http://{keys}/"}}"#))).await;
        let discovered = KeySource::Discovery(format!("http://{document}"));
        assert_eq!(everywhere().keys(&discovered).await.expect("keys"), KEYS);
    }

    #[tokio::test]
    async fn nothing_inside_is_asked_not_even_by_a_redirect() {
        let inside = server(ok(KEYS)).await;
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
            let source = KeySource::Jwks(format!("http://{host}:{}/", inside.port()));
            let error = Fetcher::new(&[]).keys(&source).await.expect_err("blocked");
            assert!(matches!(error, FetchError::Blocked { .. }), "{error}");
        }
        for address in [
            "169.254.169.254",
            "fd00:ec2::254",
            "fe80::1",
            "0.0.0.0",
            "::",
            "64:ff9b::169.254.169.254",
            "64:ff9b::127.0.0.1",
            "64:ff9b::100.100.100.200",
            "64:ff9b::",
        ] {
            assert!(
                !is_public(address.parse().expect("an address")),
                "{address}"
            );
        }
        for address in [
            "10.96.0.10",
            "93.184.216.34",
            "2606:2800::1",
            "64:ff9b::93.184.216.34",
        ] {
            assert!(is_public(address.parse().expect("an address")), "{address}");
        }
        let target = format!("http://{inside}/");
        let redirect =
            format!("HTTP/1.1 302 Found\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n");
        let redirecting = server(redirect).await;
        let source = KeySource::Jwks(format!("http://{redirecting}/"));
        assert_eq!(everywhere().keys(&source).await.expect("followed"), KEYS);
        let blocked = Fetcher {
            allowed: |_| true,
            ..Fetcher::new(&["127.0.0.0/8".parse().expect("a range")])
        };
        let error = blocked.keys(&source).await.expect_err("blocked");
        assert!(matches!(error, FetchError::Blocked { .. }), "{error}");
    }

    #[tokio::test]
    async fn odd_answers_are_no_keys() {
        let loops = "HTTP/1.1 302 Found\r\nlocation: /again\r\ncontent-length: 0\r\n\r\n";
        for (answer, what) in [
            (ok(r#"{"keys":[]}"#), "at least one key"),
            (ok("<html>"), "at least one key"),
            (ok(&"x".repeat(MAX_ANSWER + 1)), "limit"),
            (
                "HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n".to_owned(),
                "500",
            ),
            (loops.to_owned(), "redirect"),
        ] {
            let address = server(answer).await;
            let source = KeySource::Jwks(format!("http://{address}/"));
            let error = everywhere().keys(&source).await.expect_err(what);
            assert!(error.to_string().contains(what), "{what}: {error}");
        }
        for uri in ["ftp://x/", "x", "http://"] {
            let error = everywhere().keys(&KeySource::Jwks(uri.to_owned())).await;
            assert!(matches!(error, Err(FetchError::Address(_))), "{uri}");
        }
    }
}
