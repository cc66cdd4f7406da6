//! What the probed containers run: this binary again, as `mesh probed`.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode, Version};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;

pub const HTTP: u16 = 8080;
pub const HTTPS: u16 = 8443;

/// Serves until it is killed: `/ok` and `/bad`, and gRPC's health check for the service `ready`, in the clear and with a certificate that
/// nobody has a reason to trust.
pub fn main() -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("starting the runtime");
    runtime.block_on(async {
        let authority = mesh_identity::ca::Authority::generate("test", "probed", now(), 86_400);
        let leaf = authority
            .expect("making an authority")
            .issue_server(&["probed"], &[], now(), 86_400)
            .expect("making a certificate");
        let tls = mesh_identity::tls::server_config(&leaf, &["http/1.1"]).expect("using it");
        let acceptor = tokio_rustls::TlsAcceptor::from(tls);
        let (plain, secure) = tokio::join!(listen(HTTP), listen(HTTPS));
        loop {
            tokio::select! {
                Ok((stream, _)) = plain.accept() => drop(tokio::spawn(serve(stream))),
                Ok((stream, _)) = secure.accept() => {
                    let acceptor = acceptor.clone();
                    tokio::spawn(async move {
                        if let Ok(stream) = acceptor.accept(stream).await {
                            serve(stream).await;
                        }
                    });
                }
            }
        }
    })
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

async fn listen(port: u16) -> TcpListener {
    let address = std::net::SocketAddr::from(([0, 0, 0, 0], port));
    TcpListener::bind(address).await.expect("listening")
}

async fn serve<S>(stream: S)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let app = Router::new()
        .route("/ok", get(|| async { "fine" }))
        .route(
            "/bad",
            get(|| async { (StatusCode::SERVICE_UNAVAILABLE, "no") }),
        )
        .route("/grpc.health.v1.Health/Check", post(health));
    let service = TowerToHyperService::new(app);
    let _ = Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// HealthCheckRequest { service = 1 } to HealthCheckResponse { status = 1 }: 1 is SERVING, 2 is not.
async fn health(version: Version, headers: HeaderMap, body: Bytes) -> impl IntoResponse {
    assert_eq!(version, Version::HTTP_2);
    assert_eq!(headers["content-type"], "application/grpc");
    let serving = body[..] == *b"\x00\x00\x00\x00\x07\x0a\x05ready";
    let status = if serving { 1 } else { 2 };
    let answer = Bytes::from(vec![0, 0, 0, 0, 2, 8, status]);
    ([("content-type", "application/grpc")], answer)
}
