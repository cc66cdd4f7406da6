//! `details`: facts about one book, always the same.

use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::StatusCode;
use serde_json::json;

use super::{PORT, error, health};
use crate::serve::{self, PortArgs, env};

pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    if env("ENABLE_EXTERNAL_BOOK_SERVICE").is_some_and(|value| value == "true") {
        anyhow::bail!(
            "details v2 asks a book service on the Internet, which this build does not do; use details v1, \
             or set ENABLE_EXTERNAL_BOOK_SERVICE=false"
        );
    }
    let port = PortArgs::port(args, PORT)?;
    serve::block_on(serve::serve("details", port, router()))
}

/// `/details/{id}` and `/health`.
pub fn router() -> Router {
    Router::new()
        .route(
            "/health",
            get(async || health(StatusCode::OK, "Details is healthy")),
        )
        .route("/details/{id}", get(details))
}

async fn details(Path(id): Path<String>) -> Response {
    let Ok(id) = id.parse::<u64>() else {
        return error(StatusCode::BAD_REQUEST, "please provide numeric product id");
    };
    Json(json!({
        "id": id,
        "author": "William Shakespeare",
        "year": 1595,
        "type": "paperback",
        "pages": 200,
        "publisher": "PublisherA",
        "language": "English",
        "ISBN-10": "1234567890",
        "ISBN-13": "123-1234567890",
    }))
    .into_response()
}
