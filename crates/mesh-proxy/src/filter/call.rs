//! One request of the proxy's own to a service of the mesh, over the clusters and connections of the worker.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use http::response::Parts;
use http::{Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use mesh_routing::Snapshot;

use crate::attempt::judge;
use crate::body::RequestBody;
use crate::http::{address_head, upstream_version};
use crate::pool::{ConnectError, Lease, Sent, Version as Upstream};
use crate::upstream::{Observation, Wish};
use crate::worker::Worker;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The configuration names a cluster that is not there.
    #[error("there is no cluster {0:?}")]
    NoCluster(String),
    /// The name of the service is not one that HTTP/2 can carry.
    #[error("the request's host is no authority")]
    Authority,
    /// The cluster has no usable endpoint.
    #[error("no healthy endpoint")]
    NoHealthy,
    /// No connection.
    #[error("connecting: {0}")]
    Connect(#[from] ConnectError),
    /// The connection or the stream broke.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// Not the status of a good answer.
    #[error("HTTP status {0}")]
    Status(StatusCode),
    /// The service said no.
    #[error("gRPC status {0}")]
    Grpc(u16),
    /// The message is broken, compressed or too long.
    #[error("not a message: {0}")]
    Message(&'static str),
}

/// Sends a request in origin form with a `host` header and waits for the head of the answer, as long as the caller does. `version`: that of
/// the protocol where the cluster's own word does not count.
pub async fn send(
    worker: &Rc<Worker>,
    snapshot: &Snapshot,
    cluster: &str,
    version: Option<Upstream>,
    mut request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Lease), CallError> {
    let cluster = snapshot
        .cluster(cluster)
        .ok_or_else(|| CallError::NoCluster(cluster.to_owned()))?;
    let state = worker.cluster_state(cluster);
    let version = version.unwrap_or_else(|| upstream_version(cluster, Version::HTTP_11));
    if !address_head(&mut request, version) {
        return Err(CallError::Authority);
    }
    // A connection from the pool may have been closed at this very moment; then the service has seen nothing.
    let mut fresh = false;
    loop {
        let host = state
            .pick(&Wish::default(), &worker.peers, || worker.random())
            .ok_or(CallError::NoHealthy)?;
        let mut lease = host
            .lease(&worker.shared, &cluster.config, version, fresh)
            .await?;
        match lease.send(request).await {
            Some(Sent::Response(response)) => {
                host.observe(judge(&response));
                return Ok((response, lease));
            }
            Some(Sent::Unsent(unsent, _)) if lease.reused || !fresh => {
                (request, fresh) = (*unsent, true);
            }
            Some(Sent::Unsent(_, error) | Sent::Lost(error)) => {
                host.observe(Observation::Reset);
                return Err(error.into());
            }
            None => return Err(CallError::NoHealthy),
        }
    }
}

/// Sends a request and reads the whole answer, which must not be longer than `longest` bytes.
pub async fn whole(
    worker: &Rc<Worker>,
    snapshot: &Snapshot,
    cluster: &str,
    request: Request<RequestBody>,
    longest: usize,
) -> Result<(Parts, Bytes), CallError> {
    let (response, lease) = send(worker, snapshot, cluster, None, request).await?;
    let (parts, mut body) = response.into_parts();
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        if bytes.len() + data.len() > longest {
            return Err(CallError::Message("it is too long"));
        }
        bytes.extend_from_slice(&data);
    }
    lease.give_back(true);
    Ok((parts, bytes.freeze()))
}
