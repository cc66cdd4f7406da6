//! The backend and the proxies, each with the least configuration that forwards one port.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::Context;
use serde_json::json;

use super::{Peer, discovery, pinned};
use crate::judges::install;

/// Where our proxy tells whether it is ready.
pub(super) const HEALTH: u16 = 18095;

/// nginx with an answer of 1 KiB.
pub(super) fn nginx(place: &Path, port: u16) -> anyhow::Result<Child> {
    let program =
        install::debian("nginx", "nginx-light").or_else(|_| install::debian("nginx", "nginx"))?;
    let shown = place.display();
    let body = "x".repeat(1024);
    let config = format!(
        "daemon off; master_process off; worker_processes 1; pid {shown}/nginx.pid; error_log {shown}/nginx.log;\nevents {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 100000000; client_body_temp_path {shown}; proxy_temp_path {shown};\n\
         fastcgi_temp_path {shown}; uwsgi_temp_path {shown}; scgi_temp_path {shown};\n\
         server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ return 200 \"{body}\"; }} }} }}\n"
    );
    let file = place.join("nginx.conf");
    std::fs::write(&file, config)?;
    pinned(0, &program)
        .arg("-c")
        .arg(&file)
        .stderr(Stdio::null())
        .spawn()
        .context("starting nginx")
}

/// A stock Envoy with the same listener, route and cluster that our proxy gets.
pub(super) fn envoy(place: &Path, port: u16, backend: u16) -> anyhow::Result<Peer> {
    let child = envoy_with(place, discovery::Resources::new(port, backend), 77)?;
    Ok(Peer {
        name: "envoy",
        port,
        children: vec![child],
    })
}

/// An Envoy with these resources; `base` tells those of one machine apart.
pub(super) fn envoy_with(
    place: &Path,
    resources: discovery::Resources,
    base: u16,
) -> anyhow::Result<Child> {
    let program = install::envoy()?;
    let config = json!({
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 18015 + base}}},
        "static_resources": {"listeners": [resources.listener_with_route()], "clusters": [resources.static_cluster()]},
    });
    let file = place.join(format!("envoy-{base}.json"));
    std::fs::write(&file, config.to_string())?;
    pinned(1, &program)
        .args([
            "--concurrency",
            "1",
            "-l",
            "error",
            "--base-id",
            &base.to_string(),
            "-c",
        ])
        .arg(&file)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .context("starting Envoy")
}

pub(super) fn haproxy(place: &Path, port: u16, backend: u16) -> anyhow::Result<Peer> {
    let program = install::debian("haproxy", "haproxy")?;
    let config = format!(
        "global\n  nbthread 1\n  maxconn 4096\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n  http-reuse always\n\
         frontend in\n  bind 127.0.0.1:{port}\n  default_backend out\nbackend out\n  server one 127.0.0.1:{backend}\n"
    );
    let file = place.join("haproxy.cfg");
    std::fs::write(&file, config)?;
    let child = pinned(1, &program)
        .arg("-db")
        .arg("-f")
        .arg(&file)
        .stdout(Stdio::null())
        .spawn()
        .context("starting HAProxy")?;
    Ok(Peer {
        name: "haproxy",
        port,
        children: vec![child],
    })
}

/// Our proxy as a gateway of a discovery server that this process is.
pub(super) fn mesh(binary: &Path, place: &Path, port: u16, backend: u16) -> anyhow::Result<Peer> {
    let child = mesh_with(
        binary,
        place,
        discovery::Resources::new(port, backend),
        HEALTH,
    )?;
    Ok(Peer {
        name: "mesh",
        port,
        children: vec![child],
    })
}

/// Our proxy with these resources, which a discovery server in this process sends; its own ports lie around `health`.
pub(super) fn mesh_with(
    binary: &Path,
    place: &Path,
    resources: discovery::Resources,
    health: u16,
) -> anyhow::Result<Child> {
    mesh_of(binary, place, discovery::serve(resources)?, health)
}

/// Our proxy with the discovery server at `address`.
pub(super) fn mesh_of(
    binary: &Path,
    place: &Path,
    address: SocketAddr,
    health: u16,
) -> anyhow::Result<Child> {
    // On a port that is not the secure one: certificates and tokens of a mesh are not what is measured.
    let config = json!({"discoveryAddress": address.to_string(), "concurrency": 1, "proxyAdminPort": health - 2, "statusPort": health - 1});
    pinned(1, binary)
        .args(["proxy", "router"])
        .env("PROXY_CONFIG", config.to_string())
        .env("POD_NAME", "bench")
        .env("POD_NAMESPACE", "default")
        .env("INSTANCE_IP", "127.0.0.1")
        .env("ENVOY_STATUS_PORT", health.to_string())
        .env("ENVOY_PROMETHEUS_PORT", (health + 1).to_string())
        .env("MESH_STATE_DIR", place.join(format!("proxy-{health}")))
        .spawn()
        .with_context(|| format!("starting {}", binary.display()))
}
