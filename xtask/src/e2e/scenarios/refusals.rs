//! Bad input: refused, with its reason.

use anyhow::{Context, bail, ensure};

use crate::e2e::cluster::Cluster;

fn refused(cluster: &Cluster, yaml: &str, words: &[&str]) -> anyhow::Result<()> {
    match cluster.apply(yaml) {
        Ok(printed) => bail!("accepted, but must be refused: {printed}\n{yaml}"),
        Err(error) => {
            let text = format!("{error:#}");
            for word in words {
                ensure!(
                    text.contains(word),
                    "the refusal does not say {word:?}: {text}"
                );
            }
            Ok(())
        }
    }
}

pub(super) fn bad_input(cluster: &mut Cluster) -> anyhow::Result<()> {
    refused(
        cluster,
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a\n",
        &["apply.yaml"],
    )?;
    refused(
        cluster,
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: bad}\nspec:\n  hosts: [reviews]\n  htpp: []\n",
        &["htpp"],
    )?;
    refused(
        cluster,
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: bad}\nspec:\n  hosts: [reviews]\n  http:\n  - route:\n    - destination: {host: reviews}\n      weight: -5\n",
        &["weight"],
    )?;
    let listed = cluster.get(&["virtualservices"])?;
    let names: Vec<_> = listed["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|v| v["metadata"]["name"] == "bad")
        .collect();
    ensure!(names.is_empty(), "a refused object was stored");
    cluster.apply("apiVersion: v1\nkind: Pod\nmetadata: {name: unknown-image}\nspec:\n  containers:\n  - {name: a, image: example/no-such-thing:1}\n")?;
    cluster.wait("the unknown image to be reported", || {
        let pod = cluster.get(&["pod", "unknown-image"])?;
        let reason = pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"]
            .as_str()
            .unwrap_or_default();
        Ok(["ErrImagePull", "ImagePullBackOff"]
            .contains(&reason)
            .then_some(()))
    })?;
    cluster.delete("pod", "unknown-image")?;
    port_in_use(cluster)
}

/// A second cluster on the first one's port is told so, with the flag to change, and starts nothing.
fn port_in_use(cluster: &Cluster) -> anyhow::Result<()> {
    let port = cluster
        .gateway
        .rsplit(':')
        .next()
        .context("the gateway has no port")?
        .to_owned();
    let output = cluster.second(&[
        "all-in-one",
        "--state-dir",
        "",
        "--api-port",
        "0",
        "--https-port",
        "0",
        "--http-port",
        &port,
    ])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success(),
        "a second cluster started on port {port}"
    );
    for word in [port.as_str(), "in use", "--http-port"] {
        ensure!(
            said.contains(word),
            "the refusal does not say {word:?}: {said}"
        );
    }
    Ok(())
}
