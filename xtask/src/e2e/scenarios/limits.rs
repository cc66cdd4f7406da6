//! Circuit breaking under a load generator, copies of requests, and rate limits.

use anyhow::{Context, ensure};

use super::counted::rolled_out;
use super::pods::wait_running;
use super::samples::{sample, with};
use crate::e2e::cluster::Cluster;

const FORTIO: &str = sample!("httpbin/sample-client/fortio-deploy.yaml");

/// The limits of the field's task.
const BREAKER: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: httpbin}
spec:
  host: httpbin
  trafficPolicy:
    connectionPool:
      tcp: {maxConnections: 1}
      http: {http1MaxPendingRequests: 1, maxRequestsPerConnection: 1}
    outlierDetection: {consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 3m, maxEjectionPercent: 100}
";

/// Lines of Fortio's report: `Code 200 : 19 (63.3 %)`.
pub(super) fn codes(report: &str) -> Vec<(String, u64)> {
    report
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(" : ")?;
            let count = rest.split_whitespace().next()?.parse().ok()?;
            Some((name.trim().to_owned(), count))
        })
        .collect()
}

/// One connection and one waiting request: two at a time mostly pass, many at a time don't.
pub(super) fn circuit_breaking(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[FORTIO, BREAKER], |cluster| {
        rolled_out(cluster, "fortio-deploy")?;
        let pods = cluster.pods("app=fortio")?;
        let pod = pods.first().context("no pod of fortio")?;
        let page = cluster.exec(
            pod,
            "fortio",
            &["fortio", "curl", "-quiet", "http://httpbin:8000/get"],
        )?;
        ensure!(page.contains("\"url\""), "not httpbin's answer: {page}");
        let report = cluster.wait("the limits to be there", || {
            let load = [
                "fortio",
                "load",
                "-c",
                "8",
                "-qps",
                "0",
                "-n",
                "80",
                "-loglevel",
                "Warning",
                "http://httpbin:8000/get",
            ];
            let report = cluster.exec(pod, "fortio", &load)?;
            let found = codes(&report);
            let of = |name: &str| {
                found
                    .iter()
                    .find(|(n, _)| n == name)
                    .map_or(0, |(_, count)| *count)
            };
            Ok(
                (of("Code 503") > 0 && of("Code 200") > 0 && of("Code 200") + of("Code 503") == 80)
                    .then_some(report),
            )
        })?;
        let stats = cluster.curl(pod, "istio-proxy", &["http://127.0.0.1:15000/stats"])?;
        let overflow = stats
            .lines()
            .find(|l| {
                l.contains("outbound|8000||httpbin.default.svc.cluster.local")
                    && l.contains("upstream_rq_pending_overflow")
            })
            .context("no count of upstream_rq_pending_overflow")?;
        ensure!(!overflow.ends_with(": 0"), "nothing overflowed: {overflow}");
        let metrics = cluster.curl(
            pod,
            "istio-proxy",
            &["http://127.0.0.1:15090/stats/prometheus"],
        )?;
        ensure!(
            metrics
                .lines()
                .any(|l| l.starts_with("istio_requests_total{")
                    && l.contains("response_flags=\"UO\"")),
            "no request is counted with the flag UO; {report}"
        );
        Ok(())
    })
}

/// Apart, so that it is deleted after what is in it.
const NAMESPACE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: mirroring, labels: {istio-injection: enabled}}
";
const MIRRORED: &str = "
apiVersion: v1
kind: Service
metadata: {name: httpbin, namespace: mirroring, labels: {app: httpbin}}
spec:
  selector: {app: httpbin}
  ports: [{name: http, port: 8000, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: httpbin-v1, namespace: mirroring, labels: {app: httpbin, version: v1}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: httpbin, image: 'mccutchen/go-httpbin:v2.15.0', ports: [{containerPort: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: httpbin-v2, namespace: mirroring, labels: {app: httpbin, version: v2}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: httpbin, image: 'mccutchen/go-httpbin:v2.15.0', ports: [{containerPort: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: mirroring}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: curl, image: 'curlimages/curl:8.16.0', command: [sleep, infinity]}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: httpbin, namespace: mirroring}
spec:
  host: httpbin
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
";

fn mirrored(mirror: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: httpbin, namespace: mirroring}}\nspec:\n  hosts: [httpbin]\n  http:\n  - route: [{{destination: {{host: httpbin, subset: v1}}, weight: 100}}]\n{mirror}"
    )
}

