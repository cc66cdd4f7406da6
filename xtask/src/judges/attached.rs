//! `mesh all-in-one --in-cluster`: one pod that is control plane, injector and gateway of a cluster without a mesh.

use std::path::Path;

use anyhow::Context;

use crate::e2e::{Cluster, Objects};
use crate::run;

/// The manifest that the documentation gives.
const MANIFEST: &str = "docs/all-in-one.yaml";

const NAMESPACE: &str = "{apiVersion: v1, kind: Namespace, metadata: {name: default, labels: {istio-injection: enabled}}}";

/// The first page through the gateway in that pod, over mutual TLS; then everything is removed, and the API is as it was.
pub fn run(mesh: &Path) -> anyhow::Result<()> {
    let cluster = Cluster::empty(mesh, None)?;
    let verdict = judge(&cluster);
    if verdict.is_err() {
        cluster.show_state();
        let log = cluster.call(&["logs", "-n", "istio-system", "deployment/mesh"]);
        eprintln!("--- the pod's log\n{}", log.unwrap_or_default());
    }
    verdict.and(cluster.stop())
}

fn judge(cluster: &Cluster) -> anyhow::Result<()> {
    let before = Objects::read(cluster)?;
    let pod = std::fs::read_to_string(run::root().join(MANIFEST))?;
    cluster.apply(&pod)?;
    cluster.wait("the pod to be ready", || {
        ready(cluster, "istio-system", "mesh")
    })?;
    cluster.apply(NAMESPACE)?;
    let bookinfo =
        |file: &str| std::fs::read_to_string(run::root().join("samples/bookinfo").join(file));
    let page = bookinfo("platform/kube/bookinfo.yaml")?;
    cluster.apply(&page)?;
    let rules = bookinfo("networking/bookinfo-gateway.yaml")?;
    // The webhook that judges them may not be reached yet.
    cluster.wait("the gateway's rules to be taken", || {
        cluster.apply(&rules).map(Some)
    })?;
    cluster.wait("the product page's pod", || {
        ready(cluster, "default", "productpage-v1")
    })?;
    let from = cluster.pods("app=ratings")?;
    let from = from.first().context("ratings has no pod")?;
    let url = "http://istio-ingressgateway.istio-system/productpage";
    cluster.wait("the first page", || {
        let args = ["-o", "/dev/null", "-w", "%{http_code}", url];
        let code = cluster.curl(from, "istio-proxy", &args)?;
        Ok((code.trim() == "200").then_some(()))
    })?;
    let mutual = "connection_security_policy=\"mutual_tls\"";
    let page = cluster.pods("app=productpage")?;
    let page = page.first().context("productpage has no pod")?;
    let metrics = cluster.curl(
        page,
        "istio-proxy",
        &["http://127.0.0.1:15090/stats/prometheus"],
    )?;
    let seen = |line: &str| {
        line.contains(mutual) && line.contains("source_workload=\"istio-ingressgateway\"")
    };
    metrics
        .lines()
        .find(|line| seen(line))
        .context("the product page has not seen the gateway over mutual TLS")?;
    cluster.delete_all(&rules)?;
    cluster.delete_all(&bookinfo("platform/kube/bookinfo.yaml")?)?;
    cluster.call(&["delete", "deployment", "mesh", "-n", "istio-system"])?;
    cluster.wait("the pod to end", || {
        let pods = cluster.get(&["pods", "-n", "istio-system"])?;
        Ok(pods["items"]
            .as_array()
            .is_some_and(Vec::is_empty)
            .then_some(()))
    })?;
    cluster.mesh(&["uninstall", "--purge", "-y"])?;
    cluster.delete_all(&pod)?;
    cluster.apply("{apiVersion: v1, kind: Namespace, metadata: {name: default}}")?;
    cluster
        .wait("the API to be as it was", || before.same(cluster).map(Some))
        .context("after uninstall --purge")
}

fn ready(cluster: &Cluster, namespace: &str, deployment: &str) -> anyhow::Result<Option<()>> {
    let found = cluster.get(&["deployment", deployment, "-n", namespace])?;
    Ok((found["status"]["availableReplicas"] == 1).then_some(()))
}
