//! TCP traffic by weight, through a port of the gateway.

use anyhow::{Context, ensure};

use super::counted::rolled_out;
use super::samples::{sample, with};
use crate::e2e::cluster::Cluster;

const SERVERS: &str = sample!("tcp-echo/tcp-echo-services.yaml");
const ALL_V1: &str = sample!("tcp-echo/tcp-echo-all-v1.yaml");
const SOME_V2: &str = sample!("tcp-echo/tcp-echo-20-v2.yaml");

/// So many connections, each with one line; gives how many were answered by "one" and by "two".
fn asked(cluster: &Cluster, address: &str, count: usize) -> anyhow::Result<(usize, usize)> {
    let pods = cluster.pods("app=curl")?;
    let pod = pods.first().context("no pod of curl")?;
    let script = format!(
        "for i in $(seq {count}); do exec 3<>/dev/tcp/{address}/31400 && echo world >&3 && read -r -t 5 line <&3; echo \"$line\"; exec 3>&-; done"
    );
    let printed = cluster.exec(pod, "curl", &["bash", "-c", &script])?;
    let of = |word: &str| {
        printed
            .lines()
            .filter(|line| *line == format!("{word} world"))
            .count()
    };
    let (one, two) = (of("one"), of("two"));
    ensure!(
        one + two == count,
        "{count} connections brought {one} + {two} answers: {printed}"
    );
    Ok((one, two))
}

/// All to the first version, then one connection in five to the second.
pub(super) fn shifting(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[SERVERS, ALL_V1], |cluster| {
        rolled_out(cluster, "tcp-echo-v1")?;
        rolled_out(cluster, "tcp-echo-v2")?;
        let gateways = cluster.get(&[
            "pods",
            "-n",
            "istio-system",
            "-l",
            "app=istio-ingressgateway",
        ])?;
        let address = gateways["items"][0]["status"]["podIP"]
            .as_str()
            .context("the gateway has no address")?
            .to_owned();
        cluster.wait("the gateway's port", || {
            let (one, two) = asked(cluster, &address, 20)?;
            Ok((one == 20 && two == 0).then_some(()))
        })?;
        cluster.apply(SOME_V2)?;
        cluster.wait("the second version", || {
            Ok((asked(cluster, &address, 20)?.1 > 0).then_some(()))
        })?;
        let (one, two) = asked(cluster, &address, 300)?;
        // Five standard deviations of 300 draws at a fifth.
        ensure!(
            (26..=94).contains(&two),
            "the second version got {two} of 300, the first {one}"
        );
        Ok(())
    })
}
