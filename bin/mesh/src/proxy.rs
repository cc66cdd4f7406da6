//! `mesh proxy sidecar|router`: the proxy of a pod.

use std::process::ExitCode;

/// What the proxy is.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Role {
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
    role: Role,
    /// DNS domain of the pod's namespace
    #[arg(long, value_name = "DOMAIN")]
    domain: Option<String>,
    /// Log level of the data plane
    #[arg(long = "proxyLogLevel", value_name = "LEVEL", default_value = "warning")]
    proxy_log_level: String,
    /// Log levels of parts of the data plane, NAME:LEVEL, separated by commas
    #[arg(long = "proxyComponentLogLevel", value_name = "LEVELS")]
    proxy_component_log_level: Option<String>,
    /// Log level of the agent, SCOPE:LEVEL
    #[arg(long = "log_output_level", value_name = "LEVEL", default_value = "default:info")]
    log_output_level: String,
}

/// Runs the proxy until it is told to end.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let _ = (&args.domain, &args.proxy_log_level, &args.proxy_component_log_level, &args.log_output_level);
    match args.role {
        Role::Sidecar => {}
        Role::Router => {}
    }
    anyhow::bail!("to be wired")
}
