//! One gRPC call to a service of the mesh.

use std::rc::Rc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, TE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use mesh_routing::Snapshot;
use mesh_routing::filter::rate_limit::Service;
use prost::Message;

use super::call::{self, CallError};
use crate::body::{RequestBody, grpc_status};
use crate::pool::Version;
use crate::worker::Worker;

/// Longer answers are not read.
const LONGEST_ANSWER: usize = 64 * 1024;
/// Compression flag and length (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX: usize = 5;

/// Calls a method and waits for its answer, as long as the caller does.
pub async fn call<Q: Message, A: Message + Default>(
    worker: &Rc<Worker>,
    snapshot: &Snapshot,
    service: &Service,
    path: &'static str,
    question: &Q,
) -> Result<A, CallError> {
    let request = request(service, path, question);
    let http2 = Some(Version::Http2);
    let (response, lease) = call::send(worker, snapshot, &service.cluster, http2, request).await?;
    let answer = read(response).await?;
    lease.give_back(true);
    Ok(answer)
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
