//! The HTTP client of the samples that call others.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

/// Largest answer that is read.
const MAX_BODY: usize = 1 << 20;

/// How long an unused connection is kept. Long enough for keep-alive under load; short enough that without a mesh each
/// page somebody opens by hand is a new connection, and so a new pick by the service address.
const IDLE: Duration = Duration::from_secs(1);

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The URL that host and port give is none.
    #[error("{url:?} is not a URL: {source}")]
    Url {
        /// The text in question.
        url: String,
        /// What is wrong with it.
        source: http::Error,
    },
    /// No complete answer in time.
    #[error("no answer from {url} within {timeout:?}")]
    Timeout {
        /// Where the request went.
        url: String,
        /// The time allowed.
        timeout: Duration,
    },
    /// Name resolution, connection or protocol failed.
    #[error("calling {url}: {message}")]
    Failed {
        /// Where the request went.
        url: String,
        /// The chain of causes.
        message: String,
    },
}

/// A client that keeps connections for a moment; cheap to clone.
#[derive(Clone)]
pub struct Upstream {
    client: Client<HttpConnector, Empty<Bytes>>,
}

impl Default for Upstream {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        Self { client }
    }
}

impl Upstream {
    /// GETs `url` with `headers`; the whole answer must be there within `timeout`.
    ///
    /// # Errors
    /// Every case in which there is no complete answer. An HTTP error status is an answer.
    pub async fn get(
        &self,
        url: &str,
        headers: &HeaderMap,
        timeout: Duration,
    ) -> Result<(StatusCode, Bytes), UpstreamError> {
        let request = request(url, headers)?;
        match tokio::time::timeout(timeout, self.exchange(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(message)) => Err(UpstreamError::Failed {
                url: url.into(),
                message,
            }),
            Err(_) => Err(UpstreamError::Timeout {
                url: url.into(),
                timeout,
            }),
        }
    }

    async fn exchange(
        &self,
        request: Request<Empty<Bytes>>,
    ) -> Result<(StatusCode, Bytes), String> {
        let response = self
            .client
            .request(request)
            .await
            .map_err(|error| causes(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY)
            .collect()
            .await
            .map_err(|error| causes(error.as_ref()))?;
        Ok((status, body.to_bytes()))
    }
}

fn request(url: &str, headers: &HeaderMap) -> Result<Request<Empty<Bytes>>, UpstreamError> {
    let invalid = |source| UpstreamError::Url {
        url: url.into(),
        source,
    };
    let uri: Uri = url
        .parse()
        .map_err(|error: http::uri::InvalidUri| invalid(error.into()))?;
    let mut request = Request::get(uri).body(Empty::new()).map_err(invalid)?;
    *request.headers_mut() = headers.clone();
    Ok(request)
}

/// An error with all its causes in one line; the outermost alone says as little as "client error (Connect)".
pub(crate) fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
