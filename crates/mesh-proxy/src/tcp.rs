//! Plain TCP: bytes through, by splice.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use mesh_net::copy;
use mesh_net::splice::{Counters, bidirectional};
use mesh_routing::listener::Direction;
use mesh_routing::tcp::TcpProxy;
use mesh_telemetry::TcpHandles;
use tokio::time::Instant;

use crate::listener::Downstream;
use crate::listener::tenure::Tenancy;
use crate::pool::Host;
use crate::report::{Flag, Flags};
use crate::tls::wire::Wire;
use crate::upstream::Wish;

/// How often byte counters of open connections reach the metrics (Istio's `reportingInterval` is 15 s; ours costs next to nothing).
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Relays a connection until it ends.
pub async fn serve(connection: &Rc<Downstream>, proxy: &TcpProxy, mut stream: Wire, prefix: Bytes) {
    let worker = &connection.worker;
    let tenancy = connection.settle_in(connection.era());
    let snapshot = worker.snapshot();
    let name = proxy.cluster(worker.random());
    let Some(cluster) = snapshot.cluster(name) else {
        refused(connection, &worker.unrouted.clone(), Flag::NoCluster);
        return;
    };
    let state = worker.cluster_state(cluster);
    let reports = state.reports();
    let destination = connection.redirected.then_some(connection.destination);
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut upstream = None;
    let mut flag = Flag::NoHealthy;
    for _ in 0..proxy.max_connect_attempts {
        let wish = Wish {
            destination,
            hash: proxy.hash(connection.remote.ip()),
            tried: &tried,
            avoid: 5,
            ..Wish::default()
        };
        let Some(host) = state.pick(&wish, &worker.peers, || worker.random()) else {
            break;
        };
        match host
            .connect(&worker.shared, &cluster.config, connection.source)
            .await
        {
            Ok(opened) => {
                upstream = Some((host, opened));
                break;
            }
            Err(error) => {
                tracing::debug!(cluster = &**name, endpoint = %host.address, %error, "connecting");
                flag = Flag::ConnectFailure;
                tried.push(host.address);
            }
        }
    }
    drop(snapshot);
    let Some((host, mut upstream)) = upstream else {
        refused(connection, &reports, flag);
        return;
    };
    let principals = match connection.direction {
        Direction::Inbound => connection.principals.clone(),
        Direction::Outbound => upstream.principals.clone(),
    };
    let principals = principals.as_ref();
    let handles = reports.tcp(&host.peer, principals, connection.direction, Flags::NONE);
    let flags = relay(
        &host,
        &handles,
        &mut stream,
        &mut upstream.stream,
        &prefix,
        (proxy, &tenancy),
    )
    .await;
    match flags.is_empty() {
        true => handles.closed.inc(),
        false => reports
            .tcp(&host.peer, principals, connection.direction, flags)
            .closed
            .inc(),
    };
}

/// Moves the bytes until the connection ends; the answer is what is to be said of the end.
async fn relay(
    host: &Rc<Host>,
    handles: &TcpHandles,
    stream: &mut Wire,
    upstream: &mut Wire,
    prefix: &[u8],
    (proxy, tenancy): (&TcpProxy, &Tenancy),
) -> Flags {
    handles.opened.inc();
    host.active.set(host.active.get() + 1);
    let counters = Arc::new(Counters::default());
    let (mut received, mut sent) = (0, 0);
    let mut note = || {
        let (now_received, now_sent) = (
            counters.forward.load(Ordering::Relaxed),
            counters.backward.load(Ordering::Relaxed),
        );
        handles.received.inc_by(now_received - received);
        handles.sent.inc_by(now_sent - sent);
        (received, sent) = (now_received, now_sent);
    };
    let end = proxy.max_duration.map(|limit| Instant::now() + limit);
    let idle = proxy.idle_timeout;
    let copying = async {
        match (stream, upstream) {
            (Wire::Plain(a), Wire::Plain(b)) => bidirectional(a, b, prefix, idle, &counters).await,
            (a, b) => copy::bidirectional(a, b, prefix, idle, &counters).await,
        }
    };
    tokio::pin!(copying);
    let flags = loop {
        let far = Instant::now() + REPORT_EVERY;
        tokio::select! {
            end = &mut copying => {
                tracing::trace!(?end, endpoint = %host.address, "connection ended");
                break Flags::NONE;
            }
            () = tenancy.over() => {
                tracing::debug!(endpoint = %host.address, "closed: its filter chain was changed, and the drain time is over");
                break Flags::NONE;
            }
            () = tokio::time::sleep_until(end.map_or(far, |end| end.min(far))) => {
                if end.is_some_and(|end| end <= Instant::now()) {
                    break Flag::Duration.into();
                }
                note();
            }
        }
    };
    note();
    host.active.set(host.active.get() - 1);
    flags
}

/// A connection that found no endpoint counts as opened and closed, with the flag that says why.
fn refused(connection: &Downstream, reports: &crate::report::Reports, flags: impl Into<Flags>) {
    let handles = reports.tcp(
        connection.worker.peers.unknown(),
        connection.principals.as_ref(),
        connection.direction,
        flags.into(),
    );
    handles.opened.inc();
    handles.closed.inc();
}
