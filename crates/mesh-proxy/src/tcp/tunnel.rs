//! Tunnels that TCP connections go in: a CONNECT (RFC 9110 section 9.3.6, RFC 9113 section 8.5), or a POST whose body is what the client
//! sends and whose answer is what it gets. As in Envoy's TCP proxy with `tunneling_config` nothing of the client's is sent before the other side has
//! agreed: with any 2xx in HTTP/1.1, with 200 in HTTP/2.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use bytes::{Buf, Bytes};
use http::header::HOST;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body::Body;
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use mesh_routing::cluster::Cluster;
use mesh_routing::format::Facts;
use mesh_routing::tcp::Tunnel;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::body::{Inlet, RequestBody};
use crate::listener::Downstream;
use crate::pool::{ConnectError, EarlyAnswer, Host, Lease, Sent, Version};
use crate::report::principals::Principals;
use crate::tls::connect::Wish;
use crate::tls::wire::Wire;
use crate::upstream::ConnectOutcome as Outcome;

/// Times that the request is written on another connection since the one before was closed while it was unused.
const MOST_STALE: u32 = 3;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(super) enum TunnelError {
    /// No connection to who opens it.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// What is known of the connection makes no address.
    #[error("the tunnel's hostname does not come to HOST:PORT for this connection")]
    Target,
    /// The other side does not agree.
    #[error("the tunnel's server answered {0}")]
    Refused(StatusCode),
    /// There was no answer.
    #[error("the tunnel's server gave no answer: {0}")]
    Lost(#[from] hyper::Error),
    /// There was none in time.
    #[error("the tunnel's server gave no answer within the idle timeout")]
    Timeout,
}

/// An open tunnel.
pub(super) struct Opened {
    /// Its other side.
    pub(super) far: Far,
    /// What that has sent already.
    pub(super) early: Bytes,
    /// What both sides of the connection to it have proved, in mutual TLS.
    pub(super) principals: Option<Arc<Principals>>,
    _lease: Lease,
}

/// The other side of a tunnel, by what carries it.
pub(super) enum Far {
    /// A connection of its own.
    Wire(Wire),
    /// A stream of HTTP/2.
    Stream(TokioIo<Upgraded>),
    /// The bodies of a POST and of its answer.
    Bodies(Bodies),
}

/// A connection that wants a tunnel.
pub(super) struct Asking<'a> {
    pub(super) connection: &'a Downstream,
    /// The name that the client asked for, empty where there is none.
    pub(super) server_name: &'a str,
    pub(super) tunnel: &'a Tunnel,
    pub(super) wish: &'a Wish,
    /// How long it may take.
    pub(super) patience: Option<Duration>,
}

impl Asking<'_> {
    /// Opens the tunnel through an endpoint.
    pub(super) async fn open(
        &self,
        host: &Rc<Host>,
        cluster: &Cluster,
    ) -> Result<Opened, TunnelError> {
        let asking = self.ask(host, cluster);
        let opened = match self.patience {
            Some(limit) => tokio::time::timeout(limit, asking)
                .await
                .unwrap_or(Err(TunnelError::Timeout)),
            None => asking.await,
        };
        // To Envoy an endpoint that opens no tunnel is one that can't be connected; what became of the connection itself is known already.
        match &opened {
            Err(TunnelError::Refused(_) | TunnelError::Lost(_)) => {
                host.observe_connect(Outcome::Failed);
            }
            Err(TunnelError::Timeout) => host.observe_connect(Outcome::TimedOut),
            Err(TunnelError::Connect(_) | TunnelError::Target) | Ok(_) => {}
        }
        opened
    }

    async fn ask(&self, host: &Rc<Host>, cluster: &Cluster) -> Result<Opened, TunnelError> {
        let shared = &self.connection.worker.shared;
        let facts = Facts {
            remote: Some(self.connection.remote),
            local: Some(self.connection.destination),
            upstream_host: Some(host.address),
            upstream_cluster: &cluster.config.name,
            server_name: self.server_name,
            tls: self.connection.tls.as_deref(),
            hostname: &shared.identity.hostname,
            started: Some(SystemTime::now()),
            ..Facts::default()
        };
        let target = self.tunnel.target(&facts).ok_or(TunnelError::Target)?;
        let version = match cluster.config.tunnels_in_http2 {
            true => Version::Http2,
            false => Version::Http1,
        };
        let secure = host.transport().tls.is_some();
        let headers = self.tunnel.headers(&facts);
        let head = self.head(&target, headers, version, secure);
        let (body, inlet) = match &self.tunnel.post {
            Some(_) => {
                let (body, inlet) = RequestBody::piped();
                (body, Some(inlet))
            }
            None => (RequestBody::empty(Rc::default()), None),
        };
        let mut request = Request::from_parts(head, body);
        for _ in 0..MOST_STALE {
            let how = (version, self.wish);
            let mut lease = host.lease_for(shared, &cluster.config, how, true).await?;
            match lease.send(request).await {
                Some(Sent::Response(response)) => {
                    return agreed(response, lease, version, inlet).await;
                }
                // A shared connection has ended meanwhile; nothing was sent on it.
                Some(Sent::Unsent(unsent, error)) => {
                    tracing::debug!(endpoint = %host.address, %error, "tunnel not asked for");
                    request = *unsent;
                }
                Some(Sent::Lost(error)) => return Err(error.into()),
                None => break,
            }
        }
        Err(ConnectError::Io(io::ErrorKind::NotConnected.into()).into())
    }

    fn head(
        &self,
        target: &Authority,
        headers: HeaderMap,
        version: Version,
        secure: bool,
    ) -> http::request::Parts {
        let (mut head, ()) = Request::new(()).into_parts();
        head.headers = headers;
        let post = self.tunnel.post.as_ref();
        head.method = match post {
            Some(_) => Method::POST,
            None => Method::CONNECT,
        };
        head.uri = uri(target, post, version, secure);
        head.version = match version {
            Version::Http1 => http::Version::HTTP_11,
            Version::Http2 => http::Version::HTTP_2,
        };
        if version == Version::Http1
            && let Ok(host) = HeaderValue::from_str(target.as_str())
        {
            head.headers.insert(HOST, host);
        }
        head
    }
}

