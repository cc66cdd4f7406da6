//! Plain TCP: bytes through, by splice; in a tunnel where the configuration says so.

mod tunnel;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use mesh_net::copy;
use mesh_net::splice::{Counters, End, bidirectional};
use mesh_routing::cluster::Cluster;
use mesh_routing::listener::Direction;
use mesh_routing::tcp::TcpProxy;
use mesh_telemetry::TcpHandles;
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

use crate::listener::Downstream;
use crate::listener::tenure::Tenancy;
use crate::pool::{ConnectError, Host, TcpUpstream};
use crate::report::principals::Principals;
use crate::report::{Flag, Flags};
use crate::tls::wire::Wire;
use crate::upstream::counters::Counter;
use crate::upstream::{ClusterState, Wish};
use tunnel::{Bodies, Far, TunnelError};

/// How often byte counters of open connections reach the metrics (Istio's `reportingInterval` is 15 s; ours costs next to nothing).
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Relays a connection until it ends. `server_name` is the name that the client asked for, empty where there is none.
pub async fn serve(
    connection: &Rc<Downstream>,
    proxy: &TcpProxy,
    (mut stream, prefix): (Wire, Bytes),
    server_name: &str,
) {
    let worker = &connection.worker;
    let tenancy = connection.settle_in(connection.era());
    let snapshot = worker.snapshot();
    let name = proxy.cluster(worker.random());
    let Some(cluster) = snapshot.cluster(name).cloned() else {
        refused(connection, &worker.unrouted.clone(), Flag::NoCluster);
        return;
    };
    drop(snapshot);
    let state = worker.cluster_state(&cluster);
    let reports = state.reports();
    // Envoy's timer too begins with the connection.
    let end = proxy.max_duration.map(|limit| Instant::now() + limit);
    let opened = tokio::select! {
        opened = open(connection, proxy, (&cluster, &state), server_name) => opened,
        () = tenancy.over() => Err(Flags::NONE),
        () = until(end) => Err(Flag::Duration.into()),
    };
    let (host, mut upstream) = match opened {
        Ok(opened) => opened,
        Err(flags) => {
            refused(connection, &reports, flags);
            return;
        }
    };
    drop(cluster);
    let principals = match connection.direction {
        Direction::Inbound => connection.principals.clone(),
        Direction::Outbound => upstream.principals(),
    };
    let principals = principals.as_ref();
    let handles = reports.tcp(&host.peer, principals, connection.direction, Flags::NONE);
    let flags = relay(
        &host,
        &handles,
        &mut stream,
        &mut upstream,
        &prefix,
        (proxy.idle_timeout, end, &tenancy),
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

/// Waits for a time, for ever where there is none.
async fn until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

/// The other side of a connection.
enum Upstream {
    /// The endpoint itself.
    Direct(TcpUpstream),
    /// What is behind a tunnel that the endpoint has opened. Boxed, since it is large and rare.
    Tunnel(Box<tunnel::Opened>),
}

impl Upstream {
    /// What both sides of the connection to the endpoint have proved, in mutual TLS.
    fn principals(&self) -> Option<Arc<Principals>> {
        match self {
            Self::Direct(direct) => direct.principals.clone(),
            Self::Tunnel(opened) => opened.principals.clone(),
        }
    }
}

/// Tries endpoints until one is connected, and has opened the tunnel where there is to be one; else why there is none.
async fn open(
    connection: &Downstream,
    proxy: &TcpProxy,
    (cluster, state): (&Cluster, &ClusterState),
    server_name: &str,
) -> Result<(Rc<Host>, Upstream), Flags> {
    let worker = &connection.worker;
    let destination = connection.redirected.then_some(connection.destination);
    let tls = connection.wish_for(&cluster.config.transports);
    let mut tried: Vec<SocketAddr> = Vec::new();
    for _ in 0..proxy.max_connect_attempts {
        let wish = Wish {
            destination,
            hash: proxy.hash(connection.remote.ip()),
            tried: &tried,
            avoid: 5,
            ..Wish::default()
        };
        let Some(host) = state.pick(&wish, &worker.peers, || worker.random()) else {
            let mut flags = Flags::from(Flag::NoHealthy);
            if !tried.is_empty() {
                flags.add(Flag::ConnectFailure);
            }
            return Err(flags);
        };
        let connected = match &proxy.tunnel {
            None => host
                .connect(&worker.shared, &cluster.config, &tls)
                .await
                .map(Upstream::Direct)
                .map_err(TunnelError::Connect),
            Some(tunnel) => {
                let asking = tunnel::Asking {
                    connection,
                    server_name,
                    tunnel,
                    wish: &tls,
                    patience: proxy.idle_timeout,
                };
                let opened = Box::pin(asking.open(&host, cluster)).await;
                opened.map(|opened| Upstream::Tunnel(Box::new(opened)))
            }
        };
        match connected {
            Ok(opened) => return Ok((host, opened)),
            Err(error) => {
                tracing::debug!(cluster = &*cluster.config.name, endpoint = %host.address, %error, "connecting");
                if matches!(error, TunnelError::Connect(ConnectError::Overflow)) {
                    return Err(Flag::Overflow.into());
                }
                tried.push(host.address);
            }
        }
    }
    // As Envoy's TCP proxy says it, also after a single attempt.
    state.count(Counter::CxAttemptsExceeded);
    let mut flags = Flags::from(Flag::ConnectFailure);
    flags.add(Flag::RetryLimit);
    Err(flags)
}

/// Moves the bytes until the connection ends; the answer is what is to be said of the end.
async fn relay(
    host: &Rc<Host>,
    handles: &TcpHandles,
    stream: &mut Wire,
    upstream: &mut Upstream,
    prefix: &[u8],
    (idle, end, tenancy): (Option<Duration>, Option<Instant>, &Tenancy),
) -> Flags {
    handles.opened.inc();
    // What runs in a tunnel is counted as the request that opened it.
    let active = u32::from(matches!(upstream, Upstream::Direct(_)));
    host.active.set(host.active.get() + active);
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
    let copying = async {
        let mut far = match upstream {
            Upstream::Direct(direct) => Side::Wire(&mut direct.stream),
            Upstream::Tunnel(opened) => {
                let early = std::mem::take(&mut opened.early);
                if !pass_early(stream, &early, idle, &counters).await {
                    return End::Idle;
                }
                match &mut opened.far {
                    Far::Wire(wire) => Side::Wire(wire),
                    Far::Stream(stream) => Side::Stream(stream),
                    Far::Bodies(bodies) => Side::Bodies(bodies),
                }
            }
        };
        match (stream, &mut far) {
            (Wire::Plain(a), Side::Wire(Wire::Plain(b))) => {
                bidirectional(a, b, prefix, idle, &counters).await
            }
            (a, Side::Wire(b)) => copy::bidirectional(a, *b, prefix, idle, &counters).await,
            (a, Side::Stream(b)) => copy::bidirectional(a, *b, prefix, idle, &counters).await,
            (a, Side::Bodies(b)) => copy::bidirectional(a, *b, prefix, idle, &counters).await,
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
    host.active.set(host.active.get() - active);
    flags
}

/// What the client's bytes are exchanged with.
enum Side<'a> {
    Wire(&'a mut Wire),
    Stream(&'a mut TokioIo<Upgraded>),
    Bodies(&'a mut Bodies),
}

/// Hands on what came together with the agreement to the tunnel; false where the client does not take it.
async fn pass_early(
    stream: &mut Wire,
    early: &[u8],
    idle: Option<Duration>,
    counters: &Counters,
) -> bool {
    if early.is_empty() {
        return true;
    }
    let writing = async {
        stream.write_all(early).await?;
        stream.flush().await
    };
    let written = match idle {
        Some(idle) => tokio::time::timeout(idle, writing).await,
        None => Ok(writing.await),
    };
    let bytes = early.len() as u64;
    counters.backward.fetch_add(bytes, Ordering::Relaxed);
    matches!(written, Ok(Ok(())))
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
