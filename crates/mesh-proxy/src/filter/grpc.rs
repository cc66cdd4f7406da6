//! One gRPC call to a service of the mesh, over the clusters and connections of the worker.

use std::rc::Rc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, TE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use mesh_routing::Snapshot;
use mesh_routing::filter::rate_limit::Service;
use prost::Message;

use crate::attempt::judge;
use crate::body::{RequestBody, grpc_status};
use crate::http::address_head;
use crate::pool::{ConnectError, Sent, Version};
use crate::upstream::{Observation, Wish};
use crate::worker::Worker;

/// Longer answers are not read.
const LONGEST_ANSWER: usize = 64 * 1024;
/// Compression flag and length (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX: usize = 5;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The configuration names a cluster that is not there.
    #[error("there is no cluster {0:?}")]
    NoCluster(String),
    /// The cluster has no usable endpoint.
    #[error("no healthy endpoint")]
    NoHealthy,
    /// No connection.
    #[error("connecting: {0}")]
    Connect(#[from] ConnectError),
    /// The connection or the stream broke.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// Not the status of a gRPC answer.
    #[error("HTTP status {0}")]
    Status(StatusCode),
    /// The service said no.
    #[error("gRPC status {0}")]
    Grpc(u16),
    /// The message is broken, compressed or too long.
    #[error("not a message: {0}")]
    Message(&'static str),
}

/// Calls a method and waits for its answer, as long as the caller does.
pub async fn call<Q: Message, A: Message + Default>(
    worker: &Rc<Worker>,
    snapshot: &Snapshot,
    service: &Service,
    path: &'static str,
    question: &Q,
) -> Result<A, CallError> {
    let cluster = snapshot
        .cluster(&service.cluster)
        .ok_or_else(|| CallError::NoCluster(service.cluster.to_string()))?;
    let state = worker.cluster_state(cluster);
    let mut request = request(service, path, question);
    let mut fresh = false;
    loop {
        let host = state
            .pick(&Wish::default(), &worker.peers, || worker.random())
            .ok_or(CallError::NoHealthy)?;
        let mut lease = host
            .lease(&worker.shared, &cluster.config, Version::Http2, fresh)
            .await?;
        match lease.send(request).await {
            Some(Sent::Response(response)) => {
                host.observe(judge(&response));
                let answer = read(response).await?;
                lease.give_back(true);
                return Ok(answer);
            }
            // A connection from the pool that was closed meanwhile: the service has seen nothing.
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

fn request(service: &Service, path: &'static str, question: &impl Message) -> Request<RequestBody> {
    let length = question.encoded_len();
    let mut body = BytesMut::with_capacity(PREFIX + length);
    body.put_u8(0);
    body.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // A buffer that grows takes any message.
    let _ = question.encode(&mut body);
    let mut request = Request::new(RequestBody::whole(body.freeze()));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(path);
    let headers = request.headers_mut();
    headers.insert(HOST, service.authority.clone());
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    for (name, value) in &service.headers {
        headers.append(name, value.clone());
    }
    address_head(&mut request, Version::Http2);
    request
}

async fn read<A: Message + Default>(response: Response<Incoming>) -> Result<A, CallError> {
    if response.status() != StatusCode::OK {
        return Err(CallError::Status(response.status()));
    }
    check_status(response.headers())?;
    let mut body = response.into_body();
    let mut message = BytesMut::new();
    let mut trailers = None;
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) if message.len() + data.len() > LONGEST_ANSWER => {
                return Err(CallError::Message("longer than 64 KiB"));
            }
            Ok(data) => message.extend_from_slice(&data),
            Err(other) => trailers = other.into_trailers().ok(),
        }
    }
    match &trailers {
        Some(trailers) if grpc_status(trailers).is_some() => check_status(trailers)?,
        _ => return Err(CallError::Message("ends without a gRPC status")),
    }
    decode(message.freeze())
}

fn check_status(headers: &HeaderMap) -> Result<(), CallError> {
    match grpc_status(headers) {
        None | Some(0) => Ok(()),
        Some(status) => Err(CallError::Grpc(status)),
    }
}

fn decode<A: Message + Default>(mut bytes: Bytes) -> Result<A, CallError> {
    if bytes.len() < PREFIX {
        return Err(CallError::Message("it is cut short"));
    }
    if bytes.get_u8() != 0 {
        return Err(CallError::Message("it is compressed"));
    }
    if bytes.get_u32() as usize != bytes.len() {
        return Err(CallError::Message("its length is wrong"));
    }
    A::decode(bytes).map_err(|_| CallError::Message("it cannot be decoded"))
}
