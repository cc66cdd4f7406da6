//! The samples as their callers see them: over loopback, each on a port of its own.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

mod bookinfo;
mod httpbin;
mod manifests;
mod others;
mod ratelimit;
mod security;

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use http::{HeaderMap, StatusCode};
use mesh_samples::upstream::Upstream;
use serde_json::Value;
use tokio::net::TcpListener;

/// Serves `router` until the test ends.
async fn start(router: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .collect()
}

async fn get(
    address: SocketAddr,
    path: &str,
    pairs: &[(&'static str, &str)],
) -> (StatusCode, String) {
    let url = format!("http://{address}{path}");
    let (status, body) = Upstream::default()
        .get(&url, &headers(pairs), Duration::from_secs(30))
        .await
        .unwrap();
    (status, String::from_utf8_lossy(&body).into_owned())
}

async fn json(address: SocketAddr, path: &str, pairs: &[(&'static str, &str)]) -> Value {
    let (status, body) = get(address, path, pairs).await;
    assert_eq!(status, StatusCode::OK, "{path}: {body}");
    serde_json::from_str(&body).unwrap()
}
