//! The samples' own manifests, and taking away again what a scenario applied.

use anyhow::Context;

use crate::e2e::cluster::Cluster;

/// The text of a file below `samples/`; part of the program, which runs where there is no work tree.
macro_rules! sample {
    ($path:literal) => {
        include_str!(concat!("../../../../samples/", $path))
    };
}
pub(super) use sample;

/// Applies texts, runs `scenario`, and deletes all that was applied.
pub(super) fn with(
    cluster: &Cluster,
    texts: &[&str],
    scenario: impl FnOnce(&Cluster) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for text in texts {
        cluster.apply(text)?;
    }
    // After a failure what is there stays: it is what the failure has to be found by.
    scenario(cluster)?;
    for text in texts.iter().rev() {
        cluster.delete_all(text).context("cleaning up")?;
    }
    Ok(())
}
