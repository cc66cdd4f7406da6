//! The admission webhooks over TLS: `/inject` adds the sidecar, `/validate` refuses objects that make no sense.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State as Extract};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use mesh_inject::{InjectContext, InjectorConfig, Outcome};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::ending::Announced;
use crate::metrics::{Metrics, resource};
use crate::publish::Shared;
use crate::serving::Certificate;
use crate::table::INJECTOR_CONFIG;
use crate::{ControlError, Options, revisioned};

/// An object is at most 3 MiB in Kubernetes; a review holds it twice.
const MAX_BODY: usize = 8 << 20;
/// Connections at a time; API servers keep few.
const MAX_CONNECTIONS: usize = 512;
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What the webhooks know.
#[derive(Clone)]
pub(crate) struct Webhook {
    options: Arc<Options>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
}

/// `admission.k8s.io/v1` AdmissionReview, as far as it matters here.
#[derive(Deserialize)]
struct Review {
    request: AdmissionRequest,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AdmissionRequest {
    uid: String,
    #[serde(default)]
    operation: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    object: Value,
}

/// The answer to a review.
enum Verdict {
    Allowed {
        warnings: Vec<String>,
    },
    Patched {
        patch: Vec<u8>,
        warnings: Vec<String>,
    },
    Denied {
        message: String,
        warnings: Vec<String>,
    },
}

impl Webhook {
    pub(crate) fn new(options: Arc<Options>, shared: Arc<Shared>, metrics: Arc<Metrics>) -> Self {
        Self {
            options,
            shared,
            metrics,
        }
    }

    fn router(self) -> Router {
        Router::new()
            .route("/inject", post(inject))
            // `/inject/cluster/<id>/net/<network>` of remote clusters.
            .route("/inject/{*parameters}", post(inject))
            .route("/validate", post(validate))
            .route("/validate/{*parameters}", post(validate))
            .route("/ready", get(async || "ready\n"))
            .layer(DefaultBodyLimit::max(MAX_BODY))
            .with_state(self)
    }

    fn inject(&self, request: &AdmissionRequest) -> Verdict {
        self.metrics.inject_requests.inc();
        let verdict = self.injected(request);
        match &verdict {
            Verdict::Allowed { .. } => self.metrics.inject_skip.inc(),
            Verdict::Patched { .. } => self.metrics.inject_success.inc(),
            Verdict::Denied { message, .. } => {
                tracing::warn!(namespace = request.namespace, message, "injection refused");
                self.metrics.inject_failure.inc()
            }
        };
        verdict
    }

    fn injected(&self, request: &AdmissionRequest) -> Verdict {
        let settings = self.shared.injector();
        let text = |key: &str| settings.get(key).map_or("", String::as_str);
        let config = match InjectorConfig::from_config_map(text("config"), text("values")) {
            Ok(config) => config,
            Err(error) => {
                return Verdict::denied(format!(
                    "ConfigMap {}/{}: {error}",
                    self.options.namespace,
                    revisioned(INJECTOR_CONFIG, &self.options.revision)
                ));
            }
        };
        let mesh = self.shared.mesh_config();
        let context = InjectContext {
            namespace: &request.namespace,
            namespace_labels: &self.shared.namespace_labels(&request.namespace),
            mesh: &mesh,
            config: &config,
            revision: &self.options.revision,
            native_sidecars: self.shared.native_sidecars(),
            workload: None,
        };
        match mesh_inject::inject(&request.object, &context) {
            Ok(Outcome::Skipped(reason)) => {
                tracing::debug!(namespace = request.namespace, %reason, "no sidecar");
                Verdict::Allowed {
                    warnings: Vec::new(),
                }
            }
            Ok(Outcome::Patched(patched)) => match serde_json::to_vec(&patched.patch) {
                Ok(patch) => Verdict::Patched {
                    patch,
                    warnings: patched.warnings,
                },
                Err(error) => Verdict::denied(error.to_string()),
            },
            Err(error) => Verdict::denied(error.to_string()),
        }
    }

    fn validate(&self, request: &AdmissionRequest) -> Verdict {
        let kind = request.object["kind"].as_str().unwrap_or_default();
        let ours = mesh_api::KINDS.iter().any(|info| info.kind == kind);
        // Deletions have no object; kinds that a newer installation registers are not ours to judge.
        if request.operation == "DELETE" || !ours {
            return Verdict::Allowed {
                warnings: Vec::new(),
            };
        }
        let verdict = judge(&request.object);
        match &verdict {
            Verdict::Denied { .. } => self
                .metrics
                .validation_failed
                .get_or_create(&resource(kind))
                .inc(),
            _ => self
                .metrics
                .validation_passed
                .get_or_create(&resource(kind))
                .inc(),
        };
        verdict
    }
}

#[cfg(test)]
mod messages;

/// Parses and checks an Istio object.
fn judge(object: &Value) -> Verdict {
    let parsed = match mesh_api::parse(object) {
        Ok(parsed) => parsed,
        Err(error) => return Verdict::denied(format!("configuration is invalid: {error}")),
    };
    let (mut errors, mut warnings) = (Vec::new(), Vec::new());
    for finding in mesh_api::validate(&parsed) {
        let text = match finding.field.as_str() {
            "" => finding.message.clone(),
            field => format!("{field}: {}", finding.message),
        };
        match finding.severity {
            mesh_api::Severity::Error => errors.push(text),
            mesh_api::Severity::Warning => warnings.push(text),
        }
    }
    warnings.extend(mesh_model::without_effect(&parsed));
    if let mesh_api::AnyObject::EnvoyFilter(filter) = &parsed {
        let unreadable = mesh_model::unreadable_patches(&filter.spec);
        errors.extend(
            unreadable
                .iter()
                .map(|(field, message)| format!("{field}: {message}")),
        );
    }
    if errors.is_empty() {
        return Verdict::Allowed { warnings };
    }
    Verdict::Denied {
        message: format!("configuration is invalid: {}", errors.join("; ")),
        warnings,
    }
}

impl Verdict {
    fn denied(message: String) -> Self {
        Self::Denied {
            message,
            warnings: Vec::new(),
        }
    }

