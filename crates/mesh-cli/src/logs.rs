//! `mesh logs`: what containers wrote.

use std::process::ExitCode;

use serde_json::Value;

use crate::Global;
use crate::cluster::Cluster;
use crate::out::Out;
use crate::pods;

/// Show what a container wrote
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// POD or TYPE/NAME, for instance deployment/reviews-v1
    #[arg(value_name = "POD", required_unless_present = "selector")]
    pub target: Option<String>,
    /// Container; for injected pods, istio-proxy is the sidecar
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<String>,
    /// All pods with these labels
    #[arg(short = 'l', long, value_name = "LABELS", conflicts_with = "target")]
    pub selector: Option<String>,
    /// Go on showing what is written
    #[arg(short, long)]
    pub follow: bool,
    /// Last lines only
    #[arg(long, value_name = "LINES")]
    pub tail: Option<u64>,
    /// Only what is younger than this, for instance 5s, 2m or 3h
    #[arg(long, value_name = "DURATION")]
    pub since: Option<String>,
    /// The run before the last restart
    #[arg(short, long)]
    pub previous: bool,
    /// Times in front of the lines
    #[arg(long)]
    pub timestamps: bool,
}

/// Runs the command.
///
/// # Errors
/// No such pod or container, or nothing to show (a container that has not started).
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    let selected = match (&args.target, &args.selector) {
        (Some(target), _) => vec![pods::find(&cluster, target).await?],
        (None, Some(selector)) => pods::list(&cluster, selector).await?,
        (None, None) => Vec::new(),
    };
    if selected.is_empty() {
        eprintln!("No resources found in {} namespace.", cluster.namespace);
    }
    let since = args
        .since
        .as_deref()
        .map(str::parse::<mesh_api::Duration>)
        .transpose()?;
    let streams = selected
        .iter()
        .map(|pod| copy(&cluster, pod, &args, since, &global.out));
    futures::future::try_join_all(streams).await?;
    Ok(ExitCode::SUCCESS)
}

async fn copy(
    cluster: &Cluster,
    pod: &Value,
    args: &Args,
    since: Option<mesh_api::Duration>,
    out: &Out,
) -> anyhow::Result<()> {
    let container = pods::container(pod, args.container.as_deref())?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let mut path = format!(
        "/api/v1/namespaces/{}/pods/{name}/log?container={container}",
        cluster.namespace
    );
    for (flag, parameter) in [
        (args.follow, "&follow=true"),
        (args.previous, "&previous=true"),
        (args.timestamps, "&timestamps=true"),
    ] {
        if flag {
            path.push_str(parameter);
        }
    }
    if let Some(lines) = args.tail {
        path.push_str(&format!("&tailLines={lines}"));
    }
    if let Some(since) = since {
        path.push_str(&format!("&sinceSeconds={}", since.0.as_secs().max(1)));
    }
    cluster.print(&path, out).await
}
