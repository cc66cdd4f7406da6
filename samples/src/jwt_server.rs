//! `jwt-server`: gives out the keys that the field's sample tokens are signed with, over HTTP and, with a certificate, HTTPS; flags and
//! ports are those of the field's sample of that name.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::serve;

/// The public keys of the field's samples: that of its JWT server, and that of its demonstration tokens (issuer
/// `testing@secure.istio.io`).
pub const KEYS: &str = concat!(
    r#"{"keys":[{"e":"AQAB","kid":"tT_w9LRNrY7wJalGsTYSt7rutZi86Gvyc0EKR4CaQAw","kty":"RSA","n":""#,
    "raJ7ZEhMfrBUo2werGKOow9an1B6Ukc6dKY2hNi10eaQe9ehJCjLpmJpePxoqaCi2VYt6gncLfhEV71JDGsodbfYMlaxwWTt6lXBcjlVXHWDXLC45rHVfi9FjSSXloHq",
    "mSStpjv3mrW3R6fx2VeVVP_mrA6ZHtcynq6ecJqO11STvVoeeM3lEsASVSWsUrKltC1Crfo0sI7YG34QjophVTEi8B9gVepAJZV-Bso5sinRABnxfLUM7DU5c8MO114u",
    "vXThgSIuAOM9PbViSC3X6Y9Gsjsy881HGO-EJaUCrwSWnwQW5sp0TktrYL70-M4_ug-X51Yt_PErmncKupx8Hw",
    r#""},{"e":"AQAB","kid":"DHFbpoIUqrY8t2zpA2qXfCmr5VO5ZEr4RzHU_-envvQ","kty":"RSA","n":""#,
    "xAE7eB6qugXyCAG3yhh7pkDkT65pHymX-P7KfIupjf59vsdo91bSP9C8H07pSAGQO1MV_xFj9VswgsCg4R6otmg5PV2He95lZdHtOcU5DXIg_pbhLdKXbi66GlVeK6AB",
    "ZOUW3WYtnNHD-91gVuoeJT_DwtGGcp4ignkgXfkiEm4sw-4sfb4qdt5oLbyVpmW6x9cfa7vs2WTfURiCrBoUqgBo_-4WTiULmmHSGZHOjzwa8WtrtOQGsAFjIbno85jp",
    "6MnGGGZPYZbDAa_b3y5u-YpW7ypZrvD8BgtKVjgtQgZhLAGezMt0ua3DRrWnKqTZ0BJ_EyxOGuHJrLsn00fnMQ",
    r#""}]}"#
);

/// What it was told, as flags with one dash or two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Port for HTTP.
    pub http: u16,
    /// Port for HTTPS; it listens there where it has a certificate.
    pub https: u16,
    /// Files of the certificate and its key.
    pub files: Option<(String, String)>,
}

impl Settings {
    /// Reads the program's arguments.
    pub fn parse(args: &[String]) -> anyhow::Result<Self> {
        let (mut http, mut https) = (8000, 8443);
        let (mut certificate, mut key) = (String::new(), String::new());
        for (name, value) in serve::flags(args)? {
            let port = || {
                value
                    .parse()
                    .with_context(|| format!("-{name} {value:?} is not a port number"))
            };
            match name {
                "http" => http = port()?,
                "https" => https = port()?,
                "cert" => value.clone_into(&mut certificate),
                "key" => value.clone_into(&mut key),
                other => anyhow::bail!(
                    "jwt-server has no flag -{other}; it has -http PORT, -https PORT, -cert FILE, -key FILE"
                ),
            }
        }
        let files = (!certificate.is_empty() && !key.is_empty()).then_some((certificate, key));
        Ok(Self { http, https, files })
    }
}

/// The sample's entry point.
pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    let settings = Settings::parse(args)?;
    serve::block_on(async {
        let stop = serve::stop_signal()?;
        let listener = serve::listen(settings.http).await?;
        serve::say(&format!(
            "jwt-server listens on port {} (HTTP)",
            settings.http
        ));
        tokio::spawn(serve::serve_on(listener, router(), std::future::pending()));
        if let Some((certificate, key)) = &settings.files {
            let acceptor = acceptor(Path::new(certificate), Path::new(key))?;
            let listener = serve::listen(settings.https).await?;
            serve::say(&format!(
                "jwt-server listens on port {} (HTTPS)",
                settings.https
            ));
            tokio::spawn(serve_tls(listener, acceptor));
        }
        stop.await;
        Ok(())
    })
}

/// `jwt-server` as a command in the container.
pub(crate) fn applet(args: &[String]) -> ExitCode {
    match main(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("jwt-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Any path has the keys.
pub fn router() -> Router {
    Router::new().fallback(keys)
}

async fn keys() -> Response {
    let mut response = KEYS.into_response();
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn acceptor(certificate: &Path, key: &Path) -> anyhow::Result<TlsAcceptor> {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("reading the certificate {}", certificate.display()))?;
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("reading the key {}", key.display()))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .context("taking the certificate with its key")?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn serve_tls(listener: TcpListener, acceptor: TlsAcceptor) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            continue;
        };
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            // A client that does not like the certificate ends its own connection only.
            if let Ok(stream) = acceptor.accept(stream).await {
                let service = TowerToHyperService::new(router());
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            }
        });
    }
}
