//! Ways of capture that a pod asks for by annotation: its DNS queries, and connections that keep the caller's address.

use anyhow::{Context, ensure};

use super::pods::maps;
use super::policy::{httpbin, namespace};
use super::samples::with;
use crate::e2e::cluster::Cluster;

const NAMESPACE: &str = "captured";

/// A pod that requests are sent from, whose proxy answers its DNS queries.
const ASKER: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: asker
  namespace: captured
  annotations:
    proxy.istio.io/config: |
      proxyMetadata:
        ISTIO_META_DNS_CAPTURE: 'true'
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: curl, image: 'curlimages/curl:8.16.0', command: [sleep, infinity]}]
";

/// The status of a request that the pod sends.
fn asked(cluster: &Cluster, pod: &str, url: &str) -> anyhow::Result<String> {
    let args = ["curl", "-sS", "-o", "/dev/null", "--max-time", "8"];
    let command = [&args[..], &["-w", "%{http_code}", url]].concat();
    cluster.exec_in(NAMESPACE, pod, "curl", &command)
}

/// What the proxy beside the pod says on the agent's port, asked as people do it with Istio's agent.
fn agent(cluster: &Cluster, pod: &str, path: &str) -> anyhow::Result<String> {
    let command = ["pilot-agent", "request", "--debug-port=15020", "GET", path];
    cluster.exec_in(NAMESPACE, pod, "istio-proxy", &command)
}

/// How many queries came, and how many of them went on to the cluster's DNS.
fn queries(cluster: &Cluster) -> anyhow::Result<(u64, u64)> {
    let text = agent(cluster, "asker", "metrics")?;
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|number| number.trim().parse().ok());
        number.with_context(|| format!("no {name} in the proxy's metrics"))
    };
    Ok((
        number("istio_agent_dns_requests_total")?,
        number("istio_agent_dns_upstream_requests_total")?,
    ))
}

/// Names of services are answered beside the application; the cluster's DNS is asked for the rest alone.
pub(super) fn names(cluster: &mut Cluster) -> anyhow::Result<()> {
    let namespace = namespace(NAMESPACE);
    with(cluster, &[&namespace, ASKER], |cluster| {
        let details = "http://details.default:9080/details/0";
        cluster.wait("the pod whose queries are captured", || {
            Ok((asked(cluster, "asker", details)? == "200").then_some(()))
        })?;
        // Where capture goes by a mark, the proxy's own queries for the control plane were captured, too, and went on.
        let before = queries(cluster)?;
        asked(cluster, "asker", details)?;
        let after = queries(cluster)?;
        ensure!(
            after.0 > before.0 && after.1 == before.1,
            "queries for a service went on to the cluster's DNS, or never came: {before:?}, then {after:?} (all, forwarded)"
        );
        let table = agent(cluster, "asker", "debug/ndsz")?;
        ensure!(
            table.contains("details.default.svc.cluster.local"),
            "the service is not in the table of names: {table}"
        );
        let nobody = "http://nobody.default.svc.cluster.local.:9080/";
        let answer = asked(cluster, "asker", nobody);
        ensure!(answer.is_err(), "there is nobody, but {answer:?} came");
        ensure!(
            queries(cluster)?.1 > after.1,
            "a name that the mesh does not know was not asked of the cluster's DNS"
        );
        Ok(())
    })
}

/// Whether capture can go by the proxy's user: on a local cluster without root there is no such one.
fn has_proxys_uid(cluster: &Cluster) -> anyhow::Result<bool> {
    if !cluster.is_local() {
        return Ok(true);
    }
    let command = ["cat", "/proc/self/uid_map"];
    let map = cluster.wait("the client", || {
        cluster
            .exec_in(NAMESPACE, "asker", "curl", &command)
            .map(Some)
    })?;
    Ok(maps(&map, 1337))
}

/// Where TPROXY can't be had, the pod's init container says so by name.
fn refused(cluster: &Cluster) -> anyhow::Result<()> {
    print!("uid 1337 is not mapped: TPROXY is refused; ");
    let log = ["logs", "httpbin", "-n", NAMESPACE, "-c", "istio-init"];
    cluster.wait("the refusal of TPROXY", || {
        let log = cluster.call(&log)?;
        Ok(log
            .contains("interception mode TPROXY needs the proxy's user")
            .then_some(()))
    })
}

/// By TPROXY the application sees the caller's own address, through mutual TLS too.
pub(super) fn addresses(cluster: &mut Cluster) -> anyhow::Result<()> {
    let namespace = namespace(NAMESPACE);
    let mode = "annotations: {sidecar.istio.io/interceptionMode: TPROXY}, labels: {app: httpbin}";
    let server = httpbin(NAMESPACE).replace("labels: {app: httpbin}", mode);
    ensure!(
        server.contains("TPROXY"),
        "the server's manifest has changed"
    );
    with(cluster, &[&namespace, &server, ASKER], |cluster| {
        if !has_proxys_uid(cluster)? {
            return refused(cluster);
        }
        let url = "http://httpbin:8000/status/200";
        cluster.wait("the server that is reached by TPROXY", || {
            Ok((asked(cluster, "asker", url)? == "200").then_some(()))
        })?;
        let pod = cluster.get(&["pod", "asker", "-n", NAMESPACE])?;
        let address = pod["status"]["podIP"].as_str().context("no address")?;
        let log = ["logs", "httpbin", "-n", NAMESPACE, "-c", "httpbin"];
        cluster.wait("the caller's address in the server's log", || {
            let log = cluster.call(&log)?;
            ensure!(
                !log.contains("127.0.0.6"),
                "the server saw the proxy's address: {log}"
            );
            Ok(log.contains(address).then_some(()))
        })
    })
}
