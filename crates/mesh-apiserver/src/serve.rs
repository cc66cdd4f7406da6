//! The HTTP side: TLS connections, who is asking, and what a browser on another site may not do.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{AUTHORIZATION, HOST, ORIGIN};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::Identity;
use crate::errors::ApiError;
use crate::{ApiServer, dispatch, impersonate};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time that requests get to finish at the end.
const GRACE: Duration = Duration::from_millis(500);

#[derive(Clone)]
struct Gate {
    api: ApiServer,
    identity: Option<Identity>,
}

/// The whole service; with `identity`, all requests are that one's.
pub fn router(api: &ApiServer, identity: Option<Identity>) -> Router {
    let gate = Gate {
        api: api.clone(),
        identity,
    };
    Router::new()
        .fallback(dispatch::handle)
        .with_state(api.clone())
        .layer(axum::middleware::from_fn_with_state(gate, admit))
}

async fn admit(State(gate): State<Gate>, mut request: Request, next: Next) -> Response {
    match identify(&gate, &request) {
        Err(error) => error.into_response(),
        Ok(identity) => {
            request.extensions_mut().insert(identity);
            next.run(request).await
        }
    }
}

fn identify(gate: &Gate, request: &Request) -> Result<Identity, ApiError> {
    let own = match &gate.identity {
        Some(identity) => identity.clone(),
        None => {
            check_site(&gate.api, request)?;
            authenticated(gate, request)?
        }
    };
    impersonate::impersonated(&gate.api, own, request.headers())
}

/// Who sent a request; without credentials that is `system:anonymous`, who may do what its roles say.
fn authenticated(gate: &Gate, request: &Request) -> Result<Identity, ApiError> {
    let unauthorized = || ApiError::new(401, "Unauthorized", "Unauthorized");
    let header = request.headers().get(AUTHORIZATION);
    let Some(header) = header else {
        return Ok(Identity::anonymous());
    };
    let token = header
        .to_str()
        .ok()
        .and_then(|h| h.strip_prefix("Bearer "))
        .ok_or_else(unauthorized)?;
    match gate.api.authenticate(token.trim(), &[]) {
        Ok((identity, _)) => Ok(identity),
        Err(reason) => {
            tracing::debug!(%reason, "a bearer token was refused");
            Err(unauthorized())
        }
    }
}

/// A page of another site can make a browser send requests here, by a foreign `Origin` or, after DNS rebinding, a foreign `Host`.
fn check_site(api: &ApiServer, request: &Request) -> Result<(), ApiError> {
    let text = |name| request.headers().get(name).and_then(|v| v.to_str().ok());
    let authority = request.uri().authority().map(|a| a.as_str());
    let refuse = |what: &str, value: &str| {
        let message = format!(
            "{what} {value:?} is not this server; call it by the address in the kubeconfig"
        );
        Err(ApiError::new(403, "Forbidden", message))
    };
    if let Some(host) = authority.or_else(|| text(HOST))
        && !is_own_host(api, host_name(host))
    {
        return refuse("host", host);
    }
    match text(ORIGIN) {
        Some(origin)
            if !is_own_host(
                api,
                host_name(origin.split_once("://").map_or(origin, |(_, h)| h)),
            ) =>
        {
            refuse("origin", origin)
        }
        _ => Ok(()),
    }
}

fn host_name(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split(']').next().unwrap_or_default();
    }
    authority.split(':').next().unwrap_or_default()
}

fn is_own_host(api: &ApiServer, host: &str) -> bool {
    let own = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    if own.contains(&host) || api.options().allowed_hosts.iter().any(|h| h == host) {
        return true;
    }
    let Ok(address) = host.parse::<std::net::IpAddr>() else {
        return false;
    };
    let service = std::net::Ipv4Addr::from(api.service_range().0);
    // An address in the `Host` header can't come from DNS rebinding, which needs a name; only our own are taken all the same.
    address.is_loopback() || address == api.options().advertise.ip() || address == service
}

/// Accepts connections until `shutdown`.
pub async fn serve(
    api: &ApiServer,
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    shutdown: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(tls);
    let service = router(api, None);
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                tasks.spawn(connection(
                    stream,
                    acceptor.clone(),
                    service.clone(),
                    shutdown.clone(),
                ));
            }
            Err(error) => {
                // Out of file descriptors, most likely: others must end first.
                tracing::warn!(%error, "accepting a connection to the API failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

async fn connection(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    service: Router,
    shutdown: CancellationToken,
) {
    // Small answers must not wait for more.
    let _ = stream.set_nodelay(true);
    let tls = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake with an API client failed"),
        Err(_) => return tracing::debug!("an API client did not finish its TLS handshake in time"),
    };
    let builder = auto::Builder::new(TokioExecutor::new());
    let serving = builder
        .serve_connection_with_upgrades(TokioIo::new(tls), TowerToHyperService::new(service));
    tokio::pin!(serving);
    tokio::select! {
        result = serving.as_mut() => {
            if let Err(error) = result {
                tracing::debug!(%error, "a connection to the API ended");
            }
        }
        () = shutdown.cancelled() => {
            serving.as_mut().graceful_shutdown();
            let _ = tokio::time::timeout(GRACE, serving).await;
        }
    }
}
