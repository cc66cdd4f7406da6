//! A Kubernetes API, with raw requests and kubectl's words for its errors.

use futures::AsyncBufRead;
use kube::Client;
use serde_json::Value;

/// A cluster to talk to.
pub(crate) struct Cluster {
    pub(crate) client: Client,
    /// Namespace of objects that don't say their own.
    pub(crate) namespace: String,
    /// Address of the API, for messages.
    pub(crate) server: String,
}

/// Lists as a server prints them.
pub(crate) const AS_TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

impl Cluster {
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
        self.client
            .request(build(method, path, headers, body)?)
            .await
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
