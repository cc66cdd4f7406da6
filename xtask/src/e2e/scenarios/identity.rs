//! Certificates: what each proxy has, and a new root for all of them while traffic runs.

use anyhow::{Context, ensure};

use super::load::Load;
use crate::e2e::cluster::Cluster;

/// A proxy's certificates, one row each.
fn rows(cluster: &Cluster, target: &str) -> anyhow::Result<Vec<Vec<String>>> {
    let table = cluster.mesh(&["proxy-config", "secret", target])?;
    let cells = |line: &str| {
        let cells = line
            .split("   ")
            .map(str::trim)
            .filter(|cell| !cell.is_empty());
        cells.map(str::to_owned).collect()
    };
    Ok(table.lines().skip(1).map(cells).collect())
}

/// Serial numbers of a proxy's secret of a name.
fn serials(cluster: &Cluster, target: &str, name: &str) -> anyhow::Result<Vec<String>> {
    let rows = rows(cluster, target)?;
    let of_name = rows
        .into_iter()
        .filter(|row| row.first().is_some_and(|cell| cell == name));
    of_name
        .map(|row| {
            ensure!(
                row.get(3).is_some_and(|valid| valid == "true"),
                "{target}: {row:?} is not valid"
            );
            row.into_iter().nth(4).context("no serial number")
        })
        .collect()
}

/// Every proxy has a certificate, and the same root.
pub(super) fn shown(cluster: &mut Cluster) -> anyhow::Result<()> {
    let mut roots = Vec::new();
    for target in [
        "deployment/productpage-v1",
        "deployment/reviews-v1",
        "deployment/ratings-v1",
    ] {
        let own = serials(cluster, target, "default")?;
        ensure!(own.len() == 1, "{target} has the certificates {own:?}");
        roots.push(serials(cluster, target, "ROOTCA")?);
    }
    ensure!(
        roots[0].len() == 1 && roots.iter().all(|root| *root == roots[0]),
        "the proxies trust {roots:?}"
    );
    let same = cluster.mesh(&[
        "proxy-config",
        "rootca-compare",
        "deployment/productpage-v1",
        "deployment/reviews-v1",
    ])?;
    ensure!(same.contains("in common"), "{same}");
    let map = cluster.get(&["configmap", "istio-ca-root-cert"])?;
    let text = map["data"]["root-cert.pem"].as_str().unwrap_or_default();
    ensure!(
        text.contains("BEGIN CERTIFICATE") && !text.contains("PRIVATE KEY"),
        "{text}"
    );
    Ok(())
}

/// The root changes, every proxy's certificate with it, and no request fails.
pub(super) fn rotated_under_load(cluster: &mut Cluster) -> anyhow::Result<()> {
    const PROXY: &str = "deployment/reviews-v1";
    let before = (
        serials(cluster, PROXY, "default")?,
        serials(cluster, PROXY, "ROOTCA")?,
    );
    let load = Load::start(&cluster.gateway, 8, 100)?;
    let began = std::time::Instant::now();
    // A kubelet renews the volumes that the roots come in once a minute or so, and each of the three steps waits for the last proxy.
    let patience = if cluster.is_local() { "2m" } else { "8m" };
    let rotated = cluster.mesh(&["ca", "rotate", "--timeout", patience]);
    let took = began.elapsed();
    // Requests after the end of the old root count, too.
    std::thread::sleep(std::time::Duration::from_secs(2));
    let (sent, failures) = load.stop()?;
    let rotated = rotated?;
    ensure!(rotated.contains("done"), "{rotated}");
    ensure!(
        failures.is_empty(),
        "{} of {sent} requests failed, the first: {}",
        failures.len(),
        failures[0]
    );
    let after = cluster.wait("the new root alone", || {
        let after = (
            serials(cluster, PROXY, "default")?,
            serials(cluster, PROXY, "ROOTCA")?,
        );
        Ok((after.1.len() == 1).then_some(after))
    })?;
    ensure!(
        after.0 != before.0 && after.1 != before.1,
        "still {after:?}"
    );
    print!(
        "{sent} requests, a new root in {:.1} s; ",
        took.as_secs_f64()
    );
    shown(cluster)
}
