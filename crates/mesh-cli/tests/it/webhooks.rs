//! What stands behind the Services of control planes in these tests: webhooks over TLS that answer as ours do, or don't.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_apiserver::node::Duplex;
use mesh_identity::ca::Authority;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// How the control planes behave.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// As they should.
    Answers,
    /// Nobody listens.
    Refuses,
    /// Each request is an error.
    Fails,
    /// Their certificate is another authority's.
    Untrusted,
}

/// The control planes of one cluster.
#[derive(Clone)]
pub struct Webhooks {
    address: SocketAddr,
    mood: Arc<AtomicU8>,
    /// How many connections came.
    pub asked: Arc<AtomicUsize>,
}

fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("later than 1970")
        .as_secs()
}

fn authority() -> &'static Authority {
    static AUTHORITY: OnceLock<Authority> = OnceLock::new();
    AUTHORITY.get_or_init(|| {
        Authority::generate("cluster.local", "Root CA", now(), 86_400).expect("a root")
    })
}

/// What control planes write into webhook configurations.
pub fn bundle(mood: Mood) -> String {
    match mood {
        Mood::Untrusted => {
            let other = Authority::generate("cluster.local", "Other", now(), 86_400);
            BASE64.encode(other.expect("a root").certificate_pem())
        }
        _ => BASE64.encode(authority().certificate_pem()),
    }
}

impl Webhooks {
    pub async fn start() -> Self {
        let names: Vec<String> = ["istiod", "istiod-canary", "istiod-ours", "istiod-1-2-0"]
            .map(|service| format!("{service}.istio-system.svc"))
            .into();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let leaf = authority()
            .issue_server(&names, &[], now(), 3600)
            .expect("a leaf");
        let config = mesh_identity::tls::server_config(&leaf, &["http/1.1"]).expect("TLS");
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let webhooks = Self {
            address: tcp.local_addr().expect("address"),
            mood: Arc::new(AtomicU8::new(Mood::Answers as u8)),
            asked: Arc::default(),
        };
        let router = Router::new()
            .route("/inject", post(inject))
            .route("/validate", post(validate))
            .with_state(webhooks.clone());
        let listener = Listener {
            tcp,
            tls: TlsAcceptor::from(config),
        };
        tokio::spawn(async move { axum::serve(listener, router).await });
        webhooks
    }

    pub fn behave(&self, mood: Mood) {
        self.mood.store(mood as u8, Ordering::Relaxed);
    }

    fn is(&self, mood: Mood) -> bool {
        self.mood.load(Ordering::Relaxed) == mood as u8
    }

    /// A connection to whatever Service it is.
    pub async fn dial(self) -> std::io::Result<Box<dyn Duplex>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.is(Mood::Refuses) {
            return Err(std::io::Error::other("connect: connection refused"));
        }
        Ok(Box::new(TcpStream::connect(self.address).await?))
    }
}

struct Listener {
    tcp: TcpListener,
    tls: TlsAcceptor,
}

impl axum::serve::Listener for Listener {
    type Io = tokio_rustls::server::TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            if let Ok((stream, peer)) = self.tcp.accept().await
                && let Ok(stream) = self.tls.accept(stream).await
            {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}

fn answer(review: &Value, denied: Option<String>, patch: Option<Value>) -> Response {
    let mut response = json!({ "uid": review["request"]["uid"], "allowed": denied.is_none() });
    if let Some(message) = denied {
        response["status"] = json!({ "status": "Failure", "message": message, "code": 400 });
    }
    if let Some(patch) = patch {
        response["patchType"] = json!("JSONPatch");
        response["patch"] = json!(BASE64.encode(patch.to_string()));
    }
    Json(json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }))
        .into_response()
}

/// Refuses what asks in a way that means nothing; every other pod is told in an annotation who was called for it.
async fn inject(
    State(webhooks): State<Webhooks>,
    headers: HeaderMap,
    Json(review): Json<Value>,
) -> Response {
    if webhooks.is(Mood::Fails) {
        return (StatusCode::SERVICE_UNAVAILABLE, "not yet").into_response();
    }
    let metadata = &review["request"]["object"]["metadata"];
    let asked = metadata["labels"]["sidecar.istio.io/inject"].as_str();
    if asked.is_some_and(|asked| asked.parse::<bool>().is_err()) {
        return answer(&review, Some("not a bool".to_owned()), None);
    }
    let host = headers["host"].to_str().expect("host");
    let service = host.split('.').next().expect("service");
    let patch = match metadata["annotations"].is_object() {
        true => {
            json!([{ "op": "add", "path": format!("/metadata/annotations/{service}"), "value": "called" }])
        }
        false => {
            json!([{ "op": "add", "path": "/metadata/annotations", "value": { service: "called" } }])
        }
    };
    answer(&review, None, Some(patch))
}

/// Refuses what our own rules refuse.
async fn validate(State(webhooks): State<Webhooks>, Json(review): Json<Value>) -> Response {
    if webhooks.is(Mood::Fails) {
        return (StatusCode::SERVICE_UNAVAILABLE, "not yet").into_response();
    }
    let wrong = match mesh_api::parse(&review["request"]["object"]) {
        Ok(object) => mesh_api::validate(&object)
            .iter()
            .find(|finding| finding.severity == mesh_api::Severity::Error)
            .map(ToString::to_string),
        Err(error) => Some(error.to_string()),
    };
    answer(&review, wrong, None)
}
