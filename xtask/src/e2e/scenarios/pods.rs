//! Pods: those outside the mesh, whom the proxy runs as, and what is killed.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::load::Load;
use super::reviews::{SUBSETS, cleanup_reviews, live, only, weighted};
use crate::e2e::cluster::{Cluster, family, gone};

/// A pod without a proxy, in a namespace without injection.
pub(super) const OUTSIDE: &str = "
apiVersion: v1
kind: Namespace
metadata:
  name: outside
---
apiVersion: v1
kind: Pod
metadata:
  name: client
  namespace: outside
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: curl
    image: curlimages/curl:8.16.0
    command: [sleep, infinity]
";

pub(super) fn outside(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(SUBSETS)?;
    cluster.apply(&weighted(&[("v1", 100)]))?;
    live(cluster, "v1 alone", only("v1"))?;
    cluster.apply(OUTSIDE)?;
    cluster.wait("the client outside the mesh", || {
        let pod = cluster.get(&["pod", "client", "-n", "outside"])?;
        Ok((pod["status"]["phase"] == "Running").then_some(()))
    })?;
    let mut order = Vec::new();
    let calls = if cluster.is_local() { 12 } else { 40 };
    for _ in 0..calls {
        let args = [
            "curl",
            "-sS",
            "--max-time",
            "10",
            "http://reviews.default:9080/reviews/0",
        ];
        let body = cluster.exec_in("outside", "client", "curl", &args)?;
        let version = ["v1", "v2", "v3"]
            .into_iter()
            .find(|v| body.contains(&format!("reviews-{v}-")));
        order.push(version.with_context(|| format!("no version in {body}"))?);
    }
    // Other clusters choose at random.
    ensure!(
        !cluster.is_local() || (3..order.len()).all(|i| order[i] == order[i - 3]),
        "not in turn: {order:?}"
    );
    let kinds: std::collections::BTreeSet<_> = order.iter().collect();
    ensure!(
        kinds.len() == 3,
        "the mesh's rule reached a client outside the mesh: {order:?}"
    );
    cluster.call(&["delete", "pod", "client", "-n", "outside"])?;
    cluster.delete("namespace", "outside")?;
    cleanup_reviews(cluster)
}

pub(super) fn proxy_uid(cluster: &mut Cluster) -> anyhow::Result<()> {
    let pods = cluster.pods("app=productpage")?;
    let pod = pods.first().context("no pod of productpage")?;
    let map = cluster.exec(pod, "istio-proxy", &["cat", "/proc/self/uid_map"])?;
    let status = cluster.exec(pod, "istio-proxy", &["cat", "/proc/self/status"])?;
    let line = |name: &str| {
        status
            .lines()
            .find(|l| l.starts_with(name))
            .unwrap_or_default()
            .to_owned()
    };
    if maps(&map, 1337) {
        ensure!(
            line("Uid:").split_whitespace().nth(1) == Some("1337"),
            "the proxy's container runs as {}",
            line("Uid:")
        );
    } else {
        print!("uid 1337 is not mapped: the mark is the exemption; ");
        let effective = line("CapEff:")
            .split_whitespace()
            .nth(1)
            .map(|c| u64::from_str_radix(c, 16))
            .context("no CapEff")??;
        ensure!(
            effective >> 12 & 1 == 1,
            "the proxy may not set the mark: {}",
            line("CapEff:")
        );
        let app = cluster.exec(pod, "productpage", &["cat", "/proc/self/status"])?;
        let app = app
            .lines()
            .find_map(|l| l.strip_prefix("CapEff:"))
            .context("no CapEff")?;
        let app = u64::from_str_radix(app.trim(), 16)?;
        ensure!(
            app >> 12 & 3 == 0,
            "the application could set the mark: {app:x}"
        );
    }
    Ok(())
}

/// Whether a user namespace's map has a uid.
pub(super) fn maps(uid_map: &str, uid: u64) -> bool {
    uid_map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        matches!(numbers[..], [inside, _, count] if (inside..inside.saturating_add(count)).contains(&uid))
    })
}