/// In HTTP/1.1 the authority for CONNECT, the path for POST; in HTTP/2 the authority in both, and what a POST needs besides.
fn uri(target: &Authority, post: Option<&PathAndQuery>, version: Version, secure: bool) -> Uri {
    let mut parts = http::uri::Parts::default();
    if version == Version::Http2 || post.is_none() {
        parts.authority = Some(target.clone());
    }
    parts.path_and_query = post.cloned();
    if version == Version::Http2 && post.is_some() {
        parts.scheme = Some(match secure {
            true => Scheme::HTTPS,
            false => Scheme::HTTP,
        });
    }
    // These parts always make one.
    Uri::from_parts(parts).unwrap_or_default()
}

/// The tunnel, if the answer agrees to it.
async fn agreed(
    mut response: Response<Incoming>,
    lease: Lease,
    version: Version,
    inlet: Option<Inlet>,
) -> Result<Opened, TunnelError> {
    let status = response.status();
    let agrees = match version {
        Version::Http1 => status.is_success(),
        Version::Http2 => status == StatusCode::OK,
    };
    // The answer's body is the way back: one that is over is no way.
    let is_over = inlet.is_some() && response.body().is_end_stream();
    if !agrees || is_over {
        return Err(TunnelError::Refused(status));
    }
    let (far, early) = match inlet {
        Some(inlet) => (
            Far::Bodies(Bodies {
                inlet,
                answer: response.into_body(),
                rest: Bytes::new(),
            }),
            Bytes::new(),
        ),
        None => match hyper::upgrade::on(&mut response)
            .await?
            .downcast::<TokioIo<EarlyAnswer<Wire>>>()
        {
            // The connection itself, so that its bytes can be spliced.
            Ok(parts) => {
                let wire = parts.io.into_inner().into_inner();
                (Far::Wire(wire), parts.read_buf)
            }
            Err(stream) => (Far::Stream(TokioIo::new(stream)), Bytes::new()),
        },
    };
    lease.host().observe_tunnel();
    Ok(Opened {
        far,
        early,
        principals: lease.principals(),
        _lease: lease,
    })
}

/// A POST's body and its answer's as one connection.
pub(super) struct Bodies {
    inlet: Inlet,
    answer: Incoming,
    rest: Bytes,
}

impl AsyncRead for Bodies {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.answer).poll_frame(cx)) {
                // Trailers end a body, and are nothing that a connection could carry.
                Some(Ok(frame)) => self.rest = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let n = self.rest.len().min(buf.remaining());
        buf.put_slice(self.rest.get(..n).unwrap_or_default());
        self.rest.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bodies {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.inlet.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inlet.end();
        Poll::Ready(Ok(()))
    }
}
