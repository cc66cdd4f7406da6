//! `helloworld`: says which version and which instance answered.

use axum::Router;
use axum::routing::get;

use crate::serve::{self, PortArgs, env};

const PORT: u16 = 5000;

pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    let port = PortArgs::port(args, PORT)?;
    let version = env("SERVICE_VERSION").unwrap_or_else(|| "v1".into());
    serve::block_on(serve::serve(
        "helloworld",
        port,
        router(&version, &serve::hostname()),
    ))
}

/// `/hello` and `/health`.
pub fn router(version: &str, instance: &str) -> Router {
    let greeting = format!("Hello version: {version}, instance: {instance}\n");
    Router::new()
        .route("/hello", get(async move || greeting))
        .route("/health", get(async || "Helloworld is healthy"))
}