pub(super) fn control_plane_away(cluster: &mut Cluster) -> anyhow::Result<()> {
    let load = Load::start(&cluster.gateway, 8, 200)?;
    cluster.call(&["delete", "pod", "-n", "istio-system", "-l", "app=istiod"])?;
    std::thread::sleep(Duration::from_millis(500));
    cluster.wait("the control plane to be back", || {
        let deployment = cluster.get(&["deployment", "istiod", "-n", "istio-system"])?;
        Ok((deployment["status"]["availableReplicas"] == 1).then_some(()))
    })?;
    // The webhook that validates may be reached a moment later than the pod is ready.
    cluster.wait("a rule to be taken again", || {
        cluster.apply(SUBSETS).map(Some)
    })?;
    cluster.apply(&weighted(&[("v2", 100)]))?;
    live(
        cluster,
        "a change after the control plane's return",
        only("v2"),
    )?;
    let (sent, failures) = load.stop()?;
    ensure!(
        failures.is_empty(),
        "{} of {sent} requests failed, the first: {}",
        failures.len(),
        failures[0]
    );
    cleanup_reviews(cluster)
}

/// How often a container was started again.
fn restarts(cluster: &Cluster, pod: &str, container: &str) -> anyhow::Result<(u64, bool)> {
    let pod = cluster.get(&["pod", pod])?;
    for list in ["initContainerStatuses", "containerStatuses"] {
        for status in pod["status"][list].as_array().into_iter().flatten() {
            if status["name"] == container {
                let ready = status["ready"] == true;
                return Ok((status["restartCount"].as_u64().unwrap_or(0), ready));
            }
        }
    }
    bail!("no container {container} in the pod's status")
}

pub(super) fn killed(cluster: &mut Cluster) -> anyhow::Result<()> {
    let pods = cluster.pods("app=httpbin")?;
    let pod = pods.first().context("no pod of httpbin")?.clone();
    let client_pods = cluster.pods("app=curl")?;
    let client = client_pods.first().context("no pod of curl")?;
    for (container, how) in [
        (
            "istio-proxy",
            &[
                "curl",
                "-sS",
                "-X",
                "POST",
                "http://127.0.0.1:15000/quitquitquit",
            ][..],
        ),
        (
            "httpbin",
            &["sh", "-c", "kill -9 $(pgrep -f 'sample httpbin' || echo 1)"][..],
        ),
    ] {
        let (before, _) = restarts(cluster, &pod, container)?;
        let began = Instant::now();
        // The command may be cut off together with what it kills.
        let _ = cluster.exec(&pod, container, how);
        cluster.wait(&format!("{container} to come back"), || {
            let (now, ready) = restarts(cluster, &pod, container)?;
            Ok((now > before && ready).then_some(()))
        })?;
        cluster.wait("httpbin to answer", || {
            let code = cluster.curl(
                client,
                "curl",
                &[
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code}",
                    "http://httpbin:8000/get",
                ],
            )?;
            Ok((code.trim() == "200").then_some(()))
        })?;
        print!(
            "{container} back and answering after {} ms; ",
            began.elapsed().as_millis()
        );
    }
    Ok(())
}

pub(super) fn survives(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kept}\ndata: {answer: \"42\"}\n",
    )?;
    let before = family(cluster.pid()?);
    cluster.kill_and_restart()?;
    gone(&before)?;
    let kept = cluster.get(&["configmap", "kept"])?;
    ensure!(
        kept["data"]["answer"] == "42",
        "the object is not what it was: {kept}"
    );
    print!(
        "first page again after {} ms; ",
        cluster.first_page.as_millis()
    );
    cluster.delete("configmap", "kept")
}

/// Waits until a pod is ready.
pub(super) fn wait_running(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<()> {
    cluster.wait(&format!("pod {pod} to be ready"), || {
        let pod = cluster.get(&["pod", pod, "-n", namespace])?;
        let conditions = pod["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        Ok(conditions
            .iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True")
            .then_some(()))
    })
}
