//! The endpoints as external authorization services (`envoy.service.auth.v3`): they note what they are told and answer as the script of
//! the request in question says.
//!
//! A step is words: `200` lets pass, any other status refuses with it, `reset` breaks the stream off; then `delay=MS`, `body=TEXT`,
//! `append:NAME=VALUE`, `remove:NAME`, `response:NAME=VALUE`, `parameter:NAME=VALUE`, `without:NAME`, `metadata:NAME=VALUE` and
//! `NAME=VALUE` (headers that are set, or of the refusal).

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption, QueryParameter};
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{
    CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse,
};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{BoolValue, Struct, Value};
use envoy_types::pb::google::rpc::Status;
use prost::Message;

use super::upstream::{ID, Received, SCRIPT};

/// The method's path.
pub(super) const PATH: &str = "/envoy.service.auth.v3.Authorization/Check";
/// gRPC's PERMISSION_DENIED.
const DENIED: i32 = 7;
/// Compression flag and length before a message.
const PREFIX: usize = 5;

/// What was asked.
pub(super) struct Question {
    /// The id of the request in question.
    pub(super) id: String,
    /// What its endpoints are to do.
    pub(super) script: String,
    /// For the notes.
    pub(super) received: Received,
}

/// Reads a question; `None` if it is none.
pub(super) fn read(body: &[u8], endpoint: &str) -> Option<Question> {
    let question = CheckRequest::decode(body.get(PREFIX..)?).ok()?;
    let attributes = question.attributes?;
    let http = attributes.request.as_ref()?.http.clone()?;
    let mut headers: Vec<(String, String)> = http.headers.clone().into_iter().collect();
    let listed = http.header_map.into_iter().flat_map(|map| map.headers);
    headers.extend(listed.map(|h| {
        let value = String::from_utf8_lossy(&h.raw_value).into_owned();
        (h.key, value)
    }));
    let of = |name: &str| {
        let found = headers.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.clone()).unwrap_or_default()
    };
    let (id, script) = (of(ID), of(SCRIPT));
    let source = attributes.source.unwrap_or_default();
    let mut fact = |name: &str, value: String| {
        headers.push((format!("attribute.{name}"), value));
    };
    fact("host", http.host);
    fact("scheme", http.scheme);
    fact("protocol", http.protocol);
    fact("size", http.size.to_string());
    fact("query", http.query);
    fact("source.principal", source.principal);
    fact("source.service", source.service);
    let mut context: Vec<_> = attributes.context_extensions.into_iter().collect();
    context.sort();
    fact("context", format!("{context:?}"));
    let metadata = attributes.metadata_context.unwrap_or_default();
    fact("metadata", format!("{:?}", metadata.filter_metadata));
    headers.sort();
    let body = match http.raw_body.is_empty() {
        true => http.body,
        false => format!("raw {:?}", String::from_utf8_lossy(&http.raw_body)),
    };
    Some(Question {
        id,
        script,
        received: Received {
            endpoint: format!("check {endpoint}"),
            version: "2",
            method: http.method,
            target: http.path,
            headers,
            body,
            trailers: Vec::new(),
        },
    })
}

/// The answer by a step of the script, as the frames of a gRPC response; `None` breaks the stream off.
pub(super) async fn answer(step: &str) -> Option<Bytes> {
    let mut words = step.split_whitespace();
    let status = words.next().unwrap_or("200");
    if status == "reset" {
        return None;
    }
    let mut ok = OkHttpResponse::default();
    let mut denied = DeniedHttpResponse::default();
    let mut metadata = Struct::default();
    for word in words {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        match name.split_once(':') {
            None if name == "delay" => {
                let millis = value.parse().unwrap_or(0);
                tokio::time::sleep(Duration::from_millis(millis)).await;
            }
            None if name == "body" => value.clone_into(&mut denied.body),
            None => {
                ok.headers.push(header(name, value, None));
                denied.headers.push(header(name, value, None));
            }
            Some(("append", name)) => ok.headers.push(header(name, value, Some(true))),
            Some(("remove", name)) => ok.headers_to_remove.push(name.to_owned()),
            Some(("response", name)) => {
                let header = header(name, value, Some(true));
                ok.response_headers_to_add.push(header);
            }
            Some(("parameter", name)) => ok.query_parameters_to_set.push(QueryParameter {
                key: name.to_owned(),
                value: value.to_owned(),
            }),
            Some(("without", name)) => ok.query_parameters_to_remove.push(name.to_owned()),
            Some(("metadata", name)) => {
                let kind = Some(Kind::StringValue(value.to_owned()));
                metadata.fields.insert(name.to_owned(), Value { kind });
            }
            Some(_) => {}
        }
    }
    let code = status.parse().unwrap_or(500);
    let allowed = code == 200;
    denied.status = Some(HttpStatus { code });
    let answer = CheckResponse {
        status: Some(Status {
            code: if allowed { 0 } else { DENIED },
            ..Status::default()
        }),
        dynamic_metadata: (!metadata.fields.is_empty()).then_some(metadata),
        http_response: Some(match allowed {
            true => HttpResponse::OkResponse(ok),
            false => HttpResponse::DeniedResponse(denied),
        }),
    };
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(answer.encoded_len()).unwrap_or(u32::MAX));
    bytes.put_slice(&answer.encode_to_vec());
    Some(bytes.freeze())
}

#[expect(deprecated, reason = "services still send it, and Envoy obeys")]
fn header(name: &str, value: &str, append: Option<bool>) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: name.to_owned(),
            value: value.to_owned(),
            ..HeaderValue::default()
        }),
        append: append.map(|value| BoolValue { value }),
        ..HeaderValueOption::default()
    }
}
