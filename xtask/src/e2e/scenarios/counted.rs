//! Every hop goes through the proxies: what both reporters count is what was called.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::pods::wait_running;
use super::reviews::version_named;
use crate::e2e::cluster::Cluster;
use crate::e2e::http::{self, Client};

/// Bookinfo as it was applied; a part of it is applied again with one thing changed.
const BOOKINFO: &str = include_str!("../../../../samples/bookinfo/platform/kube/bookinfo.yaml");

/// An edge between two workloads, with how often it was taken.
type Edges = BTreeMap<(String, String), u64>;

/// What a number of product pages must have counted.
struct Pages {
    shown: u64,
    /// By version of reviews.
    versions: BTreeMap<&'static str, u64>,
}

impl Pages {
    /// Loads `count` pages one after the other; who wrote the reviews stands in each.
    fn load(cluster: &Cluster, count: u64) -> anyhow::Result<Self> {
        let client = Client::new(&cluster.gateway);
        let mut versions = BTreeMap::new();
        http::runtime()?.block_on(async {
            for _ in 0..count {
                let page = client.get("/productpage", &[]).await?;
                ensure!(
                    page.status == 200,
                    "the page answered {}: {}",
                    page.status,
                    page.body
                );
                *versions.entry(version_named(&page.body)?).or_insert(0) += 1;
            }
            Ok(())
        })?;
        Ok(Self {
            shown: count,
            versions,
        })
    }

    /// One page asks details once and reviews once; the versions with stars ask ratings.
    fn edges(&self) -> Edges {
        let mut edges = Edges::new();
        let mut add = |from: &str, to: &str, count: u64| {
            edges.insert((from.to_owned(), to.to_owned()), count);
        };
        add("istio-ingressgateway", "productpage-v1", self.shown);
        add("productpage-v1", "details-v1", self.shown);
        for version in ["v1", "v2", "v3"] {
            let count = self.versions.get(version).copied().unwrap_or(0);
            let reviews = format!("reviews-{version}");
            add("productpage-v1", &reviews, count);
            add(
                &reviews,
                "ratings-v1",
                if version == "v1" { 0 } else { count },
            );
        }
        edges
    }
}

/// The metrics of every pod that has a proxy, one text after the other: their labels say whose they are.
pub(super) fn scrape(cluster: &Cluster) -> anyhow::Result<String> {
    let pods = cluster.pods("app=curl")?;
    let client = pods.first().context("no pod of curl")?;
    let mut all = String::new();
    for namespace in ["default", "istio-system"] {
        let list = cluster.get(&["pods", "-n", namespace])?;
        for pod in list["items"].as_array().into_iter().flatten() {
            let address = pod["status"]["podIP"].as_str().unwrap_or_default();
            // A pod that is ending may be gone before it answers.
            let stays = pod["metadata"]["deletionTimestamp"].is_null()
                && pod["status"]["phase"] == "Running";
            if has_proxy(pod) && stays && !address.is_empty() {
                let url = format!("http://{address}:15090/stats/prometheus");
                all.push_str(&cluster.curl(client, "curl", &[&url])?);
            }
        }
    }
    Ok(all)
}

fn has_proxy(pod: &Value) -> bool {
    ["containers", "initContainers"]
        .iter()
        .flat_map(|list| pod["spec"][list].as_array().into_iter().flatten())
        .any(|container| container["name"] == "istio-proxy")
}

/// `istio_requests_total` by edge, as one reporter (`source` or `destination`) tells it.
fn counted_edges(metrics: &str, reporter: &str) -> Edges {
    let mut edges = Edges::new();
    for line in metrics
        .lines()
        .filter(|l| l.starts_with("istio_requests_total{"))
    {
        let Some(count) = line.rsplit(' ').next().and_then(|n| n.parse::<f64>().ok()) else {
            continue;
        };
        if label(line, "reporter") == Some(reporter)
            && let (Some(from), Some(to)) = (
                label(line, "source_workload"),
                label(line, "destination_workload"),
            )
        {
            *edges.entry((from.to_owned(), to.to_owned())).or_insert(0) += count as u64;
        }
    }
    edges
}

pub(super) fn label<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!("{name}=\""))?;
    rest.split_once('"').map(|(value, _)| value)
}

