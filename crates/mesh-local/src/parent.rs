//! The parent: stays in the host's namespaces, binds host ports, starts and ends the cluster.

use std::process::ExitCode;

use crate::ClusterOptions;

/// Runs the local cluster until it is stopped by SIGINT or SIGTERM. Must be called before any thread exists.
pub fn all_in_one(options: ClusterOptions) -> anyhow::Result<ExitCode> {
    let _ = options;
    anyhow::bail!("the local cluster is not built yet")
}
