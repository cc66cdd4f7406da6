//! One HTTP/2 connection to a control plane, in plain text or in TLS: for discovery and for certificates.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};

/// Opens a TCP connection to a resolved address. The proxy passes one that marks its sockets, so that capture lets them through.
pub type Connector = Arc<
    dyn Fn(SocketAddr) -> Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>> + Send + Sync,
>;

/// What a connection needs to be authenticated, both ways.
#[derive(Clone)]
pub struct Credentials {
    /// Whom to trust, and the certificate to present, if any. The server must have the host's name.
    pub tls: Arc<rustls::ClientConfig>,
    /// Sent with each call (`authorization: Bearer …`).
    pub token: Option<String>,
}

/// Gives the credentials for the next connection, or why there are none yet. Asked before each connection, so that what is renewed is used.
pub type CredentialSource = Arc<dyn Fn() -> Result<Credentials, String> + Send + Sync>;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The name can't be resolved.
    #[error("resolving {0}: {1}")]
    Resolve(String, io::Error),
    /// The name has no addresses.
    #[error("resolving {0}: no addresses")]
    NoSuchHost(String),
    /// Nobody answers, or not as it should.
    #[error("connecting to {0}: {1}")]
    Connect(String, String),
    /// The time is over.
    #[error("connecting to {0}: no answer within {1:?}")]
    Timeout(String, Duration),
    /// The credentials are not there.
    #[error("connecting to {0}: {1}")]
    Credentials(String, String),
}

/// A connection, and the value of `authorization` for calls on it.
pub struct Opened {
    /// The connection.
    pub channel: Channel,
    /// `Bearer …`, where the credentials have a token.
    pub authorization: Option<MetadataValue<Ascii>>,
}

impl Opened {
    /// A request that carries the token, if there is one.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(value) = &self.authorization {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        request
    }
}

/// Resolves `address` (`host:port`) and connects to the first of its addresses that answers; in TLS where there are credentials.
///
/// # Errors
/// See [`ChannelError`].
pub async fn open(
    address: &str,
    connector: &Connector,
    credentials: Option<&CredentialSource>,
    limit: Duration,
) -> Result<Opened, ChannelError> {
    let failed = |reason: String| ChannelError::Credentials(address.to_owned(), reason);
    let credentials = credentials
        .map(|source| source())
        .transpose()
        .map_err(failed)?;
    let token = credentials.as_ref().and_then(|c| c.token.as_deref());
    let authorization = token
        .map(|token| format!("Bearer {token}").parse())
        .transpose()
        .map_err(|_| failed("the token is not one line of ASCII text".to_owned()))?;
    let attempt = async {
        let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address)
            .await
            .map_err(|error| ChannelError::Resolve(address.to_owned(), error))?
            .collect();
        let mut last = ChannelError::NoSuchHost(address.to_owned());
        for candidate in resolved {
            match connect(address, candidate, connector, credentials.as_ref()).await {
                Ok(channel) => return Ok(channel),
                Err(error) => {
                    last = ChannelError::Connect(address.to_owned(), describe_chain(&error));
                }
            }
        }
        Err(last)
    };
    let channel = tokio::time::timeout(limit, attempt)
        .await
        .unwrap_or_else(|_| Err(ChannelError::Timeout(address.to_owned(), limit)))?;
    Ok(Opened {
        channel,
        authorization,
    })
}

async fn connect(
    name: &str,
    address: SocketAddr,
    connector: &Connector,
    credentials: Option<&Credentials>,
) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    let connector = Arc::clone(connector);
    let Some(credentials) = credentials else {
        let service = tower::service_fn(move |_: Uri| {
            let connecting = connector(address);
            async move { Ok::<_, io::Error>(TokioIo::new(tcp(connecting).await?)) }
        });
        return endpoint.connect_with_connector(service).await;
    };
    let tls = tokio_rustls::TlsConnector::from(Arc::clone(&credentials.tls));
    let host = name.rsplit_once(':').map_or(name, |(host, _)| host);
    let host = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error));
    let service = tower::service_fn(move |_: Uri| {
        let (connecting, tls) = (connector(address), tls.clone());
        let host = match &host {
            Ok(host) => Ok(host.clone()),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        async move {
            let stream = tls.connect(host?, tcp(connecting).await?).await?;
            if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
                return Err(io::Error::other("the server does not speak HTTP/2"));
            }
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    endpoint.connect_with_connector(service).await
}

async fn tcp(connecting: impl Future<Output = io::Result<TcpStream>>) -> io::Result<TcpStream> {
    let stream = connecting.await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A plain TCP connection, unmarked.
pub(crate) fn plain_connector() -> Connector {
    Arc::new(|address| Box::pin(TcpStream::connect(address)))
}

/// An error with its causes; tonic's own text ("transport error") says nothing.
pub(crate) fn describe_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