/// Loads pages and compares every edge, from both ends, with what the pages must have taken.
fn every_edge(cluster: &Cluster, pages: u64) -> anyhow::Result<()> {
    let before = scrape(cluster)?;
    let loaded = Pages::load(cluster, pages)?;
    let after = scrape(cluster)?;
    let mut wrong = Vec::new();
    for reporter in ["source", "destination"] {
        let (before, after) = (
            counted_edges(&before, reporter),
            counted_edges(&after, reporter),
        );
        for (edge, expected) in loaded.edges() {
            let count = |edges: &Edges| edges.get(&edge).copied().unwrap_or(0);
            let grown = count(&after).saturating_sub(count(&before));
            if grown != expected {
                let (from, to) = &edge;
                wrong.push(format!(
                    "{from} -> {to} by its {reporter}: {grown} counted, {expected} made"
                ));
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} of {pages} pages' edges differ: {}",
        wrong.len(),
        wrong.join("; ")
    );
    Ok(())
}

pub(super) fn counted(cluster: &mut Cluster) -> anyhow::Result<()> {
    every_edge(cluster, 60)
}

/// Bookinfo's product page with the right to take the capture rules of its own pod away.
fn productpage(open: bool) -> anyhow::Result<String> {
    let text = BOOKINFO
        .split("\n---\n")
        .find(|text| text.contains("kind: Deployment") && text.contains("name: productpage-v1"))
        .context("Bookinfo has no Deployment productpage-v1")?;
    let place = "        imagePullPolicy: IfNotPresent\n";
    ensure!(
        text.contains(place),
        "Bookinfo's manifest is not what this scenario expects:\n{text}"
    );
    let right = "        securityContext:\n          runAsUser: 0\n          capabilities: {add: [NET_ADMIN]}\n";
    Ok(if open {
        text.replace(place, &format!("{place}{right}"))
    } else {
        text.to_owned()
    })
}

/// The edges' check is one that can fail: without the capture rules in one pod it does, on exactly the edges of that pod.
pub(super) fn edges_uncaptured(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(&productpage(true)?)?;
    rolled_out(cluster, "productpage-v1")?;
    every_edge(cluster, 10).context("with the rules in place")?;
    let pods = cluster.pods("app=productpage")?;
    let pod = pods.first().context("no pod of productpage")?;
    // The gateway speaks TLS to a proxy that is not asked any more: it is told to speak plain text.
    cluster.apply(PLAIN)?;
    cluster.exec(pod, "productpage", &["mesh", "init", "--cleanup-only"])?;
    cluster.wait("a page without the capture rules", || {
        Ok(cluster.pages(1).is_ok().then_some(()))
    })?;
    let Err(error) = every_edge(cluster, 10) else {
        bail!("the edges of productpage are counted although its pod has no capture rules");
    };
    let text = error.to_string();
    for edge in [
        "istio-ingressgateway -> productpage-v1 by its destination: 0 counted, 10 made",
        "productpage-v1 -> details-v1 by its source: 0 counted, 10 made",
    ] {
        ensure!(
            text.contains(edge),
            "without capture rules {edge:?} is expected, but: {text}"
        );
    }
    ensure!(
        !text.contains("-> ratings-v1"),
        "the edges of other pods must be as before: {text}"
    );
    cluster.apply(&productpage(false)?)?;
    rolled_out(cluster, "productpage-v1")?;
    cluster.delete_all(PLAIN)
}

const PLAIN: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata:
  name: productpage-plain
  namespace: default
spec:
  host: productpage
  trafficPolicy: {tls: {mode: DISABLE}}
";

/// Waits until a Deployment has only pods of its newest template, all available.
pub(super) fn rolled_out(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    cluster.wait(&format!("deployment {name} to be rolled out"), || {
        let deployment = cluster.get(&["deployment", name])?;
        let (spec, status) = (&deployment["spec"], &deployment["status"]);
        let done = status["observedGeneration"] == deployment["metadata"]["generation"]
            && status["updatedReplicas"] == spec["replicas"]
            && status["availableReplicas"] == spec["replicas"]
            && status["replicas"] == spec["replicas"];
        Ok(done.then_some(()))
    })
}

/// The sum of `istio_requests_total` over the lines that carry all of `labels`, in the pods of an application.
fn counted_in(
    cluster: &Cluster,
    app: &str,
    container: &str,
    labels: &[(&str, &str)],
) -> anyhow::Result<u64> {
    let mut sum = 0.0;
    for pod in cluster.pods(&format!("app={app}"))? {
        let metrics = cluster.curl(
            &pod,
            container,
            &["http://127.0.0.1:15090/stats/prometheus"],
        )?;
        sum += metrics
            .lines()
            .filter(|l| l.starts_with("istio_requests_total{"))
            .filter(|l| {
                labels
                    .iter()
                    .all(|(name, value)| label(l, name) == Some(*value))
            })
            .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
            .sum::<f64>();
    }
    Ok(sum as u64)
}

const OPEN_CLIENT: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: open-client
  labels: {app: open-client}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: curl
    image: curlimages/curl:8.16.0
    command: [sleep, infinity]
    securityContext:
      runAsUser: 0
      capabilities: {add: [NET_ADMIN]}
";

pub(super) fn flushed(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply(OPEN_CLIENT)?;
    wait_running(cluster, "default", "open-client")?;
    let labels = [
        ("reporter", "source"),
        ("destination_service", "httpbin.default.svc.cluster.local"),
    ];
    let call = |cluster: &Cluster| -> anyhow::Result<u64> {
        let before = counted_in(cluster, "open-client", "curl", &labels)?;
        for _ in 0..5 {
            let code = cluster.curl(
                "open-client",
                "curl",
                &[
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code}",
                    "http://httpbin:8000/status/200",
                ],
            )?;
            ensure!(code.trim() == "200", "httpbin answered {code}");
        }
        Ok(counted_in(cluster, "open-client", "curl", &labels)? - before)
    };
    let captured = call(cluster)?;
    ensure!(
        captured == 5,
        "5 calls were made, {captured} were counted with the capture in place"
    );
    cluster.exec("open-client", "curl", &["mesh", "init", "--cleanup-only"])?;
    let captured = call(cluster)?;
    ensure!(
        captured == 0,
        "{captured} calls were counted although the capture rules are gone"
    );
    cluster.delete("pod", "open-client")
}
