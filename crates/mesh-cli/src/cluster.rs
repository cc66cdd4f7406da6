//! A Kubernetes API, with raw requests and kubectl's words for its errors.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::{AsyncBufRead, AsyncReadExt as _};
use kube::Client;
use serde_json::Value;
use tokio::time::Instant;

use crate::out::Out;

/// A cluster to talk to.
pub(crate) struct Cluster {
    pub(crate) client: Client,
    /// Namespace of objects that don't say their own.
    pub(crate) namespace: String,
    /// Address of the API, for messages.
    pub(crate) server: String,
    /// It answered once: from then on, a server that is busy or away for a moment is waited for.
    answered: AtomicBool,
}

/// Longest wait for a server that is busy or away.
const PATIENCE: Duration = Duration::from_secs(30);
/// First and longest pause before it is asked again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(4));

/// Lists as a server prints them.
pub(crate) const AS_TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

impl Cluster {
    pub(crate) fn new(client: Client, namespace: String, server: String) -> Self {
        Self {
            client,
            namespace,
            server,
            answered: AtomicBool::new(false),
        }
    }

    /// GET of a path, as JSON.
    pub(crate) async fn read(&self, path: &str) -> anyhow::Result<Value> {
        self.request("GET", path, &[], Vec::new()).await
    }

    /// GET of a path; `None` if there is no such object.
    pub(crate) async fn read_optional(&self, path: &str) -> anyhow::Result<Option<Value>> {
        match self.send("GET", path, &[], Vec::new()).await {
            Ok(value) => Ok(Some(value)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(self.words(error)),
        }
    }

    /// DELETE of a path; false if there is no such object (any more).
    pub(crate) async fn delete_optional(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> anyhow::Result<bool> {
        match self.send("DELETE", path, headers, body).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(self.words(error)),
        }
    }

    /// A request with an object; false if there is one of this name already, or another one by now.
    pub(crate) async fn unless_conflict(
        &self,
        method: &str,
        path: &str,
        object: &Value,
    ) -> anyhow::Result<bool> {
        let headers = [("content-type", "application/json")];
        let body = serde_json::to_vec(object)?;
        match self.send(method, path, &headers, body).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(self.words(error)),
        }
    }

    /// Any request with an answer in JSON.
    pub(crate) async fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> anyhow::Result<Value> {
        self.send(method, path, headers, body)
            .await
            .map_err(|error| self.words(error))
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Result<Value, kube::Error> {
        let end = Instant::now() + PATIENCE;
        let mut pause = PAUSES.0;
        loop {
            let request = build(method, path, headers, body.clone())?;
            let result = self.client.request(request).await;
            match &result {
                Ok(_) => self.answered.store(true, Ordering::Relaxed),
                Err(error)
                    if self.answered.load(Ordering::Relaxed)
                        && passes(error, path)
                        && Instant::now() + pause < end =>
                {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                    continue;
                }
                Err(_) => {}
            }
            return result;
        }
    }

    /// GET of a path, as lines that arrive over time.
    pub(crate) async fn stream(
        &self,
        path: &str,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<impl AsyncBufRead + use<>> {
        let request = build("GET", path, headers, Vec::new()).map_err(|error| self.words(error))?;
        self.client
            .request_stream(request)
            .await
            .map_err(|error| self.words(error))
    }

    /// GET of a path; what is answered is passed on as it arrives.
    pub(crate) async fn print(&self, path: &str, out: &Out) -> anyhow::Result<()> {
        let mut stream = std::pin::pin!(self.stream(path, &[]).await?);
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let count = stream.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            out.bytes(&buffer[..count])?;
        }
    }

    /// An error in kubectl's words.
    pub(crate) fn words(&self, error: kube::Error) -> anyhow::Error {
        match error {
            kube::Error::Api(status) if status.reason.is_empty() => {
                anyhow::anyhow!("Error from server: {}", status.message)
            }
            kube::Error::Api(status) => {
                anyhow::anyhow!("Error from server ({}): {}", status.reason, status.message)
            }
            error => {
                let context = format!(
                    "talking to the API server {} (is the cluster running?)",
                    self.server
                );
                anyhow::Error::new(error).context(context)
            }
        }
    }
}

/// Whether an error may be over soon, so that the same is asked again. What the commands send more than once does the same as once.
fn passes(error: &kube::Error, path: &str) -> bool {
    // Lists of what an aggregated API serves (`/apis/GROUP/VERSION`) are done without.
    if path.starts_with("/apis") && path.split('/').count() <= 4 {
        return false;
    }
    match error {
        kube::Error::Api(status) => matches!(status.code, 429 | 503 | 504),
        kube::Error::HyperError(_) | kube::Error::Service(_) => true,
        _ => false,
    }
}

fn build(
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
) -> Result<http::Request<Vec<u8>>, kube::Error> {
    let mut request = http::Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body).map_err(kube::Error::HttpError)
}

/// Escapes a value for a query string.
pub(crate) fn query(value: &str) -> String {
    value
        .bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02X}"),
        })
        .collect()
}
