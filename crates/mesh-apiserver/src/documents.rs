//! Serves the OpenAPI documents of `openapi.rs`.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue};

use crate::ApiServer;
use crate::errors::ApiError;
use crate::openapi::{self, Kind};

/// Clients ask for this form with an `@`, which is not allowed in a media type; Go refuses an answer that says it.
const V2_PROTOBUF_ANSWER: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// Answers paths below `/openapi`; `None` for all others.
pub fn answer(api: &ApiServer, path: &str, headers: &HeaderMap) -> Option<Response> {
    let rest = path.strip_prefix("/openapi/")?;
    let kinds = kinds(api);
    let json =
        |value: serde_json::Value| respond("application/json", value.to_string().into_bytes());
    Some(match rest.trim_end_matches('/') {
        "v2" => {
            let accept = headers
                .get(ACCEPT)
                .and_then(|v| v.to_str().ok())
                .unwrap_or_default();
            if accept.contains("com.github.proto-openapi.spec.v2") {
                respond(V2_PROTOBUF_ANSWER, openapi::v2_protobuf(&kinds))
            } else {
                json(openapi::v2(&kinds))
            }
        }
        "v3" => json(openapi::v3_index(&kinds, api.storage().revision())),
        prefixed => match prefixed
            .strip_prefix("v3/")
            .and_then(|prefix| openapi::v3(&kinds, prefix))
        {
            Some(document) => json(document),
            None => ApiError::no_resource().into_response(),
        },
    })
}

fn kinds(api: &ApiServer) -> Vec<Kind> {
    let registry = api.registry();
    let all = registry.all().iter();
    all.map(|r| Kind {
        group: r.group.clone(),
        version: r.version.clone(),
        kind: r.kind.clone(),
        plural: r.plural.clone(),
        namespaced: r.namespaced,
        schema: r.schema.clone(),
    })
    .collect()
}

fn respond(media: &'static str, body: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(body));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(media));
    response
}
