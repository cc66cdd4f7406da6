//! Bookinfo: a small book shop of four services, each in several versions, which the field's documentation uses to show
//! routing.
//!
//! `productpage` calls `details` and `reviews`; `reviews` v2 and v3 call `ratings`. Every service gives its router from a
//! configuration, so that tests and the program share it.

pub mod details;
mod page;
pub mod productpage;
pub mod ratings;
pub mod reviews;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

use crate::serve::env;

/// Port of every Bookinfo service.
const PORT: u16 = 9080;

/// Where another service of the shop is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Name, resolved by the system's resolver.
    pub host: String,
    /// Port of plain HTTP.
    pub port: u16,
}

impl Peer {
    /// From `<NAME>_HOSTNAME`, `<NAME>_SERVICE_PORT` and `SERVICES_DOMAIN` (appended to the host with a dot); defaults:
    /// the service's name and 9080.
    fn from_env(service: &str) -> anyhow::Result<Self> {
        let prefix = service.to_uppercase();
        let mut host = env(&format!("{prefix}_HOSTNAME")).unwrap_or_else(|| service.to_owned());
        if let Some(domain) = env("SERVICES_DOMAIN") {
            host = format!("{host}.{domain}");
        }
        let variable = format!("{prefix}_SERVICE_PORT");
        let port = match env(&variable) {
            None => PORT,
            Some(text) => text.parse().map_err(|_| {
                anyhow::anyhow!(
                    "the environment variable {variable} is {text:?}; set it to a port number"
                )
            })?,
        };
        Ok(Self { host, port })
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}:{}{path}", self.host, self.port)
    }
}

/// An answer of the shape `{"error": message}`.
fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "error": message }))).into_response()
}

/// An answer of the shape `{"status": message}`.
fn health(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "status": message }))).into_response()
}
