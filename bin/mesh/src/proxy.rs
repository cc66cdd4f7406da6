//! `mesh proxy sidecar|router`: the proxy of a pod.

use std::process::ExitCode;

use mesh_proxy::{ProxyOptions, Role};

/// What the proxy is.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Kind {
    /// Beside an application.
    Sidecar,
    /// A gateway.
    Router,
}

/// Flags of `mesh proxy`, named as those of Istio's `pilot-agent proxy`. What it is and where it belongs comes from the environment
/// that the injector sets.
#[derive(clap::Args)]
pub struct Args {
    /// Beside an application, or a gateway
    #[arg(value_enum, default_value = "sidecar")]
    kind: Kind,
    /// DNS domain of the pod's namespace
    #[arg(long, value_name = "DOMAIN")]
    domain: Option<String>,
    /// Log level of the data plane: trace, debug, info, warning, error, critical, off
    #[arg(
        long = "proxyLogLevel",
        value_name = "LEVEL",
        default_value = "warning"
    )]
    proxy_log_level: String,
    /// Log levels of Envoy's components, NAME:LEVEL; reported, without effect: this data plane has one level
    #[arg(long = "proxyComponentLogLevel", value_name = "LEVELS")]
    proxy_component_log_level: Option<String>,
    /// Log level of everything else, SCOPE:LEVEL
    #[arg(
        long = "log_output_level",
        value_name = "LEVEL",
        default_value = "default:info"
    )]
    log_output_level: String,
}

/// Runs the proxy until it is told to end.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    mesh_telemetry::log::init(&args.filter(), false)?;
    open_files();
    if let Some(levels) = args
        .proxy_component_log_level
        .as_deref()
        .filter(|levels| *levels != "misc:error")
    {
        tracing::warn!(
            levels,
            "--proxyComponentLogLevel has no effect: this data plane has no Envoy components"
        );
    }
    let role = match args.kind {
        Kind::Sidecar => Role::Sidecar,
        Kind::Router => Role::Router,
    };
    let mut options = ProxyOptions::from_env(role)?;
    if let Some(domain) = args.domain {
        options.domain = domain;
    }
    mesh_proxy::run(options)?;
    Ok(ExitCode::SUCCESS)
}

/// Takes as many open files as are allowed. Without, a proxy or control plane does less, but works.
pub(crate) fn open_files() {
    match mesh_net::sockets::raise_open_files() {
        Ok(limit) => tracing::debug!(limit, "open files"),
        Err(error) => tracing::warn!(%error, "raising the limit of open files"),
    }
}

impl Args {
    /// The agent's level for all, the data plane's for what is the data plane.
    fn filter(&self) -> String {
        let agent = self
            .log_output_level
            .rsplit(':')
            .next()
            .map_or("info", level);
        format!(
            "{agent},mesh_proxy={},mesh_routing={}",
            level(&self.proxy_log_level),
            level(&self.proxy_log_level)
        )
    }
}

/// Envoy's and Istio's names for log levels, in ours.
fn level(name: &str) -> &str {
    match name {
        "warning" => "warn",
        "critical" | "fatal" => "error",
        "none" => "off",
        other => other,
    }
}
