//! `ratelimit`: the service that proxies ask about requests (Envoy's `RateLimitService`), with the configuration files, environment
//! variables and ports of the field's program of that name. It counts in memory, so every replica counts for itself and Redis is not asked.

mod config;
mod limiter;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::{BufMut, Bytes, BytesMut};
use envoy_types::pb::envoy::service::ratelimit::v3::RateLimitRequest;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;

pub use self::config::{Config, ConfigError, Rule, Unit};
pub use self::limiter::Limiter;
use crate::serve::{self, env};

/// How often the configuration files are looked at.
const RELOAD_EVERY: Duration = Duration::from_secs(1);
/// Longer questions are refused.
const LONGEST: usize = 1 << 20;
/// gRPC statuses.
const INVALID_ARGUMENT: u16 = 3;

/// The sample's entry point; it is told everything by its environment, as the field's program is.
pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.is_empty(),
        "ratelimit takes no arguments; it reads the environment: RUNTIME_ROOT, RUNTIME_SUBDIRECTORY, RUNTIME_APPDIRECTORY, PORT, \
         GRPC_PORT, DEBUG_PORT"
    );
    serve::block_on(run())
}

/// `ratelimit` as a command in the container.
pub(crate) fn applet(args: &[String]) -> ExitCode {
    match main(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ratelimit: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    let port = |name: &str, default: u16| match env(name) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .with_context(|| format!("{name}={text:?} is not a port number")),
    };
    let (http, grpc, debug) = (
        port("PORT", 8080)?,
        port("GRPC_PORT", 8081)?,
        port("DEBUG_PORT", 6070)?,
    );
    let directory = directory();
    let service = Service::new(Config::default());
    service.load(&directory);
    let stop = serve::stop_signal()?;
    for (name, port, router) in [
        ("HTTP", http, service.clone().http()),
        ("gRPC", grpc, service.clone().grpc()),
        ("debug", debug, service.clone().debug()),
    ] {
        let listener = serve::listen(port).await?;
        serve::say(&format!("ratelimit listens on port {port} ({name})"));
        tokio::spawn(serve::serve_on(listener, router, std::future::pending()));
    }
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(RELOAD_EVERY).await;
            service.load(&directory);
        }
    });
    stop.await;
    serve::linger().await;
    Ok(())
}

fn directory() -> PathBuf {
    let root = env("RUNTIME_ROOT").unwrap_or_else(|| "/srv/runtime_data/current".to_owned());
    let below = env("RUNTIME_SUBDIRECTORY").unwrap_or_default();
    let last = env("RUNTIME_APPDIRECTORY").unwrap_or_else(|| "config".to_owned());
    PathBuf::from(root).join(below).join(last)
}

/// The rate limit service. Cheap to clone.
#[derive(Clone)]
pub struct Service(Arc<Shared>);

struct Shared {
    limiter: Limiter,
    config: RwLock<Loaded>,
}

#[derive(Default)]
struct Loaded {
    config: Arc<Config>,
    /// What the directory held last, whether it was taken or not.
    texts: Option<Result<Vec<(String, String)>, String>>,
}

impl Service {
    /// A service with this configuration.
    pub fn new(config: Config) -> Self {
        Self(Arc::new(Shared {
            limiter: Limiter::default(),
            config: RwLock::new(Loaded {
                config: Arc::new(config),
                texts: None,
            }),
        }))
    }

    /// Reads the directory's files, if they have changed; where they are wrong, says so and keeps what it has.
    fn load(&self, directory: &Path) {
        let texts = config::read(directory).map_err(|error| error.to_string());
        let mut loaded = self
            .0
            .config
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if loaded.texts.as_ref() == Some(&texts) {
            return;
        }
        let made = match &texts {
            Ok(texts) => Config::parse(texts).map_err(|error| error.to_string()),
            Err(error) => Err(error.clone()),
        };
        let at = directory.display();
        match made {
            Ok(config) => {
                let (domains, limits) = config.size();
                serve::say(&format!(
                    "configuration of {at}: {domains} domains, {limits} limits"
                ));
                loaded.config = Arc::new(config);
            }
            Err(error) => serve::say(&format!(
                "configuration of {at} is not taken, the one before stays: {error}"
            )),
        }
        loaded.texts = Some(texts);
    }

    fn config(&self) -> Arc<Config> {
        let loaded = self.0.config.read().unwrap_or_else(PoisonError::into_inner);
        loaded.config.clone()
    }

    /// The gRPC service (HTTP/2 with prior knowledge).
    pub fn grpc(self) -> Router {
        Router::new()
            .route(
                "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit",
                post(should_rate_limit),
            )
            .layer(DefaultBodyLimit::max(LONGEST))
            .with_state(self)
    }

    fn http(self) -> Router {
        Router::new().route("/healthcheck", get(async || "OK"))
    }

    fn debug(self) -> Router {
        Router::new()
            .route("/rlconfig", get(rlconfig))
            .with_state(self)
    }
}

async fn rlconfig(State(service): State<Service>) -> String {
    service.config().to_string()
}

async fn should_rate_limit(State(service): State<Service>, body: Bytes) -> Response {
    let question = match unframe(&body) {
        Ok(question) => question,
        Err(reason) => return refuse(INVALID_ARGUMENT, reason),
    };
    if question.domain.is_empty() {
        return refuse(INVALID_ARGUMENT, "rate limit domain must not be empty");
    }
    if question.descriptors.is_empty() {
        return refuse(
            INVALID_ARGUMENT,
            "rate limit descriptor list must not be empty",
        );
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs());
    let answer = service
        .0
        .limiter
        .judge(&service.config(), &question, seconds);
    let length = answer.encoded_len();
    let mut framed = BytesMut::with_capacity(5 + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // A buffer that grows takes any message.
    let _ = answer.encode(&mut framed);
    reply(framed.freeze(), 0, "")
}

/// The message in its frame (gRPC over HTTP/2, "Length-Prefixed-Message").
fn unframe(body: &[u8]) -> Result<RateLimitRequest, &'static str> {
    let (head, message) = body
        .split_first_chunk::<5>()
        .ok_or("the message is cut short")?;
    let [compressed, length @ ..] = head;
    if *compressed != 0 {
        return Err("compressed messages are not understood here");
    }
    if u32::from_be_bytes(*length) as usize != message.len() {
        return Err("the length of the message is wrong");
    }
    RateLimitRequest::decode(message).map_err(|_| "the message cannot be decoded")
}

fn refuse(status: u16, message: &'static str) -> Response {
    reply(Bytes::new(), status, message)
}

fn reply(message: Bytes, status: u16, text: &'static str) -> Response {
    let mut trailers = HeaderMap::new();
    trailers.insert(
        HeaderName::from_static("grpc-status"),
        HeaderValue::from(status),
    );
    if !text.is_empty() {
        trailers.insert(
            HeaderName::from_static("grpc-message"),
            HeaderValue::from_static(text),
        );
    }
    let body = Full::new(message).with_trailers(async move { Some(Ok(trailers)) });
    let mut response = (StatusCode::OK, Body::new(body)).into_response();
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    response
}
