//! The mesh's own pods are replaced while it works.

use anyhow::{Context, ensure};

use super::load::Load;
use crate::e2e::cluster::{Cluster, SETTINGS};

/// What is made anew, by a setting that says nothing else.
const REPLACED: [(&str, &str); 2] = [
    ("istiod", "components.pilot.k8s.podAnnotations.round"),
    (
        "istio-ingressgateway",
        "components.ingressGateways[name:istio-ingressgateway].k8s.podAnnotations.round",
    ),
];

/// An upgrade replaces control plane and gateway under a load that goes through both, and loses nothing; so does the way back.
pub(super) fn in_place(cluster: &mut Cluster) -> anyhow::Result<()> {
    let load = Load::start(&cluster.gateway, 8, 200)?;
    let done = replaced(cluster, true).and_then(|()| replaced(cluster, false));
    let (sent, failures) = load.stop()?;
    print!("{sent} requests; ");
    ensure!(
        failures.is_empty(),
        "{} of {sent} requests failed, the first: {:?}",
        failures.len(),
        failures.first()
    );
    done
}

fn replaced(cluster: &Cluster, annotated: bool) -> anyhow::Result<()> {
    let before = pods(cluster)?;
    let rounds = REPLACED.map(|(_, setting)| format!("{setting}=second"));
    let mut args = vec!["upgrade", "-y"];
    args.extend(SETTINGS);
    if annotated {
        args.extend(rounds.iter().flat_map(|round| ["--set", round]));
    }
    cluster.mesh(&args)?;
    cluster.wait("the old pods to go", || {
        let now = pods(cluster)?;
        Ok((!now.iter().any(|pod| before.contains(pod))).then_some(()))
    })
}

/// The pods of what is replaced, those that are ending too.
fn pods(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for (app, _) in REPLACED {
        let label = format!("app={app}");
        let list = cluster.get(&["pods", "-n", "istio-system", "-l", &label])?;
        let items = list["items"].as_array().context("a list of pods")?;
        ensure!(!items.is_empty(), "{app} has no pod");
        let names = items
            .iter()
            .filter_map(|pod| pod["metadata"]["name"].as_str());
        found.extend(names.map(str::to_owned));
    }
    Ok(found)
}
