//! Filters that decide who may connect: access control and external authorization below HTTP.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mesh_routing::chain::{FilterChain, Guard};
use mesh_routing::dynamic::Dynamic;
use mesh_routing::filter::rbac::{ConnectionRbac, Facts, NETWORK_SECTION};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::rbac::{RbacStats, findings, name_of};
use super::{Notes, check};
use crate::listener::Downstream;

/// How long a refused connection may wait with its first byte.
const PATIENCE: Duration = Duration::from_secs(15);

/// May the connection pass? `server_name`: what the client asked for, if it speaks TLS (ended here or not).
///
/// Envoy judges when the first byte comes and has connected to the endpoint by then; here nothing reaches the endpoint before.
pub async fn admits(
    connection: &Rc<Downstream>,
    chain: &FilterChain,
    server_name: Option<&str>,
) -> bool {
    let mut notes = Notes::default();
    for guard in &chain.guards {
        let admitted = match guard {
            Guard::Rbac(rbac) => judge(connection, rbac, server_name, &mut notes).await,
            Guard::ExtAuthz(filter) => {
                let metadata: Option<&Dynamic> = notes.metadata.as_deref();
                match filter.asks(metadata) {
                    true => Box::pin(check::connection(connection, filter, &notes)).await,
                    false => true,
                }
            }
        };
        if !admitted {
            return false;
        }
    }
    true
}

async fn judge(
    connection: &Rc<Downstream>,
    rbac: &Arc<ConnectionRbac>,
    server_name: Option<&str>,
    notes: &mut Notes,
) -> bool {
    let counters = &connection.worker.shared.counters;
    let stats = counters.connection_rbac(rbac, || {
        let shadow = rbac.shadow.as_ref().map_or("", |shadow| &shadow.prefix);
        RbacStats::new(&counters.stats, &rbac.stats, "", shadow)
    });
    let direct = connection.remote.ip();
    let facts = Facts {
        request: None,
        direct,
        remote: direct,
        destination: connection.destination,
        server_name: server_name.unwrap_or(""),
        tls: connection.tls.as_deref(),
        metadata: None,
    };
    if let Some(shadow) = &rbac.shadow {
        let verdict = shadow.rules.judge(&facts);
        stats.count_shadow(verdict.allowed);
        notes.add(NETWORK_SECTION, findings(shadow, verdict));
    }
    let Some(engine) = &rbac.rules else {
        return true;
    };
    let verdict = engine.judge(&Facts {
        metadata: notes.metadata.as_deref(),
        ..facts
    });
    stats.count(verdict.allowed);
    if !verdict.allowed {
        tracing::debug!(
            remote = %connection.remote,
            destination = %connection.destination,
            details = %format_args!("rbac_access_denied_matched_policy[{}]", name_of(verdict)),
            "refused"
        );
        if let Some(delay) = rbac.delay {
            tokio::time::sleep(delay).await;
        }
    }
    verdict.allowed
}

/// Waits until a refused client has said something, as Envoy does, or for a while: who only looks whether the port is open sees it open.
pub async fn wait_for_first_byte<S: AsyncRead + Unpin>(stream: &mut S, seen: &[u8]) {
    if seen.is_empty() {
        // What is read does not make the kernel reset the connection; what is not, does. Either way it ends now.
        let mut bytes = vec![0; 4096];
        let _ = tokio::time::timeout(PATIENCE, stream.read(&mut bytes)).await;
    }
}
