//! Pages that pods serve on their loopback address, asked for through the API's port-forward.

use anyhow::Context as _;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use serde_json::Value;

use crate::cluster::Cluster;

/// Largest page that is read, in bytes.
const MAX_PAGE: usize = 256 << 20;

/// What a pod answered.
pub(crate) struct Page {
    pub(crate) status: http::StatusCode,
    body: hyper::body::Bytes,
}

impl Page {
    /// The answer, which should be JSON.
    ///
    /// # Errors
    /// Any status but success, with what was said; something else than JSON.
    pub(crate) fn json(&self) -> anyhow::Result<Value> {
        anyhow::ensure!(
            self.status.is_success(),
            "it answers {}: {}",
            self.status,
            String::from_utf8_lossy(&self.body)
        );
        serde_json::from_slice(&self.body).context("the answer is not JSON")
    }
}

/// GET of a page of a pod.
///
/// # Errors
/// No such pod; nobody who listens on the port.
pub(crate) async fn get(
    cluster: &Cluster,
    namespace: &str,
    pod: &str,
    port: u16,
    path: &str,
) -> anyhow::Result<Page> {
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    let mut forwarded = api
        .portforward(pod, &[port])
        .await
        .map_err(|error| cluster.words(error))?;
    let stream = forwarded
        .take_stream(port)
        .context("the API opened no stream")?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = http::Request::get(path)
        .header(http::header::HOST, "localhost")
        .body(Empty::<hyper::body::Bytes>::new())?;
    let response = sender
        .send_request(request)
        .await
        .with_context(|| format!("no answer on port {port}"))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_PAGE)
        .collect()
        .await
        .map_err(|error| anyhow::anyhow!("{error}"))?
        .to_bytes();
    connection.abort();
    Ok(Page { status, body })
}
