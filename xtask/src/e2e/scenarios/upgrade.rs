//! The mesh's own pods are replaced while it works.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::load::Load;
use super::pods::wait_running;
use crate::e2e::cluster::{Cluster, SETTINGS};

/// What is made anew, by a setting that says nothing else.
const REPLACED: [(&str, &str); 2] = [
    ("istiod", "components.pilot.k8s.podAnnotations.round"),
    (
        "istio-ingressgateway",
        "components.ingressGateways[name:istio-ingressgateway].k8s.podAnnotations.round",
    ),
];

/// The version that the pod [`OLDER`] gives itself out for.
const BEFORE: &str = "0.0.9";
/// Its proxy is of this version as all are here, but its image and what it says of itself name another: that of a workload which was not made
/// anew since an upgrade.
const OLDER: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: older
  namespace: default
  labels: {app: older}
  annotations:
    sidecar.istio.io/proxyImage: "mesh:0.0.9"
    proxy.istio.io/config: '{"proxyMetadata": {"ISTIO_META_MESH_VERSION": "0.0.9"}}'
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: curl, image: "curlimages/curl:8.16.0", command: [/bin/sleep, infinity]}]
"#;

/// An upgrade replaces control plane and gateway under a load that goes through both, and loses nothing; so does the way back. Beside the others
/// runs a workload with a proxy of another version, which all of this concerns, too; who looks at the versions sees both. (On a Kubernetes there
/// is no image for it.)
pub(super) fn in_place(cluster: &mut Cluster) -> anyhow::Result<()> {
    if !cluster.is_local() {
        return under_load(cluster);
    }
    cluster.apply(OLDER)?;
    wait_running(cluster, "default", "older")?;
    told_apart(cluster).context("before the upgrade")?;
    under_load(cluster)?;
    told_apart(cluster).context("after the upgrade")?;
    cluster.delete("pod", "older")
}

/// `mesh version` and the control plane's list of proxies tell both versions, and the older one has its configuration and its traffic.
fn told_apart(cluster: &Cluster) -> anyhow::Result<()> {
    let now = env!("CARGO_PKG_VERSION");
    let versions: Value = serde_json::from_str(&cluster.mesh(&["version", "-o", "json"])?)?;
    let listed = versions["dataPlaneVersion"].as_array();
    let instances = |version: &str| {
        let mut listed = listed.into_iter().flatten();
        listed.find(|entry| entry["version"] == version)?["instances"].as_u64()
    };
    ensure!(
        instances(BEFORE) == Some(1) && instances(now) > Some(1),
        "mesh version does not tell one proxy of {BEFORE} and several of {now}: {versions}"
    );
    cluster.wait("the control plane to list both versions", || {
        let list = cluster.get(&["pods", "-n", "istio-system", "-l", "app=istiod"])?;
        let plane = list["items"][0]["metadata"]["name"]
            .as_str()
            .unwrap_or_default();
        let ask = ["curl", "-sS", "http://localhost:8080/debug/syncz"];
        let rows = cluster.exec_in("istio-system", plane, "discovery", &ask)?;
        let rows: Vec<Value> = serde_json::from_str(&rows)?;
        let older = rows.iter().find(|row| row["proxy"] == "older.default");
        let synced = older.is_some_and(|row| {
            let kinds = ["cluster", "listener", "route", "endpoint"];
            row["istio_version"] == BEFORE
                && kinds.map(|kind| row[format!("{kind}_status")] == json!("SYNCED")) == [true; 4]
        });
        let others = rows.iter().any(|row| row["istio_version"] == now);
        Ok((synced && others).then_some(()))
    })?;
    let page = cluster.curl("older", "curl", &["-f", "http://reviews:9080/reviews/0"])?;
    ensure!(page.contains("reviewer"), "reviews answered {page:?}");
    Ok(())
}

fn under_load(cluster: &Cluster) -> anyhow::Result<()> {
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
