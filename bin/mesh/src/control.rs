//! `mesh control`: the control plane.

use std::net::SocketAddr;
use std::process::ExitCode;

use mesh_cli::global::Global;
use mesh_control::{Control, Options};

/// Flags of `mesh control`, named as those of Istio's `pilot-discovery discovery`.
#[derive(clap::Args)]
pub struct Args {
    /// Discovery in plain text
    #[arg(
        long = "grpcAddr",
        value_name = "ADDR",
        default_value = "0.0.0.0:15010"
    )]
    grpc: SocketAddr,
    /// Webhooks for injection and validation
    #[arg(
        long = "httpsAddr",
        value_name = "ADDR",
        default_value = "0.0.0.0:15017"
    )]
    https: SocketAddr,
    /// Metrics
    #[arg(
        long = "monitoringAddr",
        value_name = "ADDR",
        default_value = "0.0.0.0:15014"
    )]
    monitoring: SocketAddr,
    /// Readiness, and debug pages for the loopback address
    #[arg(long = "httpAddr", value_name = "ADDR", default_value = "0.0.0.0:8080")]
    http: SocketAddr,
    /// Revision of this installation, where several run in one cluster
    #[arg(long, value_name = "NAME", env = "REVISION", default_value = "default")]
    revision: String,
    /// Log filter, such as info or mesh_control=debug
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
}

/// Runs the control plane until SIGTERM or SIGINT.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    mesh_telemetry::log::init(&args.log, false)?;
    let client =
        mesh_control::client(global.kubeconfig.as_deref(), global.context.as_deref()).await?;
    let options = Options {
        grpc: args.grpc,
        webhook: args.https,
        monitoring: args.monitoring,
        http: args.http,
        namespace: global.istio_namespace.clone(),
        ..Options::new(client, env!("CARGO_PKG_VERSION")).of_revision(&args.revision)
    };
    Control::bind(options).await?.run(stopped()).await?;
    Ok(ExitCode::SUCCESS)
}

async fn stopped() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