/// Copies of all requests reach v2, whose answers nobody sees; without the rule none do.
pub(super) fn mirroring(cluster: &mut Cluster) -> anyhow::Result<()> {
    let plain = mirrored("");
    with(cluster, &[NAMESPACE, MIRRORED, &plain], |cluster| {
        for pod in ["httpbin-v1", "httpbin-v2", "client"] {
            wait_running(cluster, "mirroring", pod)?;
        }
        let call = |path: &str| {
            let url = format!("http://httpbin:8000/{path}");
            let args = [
                "curl",
                "-sS",
                "--max-time",
                "10",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                &url,
            ];
            cluster.exec_in("mirroring", "client", "curl", &args)
        };
        let seen = |pod: &str, path: &str| -> anyhow::Result<usize> {
            let log = cluster.call(&["logs", pod, "-n", "mirroring", "-c", "httpbin"])?;
            Ok(log
                .lines()
                .filter(|line| line.contains(&format!("GET /{path} ")))
                .count())
        };
        cluster.wait("all to v1", || {
            for _ in 0..5 {
                ensure!(
                    call("anything/plain")?.trim() == "200",
                    "httpbin does not answer"
                );
            }
            let before = seen("httpbin-v2", "anything/plain")?;
            for _ in 0..5 {
                call("anything/plain")?;
            }
            Ok((seen("httpbin-v2", "anything/plain")? == before).then_some(()))
        })?;
        cluster.apply(&mirrored(
            "    mirror: {host: httpbin, subset: v2}\n    mirrorPercentage: {value: 100.0}\n",
        ))?;
        cluster.wait("copies at v2", || {
            call("anything/probe")?;
            Ok((seen("httpbin-v2", "anything/probe")? > 0).then_some(()))
        })?;
        for _ in 0..10 {
            ensure!(
                call("anything/mirrored")?.trim() == "200",
                "a mirrored request does not get its answer"
            );
        }
        cluster.wait("all ten copies", || {
            Ok((seen("httpbin-v2", "anything/mirrored")? == 10).then_some(()))
        })?;
        let first = seen("httpbin-v1", "anything/mirrored")?;
        ensure!(first == 10, "v1 got {first} of 10 requests");
        Ok(())
    })
}

/// The field's filter for the product page, as its sample has it.
const LOCAL_LIMIT: &str = sample!("ratelimit/local-rate-limit-service.yaml");

/// Four requests a minute for the product page's sidecar, and no more.
pub(super) fn local_rate_limit(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[LOCAL_LIMIT], |cluster| {
        let pods = cluster.pods("app=curl")?;
        let pod = pods.first().context("no pod of curl")?;
        let script = "for i in $(seq 10); do curl -sS --max-time 10 -o /dev/null -w '%{http_code} ' http://productpage:9080/productpage; done";
        cluster.wait("the limit to be there", || {
            let codes = cluster.exec(pod, "curl", &["sh", "-c", script])?;
            Ok(codes.contains("429").then_some(()))
        })?;
        let refused = cluster.curl(
            pod,
            "curl",
            &["-D", "-", "http://productpage:9080/productpage"],
        )?;
        for word in ["429", "x-local-rate-limit: true", "local_rate_limited"] {
            ensure!(
                refused.contains(word),
                "the refusal does not say {word:?}: {refused}"
            );
        }
        Ok(())
    })?;
    // The page must be whole again for what follows.
    let client = crate::e2e::http::Client::new(&cluster.gateway);
    let runtime = crate::e2e::http::runtime()?;
    cluster.wait("the limit to be gone", || {
        let mut whole = true;
        for _ in 0..6 {
            whole &= runtime.block_on(client.get("/productpage", &[]))?.status == 200;
        }
        Ok(whole.then_some(()))
    })
}