    fn review(self, uid: &str) -> Value {
        let mut response = json!({ "uid": uid, "allowed": !matches!(self, Self::Denied { .. }) });
        let warnings = match self {
            Self::Allowed { warnings } => warnings,
            Self::Patched { patch, warnings } => {
                response["patchType"] = json!("JSONPatch");
                response["patch"] = json!(BASE64.encode(patch));
                warnings
            }
            Self::Denied { message, warnings } => {
                response["status"] = json!({
                    "status": "Failure",
                    "message": message,
                    "reason": "BadRequest",
                    "code": 400,
                });
                warnings
            }
        };
        if !warnings.is_empty() {
            response["warnings"] = json!(warnings);
        }
        json!({
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "response": response,
        })
    }
}

async fn inject(Extract(webhook): Extract<Webhook>, Json(review): Json<Review>) -> Response {
    if !webhook.shared.ready() {
        // The caller's failure policy decides; injecting with settings that have not been read would be wrong.
        let text = "the control plane is still reading the cluster's objects; try again";
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    }
    Json(webhook.inject(&review.request).review(&review.request.uid)).into_response()
}

async fn validate(Extract(webhook): Extract<Webhook>, Json(review): Json<Review>) -> Json<Value> {
    Json(
        webhook
            .validate(&review.request)
            .review(&review.request.uid),
    )
}

/// Serves the webhooks until no new connection is to be taken; ends when those that are there have their answers. A connection that comes before
/// there is a certificate waits for it.
pub(crate) async fn serve(
    listener: TcpListener,
    certificate: Certificate,
    webhook: Webhook,
    ending: Announced,
) -> Result<(), ControlError> {
    let router = webhook.router();
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut closing = std::pin::pin!(ending.clone().closing());
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            () = &mut closing => break,
        };
        let Ok(place) = place else {
            return Ok(());
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut closing => break,
        };
        while connections.try_join_next().is_some() {}
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Mostly too many open files: waiting is what helps.
                tracing::warn!(%error, "accepting a webhook connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (certificate, router, ending) = (certificate.clone(), router.clone(), ending.clone());
        connections.spawn(async move {
            connection(stream, certificate, router, ending).await;
            drop(place);
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

async fn connection(
    stream: TcpStream,
    certificate: Certificate,
    router: Router,
    ending: Announced,
) {
    let handshake = async {
        let config = loop {
            match certificate.config() {
                Some(config) => break config,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        tokio_rustls::TlsAcceptor::from(config).accept(stream).await
    };
    let stream = match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            return tracing::debug!(%error, "TLS handshake with a caller of the webhooks");
        }
        Err(_) => return,
    };
    let service = TowerToHyperService::new(router);
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(hyper_util::rt::TokioTimer::new())
        .header_read_timeout(HANDSHAKE);
    let mut serving = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let result = tokio::select! {
        result = serving.as_mut() => result,
        // Requests that are under way are answered; API servers keep connections open for the next one.
        () = ending.closing() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(error, "webhook connection");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn virtual_service(spec: Value) -> Value {
        json!({
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "reviews", "namespace": "default"},
            "spec": spec,
        })
    }

    #[test]
    fn a_good_object_passes_and_a_bad_one_is_refused_with_its_field() {
        let good = json!({"hosts": ["reviews"], "http": [{"route": [{"destination": {"host": "reviews"}}]}]});
        assert_eq!(
            judge(&virtual_service(good)).review("1")["response"]["allowed"],
            true
        );
        let unknown = json!({"hosts": ["reviews"], "http": [{"rooute": []}]});
        let review = judge(&virtual_service(unknown)).review("2");
        assert_eq!(review["response"]["allowed"], false);
        let message = review["response"]["status"]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            message.contains("spec.http[0]") && message.contains("rooute"),
            "{message}"
        );
        let nothing = json!({"hosts": ["reviews"], "http": [{"match": []}]});
        assert_eq!(
            judge(&virtual_service(nothing)).review("3")["response"]["allowed"],
            false
        );
    }
}
